"""The kernel of extend attention for Hopper GPUs, in Pallas (Mosaic GPU).

Three warpgroups share a block of rows of one head: one copies blocks of keys and values into shared
memory, two have half of the rows each and take turns on the tensor cores, so that the products of
one hide the softmax of the other (FlashAttention-3, arXiv:2407.08608).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.ops.kernels import HOPPER, InterpretGPUParams, lowered_once
from model.ops.mla_attention.extend import Chunks, Expanded, Source, State, chunks_of_blocks
from model.ops.mla_attention.pages import LOG2_E, MASKED
from model.ops.mla_attention.warpgroups import (
    ALIGNMENT,
    COLUMNS,
    GROUPS,
    LESS,
    MORE,
    ROWS,
    Product,
    across,
    filled,
    iota,
    load,
    multiply,
    tiles,
)

KEYS, STAGES = 128, 2
"""Keys of a block, and blocks in shared memory at a time."""
MAX_WIDTH = 128
"""Numbers of a key without rope, or of a value: more do not fit into registers."""
LEAST_ROWS = 1024
"""Rows that prefill, from which it is taken: a program has up to four kernels of it to compile,
seconds each, and with fewer there is little to gain. Where the border lies was not measured."""

Sums = tuple[jax.Array, jax.Array, jax.Array]
"""What a warpgroup's rows have met: sums [ROWS, V], maxima and totals [ROWS] of a softmax, f32."""


def unsupported(
    capability: str | None,
    dtype: jax.typing.DTypeLike,
    latent: int,
    rope: int,
    nope: int,
    value: int,
) -> str | None:
    """Why the kernel cannot run on a GPU of that compute capability, or with these heads."""
    if capability != HOPPER:
        return f"compute capability {capability} instead of {HOPPER}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype)} is no type of two bytes"
    if rope != COLUMNS or latent % COLUMNS:
        return f"qk_rope_head_dim {rope} is not {COLUMNS}, or kv_lora_rank {latent} no multiple"
    for name, size, most in (("qk_nope_head_dim", nope, MAX_WIDTH), ("v_head_dim", value, nope)):
        if size % COLUMNS or not 0 < size <= most:
            return f"{name} {size} must be a multiple of {COLUMNS} up to {most}"
    return None


class _Place(NamedTuple):
    """What a warpgroup works on: a block of rows of a head, which has rows of these chunks."""

    group: jax.Array
    head: jax.Array
    first_row: jax.Array
    first_chunk: jax.Array
    end_chunk: jax.Array

    def each_chunk(self, body: Callable[[jax.Array, Any], Any], start: Any) -> Any:
        return lax.fori_loop(self.first_chunk, self.end_chunk, body, start)


class _Shared(NamedTuple):
    """Shared memory: queries of each warpgroup, keys and values by stage; barriers.

    `*_ready` say that copies are complete, `*_free` that both warpgroups have done with a stage,
    `turn` that a warpgroup may use the tensor cores.
    """

    q_nope: Any
    q_rope: Any
    k_nope: Any
    k_rope: Any
    values: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any


class _Span(NamedTuple):
    """What a block of rows sees of a chunk, whose rows are first_row to end - 1.

    Blocks of keys begin at key -lead of the chunk, which is row `first` of the arrays; keys from
    `stop` on are seen by no row.
    """

    first_row: jax.Array
    end: jax.Array
    first: jax.Array
    lead: jax.Array
    stop: jax.Array
    blocks: jax.Array


def _span(source: Source, c: jax.Array, place: _Place) -> _Span:
    first_row, num_rows, first_key, stop = (ref[c] for ref in source.chunks)
    end, lead = first_row + num_rows, lax.rem(first_key, ALIGNMENT)
    if source.causal:
        stop = jnp.minimum(stop, place.first_row + GROUPS * ROWS - first_row)
    blocks = lax.div(stop + lead + (KEYS - 1), KEYS)
    blocks = jnp.where((stop > 0) & (end > place.first_row), blocks, 0)
    return _Span(first_row, end, first_key - lead, lead, stop, blocks)


def _seen(scores: jax.Array, span: _Span, row: jax.Array, key: jax.Array, causal: bool):
    """Scores of rows from `row` and of the chunk's keys from `key` on; -inf where unseen."""
    rows, keys = row + iota(scores.shape, 0), key + iota(scores.shape, 1)
    seen = (rows >= span.first_row) & (rows < span.end) & (keys >= 0) & (keys < span.stop)
    if causal:
        seen &= keys <= rows - span.first_row
    return jnp.where(seen, scores, -jnp.inf)


def _copy(source: Source, shared: _Shared, place: _Place, step: jax.Array) -> jax.Array:
    """The warpgroup that copies: the keys that the block sees, chunk by chunk. The next step."""
    expanded, rope = source.expanded, shared.k_rope.shape[-1]
    rope_key = pl.ds(expanded.entries.shape[1] - rope, rope)

    def one_chunk(c, step):
        span = _span(source, c, place)

        def one_block(j, step):
            slot = lax.rem(step, STAGES)
            at = pl.ds(pl.multiple_of(span.first + j * KEYS, ALIGNMENT), KEYS)
            keys, values = shared.k_ready.at[slot], shared.v_ready.at[slot]
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(shared.k_free.at[slot]))
            plgpu.copy_gmem_to_smem(
                expanded.k_nope.at[at, place.head], shared.k_nope.at[slot], keys
            )
            plgpu.copy_gmem_to_smem(expanded.entries.at[at, rope_key], shared.k_rope.at[slot], keys)
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(shared.v_free.at[slot]))
            plgpu.copy_gmem_to_smem(
                expanded.values.at[at, place.head], shared.values.at[slot], values
            )
            return step + 1

        return lax.fori_loop(0, span.blocks, one_block, step)

    return place.each_chunk(one_chunk, step)


def _softmax(scores: jax.Array, so_far: Sums, factor: float, dtype: Any) -> tuple[Sums, jax.Array]:
    """An online softmax in base 2: sums, maximum and total of rows, decayed, and p in dtype."""
    out, maximum, total = so_far
    new = jnp.maximum(maximum, scores.max(axis=1) * factor)
    decay = jnp.exp2(maximum - new)
    p = jnp.exp2(scores * factor - across(new, scores.shape[1]))
    total = total * decay + p.sum(axis=1)
    # All of it before the turn on the tensor cores, not while it is waited for.
    return lax.optimization_barrier(
        ((out * across(decay, out.shape[1]), new, total), p.astype(dtype))
    )


def _compute(
    sources: Sequence[Source],
    shared: _Shared,
    place: _Place,
    so_far: Sums,
    factor: float,
    interpret: bool,
) -> Sums:
    """A warpgroup that computes: its rows' sums, maxima and totals, after those `so_far`.

    The scores of a block of keys are computed beside the sums of the block before it.
    """
    group = place.group
    row = place.first_row + group * ROWS
    steps = jnp.int32(0)
    for source in sources:
        steps = place.each_chunk(lambda c, n, s=source: n + _span(s, c, place).blocks, steps)

    def key_products(accumulator: int, slot) -> list[Product]:
        return [
            (accumulator, shared.q_nope.at[group], shared.k_nope.at[slot], True),
            (accumulator, shared.q_rope.at[group], shared.k_rope.at[slot], True),
        ]

    def no_scores() -> jax.Array:
        return filled(0, (ROWS, KEYS))

    def free(barrier, step) -> None:
        """Of the stages, only those are given back that will be used again."""
        at = barrier.at[lax.rem(step, STAGES)]
        pl.when(step + STAGES < steps)(lambda: plgpu.barrier_arrive(at))

    plgpu.barrier_wait(shared.q_ready.at[group])
    pl.when(steps > 0)(lambda: plgpu.barrier_wait(shared.k_ready.at[0]))
    (scores,) = multiply([no_scores()], key_products(0, 0), interpret=interpret)
    free(shared.k_free, jnp.int32(0))
    pl.when(group == 1)(lambda: plgpu.barrier_arrive(shared.turn.at[0]))

    def one_chunk(source: Source, c, carry):
        span, causal = _span(source, c, place), source.causal
        seen_by_all = jnp.minimum(span.stop, row - span.first_row + 1) if causal else span.stop
        all_mine = (span.first_row <= row) & (row + ROWS <= span.end)
        seen_by_all = jnp.where(all_mine, seen_by_all, 0)

        def one_block(j, carry):
            step, scores, so_far = carry
            slot, following = lax.rem(step, STAGES), lax.rem(step + 1, STAGES)
            key = j * KEYS - span.lead
            full = (key >= 0) & (key + KEYS <= seen_by_all)
            scores = lax.cond(full, lambda s: s, lambda s: _seen(s, span, row, key, causal), scores)
            (out, *sums), p = _softmax(scores, so_far, factor, shared.values.dtype)
            plgpu.barrier_wait(shared.v_ready.at[slot])
            pl.when(step + 1 < steps)(lambda: plgpu.barrier_wait(shared.k_ready.at[following]))
            plgpu.barrier_wait(shared.turn.at[group])
            out, scores = multiply(  # the last scores are of nothing and for nobody
                [out, no_scores()],
                [(0, p, shared.values.at[slot], False), *key_products(1, following)],
                issued=lambda: plgpu.barrier_arrive(shared.turn.at[1 - group]),
                interpret=interpret,
            )
            free(shared.v_free, step)
            free(shared.k_free, step + 1)
            return step + 1, scores, (out, *sums)

        return lax.fori_loop(0, span.blocks, one_block, carry)

    carry = (jnp.int32(0), scores, so_far)
    for source in sources:
        carry = place.each_chunk(functools.partial(one_chunk, source), carry)
    pl.when(group == 0)(lambda: plgpu.barrier_wait(shared.turn.at[0]))
    return carry[-1]


def _kernel(
    *refs: Any, causal: Sequence[bool], before: int, starts: bool, factor: float, interpret: bool
) -> None:
    """A block of rows of one head. `before` rows of queries are no part of any block.

    `refs`: queries and which chunks have rows in a block; the sources, each of which is `causal` or
    not; the state to start from, if it `starts` from one; the output or the state; `_Shared`.
    """
    given = iter(refs)

    def take(number: int) -> list[Any]:
        return [next(given) for _ in range(number)]

    q_nope_ref, q_rope_ref, chunks_of_blocks_ref = take(3)

    def take_source(causal: bool) -> Source:
        *expanded, chunks = take(4)
        return Source(Expanded(*expanded), Chunks(*(chunks.at[i] for i in range(4))), causal)

    sources = [take_source(each) for each in causal]
    state, outs, shared = take(2 * starts), take(1 if causal[-1] else 2), _Shared(*given)
    group, head = lax.axis_index("group"), lax.axis_index("head")
    # Last rows first: they see the most keys, and what begins late should be short.
    block = chunks_of_blocks_ref.shape[0] - 1 - lax.axis_index("block")
    first_chunk, last_chunk = (chunks_of_blocks_ref[block, i] for i in range(2))
    place = _Place(group, head, block * (GROUPS * ROWS), first_chunk, last_chunk + 1)
    value = shared.values.shape[-1]

    @pl.when(group == GROUPS)
    def _() -> None:
        plgpu.set_max_registers(LESS, action="decrease")
        step = jnp.int32(0)
        for source in sources:
            step = _copy(source, shared, place, step)

    @pl.when(group < GROUPS)
    def _() -> None:
        plgpu.set_max_registers(MORE, action="increase")
        row = pl.multiple_of(place.first_row + group * ROWS, ROWS)
        mine = pl.ds(row, ROWS)
        queries = pl.ds(pl.multiple_of(before + row, ALIGNMENT), ROWS)
        q_nope, ready = shared.q_nope.at[group], shared.q_ready.at[group]
        plgpu.copy_gmem_to_smem(
            q_nope_ref.at[queries, head, pl.ds(0, q_nope.shape[-1])], q_nope, ready
        )
        plgpu.copy_gmem_to_smem(q_rope_ref.at[queries, head], shared.q_rope.at[group], ready)
        so_far = filled(0, (ROWS, value)), filled(MASKED, (ROWS,)), filled(0, (ROWS,))
        if starts:
            log_sum = load(state[1].at[head, mine], 1)
            total = jnp.where(log_sum > MASKED, 1.0, 0.0)
            so_far = load(state[0].at[mine, head], 2), log_sum, total
        out, maximum, total = _compute(sources, shared, place, so_far, factor, interpret)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        out *= across(1.0 / total, value)
        if not causal[-1]:
            outs[0].at[mine, head][...] = out
            outs[1].at[head, mine][...] = jnp.where(seen, maximum + jnp.log(total) * LOG2_E, MASKED)
            return
        staged = q_nope.at[:, pl.ds(0, value)]
        staged[...] = out.astype(q_nope_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, outs[0].at[queries, head])
        plgpu.wait_smem_to_gmem(0)


def _shared(nope: int, rope: int, value: int, dtype: Any) -> _Shared:
    smem = functools.partial(tiles, dtype=dtype)
    barrier = plgpu.Barrier
    return _Shared(
        *(smem(GROUPS, ROWS, width) for width in (nope, rope)),
        *(smem(STAGES, KEYS, width) for width in (nope, rope, value)),
        q_ready=barrier(num_arrivals=2, num_barriers=GROUPS),
        k_ready=barrier(num_arrivals=2, num_barriers=STAGES),
        v_ready=barrier(num_barriers=STAGES),
        k_free=barrier(num_arrivals=GROUPS, num_barriers=STAGES),
        v_free=barrier(num_arrivals=GROUPS, num_barriers=STAGES),
        turn=barrier(num_barriers=GROUPS),
    )


@lowered_once("m", "scale", "interpret")
def attend(
    q_nope: jax.Array,
    q_rope: jax.Array,
    sources: Sequence[Source],
    start: State | None,
    *,
    m: int,
    scale: float,
    interpret: bool,
) -> State | jax.Array:
    """See `extend.Attend`; a state has its log-sum-exps by head, f32 [H, M].

    What stands behind the keys of chunks must be finite, although nobody sees it.
    """
    n, heads = q_nope.shape[:2]
    nope, value = (a.shape[-1] for a in sources[0].expanded[::2])
    # Blocks begin with an aligned row of the queries, up to seven before the first that counts.
    ahead = (n - m) % ALIGNMENT
    blocks = -(-(ahead + m) // (GROUPS * ROWS))
    table = chunks_of_blocks(sources[0].chunks.first_row + ahead, blocks, GROUPS * ROWS)
    operands = [_whole_tiles(q_nope), _whole_tiles(q_rope), table]
    for source in sources:
        chunks = source.chunks._replace(first_row=source.chunks.first_row + ahead)
        # One new array: kernels of Mosaic refuse what does not begin at a multiple of 256 bytes,
        # and these may be slices, which XLA does not copy.
        operands += [*map(_whole_tiles, source.expanded), jnp.stack(chunks)]
    if sources[-1].causal:
        shapes = [jax.ShapeDtypeStruct((*operands[0].shape[:2], value), q_nope.dtype)]
    else:
        rows = blocks * GROUPS * ROWS
        shapes = [
            jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, heads, value), (heads, rows))
        ]
        if start is None:  # a kernel less to compile
            nothing, unseen = shapes
            start = jnp.zeros(nothing.shape), jnp.full(unseen.shape, MASKED)
    out = plgpu.kernel(
        functools.partial(
            _kernel,
            causal=[source.causal for source in sources],
            before=n - m - ahead,
            starts=start is not None,
            factor=scale * LOG2_E,
            interpret=interpret,
        ),
        out_type=shapes,
        scratch_types=_shared(nope, q_rope.shape[-1], value, q_nope.dtype),
        grid=(blocks, heads),
        grid_names=("block", "head"),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name="mla_causal" if sources[-1].causal else "mla_prefix",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=InterpretGPUParams() if interpret else None,
    )(*operands, *(start or ()))
    return out[0][:n] if sources[-1].causal else tuple(out)


def _whole_tiles(a: jax.Array) -> jax.Array:
    """The array with rows of zeros behind, if need be: a multiple of ALIGNMENT in all."""
    if len(a) % ALIGNMENT == 0:
        return a  # XLA copies what is padded by nothing
    return jnp.pad(a, ((0, -len(a) % ALIGNMENT), *[(0, 0)] * (a.ndim - 1)))
