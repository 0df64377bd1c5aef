"""How a device meets the others: the few calls that model code makes, and the version for one.

Model code sees its own shard only. Whatever crosses devices goes through a `Comm`, so every byte of
communication is a named call and the same model runs on one device or on a mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax

ExpertFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(tokens [T, D], local expert ids [T, K] with -1 for "not here", weights f32 [T, K]) -> [T, D]:
the weighted sum over the experts (and the part of their width) that this device holds."""


class Comm(Protocol):
    """Communication of one device with its mesh.

    Attributes:
        heads_are_whole: no dimension that `sum_heads` finishes is cut: it changes nothing.
    """

    heads_are_whole: bool

    def sum_heads(self, x: jax.Array) -> jax.Array:
        """Finish a matmul whose contracted dimension (heads, dense width, vocabulary) is cut."""
        ...

    def first_row(self, local_rows: int) -> int | jax.Array:
        """Where this device's `local_rows` rows begin, of a dimension cut like the vocabulary."""
        ...

    def gather_vocab(self, logits: jax.Array) -> jax.Array:
        """[B, local vocabulary] -> [B, padded vocabulary]."""
        ...

    def moe(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        weights: jax.Array,
        experts: ExpertFn,
        num_local_experts: int,
        shared: jax.Array | None,
    ) -> jax.Array:
        """Send tokens to their experts and bring the finished sums back.

        Args:
            x: [T, D], this slice's tokens.
            expert_ids: i32 [T, K], -1 for no expert (padding rows).
            weights: f32 [T, K].
            experts: computes this device's experts.
            num_local_experts: how many this device holds (the padded number).
            shared: [T, D], the shared experts' sums as far as this device has them, or None.

        Returns:
            [T, D]: routed plus shared, complete.
        """
        ...


class SingleDevice:
    """No communication: one device holds everything."""

    heads_are_whole = True

    def sum_heads(self, x: jax.Array) -> jax.Array:
        return x

    def first_row(self, local_rows: int) -> int:
        return 0

    def gather_vocab(self, logits: jax.Array) -> jax.Array:
        return logits

    def moe(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        weights: jax.Array,
        experts: ExpertFn,
        num_local_experts: int,
        shared: jax.Array | None,
    ) -> jax.Array:
        y = experts(x, expert_ids, weights)
        return y if shared is None else y + shared
