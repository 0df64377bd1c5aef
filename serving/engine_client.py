"""The front's side of the socket to the engine process.

`EngineClient` owns one connection: it submits requests, hands each its own token events, aborts
what nobody reads any more, and asks the engine how it is. When the connection ends, every open
stream and question fails with one sentence and `alive` is False for ever; starting again is not its
business.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from serving.messages import (
    HEADER,
    Abort,
    EngineStatus,
    Failed,
    FlushCache,
    Flushed,
    GetPulse,
    GetStatus,
    Pulse,
    Ready,
    Shutdown,
    StepOutput,
    Submit,
    ToEngine,
    ToFront,
    TokenEvent,
    decode_to_front,
    frame,
)
from serving.request import Request

CONNECTION_LOST = "The engine process closed its connection."


class EngineFailed(RuntimeError):
    """The engine cannot start or is gone; the message is one sentence."""


@contextmanager
def engine_listener() -> Iterator[tuple[socket.socket, str]]:
    """A listening unix socket and its path, in a folder that only this user may enter."""
    folder = tempfile.mkdtemp(prefix="meshserve-")
    path = str(Path(folder) / "engine.sock")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(path)
            except OSError as error:
                raise EngineFailed(f"Cannot listen on {path}: {error}.") from None
            listener.listen(1)
            listener.setblocking(False)
            yield listener, path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Stream:
    """The events of one request that its reader has not taken yet."""

    __slots__ = ("_arrived", "_events")

    def __init__(self) -> None:
        self._events: list[TokenEvent | None] = []
        self._arrived: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent | None) -> None:
        """Add an event; None says that the engine is gone."""
        self._events.append(event)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def take(self) -> list[TokenEvent | None]:
        """All there are, at least one. One reader at a time."""
        if not self._events:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        events, self._events = self._events, []
        return events


class EngineClient:
    """A connection to an engine that is ready. Made by `connect`."""

    def __init__(
        self, *, ready: Ready, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.ready = ready
        self.failure: str | None = None
        """Why the engine is gone, None while it is alive."""
        self._reader = reader
        self._writer = writer
        self._streams: dict[str, _Stream] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._question_tokens = itertools.count()
        self._last_output = float("-inf")
        self._closed = asyncio.Event()
        self._read_task = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, listener: socket.socket) -> EngineClient:
        """Wait for the engine to connect to `listener` and to be ready.

        Raises:
            EngineFailed: it said that it cannot start, or hung up.
        """
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        connection.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        try:
            message = await _receive(reader)
        except BaseException:
            writer.close()
            raise
        if isinstance(message, Ready):
            return cls(ready=message, reader=reader, writer=writer)
        writer.close()
        if isinstance(message, Failed):
            raise EngineFailed(message.message)
        raise EngineFailed(f"The engine sent {type(message).__name__} before it was ready.")

    @property
    def alive(self) -> bool:
        return self.failure is None

    @property
    def num_open(self) -> int:
        """Number of requests that are not finished."""
        return len(self._streams)

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Submit a request and yield its events; the last one has a finish reason.

        The request is aborted when the consumer stops early (closes the generator, or is
        cancelled), so consume it inside `contextlib.aclosing`.

        Raises:
            EngineFailed: the engine is gone.
            ValueError: a live request has the same rid.
        """
        if request.rid in self._streams:
            raise ValueError(f"A request with rid '{request.rid}' is already running.")
        stream = self._streams[request.rid] = _Stream()
        finished = False
        try:
            self._send(Submit(request))
            while not finished:
                for event in await stream.take():
                    if event is None:
                        raise EngineFailed(self.failure or "The engine is gone.")
                    finished = event.finish_reason is not None
                    yield event
                    if finished:
                        break
        finally:
            # `finish` has taken the stream away, and told the engine.
            if self._streams.pop(request.rid, None) is not None and not finished:
                self.abort(request.rid)

    def finish(self, rid: str) -> None:
        """Tell the engine that an answer is complete before the engine's own end: no more events
        come, and its request is not aborted. Harmless if it is finished or the engine is gone."""
        if self._streams.pop(rid, None) is not None and self.alive:
            self._send(Abort(rid, finished=True))

    def abort(self, rid: str) -> None:
        """Tell the engine to forget a request. Harmless if it is finished or the engine is gone."""
        if self.alive:
            self._send(Abort(rid))

    def cancel(self, prefix: str) -> int:
        """End the open requests whose rid begins with `prefix`: their streams end with "abort".

        Returns:
            how many there were.
        """
        rids = [rid for rid in self._streams if rid.startswith(prefix)]
        for rid in rids:
            self.abort(rid)
            # The engine says nothing about a request that it was told to forget.
            self._streams[rid].put(TokenEvent(rid, None, "abort"))
        return len(rids)

    @property
    def silence_s(self) -> float:
        """Seconds since the last token of any request; infinite before the first."""
        return time.monotonic() - self._last_output

    async def status(self, timeout_s: float = 5.0) -> EngineStatus:
        """The engine's load.

        Raises:
            EngineFailed: the engine is gone, or does not answer in time.
        """
        answer: EngineStatus = await self._ask(GetStatus, timeout_s)
        return answer

    async def pulse(self, timeout_s: float = 5.0) -> Pulse:
        """Whether the step loop moves, answered even while a step runs.

        Raises:
            EngineFailed: the engine is gone, or does not answer in time.
        """
        answer: Pulse = await self._ask(GetPulse, timeout_s)
        return answer

    async def flush_cache(self, timeout_s: float = 5.0) -> bool:
        """Forget all cached prefixes; False where requests run or wait, and nothing was done.

        Raises:
            EngineFailed: the engine is gone, or does not answer in time.
        """
        answer: Flushed = await self._ask(FlushCache, timeout_s)
        return answer.done

    async def _ask(
        self, question: Callable[[int], GetStatus | GetPulse | FlushCache], timeout_s: float
    ) -> Any:
        """Send a question with a fresh token and wait for the answer that bears it."""
        token = next(self._question_tokens)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._questions[token] = answer
        try:
            self._send(question(token))
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise EngineFailed(f"The engine did not answer within {timeout_s:g} s.") from None
        finally:
            del self._questions[token]

    async def wait_closed(self) -> str:
        """Wait until the engine is gone; why."""
        await self._closed.wait()
        return self.failure or ""

    async def shutdown(self) -> None:
        """Ask the engine to exit, and close the connection. Open streams fail."""
        if self.alive:
            self._send(Shutdown())
        self.fail("The server is shutting down.")
        self._read_task.cancel()
        await asyncio.gather(self._read_task, return_exceptions=True)
        self._writer.close()
        # The engine may have hung up first, with our last frame unread.
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    def fail(self, sentence: str) -> None:
        """Give the engine up: every open stream and question fails with this sentence."""
        if self.failure is not None:
            return
        self.failure = sentence
        for stream in self._streams.values():
            stream.put(None)
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(EngineFailed(sentence))
        self._closed.set()

    def _send(self, message: ToEngine) -> None:
        # Frames are small and as many as clients: the transport's buffer bounds itself, and an
        # abort must not wait for a busy engine.
        if self.failure is not None:
            raise EngineFailed(self.failure)
        self._writer.write(frame(message))

    async def _read(self) -> None:
        try:
            while True:
                self._dispatch(await _receive(self._reader))
        except EngineFailed as error:
            self.fail(str(error))

    def _dispatch(self, message: ToFront) -> None:
        match message:
            case StepOutput(events=events):
                if any(event.token_id is not None for event in events):  # a refusal proves nothing
                    self._last_output = time.monotonic()
                for event in events:
                    # Events of a request aborted a moment ago may still be on their way.
                    stream = self._streams.get(event.rid)
                    if stream is not None:
                        stream.put(event)
            case EngineStatus(token=token) | Pulse(token=token) | Flushed(token=token):
                answer = self._questions.get(token)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Failed(message=sentence):
                raise EngineFailed(sentence)
            case Ready():
                raise EngineFailed("The engine said twice that it is ready.")


async def _receive(reader: asyncio.StreamReader) -> ToFront:
    """The next message.

    Raises:
        EngineFailed: the connection ended, or what came is no message.
    """
    try:
        (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        message: ToFront = decode_to_front(await reader.readexactly(size))
        return message
    except (asyncio.IncompleteReadError, OSError):
        raise EngineFailed(CONNECTION_LOST) from None
    except msgspec.MsgspecError as error:
        raise EngineFailed(f"The engine sent a malformed message: {error}.") from None
