"""What the router finds out about its workers by asking them: are they well, how loaded are they.

Every server is asked for its health at the interval of its workers, all its ranks by one question,
and a worker changes sides by `HealthState` alone: traffic that fails makes nobody unhealthy. A
worker that became unhealthy is thought to have lost its cache, and is asked what it is when it is
back; so is one that nobody could connect to until its circuit opened. Reported loads are kept with
their time, and dropped where a server does not tell any.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from router.config import RouterConfig
from router.metrics import RouterMetrics
from router.registration import NOT_JSON, Registration, bearer
from router.routing import Router
from router.upstream import Upstream, UpstreamError, probe
from router.workers import ReportedLoad, Worker, WorkerRegistry

TICK_S = 0.1
"""How exact the intervals are."""
LOAD_TIMEOUT_S = 5.0
RETURN_CHECK_S = 1.0
"""Between two looks whether a worker that was not there is back."""

logger = logging.getLogger("meshserve.router")


class Monitor:
    """Watches the registered workers.

    Args:
        on_unhealthy: told of every worker that stops answering its health checks.
        clock: seconds, that of `Router`.
    """

    def __init__(
        self,
        *,
        config: RouterConfig,
        registry: WorkerRegistry,
        router: Router,
        registration: Registration,
        upstream: Upstream,
        metrics: RouterMetrics,
        on_unhealthy: Callable[[Worker], None] = lambda worker: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._registry = registry
        self._router = router
        self._registration = registration
        self._upstream = upstream
        self._metrics = metrics
        self._on_unhealthy = on_unhealthy
        self._clock = clock
        self._loops: list[asyncio.Task[None]] = []
        self._asking: set[asyncio.Task[None]] = set()
        self._due: dict[str, float] = {}
        self._busy: set[str] = set()
        self._missed: set[str] = set()

    async def start(self) -> None:
        """Begin to watch."""
        self._loops.append(asyncio.create_task(self._watch_health()))
        if self._config.policy == "power_of_two":
            self._loops.append(asyncio.create_task(self._watch_loads()))
        if self._config.eviction_interval_secs > 0:
            self._loops.append(asyncio.create_task(self._forget_prefixes()))

    async def stop(self) -> None:
        """End it."""
        tasks = [*self._loops, *self._asking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def update_gauges(self) -> None:
        """Bring the gauges of all workers up to date, before they are read."""
        self._metrics.in_flight([worker.in_flight for worker in self._registry.list()])
        self._metrics.routing_keys(self._router.num_routing_keys)
        for worker in self._registry.list():
            breaker, metrics = worker.breaker, self._metrics
            metrics.worker_health(worker.url, worker.health.healthy)
            metrics.requests_active(worker.url, worker.in_flight)
            metrics.routing_keys_active(worker.url, len(worker.routing_keys))
            metrics.breaker(
                worker.url,
                breaker.state,
                breaker.consecutive_failures,
                breaker.consecutive_successes,
            )
            if worker.bit >= 0:
                metrics.tree(worker.url, self._router.index.num_blocks(worker.bit))

    async def read_loads(self) -> dict[str, int | None]:
        """The tokens that each worker says it has to do with now, by its name; None: no answer."""
        servers = self._registry.servers()
        answers = await asyncio.gather(*(self._ask_load(ranks[0]) for ranks in servers))
        told: dict[str, int | None] = {}
        now = self._clock()
        for ranks, loads in zip(servers, answers, strict=True):
            for worker in ranks:
                tokens = _tokens(loads, worker.rank)
                worker.reported = None if tokens is None else ReportedLoad(tokens=tokens, at=now)
                told[worker.url] = tokens
        return told

    # health

    async def _watch_health(self) -> None:
        while True:
            self._ask_who_is_due()
            await asyncio.sleep(TICK_S)

    def _ask_who_is_due(self) -> None:
        now = self._clock()
        servers = self._registry.servers()
        for ranks in servers:
            worker = ranks[0]
            self._look_for(worker, ranks)
            # Registered is asked: the first check comes an interval later.
            due = self._due.setdefault(worker.id, now + worker.health_check_interval_secs)
            # An interval that was shortened counts at once.
            due = min(due, now + worker.health_check_interval_secs)
            self._due[worker.id] = due
            if now < due or worker.disable_health_check or worker.id in self._busy:
                continue
            self._due[worker.id] = now + worker.health_check_interval_secs
            self._busy.add(worker.id)
            self._spawn(self._check(worker))
        if len(self._due) > len(servers):
            known = {ranks[0].id for ranks in servers}
            self._due = {key: due for key, due in self._due.items() if key in known}

    async def _check(self, worker: Worker) -> None:
        """One health check of a server, which counts for all its ranks."""
        try:
            success = await self._is_well(worker)
        finally:
            self._busy.discard(worker.id)
        for rank in self._registry.of_server(worker.base_url):
            self._metrics.health_check(success)
            if rank.health.record(success):
                self._changed(rank)
                if rank is worker and success:
                    await self._registration.refresh(worker)

    def _look_for(self, worker: Worker, ranks: Sequence[Worker]) -> None:
        """Begin to look for a server that nobody could connect to."""
        if worker.disable_health_check or worker.id in self._missed:
            return
        if any(rank.breaker.absent for rank in ranks):
            self._missed.add(worker.id)
            self._spawn(self._await_return(worker))

    async def _await_return(self, worker: Worker) -> None:
        """Try a server again as soon as it answers; these are no health checks."""
        try:
            while any(rank.breaker.absent for rank in self._registry.of_server(worker.base_url)):
                if await self._problem(worker) is None:
                    logger.info("Worker %s is there again.", worker.base_url)
                    for rank in self._registry.of_server(worker.base_url):
                        self._router.flushed(rank)
                        rank.breaker.present()
                    await self._registration.refresh(worker)
                else:
                    await asyncio.sleep(RETURN_CHECK_S)
        finally:
            self._missed.discard(worker.id)

    def _changed(self, worker: Worker) -> None:
        healthy = worker.health.healthy
        self._metrics.worker_health(worker.url, healthy)
        if healthy:
            logger.info("Worker %s is healthy again.", worker.url)
            # What failed was the server that went away.
            worker.breaker.reset()
            return
        logger.warning("Worker %s is unhealthy.", worker.url)
        self._router.flushed(worker)
        self._on_unhealthy(worker)

    async def _problem(self, worker: Worker) -> str | None:
        return await probe(
            self._upstream,
            worker.base_url,
            self._config.health_check_endpoint,
            bearer(worker.api_key),
            timeout=worker.health_check_timeout_secs,
        )

    async def _is_well(self, worker: Worker) -> bool:
        problem = await self._problem(worker)
        if problem is not None:
            logger.info("Health check of %s: %s", worker.base_url, problem)
        return problem is None

    # loads

    async def _watch_loads(self) -> None:
        while True:
            await self.read_loads()
            await asyncio.sleep(self._config.worker_startup_check_interval)

    async def _ask_load(self, worker: Worker) -> list[dict[str, Any]] | None:
        """What a server's ranks say of their loads; None if it says nothing."""
        try:
            for path in ("/get_load", "/v1/loads"):
                response = await self._upstream.request(
                    worker.base_url, "GET", path, bearer(worker.api_key), timeout=LOAD_TIMEOUT_S
                )
                content = await response.read()
                if response.status == 200:
                    return _loads(msgspec.json.decode(content))
        except (UpstreamError, *NOT_JSON) as error:
            logger.info("Load of %s: %s", worker.base_url, error)
        return None

    async def _forget_prefixes(self) -> None:
        while True:
            await asyncio.sleep(self._config.eviction_interval_secs)
            self._router.forget_old()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)


def _loads(told: Any) -> list[dict[str, Any]] | None:
    """The list of ranks in an answer, of the older or the newer form."""
    if isinstance(told, dict):
        told = told.get("loads", [told])
    if isinstance(told, list) and told and all(isinstance(each, dict) for each in told):
        return told
    return None


def _tokens(loads: Sequence[dict[str, Any]] | None, rank: int | None) -> int | None:
    """Tokens of a whole server, or of one of its ranks."""
    if loads is None:
        return None
    sizes = [
        each.get("num_tokens", each.get("num_total_tokens", each.get("num_used_tokens")))
        for each in loads
        if rank is None or each.get("dp_rank", 0) == rank
    ]
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    return sum(size for size in sizes if isinstance(size, int))
