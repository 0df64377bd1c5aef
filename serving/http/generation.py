"""From token events to text: what every generating route does between the engine and its bodies.

`generation` runs a `Call` and yields `Delta`s, the final text of each answer in pieces, with the
tokens behind it. Whatever ends it early (client, error, cancellation), the engine is told to forget
its requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from msgspec import UNSET, UnsetType

from serving.http.calls import Call, Job
from serving.http.errors import ApiError
from serving.http.metrics import RequestTimer
from serving.http.protocol import PromptTokensDetails, Usage
from serving.http.state import ServerState
from serving.messages import FirstToken, TokenEvent
from serving.request import Request
from serving.tokenizer import StopMatcher, Tokenizer

T = TypeVar("T")

REPLAY_TOKENS = 512
"""Of an answer that goes on, decoded in one go: other streams wait meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerToken:
    """A generated token and where its text begins, in characters of the answer.

    An echoed prompt is the beginning of the answer.
    """

    event: TokenEvent
    text_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New text of answer `index`, and its end where there is a finish reason.

    `tokens` are those generated since the last delta: their text may be held back (half a
    character, the beginning of a stop string), the stop token and stop strings are among them.
    `first` comes with the first delta of an answer, unless it was aborted before it had a token.
    `replayed` deltas are what the reader of a continued stream has already; an answer has at most
    one, at its beginning.
    """

    index: int
    text: str
    tokens: tuple[AnswerToken, ...]
    finish_reason: str | None = None
    matched_stop: str | int | None = None
    first: FirstToken | None = None
    replayed: bool = False


@dataclass(slots=True, kw_only=True)
class Answer:
    """The deltas of one answer put together."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[AnswerToken] = field(default_factory=list)
    finish_reason: str | None = None
    matched_stop: str | int | None = None
    first: FirstToken | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.tokens.extend(delta.tokens)
        self.finish_reason = delta.finish_reason
        self.matched_stop = delta.matched_stop
        self.first = self.first or delta.first


class Tally:
    """Counts the tokens of a call while its deltas pass.

    A prompt counts once, however many answers it gets. Its cached tokens are those of its first
    answer: the others find in the cache what that one has just computed.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._completion = [0] * len(call.jobs)
        self._cached = [0] * len(call.jobs)
        self._reasoning = [0] * len(call.jobs)

    def add(self, delta: Delta, reasoning_tokens: int = 0) -> None:
        self._completion[delta.index] += len(delta.tokens)
        self._reasoning[delta.index] += reasoning_tokens
        if delta.first is not None:
            # Of an answer that goes on, the engine finds tokens behind the prompt's too.
            num_prompt = len(self._call.jobs[delta.index].prompt)
            self._cached[delta.index] = min(delta.first.cached_tokens, num_prompt)

    def total(self) -> Usage:
        """Of the whole call so far."""
        once = slice(None, None, self._call.num_samples)
        return self._usage(
            sum(len(job.prompt) for job in self._call.jobs[once]),
            sum(self._completion),
            sum(self._cached[once]),
            sum(self._reasoning),
        )

    def of(self, index: int) -> Usage | None:
        """Of one answer so far, where every chunk tells it."""
        if not self._call.continuous_usage:
            return None
        num_prompt = len(self._call.jobs[index].prompt)
        counts = (self._completion[index], self._cached[index], self._reasoning[index])
        return self._usage(num_prompt, *counts)

    def _usage(
        self, prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int
    ) -> Usage:
        separated = self._call.reading.reasoning is not None
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
            reasoning_tokens=reasoning_tokens if separated else UNSET,
        )


def token_ids(call: Call, tokens: Sequence[AnswerToken]) -> list[int] | UnsetType:
    """The ids of generated tokens, where the call wants them reported."""
    if not call.token_ids:
        return UNSET
    return [token.event.token_id for token in tokens if token.event.token_id is not None]


@asynccontextmanager
async def generation(
    state: ServerState, call: Call
) -> AsyncIterator[tuple[str, AsyncGenerator[Delta, None]]]:
    """Run a call: its answer id and its deltas, those of several answers interleaved.

    Raises:
        ApiError: the id is taken; or, from the deltas, a request failed in the engine.
        EngineFailed: the engine is gone.
    """
    with state.claim(call.id_prefix, call.rid, call.request_id) as (answer_id, engine_rid):
        answers = [
            _deltas(state, i, job, _request(f"{engine_rid}.{i}", job, call), call)
            for i, job in enumerate(call.jobs)
        ]
        async with aclosing(answers[0] if len(answers) == 1 else merged(answers)) as deltas:
            yield answer_id, deltas


def _request(rid: str, job: Job, call: Call) -> Request:
    return Request(
        rid=rid,
        prompt=job.prompt,
        sampling=job.sampling,
        answer=job.begun,
        priority=call.routing.priority,
        dp_rank=call.routing.dp_rank,
        cache_key=call.routing.cache_key,
        prompt_logprobs=call.logprobs if job.scored or job.echo is not None else None,
    )


async def complete(deltas: AsyncGenerator[Delta, None], call: Call) -> tuple[list[Answer], Usage]:
    """All answers, whole, and how many tokens they took."""
    answers = [Answer() for _ in call.jobs]
    tally = Tally(call)
    async for delta in deltas:
        answers[delta.index].add(delta)
        tally.add(delta)
    return answers, tally.total()


async def _deltas(
    state: ServerState, index: int, job: Job, request: Request, call: Call
) -> AsyncGenerator[Delta, None]:
    """The deltas of one request. Leaving before its end aborts it in the engine."""
    decoder = _AnswerDecoder(state.tokenizer, job, call)
    if call.continued:
        yield await _replay(index, job, request.rid, decoder)
        if job.finished:
            return
    num_prompt = len(job.prompt) + len(job.begun)
    timer = RequestTimer(state.metrics, began=call.began, num_prompt=num_prompt)
    first: FirstToken | None = None  # until a delta takes it along
    tokens: list[AnswerToken] = []
    async with aclosing(state.engine.generate(request)) as events:
        async for event in events:
            if event.finish_reason == "error":
                raise _engine_error(event)
            first = event.first or first
            if event.token_id is not None:
                timer.token(event, state.timer())
                if not job.score_only:
                    tokens.append(AnswerToken(event=event, text_offset=decoder.num_chars))
            text, reason, matched = decoder.push(event)
            if reason is not None and reason != "abort":
                timer.end(state.timer())
                if event.finish_reason is None:  # a stop string, which the engine does not know
                    state.engine.finish(request.rid)
            if text or reason is not None:
                yield Delta(
                    index=index,
                    text=text,
                    tokens=tuple(tokens),
                    finish_reason=reason,
                    matched_stop=matched,
                    first=first,
                )
                tokens.clear()
                first = None
            if reason is not None:
                return


async def _replay(index: int, job: Job, rid: str, decoder: _AnswerDecoder) -> Delta:
    """What the reader of an answer has of it. Brings the decoder to where the answer goes on."""
    pieces, tokens, matched = [], [], None
    for number, token_id in enumerate(job.begun):
        if number and number % REPLAY_TOKENS == 0:
            await asyncio.sleep(0)
        event = TokenEvent(rid, token_id)
        tokens.append(AnswerToken(event=event, text_offset=decoder.num_chars))
        text, _, matched = decoder.push(event)
        pieces.append(text)
        if matched is not None and not job.finished:
            raise ApiError(
                f"continue_from[{index}] holds the stop string {matched!r}: the answer cannot go "
                "on.",
                param="continue_from",
            )
    return Delta(index=index, text="".join(pieces), tokens=tuple(tokens), replayed=True)


class _AnswerDecoder:
    """Turns the tokens of one answer into text, up to a stop string or the engine's end.

    Attributes:
        num_chars: characters decoded so far, the echoed prompt's and held back ones included.
    """

    def __init__(self, tokenizer: Tokenizer, job: Job, call: Call) -> None:
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=call.skip_special_tokens,
            keep=tokenizer.special_ids(call.reading.markers).values(),
        )
        self._matcher = StopMatcher(call.stops)
        self._keep_stop = call.keep_stop
        self._stop_ids = job.sampling.stop_token_ids
        self._score_only = job.score_only
        self.num_chars = 0 if job.echo is None else len(job.echo.text)

    def push(self, event: TokenEvent) -> tuple[str, str | None, str | int | None]:
        """The text that is final now, the finish reason, and the stop string or token found."""
        reason = event.finish_reason
        if self._score_only:
            return "", "length" if reason == "stop" else reason, None
        # An answer may also stop because its grammar is complete: its last token is text then.
        stopped = reason == "stop" and event.token_id in self._stop_ids
        new = ""
        if event.token_id is not None and (self._keep_stop or not stopped):
            new = self._detokenizer.push(event.token_id)
        if reason is not None:
            new += self._detokenizer.flush()
        self.num_chars += len(new)
        text, matched = self._matcher.push(new)
        if matched is not None:
            return text + matched if self._keep_stop else text, "stop", matched
        if reason is not None:
            text += self._matcher.flush()
        return text, reason, event.token_id if stopped else None


def _engine_error(event: TokenEvent) -> ApiError:
    """The answer to a request that the engine refused or could not go on with."""
    match event.status:
        case 503:
            message = event.message or "The request queue is full."
            return ApiError(message, status=503, kind="ServiceUnavailableError")
        case 400:
            return ApiError(event.message or "The engine refuses this request.")
        case _:
            message = event.message or "The engine could not serve this request."
            return ApiError(message, status=500, kind="InternalServerError")


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of several generators as they come; the first error ends all."""
    queue: asyncio.Queue[_Item[T] | Exception | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    queue.put_nowait(_Item(item))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item.value
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Item(Generic[T]):
    """Something of a source, whatever its type, in a queue that also holds errors and ends."""

    value: T
