"""A few rows times one layer of a weight stack, in Pallas (Triton): no layer is copied out.

The contracted dimension is cut over programs, so that even a narrow matrix keeps all
multiprocessors reading; their float32 parts are added in a fixed order by what consumes them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import MIN_BLOCK, covering_block, lowered_once, whole
from model.ops.matrices import MANY_ROWS, Matrices, in_reach
from model.ops.matrices import unsupported as fp8_unsupported
from model.quantization import BlockFP8

PROGRAMS = 264
"""Twice the multiprocessors of an H100."""
MAX_PARTS = 8
MAX_ROWS = 128
COLUMNS, DEPTH, STAGES = 64, 64, 4
"""Of a block: small enough for three programs on a multiprocessor."""


def unsupported(stack: jax.Array | BlockFP8, num_in: int) -> str | None:
    """Why the kernel cannot take weights [L, in..., out...]; None if it can."""
    if isinstance(stack, BlockFP8):
        return fp8_unsupported(stack.data.shape, stack.block)
    shape = stack.shape[1:]
    depth, columns = math.prod(shape[:num_in]), math.prod(shape[num_in:])
    if depth % MIN_BLOCK or columns % MIN_BLOCK:
        return f"{depth} and {columns} must be multiples of {MIN_BLOCK}"
    return None


def _kernel(x_ref, layers_ref, *refs, rows: int, columns: tuple[int, ...], depth: int, share: int):
    """A block of rows and columns, over this program's part of the contracted dimension.

    `refs`: the weights, `Matrices` [L, K, N], then as many outputs [P, T, N]; `columns` of a block
    of each.
    """
    part = pl.program_id(1)
    first = part * share
    row = pl.program_id(2) * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    live = row < x_ref.shape[0]

    def product(block, layer, w: Matrices, out_ref, columns: int) -> None:
        def body(i, total):
            start = first + i * depth
            at = start + lax.broadcasted_iota(jnp.int32, (1, depth), 1)
            x = plgpu.load(x_ref.at[row, at], mask=live, other=0)
            return w.add_product(total, x, layer, start, block * columns)

        total = lax.fori_loop(0, share // depth, body, jnp.zeros((rows, columns), jnp.float32))
        at = block * columns + lax.broadcasted_iota(jnp.int32, (1, columns), 1)
        plgpu.store(out_ref.at[part, row, at], total.astype(out_ref.dtype), mask=live)

    block = pl.program_id(0)
    n = len(columns)
    for i, w, out_ref, size in zip(range(n), refs[:n], refs[n:], columns, strict=True):
        blocks = w.shape[2] // size
        if n == 1:
            product(block, layers_ref[i], w, out_ref, size)
        else:
            here = functools.partial(product, block, layers_ref[i], w, out_ref, size)
            pl.when((block >= 0) & (block < blocks))(here)
        block = block - blocks


@lowered_once("num_in", "interpret")
def matmul_parts(
    x: jax.Array,
    stacks: Sequence[jax.Array | BlockFP8],
    layer: jax.Array,
    num_in: int,
    *,
    interpret: bool = False,
) -> list[jax.Array]:
    """See `model.ops.dense.matmul_parts`; the stacks are [L, in..., out...]."""
    t = x.shape[0]
    out_shapes = [stack.shape[1 + num_in :] for stack in stacks]
    reached = [in_reach(stack, layer) for stack in stacks]
    weights = [Matrices.of(stack, 1, num_in) for stack, _ in reached]
    layers = jnp.stack([layer for _, layer in reached]).astype(jnp.int32)
    k = weights[0].shape[1]
    x = x.reshape(t, k)
    rows = covering_block(t, MAX_ROWS)
    row_blocks = -(-t // rows)
    narrow = 2 if x.dtype.itemsize > 2 else 1
    columns = tuple(w.columns(COLUMNS // narrow) for w in weights)
    blocks = sum(w.shape[2] // size for w, size in zip(weights, columns, strict=True))
    deeper = 2 if rows < MANY_ROWS and all(w.scale is not None for w in weights) else 1
    depth = min(w.depth(DEPTH * deeper // narrow) for w in weights)
    parts = 1
    while (
        2 * parts * blocks <= PROGRAMS
        and parts < MAX_PARTS // row_blocks
        and k % (2 * parts * depth) == 0
    ):
        parts *= 2
    # A program that has a multiprocessor for itself must read further ahead.
    stages = STAGES if blocks * parts * row_blocks > PROGRAMS // 2 else STAGES + 2
    operands = (x, layers, *weights)
    shapes = [(parts, t, w.shape[2]) for w in weights]
    out = pl.pallas_call(
        functools.partial(_kernel, rows=rows, columns=columns, depth=depth, share=k // parts),
        grid=(blocks, parts, row_blocks),
        in_specs=[*(whole(a.shape) for a in operands[:2]), *(w.specs for w in weights)],
        out_specs=[whole(shape) for shape in shapes],
        out_shape=[
            jax.ShapeDtypeStruct(shape, x.dtype if parts == 1 else jnp.float32) for shape in shapes
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8 if rows > 64 else 4, num_stages=stages),
        interpret=interpret,
        name="dense",
    )(*operands)
    return [a.reshape(parts, t, *shape) for a, shape in zip(out, out_shapes, strict=True)]
