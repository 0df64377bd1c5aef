"""The network: segments of equal layers, scanned; embedding before, logits after.

A segment is one module of stacked [L, ...] parameters. `lax.scan` runs it with the KV pool in the
carry (anything else copies the pool) and the small weights as scanned inputs; expert stacks stay
whole and are indexed inside (scanning them would copy them).
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.batch import ForwardBatch, Rows, derive_rows, micro_batches, sampled_rows
from model.comm import Comm
from model.config import LayerKind, ModelConfig
from model.gqa import GQAttention
from model.heads import HeadSlots, head_slots
from model.layers import (
    MLP,
    Axis,
    Embedding,
    LMHead,
    ParamFactory,
    add_and_norm,
    norm_rows,
    rms_norm,
    scaled,
)
from model.mla import MLAttention
from model.moe import Experts, MoE
from model.ops.dense import StackedWeight
from model.ops.kernels import XLA, Kernels
from model.quantization import BlockFP8
from model.rope import rope_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The dimensions that are cut over devices, padded to whole shares.

    Padding is zero weights: padded heads and widths add nothing, padded experts are never chosen,
    padded vocabulary is cut off the logits. Under GQA `slots` says which head stands where.
    """

    heads: int
    slots: HeadSlots | None
    vocab: int
    intermediate: int
    shared_intermediate: int
    experts: int
    expert_intermediate: int

    @classmethod
    def of(
        cls, config: ModelConfig, *, attn_tp: int = 1, moe_ep: int = 1, moe_tp: int = 1
    ) -> Sizes:
        """Sizes for groups of `attn_tp`, `moe_ep` and `moe_tp` devices."""

        def up(size: int, group: int) -> int:
            return -(-size // group) * group

        slots = (
            None if config.is_mla else head_slots(config.num_heads, config.num_kv_heads, attn_tp)
        )
        return cls(
            heads=up(config.num_heads, attn_tp) if slots is None else len(slots.query),
            slots=slots,
            vocab=up(config.vocab_size, attn_tp),
            intermediate=up(config.intermediate_size, attn_tp),
            shared_intermediate=up(config.shared_intermediate_size, attn_tp),
            experts=up(config.num_experts, moe_ep),
            expert_intermediate=up(config.moe_intermediate_size, moe_tp),
        )


def kv_entry(config: ModelConfig, sizes: Sizes) -> tuple[tuple[int, ...], tuple[Axis, ...]]:
    """Shape and logical axes of what the KV pool holds for one token and layer.

    MLA: a latent and a rope key [C + R], which every device of a slice has; GQA: keys and values
    [2, N, d] of N slots of heads.
    """
    if sizes.slots is None:
        return (config.latent_dim,), (None,)
    return (2, len(sizes.slots.kv), config.head_dim), (None, "kv_heads", None)


class DecoderLayer(nnx.Module):
    """Norm, attention, norm, MLP or MoE; parameters of one layer or stacked ones."""

    def __init__(
        self, make: ParamFactory, config: ModelConfig, sizes: Sizes, kind: LayerKind
    ) -> None:
        self.attention_norm = make.ones(config.hidden_size)
        if sizes.slots is None:
            self.attention = MLAttention(make, config, sizes.heads)
        else:
            self.attention = GQAttention(make, config, sizes.slots)
        self.mlp_norm = make.ones(config.hidden_size)
        if kind == "dense":
            self.mlp = MLP(make, config.hidden_size, sizes.intermediate)
        else:
            self.moe = MoE(make, config, sizes.shared_intermediate)
        self.config, self.kind = config, kind


class Segment(nnx.Module):
    """A run of equal layers."""

    def __init__(
        self,
        make: ParamFactory,
        config: ModelConfig,
        sizes: Sizes,
        kind: LayerKind,
        num_layers: int,
    ) -> None:
        make = make.stacked(num_layers)
        self.layers = DecoderLayer(make, config, sizes, kind)
        if kind == "moe":
            self.experts = Experts(
                make, config.hidden_size, sizes.experts, sizes.expert_intermediate
            )
        self.kind, self.num_layers = kind, num_layers


class Transformer(nnx.Module):
    """The whole model; inside `shard_map` its arrays are this device's shards."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        sizes: Sizes | None = None,
    ) -> None:
        """Draw N(0, 0.02) weights and unit norms; `sizes` defaults to one device's."""
        sizes = sizes or Sizes.of(config)
        make = ParamFactory(rngs, dtype)
        self.embedding = Embedding(make, sizes.vocab, config.hidden_size)
        self.segments = nnx.List(
            Segment(make, config, sizes, kind, num_layers) for kind, num_layers in config.segments
        )
        self.norm = make.ones(config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = LMHead(make, sizes.vocab, config.hidden_size)
        self.config = config

    def embed(self, tokens: jax.Array, comm: Comm) -> jax.Array:
        """i32 [T] -> [T, D]."""
        return scaled(self.embedding(tokens, comm), self.config.embedding_scale)

    def logits(self, x: jax.Array, comm: Comm) -> jax.Array:
        """Hidden rows [B, D] -> f32 [B, V]."""
        x = rms_norm(x, self.norm[...], self.config.rms_norm_eps)
        x = scaled(x, 1 / self.config.logits_divisor)
        head = self.embedding if self.config.tie_word_embeddings else self.lm_head
        return head.logits(x, comm)[:, : self.config.vocab_size]

    def hidden(
        self,
        kv: jax.Array,
        batch: ForwardBatch,
        comm: Comm,
        kernels: Kernels = XLA,
        cut: int = 0,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All layers of one step of one dp slice, before the final norm.

        Args:
            kv: [L, N, S, ...], this device's share of the slice's pool, see `kv_entry`.
            batch: its rows.
            comm: how this device meets the others.
            kernels: which implementation each operation has.
            cut: two-batch overlap: MoE layers compute the rows before this one and those from it
                on as two micro-batches, so that one's exchange can run beside the other's
                computing. 0: all rows together. The results are the same.

        Returns:
            hidden rows [T, D], the updated pool, and i32 [MoE layers, E]: tokens per expert.
        """
        rows = derive_rows(batch, kv.shape[2])
        cos, sin = rope_tables(self.config, rows.positions)
        x = self.embed(rows.tokens, comm)
        counts, first_layer = [jnp.zeros((0, self.config.num_experts), jnp.int32)], 0
        for segment in self.segments:
            x, kv, segment_counts = _run_segment(
                segment, first_layer, x, kv, batch, rows, cos, sin, comm, kernels, cut
            )
            first_layer += segment.num_layers
            if segment.kind == "moe":
                counts.append(segment_counts)
        return x, kv, jnp.concatenate(counts)

    def __call__(
        self,
        kv: jax.Array,
        batch: ForwardBatch,
        comm: Comm,
        logit_rows: jax.Array | None = None,
        kernels: Kernels = XLA,
        cut: int = 0,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`hidden` and the logits, f32 [R, V] in place of hidden rows.

        `logit_rows`, i32 [R], are the rows whose logits are wanted; default `sampled_rows(batch)`.
        """
        x, kv, counts = self.hidden(kv, batch, comm, kernels, cut)
        x = x[sampled_rows(batch) if logit_rows is None else logit_rows]
        return self.logits(x, comm), kv, counts


def _is_weight(value: Any) -> bool:
    return isinstance(value, jax.Array | BlockFP8)


def _run_segment(
    segment: Segment,
    first_layer: int,
    x: jax.Array,
    kv: jax.Array,
    batch: ForwardBatch,
    rows: Rows,
    cos: jax.Array,
    sin: jax.Array,
    comm: Comm,
    kernels: Kernels,
    cut: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the layers of a segment; also i32 [layers, E or 0], tokens per expert."""
    # A dense layer has no exchange that anything could overlap.
    parts = micro_batches(batch, cut if segment.kind == "moe" else 0)
    graph, stacked = nnx.split(segment.layers)
    eps, scale = segment.layers.config.rms_norm_eps, segment.layers.config.residual_scale
    attention = segment.layers.attention
    plans = [attention.plan(batch, rows, part, kv.shape[2], kernels) for part in parts]

    def one_layer(
        carry: tuple[tuple[jax.Array, ...], jax.Array], scanned: tuple[nnx.State, jax.Array]
    ) -> tuple[tuple[tuple[jax.Array, ...], jax.Array], jax.Array]:
        xs, kv = carry  # [n, D] of each micro-batch
        weights, index = scanned
        if in_stacks:
            weights = jax.tree.map(
                lambda stack: StackedWeight(stack=stack, layer=index), stacked, is_leaf=_is_weight
            )
        layer: DecoderLayer = nnx.merge(graph, weights)
        at = first_layer + index
        # All micro-batches are written before any attends: rows read what other rows of the step
        # write (a chunk that is cut, a prefix that two prompts share). And none is written before
        # all have attended in the layer before, or XLA would copy the pool.
        queries, entries, kv = layer.attention.project(
            [norm_rows(x, layer.attention_norm.get_value(), eps, kernels) for x in xs],
            *(parts, kv, at, rows, cos, sin, comm, kernels),
        )
        attended = []
        for x, q, part, plan in zip(xs, queries, parts, plans, strict=True):
            y = layer.attention.attend(q, entries, kv, at, batch, rows, part, plan, comm, kernels)
            attended.append(
                add_and_norm(x, y, layer.mlp_norm.get_value(), eps, kernels, scale=scale)
            )
        done, all_counts = [], []
        for (x, normed), part in zip(attended, parts, strict=True):
            if segment.kind == "dense":
                y, counts = comm.sum_heads(layer.mlp(normed, kernels)), jnp.zeros(0, jnp.int32)
            else:
                valid = rows.valid[part.rows]
                y, counts = layer.moe(normed, valid, segment.experts, index, comm, kernels)
            done.append(x + scaled(y, scale))
            all_counts.append(counts)
        return (tuple(done), kv), functools.reduce(operator.add, all_counts)

    # Kernels take a layer out of the stack themselves; what is scanned gets copied.
    in_stacks = kernels.dense != "xla"
    scanned = nnx.State({}) if in_stacks else stacked
    indices = jnp.arange(segment.num_layers, dtype=jnp.int32)
    carry = (tuple(x[part.rows] for part in parts), kv)
    if kernels.unroll < segment.num_layers:
        carry, counts = jax.lax.scan(one_layer, carry, (scanned, indices), unroll=kernels.unroll)
    else:
        all_counts = []
        for i in range(segment.num_layers):
            of_layer = jax.tree.map(operator.itemgetter(i), (scanned, indices))
            carry, of_one = one_layer(carry, of_layer)
            all_counts.append(of_one)
        counts = jnp.stack(all_counts)
    xs, kv = carry
    return jnp.concatenate(xs), kv, counts
