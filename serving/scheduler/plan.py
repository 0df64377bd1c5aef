"""The decision of one step, before any padding: which rows each dp slice computes.

A plan is immutable and holds no device data. The engine turns it into arrays; the scheduler gets
it back together with the sampled tokens. Rows are named tuples: hundreds are made in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from serving.request import SamplingParams

TopLogprobs = tuple[tuple[int, float], ...]
"""(token id, log probability), best first."""


class DecodeRow(NamedTuple):
    """One running request's next token.

    The token fed is the last one sampled for `slot` (it is still on the device); its KV entry is
    written at `position`, and the token at `position + 1` is sampled.
    """

    rid: str
    slot: int
    position: int
    pages: tuple[int, ...]
    sampling: SamplingParams


class PrefillChunk(NamedTuple):
    """A piece of a context: `tokens` stand at positions `start`, `start + 1`, ...

    KV entries of all earlier positions are in `pages` already, or are written by this very step:
    every layer writes the entries of all rows before any row attends. When `samples` is set the
    chunk is the context's last and the token after it is sampled; else nothing is.

    `prompt` and `answer`, the context cut in two, are set in the last chunk of a request whose
    sampling needs setting up (`SamplingParams.needs_setup`). `targets` are the tokens after each
    of `tokens` (one less in the context's last chunk) where prompt log probabilities are wanted,
    and `num_alternatives` says how many most likely tokens to report beside each.
    """

    rid: str
    slot: int
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    samples: bool
    sampling: SamplingParams
    prompt: tuple[int, ...] | None = None
    answer: tuple[int, ...] = ()
    targets: tuple[int, ...] | None = None
    num_alternatives: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePlan:
    """The rows of one dp slice. Both empty: the slice is idle in this step."""

    decode: tuple[DecodeRow, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()

    @property
    def mode(self) -> str:
        if self.prefill:
            return "both" if self.decode else "prefill"
        return "decode" if self.decode else "idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step of all slices, in rank order."""

    slices: tuple[SlicePlan, ...]

    @property
    def is_extend(self) -> bool:
        """Whether any slice prefills (the step then runs an extend program)."""
        return any(s.prefill for s in self.slices)


class SampledToken(NamedTuple):
    """What the sampler returned for one row."""

    token_id: int
    logprob: float
    top_logprobs: TopLogprobs | None = None


class TokenScore(NamedTuple):
    """The log probability of a prompt token after those before it, and the likeliest instead."""

    token_id: int
    logprob: float
    top_logprobs: TopLogprobs = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step computed.

    Attributes:
        tokens: for each slice an entry per row of its plan, decode rows first, then chunks: the
            row's token, or None where a chunk samples nothing.
        scores: by rid, for each chunk with `targets` one score per target.
    """

    tokens: list[list[SampledToken | None]]
    scores: dict[str, list[TokenScore]]
