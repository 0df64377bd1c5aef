"""What a request is, for every process: prompt token ids, sampling parameters, finish reasons.

Plain frozen dataclasses, so that the front, the scheduler and the engine share them without
importing each other's libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_TOP_LOGPROBS = 20
"""The most alternatives per token that a request may ask for: the sampler is that wide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the answer of one request is drawn.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 (anything below 1e-6) is greedy.
        top_k: keep the k most likely tokens; -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        seed: 32-bit seed. A request's draws depend on its seed and the absolute position only.
        stop_token_ids: generation ends when one is sampled (end-of-sequence ids included, unless
            the client asked to ignore them); the stop token itself is reported.
        logprobs: number of most likely alternatives to report beside the sampled token's own log
            probability, 0 to MAX_TOP_LOGPROBS; None reports nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6 or self.top_k == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it. `rid` is unique among the live requests."""

    rid: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
