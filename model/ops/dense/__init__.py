"""Matrix products with one layer of stacked weights: `xla` slices the layer out, kernels do not.

A product of a few rows costs what reading its weights costs. XLA copies a layer out of the stack
first, which doubles that; kernels read the stack where it lies: `pallas` on all GPUs, `hopper_fp8`
weights in FP8 on one kind of them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from model.ops.dense import hopper_fp8, pallas
from model.ops.kernels import Kernels
from model.quantization import BlockFP8, layer_weight

MAX_ROWS = 512
"""Beyond, the product is bound by arithmetic, which XLA's own is better at."""


@dataclass(frozen=True, kw_only=True)
class StackedWeight:
    """One layer's weight, still in its stack. Stands where a weight array stands, as `BlockFP8`.

    Attributes:
        stack: [L, ...]; layer: i32 scalar.
    """

    stack: jax.Array | BlockFP8
    layer: jax.Array

    def __getitem__(self, index: Any) -> jax.Array:
        """`[...]`, the only index: the layer's numbers."""
        if index is not Ellipsis:
            raise TypeError("a StackedWeight can only be taken whole: weight[...]")
        return layer_weight(self.stack, self.layer)


def as_stacked(weight: Any) -> StackedWeight:
    """A weight as kernels take it: one that is no layer of a stack becomes a stack of one."""
    if isinstance(weight, StackedWeight):
        return weight
    return StackedWeight(stack=weight[None], layer=jnp.int32(0))


def matmul(x: jax.Array, weight: Any, num_in: int, kernels: Kernels) -> jax.Array:
    """x times a weight over the weight's first `num_in` dimensions.

    Args:
        x: [T, ...], its last `num_in` dimensions are contracted.
        weight: an array, a `BlockFP8`, or a `StackedWeight` [in..., out...].

    Returns:
        [T, out...] in x's dtype.
    """
    (parts,) = matmul_parts(x, (weight,), num_in, kernels)
    return sum_parts(parts, x.dtype)


def sum_parts(parts: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The product [T, out...] whose parts `matmul_parts` gave."""
    # Additions in a row fuse with what follows; a reduction is a kernel of its own.
    return functools.reduce(operator.add, tuple(parts)).astype(dtype)


def matmul_parts(
    x: jax.Array, weights: Sequence[Any], num_in: int, kernels: Kernels
) -> list[jax.Array]:
    """`matmul` by each of several weights of one layer that contract the same numbers.

    Each result is in parts [P, T, out...] whose sum it is: float32, or in x's dtype if P is 1.
    """
    if kernels.dense == "xla" or len(x) > MAX_ROWS or not _read_in_place(weights, num_in):
        contracted = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))
        product = functools.partial(
            jax.lax.dot_general,
            dimension_numbers=(contracted, ((), ())),
            preferred_element_type=x.dtype,
        )
        return [product(x, weight[...])[None] for weight in weights]
    layer, interpret = weights[0].layer, kernels.interpret
    results: dict[int, jax.Array] = {}
    for i, weight in enumerate(weights):
        if kernels.dense == "hopper" and hopper_fp8.unsupported(weight.stack, num_in) is None:
            results[i] = hopper_fp8.matmul_parts(
                x, weight.stack, layer, num_in, interpret=interpret
            )
    others = [i for i in range(len(weights)) if i not in results]
    if others:
        stacks = [weights[i].stack for i in others]
        parts = pallas.matmul_parts(x, stacks, layer, num_in, interpret=interpret)
        results |= zip(others, parts, strict=True)
    return [results[i] for i in range(len(weights))]


def _read_in_place(weights: Sequence[Any], num_in: int) -> bool:
    """Whether kernels take the weights."""
    return all(
        isinstance(weight, StackedWeight) and pallas.unsupported(weight.stack, num_in) is None
        for weight in weights
    )
