"""From a request's fields to `SamplingParams` and stop strings: defaults, ranges, limits.

Everything is checked here, in the front, so that the engine never sees a request it cannot serve.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import msgspec

from serving.http.errors import ApiError
from serving.http.protocol import CompletionBody, GenerationBody
from serving.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, Grammar, SamplingParams
from serving.tokenizer import Tokenizer, TokenizerError, read_json

T = TypeVar("T")

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_SAMPLES = 128
"""The most answers to one prompt."""
MAX_LOGIT_BIAS_VALUE = 100
SEED_BITS = 31
"""Seeds travel as non-negative 32-bit integers, signed or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What the model's makers recommend where they say so, else the API's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_folder(cls, model_path: str | Path) -> SamplingDefaults:
        """Read generation_config.json. `do_sample: false` alone does not make greedy the default.

        Raises:
            TokenizerError: the file is broken, or a value is out of range.
        """
        path = Path(model_path) / "generation_config.json"
        config = read_json(path)
        given = {
            name: config[name]
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if config.get(name) is not None
        }
        if given.get("top_k") == 0:  # Hugging Face's spelling of "all"
            given["top_k"] = -1
        try:
            check_ranges(msgspec.convert(given, GenerationBody))
        except (ApiError, msgspec.ValidationError) as error:
            raise TokenizerError(f"{path} is wrong: {error}") from None
        return cls(**given)


def check_ranges(body: GenerationBody) -> None:
    """Raises ApiError naming the first number that is out of its range."""
    temperature, top_p, top_k, min_p = body.temperature, body.top_p, body.top_k, body.min_p
    if temperature is not None and not (temperature >= 0 and math.isfinite(temperature)):
        raise _out_of_range("temperature", "a non-negative finite number", temperature)
    if top_p is not None and not 0 < top_p <= 1:
        raise _out_of_range("top_p", "in (0, 1]", top_p)
    if top_k is not None and top_k != -1 and top_k < 1:
        raise _out_of_range("top_k", "-1 (disable) or at least 1", top_k)
    if min_p is not None and not 0 <= min_p <= 1:
        raise _out_of_range("min_p", "in [0, 1]", min_p)
    for name in ("frequency_penalty", "presence_penalty"):
        penalty = getattr(body, name)
        if penalty is not None and not -2 <= penalty <= 2:
            raise _out_of_range(name, "in [-2, 2]", penalty)
    if body.repetition_penalty is not None and not 0 < body.repetition_penalty <= 2:
        raise _out_of_range(
            "repetition_penalty", "in (0, 2] (1.0 = no penalty)", body.repetition_penalty
        )


def sampling_params(
    body: GenerationBody,
    *,
    defaults: SamplingDefaults,
    tokenizer: Tokenizer,
    max_tokens: int,
    logprobs: int | None,
    seeds: random.Random,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """The sampling parameters of one prompt; the ranges have been checked.

    Raises:
        ApiError: a stop token id or a biased token is not in the vocabulary, there are too many
            of them, or min_tokens is above max_tokens.
    """
    min_tokens = body.min_tokens or 0
    if not 0 <= min_tokens <= max_tokens:
        raise ApiError(
            f"min_new_tokens must be in [0, max_new_tokens({max_tokens})], got {min_tokens}.",
            param="min_tokens",
        )
    top_k = _either(body.top_k, defaults.top_k)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_either(body.temperature, defaults.temperature),
        top_k=-1 if top_k >= tokenizer.vocab_size else top_k,
        top_p=_either(body.top_p, defaults.top_p),
        min_p=_either(body.min_p, defaults.min_p),
        seed=seeds.getrandbits(SEED_BITS) if body.seed is None else body.seed % (1 << SEED_BITS),
        repetition_penalty=_either(body.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size=tokenizer.vocab_size),
        min_tokens=min_tokens,
        stop_token_ids=_stop_token_ids(body, tokenizer),
        logprobs=logprobs,
        grammar=grammar,
    )


def samples(first: SamplingParams, num: int) -> tuple[SamplingParams, ...]:
    """The parameters of `num` answers to one prompt, which differ in their seeds only.

    Answer 0 keeps the seed, so that it does not depend on how many others there are; the others'
    seeds are functions of it and of their index.
    """
    rest = (replace(first, seed=_derived_seed(first.seed, i)) for i in range(1, num))
    return (first, *rest)


def num_samples(body: GenerationBody) -> int:
    """How many answers each prompt gets.

    Raises:
        ApiError: `n` is out of range, or `best_of` asks for a choice among more.
    """
    num = 1 if body.n is None else body.n
    if not 1 <= num <= MAX_SAMPLES:
        raise _out_of_range("n", f"in [1, {MAX_SAMPLES}]", num)
    if isinstance(body, CompletionBody) and body.best_of not in (None, num):
        raise ApiError(
            f"best_of must be equal to n ({num}), got {body.best_of}: answers are not ranked, all "
            "of them are returned.",
            param="best_of",
        )
    return num


def _derived_seed(seed: int, index: int) -> int:
    digest = blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % (1 << SEED_BITS)


def _logit_bias(given: Mapping[str, float], *, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """(token id, bias), ascending, those that change something."""
    if len(given) > MAX_LOGIT_BIAS:
        raise ApiError(
            f"logit_bias may hold {MAX_LOGIT_BIAS} tokens, got {len(given)}.", param="logit_bias"
        )
    biases = []
    for key, bias in given.items():
        # Only the canonical spelling, or two keys could mean one token.
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
        if not 0 <= token_id < vocab_size or str(token_id) != key:
            raise ApiError(
                f"logit_bias must has keys in [0, {vocab_size - 1}], got {key[:64]}.",
                param="logit_bias",
            )
        if not abs(bias) <= MAX_LOGIT_BIAS_VALUE:
            raise ApiError(
                f"logit_bias must have values in [-{MAX_LOGIT_BIAS_VALUE}, "
                f"{MAX_LOGIT_BIAS_VALUE}], got {bias} for token {key}.",
                param="logit_bias",
            )
        if bias:
            biases.append((token_id, bias))
    return tuple(sorted(biases))


def _stop_token_ids(body: GenerationBody, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer, ascending."""
    for stop_id in body.stop_token_ids or ():
        if not 0 <= stop_id < tokenizer.vocab_size:
            raise _out_of_range("stop_token_ids", f"in [0, {tokenizer.vocab_size - 1}]", stop_id)
    eos_ids = () if body.ignore_eos else tokenizer.eos_token_ids
    ids = {*eos_ids, *(body.stop_token_ids or ())}
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise ApiError(
            f"stop_token_ids may hold {MAX_STOP_TOKEN_IDS} ids, end-of-sequence ids included, got "
            f"{len(ids)}.",
            param="stop_token_ids",
        )
    return tuple(sorted(ids))


def stop_strings(body: GenerationBody) -> tuple[str, ...]:
    """The request's stop strings.

    Raises:
        ApiError: too many, too long, or an empty one.
    """
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOP_STRINGS:
        raise ApiError(f"stop may hold {MAX_STOP_STRINGS} strings, got {len(stops)}.", param="stop")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise ApiError(
                f"stop strings must have 1 to {MAX_STOP_LENGTH} characters, got one of "
                f"{len(stop)}.",
                param="stop",
            )
    return tuple(stops)


def check_prompt(prompt: Sequence[int], *, vocab_size: int, context: int, param: str) -> None:
    """Raises ApiError if the prompt is empty, names unknown tokens or leaves no room to answer."""
    if not prompt:
        raise ApiError("Prompt cannot be empty", param=param)
    if min(prompt) < 0:
        raise ApiError(
            f"{param}: token ids must be at least 0, got {min(prompt)}.",
            param=param,
        )
    if max(prompt) >= vocab_size:
        raise ApiError(
            f"The input_ids {[max(prompt)]} contains values greater than the vocab size "
            f"({vocab_size}).",
            param=param,
        )
    if len(prompt) >= context:
        raise ApiError(
            f"The input ({len(prompt)} tokens) is longer than the model's context length "
            f"({context} tokens).",
            param=param,
        )


def check_max_tokens(max_tokens: int, *, num_prompt: int, context: int, param: str) -> None:
    """Raises ApiError unless prompt and answer fit into the context."""
    if max_tokens < 1:
        raise ApiError(f"{param} must be positive, got {max_tokens}.", param=param)
    if max_tokens > context and param == "max_completion_tokens":
        raise ApiError(
            f"max_completion_tokens is too large: {max_tokens}."
            f"This model supports at most {context} completion tokens.",
            param=param,
        )
    if num_prompt + max_tokens > context:
        raise ApiError(
            f"Requested token count exceeds the model's maximum context length of {context} "
            f"tokens. You requested a total of {num_prompt + max_tokens} tokens: {num_prompt} "
            f"tokens from the input messages and {max_tokens} tokens for the completion. Please "
            "reduce the number of tokens in the input messages or the completion to fit within "
            "the limit.",
            param=param,
        )


def _either(given: T | None, default: T) -> T:
    return default if given is None else given


def _out_of_range(name: str, wanted: str, got: object) -> ApiError:
    return ApiError(f"{name} must be {wanted}, got {got}.", param=name)
