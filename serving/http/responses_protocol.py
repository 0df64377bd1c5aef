"""The bodies of /v1/responses as typed structs: OpenAI's newer form of a conversation.

What is put out are messages, calls of functions and thinking. Known fields that ask for more are
in `RESPONSES_NOT_SERVED`, each with the values that are accepted and what to do instead.
"""

from __future__ import annotations

from typing import Any

import msgspec


class InputPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class InputItem(msgspec.Struct, kw_only=True):
    """Something of the conversation so far: a message, or what a response put out.

    Messages have role and content; function_call has call_id, name and arguments;
    function_call_output has call_id and output; reasoning has content.
    """

    type: str | None = None
    role: str | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class FunctionTool(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    type: str = "function"
    name: str | None = None
    description: str | None = None
    parameters: Any = None
    strict: bool | None = None


class FunctionChoice(msgspec.Struct, kw_only=True):
    """The function that the model must call."""

    type: str = "function"
    name: str | None = None


class Reasoning(msgspec.Struct, kw_only=True):
    """How much to think. There are no summaries: thinking comes as it is."""

    effort: str | None = None
    summary: str | None = None


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
    tools: list[FunctionTool] | None = None
    tool_choice: str | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None

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
    max_tool_calls: int | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    prompt: Any = None


_NO_MEMORY = "responses are not stored here. Send the whole conversation as input"

RESPONSES_NOT_SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), "responses are not stored here. Leave it out or set it to false"),
    "previous_response_id": ((), _NO_MEMORY),
    "conversation": ((), _NO_MEMORY),
    "background": ((False,), "a response lasts as long as its connection. Use stream"),
    "max_tool_calls": ((), "it is for tools that the server runs, and here are none"),
    "include": (([],), "there is nothing to include"),
    "top_logprobs": ((0,), "for log probabilities use /v1/chat/completions"),
    "truncation": (("disabled",), "an input that is too long is refused"),
    "prompt": ((), "there are no stored prompts. Use instructions and input"),
}
"""Fields that are refused: the values (besides null) that are accepted, and what is possible."""


class OutputText(msgspec.Struct, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: str = "assistant"
    status: str
    content: list[OutputText]


class OutputReasoning(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    status: str
    summary: list[Any] = []
    content: list[ReasoningText]


class OutputCall(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call of a function. `call_id` is what its function_call_output must repeat."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str


OutputItem = OutputMessage | OutputReasoning | OutputCall


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
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: Reasoning
    store: bool = False
    temperature: float
    text: TextConfig
    tool_choice: str | FunctionChoice = "auto"
    tools: list[FunctionTool] = []
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
    output_index: int


class ItemAdded(_OfItem, tag="response.output_item.added"):
    item: OutputItem


class ItemDone(_OfItem, tag="response.output_item.done"):
    item: OutputItem


class _OfPart(_OfItem, kw_only=True):
    item_id: str
    content_index: int = 0


class PartAdded(_OfPart, tag="response.content_part.added"):
    part: OutputText | ReasoningText


class PartDone(_OfPart, tag="response.content_part.done"):
    part: OutputText | ReasoningText


class TextDelta(_OfPart, tag="response.output_text.delta"):
    delta: str
    logprobs: list[Any] = []


class TextDone(_OfPart, tag="response.output_text.done"):
    text: str
    logprobs: list[Any] = []


class ReasoningDelta(_OfPart, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningDone(_OfPart, tag="response.reasoning_text.done"):
    text: str


class ArgumentsDelta(_OfItem, tag="response.function_call_arguments.delta"):
    item_id: str
    delta: str


class ArgumentsDone(_OfItem, tag="response.function_call_arguments.done"):
    item_id: str
    name: str
    arguments: str


ResponseEvent = (
    Created
    | InProgress
    | ItemAdded
    | PartAdded
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
    | PartDone
    | ItemDone
    | Completed
    | Incomplete
    | ResponseFailed
)
"""The events of a stream."""
