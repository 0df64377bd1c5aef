"""Stacks of weight matrices as kernels read them: plain arrays, or FP8 blocks with their factors.

A kernel multiplies by tiles of a stack and need not know which of the two it has. Values in FP8 are
converted to the activations' dtype; a tile lies in one block, so it has one factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from model.ops.kernels import MIN_BLOCK, largest_block, whole
from model.quantization import AS_THEY_ARE, BlockFP8, layer_of

MANY_ROWS = 64
"""From so many rows on, a tile has fewer numbers than its products: the factor goes to the tile."""


def unsupported(shape: tuple[int, ...], block: tuple[int, ...]) -> str | None:
    """Why kernels cannot take FP8 weights of this shape and `BlockFP8.block`; None if they can."""
    sizes = [
        math.gcd(n, b) for n, b in zip(shape[-len(block) :], block, strict=True) if b > 1 and n > 1
    ]
    if len(sizes) != 2 or any(size % MIN_BLOCK for size in sizes):
        return (
            f"FP8 blocks of {'x'.join(map(str, block))} in {list(shape[-len(block) :])} are not "
            f"multiples of {MIN_BLOCK} in both directions"
        )
    return None


def out_of_reach(size: int) -> bool:
    """Whether kernels would miss some of an array of that many numbers of one byte.

    Pallas (Triton) computes offsets in signed 32 bits for arrays of up to 4 GiB, so it would look
    for what lies beyond 2 GiB in front of the array. For larger ones it takes 64 bits.
    """
    return 2**31 < size <= 2**32


def in_reach(
    stack: jax.Array | BlockFP8, layer: jax.Array
) -> tuple[jax.Array | BlockFP8, jax.Array]:
    """The stack and the index of the layer in it; if it is `out_of_reach`, a copy of the layer and
    0."""
    if not isinstance(stack, BlockFP8) or not out_of_reach(stack.data.size):
        return stack, layer
    return jax.tree.map(lambda a: a[None], layer_of(stack, layer)), jnp.int32(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Matrices [M, K, N]. A pytree: given to a kernel, it comes with references for arrays.

    Attributes:
        data: [M, K, N], in the activations' dtype or float8; [M, N, K] if `turned`.
        scale: f32 [M, K / k, blocks, N / n, blocks] for FP8, else None; N's before K's if `turned`.
        inner: (k, n), the sizes of the last of the dimensions that were merged into K and N.
        block: along those two dimensions.
    """

    data: jax.Array
    scale: jax.Array | None
    inner: tuple[int, int] = field(metadata={"static": True})
    block: tuple[int, int] = field(metadata={"static": True})
    turned: bool = field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, weight: jax.Array | BlockFP8, lead: int, num_in: int) -> Matrices:
        """A weight [lead..., in..., out...] with `num_in` dimensions in; FP8: see `unsupported`."""
        num_out = weight.ndim - lead - num_in
        if isinstance(weight, BlockFP8) and weight.contracted != AS_THEY_ARE:
            if weight.contracted != (num_in, num_out):
                raise ValueError("an FP8 weight is stored for products over other dimensions")
            matrices = cls.of(replace(weight, contracted=AS_THEY_ARE), lead, num_out)
            return replace(
                matrices, inner=matrices.inner[::-1], block=matrices.block[::-1], turned=True
            )
        split = lead + num_in
        inside, outside = weight.shape[lead:split], weight.shape[split:]
        shape = math.prod(weight.shape[:lead]), math.prod(inside), math.prod(outside)
        inner, block, scale = (inside[-1], outside[-1]), (1, 1), None
        data = weight
        if isinstance(weight, BlockFP8):
            data, scale = weight.data, weight.scale
            block = weight.block[split - 1 - weight.ndim], weight.block[-1]
            blocks = scale.shape[split - 1], scale.shape[-1]
            scale = scale.reshape(
                shape[0], shape[1] // inner[0], blocks[0], shape[2] // inner[1], blocks[1]
            )
        return cls(data=data.reshape(shape), scale=scale, inner=inner, block=block)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, K, N)"""
        matrices, *sides = self.data.shape
        k, n = reversed(sides) if self.turned else sides
        return matrices, k, n

    @property
    def specs(self) -> Matrices:
        """Block specs: every program of a kernel sees the whole stack."""
        return jax.tree.map(lambda a: whole(a.shape), self)

    def depth(self, most: int) -> int:
        """Of the deepest tile up to `most` numbers deep."""
        return self._largest(0, most)

    def columns(self, most: int) -> int:
        """Of the widest tile up to `most` numbers wide."""
        return self._largest(1, most)

    def _largest(self, axis: int, most: int) -> int:
        size = self.shape[1 + axis]
        if self.scale is not None:
            size = math.gcd(self.inner[axis], self.block[axis])
        return largest_block(size, most)

    def add_product(
        self, total: jax.Array, x: jax.Array, matrix: jax.Array, row: jax.Array, column: jax.Array
    ) -> jax.Array:
        """Inside a kernel: total + x times a tile, f32 [rows, columns].

        Args:
            x: [rows, depth]; the tile of `matrix` begins at `row` and `column` and has x's depth
                and total's columns.
        """
        (rows, depth), columns = x.shape, total.shape[1]
        sides = [pl.ds(row, depth), pl.ds(column, columns)]
        blocks = [self._block(0, row), self._block(1, column)]
        if self.turned:
            sides.reverse()
            blocks.reverse()
        tile = self.data[matrix, *sides]
        if self.scale is None:
            return total + _dot(x, tile)
        factor = self.scale[matrix, *blocks[0], *blocks[1]]
        if rows >= MANY_ROWS:
            tile = tile.astype(jnp.float32) * factor
        tile = tile.astype(x.dtype)
        product = _dot(x, tile.T if self.turned else tile)
        return total + (product if rows >= MANY_ROWS else product * factor)

    def _block(self, axis: int, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where in `scale` the factor of K's (0) or N's (1) number `at` stands."""
        inner, block = jnp.int32(self.inner[axis]), jnp.int32(self.block[axis])
        # Not // and %, which care for signs and which Triton's lowering refuses in part.
        return lax.div(at, inner), lax.div(lax.rem(at, inner), block)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
