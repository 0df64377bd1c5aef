"""A few rows times one layer of FP8 weights on Hopper GPUs (a Mosaic kernel).

All steps of all tiles of the matrix are one sequence that programs cut into even shares, wherever
that cuts a tile (stream-K, arXiv:2301.03598): a matrix of any size keeps all multiprocessors
reading to the end. What several programs have of a tile are parts, added in a fixed order by what
consumes them. Every block of rows is cut alike, so that a row's bits depend on no other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from model.ops import hopper_products
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
    zeros,
)
from model.ops.kernels import covering_block, lowered_once
from model.quantization import BlockFP8

MAX_ROWS = 128
"""Of a block of them."""
MAX_PARTS = 6
"""Of a tile: each is written and read again, 4 bytes a number."""


def unsupported(stack: jax.Array | BlockFP8, num_in: int) -> str | None:
    """Why the kernel cannot take weights [L, in..., out...]; None if it can."""
    if not isinstance(stack, BlockFP8):
        return "they are not FP8"
    num_out = stack.ndim - 1 - num_in
    if stack.contracted != (num_in, num_out):
        return "their contracted numbers do not lie side by side"
    depth, columns = math.prod(stack.shape[1 : 1 + num_in]), math.prod(stack.shape[1 + num_in :])
    inner, block = _inner(stack.data.shape, num_in), _inner(stack.block, num_in)
    fits = columns % HALF == depth % DEPTH == block[0] % PART == block[1] % DEPTH == 0
    # Blocks that fill dimensions, and cut no other than the two, are found by divisions.
    if (
        not fits
        or inner[0] % block[0]
        or inner[1] % block[1]
        or math.prod(stack.block) != math.prod(block)
    ):
        return (
            f"FP8 blocks of {'x'.join(map(str, stack.block))} in {list(stack.data.shape[1:])} must "
            f"be multiples of {PART} and {DEPTH} and divide their dimensions, the matrix of {HALF}"
        )
    return None


def _inner(of_dimensions: tuple[int, ...], num_in: int) -> tuple[int, int]:
    """What belongs to the last dimension of columns, and of contracted numbers."""
    return of_dimensions[-1 - num_in], of_dimensions[-1]


class Shares(NamedTuple):
    """How programs share the steps of tiles, HALF columns each.

    Attributes:
        tiles; steps: of a tile; share: steps of a program, but perhaps for the last ones.
    """

    tiles: int
    steps: int
    share: int

    @classmethod
    def of(cls, tiles: int, steps: int) -> Shares:
        even = -(-tiles * steps // hopper_products.PROCESSORS)
        return cls(tiles, steps, max(even, -(-steps // (MAX_PARTS - 1))))

    @property
    def parts(self) -> int:
        """That the most divided tile has."""
        first = np.arange(self.tiles) * self.steps
        return 1 + int(((first + self.steps - 1) // self.share - first // self.share).max())

    def each(
        self, program: jax.Array, blocks: int, do: Callable[[jax.Array, jax.Array, Steps], None]
    ) -> None:
        """`do` what a program has of its tiles, for each of the blocks of rows."""
        begin = program * self.share
        stop = jnp.minimum(begin + self.share, self.tiles * self.steps)

        def body(tile, carry):
            before = tile * self.steps
            first, end = jnp.maximum(begin, before), jnp.minimum(stop, before + self.steps)

            def of_rows(i, carry):
                number = (first - begin) * blocks + (end - first) * i
                do(tile, i, Steps(number, first - before, end - before))
                return carry

            return lax.fori_loop(0, blocks, of_rows, carry)

        after = lax.div(stop + self.steps - 1, self.steps)
        lax.fori_loop(lax.div(begin, self.steps), jnp.where(stop > begin, after, 0), body, None)


def _kernel(
    x_ref,
    w_ref,
    scale_ref,
    layer_ref,
    out_ref,
    x_smem,
    w_smem,
    out_smem,
    ready,
    free,
    *,
    shares: Shares,
    block: tuple[int, int],
    interpret: bool,
) -> None:
    """What a program has of parts of x @ w.

    x [blocks * rows, depth], w [layers * columns, depth], scale [the same / block[0], depth /
    block[1]], out f32 [parts, blocks * rows, columns], out_smem [WARPGROUPS, rows, PART].
    """
    ring, rows = Ring(x_smem, w_smem, ready, free), x_smem.shape[1]
    parts, blocks, width = out_ref.shape[0], x_ref.shape[0] // rows, out_ref.shape[2]
    group, program = lax.axis_index("warpgroup"), lax.axis_index("processor")

    def copy(tile, of_rows, steps: Steps) -> None:
        row, column = of_rows * rows, tile * HALF
        copy_fp8_tile(ring, x_ref, w_ref, steps, row, [layer_ref[0] * width + column])

    def compute(tile, of_rows, steps: Steps) -> None:
        row, column = of_rows * rows, tile * HALF
        (total,) = multiply_fp8_tile(
            *(ring, scale_ref, group, steps, [layer_ref[0] * width + column], block),
            scaled_weights=False,
            interpret=interpret,
        )

        def store(part, value) -> None:
            at = part, pl.ds(row, rows), pl.ds(column + group * PART, PART)
            store_fp8_tile(value, out_smem, group, out_ref, *at, interpret=interpret)

        part = program - lax.div(tile * shares.steps, shares.share)
        store(part, total)

        @pl.when(steps.end == shares.steps)
        def _() -> None:
            """Parts that other tiles have and this one has not."""

            def body(part, carry):
                store(part, zeros(rows, interpret))
                return carry

            lax.fori_loop(part + 1, parts, body, None)

    share_work(ring, functools.partial(shares.each, program, blocks), copy, compute)


@lowered_once("num_in", "interpret")
def matmul_parts(
    x: jax.Array, stack: BlockFP8, layer: jax.Array, num_in: int, *, interpret: bool = False
) -> jax.Array:
    """See `model.ops.dense.matmul_parts`; for weights that are not `unsupported`."""
    t, out_shape = x.shape[0], stack.shape[1 + num_in :]
    depth, width = math.prod(stack.shape[1 : 1 + num_in]), math.prod(out_shape)
    rows = covering_block(t, MAX_ROWS)
    blocks = -(-t // rows)
    x = jnp.pad(x.reshape(t, depth), ((0, blocks * rows - t), (0, 0)))
    shares = Shares.of(width // HALF, depth // DEPTH)
    block = _inner(stack.block, num_in)
    out = launched(
        functools.partial(_kernel, shares=shares, block=block, interpret=interpret),
        jax.ShapeDtypeStruct((shares.parts, blocks * rows, width), jnp.float32),
        fp8_scratch(rows, 1, x.dtype, stack.data.dtype, jnp.float32),
        "dense_fp8",
        lanes=True,
        interpret=interpret,
    )(
        *(x, stack.data.reshape(-1, depth), stack.scale.reshape(-1, depth // block[1])),
        jnp.reshape(layer, (1,)).astype(jnp.int32),
    )
    out = out[:, :t].reshape(shares.parts, t, *out_shape)
    return out.astype(x.dtype) if shares.parts == 1 else out
