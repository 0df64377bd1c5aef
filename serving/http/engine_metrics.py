"""GET /metrics: what the engine says of its slices at this moment, beside the front's own metrics.

Every scrape asks the engine once; where it does not answer, the front's metrics come alone. Every
metric of the engine has the labels of SGLang's scheduler. `dp_rank` is a slice, "any" for the
central queue (its requests may go to any slice), or "all" for what the slices do together (a step
is one program on all of them), so that sums over `dp_rank` count nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from serving.engine_client import EngineFailed
from serving.http.loads import LoadWatch, central_queue, hit_rate, utilization
from serving.http.metrics import PREFIX, TEXT_FORMAT
from serving.messages import EngineStatus, Ready, SliceCounters, SliceStatus

if TYPE_CHECKING:
    from serving.http.state import ServerState

SCRAPE_TIMEOUT_S = 2.0

LABELS = ("model_name", "engine_type", "tp_rank", "pp_rank", "dp_rank", "moe_ep_rank")

SliceGauge = tuple[str, str, Callable[[SliceStatus], float]]
SliceCounter = tuple[str, str, Callable[[SliceCounters], float]]

SLICE_GAUGES: tuple[SliceGauge, ...] = (
    ("num_running_reqs", "Running requests.", lambda s: s.running),
    ("num_used_tokens", "KV tokens held by running requests.", lambda s: s.used_tokens),
    ("kv_used_tokens", "KV tokens held by running requests.", lambda s: s.used_tokens),
    (
        "kv_evictable_tokens",
        "KV tokens in the prefix cache that no request holds.",
        lambda s: s.cached_tokens,
    ),
    (
        "kv_available_tokens",
        "KV tokens that hold nothing.",
        lambda s: s.total_tokens - s.used_tokens - s.cached_tokens,
    ),
    (
        "token_usage",
        "Share of the KV pool held by running requests.",
        lambda s: s.used_tokens / s.total_tokens if s.total_tokens else 0.0,
    ),
    (
        "cache_hit_rate",
        "Share of prompt tokens found in the prefix cache since the start.",
        hit_rate,
    ),
    (
        "decode_sum_seq_lens",
        "Sum of the lengths of running requests, in tokens.",
        lambda s: s.decode_context_tokens,
    ),
    (
        "pending_prefill_tokens",
        "Prompt tokens of running requests still to compute.",
        lambda s: s.pending_prefill_tokens,
    ),
    ("max_total_num_tokens", "KV tokens of the pool.", lambda s: s.total_tokens),
    ("max_running_requests", "Most requests that run at once.", lambda s: s.max_running),
    ("utilization", "How full the slice is, in requests or KV tokens.", utilization),
)

SLICE_COUNTERS: tuple[SliceCounter, ...] = (
    ("prompt_tokens", "Prompt tokens of started requests.", lambda c: c.prompt_tokens),
    ("generation_tokens", "Generated tokens.", lambda c: c.generated_tokens),
    ("num_requests", "Finished requests.", lambda c: c.finished),
    ("num_started_requests", "Requests whose prompt was begun.", lambda c: c.started),
    ("num_aborted_requests", "Aborted requests.", lambda c: c.aborted),
    (
        "num_retracted_requests",
        "Requests sent back to the queue.",
        lambda c: c.retracted,
    ),
    (
        "num_retracted_input_tokens",
        "Prompt tokens of requests sent back to the queue.",
        lambda c: c.retracted_input_tokens,
    ),
    (
        "num_retracted_output_tokens",
        "Generated tokens of requests sent back to the queue.",
        lambda c: c.retracted_output_tokens,
    ),
    ("evicted_tokens", "KV tokens evicted from the prefix cache.", lambda c: c.evicted_tokens),
)


async def metrics(state: ServerState, request: Request) -> Response:
    """GET /metrics in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(state.metrics)
    try:
        status = await state.loads.sample(SCRAPE_TIMEOUT_S)
    except EngineFailed:
        return Response(generate_latest(registry), media_type=TEXT_FORMAT)
    registry.register(
        EngineCollector(
            status=status,
            loads=state.loads,
            ready=state.engine.ready,
            model_name=state.config.model_name,
        )
    )
    return Response(generate_latest(registry), media_type=TEXT_FORMAT)


class EngineCollector(Collector):
    """One status as Prometheus metrics."""

    def __init__(
        self, *, status: EngineStatus, loads: LoadWatch, ready: Ready, model_name: str
    ) -> None:
        self._status, self._loads, self._ready = status, loads, ready
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        yield from self._slice_gauges()
        yield from self._slice_counters()
        yield from self._steps()
        yield from self._start()

    def _slice_gauges(self) -> Iterator[Metric]:
        slices = self._status.slices
        for name, text, value in SLICE_GAUGES:
            yield self._gauge(name, text, ((part.dp_rank, value(part)) for part in slices))
        queued: list[tuple[int | str, float]] = [(part.dp_rank, part.waiting) for part in slices]
        yield self._gauge(
            "num_queue_reqs",
            'Waiting requests; those that any slice may run have dp_rank "any".',
            [*queued, ("any", central_queue(self._status))],
        )
        yield self._gauge(
            "num_grammar_queue_reqs",
            "Requests whose grammar is being prepared, before they are queued.",
            [("any", self._status.grammar_queue)],
        )
        rates = [(part.dp_rank, self._loads.rates(part.dp_rank)) for part in slices]
        yield self._gauge(
            "gen_throughput",
            "Generated tokens per second, of the last few seconds.",
            ((rank, rate.generated_per_s) for rank, rate in rates),
        )
        yield self._gauge(
            "num_retracted_reqs",
            "Requests sent back to the queue in the last few seconds.",
            ((rank, rate.retracted) for rank, rate in rates),
        )

    def _slice_counters(self) -> Iterator[Metric]:
        parts = [(part.dp_rank, part.counters) for part in self._status.slices]
        for name, text, value in SLICE_COUNTERS:
            yield self._counter(name, text, (((rank,), value(c)) for rank, c in parts))
        yield self._counter(
            "cached_tokens",
            "Prompt tokens found in the prefix cache.",
            (((rank, "device"), c.cached_tokens) for rank, c in parts),
            "cache_source",
        )
        yield self._counter(
            "realtime_tokens",
            "Tokens computed, or taken from the cache.",
            (
                ((rank, mode), value)
                for rank, c in parts
                for mode, value in (
                    ("prefill_compute", c.prompt_tokens - c.cached_tokens),
                    ("prefill_cache", c.cached_tokens),
                    ("decode", c.generated_tokens),
                )
            ),
            "mode",
        )
        yield self._counter(
            "forward_passes",
            "Steps in which the slice had this to do.",
            (
                ((rank, mode), value)
                for rank, c in parts
                for mode, value in (("prefill", c.prefill_steps), ("decode", c.decode_steps))
            ),
            "mode",
        )

    def _steps(self) -> Iterator[Metric]:
        status = self._status
        yield self._counter(
            "forward_execution_seconds",
            "Wall time of steps by kind.",
            ((("all", kind), seconds) for kind, seconds in status.step_seconds.items()),
            "category",
        )
        yield self._counter(
            "dp_cooperation_forward_passes",
            "Steps by how many slices prefilled in them.",
            ((("all", str(n)), num) for n, num in enumerate(status.prefilling_slices)),
            "num_prefill_ranks",
        )
        if status.prefilling_seconds:
            yield self._counter(
                "dp_cooperation_forward_execution_seconds",
                "Wall time of steps by how many slices prefilled in them.",
                (
                    (("all", "extend" if n else "decode", str(n)), seconds)
                    for n, seconds in enumerate(status.prefilling_seconds)
                ),
                "category",
                "num_prefill_ranks",
            )
        yield self._counter(
            "recompilations",
            "Compilations since the engine was ready; anything but 0 is a bug.",
            [(("all",), status.recompilations)],
        )

    def _start(self) -> Iterator[Metric]:
        details, slices = self._ready.details, self._status.slices
        yield self._gauge(
            "context_len",
            "Most tokens of prompt and answer.",
            [("all", self._ready.max_context_tokens)],
        )
        page_size = details.get("page_size")
        if page_size:
            yield self._gauge("page_size", "KV tokens of a page.", [("all", page_size)])
            yield self._gauge(
                "num_pages",
                "Pages of the pool.",
                ((part.dp_rank, part.total_tokens // page_size) for part in slices),
            )
        load_s, compile_s = details.get("load_seconds"), details.get("compile_seconds")
        if load_s is not None:
            yield self._gauge(
                "engine_load_weights_time", "Seconds to load the weights.", [("all", load_s)]
            )
            if compile_s is not None:
                yield self._gauge(
                    "engine_startup_time",
                    "Seconds to load the weights and compile the programs.",
                    [("all", load_s + compile_s)],
                )

    def _labels(self, dp_rank: int | str) -> list[str]:
        return [self._model_name, "unified", "0", "0", str(dp_rank), "0"]

    def _gauge(
        self, name: str, text: str, values: Iterable[tuple[int | str, float]]
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(PREFIX + name, text, labels=LABELS)
        for dp_rank, value in values:
            family.add_metric(self._labels(dp_rank), value)
        return family

    def _counter(
        self,
        name: str,
        text: str,
        values: Iterable[tuple[tuple[int | str, *tuple[str, ...]], float]],
        *more_labels: str,
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(PREFIX + name, text, labels=(*LABELS, *more_labels))
        for (dp_rank, *more), value in values:
            family.add_metric([*self._labels(dp_rank), *more], value)
        return family
