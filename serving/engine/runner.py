"""The device side of an engine: weights, KV pool, last tokens, and the compiled programs.

One forward and one sampling program per bucket, all compiled before the engine is ready. Arrays
that a step changes (pool, last tokens) are donated to it and rebound to its outputs; nobody else
holds a reference to them.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from model.quantization import FP8
from serving.config import ConfigError, ServerConfig
from serving.engine.batch_builder import Packing, build_batch
from serving.engine.buckets import Shape, make_buckets
from serving.engine.sampler import greedy, sample, top_logprobs
from serving.scheduler.plan import SampledToken, StepPlan
from sharding.comm import MeshComm
from sharding.layout import Layout
from sharding.mesh import by_slice, make_mesh
from sharding.sources import WeightSource
from sharding.step import ModelSpec, abstract_array, sharded

log = logging.getLogger("meshserve.engine")

CPU_POOL_BYTES = 256 << 20
"""KV pool of an emulated device, which has no memory of its own to measure."""
MAX_POOL_BYTES = 1 << 40
"""No device holds more; a larger --max-total-tokens is a slip of the finger."""
COMPILE_THREADS = 8
ACCELERATOR_SLACK_BYTES = 256 << 20
"""Left free beside weights, programs and pool: batches in flight, fragmentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The compiled programs of one shape."""

    packing: Packing
    forward: Callable[..., Any]
    greedy: Callable[..., Any]
    full: Callable[..., Any]


class ModelRunner:
    """Runs step plans on the mesh.

    Attributes:
        buckets: the program sizes, which bound what a plan may hold.
        num_pages: pages of each slice's pool, the sink (page 0) included.
        max_context: most tokens of one sequence.
    """

    def __init__(self, config: ServerConfig, source: WeightSource, layout: Layout) -> None:
        """Load the weights, size the pool, compile everything.

        Raises:
            CheckpointError, LayoutError, ConfigError: with the sentence for the user.
        """
        started = time.perf_counter()
        self.config, self.model, self.layout = config, source.config, layout
        model = source.config
        self.mesh = make_mesh(layout)
        self.platform = self.mesh.devices.flat[0].platform
        self.dtype = resolve_dtype(config.dtype, self.platform)
        self.kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, self.dtype)
        self.spec = ModelSpec(model, self.dtype, layout, source.fp8)
        self.page_size = config.page_size
        self._by_slice = by_slice(self.mesh, layout)
        self._log_fp8(source)
        self.weights = source.load(self.spec, self.mesh)
        self.load_seconds = time.perf_counter() - started
        log.info("weights on the devices after %.1f s", self.load_seconds)

        context = config.context_length or model.max_position_embeddings
        if context > model.max_position_embeddings:
            raise ConfigError(
                f"--context-length {context} is longer than the model's "
                f"{model.max_position_embeddings}."
            )
        if model.sliding_window is not None and context > model.sliding_window:
            raise ConfigError(
                f"Sliding-window attention is not supported; this model is exact up to its window: "
                f"--context-length {model.sliding_window} serves it, {context} does not."
            )
        self.buckets = make_buckets(
            config, platform=self.platform, num_slices=layout.num_slices, max_context=context
        )
        self.num_pages = self._size_pool(context)
        self.max_context = min(context, (self.num_pages - 1) * self.page_size)
        if self.max_context < 2:
            raise ConfigError("A context of one token has no room for a prompt and an answer.")
        self.table_width = -(-self.max_context // self.page_size)
        started = time.perf_counter()
        self._programs = self._compile_all()
        self._last_tokens = self._zeros((layout.num_slices, self.buckets.slots + 1), jnp.int32)
        pool = self.spec.pool_shape(self.num_pages, self.page_size)
        self._kv = self._zeros(pool, self.kv_dtype, self.spec.pool_spec)
        self._warm_up()
        self.compile_seconds = time.perf_counter() - started
        log.info("%d programs ready after %.1f s", len(self._programs), self.compile_seconds)

    # ---- running ---------------------------------------------------------------------------

    def run(self, plan: StepPlan) -> list[list[SampledToken | None]]:
        """Compute a step: per slice, a token for each decode row, then for each prefill chunk
        (None where the chunk samples nothing)."""
        shape = self.buckets.shape_for(plan)
        rows = [[*s.decode, *(c for c in s.prefill if c.samples)] for s in plan.slices]
        params = [row.sampling for row in itertools.chain.from_iterable(rows)]
        plain = all(p.greedy and not p.logprobs for p in params)
        packed = build_batch(plan, self._programs[shape].packing)
        return _unpack_tokens(plan, self._launch(shape, packed, plain=plain), shape.decode_rows)

    def _launch(self, shape: Shape, packed: np.ndarray, *, plain: bool) -> np.ndarray:
        """Run the forward and the sampling program; i32 [D, R, columns], see `_pack_tokens`."""
        program = self._programs[shape]
        rows = jax.make_array_from_callback(packed.shape, self._by_slice, packed.__getitem__)
        logits, self._kv = program.forward(self.weights, self._kv, self._last_tokens, rows)
        sampler = program.greedy if plain else program.full
        tokens, self._last_tokens = sampler(logits, self._last_tokens, rows)
        return np.asarray(tokens)

    # ---- setting up ------------------------------------------------------------------------

    def _log_fp8(self, source: WeightSource) -> None:
        if not source.fp8:
            return
        kept = len(source.fp8) - len(self.spec.not_kept)
        log.info("%d parameters stay in FP8 on the devices", kept)
        if self.spec.recut:
            log.info(
                "shards cut the FP8 blocks of %d parameters (%s, ...): their factors are repeated "
                "for smaller blocks",
                len(self.spec.recut),
                self.spec.recut[0],
            )
        if self.spec.not_kept:
            log.warning(
                "shards cut the FP8 blocks of %d parameters to pieces, they are dequantised to "
                "%s: %s",
                len(self.spec.not_kept),
                self.dtype,
                ", ".join(self.spec.not_kept),
            )

    def _zeros(
        self, shape: Sequence[int], dtype: Any, spec: PartitionSpec | None = None
    ) -> jax.Array:
        """Zeros on the mesh, by slice if no spec is given."""
        sharding = self._by_slice if spec is None else NamedSharding(self.mesh, spec)
        return jax.jit(functools.partial(jnp.zeros, tuple(shape), dtype), out_shardings=sharding)()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers, on each device of its slice."""
        sharding = NamedSharding(self.mesh, self.spec.pool_spec)
        page = sharding.shard_shape(self.spec.pool_shape(1, self.page_size))
        return int(np.prod(page)) * self.kv_dtype.itemsize

    def kv_bytes_per_device(self) -> int:
        """Bytes of the pool that the first device really holds."""
        return int(self._kv.addressable_shards[0].data.nbytes)

    def _size_pool(self, context: int) -> int:
        """Pages of each slice's pool: the flag, or what the device's memory allows."""
        if self.config.max_total_tokens is not None:
            pages = -(-self.config.max_total_tokens // self.page_size) + 1
            if pages * self.page_bytes > MAX_POOL_BYTES or pages >= 1 << 31:
                raise ConfigError(
                    f"--max-total-tokens {self.config.max_total_tokens} would take "
                    f"{pages * self.page_bytes >> 30} GiB on each device."
                )
            return pages
        budget = CPU_POOL_BYTES if self.platform == "cpu" else self._free_bytes(context)
        pages = budget // self.page_bytes
        if pages < 2:
            raise ConfigError(
                f"No memory is left for a KV pool: {budget >> 20} MiB a device after weights "
                f"({self.spec.device_bytes() >> 20} MiB) and programs; raise "
                "--mem-fraction-static, spread the model over more devices, or lower "
                "--extend-buckets."
            )
        return pages

    def _free_bytes(self, context: int) -> int:
        """Memory left on the fullest device, the largest programs' temporaries taken off."""
        shape = self.buckets.shapes()[0]
        pages = -(-context // self.page_size)
        lowered = self._lower(shape, num_pages=2, table_width=pages)
        temp = max(
            program.compile().memory_analysis().temp_size_in_bytes for program in lowered[1:]
        )
        logits = shape.sampled_rows * self.model.vocab_size * 4
        free = min(
            int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
            for device in self.mesh.local_devices
            if (stats := device.memory_stats())
        )
        return free - temp - logits - ACCELERATOR_SLACK_BYTES

    def _lower(self, shape: Shape, *, num_pages: int, table_width: int) -> tuple[Any, ...]:
        """Packing, and the lowered forward, greedy and full programs of a shape."""
        slices, by_slice = self.layout.num_slices, PartitionSpec(self.layout.attn_dp)
        slots = self.buckets.slots
        packing = Packing(shape=shape, table_width=table_width, num_slots=slots)

        def array(sizes: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
            return abstract_array(sizes, dtype, self.mesh, by_slice)

        packed = array((slices, packing.width), jnp.int32)
        last = array((slices, slots + 1), jnp.int32)
        logits = array((slices, shape.sampled_rows, self.model.vocab_size), jnp.float32)
        pool_shape, pool_spec = self.spec.pool_shape(num_pages, self.page_size), self.spec.pool_spec
        pool = abstract_array(pool_shape, self.kv_dtype, self.mesh, pool_spec)
        weights = [abstract_array(p.shape, p.dtype, self.mesh, p.spec) for p in self.spec.params]
        forward = sharded(
            functools.partial(
                _forward,
                self.spec,
                MeshComm(
                    self.layout,
                    self.config.moe_a2a_backend,
                    deterministic=self.config.enable_deterministic_inference,
                ),
                packing,
            ),
            self.mesh,
            (self.spec.specs, pool_spec, by_slice, by_slice),
            (by_slice, pool_spec),
            donate=(1,),
        )
        samplers = [
            sharded(
                functools.partial(fn, packing),
                self.mesh,
                (by_slice, by_slice, by_slice),
                (by_slice, by_slice),
                donate=(1,),
            ).lower(logits, last, packed)
            for fn in (_sample_greedy, _sample_full)
        ]
        return packing, forward.lower(weights, pool, last, packed), *samplers

    def _compile_all(self) -> dict[Shape, Program]:
        """All programs, several at a time: XLA compiles outside the interpreter lock."""

        def compiled(shape: Shape, packing: Packing, *lowered: Any) -> tuple[Shape, Program]:
            started = time.perf_counter()
            forward, plain, full = (program.compile() for program in lowered)
            log.info("compiled %s in %.1f s", shape, time.perf_counter() - started)
            return shape, Program(packing=packing, forward=forward, greedy=plain, full=full)

        with ThreadPoolExecutor(max_workers=min(COMPILE_THREADS, os.cpu_count() or 1)) as pool:
            futures = [
                pool.submit(
                    compiled,
                    shape,
                    *self._lower(shape, num_pages=self.num_pages, table_width=self.table_width),
                )
                for shape in self.buckets.shapes()
            ]
            return dict(future.result() for future in futures)

    def _warm_up(self) -> None:
        """Run every program once on padding alone: nothing is left to set up for a request."""
        for shape, program in self._programs.items():
            packed = program.packing.empty(self.layout.num_slices)
            for plain in (True, False):
                self._launch(shape, packed, plain=plain)

    def memory_analysis(self, shape: Shape) -> Any:
        """XLA's account of a forward program's memory (temporaries, aliased bytes)."""
        return self._programs[shape].forward.memory_analysis()


def resolve_dtype(name: str, platform: str) -> Any:
    """--dtype as a NumPy dtype; auto is float32 on CPU (where bfloat16 is slow) else bfloat16."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def resolve_kv_dtype(name: str, dtype: Any) -> Any:
    """--kv-cache-dtype as a NumPy dtype; auto is the model's."""
    if name == "auto":
        return dtype
    return FP8 if name == "fp8_e4m3" else jnp.dtype(name)


# ---- the programs, per device --------------------------------------------------------------


def _forward(
    spec: ModelSpec,
    comm: MeshComm,
    packing: Packing,
    weights: Sequence[jax.Array],
    kv: jax.Array,
    last_tokens: jax.Array,
    packed: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logits f32 [1, R, V] and the updated pool [1, L, N, S, ...] of this device's slice."""
    batch = packing.forward_batch(packed[0], last_tokens[0])
    logits, pool, _ = spec.merge(weights)(kv[0], batch, comm)
    return logits[None], pool[None]


def _sample_greedy(
    packing: Packing, logits: jax.Array, last_tokens: jax.Array, packed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Packed tokens i32 [1, R, 2] and the updated last tokens [1, slots + 1]."""
    _, slots = packing.sampling_batch(packed[0])
    tokens, logprobs = greedy(logits[0])
    return _pack_tokens(tokens, logprobs), last_tokens.at[0, slots].set(tokens)


def _sample_full(
    packing: Packing, logits: jax.Array, last_tokens: jax.Array, packed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `_sample_greedy`, with draws and the most likely alternatives, i32 [1, R, 2 + 2n]."""
    batch, slots = packing.sampling_batch(packed[0])
    tokens, logprobs = sample(logits[0], batch)
    packed_tokens = _pack_tokens(tokens, logprobs, *top_logprobs(logits[0]))
    return packed_tokens, last_tokens.at[0, slots].set(tokens)


def _pack_tokens(tokens: jax.Array, logprobs: jax.Array, *top: jax.Array) -> jax.Array:
    """Columns: token, bits of its log probability, then n ids and n log probabilities' bits."""

    def bits(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, jnp.int32)

    columns = [tokens[:, None], bits(logprobs)[:, None]]
    if top:
        columns += [top[0], bits(top[1])]
    return jnp.concatenate(columns, axis=-1)[None]


def _unpack_tokens(
    plan: StepPlan, packed: np.ndarray, decode_rows: int
) -> list[list[SampledToken | None]]:
    """The host's reading of `_pack_tokens`, row by row of the plan."""
    token_ids = packed[..., 0].tolist()
    logprobs = _floats(packed[..., 1])
    n = (packed.shape[-1] - 2) // 2
    results: list[list[SampledToken | None]] = []
    for s, slice_plan in enumerate(plan.slices):

        def token(at: int, wanted: int | None, s: int = s) -> SampledToken:
            top = None
            if wanted is not None:
                ids = packed[s, at, 2 : 2 + min(wanted, n)].tolist()
                values = _floats(packed[s, at, 2 + n : 2 + n + min(wanted, n)])
                top = tuple(zip(ids, values, strict=True))
            return SampledToken(
                token_id=token_ids[s][at], logprob=logprobs[s][at], top_logprobs=top
            )

        row: list[SampledToken | None] = [
            token(i, r.sampling.logprobs) for i, r in enumerate(slice_plan.decode)
        ]
        row += [
            token(decode_rows + i, c.sampling.logprobs) if c.samples else None
            for i, c in enumerate(slice_plan.prefill)
        ]
        results.append(row)
    return results


def _floats(bits: np.ndarray) -> list[Any]:
    return np.ascontiguousarray(bits).view(np.float32).tolist()
