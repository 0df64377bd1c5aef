"""What the sampler remembers of each request slot, on the device, and how a slot is set up.

Only requests whose sampling `needs_setup` have such a memory. Set-up writes everything a slot
remembers, so nothing is left of the request before; the other rows read a slot that is never
written. Per dp slice, and on each of its devices, the state takes (slots + 1) * (4 * V + 8 *
MAX_LOGIT_BIAS + 4) bytes: 106 MB at V = 102400 and 256 slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from serving.engine.sampler import IN_PROMPT, IS_STOP, ONE_IN_ANSWER, History
from serving.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from serving.scheduler.plan import PrefillChunk

PIECE_TOKENS = 1024
"""Tokens of a context that one launch of the set-up program counts."""

_SLOT, _RESET, _PROMPT, _ANSWER, _STOPS_FROM, _NUM_BIAS, _NUM_STOPS = range(7)
_TOKENS = 7
_BIAS_IDS = _TOKENS + PIECE_TOKENS
_BIAS_VALUES = _BIAS_IDS + MAX_LOGIT_BIAS
_STOPS = _BIAS_VALUES + MAX_LOGIT_BIAS
SETUP_WIDTH = _STOPS + MAX_STOP_TOKEN_IDS
"""int32 numbers of a slice's set-up row: seven numbers, then tokens, biases and stop ids."""


class SamplingState(NamedTuple):
    """The memory of a slice's slots; the last slot stands for "none" and stays zero.

    Attributes:
        counts: i32 [slots + 1, V], see `History`.
        bias_ids: i32 [slots + 1, MAX_LOGIT_BIAS]; bias_values: f32, alike.
        stops_from: i32 [slots + 1].
    """

    counts: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    stops_from: jax.Array

    def history(self, slots: jax.Array) -> History:
        """The memory of the slots of R rows, i32 [R]."""
        return History(*(field[slots] for field in self))


def abstract_state(num_slots: int, vocab: int) -> SamplingState:
    """Shapes and dtypes of one slice's state."""
    rows = num_slots + 1

    def array(width: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *width), dtype)

    return SamplingState(
        counts=array((vocab,), jnp.int32),
        bias_ids=array((MAX_LOGIT_BIAS,), jnp.int32),
        bias_values=array((MAX_LOGIT_BIAS,), jnp.float32),
        stops_from=array((), jnp.int32),
    )


def count_tokens(counts: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
    """Counts after each of R slots got its token, i32 [R] both; the slot "none" gets nothing."""
    added = jnp.where(slots < counts.shape[0] - 1, ONE_IN_ANSWER, 0)
    return counts.at[slots, tokens].add(added)


def set_up(state: SamplingState, row: jax.Array) -> SamplingState:
    """The state after one piece of one request's context, i32 [SETUP_WIDTH] (see `pieces`)."""
    vocab, slot = state.counts.shape[1], row[_SLOT]

    def part(first: int, size: int, used: jax.Array, skipped: int | jax.Array = 0) -> jax.Array:
        """Token ids; those that are unused stand beyond the vocabulary, where writes are lost."""
        at = jnp.arange(size)
        ids = lax.slice_in_dim(row, first, first + size)
        return jnp.where((at >= skipped) & (at < used), ids, vocab)

    def marks(ids: jax.Array) -> jax.Array:
        return jnp.zeros(vocab, bool).at[ids].set(True, mode="drop")

    num_prompt, end = row[_PROMPT], row[_PROMPT] + row[_ANSWER]
    counts = jnp.where(row[_RESET] > 0, 0, state.counts[slot])
    counts |= jnp.where(marks(part(_TOKENS, PIECE_TOKENS, num_prompt)), IN_PROMPT, 0)
    counts |= jnp.where(marks(part(_STOPS, MAX_STOP_TOKEN_IDS, row[_NUM_STOPS])), IS_STOP, 0)
    answer = part(_TOKENS, PIECE_TOKENS, end, num_prompt)
    counts = counts.at[answer].add(ONE_IN_ANSWER, mode="drop")
    used = jnp.arange(MAX_LOGIT_BIAS) < row[_NUM_BIAS]
    ids = lax.slice_in_dim(row, _BIAS_IDS, _BIAS_VALUES)
    values = lax.bitcast_convert_type(lax.slice_in_dim(row, _BIAS_VALUES, _STOPS), jnp.float32)
    return SamplingState(
        counts=state.counts.at[slot].set(counts),
        bias_ids=state.bias_ids.at[slot].set(jnp.where(used, ids, 0)),
        bias_values=state.bias_values.at[slot].set(jnp.where(used, values, 0.0)),
        stops_from=state.stops_from.at[slot].set(row[_STOPS_FROM]),
    )


def no_piece(num_slots: int) -> np.ndarray:
    """The row of a slice that sets nothing up: it resets the slot "none" to what it is."""
    row = np.zeros(SETUP_WIDTH, np.int32)
    row[_SLOT], row[_RESET] = num_slots, 1
    return row


def pieces(chunk: PrefillChunk) -> Iterator[np.ndarray]:
    """The rows that set up a chunk's slot one after another, i32 [SETUP_WIDTH] each.

    Raises:
        ValueError: the chunk does not say what its context is made of (a scheduler bug), or there
            are more biases or stop tokens than a slot holds.
    """
    params = chunk.sampling
    if chunk.prompt is None:
        raise ValueError(f"Request {chunk.rid} needs its sampling set up: prompt is missing.")
    if len(params.logit_bias) > MAX_LOGIT_BIAS or len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise ValueError(
            f"A request can bias {MAX_LOGIT_BIAS} tokens and stop at {MAX_STOP_TOKEN_IDS}; "
            f"{chunk.rid} has {len(params.logit_bias)} and {len(params.stop_token_ids)}."
        )
    penalised = (
        params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    )
    tokens = np.array(chunk.prompt + chunk.answer if penalised else (), np.int32)
    num_prompt = len(chunk.prompt) if penalised else 0
    base = np.zeros(SETUP_WIDTH, np.int32)
    base[_SLOT] = chunk.slot
    base[_STOPS_FROM] = len(chunk.prompt) + params.min_tokens
    base[_NUM_BIAS], base[_NUM_STOPS] = len(params.logit_bias), len(params.stop_token_ids)
    for at, (token, value) in enumerate(params.logit_bias):
        base[_BIAS_IDS + at] = token
        base[_BIAS_VALUES + at] = np.float32(value).view(np.int32)
    base[_STOPS : _STOPS + len(params.stop_token_ids)] = params.stop_token_ids
    for first in range(0, max(1, len(tokens)), PIECE_TOKENS):
        row, piece = base.copy(), tokens[first : first + PIECE_TOKENS]
        row[_RESET] = first == 0
        row[_PROMPT] = max(0, min(num_prompt - first, len(piece)))
        row[_ANSWER] = len(piece) - row[_PROMPT]
        row[_TOKENS : _TOKENS + len(piece)] = piece
        yield row
