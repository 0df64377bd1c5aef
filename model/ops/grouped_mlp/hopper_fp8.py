"""The experts' SwiGLU with weights in FP8 blocks on Hopper GPUs, few rows or many (Mosaic kernels).

`hopper` with operands swapped, see `model.ops.hopper_products`: every number of the weights is read
and converted once for all tokens of a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from model.ops.grouped_mlp import hopper, placing
from model.ops.grouped_mlp.pallas import expected_rows
from model.ops.hopper_products import (
    DEPTH,
    HALF,
    PART,
    Ring,
    Steps,
    copy_fp8_tile,
    fp8_scratch,
    launched,
    multiply_fp8_tile,
    share_work,
    store_fp8_tile,
)
from model.ops.kernels import lowered_once
from model.ops.matrices import MANY_ROWS
from model.quantization import BlockFP8


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
    ring, rows = Ring(x_smem, w_smem, ready, free), x_smem.shape[1]
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
        of_tile = Steps(step, 0, steps)
        copy_fp8_tile(ring, x_ref, w_ref, of_tile, number * rows, columns(number, column))

    def compute(number, column, step) -> None:
        # From so many tokens on a tile of weights has fewer numbers than its products.
        first, second = multiply_fp8_tile(
            *(ring, scale_ref, group, Steps(step, 0, steps), columns(number, column), block),
            scaled_weights=rows >= MANY_ROWS,
            interpret=interpret,
        )
        for i, result in enumerate(hopper.of_halves(first, second, gated)):
            at = pl.ds((column * halves + i) * HALF + group * PART, PART)
            place = pl.ds(number * rows, rows), at
            store_fp8_tile(result, out_smem, group, out_ref, *place, interpret=interpret)

    share_work(ring, each_tile, copy, compute)


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
    return launched(
        functools.partial(
            _tiles_kernel,
            experts=w.shape[1],
            gated=gated,
            block=(w.block[-2], w.block[-1]),
            interpret=interpret,
        ),
        jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),
        fp8_scratch(rows, 2, x.dtype, w.data.dtype, x.dtype),
        "experts_fp8_gate_up" if gated else "experts_fp8_down",
        lanes=True,
        interpret=interpret,
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
