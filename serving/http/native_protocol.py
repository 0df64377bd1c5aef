"""The bodies of SGLang's own routes as typed structs: /generate, /tokenize, /detokenize.

As in `protocol`, only types are checked here, null means the default, and unknown fields are
ignored, but for those of `sampling_params`, where a wrong name is an error as in SGLang.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from serving.http.protocol import Begun, Message, Tool

LogprobEntry = tuple[float | None, int, str | None]
"""Log probability (the first token of a prompt has none), token id, text where it is wanted."""


class SamplingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params` of /generate."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    n: int | None = None
    sampling_seed: int | None = None
    seed: int | None = None
    json_schema: Any = None
    regex: str | None = None
    ebnf: str | None = None

    stop_regex: str | list[str] | None = None
    structural_tag: Any = None
    custom_params: Any = None
    stream_interval: int | None = None


class GenerateBody(msgspec.Struct, kw_only=True):
    """POST /generate. What is a value or a list may be told for each prompt."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: SamplingBody | list[SamplingBody] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None
    priority: int | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    continue_from: list[Begun] | None = None

    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    token_ids_logprob: Any = None
    lora_path: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None
    disagg_prefill_dp_rank: int | None = None
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    return_hidden_states: bool | None = None
    return_routed_experts: bool | None = None


NATIVE_NOT_SERVED_YET: dict[str, tuple[Any, ...]] = {
    "input_embeds": (),
    "image_data": ([],),
    "video_data": ([],),
    "audio_data": ([],),
    "token_ids_logprob": (),
    "lora_path": (),
    "session_params": (),
    "custom_logit_processor": (),
    "disagg_prefill_dp_rank": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
}
"""Fields of /generate that are refused, each with the values (besides null) that are accepted."""

SAMPLING_NOT_SERVED_YET: dict[str, tuple[Any, ...]] = {
    "stop_regex": ([],),
    "structural_tag": (),
    "custom_params": (),
    "stream_interval": (1,),
}
"""The same of its `sampling_params`."""


class NativeFinish(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why an answer ended. `matched` comes with "stop", `length` with "length"."""

    type: str
    matched: str | int | UnsetType | None = UNSET
    length: int | UnsetType = UNSET
    message: str | UnsetType = UNSET


class MetaInfo(msgspec.Struct, kw_only=True):
    """What is told of an answer beside its text; log probabilities where they were asked for."""

    id: str
    finish_reason: NativeFinish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str
    dp_rank: int | None
    e2e_latency: float | UnsetType = UNSET
    input_token_logprobs: list[LogprobEntry] | UnsetType = UNSET
    output_token_logprobs: list[LogprobEntry] | UnsetType = UNSET
    input_top_logprobs: list[list[LogprobEntry] | None] | UnsetType = UNSET
    output_top_logprobs: list[list[LogprobEntry]] | UnsetType = UNSET


class Generated(msgspec.Struct, kw_only=True):
    """An answer of /generate; in a stream, all of it so far, numbered if there are several."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | UnsetType = UNSET


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize: a text, several, or a conversation as in /v1/chat/completions."""

    prompt: str | list[str] | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    model: str | None = None


class Tokenized(msgspec.Struct, kw_only=True):
    """The answer of /tokenize: lists of lists where several texts were given."""

    tokens: Sequence[int | list[int]]
    count: int | list[int]
    max_model_len: int


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int | list[int]] | None = None
    model: str | None = None
    skip_special_tokens: bool | None = None


class Detokenized(msgspec.Struct, kw_only=True):
    """The answer of /detokenize: a list where several lists of tokens were given."""

    text: str | list[str]
