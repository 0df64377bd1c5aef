"""Workers come and go: jobs that probe a server, ask what it is, and put it in the registry.

A job is accepted at once and done in the background; its state can be read until five minutes
after it failed. It promises that the id a job was accepted under is the id of the worker it
becomes, that a worker is in the registry only when it has answered, and that one that is to go gets
no new request from then on while those that run there end undisturbed.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from router.config import RouterConfig
from router.health import HealthState
from router.metrics import RouterMetrics
from router.routing import Router
from router.upstream import Headers, Upstream, UpstreamError, parse_target, probe
from router.workers import UNKNOWN_MODEL, Worker, WorkerRegistry, make_worker

PROBE_WAITS_S = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
"""Between two probes of a server that does not answer yet; the last one again and again."""
INFO_TIMEOUT_S = 5.0
INFO_TRIES = 3
INFO_PAUSE_S = 1.0
MAX_JOBS = 1000
KEPT_S = 300.0
"""How long a failed job can be asked for."""
DRAIN_LOOK_S = 0.05

LABELS = (
    *("served_model_name", "model_path", "tokenizer_path", "model_type", "version"),
    *("tp_size", "dp_size", "ep_size", "page_size", "max_total_num_tokens"),
    *("max_running_requests", "context_length", "is_generation", "weight_version"),
)
"""What a server says of itself that becomes its labels."""

NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What reading a server's answer as JSON may raise."""

logger = logging.getLogger("meshserve.router")

State = Literal["pending", "processing", "failed"]


class RegistrationError(ValueError):
    """A worker cannot be added, changed or removed; one sentence."""


class QueueFull(RegistrationError):
    """Too many jobs wait."""


class _HealthFields(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How one worker's health is checked, where it is not as the flags say."""

    health_check_timeout_secs: float | None = None
    health_check_interval_secs: float | None = None
    health_success_threshold: int | None = None
    health_failure_threshold: int | None = None
    disable_health_check: bool | None = None

    def check(self) -> None:
        """Raises RegistrationError for a value out of range."""
        for name in ("health_check_timeout_secs", "health_check_interval_secs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RegistrationError(f"{name} must be positive, got {value}.")
        for name in ("health_success_threshold", "health_failure_threshold"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RegistrationError(f"{name} must be at least 1, got {value}.")


class NewWorker(_HealthFields, kw_only=True, omit_defaults=True):
    """What a worker is added with; fields that only gRPC workers need are accepted and unused."""

    url: str
    api_key: str | None = None
    model_id: str | None = None
    priority: int = 50
    cost: float = 1.0
    worker_type: Literal["regular", "prefill", "decode"] = "regular"
    labels: dict[str, str] = {}
    dp_aware: bool | None = None

    def check(self) -> None:
        """Raises RegistrationError for a value that cannot be served."""
        super().check()
        if self.worker_type != "regular":
            raise RegistrationError(
                f"worker_type '{self.worker_type}' is not served: this router has no separate "
                "prefill and decode workers; leave it out, or say 'regular'."
            )


class Changes(_HealthFields, kw_only=True, omit_defaults=True):
    """What can be changed of a worker; None leaves it."""

    priority: int | None = None
    cost: float | None = None
    labels: dict[str, str] | None = None
    api_key: str | None = None


@dataclass(slots=True, kw_only=True)
class Job:
    """One worker that is being added or removed.

    Attributes:
        id: of the worker.
        timestamp: Unix time of the last change of its state.
        done: set when it is over, well or not.
    """

    id: str
    url: str
    kind: Literal["AddWorker", "RemoveWorker"]
    state: State = "pending"
    message: str | None = None
    timestamp: float = field(default_factory=time.time)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self, state: State, message: str | None = None) -> None:
        self.state, self.message, self.timestamp = state, message, time.time()

    def status(self) -> dict[str, Any]:
        """The form in answers."""
        return {
            "job_type": self.kind,
            "worker_url": self.url,
            "status": self.state,
            "message": self.message,
            "timestamp": int(self.timestamp),
        }


def normal_url(url: str) -> str:
    """A worker's URL as it stands in the registry: with a scheme, without a slash at the end.

    Raises:
        RegistrationError: no worker can be there.
    """
    url = url.strip().rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    if url.startswith("grpc"):
        raise RegistrationError(f"gRPC workers are not served: '{url}'; use http://host:port.")
    try:
        parse_target(url)
    except ValueError as error:
        raise RegistrationError(str(error)) from None
    return url


class Registration:
    """Adds, changes and removes workers; the only one who does.

    Args:
        clock: seconds, that of `Router`.

    Attributes:
        expected: why workers are not here that somebody else will add, by URL; for readiness.
    """

    def __init__(
        self,
        *,
        config: RouterConfig,
        registry: WorkerRegistry,
        router: Router,
        upstream: Upstream,
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._registry = registry
        self._router = router
        self._upstream = upstream
        self._metrics = metrics
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.expected: dict[str, str] = {}

    async def start(self) -> None:
        """Begin to add the workers that the flags name, which get the router's key."""
        if self._config.service_discovery:
            if self._config.worker_urls:
                logger.warning("--service-discovery: --worker-urls is not used.")
            return
        for url in self._config.worker_urls:
            try:
                self.add(NewWorker(url=url, api_key=self._config.api_key), source="static")
            except RegistrationError as error:
                logger.error("Worker %s: %s", url, error)

    async def stop(self) -> None:
        """Give up what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def jobs(self) -> list[Job]:
        """Those that run, and those that failed lately."""
        self._forget_old()
        return list(self._jobs.values())

    def job(self, worker_id: str) -> Job | None:
        """The job of a worker that is being added or removed, or could not be added."""
        self._forget_old()
        return self._jobs.get(worker_id)

    def add(self, new: NewWorker, *, source: str = "api") -> Job:
        """Begin to add a worker.

        Args:
            source: who knows of it, for metrics.

        Raises:
            RegistrationError: it can never be served.
            QueueFull: try again.
        """
        new.check()
        job = Job(id=str(uuid.uuid4()), url=normal_url(new.url), kind="AddWorker")
        self._forget_old()
        if len(self._tasks) >= MAX_JOBS:
            raise QueueFull(f"{MAX_JOBS} workers are being added or removed already.")
        if source == "api" and new.api_key is None and self._config.api_key is not None:
            logger.warning(
                "Worker %s is added without a key; the router's own is not sent to it.", job.url
            )
        self._run(job, self._add(job, new, source))
        return job

    def remove(
        self, url: str, *, drain_s: float = 0.0, source: str = "api", reason: str = "requested"
    ) -> Job | None:
        """Begin to remove a server with all its ranks; None if it is neither here nor coming.

        Args:
            drain_s: how long requests that run there may keep it in the registry.
        """
        url = normal_url(url)
        coming = [job for job in self._jobs.values() if job.kind == "AddWorker" and job.url == url]
        for job in coming:
            task = self._tasks.get(job.id)
            if task is not None:
                task.cancel()
            self._jobs.pop(job.id, None)
            job.done.set()
        workers = self._registry.of_server(url)
        if not workers:
            if not coming:
                return None
            return Job(id=coming[0].id, url=url, kind="RemoveWorker")
        for worker in workers:
            worker.draining = True
        job = Job(id=workers[0].id, url=url, kind="RemoveWorker")
        if drain_s > 0 and any(worker.in_flight for worker in workers):
            if job.id in self._tasks:
                return self._jobs[job.id]
            self._run(job, self._drain(job, list(workers), drain_s, source, reason))
        else:
            self._take_out(list(workers), source, reason)
            job.done.set()
        return job

    def update(self, worker: Worker, changes: Changes) -> None:
        """Change a worker, all ranks of its server where it is about the server.

        Raises:
            RegistrationError: a value is out of range.
        """
        changes.check()
        if changes.priority is not None:
            worker.priority = changes.priority
        if changes.cost is not None:
            worker.cost = changes.cost
        if changes.labels is not None:
            worker.labels = {**worker.labels, **changes.labels}
        for rank in self._registry.of_server(worker.base_url):
            if changes.api_key is not None:
                rank.api_key = changes.api_key
            self._change_health(rank, changes)

    async def refresh(self, worker: Worker) -> None:
        """Ask a server anew what it is: it was away, and may be another one now."""
        info = await self._ask_info(worker.base_url, worker.api_key)
        for rank in self._registry.of_server(worker.base_url):
            if not info:
                return
            rank.info = info
            rank.supports_continuation = info.get("continue_from") is True
            rank.capacity_tokens, rank.max_running = capacity(info, rank.rank)
            self._router.capacity_changed(rank)

    # adding

    def _run(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        self._jobs[job.id] = job
        task = asyncio.create_task(self._guarded(job, work))
        self._tasks[job.id] = task

    async def _guarded(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        try:
            job.change("processing")
            await work
            self._jobs.pop(job.id, None)
        except RegistrationError as error:
            logger.error("Worker %s: %s", job.url, error)
            job.change("failed", str(error))
        except Exception:
            logger.exception("Worker %s", job.url)
            job.change("failed", "The router failed; its log says how.")
        finally:
            self._tasks.pop(job.id, None)
            job.done.set()

    async def _add(self, job: Job, new: NewWorker, source: str) -> None:
        try:
            self._check_new(job.url)
            await self._until_well(job.url, new)
            info = await self._ask_info(job.url, new.api_key)
            self._check_new(job.url)
        except RegistrationError:
            self._metrics.registration(source, "failed")
            raise
        aware = self._config.dp_aware if new.dp_aware is None else new.dp_aware
        ranks = range(num_ranks(info)) if aware else [None]
        for i, rank in enumerate(ranks):
            worker = self._make(job.url, rank, new, info)
            if not i:
                worker.id = job.id
            self._registry.add(worker)
            self._router.worker_added(worker)
            self._metrics.worker_health(worker.url, True)
        self._count(worker.model_id)
        self._metrics.registration(source, "success")
        logger.info("Worker %s is registered (model %s).", job.url, worker.model_id)

    def _check_new(self, url: str) -> None:
        if self._registry.of_server(url):
            raise RegistrationError(f"Worker {url} already exists.")

    async def _until_well(self, url: str, new: NewWorker) -> None:
        """Wait until the server answers its health check.

        Raises:
            RegistrationError: not within the time that it has.
        """
        patience = self._config.worker_startup_timeout_secs
        deadline = self._clock() + patience
        timeout = new.health_check_timeout_secs or self._config.health_check_timeout_secs
        tries = 0
        while True:
            problem = await probe(
                self._upstream,
                url,
                self._config.health_check_endpoint,
                bearer(new.api_key),
                timeout=timeout,
            )
            if problem is None:
                return
            wait = PROBE_WAITS_S[min(tries, len(PROBE_WAITS_S) - 1)]
            if tries == 0:
                logger.info("Worker %s is not up yet (%s).", url, problem)
            if self._clock() + wait > deadline:
                raise RegistrationError(
                    f"The worker was not healthy within {patience:g} s "
                    f"(--worker-startup-timeout-secs): {problem}."
                )
            tries += 1
            await asyncio.sleep(wait)

    async def _ask_info(self, url: str, api_key: str | None) -> dict[str, Any]:
        """What a server says of itself, all in one; what it does not say is missing."""
        info: dict[str, Any] = {}
        for paths in (("/get_server_info", "/server_info"), ("/get_model_info", "/model_info")):
            info |= await self._ask_one(url, api_key, paths)
        if not info.get("served_model_name"):
            models = (await self._ask_one(url, api_key, ("/v1/models",))).get("data")
            with suppress(TypeError, LookupError):
                info["served_model_name"] = models[0]["id"]  # type: ignore[index]
        return info

    async def _ask_one(
        self, url: str, api_key: str | None, paths: tuple[str, ...]
    ) -> dict[str, Any]:
        """The JSON object behind the first of some paths that has one; else an empty one."""
        for i in range(INFO_TRIES):
            try:
                for path in paths:
                    response = await self._upstream.request(
                        url, "GET", path, bearer(api_key), timeout=INFO_TIMEOUT_S
                    )
                    content = await response.read()
                    if response.status == 200:
                        told = msgspec.json.decode(content)
                        return told if isinstance(told, dict) else {}
                return {}
            except NOT_JSON:
                return {}
            except UpstreamError:
                if i + 1 < INFO_TRIES:
                    await asyncio.sleep(INFO_PAUSE_S)
        return {}

    def _make(self, url: str, rank: int | None, new: NewWorker, info: dict[str, Any]) -> Worker:
        tokens, running = capacity(info, rank)
        fields: dict[str, Any] = {
            name: value
            for name in _HealthFields.__struct_fields__
            if (value := getattr(new, name)) is not None
        }
        found = {k: _label(info[k]) for k in LABELS if info.get(k) is not None}
        return make_worker(
            self._config,
            url,
            rank=rank,
            clock=self._clock,
            on_transition=self._metrics.breaker_transition,
            model_id=new.model_id or model_id(info),
            api_key=new.api_key,
            priority=new.priority,
            cost=new.cost,
            labels={**found, **new.labels},
            info=info,
            supports_continuation=info.get("continue_from") is True,
            capacity_tokens=tokens,
            max_running=running,
            **fields,
        )

    # removing and changing

    async def _drain(
        self, job: Job, workers: list[Worker], drain_s: float, source: str, reason: str
    ) -> None:
        deadline = self._clock() + drain_s
        while any(w.in_flight for w in workers) and self._clock() < deadline:
            await asyncio.sleep(DRAIN_LOOK_S)
        self._take_out(workers, source, reason)

    def _take_out(self, workers: list[Worker], source: str, reason: str) -> None:
        workers = [w for w in workers if self._registry.get(w.id) is w]
        if not workers:
            return  # a removal without patience was faster
        for worker in workers:
            worker.draining = True
            self._registry.remove(worker)
            self._router.worker_removed(worker)
            self._metrics.worker_removed(worker.url)
            self._count(worker.model_id)
        base_url = workers[0].base_url
        self._upstream.forget(base_url)
        self._metrics.deregistration(source, reason)
        logger.info("Worker %s is removed (%s).", base_url, reason)

    def _change_health(self, worker: Worker, changes: Changes) -> None:
        if changes.disable_health_check is not None:
            worker.disable_health_check = changes.disable_health_check
        if changes.health_check_timeout_secs is not None:
            worker.health_check_timeout_secs = changes.health_check_timeout_secs
        if changes.health_check_interval_secs is not None:
            worker.health_check_interval_secs = changes.health_check_interval_secs
        failures, successes = changes.health_failure_threshold, changes.health_success_threshold
        if failures is not None or successes is not None:
            before = worker.health
            worker.health = HealthState(
                failure_threshold=failures or before.failure_threshold,
                success_threshold=successes or before.success_threshold,
            )
            worker.health.healthy = before.healthy

    def _count(self, model: str) -> None:
        num = sum(worker.model_id == model for worker in self._registry.list())
        self._metrics.pool_size(model, num)

    def _forget_old(self) -> None:
        oldest = time.time() - KEPT_S
        for job in [j for j in self._jobs.values() if j.state == "failed"]:
            if job.timestamp < oldest:
                del self._jobs[job.id]


def bearer(api_key: str | None) -> Headers:
    """The header that shows a key to a worker."""
    if api_key is None:
        return ()
    return ((b"authorization", b"Bearer " + api_key.encode()),)


def model_id(info: Mapping[str, Any]) -> str:
    """The name of a server's model."""
    for name in ("served_model_name", "model_path"):
        value = info.get(name)
        if isinstance(value, str) and value:
            return value
    return UNKNOWN_MODEL


def num_ranks(info: Mapping[str, Any]) -> int:
    """DP ranks of a server, by what it says of itself."""
    for name in ("num_slices", "dp_size"):
        value = info.get(name)
        if isinstance(value, int) and value >= 1:
            return value
    return 1


def capacity(info: Mapping[str, Any], rank: int | None) -> tuple[int | None, int | None]:
    """KV tokens, and requests at once, of a server or one of its ranks; None where it is silent.

    A server that says how many its slices are tells the tokens of one slice.
    """
    tokens, running = info.get("max_total_num_tokens"), info.get("max_running_requests")
    share = num_ranks(info)
    if not isinstance(tokens, int) or tokens < 1:
        tokens = None
    elif rank is None and (info.get("num_slices") or info.get("enable_dp_attention")):
        tokens *= share
    states = info.get("internal_states")
    per_rank = [
        state["effective_max_running_requests_per_dp"]
        for state in (states if isinstance(states, list) else ())
        if isinstance(state, dict)
        and isinstance(state.get("effective_max_running_requests_per_dp"), int)
    ]
    if per_rank and rank is None:
        running = sum(per_rank)
    elif per_rank and rank is not None:
        running = per_rank[min(rank, len(per_rank) - 1)]
    elif isinstance(running, int) and running >= 1:
        running = running if rank is None else max(1, running // share)
    else:
        running = None
    return tokens, running


def _label(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
