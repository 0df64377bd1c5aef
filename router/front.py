"""HTTP/1.1 to the clients: a connection parses a request whole, runs it, and writes its answer.

An answer that is ready costs one write, a piece of a stream another. It promises that a client that
leaves cancels what was done for it, that one that does not read is not written to beyond a bounded
buffer, that nobody holds a connection by sending or reading nothing, and that a shutdown lets what
runs end and go out.
`as_asgi` runs an ASGI application behind it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote_to_bytes

import httptools

HeaderList = list[tuple[bytes, bytes]]
Handler = Callable[["Call"], Awaitable[None]]

MAX_HEAD_BYTES = 65_536
MAX_WAITING = 8
"""Requests that a client may send ahead on one connection before it is read no more."""
KEEP_ALIVE_S = 75.0
HEAD_S = 30.0
"""How long a request's headers may take to come."""
STUCK_S = 300.0
"""How long a client may take in nothing of an answer that waits for it."""
SWEEP_S = 5.0
LINGER_S = 0.5
BACKLOG = 2048

STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())
    for status in HTTPStatus
}

logger = logging.getLogger("meshserve.router")


class Call:
    """One request and its answer.

    Attributes:
        method: GET and so on.
        path: without the query, percent-encoding undone.
        query: what follows the question mark.
        headers: names in lower case.
        body: whole.
        status: of the answer, 0 before it has begun.
        client_left: the client hung up before it had everything.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_head",
        "body",
        "client_left",
        "ended",
        "headers",
        "keep_alive",
        "method",
        "path",
        "query",
        "status",
    )

    def __init__(self, connection: _Connection, headers: HeaderList) -> None:
        self._connection = connection
        self._head = b""
        self._chunked = True
        self.method = ""
        self.path = ""
        self.query = b""
        self.headers = headers
        self.body = b""
        self.keep_alive = True
        self.status = 0
        self.ended = False
        self.client_left = False

    @property
    def peer(self) -> tuple[str, int] | None:
        """Address and port of the client."""
        return self._connection.peer

    def header(self, name: bytes) -> bytes:
        """The first value of a header, by its name in lower case; empty if there is none."""
        for key, value in self.headers:
            if key == name:
                return value
        return b""

    def answer(self, status: int, headers: HeaderList, body: bytes) -> None:
        """The whole answer; content-length is added here."""
        head = _head(status, headers)
        self.status = status
        close = b"" if self.keep_alive else b"connection: close\r\n"
        size = len(body)
        if self.method == "HEAD":
            body = b""
        self._connection.write(b"%bcontent-length: %d\r\n%b\r\n%b" % (head, size, close, body))
        self._end()

    def begin(self, status: int, headers: HeaderList) -> None:
        """An answer in pieces follows; its head goes out with the first of them."""
        self.status = status
        self._chunked = not self._connection.old_http
        if not self._chunked:
            self.keep_alive = False
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        close = b"" if self.keep_alive else b"connection: close\r\n"
        self._head = b"%b%b%b\r\n" % (_head(status, headers), framing, close)

    async def send(self, data: bytes) -> None:
        """A piece of the answer; waits while the client does not read."""
        head, self._head = self._head, b""
        if self.method == "HEAD":
            data = b""
        if data and self._chunked:
            self._connection.write(b"%b%x\r\n%b\r\n" % (head, len(data), data))
        elif head or data:
            self._connection.write(head + data)
        waiting = self._connection.full
        if waiting is not None:
            await waiting

    def end(self, data: bytes = b"") -> None:
        """The last piece."""
        head, self._head = self._head, b""
        if not self._chunked or self.method == "HEAD":
            self._connection.write(head + (b"" if self.method == "HEAD" else data))
        elif data:
            self._connection.write(b"%b%x\r\n%b\r\n0\r\n\r\n" % (head, len(data), data))
        else:
            self._connection.write(head + b"0\r\n\r\n")
        self._end()

    def abort(self) -> None:
        """Cut the connection: the answer cannot be completed, and the client must notice."""
        self._connection.abort()

    def cancel(self) -> None:
        """Cancel the task that answers the call, as if the client had left."""
        self._connection.cancel(self)

    def _end(self) -> None:
        self.ended = True
        self._connection.over(self)


class Front:
    """Listens, and runs `handler` for every request.

    Args:
        handler: answers a call; what it leaves unanswered is a 500.
        max_body: bytes; a larger body is a 413.
        too_large: the body of that answer.
    """

    def __init__(self, handler: Handler, *, max_body: int, too_large: bytes = b"") -> None:
        self.handler = handler
        self.max_body = max_body
        self.too_large = too_large
        self.closing = False
        self.connections: set[_Connection] = set()
        self._servers: list[asyncio.AbstractServer] = []
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def num_running(self) -> int:
        """Calls whose answers are not ready, or have not gone out yet."""
        return sum(connection.busy for connection in self.connections)

    async def listen(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept connections of a bound socket."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: _Connection(self), sock=listener, backlog=BACKLOG, ssl=tls
        )
        self._servers.append(server)
        if self._sweep is None:
            self._sweep = loop.call_later(SWEEP_S, self._close_unused)

    async def shut_down(self, grace_s: float) -> bool:
        """Accept nothing more, wait for what runs, cut what is left; whether nothing was."""
        self.closing = True
        for server in self._servers:
            server.close()
        if self._sweep is not None:
            self._sweep.cancel()
        until = time.monotonic() + grace_s
        for connection in list(self.connections):
            connection.close_if_idle()
        while self.num_running and time.monotonic() < until:
            await asyncio.sleep(0.02)
        complete = not self.num_running
        for connection in list(self.connections):
            if complete:
                connection.close_if_idle()
            else:
                connection.abort()
        await asyncio.sleep(0)
        return complete

    def _close_unused(self) -> None:
        now = time.monotonic()
        for connection in list(self.connections):
            connection.close_if_unused(now)
            connection.abort_if_stuck(now)
        self._sweep = asyncio.get_running_loop().call_later(SWEEP_S, self._close_unused)


class _Connection(asyncio.Protocol):
    """One client connection; its requests run one after another."""

    __slots__ = (
        "_body",
        "_call",
        "_front",
        "_head_size",
        "_headers",
        "_in_head",
        "_loop",
        "_parser",
        "_paused",
        "_refused",
        "_size",
        "_task",
        "_transport",
        "_unread",
        "_unread_since",
        "_url",
        "_waiting",
        "full",
        "idle_since",
        "old_http",
        "peer",
    )

    def __init__(self, front: Front) -> None:
        self._front = front
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._call: Call | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: deque[Call] = deque()
        self._url = b""
        self._headers: HeaderList = []
        self._body: list[bytes] = []
        self._size = 0
        self._head_size = 0
        self._in_head = True
        self._paused = False
        self._refused = False
        self._unread = 0
        self._unread_since = 0.0
        self.full: asyncio.Future[None] | None = None
        self.old_http = False
        self.peer: tuple[str, int] | None = None
        self.idle_since = time.monotonic()

    @property
    def busy(self) -> bool:
        """Something of an answer is still to come, or to go out."""
        return self._call is not None or bool(self._waiting) or self._num_unsent > 0

    @property
    def _num_unsent(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._front.connections.add(self)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = (str(peer[0]), int(peer[1]))
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # No other protocol is spoken here: the request is answered as it is, and that is all.
            self._refused = True
            call = self._waiting[-1] if self._waiting else self._call
            if call is not None:
                call.keep_alive = False
        except httptools.HttpParserError:
            self._refuse(400, b"Invalid HTTP request received.")
        else:
            if self._in_head and self._head_size > MAX_HEAD_BYTES:
                self._refuse_head()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._front.connections.discard(self)
        self._waiting.clear()
        self.resume_writing()
        call, self._call = self._call, None
        if call is not None:
            call.client_left = True
            if self._task is not None:
                self._task.cancel()

    def pause_writing(self) -> None:
        if self.full is None:
            self.full = self._loop.create_future()

    def resume_writing(self) -> None:
        full, self.full = self.full, None
        if full is not None and not full.done():
            full.set_result(None)

    # httptools

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", [], []
        self._size = 0
        self.idle_since = time.monotonic()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._head_size > MAX_HEAD_BYTES:
            # What came with it may be body: this is exact.
            size = sum(len(name) + len(value) + 4 for name, value in self._headers)
            if size + len(self._url) > MAX_HEAD_BYTES:
                self._refuse_head()
        self._in_head = False
        self._head_size = 0
        for name, value in self._headers:
            if name == b"expect" and value.lower() == b"100-continue":
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            elif name == b"content-length" and int(value) > self._front.max_body:
                self._refuse_body()

    def on_body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._front.max_body:
            self._refuse_body()
        elif not self._refused:
            self._body.append(data)
            self.idle_since = time.monotonic()

    def on_message_complete(self) -> None:
        self._in_head = True
        if self._refused:
            return
        call = Call(self, self._headers)
        path, _, call.query = self._url.partition(b"?")
        if b"%" in path:
            path = unquote_to_bytes(path)
        call.path = path.decode("latin-1")
        call.method = self._parser.get_method().decode("latin-1")
        call.keep_alive = self._parser.should_keep_alive() and not self._front.closing
        self.old_http = self._parser.get_http_version() == "1.0"
        body = self._body
        call.body = body[0] if len(body) == 1 else b"".join(body)
        self._body = []
        if self._call is None:
            self._run(call)
            return
        self._waiting.append(call)
        if len(self._waiting) >= MAX_WAITING and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    # calls

    def write(self, data: bytes) -> None:
        if self._transport is not None and data:
            self._transport.write(data)

    def over(self, call: Call) -> None:
        """The answer to a call is complete."""
        if self._call is not call:
            return
        self._call = None
        self.idle_since = time.monotonic()
        if self._refused:
            # Closing while the client still sends would reset the connection under the answer.
            self._loop.call_later(LINGER_S, self.close)
        elif not call.keep_alive or self._front.closing:
            self._waiting.clear()
            self.close()
        elif self._waiting:
            # Not here: the task of this call is still running.
            self._loop.call_soon(self._run_next)

    def cancel(self, call: Call) -> None:
        if self._call is call and self._task is not None:
            self._task.cancel()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self) -> None:
        if not self.busy:
            self.close()

    def close_if_unused(self, now: float) -> None:
        """Idle for long, or a request that does not get on."""
        if self.busy:
            return
        limit = HEAD_S if self._head_size else KEEP_ALIVE_S
        if now - self.idle_since > limit:
            self.close()

    def abort_if_stuck(self, now: float) -> None:
        """Its client takes in nothing: whoever waits for that must not wait for ever."""
        num = self._num_unsent
        if num != self._unread:
            self._unread, self._unread_since = num, now
        elif num and now - self._unread_since > STUCK_S:
            self.abort()

    def _run_next(self) -> None:
        if self._call is None and self._waiting:
            self._run(self._waiting.popleft())
        if self._paused and self._transport is not None and len(self._waiting) < MAX_WAITING:
            self._paused = False
            self._transport.resume_reading()

    def _run(self, call: Call) -> None:
        self._call = call
        self._task = self._loop.create_task(self._handle(call))

    async def _handle(self, call: Call) -> None:
        try:
            await self._front.handler(call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not call.client_left or task is None or task.uncancel() > 0:
                raise
        except Exception:
            logger.exception("A request to %s failed", call.path)
        finally:
            if not call.ended and not call.client_left:
                if call.status:
                    self.abort()
                else:
                    call.keep_alive = False
                    call.answer(500, [], b"")

    def _refuse_head(self) -> None:
        self._refuse(431, b"The request's headers are too large.")

    def _refuse_body(self) -> None:
        headers = [(b"content-type", b"application/json")]
        self._refuse(413, self._front.too_large, headers)

    def _refuse(self, status: int, body: bytes, headers: HeaderList | None = None) -> None:
        """Answer what cannot be a call, once what came before it is answered, and hang up."""
        if self._refused:
            return
        self._refused = True
        call = Call(self, [])
        call.keep_alive = False
        if self._call is None:
            self._call = call
            call.answer(status, headers or [], body)
        else:
            self._call.keep_alive = False
            self._waiting.clear()


def _head(status: int, headers: HeaderList) -> bytes:
    line = STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return line + b"".join([b"%b: %b\r\n" % pair for pair in headers])


def as_asgi(app: Any) -> Handler:
    """A handler that runs an ASGI application (HTTP only; its answers are sent when complete, or
    piece by piece as it sends them)."""

    async def handle(call: Call) -> None:
        await app(_scope(call), *_channels(call))

    return handle


def _scope(call: Call) -> dict[str, Any]:
    path = call.path.encode("latin-1")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": None,
        "client": call.peer,
        "scheme": "http",
        "method": call.method,
        "root_path": "",
        "path": path.decode("utf-8", "replace"),
        "raw_path": path,
        "query_string": call.query,
        "headers": call.headers,
        "state": {},
    }


def _channels(
    call: Call,
) -> tuple[Callable[[], Awaitable[dict[str, Any]]], Callable[[dict[str, Any]], Awaitable[None]]]:
    """The receive and send of an ASGI application."""
    begun: dict[str, Any] = {}
    given = False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": call.body, "more_body": False}
        while not call.ended:
            # The client's leaving cancels the task.
            await asyncio.sleep(1.0)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            begun.update(message)
            return
        headers = [
            (name.lower(), value)
            for name, value in begun.get("headers", ())
            if name.lower() not in (b"content-length", b"transfer-encoding", b"connection")
        ]
        headers.append((b"date", formatdate(usegmt=True).encode()))
        body, more = message.get("body", b""), message.get("more_body", False)
        if not call.status and not more:
            call.answer(begun["status"], headers, body)
            return
        if not call.status:
            call.begin(begun["status"], headers)
        if more:
            await call.send(body)
        else:
            call.end(body)

    return receive, send
