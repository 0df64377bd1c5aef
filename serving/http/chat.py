"""POST /v1/chat/completions: a conversation through the model's template, and its next messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from serving.http.calls import Call, Job, check_num_tokens, make_call
from serving.http.constraints import check_constraint, constraint
from serving.http.conversation import Prompt, chat_prompt
from serving.http.errors import ApiError, json_response
from serving.http.generation import Answer, AnswerToken, Delta, Tally, generation, token_ids
from serving.http.offload import off_loop
from serving.http.protocol import (
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
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
from serving.http.tool_use import ToolUse, tool_use
from serving.parsers.answer import Piece, Reading
from serving.parsers.calls import CallDelta
from serving.parsers.reasoning import REASONING_FORMATS, ReasoningFormat
from serving.parsers.tool_calls import call_id
from serving.request import MAX_TOP_LOGPROBS, Grammar, Thinking
from serving.tokenizer import Tokenizer


async def create_chat_completion(state: ServerState, request: Request) -> Response:
    """Check the body, generate, answer."""
    began = state.timer()
    body = await read_body(request, ChatBody)
    call = await off_loop(state.slow_lane, request, to_call, state, body, request.headers, began)
    await check_constraint(request, body, state.grammars, [call])
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
    tokenizer, config = state.tokenizer, state.config
    use = tool_use(body, parser=config.tool_call_parser, chat_template=tokenizer.chat_template)
    reasoning = REASONING_FORMATS.get(config.reasoning_parser or "")
    prompt = chat_prompt(body, use, tokenizer, reasoning)
    ids, param = tuple(prompt.ids), "messages" if body.input_ids is None else "input_ids"
    context = state.engine.ready.max_context_tokens
    check_prompt(ids, vocab_size=tokenizer.vocab_size, context=context, param=param)
    num = num_samples(body)
    check_num_tokens(len(ids), 1, num, param=param)
    sampling = sampling_params(
        body,
        defaults=state.defaults,
        tokenizer=tokenizer,
        max_tokens=_max_tokens(body, num_prompt=len(ids), context=context),
        logprobs=logprobs,
        seeds=state.seeds,
        grammar=_grammar(body, use, thinking=_thinking(reasoning, prompt, tokenizer)),
    )
    return make_call(
        state,
        body,
        headers,
        began=began,
        id_prefix="chatcmpl",
        jobs=[Job(prompt=ids, sampling=sample) for sample in samples(sampling, num)],
        logprobs=logprobs,
        reading=Reading(
            reasoning=reasoning,
            separate=body.separate_reasoning is not False,
            begins=prompt.begins,
            whole_reasoning=body.stream_reasoning is False,
            tools=use.form,
            schemas=use.schemas,
            ids="openai" if use.native is None else use.native.ids,
            calls_before=prompt.num_calls,
        ),
    )


def _max_tokens(body: ChatBody, *, num_prompt: int, context: int) -> int:
    """Up to the end of the context, if the body says nothing."""
    max_tokens = context - num_prompt
    for name in ("max_tokens", "max_completion_tokens"):
        given: int | None = getattr(body, name)
        if given is not None and (name != "max_tokens" or body.max_completion_tokens is None):
            check_max_tokens(given, num_prompt=num_prompt, context=context, param=name)
            max_tokens = given
    return max_tokens


def _grammar(body: ChatBody, use: ToolUse, *, thinking: Thinking | None) -> Grammar | None:
    """What the answer must look like, behind its thinking."""
    asked = constraint(body)
    if asked is not None and use.grammar is not None:
        raise ApiError(
            "A tool_choice that demands a call cannot be combined with another constraint of the "
            "answer.",
            param="tool_choice",
        )
    grammar = asked or use.grammar
    if grammar is None or grammar.kind == "ebnf":  # which describes the whole answer
        return grammar
    return replace(grammar, thinking=thinking)


def _thinking(
    reasoning: ReasoningFormat | None, prompt: Prompt, tokenizer: Tokenizer
) -> Thinking | None:
    """The thinking that may stand in front of what a grammar governs."""
    if reasoning is None or prompt.begins == "answer":
        return None
    ids = tokenizer.special_ids((reasoning.start, reasoning.end))
    return Thinking(
        start=ids.get(reasoning.start, reasoning.start),
        end=ids.get(reasoning.end, reasoning.end),
        opened=prompt.begins in ("opened", "thinking"),
        always=reasoning.always,
    )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A delta and what it says, its calls with their ids.

    Attributes:
        reasoning_tokens: how many of its tokens are thinking, to within a delta at either end.
    """

    delta: Delta
    piece: Piece
    finish_reason: str | None
    reasoning_tokens: int = 0


async def told(
    state: ServerState, call: Call, deltas: AsyncGenerator[Delta, None]
) -> AsyncGenerator[Told, None]:
    """Read the answers of a call as they come."""
    parsers = [call.reading.parser() for _ in call.jobs]
    async for delta in deltas:
        parser = parsers[delta.index]
        piece = parser.push(delta.text)
        thought = len(delta.tokens) if piece.reasoning or parser.thinks else 0
        reason = delta.finish_reason
        if reason is not None:
            last = parser.finish()
            piece.reasoning += last.reasoning
            piece.content += last.content
            piece.calls += last.calls
            if reason == "stop" and parser.has_calls:
                reason = "tool_calls"
        piece.calls = [_with_id(state, call, part) for part in piece.calls]
        yield Told(delta=delta, piece=piece, finish_reason=reason, reasoning_tokens=thought)


def _with_id(state: ServerState, call: Call, part: CallDelta) -> CallDelta:
    """A call's first piece has an id, ours where the model gave none."""
    if part.name is None or part.id is not None:
        return part
    fresh, reading = state.new_id(), call.reading
    number = reading.calls_before + part.index
    return replace(part, id=call_id(reading.ids, name=part.name, number=number, fresh=fresh))


async def _chat_completion(state: ServerState, call: Call) -> ChatCompletion:
    messages = [ChatMessage(content="") for _ in call.jobs]
    answers = [Answer() for _ in call.jobs]
    reasons: list[str | None] = [None for _ in call.jobs]
    tally = Tally(call)
    async with generation(state, call) as (answer_id, deltas):
        async for part in told(state, call, deltas):
            index = part.delta.index
            answers[index].add(part.delta)
            tally.add(part.delta, part.reasoning_tokens)
            _add(messages[index], part.piece)
            reasons[index] = part.finish_reason
    for message in messages:
        if message.tool_calls and not message.content:
            message.content = None
    return ChatCompletion(
        id=answer_id,
        created=int(state.clock()),
        model=call.model,
        choices=[
            ChatChoice(
                index=i,
                message=messages[i],
                logprobs=_logprobs(state.tokenizer, call, answer.tokens),
                finish_reason=reasons[i],
                matched_stop=answer.matched_stop,
                token_ids=token_ids(call, answer.tokens),
            )
            for i, answer in enumerate(answers)
        ],
        usage=tally.total(),
        metadata={"weight_version": WEIGHT_VERSION},
    )


def _add(message: ChatMessage, piece: Piece) -> None:
    """Put a piece behind what a message says already."""
    message.content = (message.content or "") + piece.content
    if piece.reasoning:
        message.reasoning_content = (message.reasoning_content or "") + piece.reasoning
    for part in piece.calls:
        if message.tool_calls is None:
            message.tool_calls = []
        if part.name is not None:
            function = FunctionCall(name=part.name, arguments="")
            message.tool_calls.append(ToolCall(id=part.id or "", function=function))
        message.tool_calls[part.index].function.arguments += part.arguments


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
        async for part in told(state, call, deltas):
            delta = part.delta
            tally.add(delta, part.reasoning_tokens)
            opens = delta.index not in begun
            begun.add(delta.index)
            if delta.replayed:
                continue
            for choice in _chunk_choices(state.tokenizer, call, part, opens=opens):
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
    tokenizer: Tokenizer, call: Call, part: Told, *, opens: bool
) -> list[ChatChunkChoice]:
    """The choices that tell of a delta: role, text and end one by one, as OpenAI does, or together.

    Args:
        opens: it is the first of its answer.
    """
    delta, piece = part.delta, part.piece
    index, logprobs = delta.index, _logprobs(tokenizer, call, delta.tokens)
    end = ChatChunkChoice(
        index=index,
        delta=ChatDelta(),
        logprobs=logprobs,
        finish_reason=part.finish_reason,
        matched_stop=delta.matched_stop,
    )
    said = _said(piece)
    if call.token_ids:
        end.delta = said
        if opens:
            end.delta.role = "assistant"
        end.token_ids = token_ids(call, delta.tokens)
        return [end]
    choices = []
    if opens:
        opening = ChatDelta(role="assistant", content="")
        choices.append(ChatChunkChoice(index=index, delta=opening))
    if piece.content or piece.reasoning or piece.calls or (logprobs and not part.finish_reason):
        choices.append(ChatChunkChoice(index=index, delta=said, logprobs=logprobs))
        end.logprobs = None
    if part.finish_reason is not None:
        choices.append(end)
    return choices


def _said(piece: Piece) -> ChatDelta:
    """A delta of what there is, of an empty text where there is nothing."""
    delta = ChatDelta()
    if piece.reasoning:
        delta.reasoning_content = piece.reasoning
    if piece.calls:
        delta.tool_calls = [_call_delta(part) for part in piece.calls]
    if piece.content or not (piece.reasoning or piece.calls):
        delta.content = piece.content
    return delta


def _call_delta(part: CallDelta) -> ToolCallDelta:
    if part.name is None:
        function = FunctionCall(arguments=part.arguments)
        return ToolCallDelta(index=part.index, function=function)
    return ToolCallDelta(
        index=part.index,
        id=part.id or "",
        type="function",
        function=FunctionCall(name=part.name, arguments=part.arguments),
    )


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
