"""Eight emulated CPU devices before JAX starts, a compilation cache that outlives the run, and the
slowest files first."""

from __future__ import annotations

import gc
import os

from serving.config import default_compilation_cache_dir

# Compiling takes most of the tests' time: without optimisation a third less, and with XLA's older
# code generators (which jaxlib 0.12 has no more, and ignores) a third of that. Which Python line an
# operation came from is not written into programs either. Servers and scripts that tests start
# inherit all this. XLA_FLAGS="" in the environment tests what users run.
os.environ.update(
    {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 "
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "JAX_COMPILATION_CACHE_DIR": default_compilation_cache_dir() + "-tests",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **os.environ,
    }
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# As the engine does: accelerators would multiply float32 in tf32 otherwise.
jax.config.update("jax_default_matmul_precision", "highest")

SLOWEST = (
    "sharding/test_mesh_equals_reference.py",
    "model/test_kernels.py",
    "integration/test_serve.py",
    "serving/engine/test_identical.py",
    "sharding/test_architectures.py",
    "serving/engine/test_engine_mesh.py",
    "serving/engine/test_two_batches.py",
    "sharding/test_determinism.py",
    "sharding/test_micro_batches.py",
    "sharding/test_fp8.py",
    "serving/engine/test_engine.py",
    "serving/engine/test_deterministic.py",
    "scripts/test_bench_parallel.py",
    "serving/engine/test_program_store.py",
    "serving/engine/test_estimate.py",
    "model/test_reference.py",
    "sharding/test_expert_exchange.py",
    "integration/test_demo.py",
    "serving/engine/test_precision.py",
    "integration/test_openai_client.py",
    "scripts/test_train.py",
    "serving/test_start_errors.py",
    "serving/engine/test_runner.py",
    "sharding/test_loading.py",
    "sharding/test_kernels_on_mesh.py",
    "serving/engine/test_engine_continuation.py",
    "router/test_worth_of_policies.py",
    "sharding/test_orbax.py",
    "serving/scheduler/test_scheduler_properties.py",
)
"""Files that take ten seconds of a processor and more, with an empty cache, longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first: `make test` hands out whole files in this order, and one that came
    last would keep one worker busy while the others have nothing left."""
    order = {f"tests/{file}": i for i, file in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.nodeid.split("::")[0], len(order)))


def pytest_collection_finish() -> None:
    """Tracing makes millions of small objects that nearly all live on: Python need not look for
    cycles among them as often as by default."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
