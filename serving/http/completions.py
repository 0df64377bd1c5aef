"""POST /v1/completions: text or token ids in, text out, one answer or more for each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.requests import Request
from starlette.responses import Response

from serving.http.calls import Call, Job, check_num_answers, check_num_tokens, make_call
from serving.http.constraints import check_constraint, constraint
from serving.http.echo import echo_of
from serving.http.errors import ApiError, json_response
from serving.http.generation import (
    Answer,
    AnswerToken,
    Delta,
    Tally,
    complete,
    generation,
    token_ids,
)
from serving.http.offload import off_loop
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
    num_samples,
    samples,
    sampling_params,
)
from serving.http.sse import Events, stream, unless_disconnected
from serving.http.state import WEIGHT_VERSION, ServerState
from serving.request import Grammar, SamplingParams
from serving.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5
MAX_PROMPTS = 1024


async def create_completion(state: ServerState, request: Request) -> Response:
    """Check the body, generate, answer."""
    began = state.timer()
    body = await read_body(request, CompletionBody)
    call = await off_loop(state.slow_lane, request, to_call, state, body, request.headers, began)
    await check_constraint(request, body, state.grammars, [call])
    if call.stream:
        return await stream(request, _chunks(state, call))
    answer = await unless_disconnected(request.receive, _completion(state, call))
    return json_response(answer)


def to_call(
    state: ServerState, body: CompletionBody, headers: Mapping[str, str], began: float
) -> Call:
    """The checked form of a body, but for its grammar, which takes longer.

    Raises:
        ApiError: a value is out of range, or prompt and answer do not fit the model.
    """
    check_ranges(body)
    refuse_not_served(body)
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
        raise ApiError(
            f"logprobs must be in [0, {MAX_LOGPROBS}], got {body.logprobs}.", param="logprobs"
        )
    num = num_samples(body)
    grammar = constraint(body)
    prompts = _prompts(body.prompt, state.tokenizer)
    check_num_answers(len(prompts), num)
    num_tokens = sum(len(ids) for _, ids in prompts)
    check_num_tokens(num_tokens, len(prompts), num, param="prompt")
    jobs = [job for text, ids in prompts for job in _jobs(state, body, text, ids, num, grammar)]
    return make_call(
        state,
        body,
        headers,
        began=began,
        id_prefix="cmpl",
        jobs=jobs,
        logprobs=body.logprobs,
    )


def _jobs(
    state: ServerState,
    body: CompletionBody,
    text: str | None,
    prompt: Sequence[int],
    num: int,
    grammar: Grammar | None,
) -> list[Job]:
    """The answers to one prompt, `text` if it was one."""
    tokenizer, context = state.tokenizer, state.engine.ready.max_context_tokens
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    score_only = bool(body.echo) and max_tokens == 0
    if max_tokens == 0 and not score_only:
        raise ApiError(
            "max_tokens must be positive, got 0 (which is possible with echo).", param="max_tokens"
        )
    max_tokens = 1 if score_only else max_tokens
    if score_only and len(prompt) == context:
        raise ApiError(
            f"The input ({len(prompt)} tokens) fills the model's context length: scoring with "
            "max_tokens 0 needs room for one token that is generated and dropped, so that at most "
            f"{context - 1} prompt tokens are possible.",
            param="prompt",
        )
    check_prompt(prompt, vocab_size=tokenizer.vocab_size, context=context, param="prompt")
    check_max_tokens(max_tokens, num_prompt=len(prompt), context=context, param="max_tokens")
    sampling = sampling_params(
        body,
        defaults=state.defaults,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        seeds=state.seeds,
        grammar=grammar,
    )
    if score_only:  # the dropped token is the cheapest there is
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
    echo = None
    if body.echo:
        echo = echo_of(
            prompt,
            text,
            tokenizer,
            skip_special_tokens=body.skip_special_tokens is not False,
            with_offsets=body.logprobs is not None,
        )
    ids = tuple(prompt)
    return [
        Job(prompt=ids, sampling=sample, echo=echo, score_only=score_only)
        for sample in samples(sampling, num)
    ]


def _prompts(
    prompt: str | list[str | int | list[int]] | None, tokenizer: Tokenizer
) -> list[tuple[str | None, list[int]]]:
    """The text of each prompt, where it is one, and its token ids."""
    if prompt is None:
        raise ApiError("prompt is missing.", param="prompt")
    if not prompt:
        raise ApiError("Prompt cannot be empty", param="prompt")
    if isinstance(prompt, str):
        return [(prompt, tokenizer.encode(prompt))]
    if len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
        raise ApiError(
            f"prompt must be a list of at most {MAX_PROMPTS} prompts, got {len(prompt)}.",
            param="prompt",
        )
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [(None, ids)]
    texts = [item for item in prompt if isinstance(item, str)]
    if len(texts) == len(prompt):
        if not all(texts):
            raise ApiError("Prompt cannot be empty", param="prompt")
        return [(text, tokenizer.encode(text)) for text in texts]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(lists) == len(prompt):
        return [(None, ids) for ids in lists]
    raise ApiError(
        "prompt must be a string, a list of strings, a list of token ids or a list of lists of "
        "token ids, not a mixture.",
        param="prompt",
    )


async def _completion(state: ServerState, call: Call) -> Completion:
    async with generation(state, call) as (answer_id, deltas):
        answers, usage = await complete(deltas, call)
    return Completion(
        id=answer_id,
        created=int(state.clock()),
        model=call.model,
        choices=[
            CompletionChoice(
                index=i,
                text=answer.text if job.echo is None else job.echo.text + answer.text,
                logprobs=_joined(
                    _prompt_logprobs(state.tokenizer, call, job, answer),
                    _logprobs(state.tokenizer, call, answer.tokens),
                ),
                finish_reason=answer.finish_reason,
                matched_stop=answer.matched_stop,
                token_ids=token_ids(call, answer.tokens),
            )
            for i, (job, answer) in enumerate(zip(call.jobs, answers, strict=True))
        ],
        usage=usage,
        metadata={"weight_version": WEIGHT_VERSION},
    )


async def _chunks(state: ServerState, call: Call) -> Events:
    tally = Tally(call)
    created = int(state.clock())
    echoed: set[int] = set()
    async with generation(state, call) as (answer_id, deltas):

        def chunk(choice: CompletionChoice) -> Completion:
            return Completion(
                id=answer_id,
                created=created,
                model=call.model,
                choices=[choice],
                usage=tally.of(choice.index),
            )

        async for delta in deltas:
            job = call.jobs[delta.index]
            tally.add(delta)
            if delta.replayed:
                continue
            if job.echo is not None and delta.index not in echoed:
                echoed.add(delta.index)
                scores = _prompt_logprobs(state.tokenizer, call, job, delta)
                yield chunk(
                    CompletionChoice(index=delta.index, text=job.echo.text, logprobs=scores)
                )
            yield chunk(
                CompletionChoice(
                    index=delta.index,
                    text=delta.text,
                    logprobs=_logprobs(state.tokenizer, call, delta.tokens),
                    finish_reason=delta.finish_reason,
                    matched_stop=delta.matched_stop,
                    token_ids=token_ids(call, delta.tokens),
                )
            )
    if call.include_usage:
        yield Completion(
            id=answer_id,
            created=created,
            model=call.model,
            choices=[],
            usage=tally.total(),
        )


def _logprobs(
    tokenizer: Tokenizer, call: Call, tokens: Sequence[AnswerToken]
) -> CompletionLogprobs | None:
    """Of generated tokens."""
    if call.logprobs is None:
        return None
    names = [_token_name(tokenizer, token.event.token_id) for token in tokens]
    logprobs = [token.event.logprob for token in tokens]
    tops = [token.event.top_logprobs or [] for token in tokens]
    return CompletionLogprobs(
        text_offset=[token.text_offset for token in tokens],
        token_logprobs=logprobs,
        tokens=names,
        top_logprobs=_top_logprobs(tokenizer, call, names, logprobs, tops),
    )


def _prompt_logprobs(
    tokenizer: Tokenizer, call: Call, job: Job, answer: Answer | Delta
) -> CompletionLogprobs | None:
    """Of the prompt that an answer echoes; the prompt's first token has none.

    None also for an answer that was aborted before its prompt was scored.

    Raises:
        ApiError: the engine did not score what it was asked to score.
    """
    if job.echo is None or call.logprobs is None:
        return None
    if answer.first is None and answer.finish_reason == "abort":
        return None
    scores = None if answer.first is None else answer.first.prompt_scores
    if scores is None or len(scores) != len(job.prompt) - 1:
        raise ApiError(
            "The engine did not score the prompt.", status=500, kind="InternalServerError"
        )
    names = [_token_name(tokenizer, token_id) for token_id in job.prompt]
    logprobs = [score.logprob for score in scores]
    tops = [score.top_logprobs for score in scores]
    top = _top_logprobs(tokenizer, call, names[1:], logprobs, tops)
    return CompletionLogprobs(
        text_offset=list(job.echo.offsets),
        token_logprobs=[None, *logprobs],
        tokens=names,
        top_logprobs=None if top is None else [None, *top],
    )


def _top_logprobs(
    tokenizer: Tokenizer,
    call: Call,
    names: Sequence[str],
    logprobs: Sequence[float | None],
    tops: Sequence[Sequence[tuple[int, float]]],
) -> list[dict[str, float] | None] | None:
    """The alternatives of each token by name, the token itself always among them."""
    if not call.logprobs:
        return None
    named: list[dict[str, float] | None] = []
    for name, logprob, top in zip(names, logprobs, tops, strict=True):
        best = {_token_name(tokenizer, i): p for i, p in top}
        if logprob is not None:
            best.setdefault(name, logprob)
        named.append(best)
    return named


def _joined(
    prompt: CompletionLogprobs | None, answer: CompletionLogprobs | None
) -> CompletionLogprobs | None:
    if prompt is None or answer is None:
        return answer
    top = None
    if prompt.top_logprobs is not None and answer.top_logprobs is not None:
        top = prompt.top_logprobs + answer.top_logprobs
    return CompletionLogprobs(
        text_offset=prompt.text_offset + answer.text_offset,
        token_logprobs=prompt.token_logprobs + answer.token_logprobs,
        tokens=prompt.tokens + answer.tokens,
        top_logprobs=top,
    )


def _token_name(tokenizer: Tokenizer, token_id: int | None) -> str:
    """A token as text; OpenAI's spelling for bytes that are no characters keeps names unique."""
    content = b"" if token_id is None else tokenizer.token_bytes(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
