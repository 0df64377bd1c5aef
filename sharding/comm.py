"""`model.comm.Comm` on the mesh: every call of the model that crosses devices, by role."""

from __future__ import annotations

import jax
from jax import lax

from model.comm import ExpertFn
from sharding.expert_exchange import all_to_all_exchange, gather_exchange
from sharding.layout import Layout
from sharding.sums import Sums

EXCHANGES = {"none": gather_exchange, "all_to_all": all_to_all_exchange}
"""--moe-a2a-backend to exchange."""


class MeshComm:
    """Communication inside `shard_map` over the mesh of `layout`.

    `deterministic` adds over devices in a fixed order, see `sharding.sums`.
    """

    def __init__(
        self, layout: Layout, exchange: str = "none", *, deterministic: bool = False
    ) -> None:
        self.layout = layout
        self.sums = Sums(layout=layout, in_order=deterministic)
        self.exchange = EXCHANGES[exchange]
        self.attn_tp = layout.size(layout.attn_tp)

    def sum_heads(self, x: jax.Array) -> jax.Array:
        return self.sums.whole(x, self.layout.attn_tp)

    def first_row(self, local_rows: int) -> jax.Array:
        return lax.axis_index(self.layout.attn_tp) * local_rows

    def gather_vocab(self, logits: jax.Array) -> jax.Array:
        if self.attn_tp == 1:
            return logits
        return lax.all_gather(logits, self.layout.attn_tp, axis=1, tiled=True)

    def moe(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        weights: jax.Array,
        experts: ExpertFn,
        num_local_experts: int,
        shared: jax.Array | None,
    ) -> jax.Array:
        return self.exchange(x, expert_ids, weights, experts, num_local_experts, shared, self.sums)
