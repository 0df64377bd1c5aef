"""Server-sent events, and answers that end when the client hangs up.

`stream` waits for the first event before it answers, so that what goes wrong until then is a real
HTTP status; what goes wrong later is an error event. `unless_disconnected` is the one place where
a client's going away turns into a cancellation, from which every abort follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.engine_client import EngineFailed
from serving.http.errors import ApiError, to_api_error
from serving.http.protocol import ErrorEvent

T = TypeVar("T")
Events = AsyncGenerator[msgspec.Struct, None]

DONE = b"data: [DONE]\n\n"

logger = logging.getLogger("meshserve.http")


def event(body: msgspec.Struct) -> bytes:
    """One event: JSON never holds a bare newline."""
    return b"data: %b\n\n" % msgspec.json.encode(body)


def named_event(body: msgspec.Struct) -> bytes:
    """One event under its type's name, as /v1/responses sends them."""
    name = body.__struct_config__.tag or "error"
    return b"event: %b\n%b" % (str(name).encode(), event(body))


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def stream(request: Request, events: Events, *, named: bool = False) -> Response:
    """Answer with `events`, once the first is there.

    Args:
        named: each event says its type, and nothing follows the last one.

    Raises:
        ApiError, EngineFailed: what `events` raised before its first event.
        ClientDisconnect: nobody is waiting any more.
    """
    try:
        first = await unless_disconnected(request.receive, _next(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, named=named)


class EventStream(Response):
    """A body of events that ends with [DONE] (if they have no names), or with the client."""

    media_type = "text/event-stream"

    def __init__(self, first: msgspec.Struct | None, rest: Events, *, named: bool = False) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._frame, self._end = (named_event, b"") if named else (event, DONE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            try:
                await unless_disconnected(receive, self._send_all(send))
            except (ClientDisconnect, OSError):  # OSError: some servers' send says it first
                return

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            if self._first is not None:
                await _send_body(send, self._frame(self._first))
            async for body in self._rest:
                await _send_body(send, self._frame(body))
        except (ApiError, EngineFailed) as error:
            await _send_body(send, self._frame(ErrorEvent(error=to_api_error(error).body)))
        except OSError:
            raise
        except Exception as error:
            logger.exception("A stream failed")
            await _send_body(send, self._frame(ErrorEvent(error=to_api_error(error).body)))
        await send({"type": "http.response.body", "body": self._end, "more_body": False})


async def _send_body(send: Send, content: bytes) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": True})


async def _next(events: Events) -> msgspec.Struct | None:
    """None where there is none: a continued stream may have nothing left to tell."""
    return await anext(events, None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
