"""Sums over devices: as fast as the back end can, or always in rank order.

A back end may add a row's parts in an order that depends on where the row stands in the array
(rings, trees, atomics), and so on what else runs. In order, a row's bits depend on its parts alone;
it takes as many copies in memory, and as much traffic, as there are devices to add over.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sharding.layout import Axes, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """How the devices of a layout add. All calls are for use inside `shard_map`."""

    layout: Layout
    in_order: bool = False

    def whole(self, x: jax.Array, axes: Axes) -> jax.Array:
        """The sum over a role's devices, on each of them."""
        if self.layout.size(axes) == 1:
            return x
        return add_in_order(lax.all_gather(x, axes)) if self.in_order else lax.psum(x, axes)

    def scattered(self, x: jax.Array, axes: Axes) -> jax.Array:
        """[n * T, ...] -> [T, ...]: the sum over a role's n devices, rank i gets its rows i."""
        n = self.layout.size(axes)
        if n == 1:
            return x
        if not self.in_order:
            return lax.psum_scatter(x, axes, tiled=True)
        blocks = x.reshape(n, -1, *x.shape[1:])
        return add_in_order(lax.all_to_all(blocks, axes, split_axis=0, concat_axis=0))


def add_in_order(parts: jax.Array) -> jax.Array:
    """[n, ...] -> [...]: parts[0] + parts[1] + ..., from the left, in float32."""
    total = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        total = total + part.astype(jnp.float32)
    return total.astype(parts.dtype)
