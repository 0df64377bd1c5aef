"""A `Call` is one HTTP request that generates, checked: its prompts, parameters, way of answering.

Each prompt is as many `Job`s as answers are wanted of it; every job becomes one request of the
engine. Answer `prompt * n + sample` is that of `jobs[prompt * n + sample]`, as in the OpenAI API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from serving.http.errors import ApiError
from serving.http.protocol import GenerationBody
from serving.http.routing import Routing, routing
from serving.http.sampling import num_samples, stop_strings
from serving.http.state import ServerState
from serving.parsers.answer import Reading
from serving.request import SamplingParams

MAX_ANSWERS = 4096
"""Prompts times `n`: the most answers of one HTTP request."""
MAX_PROMPT_TOKENS = 1 << 22
"""Of all answers of one HTTP request: each of them brings its whole prompt to the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """A prompt as text, in front of the answer.

    Attributes:
        text: the prompt.
        offsets: where the text of each prompt token begins; empty without log probabilities.
    """

    text: str
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One answer of a call.

    Attributes:
        echo: the prompt's text, where the answer begins with it.
        score_only: nothing is generated but log probabilities of the prompt. The engine generates
            at least one token; it is dropped.
        scored: the prompt's tokens are scored even if it is not echoed.
        begun: tokens of the answer that its reader has; generation goes on behind them.
        finished: they are the whole answer.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    echo: Echo | None = None
    score_only: bool = False
    scored: bool = False
    begun: tuple[int, ...] = ()
    finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request that generates, checked.

    Attributes:
        began: when it arrived, by `ServerState.timer`.
        id_prefix: what fresh answer ids begin with.
        rid: the id that the body asks for.
        request_id: the x-request-id header.
        model: the name to echo.
        jobs: the answers wanted, those of one prompt next to each other.
        num_samples: how many answers each prompt gets.
        logprobs: how many alternatives to report for each token, None without log probabilities.
        stops: stop strings, the same for every prompt.
        keep_stop: the stop string or token that ends an answer is part of its text.
        include_usage: end a stream with a usage chunk.
        continuous_usage: every chunk of a stream tells the usage of its answer so far.
        skip_special_tokens: leave special tokens out of the answer's text.
        token_ids: report the ids of generated tokens. A stream then has one chunk for each piece of
            an answer, with all that belongs to it, so that it may break between any two chunks.
        continued: the stream goes on where another broke; `Job.begun` says where.
        reading: how a chat's answers are read.
    """

    began: float
    id_prefix: str
    rid: str | None
    request_id: str | None
    model: str
    jobs: tuple[Job, ...]
    num_samples: int
    logprobs: int | None
    routing: Routing
    stops: tuple[str, ...]
    keep_stop: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    skip_special_tokens: bool
    token_ids: bool = False
    continued: bool = False
    reading: Reading = field(default_factory=Reading)

    @property
    def num_constrained(self) -> int:
        """Answers that follow a grammar."""
        return sum(job.sampling.grammar is not None for job in self.jobs)


def make_call(
    state: ServerState,
    body: GenerationBody,
    headers: Mapping[str, str],
    *,
    began: float,
    id_prefix: str,
    jobs: Sequence[Job],
    logprobs: int | None,
    reading: Reading | None = None,
) -> Call:
    """What the generating routes have in common; `jobs` have been checked.

    Raises:
        ApiError: a stop string or a routing field is out of range, or `continue_from` does not fit
            the jobs.
    """
    options = body.stream_options
    if body.continue_from is not None:
        jobs = _continued(body, jobs, vocab_size=state.tokenizer.vocab_size)
    return Call(
        began=began,
        id_prefix=id_prefix,
        rid=body.rid,
        request_id=headers.get("x-request-id"),
        model=body.model or state.config.model_name,
        jobs=tuple(jobs),
        num_samples=num_samples(body),
        logprobs=logprobs,
        routing=routing(body, headers, num_slices=state.engine.ready.num_slices),
        stops=stop_strings(body),
        keep_stop=bool(body.no_stop_trim),
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        skip_special_tokens=body.skip_special_tokens is not False,
        token_ids=bool(body.return_token_ids),
        continued=body.continue_from is not None,
        reading=reading or Reading(),
    )


def _continued(body: GenerationBody, jobs: Sequence[Job], *, vocab_size: int) -> list[Job]:
    """The jobs as they go on from `continue_from`."""
    name, given = "continue_from", body.continue_from or []
    if not body.stream:
        raise ApiError(f"{name} needs stream to be true: it goes on with a stream.", param=name)
    if len(given) != len(jobs):
        raise ApiError(
            f"{name} must have an entry for each of the {len(jobs)} answers, got {len(given)}.",
            param=name,
        )
    continued = []
    for i, (begun, job) in enumerate(zip(given, jobs, strict=True)):
        ids, field = begun.token_ids, f"{name}[{i}]"
        if job.echo is not None:
            raise ApiError(f"{name} and echo cannot be used together.", param=name)
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise ApiError(
                    f"{field}.token_ids must be in [0, {vocab_size - 1}], got {token_id}.",
                    param=name,
                )
            if token_id in job.sampling.stop_token_ids and not begun.finished:
                raise ApiError(
                    f"{field}.token_ids holds {token_id}, which ends an answer: it cannot go on.",
                    param=name,
                )
        most = job.sampling.max_tokens - (not begun.finished)
        if len(ids) > most:
            raise ApiError(
                f"{field}.token_ids has {len(ids)} tokens, but the answer may have "
                f"{job.sampling.max_tokens} in all: it cannot go on.",
                param=name,
            )
        continued.append(replace(job, begun=tuple(ids), finished=begun.finished))
    return continued


def check_num_answers(num_prompts: int, num: int) -> None:
    """Raises ApiError if so many prompts with `num` answers each are too many."""
    if num_prompts * num > MAX_ANSWERS:
        raise ApiError(
            f"{num_prompts} prompts with n = {num} make {num_prompts * num} answers; one request "
            f"may ask for {MAX_ANSWERS}.",
            param="n",
        )


def check_num_tokens(num_prompt_tokens: int, num_prompts: int, num: int, *, param: str) -> None:
    """Raises ApiError if prompts of so many tokens together, with `num` answers each, are too much
    for one request. A single answer is bounded by the context alone.

    Args:
        param: the field of the prompts.
    """
    total = num_prompt_tokens * num
    if num_prompts * num > 1 and total > MAX_PROMPT_TOKENS:
        raise ApiError(
            f"{param} has {num_prompt_tokens} tokens, with n = {num} that makes {total} prompt "
            f"tokens over all answers; one request may bring {MAX_PROMPT_TOKENS}.",
            param="n" if num > 1 else param,
        )
