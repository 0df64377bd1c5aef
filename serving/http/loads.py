"""How loaded each dp slice is: watched over time, and told on /v1/loads and /get_load.

The central queue and the requests whose grammar is being prepared belong to no slice. Where an
answer lists slices only, each is given an equal share of them (the first ones the remainder), so
that sums over slices are right.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from serving.engine_client import EngineClient, EngineFailed
from serving.http.errors import ApiError, json_response
from serving.http.metrics import TEXT_FORMAT
from serving.messages import EngineStatus, SliceCounters, SliceStatus

if TYPE_CHECKING:
    from serving.http.state import ServerState

SECTIONS = ("all", "core", "disagg", "lora", "memory", "queues", "spec")
"""What `include` may name. This engine has nothing to say in disagg, lora and spec."""
MIN_INTERVAL_S = 1.0
"""Shortest time that a throughput is an average of."""
WATCH_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a slice did between the last two samples."""

    generated_per_s: float
    retracted: int


class LoadWatch:
    """Asks the engine for its status and remembers enough of it to tell what happens per second."""

    def __init__(
        self, engine: EngineClient, timer: Callable[[], float] = time.perf_counter
    ) -> None:
        self._engine, self._timer = engine, timer
        start = timer(), dict[int, SliceCounters]()
        self._before = self._latest = start

    async def sample(self, timeout_s: float = 5.0) -> EngineStatus:
        """The engine's status now.

        Raises:
            EngineFailed: the engine is gone, or does not answer in time.
        """
        status = await self._engine.status(timeout_s)
        now = self._timer()
        if now - self._latest[0] >= MIN_INTERVAL_S:
            self._before = self._latest
            self._latest = now, {part.dp_rank: part.counters for part in status.slices}
        return status

    def rates(self, dp_rank: int) -> Rates:
        """Of the last interval of at least a second; zeros before there is one."""
        (began, before), (ended, latest) = self._before, self._latest
        if ended <= began:
            return Rates(generated_per_s=0.0, retracted=0)
        old, new = (counters.get(dp_rank, SliceCounters()) for counters in (before, latest))
        return Rates(
            generated_per_s=(new.generated_tokens - old.generated_tokens) / (ended - began),
            retracted=new.retracted - old.retracted,
        )

    async def watch(self) -> None:
        """Sample for ever, so that throughputs are recent; ends when the engine does."""
        while self._engine.alive:
            await asyncio.sleep(WATCH_INTERVAL_S)
            try:
                await self.sample()
            except EngineFailed:
                continue


def central_queue(status: EngineStatus) -> int:
    """Waiting requests that any slice may run."""
    return max(0, status.waiting - sum(part.waiting for part in status.slices))


def share(total: int, index: int, num: int) -> int:
    """Of `total` things, those that fall to number `index` of `num`."""
    return total // num + (index < total % num)


def hit_rate(part: SliceStatus) -> float:
    """Share of prompt tokens found in the prefix cache, since the start."""
    counters = part.counters
    return counters.cached_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0


def utilization(part: SliceStatus) -> float:
    """How full the slice is: in requests or in KV tokens, whichever is fuller."""
    places = part.running / part.max_running if part.max_running else 0.0
    return max(places, part.used_tokens / part.total_tokens if part.total_tokens else 0.0)


async def loads(state: ServerState, request: Request) -> Response:
    """GET /v1/loads?dp_rank=&include=core,memory,queues&format=json|prometheus."""
    query = request.query_params
    sections = _sections(query.get("include"))
    rank = _integer(query.get("dp_rank"), "dp_rank")
    style = query.get("format", "json")
    if style not in ("json", "prometheus"):
        raise ApiError(f"format must be json or prometheus, got '{style}'.", param="format")
    status = await state.loads.sample()
    told = [
        _load(state, status, i, sections)
        for i, part in enumerate(status.slices)
        if rank is None or part.dp_rank == rank
    ]
    if style == "prometheus":
        return Response(_as_gauges(told), media_type=TEXT_FORMAT)
    details = state.engine.ready.details
    return json_response(
        {
            "timestamp": datetime.fromtimestamp(state.clock(), UTC).isoformat(),
            "version": state.version,
            "accelerator": details.get("device"),
            "num_accelerators": details.get("num_devices"),
            "loads": told,
        }
    )


async def get_load(state: ServerState, request: Request) -> Response:
    """GET /get_load, the older form."""
    status = await state.loads.sample()
    return json_response(
        [
            {
                "dp_rank": load["dp_rank"],
                "num_reqs": load["num_running_reqs"] + load["num_waiting_reqs"],
                "num_waiting_reqs": load["num_waiting_reqs"],
                "num_tokens": load["num_total_tokens"] + load["num_waiting_uncached_tokens"],
                "ts_tic": state.timer(),
            }
            for load in (_load(state, status, i, {"core"}) for i in range(len(status.slices)))
        ]
    )


def memory_usage(state: ServerState, part: SliceStatus) -> dict[str, Any]:
    """Of one device of the slice, in GB (10^9 bytes), as far as the engine said."""
    details = state.engine.ready.details
    sizes = {
        name: round(details[source] / 1e9, 3)
        for name, source in (
            ("weight_gb", "weight_bytes_per_device"),
            ("kv_cache_gb", "kv_bytes_per_device"),
        )
        if source in details
    }
    return {**sizes, "token_capacity": part.total_tokens}


def _load(
    state: ServerState, status: EngineStatus, index: int, sections: set[str]
) -> dict[str, Any]:
    part = status.slices[index]
    waiting = part.waiting + share(central_queue(status), index, len(status.slices))
    grammar = share(status.grammar_queue, index, len(status.slices))
    load: dict[str, Any] = {
        "dp_rank": part.dp_rank,
        "timestamp": state.clock(),
        "num_running_reqs": part.running,
        "num_waiting_reqs": waiting + grammar,
        # What the cache will spare a waiting request is known when it starts.
        "num_waiting_uncached_tokens": share(status.waiting_tokens, index, len(status.slices)),
        "num_used_tokens": part.used_tokens,
        "num_total_tokens": part.used_tokens + part.pending_prefill_tokens,
        "max_total_num_tokens": part.total_tokens,
        "token_usage": part.used_tokens / part.total_tokens if part.total_tokens else 0.0,
        "gen_throughput": state.loads.rates(part.dp_rank).generated_per_s,
        "cache_hit_rate": hit_rate(part),
        "utilization": utilization(part),
        "max_running_requests": part.max_running,
    }
    if sections & {"memory", "all"}:
        load["memory"] = memory_usage(state, part)
    if sections & {"queues", "all"}:
        retracted = state.loads.rates(part.dp_rank).retracted
        load["queues"] = {
            "waiting": waiting,
            "grammar": grammar,
            "paused": 0,
            "retracted": retracted,
        }
    return load


def _sections(include: str | None) -> set[str]:
    names = {name.strip() for name in (include or "all").split(",")} - {""}
    wrong = sorted(names - set(SECTIONS))
    if wrong:
        listed = ", ".join(f"'{name}'" for name in wrong)
        raise ApiError(
            f"Invalid include sections: {{{listed}}}. Valid options: {list(SECTIONS)}",
            param="include",
        )
    return names or {"all"}


def _integer(text: str | None, name: str) -> int | None:
    if text is None or text == "":
        return None
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 12):
        raise ApiError(f"{name} must be an integer, got '{text[:64]}'.", param=name)
    return int(text)


def _as_gauges(told: list[dict[str, Any]]) -> bytes:
    """`sglang_<field>{dp_rank="i"}` for every number; those of a section are prefixed by it."""
    registry = CollectorRegistry()
    gauges: dict[str, Gauge] = {}
    for load in told:
        fields = {key: value for key, value in load.items() if not isinstance(value, dict)}
        for section, values in load.items():
            if isinstance(values, dict):
                fields |= {f"{section}_{key}": value for key, value in values.items()}
        rank = str(fields.pop("dp_rank"))
        for key, value in fields.items():
            name = f"sglang_{key}"
            if name not in gauges:
                text = f"{key} of /v1/loads"
                gauges[name] = Gauge(name, text, ("dp_rank",), registry=registry)
            gauges[name].labels(rank).set(value)
    return generate_latest(registry)
