"""POST /v1/responses: OpenAI's newer form of a conversation, as one call of the chat route.

The body becomes that of /v1/chat/completions; what comes back is told in this route's own objects
and events. Nothing is remembered between requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any, NoReturn

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from serving.engine_client import EngineFailed
from serving.http.calls import Call
from serving.http.chat import to_call
from serving.http.constraints import check_constraint
from serving.http.errors import ApiError, json_response, to_api_error
from serving.http.generation import Answer, Tally, complete, generation
from serving.http.protocol import ChatBody, ContentPart, Message, Usage, read_body
from serving.http.responses_protocol import (
    RESPONSES_NOT_SERVED,
    Completed,
    Created,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputItem,
    InputTokensDetails,
    ItemAdded,
    ItemDone,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    PartAdded,
    PartDone,
    ResponseFailed,
    ResponseObject,
    ResponsesBody,
    ResponsesError,
    ResponsesUsage,
    TextConfig,
    TextDelta,
    TextDone,
)
from serving.http.sse import Events, stream, unless_disconnected
from serving.http.state import ServerState

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text")
_FIELDS = {"messages": "input", "max_completion_tokens": "max_output_tokens"}
"""How the chat route calls fields of this one."""


async def create_response(state: ServerState, request: Request) -> Response:
    """Check the body, generate, answer."""
    began = state.timer()
    body = await read_body(request, ResponsesBody)
    try:
        chat = to_chat_body(body)
        # Tokenising a long text takes seconds: other streams must not wait for it.
        call = await asyncio.to_thread(to_call, state, chat, request.headers, began)
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
    same = {
        name: getattr(body, name)
        for name in ResponsesBody.__struct_fields__
        if name in ChatBody.__struct_fields__ and name not in RESPONSES_NOT_SERVED
    }
    return ChatBody(
        **same,
        messages=_messages(body),
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
    if param in _FIELDS:
        message, param = message.replace(param, _FIELDS[param]), _FIELDS[param]
    elif param == "response_format":
        message, param = message.replace("response_format", "text.format"), "text"
    raise ApiError(message, param=param, status=error.status, kind=told.type) from None


def _messages(body: ResponsesBody) -> list[Message]:
    if body.input is None:
        raise ApiError("input is missing.", param="input")
    if not body.input:
        raise ApiError("input cannot be empty.", param="input")
    items = body.input
    if isinstance(items, str):
        items = [InputItem(role="user", content=items)]
    first = [] if body.instructions is None else [_system(body.instructions)]
    return first + [_message(item, f"input[{i}]") for i, item in enumerate(items)]


def _system(text: str) -> Message:
    return Message(role="system", content=text)


def _message(item: InputItem, where: str) -> Message:
    if item.type not in (None, "message"):
        raise ApiError(
            f"{where}.type '{item.type}' is not supported: items must be messages.", param="input"
        )
    if item.role not in ROLES:
        raise ApiError(
            f"{where}.role must be one of {', '.join(ROLES)}, got '{item.role}'.", param="input"
        )
    if item.content is None:
        raise ApiError(f"{where}.content is missing.", param="input")
    if isinstance(item.content, str):
        return Message(role=item.role, content=item.content)
    parts = []
    for i, part in enumerate(item.content):
        if part.type not in TEXT_PARTS or part.text is None:
            raise ApiError(
                f"{where}.content[{i}] must be a part of type input_text or output_text with a "
                f"text, got '{part.type}'.",
                param="input",
            )
        parts.append(ContentPart(type="text", text=part.text))
    return Message(role=item.role, content=parts)


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    """`text.format` as the chat route spells it."""
    if text is None or text.format is None:
        return None
    if text.format.get("type") != "json_schema":
        return text.format
    inner = {key: value for key, value in text.format.items() if key != "type"}
    return {"type": "json_schema", "json_schema": inner}


async def _response(state: ServerState, body: ResponsesBody, call: Call) -> ResponseObject:
    async with generation(state, call) as (answer_id, deltas):
        ((answer,), usage) = await complete(deltas, call)
    response = _begun(state, body, call, answer_id)
    _finish(response, answer, usage)
    return response


async def _events(state: ServerState, body: ResponsesBody, call: Call) -> Events:
    """From response.created to response.completed, .incomplete or .failed."""
    numbers: Iterator[int] = count()
    tally, answer = Tally(call), Answer()
    async with generation(state, call) as (answer_id, deltas):
        response = _begun(state, body, call, answer_id)
        item_id = _item_id(answer_id)
        opened = False
        try:
            async for delta in deltas:
                if not opened:
                    opened = True
                    for event in _opening(response, item_id, numbers):
                        yield event
                answer.add(delta)
                tally.add(delta)
                if delta.text:
                    yield TextDelta(
                        sequence_number=next(numbers), item_id=item_id, delta=delta.text
                    )
        except (ApiError, EngineFailed) as problem:
            if not opened:  # it can still be told by a status
                raise
            error = to_api_error(problem).body
            response.status = "failed"
            response.error = ResponsesError(code="server_error", message=error.message)
            yield ResponseFailed(sequence_number=next(numbers), response=response)
            return
    _finish(response, answer, tally.total())
    for event in _closing(response, numbers):
        yield event


def _opening(
    response: ResponseObject, item_id: str, numbers: Iterator[int]
) -> Iterator[msgspec.Struct]:
    """What comes before the text."""
    yield Created(sequence_number=next(numbers), response=response)
    yield InProgress(sequence_number=next(numbers), response=response)
    item = OutputMessage(id=item_id, status="in_progress", content=[])
    yield ItemAdded(sequence_number=next(numbers), item=item)
    part = OutputText(text="")
    yield PartAdded(sequence_number=next(numbers), item_id=item_id, part=part)


def _closing(response: ResponseObject, numbers: Iterator[int]) -> Iterator[msgspec.Struct]:
    """What comes behind the text."""
    (item,) = response.output
    (part,) = item.content
    yield TextDone(sequence_number=next(numbers), item_id=item.id, text=part.text)
    yield PartDone(sequence_number=next(numbers), item_id=item.id, part=part)
    yield ItemDone(sequence_number=next(numbers), item=item)
    last = Completed if response.status == "completed" else Incomplete
    yield last(sequence_number=next(numbers), response=response)


def _item_id(answer_id: str) -> str:
    return f"msg_{answer_id}"


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
        temperature=sampling.temperature,
        text=TextConfig(format=text.format or {"type": "text"}, verbosity=text.verbosity),
        top_p=sampling.top_p,
        user=body.user,
    )


def _finish(response: ResponseObject, answer: Answer, usage: Usage) -> None:
    """Put in what came out."""
    match answer.finish_reason:
        case "length":
            response.status = "incomplete"
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        case "abort":
            response.status = "cancelled"
        case _:
            response.status = "completed"
    response.output = [
        OutputMessage(
            id=_item_id(response.id),
            status="completed" if response.status == "completed" else "incomplete",
            content=[OutputText(text=answer.text)],
        )
    ]
    response.usage = ResponsesUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.prompt_tokens_details.cached_tokens
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(),
        total_tokens=usage.total_tokens,
    )
