"""Eight emulated CPU devices before JAX starts, and a compilation cache that outlives the run."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the tests' time, and with less optimisation a third less; servers that
# tests start inherit it. XLA_FLAGS="" in the environment tests what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

from serving.config import default_compilation_cache_dir

jax.config.update("jax_num_cpu_devices", 8)
# As the engine does: accelerators would multiply float32 in tf32 otherwise.
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", default_compilation_cache_dir() + "-tests")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
