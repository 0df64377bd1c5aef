"""The bodies of /v1/responses as typed structs: OpenAI's newer form of a conversation.

Only what one message of text needs. Known fields that ask for more are in
`RESPONSES_NOT_SERVED`, each with the values that are accepted and what to do instead.
"""

from __future__ import annotations

from typing import Any

import msgspec


class InputPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class InputItem(msgspec.Struct, kw_only=True):
    """A message of the conversation so far."""

    type: str | None = None
    role: str | None = None
    content: str | list[InputPart] | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    """`text`: the form of the answer."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    """POST /v1/responses. null means the default."""

    input: str | list[InputItem] | None = None
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextConfig | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    parallel_tool_calls: bool | None = None

    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    rid: str | None = None
    priority: int | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None

    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    max_tool_calls: int | None = None
    reasoning: Any = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    prompt: Any = None


_NO_MEMORY = "responses are not stored here. Send the whole conversation as input"
_NO_TOOLS = "tools are not served on this route yet"

RESPONSES_NOT_SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), "responses are not stored here. Leave it out or set it to false"),
    "previous_response_id": ((), _NO_MEMORY),
    "conversation": ((), _NO_MEMORY),
    "background": ((False,), "a response lasts as long as its connection. Use stream"),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("auto", "none"), _NO_TOOLS),
    "max_tool_calls": ((), _NO_TOOLS),
    "reasoning": (({},), "the model decides how it reasons. Try chat_template_kwargs"),
    "include": (([],), "there is nothing to include"),
    "top_logprobs": ((0,), "for log probabilities use /v1/chat/completions"),
    "truncation": (("disabled",), "an input that is too long is refused"),
    "prompt": ((), "there are no stored prompts. Use instructions and input"),
}
"""Fields that are refused: the values (besides null) that are accepted, and what is possible."""


class OutputText(msgspec.Struct, kw_only=True):
    type: str = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(msgspec.Struct, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    status: str
    content: list[OutputText]


class InputTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int = 0


class ResponsesUsage(msgspec.Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponsesError(msgspec.Struct, kw_only=True):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct, kw_only=True):
    reason: str


class Reasoning(msgspec.Struct, kw_only=True):
    effort: str | None = None
    summary: str | None = None


class ResponseObject(msgspec.Struct, kw_only=True):
    """The answer of /v1/responses."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    background: bool = False
    error: ResponsesError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: Reasoning = msgspec.field(default_factory=Reasoning)
    store: bool = False
    temperature: float
    text: TextConfig
    tool_choice: str = "auto"
    tools: list[Any] = []
    top_p: float
    truncation: str = "disabled"
    usage: ResponsesUsage | None = None
    user: str | None = None


class _Event(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int


class Created(_Event, tag="response.created"):
    response: ResponseObject


class InProgress(_Event, tag="response.in_progress"):
    response: ResponseObject


class Completed(_Event, tag="response.completed"):
    response: ResponseObject


class Incomplete(_Event, tag="response.incomplete"):
    response: ResponseObject


class ResponseFailed(_Event, tag="response.failed"):
    response: ResponseObject


class _OfItem(_Event, kw_only=True):
    output_index: int = 0


class ItemAdded(_OfItem, tag="response.output_item.added"):
    item: OutputMessage


class ItemDone(_OfItem, tag="response.output_item.done"):
    item: OutputMessage


class _OfPart(_OfItem, kw_only=True):
    item_id: str
    content_index: int = 0


class PartAdded(_OfPart, tag="response.content_part.added"):
    part: OutputText


class PartDone(_OfPart, tag="response.content_part.done"):
    part: OutputText


class TextDelta(_OfPart, tag="response.output_text.delta"):
    delta: str
    logprobs: list[Any] = []


class TextDone(_OfPart, tag="response.output_text.done"):
    text: str
    logprobs: list[Any] = []


ResponseEvent = (
    Created
    | InProgress
    | ItemAdded
    | PartAdded
    | TextDelta
    | TextDone
    | PartDone
    | ItemDone
    | Completed
    | Incomplete
    | ResponseFailed
)
"""The events of a stream, in the order in which they come."""
