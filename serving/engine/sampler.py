"""Tokens from logits: pure functions of (logits, parameters, seeds, positions).

A row's draw depends on its own seed and absolute position only, so a request's tokens do not change
with its batch mates, its slice, the bucket, or a retraction in between.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from serving.request import MAX_TOP_LOGPROBS


class SamplingBatch(NamedTuple):
    """Parameters of R rows.

    Attributes:
        positions: i32 [R], absolute position of the token to draw.
        seeds: i32 [R] (the bits of a u32).
        temperatures: f32 [R], 0 for greedy.
        top_ks: i32 [R], -1 for all; top_ps: f32 [R].
    """

    positions: jax.Array
    seeds: jax.Array
    temperatures: jax.Array
    top_ks: jax.Array
    top_ps: jax.Array


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32 [R, V] -> the best tokens, i32 [R], and their log probabilities, f32 [R]."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, logits.max(axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def sample(logits: jax.Array, batch: SamplingBatch) -> tuple[jax.Array, jax.Array]:
    """Draw with temperature, then top-k, then top-p (rows of temperature 0 are greedy).

    Args:
        logits: f32 [R, V].

    Returns:
        i32 [R] tokens, and f32 [R] their log probabilities under the model (before temperature).
    """
    best, _ = greedy(logits)
    drawn_greedily = batch.temperatures <= 0
    scaled = logits / jnp.where(drawn_greedily, 1.0, batch.temperatures)[:, None]
    kept = jnp.where(scaled >= _threshold(scaled, batch)[:, None], scaled, -jnp.inf)
    drawn = jnp.argmax(kept + _gumbel(batch, logits.shape[1]), axis=-1)
    tokens = jnp.where(drawn_greedily, best, drawn).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def top_logprobs(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most likely tokens, i32 [R, n], and their log probabilities, f32 [R, n].

    n is MAX_TOP_LOGPROBS, or the vocabulary if that is smaller.
    """
    best, ids = jax.lax.top_k(logits, min(MAX_TOP_LOGPROBS, logits.shape[1]))
    return ids, best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _threshold(scaled: jax.Array, batch: SamplingBatch) -> jax.Array:
    """The smallest scaled logit that top-k and top-p keep, f32 [R]."""
    vocab = scaled.shape[1]
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    k = jnp.where(batch.top_ks > 0, jnp.minimum(batch.top_ks, vocab), vocab)
    rank = jnp.arange(vocab)[None]
    p = jax.nn.softmax(jnp.where(rank < k[:, None], ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # probability of everything more likely
    # A float32 running sum may reach 1 early: top_p = 1 keeps all without asking it.
    within = (before < batch.top_ps[:, None]) | (rank == 0) | (batch.top_ps >= 1)[:, None]
    kept = (rank < k[:, None]) & within
    return jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1)


def _gumbel(batch: SamplingBatch, vocab: int) -> jax.Array:
    """Noise of each row from its seed and position, f32 [R, V] (the Gumbel-max trick)."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed.astype(jnp.uint32)), position)
        return jax.random.gumbel(key, (vocab,))

    return jax.vmap(row)(batch.seeds, batch.positions)
