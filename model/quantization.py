"""Block-quantised FP8 weights on the device: values, factors, and their product at use.

A `BlockFP8` stands wherever a weight array stands: `weight[...]` gives the numbers to multiply
with. It is a pytree, so stacks of it are scanned, sliced and cut over devices like arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

FP8 = jnp.dtype(jnp.float8_e4m3fn)
FP8_MAX = 448.0
"""Largest finite float8_e4m3fn; there is no infinity, so what is larger would become NaN."""
Contracted = tuple[int, int]
"""Of a weight [..., in..., out...]: how many dimensions are contracted, and how many follow them.

It is stored as [..., out..., in...]: tensor cores take numbers of one byte only where contracted
ones lie side by side."""
AS_THEY_ARE: Contracted = (0, 0)
"""Of a weight that is stored as it is multiplied."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BlockFP8:
    """A weight as float8_e4m3fn values and one float32 factor per block.

    Attributes:
        data: float8 [..., n1, n2, ...].
        scale: f32 [..., ceil(n1 / b1), ceil(n2 / b2), ...].
        block: (b1, b2, ...), elements of one block along each of the last dimensions; 1 along all
            others (stacked layers, experts).
        dtype: of the numbers that `[...]` gives.
        contracted: which of their dimensions all of the above have last, see `Contracted`.
    """

    data: jax.Array
    scale: jax.Array
    block: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    contracted: Contracted = field(default=AS_THEY_ARE, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return contracted_in_place(self.data.shape, self.contracted)

    @property
    def ndim(self) -> int:
        return self.data.ndim

    def __getitem__(self, index: Any) -> jax.Array:
        """`[...]`, the only index: data times scale, multiplied in float32.

        XLA computes it once, before what uses it: fused into a product, it would be computed again
        for every block of rows, and on GPUs a hundred ways of doing that are compiled and tried.
        """
        if index is not Ellipsis:
            raise TypeError("a BlockFP8 can only be dequantised whole: weight[...]")
        scale = self.scale
        # From the right: leading dimensions come (stacking) and go (slicing).
        for axis, size in zip(reversed(range(self.ndim)), reversed(self.block), strict=False):
            if size > 1:
                scale = jnp.repeat(scale, size, axis=axis)
                scale = jax.lax.slice_in_dim(scale, 0, self.data.shape[axis], axis=axis)
        numbers = (self.data.astype(jnp.float32) * scale).astype(self.dtype)
        in_place = contracted_in_place(range(self.ndim), self.contracted)
        return jax.lax.optimization_barrier(jnp.transpose(numbers, in_place))


def factors_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Of `BlockFP8.scale`, for data of that shape; its last blocks may be partial."""
    steps = (1,) * (len(shape) - len(block)) + tuple(block)
    return tuple(-(-n // b) for n, b in zip(shape, steps, strict=True))


def contracted_last(of_dimensions: Iterable[Any], contracted: Contracted) -> tuple[Any, ...]:
    """What belongs to the dimensions of numbers, in the order in which a `BlockFP8` has them."""
    order, (inside, outside) = tuple(of_dimensions), contracted
    lead = len(order) - inside - outside
    return order[:lead] + order[lead + inside :] + order[lead : lead + inside]


def contracted_in_place(as_stored: Iterable[Any], contracted: Contracted) -> tuple[Any, ...]:
    """The inverse of `contracted_last`."""
    inside, outside = contracted
    return contracted_last(as_stored, (outside, inside))


def layer_of(stack: jax.Array | BlockFP8, *index: jax.Array) -> jax.Array | BlockFP8:
    """`stack[index]` of the leading dimensions."""

    def one(array: jax.Array) -> jax.Array:
        rest = array.shape[len(index) :]
        start = (*index, *(0 for _ in rest))
        return jax.lax.dynamic_slice(array, start, (*(1 for _ in index), *rest)).reshape(rest)

    return jax.tree.map(one, stack)


def layer_weight(stack: jax.Array | BlockFP8, *index: jax.Array) -> jax.Array:
    """`stack[index]` of the leading dimensions, dequantised: what XLA multiplies with."""
    return layer_of(stack, *index)[...]


def saturating_cast(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in another dtype, held inside float8's range where that is the target."""
    if jnp.dtype(dtype) == FP8:
        x = jnp.clip(x, -FP8_MAX, FP8_MAX)
    return x.astype(dtype)
