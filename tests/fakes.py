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
    GetStatus,
    Ready,
    Shutdown,
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


class FakeEngine:
    """The engine's side of one connection.

    `delay_s` is the time of a step; `seen` and `aborted` record what the front asked for.
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
        hold: bool = False,
    ) -> None:
        self.next_token = next_token
        self.delay_s = delay_s
        self.max_context_tokens = max_context_tokens
        self.failure = failure
        self.die_after_steps = die_after_steps
        self.error_at = error_at
        self.hold = hold
        self.seen: list[Request] = []
        self.aborted: list[str] = []
        self.running: dict[str, tuple[Request, list[int]]] = {}
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
            details={"device": "fake"},
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
                self.running[request.rid] = (request, list(request.prompt))
                self._wake.set()
            case Abort(rid=rid):
                self.aborted.append(rid)
                self.running.pop(rid, None)
            case GetStatus(token=token):
                used = sum(len(context) for _, context in self.running.values())
                slices = [
                    SliceStatus(
                        dp_rank=i, running=len(self.running), used_tokens=used, total_tokens=4096
                    )
                    for i in range(2)
                ]
                self._send(
                    EngineStatus(
                        token=token, waiting=0, steps=self.steps, recompilations=0, slices=slices
                    )
                )
            case Shutdown():
                self.shut_down = True

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
        if self.error_at is not None and len(context) - len(request.prompt) >= self.error_at:
            return TokenEvent(request.rid, None, "error", message="The fake engine has had it.")
        token = self.next_token(context)
        context.append(token)
        reason = None
        if token in sampling.stop_token_ids:
            reason = "stop"
        elif len(context) - len(request.prompt) >= sampling.max_tokens:
            reason = "length"
        if sampling.logprobs is None:
            return TokenEvent(request.rid, token, reason)
        top = [((token + i) % VOCAB_SIZE, -0.5 - i) for i in range(sampling.logprobs)]
        return TokenEvent(request.rid, token, reason, -0.5, top)


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
