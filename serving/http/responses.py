"""POST /v1/responses: OpenAI's newer form of a conversation, as one call of the chat route.

The body becomes that of /v1/chat/completions; what comes back is told in this route's own objects
and events. Nothing is remembered between requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any, NoReturn

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from serving.engine_client import EngineFailed
from serving.http.calls import Call
from serving.http.chat import to_call, told
from serving.http.constraints import check_constraint
from serving.http.errors import ApiError, json_response, to_api_error
from serving.http.generation import Tally, generation
from serving.http.offload import off_loop
from serving.http.protocol import (
    CalledFunction,
    ChatBody,
    ContentPart,
    Function,
    Message,
    MessageToolCall,
    NamedFunction,
    NamedTool,
    Tool,
    Usage,
    read_body,
)
from serving.http.responses_output import GrowingOutput
from serving.http.responses_protocol import (
    RESPONSES_NOT_SERVED,
    Completed,
    Created,
    FunctionTool,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputItem,
    InputPart,
    InputTokensDetails,
    OutputTokensDetails,
    Reasoning,
    ResponseFailed,
    ResponseObject,
    ResponsesBody,
    ResponsesError,
    ResponsesUsage,
    TextConfig,
)
from serving.http.sse import Events, stream, unless_disconnected
from serving.http.state import ServerState

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text")
THOUGHT_PARTS = ("reasoning_text",)
SUMMARIES = ("auto", None)
MAX_METADATA = 16
"""Pairs, as at OpenAI: every event that holds the response repeats them."""
_OWN = ("tools", "tool_choice", *RESPONSES_NOT_SERVED)
"""Fields that the chat route has in another form, or under the same name by chance."""


async def create_response(state: ServerState, request: Request) -> Response:
    """Check the body, generate, answer."""
    began = state.timer()
    body = await read_body(request, ResponsesBody)
    try:
        # Tokenising a long text takes seconds: other streams must not wait for it.
        chat = await off_loop(state.slow_lane, request, to_chat_body, body)
        call = await off_loop(
            state.slow_lane, request, to_call, state, chat, request.headers, began
        )
        await check_constraint(request, chat, state.grammars, [call])
    except ApiError as error:
        _raise_in_our_words(error)
    call = replace(call, id_prefix="resp")
    if body.stream:
        return await stream(request, _events(state, body, call), named=True)
    work = _response(state, body, call)
    return json_response(await unless_disconnected(request.receive, work))


def to_chat_body(body: ResponsesBody) -> ChatBody:
    """The same request to /v1/chat/completions.

    Raises:
        ApiError: something is asked for that is not served, or has the wrong form.
    """
    _refuse_not_served(body)
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise ApiError(
            f"max_output_tokens must be positive, got {body.max_output_tokens}.",
            param="max_output_tokens",
        )
    if len(body.metadata or ()) > MAX_METADATA:
        raise ApiError(
            f"metadata may hold {MAX_METADATA} pairs, got {len(body.metadata or ())}.",
            param="metadata",
        )
    same = {
        name: getattr(body, name)
        for name in ResponsesBody.__struct_fields__
        if name in ChatBody.__struct_fields__ and name not in _OWN
    }
    return ChatBody(
        **same,
        messages=_messages(body),
        tools=_tools(body.tools),
        tool_choice=_tool_choice(body),
        reasoning_effort=_effort(body.reasoning),
        max_completion_tokens=body.max_output_tokens,
        response_format=_response_format(body.text),
    )


def _refuse_not_served(body: ResponsesBody) -> None:
    for name, (neutral, possible) in RESPONSES_NOT_SERVED.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            raise ApiError(f"{name} is not supported: {possible}.", param=name)


def _raise_in_our_words(error: ApiError) -> NoReturn:
    """An error of the chat route under the names of this route's fields."""
    told = error.body
    message, param = told.message, told.param
    if param == "messages":  # what is wrong with single ones has been found before
        param = "input"
    elif param == "max_completion_tokens":
        message, param = message.replace(param, "max_output_tokens"), "max_output_tokens"
    elif param == "response_format":
        message, param = message.replace("response_format", "text.format"), "text"
    raise ApiError(message, param=param, status=error.status, kind=told.type) from None


def _messages(body: ResponsesBody) -> list[Message]:
    """The conversation as the chat route has it: one message of the assistant for each turn."""
    if body.input is None:
        raise ApiError("input is missing.", param="input")
    if not body.input:
        raise ApiError("input cannot be empty.", param="input")
    items = body.input
    if isinstance(items, str):
        items = [InputItem(role="user", content=items)]
    messages: list[Message] = []
    if body.instructions is not None:
        messages.append(Message(role="system", content=body.instructions))
    for i, item in enumerate(items):
        _add(messages, item, f"input[{i}]")
    return messages


def _add(messages: list[Message], item: InputItem, where: str) -> None:
    match item.type or "message":
        case "message":
            if item.role not in ROLES:
                raise ApiError(
                    f"{where}.role must be one of {', '.join(ROLES)}, got '{item.role}'.",
                    param="input",
                )
            content = _content(item.content, f"{where}.content", TEXT_PARTS)
            last = messages[-1] if messages else None
            if item.role == "assistant" and last is not None and _only_thought(last):
                last.content = content
            else:
                messages.append(Message(role=item.role, content=content))
        case "reasoning":
            text = _content(item.content, f"{where}.content", THOUGHT_PARTS)
            thought = text if isinstance(text, str) else "".join(part.text or "" for part in text)
            messages.append(Message(role="assistant", reasoning_content=thought))
        case "function_call":
            if item.name is None or item.call_id is None:
                raise ApiError(f"{where} needs name and call_id.", param="input")
            _check_arguments(item.arguments, f"{where}.arguments")
            if not messages or messages[-1].role != "assistant":
                messages.append(Message(role="assistant"))
            function = CalledFunction(name=item.name, arguments=item.arguments)
            call = MessageToolCall(id=item.call_id, function=function)
            if messages[-1].tool_calls is None:
                messages[-1].tool_calls = []
            messages[-1].tool_calls.append(call)
        case "function_call_output":
            if item.call_id is None:
                raise ApiError(f"{where} needs call_id.", param="input")
            content = _content(item.output, f"{where}.output", TEXT_PARTS)
            messages.append(Message(role="tool", tool_call_id=item.call_id, content=content))
        case kind:
            raise ApiError(
                f"{where}.type '{kind}' is not supported: items are messages, reasoning, "
                "function_call and function_call_output.",
                param="input",
            )


def _check_arguments(text: str | None, where: str) -> None:
    try:
        value = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(f"{where} must be a JSON object, as text.", param="input")


def _only_thought(message: Message) -> bool:
    """Whether a message of the assistant waits for what it says."""
    said = message.content is not None or message.tool_calls
    return message.reasoning_content is not None and not said


def _content(
    content: str | list[InputPart] | None, where: str, kinds: tuple[str, ...]
) -> str | list[ContentPart]:
    if content is None:
        raise ApiError(f"{where} is missing.", param="input")
    if isinstance(content, str):
        return content
    parts = []
    for i, part in enumerate(content):
        if part.type not in kinds or part.text is None:
            raise ApiError(
                f"{where}[{i}] must be a part of type {' or '.join(kinds[:2])} with a text, got "
                f"'{part.type}'.",
                param="input",
            )
        parts.append(ContentPart(type="text", text=part.text))
    return parts


def _tools(tools: list[FunctionTool] | None) -> list[Tool] | None:
    if tools is None:
        return None
    found = []
    for i, tool in enumerate(tools):
        if tool.type != "function":
            raise ApiError(
                f"tools[{i}].type must be 'function', got '{tool.type[:64]}': the server itself "
                "runs no tools.",
                param="tools",
            )
        function = Function(
            name=tool.name or "",
            description=tool.description,
            parameters=tool.parameters,
            strict=tool.strict,
        )
        found.append(Tool(function=function))
    return found


def _tool_choice(body: ResponsesBody) -> str | NamedTool | None:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    if choice.type != "function" or choice.name is None:
        raise ApiError(
            "tool_choice must be auto, none, required, or an object with type 'function' and a "
            "name.",
            param="tool_choice",
        )
    return NamedTool(function=NamedFunction(name=choice.name))


def _effort(reasoning: Reasoning | None) -> str | None:
    if reasoning is None:
        return None
    if reasoning.summary not in SUMMARIES:
        raise ApiError(
            "reasoning.summary must be 'auto' or left out: thinking is not summarised here, it "
            "comes as it is.",
            param="reasoning",
        )
    return reasoning.effort


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    """`text.format` as the chat route spells it."""
    if text is None or text.format is None:
        return None
    if text.format.get("type") != "json_schema":
        return text.format
    inner = {key: value for key, value in text.format.items() if key != "type"}
    return {"type": "json_schema", "json_schema": inner}


async def _response(state: ServerState, body: ResponsesBody, call: Call) -> ResponseObject:
    tally, reason = Tally(call), None
    async with generation(state, call) as (answer_id, deltas):
        output = GrowingOutput(answer_id, count())
        async for part in told(state, call, deltas):
            tally.add(part.delta, part.reasoning_tokens)
            list(output.add(part.piece))  # nobody wants the events
            reason = part.finish_reason
    response = _begun(state, body, call, answer_id)
    _finish(response, reason, tally.total())
    list(output.close(complete=response.status == "completed"))
    response.output = output.items
    return response


async def _events(state: ServerState, body: ResponsesBody, call: Call) -> Events:
    """From response.created to response.completed, .incomplete or .failed."""
    numbers: Iterator[int] = count()
    tally, reason = Tally(call), None
    async with generation(state, call) as (answer_id, deltas):
        response = _begun(state, body, call, answer_id)
        output = GrowingOutput(answer_id, numbers)
        opened = False
        try:
            async for part in told(state, call, deltas):
                if not opened:
                    opened = True
                    yield Created(sequence_number=next(numbers), response=response)
                    yield InProgress(sequence_number=next(numbers), response=response)
                tally.add(part.delta, part.reasoning_tokens)
                reason = part.finish_reason
                for event in output.add(part.piece):
                    yield event
        except (ApiError, EngineFailed) as problem:
            if not opened:  # it can still be told by a status
                raise
            error = to_api_error(problem).body
            response.status = "failed"
            response.error = ResponsesError(code="server_error", message=error.message)
            yield ResponseFailed(sequence_number=next(numbers), response=response)
            return
    _finish(response, reason, tally.total())
    for event in output.close(complete=response.status == "completed"):
        yield event
    response.output = output.items
    last = Completed if response.status == "completed" else Incomplete
    yield last(sequence_number=next(numbers), response=response)


def _begun(state: ServerState, body: ResponsesBody, call: Call, answer_id: str) -> ResponseObject:
    """A response of which nothing is known yet."""
    sampling = call.jobs[0].sampling
    text = body.text or TextConfig()
    return ResponseObject(
        id=answer_id,
        created_at=int(state.clock()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=call.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=body.reasoning or Reasoning(),
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        temperature=sampling.temperature,
        text=TextConfig(format=text.format or {"type": "text"}, verbosity=text.verbosity),
        top_p=sampling.top_p,
        user=body.user,
    )


def _finish(response: ResponseObject, finish_reason: str | None, usage: Usage) -> None:
    """Put in how it ended."""
    match finish_reason:
        case "length":
            response.status = "incomplete"
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        case "abort":
            response.status = "cancelled"
        case _:
            response.status = "completed"
    response.usage = ResponsesUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.prompt_tokens_details.cached_tokens
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(
            reasoning_tokens=0 if usage.reasoning_tokens is UNSET else usage.reasoning_tokens
        ),
        total_tokens=usage.total_tokens,
    )
