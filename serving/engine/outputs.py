"""Tokens and scores on their way from the device: packed there into int32 columns, read here.

One array per program means one download. Columns are the token, the bits of its log probability,
then the ids of the n likeliest tokens and the bits of theirs; greedy programs leave the n out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from serving.scheduler.plan import (
    DecodeRow,
    PrefillChunk,
    SampledToken,
    StepPlan,
    TokenScore,
    TopLogprobs,
)


def pack_tokens(tokens: jax.Array, logprobs: jax.Array, *top: jax.Array) -> jax.Array:
    """i32 [R], f32 [R], and perhaps i32 [R, n] and f32 [R, n] -> i32 [R, 2 or 2 + 2n]."""

    def bits(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, jnp.int32)

    columns = [tokens[:, None], bits(logprobs)[:, None]]
    if top:
        columns += [top[0], bits(top[1])]
    return jnp.concatenate(columns, axis=-1)


def read_tokens(
    plan: StepPlan, packed: np.ndarray, decode_rows: int
) -> list[list[SampledToken | None]]:
    """`StepResult.tokens` from what the sampling program packed, i32 [D, R, columns].

    `decode_rows` is the row of a slice's first chunk.
    """
    token_ids, logprobs = packed[..., 0].tolist(), _floats(packed[..., 1])
    results: list[list[SampledToken | None]] = []
    for s, rows in enumerate(plan.slices):
        tokens: list[SampledToken | None] = list(
            map(SampledToken, token_ids[s][: len(rows.decode)], logprobs[s])
        )
        for i, row in enumerate(rows.decode):
            if row.sampling.logprobs is not None:
                tokens[i] = _with_top(row, packed[s, i])
        for i, chunk in enumerate(rows.prefill, decode_rows):
            tokens.append(_with_top(chunk, packed[s, i]) if chunk.samples else None)
        results.append(tokens)
    return results


def no_tokens(plan: StepPlan) -> list[list[SampledToken | None]]:
    """`StepResult.tokens` of a plan that samples nothing."""
    return [[None] * len(rows.prefill) for rows in plan.slices]


def read_scores(
    targets: Sequence[int], packed: np.ndarray, num_alternatives: int
) -> list[TokenScore]:
    """Scores of one chunk's targets, from the scoring program's rows i32 [n, columns]."""
    return [
        TokenScore(target, logprob, top)
        for target, logprob, top in zip(
            targets, _floats(packed[:, 1]), _tops(packed, num_alternatives), strict=True
        )
    ]


def _with_top(row: DecodeRow | PrefillChunk, packed: np.ndarray) -> SampledToken:
    wanted = row.sampling.logprobs
    top = None if wanted is None else _tops(packed[None], wanted)[0]
    return SampledToken(int(packed[0]), _floats(packed[1:2])[0], top)


def _tops(packed: np.ndarray, wanted: int) -> list[TopLogprobs]:
    """The `wanted` likeliest tokens of rows i32 [n, columns]."""
    width = (packed.shape[1] - 2) // 2
    wanted = min(wanted, width)
    ids = packed[:, 2 : 2 + wanted].tolist()
    values = _floats(packed[:, 2 + width : 2 + width + wanted])
    return [tuple(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]


def _floats(bits: np.ndarray) -> list[Any]:
    return np.ascontiguousarray(bits).view(np.float32).tolist()
