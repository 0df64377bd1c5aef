"""The kernel of decode attention for Hopper GPUs and many heads, in Pallas (Mosaic GPU).

With 64 heads or more the products take longer than reading the latents, and the sums of 64 heads
fill the registers of two warpgroups. So a program has 64 heads. Of every block of tokens each of
two warpgroups has the scores of one half of the tokens and the sums of one half of the columns, and
they tell each other their maxima and their p (FlashMLA cuts them alike). A third one copies pages.

As many programs as the GPU runs at a time share all blocks of all sequences evenly. What a program
has of a sequence, if that is not all of it, is merged with the other parts by a small kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import triton

from model.ops.kernels import (
    HOPPER,
    PROCESSORS,
    InterpretGPUParams,
    is_power_of_two,
    lowered_once,
    whole,
)
from model.ops.mla_attention.pages import LOG2_E, MASKED, Softmax, whole_blocks
from model.ops.mla_attention.warpgroups import (
    ALIGNMENT,
    COLUMNS,
    GROUPS,
    LESS,
    MORE,
    ROWS,
    across,
    filled,
    iota,
    load,
    multiply,
    tiles,
)

BLOCK, STAGES = 64, 2
"""Tokens of a block, and blocks in shared memory at a time."""
HALF = BLOCK // GROUPS
"""Tokens of a block whose scores one warpgroup has."""
MAX_LATENT = 512
"""Half of it fills the registers."""
LEAST_SHARE = 2
"""Blocks of a program, if there are so many: merging is not free."""
MERGED_HEADS, MERGED_PARTS = 2, 8
"""Of one program that merges, at a time."""
FEW_HEADS = 16
"""So many are read as fast by the kernel for all GPUs, whose programs have no more rows."""
LEAST_ROWS = 512
"""Heads of all sequences, from which it is taken: with fewer the other one is as fast, or faster
by microseconds (docs/performance.md)."""
MAXIMA, P, TOTALS = range(3)
"""What warpgroups tell each other."""


def unsupported(
    capability: str | None,
    dtype: jax.typing.DTypeLike,
    kv_dtype: jax.typing.DTypeLike,
    latent: int,
    rope: int,
    heads: int,
    page_size: int,
) -> str | None:
    """Why the kernel cannot, or should not, run on a GPU of that compute capability.

    Args: heads: of a device.
    """
    if capability != HOPPER:
        return f"compute capability {capability} instead of {HOPPER}"
    dtype, kv_dtype = jnp.dtype(dtype), jnp.dtype(kv_dtype)
    if dtype not in (jnp.bfloat16, jnp.float16) or kv_dtype != dtype:
        return f"queries of {dtype} and a cache of {kv_dtype} are not one type of two bytes"
    if not is_power_of_two(latent) or not GROUPS * COLUMNS <= latent <= MAX_LATENT:
        return f"kv_lora_rank {latent} is no power of two from {GROUPS * COLUMNS} to {MAX_LATENT}"
    if heads <= FEW_HEADS:
        return f"of {heads} heads a device it would read no faster"
    if rope != COLUMNS:
        return f"qk_rope_head_dim {rope} is not {COLUMNS}"
    if page_size % ALIGNMENT or (BLOCK % page_size and page_size % BLOCK):
        return f"pages of {page_size} tokens are neither parts nor multiples of {BLOCK}"
    return None


class Work(NamedTuple):
    """Who computes what, i32: all sequences' blocks in a row are shared out evenly.

    Attributes:
        pages: [B, P], the first row of each page, in a layer's part of the pool.
        lengths, blocks, ends: [B], of each sequence: tokens, blocks, and blocks up to its end.
        share: [1], blocks of a worker; worker w has those from w * share on.
        first, last: [workers], the sequences that it has blocks of; none if first > last.
        split, last_part: [workers], the sequence that the worker has begun and not ended, and the
            last worker that has a part of it; -1 if there is no such sequence.
    """

    pages: jax.Array
    lengths: jax.Array
    blocks: jax.Array
    ends: jax.Array
    share: jax.Array
    first: jax.Array
    last: jax.Array
    split: jax.Array
    last_part: jax.Array


def num_workers(heads: int) -> int:
    """Programs that share the work of 64 heads."""
    return max(1, PROCESSORS // -(-heads // ROWS))


def shared_out(tables: jax.Array, lengths: jax.Array, page_size: int, workers: int) -> Work:
    """Sequences of these pages i32 [B, P] and tokens i32 [B], shared out among workers.

    A sequence without tokens has a block, whose worker writes zeros.
    """
    # Both are new arrays, no slices of others: kernels of Mosaic refuse what does not begin at a
    # multiple of 256 bytes.
    pages, lengths = tables * page_size, jnp.maximum(lengths, 0)
    blocks = jnp.maximum(1, lax.div(lengths + (BLOCK - 1), jnp.int32(BLOCK)))
    ends = jnp.cumsum(blocks)
    share = jnp.maximum(LEAST_SHARE, lax.div(ends[-1] + (workers - 1), jnp.int32(workers)))
    begin = share * jnp.arange(workers, dtype=jnp.int32)
    stop = jnp.minimum(begin + share, ends[-1])

    def ended_by(block: jax.Array) -> jax.Array:
        """Sequences that have ended before that block, [workers]."""
        return jnp.sum(ends[None] <= block[:, None], axis=1, dtype=jnp.int32)

    first, last = ended_by(begin), jnp.where(begin < stop, ended_by(stop - 1), -1)
    begun = (ends - blocks)[last] >= begin
    split = jnp.where((last >= 0) & begun & (ends[last] > stop), last, -1)
    last_part = jnp.where(split >= 0, lax.div(ends[split] - 1, share), -1)
    return Work(pages, lengths, blocks, ends, share[None], first, last, split, last_part)


class _Shared(NamedTuple):
    """Shared memory.

    Attributes:
        q_latent, q_rope: queries, by halves of their columns [GROUPS, ROWS, C / 2], and [ROWS, R].
        latents, ropes: blocks of tokens, [STAGES, GROUPS, BLOCK, C / 2] and [STAGES, BLOCK, R].
        p: of a block, [ROWS, BLOCK].
        numbers: each warpgroup's maxima, and its totals, [2, GROUPS, ROWS].
        q_ready, ready, free: barriers of queries and of each stage.
        told: barriers, of each of `MAXIMA` and so on by warpgroup [3 * GROUPS].
    """

    q_latent: Any
    q_rope: Any
    latents: Any
    ropes: Any
    p: Any
    numbers: Any
    q_ready: Any
    ready: Any
    free: Any
    told: Any


class _Segment(NamedTuple):
    """What a worker has of a sequence: `first` to `end` - 1 of its `blocks`.

    `step` is the worker's number of the sequence's block 0, negative if others have begun it.
    """

    sequence: jax.Array
    step: jax.Array
    first: jax.Array
    end: jax.Array
    blocks: jax.Array


def _each_segment(work: Work, worker: jax.Array, do: Callable[[_Segment], None]) -> None:
    share = work.share[0]

    def body(sequence, carry):
        blocks = work.blocks[sequence]
        step = work.ends[sequence] - blocks - worker * share
        first, end = jnp.maximum(0, -step), jnp.minimum(blocks, share - step)
        do(_Segment(sequence, step, first, end, blocks))
        return carry

    lax.fori_loop(work.first[worker], work.last[worker] + 1, body, None)


def _copy(segment: _Segment, kv_ref, pages_ref, layer_row, page_size: int, shared: _Shared) -> None:
    """The warpgroup that copies: the pages of a segment's blocks."""
    rows = min(page_size, BLOCK)
    half, last = shared.latents.shape[-1], pages_ref.shape[1] - 1

    def block(j, carry):
        step = segment.step + j
        slot = lax.rem(step, STAGES)
        first_rows = []  # read before the wait
        for i in range(0, BLOCK, rows):
            token = j * BLOCK + i
            page = jnp.minimum(lax.div(token, jnp.int32(page_size)), last)
            row = pages_ref[segment.sequence, page] + lax.rem(token, jnp.int32(page_size))
            first_rows.append(pl.multiple_of(layer_row + row, ALIGNMENT))
        pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(shared.free.at[slot]))
        for i, row in enumerate(first_rows):
            at, to = pl.ds(row, rows), pl.ds(i * rows, rows)
            pieces = [
                (pl.ds(g * half, half), shared.latents.at[slot, g, to]) for g in range(GROUPS)
            ]
            rope = pl.ds(GROUPS * half, shared.ropes.shape[-1])
            for columns, piece in (*pieces, (rope, shared.ropes.at[slot, to])):
                plgpu.copy_gmem_to_smem(kv_ref.at[at, columns], piece, shared.ready.at[slot])
        return carry

    lax.fori_loop(segment.first, segment.end, block, None)


def _compute(
    segment: _Segment,
    length: jax.Array,
    group: jax.Array,
    shared: _Shared,
    factor: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """A warpgroup's half of the columns of a segment's sums, normalised f32 [ROWS, C / 2], and the
    log-sum-exps [ROWS] in base 2."""
    other = 1 - group
    mine = pl.ds(pl.multiple_of(group * HALF, HALF), HALF)
    dtype, half = shared.latents.dtype, shared.latents.shape[-1]

    def read(ref: Any) -> jax.Array:
        return ref[...] if interpret else load(ref, ref.ndim, optimized=ref.ndim == 2)

    def tell(what: int) -> None:
        """The other warpgroup sees what was written so far as soon as it hears of it."""
        plgpu.barrier_arrive(shared.told.at[GROUPS * what + group])

    def hear(what: int) -> None:
        plgpu.barrier_wait(shared.told.at[GROUPS * what + other])

    def forget(slot, end) -> None:
        """What stands behind a sequence's end may be anything, NaN too, and p is 0 there."""
        for column in range(0, half, COLUMNS):
            part = shared.latents.at[slot, group, :, pl.ds(column, COLUMNS)]
            latents = read(part)
            seen = iota(latents.shape, 0) < end
            part[...] = jnp.where(seen, latents, jnp.zeros((), dtype))
        plgpu.commit_smem()

    def block(j, carry):
        out, maximum, total = carry
        slot = lax.rem(segment.step + j, STAGES)
        end = length - j * BLOCK
        plgpu.barrier_wait(shared.ready.at[slot])
        keys = [shared.latents.at[slot, g, mine] for g in range(GROUPS)]
        keys.append(shared.ropes.at[slot, mine])
        queries = [*(shared.q_latent.at[g] for g in range(GROUPS)), shared.q_rope]
        products = [(0, q, k, True) for q, k in zip(queries, keys, strict=True)]
        (scores,) = multiply([filled(0, (ROWS, HALF))], products, interpret=interpret)
        scores = lax.cond(
            end >= BLOCK,
            lambda s: s,
            lambda s: jnp.where(group * HALF + iota(s.shape, 1) < end, s, -jnp.inf),
            scores,
        )
        local = scores.max(axis=1) * factor
        shared.numbers.at[0, group][...] = local
        tell(MAXIMA)
        local = jnp.maximum(maximum, local)
        hear(MAXIMA)
        new = jnp.maximum(local, read(shared.numbers.at[0, other]))
        p = jnp.exp2(scores * factor - across(new, HALF))
        shared.p.at[:, mine][...] = p.astype(dtype)
        tell(P)
        decay = jnp.exp2(maximum - new)
        total = total * decay + p.sum(axis=1)
        out *= across(decay, half)
        pl.when(end < BLOCK)(lambda: forget(slot, end))
        hear(P)
        products = [(0, read(shared.p), shared.latents.at[slot, group], False)]
        (out,) = multiply([out], products, interpret=interpret)
        plgpu.barrier_arrive(shared.free.at[slot])
        return out, new, total

    start = filled(0, (ROWS, half)), filled(MASKED, (ROWS,)), filled(0, (ROWS,))
    out, maximum, total = lax.fori_loop(segment.first, segment.end, block, start)
    shared.numbers.at[1, group][...] = total
    tell(TOTALS)
    hear(TOTALS)
    total += read(shared.numbers.at[1, other])
    total = jnp.where(total > 0, total, 1.0)
    return out * across(1.0 / total, half), maximum + jnp.log(total) * LOG2_E


def _kernel(
    q_latent_ref,
    q_rope_ref,
    kv_ref,
    layer_ref,
    *refs: Any,
    page_size: int,
    layer_rows: int,
    factor: float,
    interpret: bool,
) -> None:
    """A worker's share of all sequences, for 64 heads.

    kv [rows, C + R]. `refs`: `Work`; out [B, H, C]; parts f32 [workers, 2, H, C] and their
    log-sum-exps f32 [workers, 2, H], at 0 of the sequence that others have begun, at 1 of the one
    that others go on with; `_Shared`.
    """
    fields = len(Work._fields)
    work, (out_ref, parts_ref, log_sums_ref) = Work(*refs[:fields]), refs[fields : fields + 3]
    shared = _Shared(*refs[fields + 3 :])
    worker, group = lax.axis_index("worker"), lax.axis_index("group")
    heads = pl.ds(pl.multiple_of(lax.axis_index("heads") * ROWS, ROWS), ROWS)

    @pl.when(group == GROUPS)
    def _() -> None:
        plgpu.set_max_registers(LESS, action="decrease")
        pages = work.pages, layer_ref[0] * layer_rows, page_size
        _each_segment(work, worker, lambda s: _copy(s, kv_ref, *pages, shared))

    def compute(segment: _Segment) -> None:
        sequence, half = segment.sequence, shared.q_latent.shape[-1]
        columns = pl.ds(pl.multiple_of(group * half, half), half)
        mine = shared.q_latent.at[group]  # first of the queries, then of what comes out
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(q_latent_ref.at[sequence, heads, columns], mine, shared.q_ready)

        @pl.when(group == 0)
        def _() -> None:
            q_rope = q_rope_ref.at[sequence, heads]
            plgpu.copy_gmem_to_smem(q_rope, shared.q_rope, shared.q_ready)

        plgpu.barrier_wait(shared.q_ready)
        length = work.lengths[sequence]
        out, log_sum = _compute(segment, length, group, shared, factor, interpret)
        all_of_it = segment.end - segment.first == segment.blocks

        @pl.when(all_of_it)
        def _() -> None:
            mine[...] = out.astype(out_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_ref.at[sequence, heads, columns])

        @pl.when(jnp.logical_not(all_of_it))
        def _() -> None:
            part = jnp.where(segment.first == 0, 1, 0)
            parts_ref.at[worker, part, heads, columns][...] = out

            @pl.when(group == 0)
            def _() -> None:
                log_sums_ref.at[worker, part, heads][...] = log_sum

    @pl.when(group < GROUPS)
    def _() -> None:
        plgpu.set_max_registers(MORE, action="increase")
        _each_segment(work, worker, compute)
        plgpu.wait_smem_to_gmem(0)


def _merge_kernel(parts_ref, log_sums_ref, split_ref, last_part_ref, _, out_ref) -> None:
    """Some heads of the sequence that a worker has begun and others go on with, if there is one."""
    first, first_head = pl.program_id(0), pl.program_id(1) * MERGED_HEADS
    sequence = split_ref[0]
    heads = first_head + jnp.arange(MERGED_HEADS)
    columns = jnp.arange(out_ref.shape[-1])

    @pl.when(sequence >= 0)
    def _() -> None:
        workers = last_part_ref[0] - first + 1

        def body(i, so_far):
            some = i * MERGED_PARTS + jnp.arange(MERGED_PARTS)
            which = (first + some)[:, None], jnp.where(some > 0, 0, 1)[:, None], heads[None]
            there = (some < workers)[:, None]
            log_sums = triton.load(log_sums_ref.at[which], mask=there, other=MASKED)
            at = *(each[..., None] for each in which), columns[None, None]
            parts = triton.load(parts_ref.at[at], mask=there[..., None], other=0)
            new = jnp.maximum(so_far.maximum, jnp.max(log_sums, axis=0))
            decay, weights = jnp.exp2(so_far.maximum - new), jnp.exp2(log_sums - new[None])
            out = so_far.out * decay[:, None] + jnp.sum(parts * weights[..., None], axis=0)
            return Softmax(out, new, so_far.total * decay + jnp.sum(weights, axis=0))

        nothing = Softmax.empty(MERGED_HEADS, out_ref.shape[-1])
        merged = lax.fori_loop(0, pl.cdiv(workers, MERGED_PARTS), body, nothing)
        out = merged.normalised().astype(out_ref.dtype)
        out_ref[sequence, pl.ds(first_head, MERGED_HEADS), :] = out


def _merged(
    out: jax.Array, parts: jax.Array, log_sums: jax.Array, work: Work, *, interpret: bool
) -> jax.Array:
    """`out` [B, H, C] with the sequences that it lacks."""
    workers, _, heads, _ = parts.shape
    of_worker, all_rows = pl.BlockSpec((1,), lambda w, h: (w,)), whole(out.shape)
    return pl.pallas_call(
        _merge_kernel,
        grid=(workers, heads // MERGED_HEADS),
        in_specs=[whole(parts.shape), whole(log_sums.shape), of_worker, of_worker, all_rows],
        out_specs=all_rows,
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={4: 0},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="mla_merge_parts",
    )(parts, log_sums, work.split, work.last_part, out)


def _shared(latent: int, rope: int, page_size: int, dtype: Any) -> _Shared:
    smem, barrier = functools.partial(tiles, dtype=dtype), plgpu.Barrier
    half, copies = latent // GROUPS, (GROUPS + 1) * max(1, BLOCK // page_size)
    return _Shared(
        q_latent=smem(GROUPS, ROWS, half),
        q_rope=smem(ROWS, rope),
        latents=smem(STAGES, GROUPS, BLOCK, half),
        ropes=smem(STAGES, BLOCK, rope),
        p=smem(ROWS, BLOCK, swizzle=2 * HALF),
        numbers=plgpu.SMEM((2, GROUPS, ROWS), jnp.float32),
        q_ready=barrier(num_arrivals=GROUPS + 1),
        ready=barrier(num_arrivals=copies, num_barriers=STAGES),
        free=barrier(num_arrivals=GROUPS, num_barriers=STAGES),
        told=barrier(num_barriers=3 * GROUPS),
    )


@lowered_once("scale", "interpret")
def decode_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    work: Work,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """See `model.ops.mla_attention.decode_attention`; `work` is that of `num_workers`."""
    given_heads, latent = q_latent.shape[1:]
    _, pages, page_size, width = kv.shape
    q_latent, q_rope = whole_blocks(q_latent, q_rope, heads=ROWS)
    heads, workers = q_latent.shape[1], len(work.first)
    parts = jax.ShapeDtypeStruct((workers, 2, heads, latent), jnp.float32)
    out, *rest = plgpu.kernel(
        functools.partial(
            _kernel,
            page_size=page_size,
            layer_rows=pages * page_size,
            factor=scale * LOG2_E,
            interpret=interpret,
        ),
        out_type=[
            jax.ShapeDtypeStruct(q_latent.shape, q_latent.dtype),
            parts,
            jax.ShapeDtypeStruct(parts.shape[:-1], jnp.float32),
        ],
        scratch_types=_shared(latent, q_rope.shape[-1], page_size, q_latent.dtype),
        grid=(workers, heads // ROWS),
        grid_names=("worker", "heads"),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name="mla_decode_many_heads",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,  # four threads have a row: they need none, and none is left
        ),
        interpret=InterpretGPUParams() if interpret else None,
    )(
        *(q_latent, q_rope, kv.reshape(-1, width)),
        *(jnp.reshape(layer, (1,)).astype(jnp.int32), *work),
    )
    return _merged(out, *rest, work, interpret=interpret)[:, :given_heads]
