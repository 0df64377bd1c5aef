"""POST /generate: SGLang's own way to generate, one prompt or a batch, text or token ids.

Each prompt of a body becomes a `Call` of its own, with its own id, parameters and stops; they run
side by side. Streams tell the whole answer so far in every event, as SGLang does, unless
--incremental-streaming-output asks for the new pieces only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from serving.engine_client import EngineFailed
from serving.http.calls import Call, Job, check_num_answers, check_num_tokens, make_call
from serving.http.completions import MAX_PROMPTS
from serving.http.constraints import check_constraint, constraint
from serving.http.errors import ApiError, json_response, to_api_error
from serving.http.generation import Delta, generation, merged
from serving.http.native_answer import GrowingAnswer
from serving.http.native_protocol import (
    NATIVE_NOT_SERVED_YET,
    SAMPLING_NOT_SERVED_YET,
    GenerateBody,
    Generated,
    SamplingBody,
)
from serving.http.offload import off_loop
from serving.http.protocol import ErrorEvent, GenerationBody, read_body, refuse
from serving.http.sampling import (
    SamplingDefaults,
    check_max_tokens,
    check_prompt,
    check_ranges,
    num_samples,
    samples,
    sampling_params,
)
from serving.http.sse import Events, stream, unless_disconnected
from serving.http.state import ServerState
from serving.request import MAX_TOP_LOGPROBS, SamplingParams

T = TypeVar("T")

DEFAULT_MAX_NEW_TOKENS = 128
"""Or what the context has room for behind the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One prompt of a body, checked.

    Attributes:
        body: its parameters under the names of the other generating routes.
        start: first prompt token whose log probability is reported, None to report none.
    """

    call: Call
    body: GenerationBody
    start: int | None


async def generate(state: ServerState, request: Request) -> Response:
    """Check the body, generate, answer: an object for one answer, else a list."""
    began = state.timer()
    try:
        body = await read_body(request, GenerateBody)
        wanted = await off_loop(
            state.slow_lane, request, to_calls, state, body, request.headers, began
        )
        await _check_constraints(state, request, wanted)
        listed = _is_batch(body) or wanted[0].call.num_samples > 1
        with_text = bool(body.return_text_in_logprobs)
        if body.stream:
            events = _events(state, wanted, listed=listed, with_text=with_text)
            return await stream(request, events)
        work = _generated(state, wanted, with_text=with_text)
        answers = await unless_disconnected(request.receive, work)
        return json_response(answers if listed else answers[0])
    except (ApiError, EngineFailed) as problem:
        error = to_api_error(problem)
        return json_response(ErrorEvent(error=error.body), error.status)


def to_calls(
    state: ServerState, body: GenerateBody, headers: Mapping[str, str], began: float
) -> list[Wanted]:
    """The checked form of a body, but for its grammars, which take longer.

    Raises:
        ApiError: a value is out of range, or prompt and answer do not fit the model.
    """
    refuse(body, NATIVE_NOT_SERVED_YET)
    prompts = _prompts(state, body)
    num_prompts = len(prompts)
    given = body.sampling_params or SamplingBody()
    params = _each("sampling_params", given, num_prompts)
    bodies = [_as_body(one, body) for one in params]
    num = num_samples(bodies[0])
    if any(num_samples(one) != num for one in bodies):
        raise ApiError(
            "The parallel_sample_num should be the same for all samples in sample params: "
            "sampling_params must agree in n.",
            param="sampling_params",
        )
    check_num_answers(num_prompts, num)
    check_num_tokens(sum(map(len, prompts)), num_prompts, num, param=_prompt_field(body))
    for one, rid, begun in zip(
        bodies, _rids(body, num_prompts), _begun(body, num_prompts, num), strict=True
    ):
        one.rid, one.continue_from = rid, begun
    logprobs = _logprobs_wanted(body, prompts)
    return [
        _wanted(state, prompt, one, number, start, headers, began, param=_prompt_field(body))
        for prompt, one, (number, start) in zip(prompts, bodies, logprobs, strict=True)
    ]


def _wanted(
    state: ServerState,
    prompt: Sequence[int],
    body: GenerationBody,
    logprobs: int | None,
    start: int | None,
    headers: Mapping[str, str],
    began: float,
    *,
    param: str,
) -> Wanted:
    context, vocab_size = state.engine.ready.max_context_tokens, state.tokenizer.vocab_size
    check_ranges(body)
    check_prompt(prompt, vocab_size=vocab_size, context=context, param=param)
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = min(DEFAULT_MAX_NEW_TOKENS, context - len(prompt))
    if max_tokens < 0:
        raise ApiError(
            f"max_new_tokens must be at least 0, got {max_tokens}.", param="max_new_tokens"
        )
    score_only = max_tokens == 0
    max_tokens = max_tokens or 1
    check_max_tokens(max_tokens, num_prompt=len(prompt), context=context, param="max_new_tokens")
    sampling = sampling_params(
        body,
        defaults=SamplingDefaults(),
        tokenizer=state.tokenizer,
        max_tokens=max_tokens,
        logprobs=logprobs,
        seeds=state.seeds,
        grammar=constraint(body),
    )
    if score_only:  # the dropped token is the cheapest there is
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
    ids = tuple(prompt)
    jobs = [
        Job(prompt=ids, sampling=sample, score_only=score_only, scored=start is not None)
        for sample in samples(sampling, num_samples(body))
    ]
    call = make_call(
        state, body, headers, began=began, id_prefix="gen", jobs=jobs, logprobs=logprobs
    )
    return Wanted(call=call, body=body, start=start)


def _is_batch(body: GenerateBody) -> bool:
    """Whether several prompts were given, if only one in a list."""
    if body.text is not None:
        return isinstance(body.text, list)
    return bool(body.input_ids) and isinstance((body.input_ids or [0])[0], list)


def _prompt_field(body: GenerateBody) -> str:
    return "input_ids" if body.text is None else "text"


def _prompts(state: ServerState, body: GenerateBody) -> list[list[int]]:
    """The token ids of each prompt."""
    if (body.text is None) == (body.input_ids is None):
        raise ApiError("Exactly one of 'text' or 'input_ids' must be provided.", param="text")
    field = _prompt_field(body)
    if not (body.text or body.input_ids):
        raise ApiError("Prompt cannot be empty", param=field)
    if body.text is not None:
        texts = [body.text] if isinstance(body.text, str) else body.text
        _check_num_prompts(len(texts), field)
        if not all(texts):
            raise ApiError("Prompt cannot be empty", param=field)
        return [state.tokenizer.encode(text) for text in texts]
    items = body.input_ids or []
    ids = [item for item in items if isinstance(item, int)]
    if len(ids) == len(items):
        return [ids]
    lists = [item for item in items if isinstance(item, list)]
    if len(lists) != len(items):
        raise ApiError(
            "input_ids must be a list of token ids or a list of such lists, not a mixture.",
            param=field,
        )
    _check_num_prompts(len(lists), field)
    return lists


def _check_num_prompts(num: int, field: str) -> None:
    if num > MAX_PROMPTS:
        raise ApiError(
            f"{field} must be a list of at most {MAX_PROMPTS} prompts, got {num}.", param=field
        )


def _each(name: str, value: T | list[T], num: int) -> list[T]:
    """The value of each prompt, from one for all of them or a list."""
    if not isinstance(value, list):
        return [value] * num
    if len(value) != num:
        raise ApiError(
            f"{name} must have an entry for each of the {num} prompts, got {len(value)}.",
            param=name,
        )
    return value


def _rids(body: GenerateBody, num: int) -> list[str | None]:
    """The ids asked for; one for a whole batch is numbered."""
    if isinstance(body.rid, str) and _is_batch(body):
        return [f"{body.rid}_{i}" for i in range(num)]
    rids: list[str | None] = _each("rid", body.rid, num)  # type: ignore[arg-type]
    if isinstance(body.rid, list) and len(set(body.rid)) < num:
        raise ApiError("rid must be a different id for each prompt.", param="rid")
    return rids


def _begun(body: GenerateBody, num_prompts: int, num: int) -> list[Any]:
    """The entries of `continue_from` that belong to each prompt."""
    given = body.continue_from
    if given is None:
        return [None] * num_prompts
    if len(given) != num_prompts * num:
        raise ApiError(
            f"continue_from must have an entry for each of the {num_prompts * num} answers, got "
            f"{len(given)}.",
            param="continue_from",
        )
    return [given[i * num : (i + 1) * num] for i in range(num_prompts)]


def _logprobs_wanted(
    body: GenerateBody, prompts: Sequence[Sequence[int]]
) -> list[tuple[int | None, int | None]]:
    """Of each prompt: how many alternatives to report, and from which prompt token on."""
    num = len(prompts)
    wanted: list[tuple[int | None, int | None]] = []
    returns = _each("return_logprob", body.return_logprob or False, num)
    starts = _each("logprob_start_len", -1 if (s := body.logprob_start_len) is None else s, num)
    tops = _each("top_logprobs_num", body.top_logprobs_num or 0, num)
    for prompt, told, start, top in zip(prompts, returns, starts, tops, strict=True):
        if not 0 <= top <= MAX_TOP_LOGPROBS:
            raise ApiError(
                f"top_logprobs_num must be in [0, {MAX_TOP_LOGPROBS}], got {top}.",
                param="top_logprobs_num",
            )
        if not -1 <= start <= len(prompt):
            raise ApiError(
                "logprob_start_len must be -1 (the answer only) or a position in the prompt of "
                f"{len(prompt)} tokens, got {start}.",
                param="logprob_start_len",
            )
        if told and body.continue_from is not None:
            raise ApiError(
                "continue_from and return_logprob cannot be used together: the log probabilities "
                "of the answer's beginning are not known here.",
                param="continue_from",
            )
        wanted.append((top if told else None, start if told and start >= 0 else None))
    return wanted


def _as_body(params: SamplingBody, body: GenerateBody) -> GenerationBody:
    """The parameters of a prompt under the names of the other generating routes."""
    refuse(params, SAMPLING_NOT_SERVED_YET)
    return GenerationBody(
        max_tokens=params.max_new_tokens,
        min_tokens=params.min_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        no_stop_trim=params.no_stop_trim,
        ignore_eos=params.ignore_eos,
        skip_special_tokens=params.skip_special_tokens,
        n=params.n,
        seed=params.seed if params.sampling_seed is None else params.sampling_seed,
        json_schema=params.json_schema,
        regex=params.regex,
        ebnf=params.ebnf,
        stream=body.stream,
        routed_dp_rank=body.routed_dp_rank,
        data_parallel_rank=body.data_parallel_rank,
        priority=body.priority,
        extra_key=body.extra_key,
        cache_salt=body.cache_salt,
    )


async def _check_constraints(
    state: ServerState, request: Request, wanted: Sequence[Wanted]
) -> None:
    """Check each different grammar once, for all answers that follow it."""
    groups: dict[Any, list[Wanted]] = {}
    for one in wanted:
        groups.setdefault(one.call.jobs[0].sampling.grammar, []).append(one)
    for grammar, group in groups.items():
        if grammar is not None:
            calls = [one.call for one in group]
            await check_constraint(request, group[0].body, state.grammars, calls)


@asynccontextmanager
async def _running(
    state: ServerState, wanted: Sequence[Wanted]
) -> AsyncGenerator[tuple[list[str], AsyncGenerator[tuple[int, Delta], None]], None]:
    """The ids of the prompts, and the deltas of all with the number of their prompt."""
    async with AsyncExitStack() as stack:
        ids, sources = [], []
        for number, one in enumerate(wanted):
            answer_id, deltas = await stack.enter_async_context(generation(state, one.call))
            ids.append(answer_id)
            sources.append(_numbered(number, deltas))
        together = sources[0] if len(sources) == 1 else merged(sources)
        yield ids, await stack.enter_async_context(aclosing(together))


async def _numbered(
    number: int, deltas: AsyncGenerator[Delta, None]
) -> AsyncGenerator[tuple[int, Delta], None]:
    async for delta in deltas:
        yield number, delta


async def _generated(
    state: ServerState, wanted: Sequence[Wanted], *, with_text: bool
) -> list[Generated]:
    """All answers, those of one prompt next to each other."""
    async with _running(state, wanted) as (ids, deltas):
        answers = _answers(state, wanted, ids, with_text=with_text)
        async for number, delta in deltas:
            answers[number][delta.index].add(delta)
    return [answer.told() for of_prompt in answers for answer in of_prompt]


async def _events(
    state: ServerState, wanted: Sequence[Wanted], *, listed: bool, with_text: bool
) -> Events:
    """Every event is an answer so far; where there are several, they are numbered."""
    incremental = state.config.incremental_streaming_output
    async with _running(state, wanted) as (ids, deltas):
        answers = _answers(state, wanted, ids, with_text=with_text, incremental=incremental)
        async for number, delta in deltas:
            answer = answers[number][delta.index]
            answer.add(delta)
            if delta.replayed:
                continue
            event = answer.told()
            if listed:
                event.index = number * len(answers[number]) + delta.index
            yield event


def _answers(
    state: ServerState,
    wanted: Sequence[Wanted],
    ids: Sequence[str],
    *,
    with_text: bool,
    incremental: bool = False,
) -> list[list[GrowingAnswer]]:
    """The answers of each prompt, empty."""
    return [
        [
            GrowingAnswer(
                state,
                one.call,
                answer_id,
                start=one.start,
                with_text=with_text,
                incremental=incremental,
            )
            for _ in one.call.jobs
        ]
        for one, answer_id in zip(wanted, ids, strict=True)
    ]
