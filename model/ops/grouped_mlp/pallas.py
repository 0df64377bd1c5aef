"""The experts' SwiGLU as two Pallas (Triton) kernels: gate and up with SiLU, then down.

Pairs of (token, expert) are sorted by expert; a program computes a block of one expert's pairs and
some columns. It finds its expert by itself from the number of pairs of each, gathers its tokens
from x and, in the second kernel, scatters weighted results to the pairs' places: nothing is padded
or permuted in memory but the inner activations. Blocks without pairs end at once, so padding rows
and idle experts cost nothing.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.grouped_mlp.placing import counted_before
from model.ops.kernels import MIN_BLOCK, largest_block, lowered_once, whole
from model.ops.matrices import Matrices, in_reach
from model.quantization import BlockFP8

FEW_PAIRS = 4096
"""Up to so many, programs that sort 64 of them are faster than some that sort 128."""
COUNTED_PAIRS, COUNTED_AT_ONCE = 512, 128
"""Up to so many, each program that sorts counts all pairs itself, instead of a kernel before it."""

MOST_COUNTS = 1 << 15
"""Of pairs per block and expert, that every program of the sort adds up by itself."""


class Tiles(NamedTuple):
    """Sizes of one kernel: pairs, columns and contracted elements of a block; warps; stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def unsupported(width: int, inner: int) -> str | None:
    """Why the kernels cannot take experts of [width, inner]; None if they can."""
    if width % MIN_BLOCK or inner % MIN_BLOCK:
        return f"width {width} and expert width {inner} must be multiples of {MIN_BLOCK}"
    return None


def expected_rows(ids: tuple[int, int], experts: int, num_experts: int | None) -> int:
    """`block_rows` for expert ids of that shape, if `experts` of `num_experts` are here."""
    tokens, k = ids
    # Of a token's experts as many are here as these are of all, or the one that it came for.
    here = max(1, -(-k * experts // max(experts, num_experts or experts)))
    return block_rows(tokens * here, experts)


def block_rows(pairs: int, experts: int) -> int:
    """Pairs of a block: room for somewhat more than the mean load of an expert, 16 to 128."""
    rows = MIN_BLOCK
    while rows < 128 and 4 * rows * experts < 5 * pairs:
        rows *= 2
    return rows


def tiles(rows: int, w: Matrices, itemsize: int, *, gated: bool) -> Tiles:
    """Sizes that were fastest on an H100 (docs/performance.md), as far as they divide the matrix.

    `gated`: two matrices share the block's columns. `itemsize`: of activations.
    """
    if rows >= 64:
        most_columns, most_depth, warps, stages = (128 if gated else 256), 64, 8, 4
        if rows == 64:
            most_columns, warps = 128, 4 if not gated else 8
    else:
        most_columns, most_depth, warps, stages = (64 if gated else 128), 64, 4, 4
        if w.scale is not None:
            most_depth = 128
    if itemsize > 2:  # half the tile: shared memory is counted in bytes
        most_columns, most_depth, stages = most_columns // 2, most_depth // 2, 2
    columns = largest_block(w.inner[1], w.columns(most_columns))  # of gate or of up
    return Tiles(rows, columns, w.depth(most_depth), warps, stages)


class _Block(NamedTuple):
    """What a program computes: its expert, its pairs' places in the sorted order, which exist."""

    used: jax.Array
    expert: jax.Array
    places: jax.Array
    live: jax.Array


def _find_block(counts_ref, index, rows: int) -> _Block:
    """Block `index` of the blocks of all experts, in order."""
    counts = counts_ref[...]  # [E], zeros behind the last expert
    blocks = (counts + rows - 1) // rows
    ends = jnp.cumsum(blocks)
    expert = jnp.sum((ends <= index).astype(jnp.int32))
    numbers = lax.broadcasted_iota(jnp.int32, counts.shape, 0)
    first_pair = jnp.sum(jnp.where(numbers < expert, counts, 0))
    first_block = jnp.sum(jnp.where(numbers < expert, blocks, 0))
    count = jnp.sum(jnp.where(numbers == expert, counts, 0))
    inside = (index - first_block) * rows + lax.broadcasted_iota(jnp.int32, (rows,), 0)
    return _Block(index < jnp.max(ends), expert, first_pair + inside, inside < count)


def _gate_up_kernel(
    x_ref, w: Matrices, order_ref, counts_ref, layer_ref, out_ref, *, k: int, t: Tiles
):
    """out [rows, columns] = silu(x @ gate) * (x @ up) of a block's tokens."""
    block, first = _find_block(counts_ref, pl.program_id(1), t.rows), pl.program_id(0) * t.columns

    @pl.when(block.used)
    def _() -> None:
        matrix, width = layer_ref[0] + block.expert, w.shape[2] // 2
        pairs = plgpu.load(order_ref.at[block.places], mask=block.live, other=0)
        token = pairs // k

        def body(i, carry):
            row = i * t.depth
            at = row + lax.broadcasted_iota(jnp.int32, (1, t.depth), 1)
            x = x_ref[token[:, None], at]
            return tuple(
                w.add_product(total, x, matrix, row, column)
                for total, column in zip(carry, (first, width + first), strict=True)
            )

        zero = jnp.zeros((t.rows, t.columns), jnp.float32)
        gate, up = lax.fori_loop(0, x_ref.shape[1] // t.depth, body, (zero, zero))
        gated = gate * (1 / (1 + jnp.exp(-gate))) * up
        out_ref[...] = gated.astype(out_ref.dtype)


def _down_kernel(
    h_ref,
    w: Matrices,
    weight_ref,
    order_ref,
    counts_ref,
    layer_ref,
    out_ref,
    *,
    t: Tiles,
):
    """out [pairs, columns] at a block's pairs = weight * (h @ down)."""
    block, first = _find_block(counts_ref, pl.program_id(1), t.rows), pl.program_id(0) * t.columns

    @pl.when(block.used)
    def _() -> None:
        matrix = layer_ref[0] + block.expert
        pairs = plgpu.load(order_ref.at[block.places], mask=block.live, other=0)

        def body(i, total):
            h = h_ref[:, pl.ds(i * t.depth, t.depth)]
            return w.add_product(total, h, matrix, i * t.depth, first)

        zero = jnp.zeros((t.rows, t.columns), jnp.float32)
        total = lax.fori_loop(0, h_ref.shape[1] // t.depth, body, zero)
        weight = plgpu.load(weight_ref.at[pairs], mask=block.live, other=0.0)
        total = (total * weight[:, None]).astype(out_ref.dtype)
        at = first + lax.broadcasted_iota(jnp.int32, (1, t.columns), 1)
        # No two lanes name one place: where masks are emulated, a dead lane writes what it read.
        places = jnp.where(block.live, pairs, out_ref.shape[0] + block.places)
        plgpu.store(out_ref.at[places[:, None], at], total, mask=block.live[:, None])


def _counted(ids_ref, first_pair: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Pairs of each expert, all and those before `first_pair`, i32 [E] each."""
    pairs = ids_ref.shape[0]

    def body(i, so_far):
        counts, before = so_far
        pair = i * COUNTED_AT_ONCE + lax.broadcasted_iota(jnp.int32, (COUNTED_AT_ONCE,), 0)
        ids = plgpu.load(ids_ref.at[pair], mask=pair < pairs, other=-1)
        expert = lax.broadcasted_iota(jnp.int32, (COUNTED_AT_ONCE, experts), 1)
        there = (ids[:, None] == expert).astype(jnp.int32)
        earlier = jnp.where((pair < first_pair)[:, None], there, 0)
        return counts + jnp.sum(there, axis=0), before + jnp.sum(earlier, axis=0)

    nothing = jnp.zeros((experts,), jnp.int32)
    return lax.fori_loop(0, -(-pairs // COUNTED_AT_ONCE), body, (nothing, nothing))


def _sort_kernel(ids_ref, *refs, rows: int, told: bool):
    """The places of a block of pairs: behind all of smaller experts, and of the blocks before.

    `refs`: where this block's pairs of each expert begin [E], if that is `told`; else every block's
    pairs of each expert [blocks, E], if they are counted; the order; unless told, pairs per expert.
    """
    block, pairs = pl.program_id(0), ids_ref.shape[0]
    pair = block * rows + lax.broadcasted_iota(jnp.int32, (rows,), 0)
    ids = plgpu.load(ids_ref.at[pair], mask=pair < pairs, other=-1)
    if told:
        first_ref, order_ref = refs
        first = first_ref[...]
    else:
        *blocks_refs, order_ref, counts_ref = refs
        if blocks_refs:
            of_blocks = blocks_refs[0][...]
            numbers = lax.broadcasted_iota(jnp.int32, of_blocks.shape, 0)
            counts = jnp.sum(of_blocks, axis=0)
            before = jnp.sum(jnp.where(numbers < block, of_blocks, 0), axis=0)
        else:
            counts, before = _counted(ids_ref, block * rows, counts_ref.shape[0])
        first = jnp.cumsum(counts) - counts + before  # [E]
        counts_ref[...] = counts
    mine = ids[:, None] == lax.broadcasted_iota(jnp.int32, (rows, first.shape[0]), 1)
    mine = mine.astype(jnp.int32)
    inside = jnp.cumsum(mine, axis=0) - mine
    places = jnp.sum(mine * (first[None] + inside), axis=1)
    live = (ids >= 0) & (pair < pairs)
    # No two lanes name one place, see `_down_kernel`.
    plgpu.store(order_ref.at[jnp.where(live, places, pairs + pair)], pair, mask=live)


def sort_pairs(
    expert_ids: jax.Array, experts: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The pairs in the order of their experts, and pairs per expert.

    Args:
        expert_ids: i32 [pairs], -1 for absent.

    Returns:
        i32 [pairs], stable; absent pairs are nowhere, and what stands behind the others is
        undefined; i32 [E'], E' the power of two from `experts` on.
    """
    pairs = expert_ids.shape[0]
    padded = 1 << (experts - 1).bit_length()
    rows = 64 if pairs <= FEW_PAIRS or padded > 128 else 128
    blocks, told = -(-pairs // rows), False
    operands, specs = [expert_ids], [whole((pairs,))]
    out_shape = [(pairs,), (padded,)]
    if pairs > COUNTED_PAIRS:
        ids = jnp.pad(expert_ids, (0, -pairs % rows), constant_values=-1)
        of_blocks = jnp.sum(
            ids.reshape(blocks, 1, rows) == jnp.arange(padded)[:, None], axis=-1, dtype=jnp.int32
        )
        told = blocks * padded > MOST_COUNTS
        if told:
            before, counts = counted_before(of_blocks)
            smaller = jnp.tril(jnp.broadcast_to(counts, (padded, padded)), -1).sum(axis=1)
            operands.append(before + smaller)
            specs.append(pl.BlockSpec((None, padded), lambda i: (i, 0)))
            del out_shape[1]
        else:
            all_blocks = 1 << (blocks - 1).bit_length()
            operands.append(jnp.pad(of_blocks, ((0, all_blocks - blocks), (0, 0))))
            specs.append(whole(operands[1].shape))
    order, *sums = pl.pallas_call(
        functools.partial(_sort_kernel, rows=rows, told=told),
        grid=(blocks,),
        in_specs=specs,
        out_specs=[whole(shape) for shape in out_shape],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in out_shape],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="sort_pairs",
    )(*operands)
    return order, counts if told else sums[0]


@lowered_once("num_experts", "interpret")
def grouped_mlp(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    w1: jax.Array | BlockFP8,
    w2: jax.Array | BlockFP8,
    layer: jax.Array,
    *,
    num_experts: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `model.ops.grouped_mlp.grouped_mlp`."""
    (t, d), k = x.shape, expert_ids.shape[1]
    experts, f = w1.shape[1], w1.shape[-1]
    pairs = t * k
    rows = expected_rows(expert_ids.shape, experts, num_experts)
    blocks = -(-pairs // rows) + min(experts, pairs)
    order, counts = sort_pairs(expert_ids.reshape(-1), experts, interpret=interpret)

    def stacked(stack: jax.Array | BlockFP8) -> tuple[Matrices, jax.Array]:
        """All experts of all layers, and where the layer's begin."""
        stack, index = in_reach(stack, layer)
        begin = jnp.reshape(index, (1,)).astype(jnp.int32) * experts
        return Matrices.of(stack, 2, 1), begin

    gate_up, begin = stacked(w1)
    first = tiles(rows, gate_up, x.dtype.itemsize, gated=True)
    others = (order, counts, begin)
    inner = pl.pallas_call(
        functools.partial(_gate_up_kernel, k=k, t=first),
        grid=(f // first.columns, blocks),
        in_specs=[whole(x.shape), gate_up.specs, *(whole(a.shape) for a in others)],
        out_specs=pl.BlockSpec((rows, first.columns), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((blocks * rows, f), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=first.warps, num_stages=first.stages),
        interpret=interpret,
        name="experts_gate_up",
    )(x, gate_up, *others)
    down, begin = stacked(w2)
    second = tiles(rows, down, x.dtype.itemsize, gated=False)
    others = (weights.astype(jnp.float32).reshape(-1), order, counts, begin)
    out = pl.pallas_call(
        functools.partial(_down_kernel, t=second),
        grid=(d // second.columns, blocks),
        in_specs=[
            pl.BlockSpec((rows, f), lambda j, i: (i, 0)),
            down.specs,
            *(whole(a.shape) for a in others),
        ],
        out_specs=whole((pairs, d)),
        out_shape=jax.ShapeDtypeStruct((pairs, d), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=second.warps, num_stages=second.stages),
        interpret=interpret,
        name="experts_down",
    )(inner, down, *others)
    # Absent pairs were never written. Additions in a row fuse with what follows; a reduction is
    # a kernel of its own.
    out = jnp.where((expert_ids >= 0)[..., None], out.reshape(t, k, d), 0).astype(jnp.float32)
    return functools.reduce(operator.add, (out[:, i] for i in range(k))).astype(x.dtype)
