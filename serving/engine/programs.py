"""The programs of an engine: what each computes on a device, and what it is made from.

A step runs a forward program of its shape, then a sampling program of its number of rows. `greedy`
takes the best tokens and knows nothing else; `full` draws, with everything `sampler` offers and a
grammar mask that may allow all. Set-up and scoring have one size each. Shapes with equally many
sampled rows share their sampling programs, since the forward program hands the numbers on.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from model.batch import sampled_rows
from model.ops.kernels import Kernels
from serving.engine.batch_builder import Column, Packing, sampling_batch
from serving.engine.buckets import Buckets, Shape
from serving.engine.memory import mask_words, step_bytes
from serving.engine.outputs import pack_tokens
from serving.engine.program_store import Definition, ProgramStore
from serving.engine.sampler import adjust, greedy, logprobs_of, sample, top_logprobs
from serving.engine.sampling_state import (
    SETUP_WIDTH,
    SamplingState,
    abstract_state,
    count_tokens,
    set_up,
)
from sharding.comm import MeshComm
from sharding.mesh import is_gpu
from sharding.step import ModelSpec, abstract_array

log = logging.getLogger("meshserve.engine")

COMPILE_THREADS = 16
OVERLAP_UNROLL = 2
"""Layers of straight code in a program of two micro-batches: nothing can be overlapped across the
border of two turns of a loop."""
OVERLAP_OPTIONS = {
    # Computing moves between a collective's start and its end.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # XLA makes one collective of two, and one product of two with the same weights. The second
    # micro-batch's would be the first's, which then had to wait for both.
    "xla_gpu_all_gather_combine_threshold_bytes": 1,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 1,
    "xla_gpu_all_reduce_combine_threshold_bytes": 1,
    "xla_gpu_dot_merger_threshold_mb": 0,
}
"""For programs of two micro-batches on NVIDIA GPUs."""
GRAPH_OPTIONS = {
    # The shared experts beside the routing, which leaves most of the device idle. By default the
    # nodes of a CUDA graph follow each other.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
"""For programs of one NVIDIA GPU: kernels run as soon as what they read is there."""
PREFILL_OPTIONS = {
    # Products of 2,048 rows and more are cuBLAS's whatever else is tried, and trying takes most of
    # compiling.
    "xla_gpu_enable_triton_gemm": False,
    # Two products of the same rows made one are cut apart again, which copies both.
    "xla_gpu_dot_merger_threshold_mb": 0,
}
"""For extend programs on NVIDIA GPUs."""
SCORE_ROWS = 128
"""Prompt positions that one launch of the scoring program scores."""
DRAWN_AT_ONCE = 64
"""Rows whose draws are worked out together: a draw needs a dozen arrays of the logits' size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardProgram:
    """A compiled forward program and the layout of its packed rows."""

    packing: Packing
    run: Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Everything compiled. `greedy` and `full` are by number of sampled rows."""

    forward: dict[Shape, ForwardProgram]
    greedy: dict[int, Callable[..., Any]]
    full: dict[int, Callable[..., Any]]
    set_up: Callable[..., Any]
    score: Callable[..., Any]


class ProgramFactory:
    """Defines the programs of one model on one mesh, and has them compiled."""

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        buckets: Buckets,
        *,
        comm: MeshComm,
        kernels: Kernels,
        page_size: int,
        kv_dtype: Any,
        store: ProgramStore,
        threshold: float = 0.0,
    ) -> None:
        """Args: threshold: see `Packing`."""
        self.spec, self.mesh, self.buckets = spec, mesh, buckets
        self.kernels, self.threshold = kernels, threshold
        self.page_size, self.kv_dtype = page_size, kv_dtype
        self.vocab = spec.config.vocab_size
        self.mask_words = mask_words(self.vocab)
        self.most_sampled = buckets.sampled_rows[0]
        self._comm, self._store = comm, store
        self._by_slice = PartitionSpec(spec.layout.attn_dp)
        self._num_slices = spec.layout.num_slices

    # ---- abstract arguments ----------------------------------------------------------------

    def _array(self, shape: Sequence[int], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array with a leading axis of slices."""
        return abstract_array((self._num_slices, *shape), dtype, self.mesh, self._by_slice)

    @property
    def state(self) -> SamplingState:
        """The sampling state of all slices."""
        parts = abstract_state(self.buckets.slots, self.vocab)
        return SamplingState(*(self._array(part.shape, part.dtype) for part in parts))

    def _last_tokens(self) -> jax.ShapeDtypeStruct:
        return self._array((self.buckets.slots + 1,))

    def _logits(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._array((rows, self.vocab), jnp.float32)

    def masks(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._array((rows, self.mask_words))

    def _hidden(self) -> jax.ShapeDtypeStruct:
        width = self.spec.config.hidden_size
        return self._array((self.buckets.prefill_tokens, width), self.spec.dtype)

    def _weights(self) -> list[jax.ShapeDtypeStruct]:
        return [abstract_array(p.shape, p.dtype, self.mesh, p.spec) for p in self.spec.params]

    def step_bytes(self) -> int:
        """See `memory.step_bytes`."""
        width, itemsize = self.spec.config.hidden_size, self.spec.dtype.itemsize
        return step_bytes(self.buckets, vocab=self.vocab, width=width, itemsize=itemsize)

    # ---- definitions -----------------------------------------------------------------------

    def _by_slices(
        self, name: str, fn: Callable[..., Any], *args: Any, num_out: int, donate: tuple[int, ...]
    ) -> Definition:
        """A program whose arguments and results are all cut by slice."""
        s = self._by_slice
        return Definition(
            name=name,
            fn=fn,
            mesh=self.mesh,
            in_specs=(s,) * len(args),
            out_specs=(s,) * num_out,
            args=args,
            donate=donate,
        )

    def packing(self, shape: Shape, table_width: int) -> Packing:
        return Packing(
            shape=shape,
            table_width=table_width,
            num_slots=self.buckets.slots,
            threshold=self.threshold,
        )

    def forward(self, packing: Packing, num_pages: int) -> Definition:
        """(weights, pool*, last tokens, packed) -> (logits, numbers, pool[, hidden]); * donated."""
        s, pool_spec = self._by_slice, self.spec.pool_spec
        pool_shape = self.spec.pool_shape(num_pages, self.page_size)
        hidden_rows = self.buckets.prefill_tokens if packing.shape.prefill_rows else 0
        kernels = self.kernels
        if packing.shape.prefill_rows:  # copies of weights cost little beside so much computing
            kernels = replace(kernels, unroll=1, prefixes=packing.shape.prefixes)
        if packing.shape.cut:
            kernels = replace(kernels, unroll=max(kernels.unroll, OVERLAP_UNROLL))
        pool = abstract_array(pool_shape, self.kv_dtype, self.mesh, pool_spec)
        packed = self._array((packing.width,))
        return Definition(
            name=str(packing.shape),
            fn=functools.partial(_forward, self.spec, self._comm, kernels, packing, hidden_rows),
            mesh=self.mesh,
            in_specs=(self.spec.specs, pool_spec, s, s),
            out_specs=(s, s, pool_spec, s) if hidden_rows else (s, s, pool_spec),
            args=(self._weights(), pool, self._last_tokens(), packed),
            donate=(1,),
            options=self.options(packing.shape),
        )

    def options(self, shape: Shape) -> dict[str, Any] | None:
        """What XLA is told for a forward program beside what it is told for all; None: nothing."""
        if not is_gpu(self.mesh.devices.flat[0].platform):
            return None
        options = dict(PREFILL_OPTIONS if shape.prefill_rows else {})
        if shape.cut:
            options |= OVERLAP_OPTIONS
        elif self.mesh.size == 1:
            options |= GRAPH_OPTIONS
        return options or None

    def greedy(self, rows: int) -> Definition:
        """(logits, numbers, last tokens*) -> (packed tokens, last tokens)."""
        numbers, last = self._array((rows, len(Column))), self._last_tokens()
        args = (self._logits(rows), numbers, last)
        return self._by_slices(f"greedy {rows}", _sample_greedy, *args, num_out=2, donate=(2,))

    def full(self, rows: int) -> Definition:
        """(logits, numbers, masks, last tokens*, state*) -> (packed tokens, last tokens, state)."""
        numbers, last = self._array((rows, len(Column))), self._last_tokens()
        args = (self._logits(rows), numbers, self.masks(rows), last, self.state)
        return self._by_slices(f"full {rows}", _sample_full, *args, num_out=3, donate=(3, 4))

    def set_up(self) -> Definition:
        """(state*, packed) -> state."""
        return Definition(
            name="set-up",
            fn=_set_up,
            mesh=self.mesh,
            in_specs=(self._by_slice,) * 2,
            out_specs=self._by_slice,
            args=(self.state, self._array((SETUP_WIDTH,))),
            donate=(0,),
        )

    def score(self) -> Definition:
        """(weights, hidden, packed: rows and targets) -> packed scores."""
        s = self._by_slice
        return Definition(
            name="scoring",
            fn=functools.partial(_score, self.spec, self._comm),
            mesh=self.mesh,
            in_specs=(self.spec.specs, s, s),
            out_specs=s,
            args=(self._weights(), self._hidden(), self._array((2 * SCORE_ROWS,))),
        )

    # ---- compiling -------------------------------------------------------------------------

    def compiled(self, *definitions: Definition) -> dict[str, jax.stages.Compiled]:
        """Programs by name, from the store or compiled, several at a time: neither loading nor
        compiling needs the interpreter's lock. Lowering does, one after the other."""
        started = time.perf_counter()

        def compile_one(definition: Definition, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
            started = time.perf_counter()
            program = self._store.compile(definition, lowered)
            log.info("compiled %s in %.1f s", definition.name, time.perf_counter() - started)
            return program

        threads = min(COMPILE_THREADS, os.cpu_count() or 1)
        with self._store.compiling(), ThreadPoolExecutor(threads) as pool:
            found = [pool.submit(self._store.load, d) for d in definitions]
            missing = {
                d.name: pool.submit(compile_one, d, d.lower())
                for d, program in zip(definitions, found, strict=True)
                if program.result() is None
            }
        log.info(
            "%d programs from the program store, %d compiled, in %.1f s",
            len(definitions) - len(missing),
            len(missing),
            time.perf_counter() - started,
        )
        return {
            d.name: missing.get(d.name, program).result()
            for d, program in zip(definitions, found, strict=True)
        }

    def compile_all(self, *, num_pages: int, table_width: int, with_greedy: bool) -> Programs:
        """All programs.

        Args:
            with_greedy: False leaves out the greedy programs.
        """
        packings = [self.packing(shape, table_width) for shape in self.buckets.shapes()]
        forward = {p: self.forward(p, num_pages) for p in packings}
        full = {rows: self.full(rows) for rows in self.buckets.sampled_rows}
        greedy = {rows: self.greedy(rows) for rows in full if with_greedy}
        set_up, score = self.set_up(), self.score()
        programs = self.compiled(*forward.values(), *full.values(), *greedy.values(), set_up, score)
        return Programs(
            forward={
                packing.shape: ForwardProgram(packing=packing, run=programs[d.name])
                for packing, d in forward.items()
            },
            greedy={rows: programs[d.name] for rows, d in greedy.items()},
            full={rows: programs[d.name] for rows, d in full.items()},
            set_up=programs[set_up.name],
            score=programs[score.name],
        )

    def most_temporary_bytes(self, table_width: int) -> int:
        """Bytes of temporaries of the program that needs most, the largest ones compiled."""
        packing = self.packing(self.buckets.shapes()[0], table_width)
        rows = self.most_sampled
        largest = self.compiled(
            self.forward(packing, 2),
            self.full(rows),
            self.greedy(rows),
            self.set_up(),
            self.score(),
        )
        return max(p.memory_analysis().temp_size_in_bytes for p in largest.values())


# ---- the programs, per device --------------------------------------------------------------


def _forward(
    spec: ModelSpec,
    comm: MeshComm,
    kernels: Kernels,
    packing: Packing,
    hidden_rows: int,
    weights: Sequence[jax.Array],
    kv: jax.Array,
    last_tokens: jax.Array,
    packed: jax.Array,
) -> tuple[jax.Array, ...]:
    """One step of this device's slice: logits f32 [1, R, V], the sampler's numbers i32 [1, R, n],
    the updated pool [1, L, N, S, ...], and of an extend program the prefill rows before the final
    norm, [1, hidden_rows, D], which is long enough for every shape."""
    batch, numbers = packing.forward_batch(packed[0], last_tokens[0])
    model = spec.merge(weights)
    x, pool, _ = model.hidden(kv[0], batch, comm, kernels, packing.shape.cut)
    logits = model.logits(x[sampled_rows(batch)], comm)
    outputs = (logits[None], numbers[None], pool[None])
    if not hidden_rows:
        return outputs
    prefill = x[batch.num_decode_rows :]
    return *outputs, jnp.pad(prefill, ((0, hidden_rows - len(prefill)), (0, 0)))[None]


def _sample_greedy(
    logits: jax.Array, numbers: jax.Array, last_tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Packed tokens i32 [1, R, 2] and the updated last tokens [1, slots + 1]."""
    tokens, logprobs = greedy(logits[0])
    last_tokens = last_tokens.at[0, numbers[0, :, Column.SLOT]].set(tokens)
    return pack_tokens(tokens, logprobs)[None], last_tokens


def _sample_full(
    logits: jax.Array,
    numbers: jax.Array,
    masks: jax.Array,
    last_tokens: jax.Array,
    state: SamplingState,
) -> tuple[jax.Array, jax.Array, SamplingState]:
    """As `_sample_greedy`, with draws and the likeliest alternatives, i32 [1, R, 2 + 2n]; the
    state counts the tokens of rows that have one."""
    local = SamplingState(*(field[0] for field in state))
    slots = numbers[0, :, Column.STATE_SLOT]

    def draw(rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """Logits [r, V], numbers and masks of some rows: their tokens, alone and packed."""
        logits, numbers, masks = rows
        batch, history = sampling_batch(numbers), local.history(numbers[:, Column.STATE_SLOT])
        tokens = sample(adjust(logits, batch, history, masks), batch)
        return tokens, pack_tokens(tokens, logprobs_of(logits, tokens), *top_logprobs(logits))

    tokens, packed = in_blocks(draw, (logits[0], numbers[0], masks[0]), DRAWN_AT_ONCE)
    last_tokens = last_tokens.at[0, numbers[0, :, Column.SLOT]].set(tokens)
    counts = count_tokens(local.counts, slots, tokens)
    return packed[None], last_tokens, state._replace(counts=counts[None])


def in_blocks(fn: Callable[..., Any], rows: Any, size: int) -> Any:
    """fn over arrays of rows [R, ...], `size` rows at a time, for a fn that keeps rows apart."""
    total = len(jax.tree.leaves(rows)[0])
    whole = total // size * size
    if whole == 0 or total == size:
        return fn(rows)
    blocks = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), rows)
    done = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), jax.lax.map(fn, blocks))
    if whole == total:
        return done
    rest = fn(jax.tree.map(lambda a: a[whole:], rows))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), done, rest)


def _set_up(state: SamplingState, packed: jax.Array) -> SamplingState:
    """One piece of one request's context for this device's slice, i32 [1, SETUP_WIDTH]."""
    updated = set_up(SamplingState(*(field[0] for field in state)), packed[0])
    return SamplingState(*(field[None] for field in updated))


def _score(
    spec: ModelSpec,
    comm: MeshComm,
    weights: Sequence[jax.Array],
    hidden: jax.Array,
    packed: jax.Array,
) -> jax.Array:
    """Log probabilities of targets after prefill rows: packed i32 [1, 2 * SCORE_ROWS], rows then
    targets, to i32 [1, SCORE_ROWS, 2 + 2n]."""
    rows, targets = jnp.split(packed[0], 2)
    logits = spec.merge(weights).logits(hidden[0, rows], comm)
    return pack_tokens(targets, logprobs_of(logits, targets), *top_logprobs(logits))[None]
