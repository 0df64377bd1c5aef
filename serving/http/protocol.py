"""The bodies of the OpenAI routes as typed structs: what clients send, what they get.

A field is in one of three states: honoured (declared without further mention), known but not
served yet (declared, and listed in `NOT_SERVED_YET` with the values that change nothing), or
unknown (ignored). Ranges are checked in `sampling`; here only types are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request

from serving.http.errors import ApiError, ErrorBody

Body = TypeVar("Body", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Begun(msgspec.Struct, kw_only=True):
    """How far an answer had come when its stream broke: all token ids of its chunks, joined."""

    token_ids: list[int]
    finished: bool = False


class GenerationBody(msgspec.Struct, kw_only=True):
    """What /v1/completions and /v1/chat/completions have in common. null means the default."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    rid: str | None = None
    user: str | None = None
    n: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None
    return_token_ids: bool | None = None
    continue_from: list[Begun] | None = None

    stop_regex: str | list[str] | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: Any = None
    response_format: Any = None
    lora_path: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None
    disagg_prefill_dp_rank: int | None = None
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    return_hidden_states: bool | None = None
    return_routed_experts: bool | None = None
    return_cached_tokens_details: bool | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]] | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None

    suffix: str | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    name: str
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(msgspec.Struct, kw_only=True):
    """A call that the assistant made in an earlier turn."""

    id: str | None = None
    type: str = "function"
    function: CalledFunction


class Message(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(msgspec.Struct, kw_only=True):
    name: str
    description: str | None = None
    parameters: Any = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    type: str = "function"
    function: Function


class NamedFunction(msgspec.Struct, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    """The function that the model must call."""

    type: str = "function"
    function: NamedFunction


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None

    tools: list[Tool] | None = None
    tool_choice: str | NamedTool | None = None
    reasoning_effort: str | None = None
    continue_final_message: bool | None = None
    input_ids: list[int] | None = None

    chat_template: Any = None


NOT_SERVED_YET: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "stop_regex": ([],),
    "lora_path": (),
    "session_params": (),
    "custom_logit_processor": (),
    "disagg_prefill_dp_rank": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_cached_tokens_details": (False,),
    "chat_template": (),
}
"""Known fields that are refused, each with the values (besides null) that are accepted."""


def refuse_not_served(body: GenerationBody) -> None:
    """Raises ApiError naming the first field that asks for what is not served yet."""
    refuse(body, NOT_SERVED_YET)


def refuse(body: msgspec.Struct, fields: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ApiError for the first of `fields` that is neither null nor one of its values."""
    for name, neutral in fields.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            hint = f" or set it to {msgspec.json.encode(neutral[0]).decode()}" if neutral else ""
            raise ApiError(f"{name} is not supported yet: leave it out{hint}.", param=name)


MAX_REREAD_BYTES = 256 << 10
"""Of a body in which integers are written with a point: reading it takes the front's time."""
MAX_EXACT = 2**53
"""Larger whole floats may have been other numbers."""
MAX_BODY_BYTES = 16 << 20
"""Several times the longest prompt of any context; a larger body is refused unread."""


async def _content(request: Request) -> bytes:
    """The bytes of the body.

    Raises:
        ApiError: 413, more than MAX_BODY_BYTES; what follows is not read.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(
                f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.",
                status=413,
                kind="RequestEntityTooLarge",
            )
        parts.append(part)
    return b"".join(parts)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The typed body of a request.

    Raises:
        ApiError: it is too large, not JSON, or a field has the wrong type.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            "Unsupported Media Type: Only 'application/json' is allowed", kind="Bad Request"
        )
    content = await _content(request)
    try:
        return _decoded(content, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").removeprefix(".").removeprefix("[...]")
        name = field.split(".")[0].split("[")[0]
        message = f"{field or 'The body'}: {reason[:1].lower()}{reason[1:]}."
        raise ApiError(message, param=name or None, kind="Bad Request") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(f"The body is not valid JSON: {error}.", kind="Bad Request") from None


def _decoded(content: bytes, kind: type[Body]) -> Body:
    """The body, in which an integer may be written as 16.0: JSON has one kind of number."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        if "got `float`" not in str(error) or len(content) > MAX_REREAD_BYTES:
            raise
    return msgspec.convert(_with_integers(msgspec.json.decode(content)), kind)


def _with_integers(value: Any) -> Any:
    """The same with an int for every float that is one."""
    match value:
        case float() if value.is_integer() and abs(value) <= MAX_EXACT:
            return int(value)
        case list():
            return [_with_integers(item) for item in value]
        case dict():
            return {name: _with_integers(item) for name, item in value.items()}
    return value


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails
    reasoning_tokens: int | UnsetType = UNSET
    """Where the model's thinking is separated."""


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The answer of /v1/completions, and each chunk of it in a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metadata: dict[str, str] | UnsetType = UNSET


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(msgspec.Struct, kw_only=True):
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[TokenLogprob]


class FunctionCall(msgspec.Struct, kw_only=True):
    """A function's name and its arguments, a JSON text. Deltas have a piece of the text."""

    name: str | UnsetType = UNSET
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall


class ToolCallDelta(msgspec.Struct, kw_only=True):
    """A piece of call number `index`; id, type and name come with its first piece."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionCall


class ChatMessage(msgspec.Struct, kw_only=True):
    """The answer; its content is null where there are calls and nothing else."""

    role: str = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metadata: dict[str, str]


class ChatDelta(msgspec.Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a chat stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ErrorEvent(msgspec.Struct, kw_only=True):
    """The last event but one of a stream that failed after it began."""

    error: ErrorBody
