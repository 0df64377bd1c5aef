"""`model.comm.Comm` on the mesh: every call of the model that crosses devices, by role."""

from __future__ import annotations

from typing import Literal

import jax
from jax import lax

from model.comm import ExpertFn
from sharding.exchange_choice import Exchange, choose_exchange
from sharding.expert_exchange import all_to_all_exchange, gather_exchange
from sharding.layout import Layout
from sharding.sums import Sums

EXCHANGES = {"none": gather_exchange, "all_to_all": all_to_all_exchange}


class MeshComm:
    """Communication inside `shard_map` over the mesh of `layout`."""

    def __init__(
        self,
        layout: Layout,
        exchange: Exchange | Literal["auto"] = "auto",
        *,
        fp8_dispatch: bool = False,
        deterministic: bool = False,
    ) -> None:
        """Args:
        exchange: --moe-a2a-backend; auto chooses by the number of tokens, which is static.
        fp8_dispatch: tokens travel to experts in float8, see `sharding.dispatch_format`.
        deterministic: add over devices in a fixed order, see `sharding.sums`.
        """
        if exchange not in ("auto", *EXCHANGES):
            raise ValueError(f"unknown exchange {exchange!r}")
        self.layout = layout
        self.sums = Sums(layout=layout, in_order=deterministic)
        self.fp8_dispatch = fp8_dispatch
        self.attn_tp = layout.size(layout.attn_tp)
        self.heads_are_whole = self.attn_tp == 1
        self._exchange = exchange

    def __repr__(self) -> str:
        """All that programs depend on: the engine finds compiled ones by it."""
        return f"MeshComm({self._exchange!r}, fp8_dispatch={self.fp8_dispatch}, {self.sums!r})"

    def exchange_for(self, tokens: int, k: int, width: int, itemsize: int) -> Exchange:
        """The exchange of a program.

        Args:
            tokens: rows of a slice; k: experts of a token.
            width, itemsize: numbers of a token, and bytes of one.
        """
        if self._exchange != "auto":
            return self._exchange
        out = 1 if self.fp8_dispatch else itemsize
        return choose_exchange(self.layout, tokens, k, width * (out + itemsize) // 2)

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
        chosen = self.exchange_for(*expert_ids.shape, x.shape[1], x.dtype.itemsize)
        return EXCHANGES[chosen](
            x,
            expert_ids,
            weights,
            experts,
            num_local_experts,
            shared,
            self.sums,
            fp8=self.fp8_dispatch,
        )
