"""The experts' SwiGLU with weights in FP8 blocks on Hopper GPUs, few rows or many (Mosaic kernels).

`hopper` with operands swapped: a product takes its first factor from registers, where a warpgroup
converts FP8 on the way to it, and has 64 rows of that, which are columns of the weights; tokens are
the second factor, from 16 of them on. So no more rows are multiplied than there are, and every
number of the weights is read and converted once for all tokens of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from model.ops.grouped_mlp import hopper, placing
from model.ops.grouped_mlp.hopper import LAYOUT, PART, WARPGROUPS
from model.ops.grouped_mlp.pallas import expected_rows
from model.ops.kernels import InterpretGPUParams, load_as, lowered_once
from model.ops.matrices import MANY_ROWS
from model.quantization import BlockFP8

HALF = WARPGROUPS * PART
"""Columns of the weights that the warpgroups share; a tile has two of it, as in `hopper`."""
DEPTH = 128
"""Contracted numbers of a step: as many bytes, as wide as shared memory is swizzled."""
SHARED = 227 << 10
"""Bytes of shared memory; barriers need a few of them."""
W_LAYOUT = (mgpu.TilingTransform((8, DEPTH)), mgpu.SwizzleTransform(128))


def unsupported(
    capability: str | None,
    dtype: jax.typing.DTypeLike,
    width: int,
    inner: int,
    blocks: tuple[tuple[int, ...], tuple[int, ...]],
) -> str | None:
    """Why the kernels cannot take experts of [width, inner] on such a GPU; None if they can.

    Args:
        blocks: `BlockFP8.block` of gate and up, and of down, [..., columns, contracted].
    """
    if reason := hopper.unsupported(capability, dtype, width, inner):
        return reason
    sides = [block[-2:] for block in blocks]
    whole = (inner % sides[0][0], width % sides[1][0]) == (0, 0)  # of an expert's columns
    if not whole or any(side % DEPTH for block in sides for side in block):
        return (
            f"FP8 blocks of {' and of '.join('x'.join(map(str, b)) for b in blocks)} must be "
            f"multiples of {DEPTH} in both directions and divide the experts' columns"
        )
    return None


def _copy_tile(ring: hopper.Ring, x_ref, w_ref, step, stages: int, first_row, columns) -> None:
    """All steps of a tile, the first one being number `step` of the program's.

    `first_row` of x; `columns`, where the tile's halves begin in w.
    """
    rows = ring.x.shape[1]

    def body(k, carry):
        slot, depth = lax.rem(step + k, stages), pl.ds(k * DEPTH, DEPTH)
        mgpu.barrier_wait(ring.free.at[slot])
        ready = ring.ready.at[slot]
        mgpu.copy_gmem_to_smem(x_ref.at[pl.ds(first_row, rows), depth], ring.x.at[slot], ready)
        for i, column in enumerate(columns):
            w = w_ref.at[pl.ds(column, HALF), depth]
            mgpu.copy_gmem_to_smem(w, ring.w.at[slot, i], ready)
        return carry

    lax.fori_loop(0, x_ref.shape[1] // DEPTH, body, None)


def _converted(w_ref: Any, factor: jax.Array | None, dtype: Any, interpret: bool) -> jax.Array:
    """A warpgroup's part of the weights of a step, as a product takes it from registers."""
    if interpret:
        w = w_ref[...]
    else:
        # A thread reads four numbers that are neighbours, and gives two of them to another one.
        w = load_as(w_ref, mgpu.Layout.WGMMA_UPCAST_2X)
        w = mgpu.layout_cast(w, mgpu.Layout.WGMMA)
    w = w.astype(jnp.float32)
    return (w if factor is None else w * factor).astype(dtype)


def _multiply_tile(
    ring: hopper.Ring,
    scale_ref,
    group,
    step,
    steps: int,
    stages: int,
    columns,
    block: tuple[int, int],
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """f32 [PART, rows] twice: a warpgroup's columns of both halves times all tokens of the block.

    From MANY_ROWS tokens on a tile has fewer numbers than its products, and factors go to it.
    """
    rows, dtype = ring.x.shape[1], ring.x.dtype
    many = rows >= MANY_ROWS

    def factors(k) -> list[jax.Array]:
        at = lax.div(k * DEPTH, jnp.int32(block[1]))
        return [scale_ref[lax.div(column, jnp.int32(block[0])), at] for column in columns]

    def when_ready(k, multiply: Callable[[Any, list[jax.Array]], Any]) -> Any:
        """What `multiply` makes of step k, given its slot and factors."""
        slot, given = lax.rem(step + k, stages), factors(k)
        mgpu.barrier_wait(ring.ready.at[slot])
        result = multiply(slot, given)
        mgpu.barrier_arrive(ring.free.at[slot])
        return result

    def weights(slot, i: int, factor: jax.Array) -> jax.Array:
        w = ring.w.at[slot, i, pl.ds(group * PART, PART)]
        return _converted(w, factor if many else None, dtype, interpret)

    def issue(sums, slot, given: list[jax.Array]) -> None:
        for i, total in enumerate(sums):
            mgpu.wgmma(total, weights(slot, i, given[i]), ring.x.at[slot].T)

    def products(slot, given: list[jax.Array]) -> list[jax.Array]:
        """Of one step; interpret mode has no factors in registers."""
        if interpret:
            x = ring.x[slot].T
            w = (weights(slot, i, given[i]) for i in range(2))
            return [jnp.dot(one, x, preferred_element_type=jnp.float32) for one in w]
        nothing = mgpu.ACC.init(zero)
        return pl.run_state(lambda sums: issue(sums, slot, given))([nothing, nothing])

    def accumulate(*sums):
        def multiply(slot, given: list[jax.Array]) -> None:
            issue(sums, slot, given)
            mgpu.wgmma_wait(0)

        lax.fori_loop(0, steps, lambda k, _: when_ready(k, multiply), None)
        return tuple(total[...] for total in sums)

    if many and not interpret:
        accumulator = mgpu.ACC((PART, rows), jnp.float32)
        return pl.run_scoped(accumulate, accumulator, accumulator)
    zero = jnp.zeros((PART, rows), jnp.float32)
    if not interpret:
        zero = mgpu.layout_cast(zero, mgpu.Layout.WGMMA)

    def add(k, sums):
        def multiply(slot, given: list[jax.Array]) -> tuple[jax.Array, ...]:
            parts = products(slot, given)
            if not many:
                parts = [part * factor for part, factor in zip(parts, given, strict=True)]
            return tuple(total + part for total, part in zip(sums, parts, strict=True))

        return when_ready(k, multiply)

    return lax.fori_loop(0, steps, add, (zero, zero))


def _tiles_kernel(
    x_ref,
    w_ref,
    scale_ref,
    expert_ref,
    used_ref,
    layer_ref,
    out_ref,
    x_smem,
    w_smem,
    out_smem,
    ready,
    free,
    *,
    experts: int,
    gated: bool,
    block: tuple[int, int],
    interpret: bool,
) -> None:
    """Every program's tiles of out: x @ w, or with `gated` silu(x @ gate) * (x @ up).

    x [blocks * rows, depth], w [layers * experts * columns, depth], scale [the same / block[0],
    depth / block[1]], expert i32 [blocks], out_smem [WARPGROUPS, rows, PART].
    """
    ring = hopper.Ring(x_smem, w_smem, ready, free)
    stages, rows = x_smem.shape[:2]
    depth, width = x_ref.shape[1], out_ref.shape[1]
    steps, halves = depth // DEPTH, 1 if gated else 2
    group = lax.axis_index("warpgroup")
    each_tile = functools.partial(hopper.for_tiles, used_ref[0], width // (halves * HALF), steps)

    def columns(number, column) -> tuple[jax.Array, jax.Array]:
        """Where the halves of a tile begin in w."""
        before = (layer_ref[0] * experts + expert_ref[number]) * (width * (2 if gated else 1))
        first = before + column * (halves * HALF)
        return first, first + (width if gated else HALF)

    def copy(number, column, step) -> None:
        _copy_tile(ring, x_ref, w_ref, step, stages, number * rows, columns(number, column))

    def compute(number, column, step) -> None:
        first, second = _multiply_tile(
            *(ring, scale_ref, group, step, steps, stages, columns(number, column), block),
            interpret,
        )
        for i, result in enumerate(hopper.of_halves(first, second, gated)):
            mgpu.wait_smem_to_gmem(0, wait_read_only=True)
            result = result.astype(out_ref.dtype)
            if interpret:
                out_smem[group] = result.T
            else:
                turned = mgpu.layout_cast(result, mgpu.Layout.WGMMA_TRANSPOSED)
                out_smem.at[group].T[...] = turned
            mgpu.commit_smem()
            at = pl.ds((column * halves + i) * HALF + group * PART, PART)
            mgpu.copy_smem_to_gmem(out_smem.at[group], out_ref.at[pl.ds(number * rows, rows), at])

    hopper.share_work(ring, each_tile, copy, compute)


def _tiles(
    x: jax.Array,
    w: BlockFP8,
    blocks: placing.Blocks,
    layer: jax.Array,
    width: int,
    *,
    rows: int,
    gated: bool,
    interpret: bool,
) -> jax.Array:
    """[blocks * rows, width], see `_tiles_kernel`; w is stored as [L, E, columns..., depth]."""
    depth = x.shape[1]
    out_bytes, step_bytes = WARPGROUPS * rows * PART * 2, rows * DEPTH * 2 + 2 * HALF * DEPTH
    stages = (SHARED - (1 << 10) - out_bytes) // step_bytes
    return mgpu.kernel(
        functools.partial(
            _tiles_kernel,
            experts=w.shape[1],
            gated=gated,
            block=(w.block[-2], w.block[-1]),
            interpret=interpret,
        ),
        out_type=jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),
        scratch_types=[
            mgpu.SMEM((stages, rows, DEPTH), x.dtype, transforms=LAYOUT),
            mgpu.SMEM((stages, 2, HALF, DEPTH), w.data.dtype, transforms=W_LAYOUT),
            mgpu.SMEM((WARPGROUPS, rows, PART), x.dtype, transforms=LAYOUT),
            mgpu.Barrier(num_arrivals=3, num_barriers=stages),
            mgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ],
        grid=(hopper.PROCESSORS,),
        grid_names=("processor",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=mgpu.CompilerParams(
            approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
        kernel_name="experts_fp8_gate_up" if gated else "experts_fp8_down",
        interpret=InterpretGPUParams() if interpret else None,
    )(
        *(x, w.data.reshape(-1, depth), w.scale.reshape(-1, w.scale.shape[-1])),
        *(blocks.experts, blocks.used, layer),
    )


@lowered_once("num_experts", "interpret")
def grouped_mlp(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    w1: BlockFP8,
    w2: BlockFP8,
    layer: jax.Array,
    *,
    num_experts: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `model.ops.grouped_mlp.grouped_mlp`."""
    d, (_, experts, _, _, f) = x.shape[1], w1.shape
    rows = expected_rows(expert_ids.shape, experts, num_experts)
    layer = jnp.reshape(layer, (1,)).astype(jnp.int32)
    product = functools.partial(_tiles, layer=layer, rows=rows, interpret=interpret)

    def mlp(grouped: jax.Array, blocks: placing.Blocks) -> jax.Array:
        inner = product(grouped, w1, blocks, width=f, gated=True)
        return product(inner, w2, blocks, width=d, gated=False)

    return placing.by_expert(x, expert_ids, weights, experts, rows, mlp, interpret=interpret)
