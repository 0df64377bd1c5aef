"""Tokens from logits: pure functions of (logits, parameters, seeds, positions, tokens so far).

A row's draw depends on its own seed and absolute position only, so a request's tokens do not change
with its batch mates, its slice, the bucket, or a retraction in between. The steps, in order: logit
bias, penalties, stop tokens that come too early, grammar mask (`adjust`); then temperature, top-k,
top-p, min-p and the draw (`sample`). Log probabilities are those of the model's own logits, before
any of this, because they say what the model thinks rather than how a client drew from it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from serving.request import MAX_TOP_LOGPROBS

IN_PROMPT = 1
IS_STOP = 2
ONE_IN_ANSWER = 4
"""The bits of a token's number in `History.counts`; the answer's count stands above them."""


class SamplingBatch(NamedTuple):
    """Parameters of R rows.

    Attributes:
        positions: i32 [R], absolute position of the token to draw.
        seeds: i32 [R] (the bits of a u32).
        temperatures: f32 [R], 0 for greedy.
        top_ks: i32 [R], -1 for all; top_ps: f32 [R]; min_ps: f32 [R].
        repetition, presence, frequency: f32 [R], the penalties; they count only where `History`
            has seen something.
    """

    positions: jax.Array
    seeds: jax.Array
    temperatures: jax.Array
    top_ks: jax.Array
    top_ps: jax.Array
    min_ps: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array


class History(NamedTuple):
    """What R rows know of their requests beyond numbers; all zeros changes nothing.

    Attributes:
        counts: i32 [R, V]: IN_PROMPT | IS_STOP | ONE_IN_ANSWER * (times in the answer).
        bias_ids: i32 [R, n]; bias_values: f32 [R, n], 0 where unused.
        stops_from: i32 [R], the first position at which a stop token may be drawn.
    """

    counts: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    stops_from: jax.Array


def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32 [R, V] -> the best tokens, i32 [R], and their log probabilities, f32 [R]."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return tokens, logits.max(axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def adjust(
    logits: jax.Array, batch: SamplingBatch, history: History, masks: jax.Array
) -> jax.Array:
    """Logits with bias, penalties, and -inf for what must not be drawn, f32 [R, V].

    Args:
        logits: f32 [R, V].
        masks: i32 [R, ceil(V / 32)]: bit b of word w is set if token 32 * w + b may be drawn.
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = logits.at[rows, history.bias_ids].add(history.bias_values)
    in_answer = history.counts // ONE_IN_ANSWER  # [R, V]
    seen = ((history.counts & IN_PROMPT) > 0) | (in_answer > 0)
    factor = batch.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(seen, repeated, logits)
    penalties = batch.frequency[:, None] * in_answer + batch.presence[:, None]
    logits = jnp.where(in_answer > 0, logits - penalties, logits)
    early = (batch.positions < history.stops_from)[:, None]
    banned = early & ((history.counts & IS_STOP) > 0)
    return jnp.where(banned | ~allowed(masks, logits.shape[1]), -jnp.inf, logits)


def allowed(masks: jax.Array, vocab: int) -> jax.Array:
    """i32 [R, ceil(V / 32)] bits -> bool [R, V]."""
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    return bits.reshape(masks.shape[0], -1)[:, :vocab] != 0


def sample(logits: jax.Array, batch: SamplingBatch) -> jax.Array:
    """Draw with temperature, top-k, top-p, min-p; rows of temperature 0 take the best token.

    Args:
        logits: f32 [R, V], adjusted.

    Returns:
        i32 [R] tokens.
    """
    drawn_greedily = batch.temperatures <= 0
    scaled = logits / jnp.where(drawn_greedily, 1.0, batch.temperatures)[:, None]
    kept = jnp.where(scaled >= _threshold(scaled, batch)[:, None], scaled, -jnp.inf)
    # XLA would draw the noise again in every pass over it, and takes thrice as long to compile.
    noise = jax.lax.optimization_barrier(_gumbel(batch, logits.shape[1]))
    drawn = jnp.argmax(kept + noise, axis=-1)
    return jnp.where(drawn_greedily, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


def logprobs_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log probabilities f32 [R] of i32 [R] tokens under f32 [R, V] logits."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def top_logprobs(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most likely tokens, i32 [R, n], and their log probabilities, f32 [R, n].

    n is MAX_TOP_LOGPROBS, or the vocabulary if that is smaller.
    """
    best, ids = jax.lax.top_k(logits, min(MAX_TOP_LOGPROBS, logits.shape[1]))
    return ids, best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _threshold(scaled: jax.Array, batch: SamplingBatch) -> jax.Array:
    """The smallest scaled logit that top-k, top-p and min-p keep, f32 [R]."""
    vocab = scaled.shape[1]
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    k = jnp.where(batch.top_ks > 0, jnp.minimum(batch.top_ks, vocab), vocab)
    rank = jnp.arange(vocab)[None]
    p = jax.nn.softmax(jnp.where(rank < k[:, None], ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # probability of everything more likely
    # A float32 running sum may reach 1 early: top_p = 1 keeps all without asking it.
    within = (before < batch.top_ps[:, None]) | (rank == 0) | (batch.top_ps >= 1)[:, None]
    kept = (rank < k[:, None]) & within
    last = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1)
    return jnp.maximum(last, ordered[:, 0] + jnp.log(batch.min_ps))


def _gumbel(batch: SamplingBatch, vocab: int) -> jax.Array:
    """Noise of each row from its seed and position, f32 [R, V] (the Gumbel-max trick)."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed.astype(jnp.uint32)), position)
        return jax.random.gumbel(key, (vocab,))

    return jax.vmap(row)(batch.seeds, batch.positions)
