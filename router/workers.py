"""The workers: what the router knows of each, and the set of them.

A worker is a server behind the router, or with --dp-aware one DP rank of it. `Worker` holds its
state and no behaviour; who may change what is said at each attribute.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.breaker import CircuitBreaker, State
from router.config import RouterConfig
from router.health import HealthState

UNKNOWN_MODEL = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedLoad:
    """What a worker said of its load, and when, by the router's clock."""

    tokens: int
    at: float


@dataclass(slots=True, kw_only=True, eq=False)
class Worker:
    """One worker; compared by identity.

    Attributes:
        url: its name, unique in the registry: `base_url`, and "@RANK" behind it for a rank.
        rank: the DP rank that its requests are addressed to; None for a whole server.
        api_key: sent to it as a Bearer.
        info: what it said of itself when it was registered.
        supports_continuation: it can go on with another worker's stream.
        capacity_tokens: KV tokens that it holds; None if it did not say.
        max_running: requests that it runs at once; None if it did not say.
        draining: it gets no new requests. Set by whoever removes it.
        in_flight: requests that the router has given it and that run. Kept by `Ticket`.
        backlog_tokens: estimated prompt tokens of those that have no first token yet. Likewise.
        routing_keys: how many of them have which routing key. Likewise.
        reported: its own word on its load. Set by the monitor.
        bit: its place in the prefix index. Set by `Router`.
        surprises: answers in a row that had nothing cached of what must have been. Likewise.
    """

    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    url: str
    base_url: str
    rank: int | None = None
    model_id: str = UNKNOWN_MODEL
    api_key: str | None = field(default=None, repr=False)
    worker_type: str = "regular"
    priority: int = 50
    cost: float = 1.0
    labels: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    supports_continuation: bool = False
    capacity_tokens: int | None = None
    max_running: int | None = None
    health: HealthState
    breaker: CircuitBreaker
    health_check_timeout_secs: float = 5.0
    health_check_interval_secs: float = 60.0
    disable_health_check: bool = False
    draining: bool = False
    in_flight: int = 0
    backlog_tokens: float = 0.0
    routing_keys: dict[str, int] = field(default_factory=dict)
    reported: ReportedLoad | None = None
    bit: int = -1
    surprises: int = 0

    @property
    def available(self) -> bool:
        """Whether a request may be given to it now."""
        return self.health.healthy and not self.draining and self.breaker.allows


def make_worker(
    config: RouterConfig,
    url: str,
    *,
    rank: int | None = None,
    clock: Callable[[], float],
    on_transition: Callable[[str, State, State], None] = lambda url, before, after: None,
    **fields: Any,
) -> Worker:
    """A worker with the thresholds of the configuration, where `fields` has no others.

    Args:
        url: of the server, without a rank.
        on_transition: told (worker's name, from, to) when its circuit changes.
        fields: of `Worker`, and `health_failure_threshold`, `health_success_threshold`.
    """
    base_url = url.rstrip("/")
    name = base_url if rank is None else f"{base_url}@{rank}"
    failures = fields.pop("health_failure_threshold", None)
    successes = fields.pop("health_success_threshold", None)
    defaults = {
        "health_check_timeout_secs": config.health_check_timeout_secs,
        "health_check_interval_secs": config.health_check_interval_secs,
        "disable_health_check": config.disable_health_check,
    }
    return Worker(
        url=name,
        base_url=base_url,
        rank=rank,
        health=HealthState(
            failure_threshold=failures or config.health_failure_threshold,
            success_threshold=successes or config.health_success_threshold,
        ),
        breaker=CircuitBreaker(
            failure_threshold=None
            if config.disable_circuit_breaker
            else config.cb_failure_threshold,
            success_threshold=config.cb_success_threshold,
            timeout_s=config.cb_timeout_duration_secs,
            clock=clock,
            on_transition=lambda before, after: on_transition(name, before, after),
        ),
        **{**defaults, **fields},
    )


class WorkerRegistry:
    """The set of workers, in the order in which they came."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._listed: tuple[Worker, ...] = ()

    def add(self, worker: Worker) -> None:
        """Raises ValueError if there is one of this name already."""
        if self.by_url(worker.url) is not None:
            raise ValueError(f"Worker {worker.url} is registered already.")
        self._workers[worker.id] = worker
        self._listed = tuple(self._workers.values())

    def remove(self, worker: Worker) -> None:
        """Harmless if it is gone already."""
        self._workers.pop(worker.id, None)
        self._listed = tuple(self._workers.values())

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def by_url(self, url: str) -> Worker | None:
        """The worker of this name."""
        return next((worker for worker in self._listed if worker.url == url), None)

    def of_server(self, base_url: str) -> Sequence[Worker]:
        """All workers of one server, its ranks."""
        base_url = base_url.rstrip("/")
        return [worker for worker in self._listed if worker.base_url == base_url]

    def servers(self) -> Sequence[Sequence[Worker]]:
        """The workers, those of one server together."""
        servers: dict[str, list[Worker]] = {}
        for worker in self._listed:
            servers.setdefault(worker.base_url, []).append(worker)
        return tuple(servers.values())

    def list(self) -> tuple[Worker, ...]:
        return self._listed

    def available(
        self, model: str | None = None, exclude: Collection[Worker] = ()
    ) -> Sequence[Worker]:
        """Those that a request may be given to now.

        Args:
            model: only workers of this model; None for any.
        """
        return [
            worker
            for worker in self._listed
            if worker.available
            and worker not in exclude
            and (model is None or worker.model_id == model)
        ]
