"""POST /v1/chat/completions: a conversation through the model's template, and its next messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from serving.http.calls import Call, Job, check_num_tokens, make_call
from serving.http.constraints import check_constraint, constraint
from serving.http.errors import ApiError, json_response
from serving.http.generation import AnswerToken, Delta, Tally, complete, generation, token_ids
from serving.http.protocol import (
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Message,
    TokenLogprob,
    TopLogprob,
    read_body,
    refuse_not_served,
)
from serving.http.sampling import (
    check_max_tokens,
    check_prompt,
    check_ranges,
    num_samples,
    samples,
    sampling_params,
)
from serving.http.sse import Events, stream, unless_disconnected
from serving.http.state import WEIGHT_VERSION, ServerState
from serving.request import MAX_TOP_LOGPROBS
from serving.tokenizer import ChatTemplateError, Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ROLES_NOT_SERVED_YET = ("tool", "function")


async def create_chat_completion(state: ServerState, request: Request) -> Response:
    """Check the body, generate, answer."""
    began = state.timer()
    body = await read_body(request, ChatBody)
    # Tokenising a long text takes seconds: other streams must not wait for it.
    call = await asyncio.to_thread(to_call, state, body, request.headers, began)
    await check_constraint(request, body, state.grammars, num_answers=call.num_constrained)
    if call.stream:
        return await stream(request, _chunks(state, call))
    answer = await unless_disconnected(request.receive, _chat_completion(state, call))
    return json_response(answer)


def to_call(state: ServerState, body: ChatBody, headers: Mapping[str, str], began: float) -> Call:
    """The checked form of a body, but for its grammar, which takes longer.

    Raises:
        ApiError: a value is out of range, the template refuses the messages, or conversation and
            answer do not fit the model.
    """
    check_ranges(body)
    refuse_not_served(body)
    logprobs = _num_logprobs(body)
    try:
        prompt = state.tokenizer.encode_chat(to_messages(body), body.chat_template_kwargs)
    except ChatTemplateError as error:
        raise ApiError(str(error), param="messages") from None
    context = state.engine.ready.max_context_tokens
    check_prompt(prompt, vocab_size=state.tokenizer.vocab_size, context=context, param="messages")
    num = num_samples(body)
    check_num_tokens(len(prompt), 1, num, param="messages")
    max_tokens = context - len(prompt)
    for name in ("max_tokens", "max_completion_tokens"):
        given: int | None = getattr(body, name)
        if given is not None and (name != "max_tokens" or body.max_completion_tokens is None):
            check_max_tokens(given, num_prompt=len(prompt), context=context, param=name)
            max_tokens = given
    sampling = sampling_params(
        body,
        defaults=state.defaults,
        tokenizer=state.tokenizer,
        max_tokens=max_tokens,
        logprobs=logprobs,
        seeds=state.seeds,
        grammar=constraint(body),
    )
    ids = tuple(prompt)
    return make_call(
        state,
        body,
        headers,
        began=began,
        id_prefix="chatcmpl",
        jobs=[Job(prompt=ids, sampling=sample) for sample in samples(sampling, num)],
        logprobs=logprobs,
    )


def to_messages(body: ChatBody) -> list[dict[str, Any]]:
    """The messages as templates expect them: plain strings for content, developer as system."""
    if body.messages is None:
        raise ApiError("messages is missing.", param="messages")
    if not body.messages:
        raise ApiError("Messages cannot be empty.", param="messages")
    return [_to_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]


def _to_message(message: Message, where: str) -> dict[str, Any]:
    if message.role not in ROLES:
        raise ApiError(
            f"{where}.role must be one of {', '.join(ROLES)}, got '{message.role}'.",
            param="messages",
        )
    if message.role in ROLES_NOT_SERVED_YET:
        raise ApiError(f"{where}.role '{message.role}' is not supported yet.", param="messages")
    if message.tool_calls:
        raise ApiError(f"{where}.tool_calls is not supported yet.", param="messages")
    content = message.content
    if isinstance(content, list):
        for i, part in enumerate(content):
            if part.type != "text":
                raise ApiError(
                    f"{where}.content[{i}]: only parts of type 'text' are supported, got "
                    f"'{part.type}'.",
                    param="messages",
                )
            if part.text is None:
                raise ApiError(f"{where}.content[{i}].text is missing.", param="messages")
        content = " ".join(part.text or "" for part in content)
    if content is None:
        if message.role != "assistant":
            raise ApiError(f"{where}.content is missing.", param="messages")
        content = ""
    role = "system" if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": content, **named}


def _num_logprobs(body: ChatBody) -> int | None:
    """How many alternatives to report for each token, None without logprobs."""
    top = body.top_logprobs
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        raise ApiError(
            f"top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {top}.", param="top_logprobs"
        )
    if top and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    return top or 0 if body.logprobs else None


async def _chat_completion(state: ServerState, call: Call) -> ChatCompletion:
    async with generation(state, call) as (answer_id, deltas):
        answers, usage = await complete(deltas, call)
    return ChatCompletion(
        id=answer_id,
        created=int(state.clock()),
        model=call.model,
        choices=[
            ChatChoice(
                index=i,
                message=ChatMessage(content=answer.text),
                logprobs=_logprobs(state.tokenizer, call, answer.tokens),
                finish_reason=answer.finish_reason,
                matched_stop=answer.matched_stop,
                token_ids=token_ids(call, answer.tokens),
            )
            for i, answer in enumerate(answers)
        ],
        usage=usage,
        metadata={"weight_version": WEIGHT_VERSION},
    )


async def _chunks(state: ServerState, call: Call) -> Events:
    tally = Tally(call)
    created = int(state.clock())
    async with generation(state, call) as (answer_id, deltas):

        def chunk(choice: ChatChunkChoice) -> ChatChunk:
            return ChatChunk(
                id=answer_id,
                created=created,
                model=call.model,
                choices=[choice],
                usage=tally.of(choice.index),
            )

        begun: set[int] = set()
        async for delta in deltas:
            tally.add(delta)
            opens = delta.index not in begun
            begun.add(delta.index)
            if delta.replayed:
                continue
            for choice in _chunk_choices(state.tokenizer, call, delta, opens=opens):
                yield chunk(choice)
    if call.include_usage:
        yield ChatChunk(
            id=answer_id,
            created=created,
            model=call.model,
            choices=[],
            usage=tally.total(),
        )


def _chunk_choices(
    tokenizer: Tokenizer, call: Call, delta: Delta, *, opens: bool
) -> list[ChatChunkChoice]:
    """The choices that tell of a delta: role, text and end one by one, as OpenAI does, or together.

    Args:
        opens: it is the first of its answer.
    """
    index, logprobs = delta.index, _logprobs(tokenizer, call, delta.tokens)
    role = ChatDelta(role="assistant", content="")
    end = ChatChunkChoice(
        index=index,
        delta=ChatDelta(),
        logprobs=logprobs,
        finish_reason=delta.finish_reason,
        matched_stop=delta.matched_stop,
    )
    if call.token_ids:
        end.delta = ChatDelta(role="assistant" if opens else UNSET, content=delta.text)
        end.token_ids = token_ids(call, delta.tokens)
        return [end]
    choices = [ChatChunkChoice(index=index, delta=role)] if opens else []
    if delta.text:
        text = ChatDelta(content=delta.text)
        choices.append(ChatChunkChoice(index=index, delta=text, logprobs=logprobs))
        end.logprobs = None
    if delta.finish_reason is not None:
        choices.append(end)
    return choices


def _logprobs(
    tokenizer: Tokenizer, call: Call, tokens: Sequence[AnswerToken]
) -> ChatLogprobs | None:
    if call.logprobs is None:
        return None
    content = []
    for token in tokens:
        event = token.event
        if event.token_id is None or event.logprob is None:
            continue
        token_bytes = tokenizer.token_bytes(event.token_id)
        content.append(
            TokenLogprob(
                token=token_bytes.decode(errors="replace"),
                bytes=list(token_bytes),
                logprob=event.logprob,
                top_logprobs=[
                    TopLogprob(
                        token=tokenizer.token_bytes(i).decode(errors="replace"),
                        bytes=list(tokenizer.token_bytes(i)),
                        logprob=logprob,
                    )
                    for i, logprob in event.top_logprobs or ()
                ],
            )
        )
    return ChatLogprobs(content=content)
