"""From token events to text: what every generating route does between the engine and its bodies.

A `Call` is a validated HTTP request: one or more prompts with their parameters. `generation` runs
it and yields `Delta`s, the final text of each answer in pieces, with the tokens behind it.
Whatever ends it early (client, error, cancellation), the engine is told to forget its requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from serving.http.errors import ApiError
from serving.http.protocol import Usage
from serving.http.state import ServerState
from serving.messages import TokenEvent
from serving.request import Request, SamplingParams
from serving.tokenizer import StopMatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt of a call."""

    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request that generates, checked.

    Attributes:
        id_prefix: what fresh answer ids begin with.
        rid: the id that the body asks for.
        request_id: the x-request-id header.
        model: the name to echo.
        stops: stop strings, the same for every prompt.
        include_usage: end a stream with a usage chunk.
        skip_special_tokens: leave special tokens out of the answer's text.
    """

    id_prefix: str
    rid: str | None
    request_id: str | None
    model: str
    jobs: tuple[Job, ...]
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    skip_special_tokens: bool

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(job.prompt) for job in self.jobs)

    def usage(self, num_completion_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=num_completion_tokens,
            total_tokens=self.num_prompt_tokens + num_completion_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerToken:
    """A generated token and where its text begins, in characters of the answer."""

    event: TokenEvent
    text_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New text of answer `index`, and its end where there is a finish reason.

    `tokens` are those generated since the last delta: their text may be held back (half a
    character, the beginning of a stop string), the stop token and stop strings are among them.
    """

    index: int
    text: str
    tokens: tuple[AnswerToken, ...]
    finish_reason: str | None = None
    matched_stop: str | int | None = None


@dataclass(slots=True, kw_only=True)
class Answer:
    """The deltas of one answer put together."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[AnswerToken] = field(default_factory=list)
    finish_reason: str | None = None
    matched_stop: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.tokens.extend(delta.tokens)
        self.finish_reason = delta.finish_reason
        self.matched_stop = delta.matched_stop


@asynccontextmanager
async def generation(
    state: ServerState, call: Call
) -> AsyncIterator[tuple[str, AsyncGenerator[Delta, None]]]:
    """Run a call: its answer id and its deltas, those of several prompts interleaved.

    Raises:
        ApiError: the id is taken; or, from the deltas, a request failed in the engine.
        EngineFailed: the engine is gone.
    """
    with state.claim(call.id_prefix, call.rid, call.request_id) as (answer_id, engine_rid):
        requests = [
            Request(rid=f"{engine_rid}.{i}", prompt=job.prompt, sampling=job.sampling)
            for i, job in enumerate(call.jobs)
        ]
        answers = [_deltas(state, i, request, call) for i, request in enumerate(requests)]
        async with aclosing(answers[0] if len(answers) == 1 else _merge(answers)) as deltas:
            yield answer_id, deltas


async def complete(
    deltas: AsyncGenerator[Delta, None], num_answers: int
) -> tuple[list[Answer], int]:
    """All answers, whole, and how many tokens they took."""
    answers = [Answer() for _ in range(num_answers)]
    async for delta in deltas:
        answers[delta.index].add(delta)
    return answers, sum(len(answer.tokens) for answer in answers)


async def _deltas(
    state: ServerState, index: int, request: Request, call: Call
) -> AsyncGenerator[Delta, None]:
    """The deltas of one request. Leaving before its end aborts it in the engine."""
    detokenizer = state.tokenizer.detokenizer(skip_special_tokens=call.skip_special_tokens)
    matcher = StopMatcher(call.stops)
    num_chars = 0  # decoded so far, whether handed out or held back
    tokens: list[AnswerToken] = []
    async with aclosing(state.engine.generate(request)) as events:
        async for event in events:
            if event.finish_reason == "error":
                raise _engine_error(event)
            if event.token_id is not None:
                tokens.append(AnswerToken(event=event, text_offset=num_chars))
            stopped = event.finish_reason == "stop"
            new = "" if stopped or event.token_id is None else detokenizer.push(event.token_id)
            if event.finish_reason is not None:
                new += detokenizer.flush()
            num_chars += len(new)
            text, matched = matcher.push(new)
            if matched is not None:
                yield Delta(
                    index=index,
                    text=text,
                    tokens=tuple(tokens),
                    finish_reason="stop",
                    matched_stop=matched,
                )
                return
            if event.finish_reason is not None:
                text += matcher.flush()
            if text or event.finish_reason is not None:
                yield Delta(
                    index=index,
                    text=text,
                    tokens=tuple(tokens),
                    finish_reason=event.finish_reason,
                    matched_stop=event.token_id if stopped else None,
                )
                tokens.clear()


def _engine_error(event: TokenEvent) -> ApiError:
    message = event.message or "The engine could not serve this request."
    return ApiError(message, status=500, kind="InternalServerError")


async def _merge(answers: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """The deltas of several answers as they come; the first error ends all."""
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    async def pump(answer: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(answer):
                async for delta in answer:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(answer)) for answer in answers]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
