"""A fake engine: speaks `serving.messages` over the real socket, with tokens instead of a model.

The next token is a function of the context, so that an answer can be predicted; a test may hand
in its own function. `python -m tests.fakes SOCKET` is a whole engine process, which the model path
`fake:...` of its configuration tells how to misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from serving.config import ServerConfig
from serving.engine_client import EngineClient, engine_listener
from serving.messages import (
    HEADER,
    Abort,
    EngineStatus,
    Failed,
    FirstToken,
    FlushCache,
    Flushed,
    GetPulse,
    GetStatus,
    PromptScore,
    Pulse,
    Ready,
    Shutdown,
    SliceCounters,
    SliceStatus,
    StepOutput,
    Submit,
    TokenEvent,
    decode_to_engine,
    frame,
)
from serving.request import Request

NextToken = Callable[[Sequence[int]], int]

FIRST_TEXT_TOKEN = 9
"""Below are the special tokens of the fixtures' vocabularies (512 entries)."""
VOCAB_SIZE = 512


def next_token(context: Sequence[int]) -> int:
    """Any deterministic function of the whole context."""
    digest = zlib.crc32(msgspec.msgpack.encode(list(context)))
    return FIRST_TEXT_TOKEN + digest % (VOCAB_SIZE - FIRST_TEXT_TOKEN)


def answer(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens that a fake engine generates for a prompt."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


def scripted(tokens: Sequence[int], num_prompt: int | None = None) -> NextToken:
    """A next-token function that emits chosen tokens, whatever the prompt."""
    state = {"start": num_prompt}

    def choose(context: Sequence[int]) -> int:
        if state["start"] is None:
            state["start"] = len(context)
        return tokens[(len(context) - state["start"]) % len(tokens)]

    return choose


def prompt_scores(prompt: Sequence[int], num_top: int) -> list[PromptScore]:
    """The scores that a fake engine gives: -i for the token at position i, best first."""
    return [
        PromptScore(
            token, -float(i), [((token + k) % VOCAB_SIZE, -float(i + k)) for k in range(num_top)]
        )
        for i, token in enumerate(prompt)
        if i
    ]


class FakeEngine:
    """The engine's side of one connection.

    `delay_s` is the time of a step; `seen`, `aborted` and `finished` (by a stop
    string) record what the front asked for.
    Requests go to the slice that they name, else to slice 0 and 1 in turn; a prompt counts as
    cached, but for its last token, when the same tokens ran before under the same cache key.
    `error_at` fails a request after so many tokens, with `error_status` and `error_message`.
    `busy_s` is what a pulse tells, None to leave the question unanswered; `mute` leaves every
    question unanswered.
    """

    def __init__(
        self,
        *,
        next_token: NextToken = next_token,
        delay_s: float = 0.0,
        max_context_tokens: int = 256,
        failure: str | None = None,
        die_after_steps: int | None = None,
        error_at: int | None = None,
        error_status: int = 500,
        error_message: str | None = "The fake engine has had it.",
        hold: bool = False,
        busy_s: float | None = 0.0,
        mute: bool = False,
        details: dict[str, Any] | None = None,
    ) -> None:
        self.next_token = next_token
        self.delay_s = delay_s
        self.max_context_tokens = max_context_tokens
        self.failure = failure
        self.die_after_steps = die_after_steps
        self.error_at = error_at
        self.error_status = error_status
        self.error_message = error_message
        self.hold = hold
        self.busy_s = busy_s
        self.mute = mute
        self.details = details or {"device": "fake"}
        self.seen: list[Request] = []
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.running: dict[str, tuple[Request, list[int]]] = {}
        self.slice_of: dict[str, int] = {}
        self.counters: list[dict[str, int]] = [{}, {}]
        self.cache: set[tuple[str, tuple[int, ...]]] = set()
        self.grammar_queue = 0
        self.steps = 0
        self.shut_down = False
        self._wake = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None

    @property
    def ready(self) -> Ready:
        return Ready(
            max_context_tokens=self.max_context_tokens,
            max_total_tokens=4096,
            num_slices=2,
            topology="mesh dp2 ep1 tp1 on 2 fake devices",
            details=self.details,
        )

    async def serve(self, path: str) -> None:
        """Connect and answer until shut down, told to die, or hung up on."""
        reader, self._writer = await asyncio.open_unix_connection(path)
        if self.failure is not None:
            self._send(Failed(self.failure))
            await self._writer.drain()
            self._writer.close()
            return
        self._send(self.ready)
        steps = asyncio.create_task(self._run())
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while not self.shut_down:
                    (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
                    self._handle(decode_to_engine(await reader.readexactly(size)))
        finally:
            steps.cancel()
            self.die()

    def die(self) -> None:
        """Hang up without a word."""
        if self._writer is not None:
            self._writer.close()

    def send(self, message: Any) -> None:
        """Say anything, at any time."""
        self._send(message)

    def _send(self, message: Any) -> None:
        assert self._writer is not None
        self._writer.write(frame(message))

    def _handle(self, message: Any) -> None:
        match message:
            case Submit(request=request):
                self.seen.append(request)
                self.running[request.rid] = (request, [*request.prompt, *request.answer])
                rank = request.dp_rank
                self.slice_of[request.rid] = (len(self.seen) - 1) % 2 if rank is None else rank
                self._wake.set()
            case Abort(rid=rid, finished=finished):
                (self.finished if finished else self.aborted).append(rid)
                if self.running.pop(rid, None) is not None:
                    self._count(rid, **{"finished" if finished else "aborted": 1})
            case GetStatus() | GetPulse() | FlushCache() if not self.mute:
                self._answer(message)
            case Shutdown():
                self.shut_down = True

    def _answer(self, question: Any) -> None:
        token = question.token
        match question:
            case GetStatus():
                self._send(self.status(token))
            case GetPulse():
                if self.busy_s is not None:
                    self._send(Pulse(token, self.busy_s))
            case FlushCache():
                done = not self.running
                if done:
                    self.cache.clear()
                self._send(Flushed(token, done))

    def status(self, token: int = 0) -> EngineStatus:
        """What the engine says of itself; held requests wait in the central queue."""
        return EngineStatus(
            token=token,
            waiting=len(self.running) if self.hold else 0,
            waiting_tokens=sum(len(c) for _, c in self.running.values()) if self.hold else 0,
            steps=self.steps,
            recompilations=0,
            grammar_queue=self.grammar_queue,
            slices=[self._slice_status(i) for i in range(2)],
            step_seconds={"decode": 1.5, "extend": 0.5},
            prefilling_slices=[3, 1, 0],
            prefilling_seconds=[1.5, 0.5, 0.0],
        )

    def _slice_status(self, rank: int) -> SliceStatus:
        mine = [context for rid, (_, context) in self.running.items() if self.slice_of[rid] == rank]
        used = 0 if self.hold else sum(map(len, mine))
        return SliceStatus(
            dp_rank=rank,
            mode="idle",
            running=0 if self.hold else len(mine),
            waiting=0,
            used_tokens=used,
            cached_tokens=64,
            total_tokens=4096,
            pending_prefill_tokens=0,
            decode_context_tokens=used,
            max_running=16,
            counters=SliceCounters(**self.counters[rank]),
        )

    def _count(self, rid: str, **changes: int) -> None:
        counters = self.counters[self.slice_of[rid]]
        for name, change in changes.items():
            counters[name] = counters.get(name, 0) + change

    async def _run(self) -> None:
        while True:
            if not self.running or self.hold:
                self._wake.clear()
                await self._wake.wait()
                if self.hold:
                    continue
            await asyncio.sleep(self.delay_s)
            self.steps += 1
            if self.die_after_steps is not None and self.steps > self.die_after_steps:
                self.die()
                return
            events = [self._step(request, context) for request, context in self.running.values()]
            for event in events:
                if event.finish_reason is not None:
                    del self.running[event.rid]
            if events:
                self._send(StepOutput(events))

    def _step(self, request: Request, context: list[int]) -> TokenEvent:
        sampling = request.sampling
        num_generated = len(context) - len(request.prompt)
        if self.error_at is not None and num_generated >= self.error_at:
            return TokenEvent(
                request.rid, None, "error", message=self.error_message, status=self.error_status
            )
        first = self._first(request) if num_generated == len(request.answer) else None
        token = self.next_token(context)
        context.append(token)
        self._count(request.rid, generated_tokens=1)
        reason = None
        if token in sampling.stop_token_ids:
            reason = "stop"
        elif num_generated + 1 >= sampling.max_tokens:
            reason = "length"
        if reason is not None:
            self._count(request.rid, finished=1)
        logprob, top = None, None
        if sampling.logprobs is not None:
            logprob = -0.5
            top = [((token + i) % VOCAB_SIZE, -0.5 - i) for i in range(sampling.logprobs)]
        return TokenEvent(request.rid, token, reason, logprob, top, first=first)

    def _first(self, request: Request) -> FirstToken:
        key = (request.cache_key, request.prompt)
        scored = request.prompt_logprobs
        cached = len(request.prompt) - 1 if key in self.cache and scored is None else 0
        self.cache.add(key)
        self._count(request.rid, started=1, prompt_tokens=len(request.prompt), cached_tokens=cached)
        return FirstToken(
            dp_rank=self.slice_of[request.rid],
            cached_tokens=cached,
            queue_s=0.25,
            prompt_scores=None if scored is None else prompt_scores(request.prompt, scored),
        )


@contextlib.asynccontextmanager
async def connected(engine: FakeEngine):
    """A client connected to a fake engine in the same loop."""
    with engine_listener() as (listener, path):
        serving = asyncio.create_task(engine.serve(path))
        client = await EngineClient.connect(listener)
    try:
        yield client
    finally:
        await client.shutdown()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def _main(path: str) -> int:
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=ServerConfig)
    mode = os.environ.get("FAKE_ENGINE", "")
    if mode == "exit":
        return 3
    if mode == "fail":
        engine = FakeEngine(failure="The fake engine cannot start: no reason.")
    elif mode == "die":
        engine = FakeEngine(die_after_steps=3, delay_s=0.01)
    elif mode == "hang":
        engine = FakeEngine(hold=True)
    else:
        engine = FakeEngine(delay_s=0.02)
    assert config.tp_size == 1
    if mode == "slow-start":
        asyncio.run(asyncio.sleep(60))
    asyncio.run(engine.serve(path))
    return 7 if mode == "die" else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
