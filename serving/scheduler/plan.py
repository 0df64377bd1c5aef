"""The decision of one step, before any padding: which rows each dp slice computes.

A plan is immutable and holds no device data. The engine turns it into arrays; the scheduler gets
it back together with the sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRow:
    """One running request's next token.

    The token fed is the last one sampled for `slot` (it is still on the device); its KV entry is
    written at `position`, and the token at `position + 1` is sampled.
    """

    rid: str
    slot: int
    position: int
    pages: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """A piece of a prompt: `tokens` stand at positions `start`, `start + 1`, ...

    KV entries of all earlier positions are in `pages` already. When `samples` is set the chunk is
    the prompt's last and the token after it is sampled; else nothing is.
    """

    rid: str
    slot: int
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    samples: bool
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePlan:
    """The rows of one dp slice. Both empty: the slice is idle in this step."""

    decode: tuple[DecodeRow, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step of all slices, in rank order."""

    slices: tuple[SlicePlan, ...]

    @property
    def is_extend(self) -> bool:
        """Whether any slice prefills (the step then runs an extend program)."""
        return any(s.prefill for s in self.slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """What the sampler returned for one row."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] | None = None
