"""The whole-sequence forward pass without a cache: the definition, and what training uses.

Naive attention and every expert on every token, differentiable, on one device. It shares the
modules (norms, projections, router) with the serving path and none of its batching, paging or
grouping.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.comm import SingleDevice
from model.layers import rms_norm
from model.rope import rope_tables
from model.transformer import DecoderLayer, Transformer


def forward(model: Transformer, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits of whole sequences.

    Args:
        model: unpadded, on one device.
        tokens: i32 [batch, T]; positions are 0 .. T - 1, attention is causal.

    Returns:
        logits f32 [batch, T, V], and expert counts i32 [MoE layers, E] over all tokens.
    """
    config, comm = model.config, SingleDevice()
    batch, t = tokens.shape
    cos, sin = rope_tables(config, jnp.arange(t))
    x = model.embed(tokens.reshape(-1), comm).reshape(batch, t, -1)
    counts = []
    for segment in model.segments:
        graph, stacked = nnx.split(segment.layers)
        experts = nnx.split(segment.experts)[1] if segment.kind == "moe" else None

        @jax.checkpoint
        def one_layer(x, scanned, graph=graph, kind=segment.kind):  # noqa: ANN001, ANN202
            weights, experts = scanned
            layer: DecoderLayer = nnx.merge(graph, weights)
            normed = rms_norm(x, layer.attention_norm[...], config.rms_norm_eps)
            x = x + config.residual_scale * layer.attention.naive(normed, cos, sin)
            flat = rms_norm(x, layer.mlp_norm[...], config.rms_norm_eps).reshape(batch * t, -1)
            if kind == "dense":
                y, count = layer.mlp(flat), jnp.zeros(0, jnp.int32)
            else:
                y, count = _dense_moe(layer, experts["w1"][...], experts["w2"][...], flat)
            return x + config.residual_scale * y.reshape(x.shape), count

        x, segment_counts = jax.lax.scan(one_layer, x, (stacked, experts))
        if segment.kind == "moe":
            counts.append(segment_counts)
    logits = model.logits(x.reshape(batch * t, -1), comm).reshape(batch, t, -1)
    return logits, jnp.concatenate([jnp.zeros((0, config.num_experts), jnp.int32), *counts])


def _dense_moe(
    layer: DecoderLayer, w1: jax.Array, w2: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Every expert on every token, weighed by the router (0 for experts not chosen).

    w1 is [E, D, 2, F], w2 [E, F, D], x [T, D]. Returns [T, D] and counts i32 [E].
    """
    ids, weights = layer.moe.router(x)
    chosen = jax.nn.one_hot(ids, w1.shape[0], dtype=jnp.float32)  # [T, K, E]
    gate, up = jnp.moveaxis(jnp.einsum("td,edgf->tegf", x, w1), 2, 0)
    per_expert = (
        jax.nn.silu(gate)
        * up
        * jnp.einsum("tke,tk->te", chosen, weights)[..., None].astype(x.dtype)
    )
    y = jnp.einsum("tef,efd->td", per_expert, w2)
    if layer.config.num_shared_experts:
        y = y + layer.moe.shared(x)
    return y, chosen.sum(axis=(0, 1)).astype(jnp.int32)
