"""The engine: scheduler and runner in step, requests in, token outcomes out. No sockets here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jax import monitoring

from serving.config import ConfigError, ServerConfig
from serving.engine.buckets import Buckets
from serving.engine.runner import LaunchedStep, ModelRunner
from serving.request import Request
from serving.scheduler.plan import StepPlan
from serving.scheduler.scheduler import Scheduler, SliceLoad, TokenOutcome
from sharding.layout import Layout, LayoutError, make_layout
from sharding.sources import open_source

log = logging.getLogger("meshserve.engine")

EMULATED_DEVICES = 8
"""Devices of `all_devices` on a machine without an accelerator."""
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Runner(Protocol):
    """What the engine needs of `ModelRunner`."""

    buckets: Buckets

    def launch(self, plan: StepPlan) -> LaunchedStep: ...


class Engine:
    """One model on one mesh. Not thread-safe: one loop calls it."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.steps = 0

    def add(self, request: Request) -> None:
        """Queue a request; raises ValueError (RequestTooLong) with a sentence if it cannot run."""
        self.scheduler.add(request)

    def abort(self, rid: str) -> bool:
        """Forget a request; whether it was there."""
        return self.scheduler.abort(rid)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[TokenOutcome]:
        """Plan, run and apply one step; the new tokens. Empty if there was nothing to do."""
        plan = self.scheduler.plan()
        if plan is None:
            return []
        launched = self.runner.launch(plan)
        launched.sample()
        outcomes = self.scheduler.apply(plan, launched.result().tokens)
        self.steps += 1
        return outcomes

    def status(self) -> Sequence[SliceLoad]:
        """The load of every slice."""
        return self.scheduler.status()


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

    Raises:
        ConfigError: --device names a platform that is not there.
    """
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


def resolve_layout(config: ServerConfig) -> Layout:
    """The layout the flags ask for, or the widest DPA + EP one over every device.

    Raises:
        LayoutError: the flags do not fit together.
    """
    if not config.all_devices:
        return make_layout(config.tp_size, config.dp_size, config.ep_size)
    devices = len(jax.devices())
    if devices == 1 and config.moe_a2a_backend == "all_to_all":
        raise LayoutError(
            "--moe-a2a-backend all_to_all needs more than one device: there is nothing to exchange."
        )
    return make_layout(devices, devices, devices)


def make_engine(config: ServerConfig) -> Engine:
    """Load a model and compile its programs (after `configure_jax`).

    Raises:
        UnsupportedModelError, CheckpointError, LayoutError, ConfigError: the user's sentence.
    """
    source = open_source(
        config.model_path,
        config.load_format,
        keep_fp8=config.fp8_weights == "keep",
        seed=config.random_seed or 0,
    )
    model, layout = source.config, resolve_layout(config)
    if layout.num_slices > 1 and not model.is_mla:
        log.warning(
            "DP attention gains little here: a %s model is not MLA, so tensor parallelism cuts its "
            "KV cache by heads (%d of them) instead of copying it.",
            model.model_type,
            model.num_kv_heads,
        )
    runner = ModelRunner(config, source, layout)
    scheduler = Scheduler(
        num_slices=runner.layout.num_slices,
        slots_per_slice=runner.buckets.slots,
        pages_per_slice=runner.num_pages,
        page_size=runner.page_size,
        prefill_tokens_per_step=runner.buckets.prefill_tokens,
        prefill_rows_per_step=runner.buckets.prefill_chunks,
        max_context_tokens=runner.max_context,
    )
    return Engine(runner, scheduler)


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
        "dtype": str(runner.dtype),
        "kv_cache_dtype": str(runner.kv_dtype),
        "weight_bytes_per_device": runner.spec.device_bytes(),
        "kv_bytes_per_device": runner.kv_bytes_per_device(),
        "kv_tokens_per_slice": tokens,
        "kv_tokens": tokens * layout.num_slices,
        "page_size": runner.page_size,
        "max_context_tokens": runner.max_context,
        "decode_buckets": list(runner.buckets.decode),
        "extend_buckets": list(runner.buckets.extend),
        "load_seconds": round(runner.load_seconds, 2),
        "compile_seconds": round(runner.compile_seconds, 2),
    }
    line = (
        f"{layout.num_devices} x {device.device_kind}, {layout}, experts by "
        f"{runner.config.moe_a2a_backend}, {runner.dtype}, weights "
        f"{runner.spec.device_bytes() / 2**20:.1f} MiB a device, KV {tokens} tokens in each of "
        f"{layout.num_slices} slices ({details['kv_bytes_per_device'] / 2**20:.0f} MiB a device)"
    )
    return line, details
