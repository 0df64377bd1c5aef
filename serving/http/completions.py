"""POST /v1/completions: text or token ids in, text out, one answer for each prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from serving.http.constraints import checked_constraint
from serving.http.errors import ApiError, json_response
from serving.http.generation import AnswerToken, Call, Job, complete, generation
from serving.http.protocol import (
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
    read_body,
    refuse_not_served,
)
from serving.http.sampling import (
    check_max_tokens,
    check_prompt,
    check_ranges,
    sampling_params,
    stop_strings,
)
from serving.http.sse import Events, stream, unless_disconnected
from serving.http.state import WEIGHT_VERSION, ServerState
from serving.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5
MAX_PROMPTS = 1024


async def create_completion(state: ServerState, request: Request) -> Response:
    """Check the body, generate, answer."""
    body = await read_body(request, CompletionBody)
    # Tokenising a long text takes seconds: other streams must not wait for it.
    call = await asyncio.to_thread(to_call, state, body, request.headers.get("x-request-id"))
    if call.stream:
        return await stream(request, _chunks(state, call))
    answer = await unless_disconnected(request.receive, _completion(state, call))
    return json_response(answer)


def to_call(state: ServerState, body: CompletionBody, request_id: str | None) -> Call:
    """The checked form of a body.

    Raises:
        ApiError: a value is out of range, or prompt and answer do not fit the model.
    """
    check_ranges(body)
    refuse_not_served(body)
    context = state.engine.ready.max_context_tokens
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
        raise ApiError(
            f"logprobs must be in [0, {MAX_LOGPROBS}], got {body.logprobs}.", param="logprobs"
        )
    grammar = checked_constraint(body, state.grammars)
    jobs = []
    for prompt in _prompts(body.prompt, state.tokenizer):
        check_prompt(prompt, vocab_size=state.tokenizer.vocab_size, context=context, param="prompt")
        check_max_tokens(max_tokens, num_prompt=len(prompt), context=context, param="max_tokens")
        sampling = sampling_params(
            body,
            defaults=state.defaults,
            tokenizer=state.tokenizer,
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            seeds=state.seeds,
            grammar=grammar,
        )
        jobs.append(Job(prompt=tuple(prompt), sampling=sampling))
    return Call(
        id_prefix="cmpl",
        rid=body.rid,
        request_id=request_id,
        model=body.model or state.config.model_name,
        jobs=tuple(jobs),
        stops=stop_strings(body),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _prompts(
    prompt: str | list[str | int | list[int]] | None, tokenizer: Tokenizer
) -> list[list[int]]:
    """The token ids of each prompt."""
    if prompt is None:
        raise ApiError("prompt is missing.", param="prompt")
    if not prompt:
        raise ApiError("Prompt cannot be empty", param="prompt")
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
        raise ApiError(
            f"prompt must be a list of at most {MAX_PROMPTS} prompts, got {len(prompt)}.",
            param="prompt",
        )
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    texts = [item for item in prompt if isinstance(item, str)]
    if len(texts) == len(prompt):
        if not all(texts):
            raise ApiError("Prompt cannot be empty", param="prompt")
        return [tokenizer.encode(text) for text in texts]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(lists) == len(prompt):
        return lists
    raise ApiError(
        "prompt must be a string, a list of strings, a list of token ids or a list of lists of "
        "token ids, not a mixture.",
        param="prompt",
    )


async def _completion(state: ServerState, call: Call) -> Completion:
    async with generation(state, call) as (answer_id, deltas):
        answers, num_tokens = await complete(deltas, len(call.jobs))
    return Completion(
        id=answer_id,
        created=int(state.clock()),
        model=call.model,
        choices=[
            CompletionChoice(
                index=i,
                text=answer.text,
                logprobs=_logprobs(state.tokenizer, call, answer.tokens),
                finish_reason=answer.finish_reason,
                matched_stop=answer.matched_stop,
            )
            for i, answer in enumerate(answers)
        ],
        usage=call.usage(num_tokens),
        metadata={"weight_version": WEIGHT_VERSION},
    )


async def _chunks(state: ServerState, call: Call) -> Events:
    num_tokens = 0
    created = int(state.clock())
    async with generation(state, call) as (answer_id, deltas):
        async for delta in deltas:
            num_tokens += len(delta.tokens)
            choice = CompletionChoice(
                index=delta.index,
                text=delta.text,
                logprobs=_logprobs(state.tokenizer, call, delta.tokens),
                finish_reason=delta.finish_reason,
                matched_stop=delta.matched_stop,
            )
            yield Completion(id=answer_id, created=created, model=call.model, choices=[choice])
    if call.include_usage:
        yield Completion(
            id=answer_id,
            created=created,
            model=call.model,
            choices=[],
            usage=call.usage(num_tokens),
        )


def _logprobs(
    tokenizer: Tokenizer, call: Call, tokens: Sequence[AnswerToken]
) -> CompletionLogprobs | None:
    num_top = call.jobs[0].sampling.logprobs
    if num_top is None:
        return None
    events = [(token.event, token.text_offset) for token in tokens]
    names = [_token_name(tokenizer, e.token_id) for e, _ in events]
    top: list[dict[str, float] | None] = []
    for name, (token_event, _) in zip(names, events, strict=True):
        best = {_token_name(tokenizer, i): p for i, p in token_event.top_logprobs or ()}
        if token_event.logprob is not None:
            best.setdefault(name, token_event.logprob)
        top.append(best)
    return CompletionLogprobs(
        text_offset=[offset for _, offset in events],
        token_logprobs=[token_event.logprob for token_event, _ in events],
        tokens=names,
        top_logprobs=top if num_top else None,
    )


def _token_name(tokenizer: Tokenizer, token_id: int | None) -> str:
    """A token as text; OpenAI's spelling for bytes that are no characters keeps names unique."""
    content = b"" if token_id is None else tokenizer.token_bytes(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
