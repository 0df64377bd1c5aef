"""What a request is, for every process: prompt token ids, sampling parameters, finish reasons.

Plain frozen dataclasses, so that the front, the scheduler and the engine share them without
importing each other's libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
GrammarKind = Literal["json_schema", "regex", "ebnf"]

MAX_TOP_LOGPROBS = 20
"""The most alternatives per token that a request may ask for: the sampler is that wide."""
MAX_LOGIT_BIAS = 512
"""The most tokens that one request may bias: each slot of the sampler has room for so many."""
MAX_STOP_TOKEN_IDS = 128
"""The most stop token ids of one request, end-of-sequence ids included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """Free text in front of what a grammar governs, up to a marker.

    Attributes:
        start: the marker in front of it; end: the one behind. A marker that is a special token is
            given by its id, any other by its text.
        opened: the prompt has the first marker already.
        always: the answer begins with thinking, with or without the first marker.
    """

    start: str | int
    end: str | int
    opened: bool = False
    always: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer must look like. `text` is a JSON schema, a regular expression, or a grammar.

    An "ebnf" grammar is either in GBNF or in llguidance's Lark dialect. `thinking` may stand in
    front of what a schema or an expression describes.
    """

    kind: GrammarKind
    text: str
    thinking: Thinking | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the answer of one request is drawn.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 (anything below 1e-6) is greedy.
        top_k: keep the k most likely tokens; -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the likeliest, in [0, 1].
        seed: 32-bit seed. A request's draws depend on its seed and the absolute position only.
        repetition_penalty: positive logits of tokens in prompt or answer are divided by it,
            negative ones multiplied (arXiv:1909.05858); 1 changes nothing.
        presence_penalty: taken from the logit of every token in the answer.
        frequency_penalty: taken from it once for each time the token is in the answer.
        logit_bias: (token id, what is added to its logit), at most MAX_LOGIT_BIAS.
        min_tokens: stop_token_ids cannot be drawn before so many tokens are generated.
        stop_token_ids: generation ends when one is sampled (end-of-sequence ids included, unless
            the client asked to ignore them); the stop token itself is reported.
        logprobs: number of most likely alternatives to report beside the sampled token's own log
            probability, 0 to MAX_TOP_LOGPROBS; None reports nothing.
        grammar: what the answer must look like; None for anything.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6 or self.top_k == 1

    @property
    def needs_setup(self) -> bool:
        """Whether the sampler must know more than a row's numbers: tokens so far, biases, stops."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or (self.min_tokens and self.stop_token_ids)
        )

    @property
    def plain(self) -> bool:
        """Whether the best token and its log probability are all that is wanted."""
        return self.greedy and not self.logprobs and self.grammar is None and not self.needs_setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it. `rid` is unique among the live requests.

    Attributes:
        answer: tokens that another engine has generated for this prompt already. The request goes
            on behind them as if it had never stopped: max_tokens and min_tokens, penalties, the
            grammar and seeded draws count from the answer's beginning.
        priority: requests of higher priority start first and are retracted last.
        dp_rank: the slice that must run it; None leaves the choice to the scheduler.
        cache_key: prefixes are shared only between requests of equal key.
        prompt_logprobs: number of most likely alternatives to report for each prompt token beside
            its own log probability, 0 to MAX_TOP_LOGPROBS; None reports nothing. Such a request
            takes no prefix from the cache, because every position is computed.
    """

    rid: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    answer: tuple[int, ...] = ()
    priority: int = 0
    dp_rank: int | None = None
    cache_key: str = ""
    prompt_logprobs: int | None = None
