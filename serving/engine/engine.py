"""The engine: scheduler and runner in step, requests in, token outcomes out. No sockets here."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax import monitoring

from serving.config import ConfigError, ServerConfig
from serving.engine.buckets import Buckets
from serving.engine.estimate import describe as describe_estimate
from serving.engine.estimate import estimate
from serving.engine.runner import LaunchedStep, ModelRunner
from serving.grammar import GrammarSet, make_grammar_set
from serving.request import Request
from serving.scheduler.phases import PhasePolicy
from serving.scheduler.plan import StepPlan
from serving.scheduler.scheduler import (
    QueueFull,
    Scheduler,
    SchedulerConfig,
    SliceLoad,
    TokenOutcome,
)
from sharding.layout import Layout, LayoutError, make_layout
from sharding.sources import WeightSource, open_source

log = logging.getLogger("meshserve.engine")

EMULATED_DEVICES = 8
"""Devices of `all_devices` on a machine without an accelerator."""
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
XLA_FLAGS_OF_MESHES = {
    # Starts collectives as early and ends them as late as their operands allow, so that what needs
    # neither (shared experts, the other micro-batch) runs meanwhile. Collectives are asynchronous
    # by default, but without this scheduler their ends follow their starts at once, and XLA turns
    # such pairs back into synchronous ones.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # Not set: xla_gpu_enable_command_buffer=+COLLECTIVES. It captures collectives into CUDA graphs
    # with what surrounds them, but XLA orders a graph's nodes one after the other, which undoes
    # the overlap. Graphs between collectives are captured without it.
}
"""Options of XLA for several GPUs, as far as XLA_FLAGS does not name them."""
GRAMMAR_POLL_S = 0.001
"""How long to wait for a grammar to be read where there is nothing else to do."""


class Runner(Protocol):
    """What the engine needs of `ModelRunner`."""

    buckets: Buckets

    def launch(self, plan: StepPlan) -> LaunchedStep: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailure:
    """A request that ended because it cannot go on.

    Attributes:
        message: one sentence for the user.
        status: the HTTP status that tells whose fault it is.
    """

    rid: str
    message: str
    status: int = 400

    @classmethod
    def of(cls, rid: str, error: ValueError) -> RequestFailure:
        """The failure of a request that `Engine.add` refused."""
        return cls(rid=rid, message=str(error), status=503 if isinstance(error, QueueFull) else 400)


@dataclass(slots=True, kw_only=True)
class StepTotals:
    """What steps took since the start.

    Attributes:
        count: steps whose tokens are known.
        seconds: wall time by kind, "decode" or "extend". Where steps overlap, each counts from the
            end of the one before.
        prefilling_slices: entry n counts the steps in which n slices prefilled.
        prefilling_seconds: entry n is the wall time of these steps.
    """

    count: int = 0
    seconds: dict[str, float]
    prefilling_slices: list[int]
    prefilling_seconds: list[float]


class Engine:
    """One model on one mesh. Not thread-safe: one loop calls it.

    With `overlap`, a step is planned and launched before the tokens of the one before are read:
    the device goes from one to the next without waiting for the host. Both ways give the same
    tokens.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        grammars: GrammarSet | None = None,
        *,
        overlap: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: grammars: the answers' grammars; None refuses requests that have one."""
        self.runner, self.scheduler, self.grammars = runner, scheduler, grammars
        self.overlap = overlap
        num_slices = scheduler.config.num_slices
        self.totals = StepTotals(
            seconds={"decode": 0.0, "extend": 0.0},
            prefilling_slices=[0] * (num_slices + 1),
            prefilling_seconds=[0.0] * (num_slices + 1),
        )
        self._clock = clock
        self._in_flight: deque[tuple[StepPlan, LaunchedStep, float]] = deque()
        self._preparing: dict[str, Request] = {}  # their grammars are being read
        self._last_end = 0.0

    def add(self, request: Request) -> None:
        """Queue a request; one with a grammar is queued once the grammar is read.

        Raises:
            ValueError: with the sentence for the user; `RequestTooLong` and `QueueFull` are such.
        """
        rid, grammar = request.rid, request.sampling.grammar
        if rid in self._preparing or self.scheduler.is_live(rid):
            raise ValueError(f"Request id {rid!r} is in use by a request that has not finished.")
        self.scheduler.check_queue(more=len(self._preparing))
        if grammar is None:
            self.scheduler.add(request, admitted=True)
            return
        if self.grammars is None:
            raise ValueError("This server does not constrain answers (--grammar-backend none).")
        self.grammars.start(request.rid, grammar, request.answer)
        self._preparing[request.rid] = request

    def abort(self, rid: str) -> bool:
        """Forget a request; whether it was there."""
        return self._end(rid, self.scheduler.abort)

    def finish(self, rid: str) -> bool:
        """As `abort`, of a request whose answer is complete: it counts as finished."""
        return self._end(rid, self.scheduler.finish)

    @property
    def num_preparing(self) -> int:
        """Requests whose grammar is being read."""
        return len(self._preparing)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight or self._preparing)

    def step(self) -> list[TokenOutcome | RequestFailure]:
        """Launch the next step and take in what is finished; the new tokens, if there are any."""
        outcomes = self._add_prepared() if self._preparing else []
        plan = self.scheduler.plan()
        if plan is None:
            if self._in_flight:
                outcomes += self._collect()
            elif self._preparing:
                time.sleep(GRAMMAR_POLL_S)
            return outcomes
        started = self._clock()
        launched = self.runner.launch(plan)
        constrained = self._constrained_rows(plan)
        if not constrained:
            launched.sample()
        if self._in_flight:
            outcomes += self._collect()
        if constrained:
            # The tokens before these are known by now, and the forward pass is still running.
            outcomes += self._sample_constrained(launched, constrained)
        self._in_flight.append((plan, launched, started))
        if not self.overlap:
            outcomes += self._collect()
        return outcomes

    def status(self) -> Sequence[SliceLoad]:
        """The load of every slice."""
        return self.scheduler.status()

    def _add_prepared(self) -> list[TokenOutcome | RequestFailure]:
        """Queue the requests whose grammars are read by now; those of bad ones fail."""
        assert self.grammars is not None
        failures: list[TokenOutcome | RequestFailure] = []
        for rid, request in list(self._preparing.items()):
            failure = self.grammars.failure(rid)
            if failure is None and not self.grammars.is_ready(rid):
                continue
            del self._preparing[rid]
            try:
                if failure is not None:
                    raise ValueError(failure)
                if request.answer and self.grammars.is_finished(rid):
                    raise ValueError("The answer is complete under its grammar: it cannot go on.")
                self.scheduler.add(request, admitted=True)
            except ValueError as error:
                self.grammars.drop(rid)
                failures.append(RequestFailure.of(rid, error))
        return failures

    def _end(self, rid: str, how: Callable[[str], bool]) -> bool:
        if self.grammars is not None:
            self.grammars.drop(rid)
        return self._preparing.pop(rid, None) is not None or how(rid)

    def _collect(self) -> list[TokenOutcome | RequestFailure]:
        """Wait for the oldest step and take in its tokens."""
        plan, launched, started = self._in_flight.popleft()
        result = launched.result()
        now = self._clock()
        seconds = now - max(started, self._last_end)
        prefilling = sum(bool(s.prefill) for s in plan.slices)
        self.totals.count += 1
        self.totals.seconds["extend" if prefilling else "decode"] += seconds
        self.totals.prefilling_slices[prefilling] += 1
        self.totals.prefilling_seconds[prefilling] += seconds
        self._last_end = now
        outcomes: list[TokenOutcome | RequestFailure] = []
        for outcome in self.scheduler.apply(plan, result):
            outcomes.append(outcome if self.grammars is None else self._follow(outcome))
        return outcomes

    def _follow(self, outcome: TokenOutcome) -> TokenOutcome | RequestFailure:
        """Tell the request's grammar of its new token; the request may end by it."""
        assert self.grammars is not None
        rid = outcome.rid
        if rid not in self.grammars:
            return outcome
        if outcome.finish_reason is not None:
            self.grammars.drop(rid)
            return outcome
        try:
            self.grammars.advance(rid, outcome.token_id)
            finished = self.grammars.is_finished(rid)
        except ValueError as error:
            self.abort(rid)
            return RequestFailure.of(rid, error)
        if not finished:
            return outcome
        # Nothing may follow but an end token, and there may be none that the client wants.
        self.finish(rid)
        return outcome._replace(finish_reason="stop")

    def _constrained_rows(self, plan: StepPlan) -> list[tuple[str, int, int]]:
        """(rid, dp rank, index among the slice's rows) of every token that a grammar governs."""
        if not self.grammars:
            return []
        return [
            (row.rid, dp_rank, index)
            for dp_rank, rows in enumerate(plan.slices)
            for index, row in enumerate((*rows.decode, *rows.prefill))
            if row.sampling.grammar is not None and getattr(row, "samples", True)
        ]

    def _sample_constrained(
        self, launched: LaunchedStep, rows: list[tuple[str, int, int]]
    ) -> list[TokenOutcome | RequestFailure]:
        """Build the masks of a step and sample it."""
        assert self.grammars is not None
        masks = launched.open_masks()
        failures: list[TokenOutcome | RequestFailure] = []
        for rid, dp_rank, index in rows:
            if rid not in self.grammars:
                continue  # its end came with the last tokens: this row's is dropped
            try:
                self.grammars.fill(rid, masks[dp_rank, launched.mask_row(dp_rank, index)])
            except ValueError as error:
                self.abort(rid)
                failures.append(RequestFailure.of(rid, error))
        launched.sample(masks)
        return failures


class CompileCounter:
    """Counts XLA compilations from now on (cache hits included)."""

    def __init__(self) -> None:
        self.count = 0
        monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            self.count += 1


def configure_jax(config: ServerConfig) -> None:
    """Settings that must be made before JAX looks for devices.

    XLA takes its share of a GPU's memory from the environment alone, once.

    Raises:
        ConfigError: --device names a platform that is not there.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(config.mem_fraction_static))
    if config.device in ("auto", "cuda") and (config.tp_size > 1 or config.all_devices):
        os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""))
    if config.device != "auto":
        jax.config.update("jax_platforms", config.device)
    emulated = EMULATED_DEVICES if config.all_devices else config.tp_size
    jax.config.update("jax_num_cpu_devices", emulated)
    if config.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # float32 means float32: accelerators would multiply in tf32 otherwise.
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # the second where the plug-in is not installed
        raise ConfigError(
            f"--device {config.device}: this machine has no such device that JAX can use "
            "(is the driver there, and the extra for it installed?); --device cpu emulates any "
            "number."
        ) from None


def xla_flags(given: str) -> str:
    """The value of XLA_FLAGS with `XLA_FLAGS_OF_MESHES` behind what the user gave, which wins."""
    named = {flag.lstrip("-").split("=")[0] for flag in given.split()}
    added = [f"--{name}={v}" for name, v in XLA_FLAGS_OF_MESHES.items() if name not in named]
    return " ".join([*given.split(), *added])


def resolve_layout(config: ServerConfig) -> Layout:
    """The layout the flags ask for, or the widest DPA + EP one over every device.

    Raises:
        LayoutError: the flags do not fit together.
    """
    if not config.all_devices:
        return make_layout(config.tp_size, config.dp_size, config.ep_size)
    return widest_layout(config, len(jax.devices()))


def widest_layout(config: ServerConfig, devices: int) -> Layout:
    """DPA and EP over every one of so many devices.

    Raises:
        LayoutError: the flags ask for an exchange, and one device has nobody to exchange with.
    """
    for flag, value, needing in (
        ("--moe-a2a-backend", config.moe_a2a_backend, "all_to_all"),
        ("--moe-dispatch-dtype", config.moe_dispatch_dtype, "fp8_e4m3"),
    ):
        if devices == 1 and value == needing:
            raise LayoutError(
                f"{flag} {value} needs more than one device: there is nothing to exchange."
            )
    return make_layout(devices, devices, devices)


def open_weights(config: ServerConfig) -> WeightSource:
    """The model that the flags name, none of it loaded yet.

    Raises:
        UnsupportedModelError, CheckpointError: the user's sentence.
    """
    return open_source(
        config.model_path,
        config.load_format,
        keep_fp8=config.fp8_weights == "keep",
        seed=config.random_seed or 0,
    )


def make_engine(config: ServerConfig) -> Engine:
    """Load a model and compile its programs (after `configure_jax`).

    Raises:
        UnsupportedModelError, CheckpointError, LayoutError, ConfigError: the user's sentence.
    """
    source = open_weights(config)
    model, layout = source.config, resolve_layout(config)
    if layout.num_slices > 1 and not model.is_mla:
        log.warning(
            "DP attention gains little here: a %s model is not MLA, so tensor parallelism cuts its "
            "KV cache by heads (%d of them) instead of copying it.",
            model.model_type,
            model.num_kv_heads,
        )
    grammars = make_grammar_set(config, model.vocab_size)
    if log.isEnabledFor(logging.INFO):
        _log_estimate(config, source, layout)
    runner = ModelRunner(config, source, layout)
    scheduler = Scheduler(scheduler_config(config, runner))
    return Engine(runner, scheduler, grammars, overlap=not config.disable_overlap_schedule)


def _log_estimate(config: ServerConfig, source: WeightSource, layout: Layout) -> None:
    """What is about to be loaded, before it is."""
    device = jax.devices()[0]
    stats = device.memory_stats()
    found = estimate(
        config,
        source,
        layout,
        platform=device.platform,
        memory=int(stats["bytes_limit"]) if stats else None,
    )
    for line in describe_estimate(found, config.model_name):
        log.info(line)


def scheduler_config(config: ServerConfig, runner: ModelRunner) -> SchedulerConfig:
    """Sizes from the runner, policies from the flags."""
    exact = config.enable_deterministic_inference
    balance = config.load_balance_method
    return SchedulerConfig(
        num_slices=runner.layout.num_slices,
        slots_per_slice=runner.buckets.slots,
        pages_per_slice=runner.num_pages,
        page_size=runner.page_size,
        prefill_tokens_per_step=runner.buckets.prefill_tokens,
        prefill_rows_per_step=runner.buckets.prefill_chunks,
        max_context_tokens=runner.max_context,
        max_queued=config.max_queued_requests,
        schedule_policy=config.schedule_policy,
        load_balance="cache_aware" if balance == "auto" else balance,
        radix_cache=not config.disable_radix_cache,
        phases=PhasePolicy(
            interval=config.prefill_decode_interval,
            max_delay=config.prefill_delayer_max_delay_passes
            if config.enable_prefill_delayer
            else None,
            exclusive=exact,
        ),
        reproducible=exact,
    )


def describe(runner: ModelRunner) -> tuple[str, dict[str, Any]]:
    """One line for the log, and the same as data for /get_server_info."""
    layout, device = runner.layout, runner.mesh.devices.flat[0]
    tokens = (runner.num_pages - 1) * runner.page_size
    details = {
        "device": device.device_kind,
        "num_devices": layout.num_devices,
        "resolved": {
            "tp_size": layout.num_devices,
            "dp_size": layout.num_slices,
            "ep_size": layout.size(layout.moe_ep),
        },
        "mesh": dict(zip(layout.axis_names, layout.axis_sizes, strict=True)),
        "roles": {
            role: layout.size(getattr(layout, role))
            for role in ("attn_dp", "attn_tp", "moe_ep", "moe_tp")
        },
        "moe_a2a_backend": runner.config.moe_a2a_backend,
        "moe_exchanges": runner.exchanges,
        "kernels": {
            name: getattr(runner.kernels, name)
            for name in (
                *("decode_attention", "extend_attention", "grouped_mlp", "routing", "dense"),
                "unroll",
            )
        },
        "dtype": str(runner.dtype),
        "kv_cache_dtype": str(runner.kv_dtype),
        "weight_bytes_per_device": runner.spec.device_bytes(),
        "kv_bytes_per_device": runner.kv_bytes_per_device(),
        "kv_tokens_per_slice": tokens,
        "kv_tokens": tokens * layout.num_slices,
        "page_size": runner.page_size,
        "max_context_tokens": runner.max_context,
        "vocab_size": runner.model.vocab_size,
        "decode_buckets": list(runner.buckets.decode),
        "extend_buckets": list(runner.buckets.extend),
        "load_seconds": round(runner.load_seconds, 2),
        "compile_seconds": round(runner.compile_seconds, 2),
    }
    names = ", ".join(runner.exchanges.values()).split(", ")
    exchange = " or ".join(dict.fromkeys(names)) or "none"
    line = (
        f"{layout.num_devices} x {device.device_kind}, {layout}, expert exchange {exchange}, "
        f"{runner.dtype}, weights "
        f"{runner.spec.device_bytes() / 2**20:.1f} MiB a device, KV {tokens} tokens in each of "
        f"{layout.num_slices} slices ({details['kv_bytes_per_device'] / 2**20:.0f} MiB a device)"
    )
    return line, details
