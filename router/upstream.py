"""HTTP/1.1 to the workers: a pool of kept connections, one request on each at a time.

It promises that a request is answered, or raises one of three errors that say what happened; that
never more than a bounded part of a body waits here for a slow reader (the worker is not read
meanwhile); and that an answer nobody wants any more closes its connection, so that the worker
notices. A kept connection that turns out to be closed before the first byte of an answer is
replaced once, silently: workers close idle connections when they like. A request that a worker has
had for longer than that takes is not sent again here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

Headers = Sequence[tuple[bytes, bytes]]

CONNECT_TIMEOUT_S = 5.0
"""A machine that is gone does not refuse, it is silent: so long is waited for it."""
BUFFER_BYTES = 65_536
"""How much of a body may wait for its reader before the worker is no longer read."""
STALE_S = 1.0
"""A kept connection that breaks sooner than this after a request was closed already: the worker has
not seen the request."""
OWN_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS})
"""What a connection fails with when this machine has no more files or ports."""
IDLE_S = 30.0
"""How long an unused connection is kept."""
SWEEP_S = 10.0
MAX_TARGETS = 4_096
"""Parsed worker URLs that are remembered."""

KEEPALIVE_IDLE_S = 15
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
"""A worker whose machine vanished in the middle of a stream is noticed after half a minute."""


class UpstreamError(Exception):
    """A request to a worker failed; `url` is the worker, the message one clause."""

    def __init__(self, url: str, message: str) -> None:
        super().__init__(message)
        self.url = url


class ConnectFailed(UpstreamError):
    """No connection, or it broke before the answer began; `sent` if the worker may have seen the
    request, `own` if this machine was at its limits and nobody was asked."""

    def __init__(self, url: str, message: str, *, sent: bool = False, own: bool = False) -> None:
        super().__init__(url, message)
        self.sent = sent
        self.own = own


class Broken(UpstreamError):
    """The answer began and broke off, or is not HTTP."""


class TimedOut(UpstreamError):
    """The request took longer than it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Where a worker URL points to."""

    url: str
    host: str
    port: int
    tls: bool
    prefix: bytes
    host_header: bytes


def parse_target(url: str) -> _Target:
    """The address behind a worker URL; a path in it is put before every request's path.

    Raises:
        ValueError: not an http or https URL with a host.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"A worker URL must look like http://host:port, got '{url}'.")
    tls = parts.scheme == "https"
    default = 443 if tls else 80
    port = parts.port or default
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return _Target(
        url=url,
        host=parts.hostname,
        port=port,
        tls=tls,
        prefix=parts.path.rstrip("/").encode(),
        host_header=(name if port == default else f"{name}:{port}").encode(),
    )


class Upstream:
    """Requests to workers, over connections that are kept and used again.

    Args:
        connect_timeout_s: how long a connection may take to come about.
        tls: for https workers; the system's certificates by default.
    """

    def __init__(
        self, *, connect_timeout_s: float = CONNECT_TIMEOUT_S, tls: ssl.SSLContext | None = None
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._targets: dict[str, _Target] = {}
        self._idle: dict[str, list[_Connection]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def num_idle(self) -> int:
        """Connections that are kept and not in use."""
        return sum(len(connections) for connections in self._idle.values())

    async def request(
        self,
        worker_url: str,
        method: str,
        path: str,
        headers: Headers = (),
        body: bytes = b"",
        timeout: float | None = None,
    ) -> UpstreamResponse:
        """Send one request; returns when the answer's headers are there.

        Args:
            headers: names in lower case; host and content-length are added here.
            timeout: seconds for the whole exchange, the body of the answer included.

        Raises:
            ConnectFailed, TimedOut: as they say.
            ValueError: the URL is none.
        """
        target = self._target(worker_url)
        head = _head(target, method, path, headers, body)
        deadline = None if timeout is None else time.monotonic() + timeout
        kept = self._kept(worker_url)
        if kept is not None:
            began = time.monotonic()
            try:
                return await kept.exchange(head, body, deadline)
            except ConnectFailed:
                if time.monotonic() - began > STALE_S:
                    raise
        connection = await self._connect(target, deadline)
        return await connection.exchange(head, body, deadline)

    def forget(self, worker_url: str) -> None:
        """Close the kept connections to a worker, which is gone."""
        for connection in self._idle.pop(worker_url, ()):
            connection.close()
        self._targets.pop(worker_url, None)

    async def close(self) -> None:
        """Close the kept connections; answers that are being read go on."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        for url in list(self._idle):
            self.forget(url)

    def _target(self, url: str) -> _Target:
        target = self._targets.get(url)
        if target is None:
            target = parse_target(url)
            if len(self._targets) >= MAX_TARGETS:
                self._targets.clear()
            self._targets[url] = target
        return target

    def _kept(self, url: str) -> _Connection | None:
        connections = self._idle.get(url)
        while connections:
            connection = connections.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self, target: _Target, deadline: float | None) -> _Connection:
        seconds = self._connect_timeout_s
        if deadline is not None:
            seconds = min(seconds, max(0.0, deadline - time.monotonic()))
        tls: ssl.SSLContext | bool | None = None
        if target.tls:
            tls = self._tls or True
        try:
            async with asyncio.timeout(seconds):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self, target), target.host, target.port, ssl=tls
                )
        except TimeoutError:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOut(target.url, "the request timed out while connecting") from None
            raise ConnectFailed(target.url, f"no connection within {seconds:g} s") from None
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            own = error.errno in OWN_ERRORS
            raise ConnectFailed(target.url, f"cannot connect: {reason}", own=own) from None
        return connection

    def _keep(self, connection: _Connection) -> None:
        """A connection whose exchange is over, for the next one."""
        if self._closed:
            connection.close()
            return
        self._idle.setdefault(connection.url, []).append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(SWEEP_S, self._close_unused)

    def _drop(self, connection: _Connection) -> None:
        """A kept connection was closed by the worker."""
        connections = self._idle.get(connection.url)
        if connections is not None:
            with contextlib.suppress(ValueError):
                connections.remove(connection)
            if not connections:
                del self._idle[connection.url]

    def _close_unused(self) -> None:
        self._sweep = None
        oldest = time.monotonic() - IDLE_S
        for connections in list(self._idle.values()):
            # Used from the end: the front of the list is the longest unused.
            for connection in [c for c in connections if c.kept_since < oldest]:
                connection.close()
                self._drop(connection)
        if self._idle:
            self._sweep = asyncio.get_running_loop().call_later(SWEEP_S, self._close_unused)


async def probe(
    upstream: Upstream, url: str, path: str, headers: Headers = (), *, timeout: float
) -> str | None:
    """What is wrong with a server by its health check; None if nothing is."""
    try:
        response = await upstream.request(url, "GET", path, headers, timeout=timeout)
        await response.read()
    except UpstreamError as error:
        return str(error)
    return None if 200 <= response.status < 300 else f"GET {path} answered {response.status}"


class UpstreamResponse:
    """An answer whose headers are there; its body comes in chunks, in order, each byte once.

    Attributes:
        status: the HTTP status.
        headers: names in lower case, in the order sent.
        framed: the answer says where it ends; else the end of its connection looks like its own.
    """

    __slots__ = (
        "_chunks",
        "_connection",
        "_done",
        "_error",
        "_limit",
        "_size",
        "_waiter",
        "framed",
        "headers",
        "status",
        "url",
    )

    def __init__(
        self,
        url: str,
        status: int,
        headers: list[tuple[bytes, bytes]],
        connection: _Connection,
        *,
        framed: bool,
    ) -> None:
        self.url = url
        self.status = status
        self.headers = headers
        self.framed = framed
        self._connection: _Connection | None = connection
        self._chunks: list[bytes] = []
        self._size = 0
        self._limit: float = BUFFER_BYTES
        self._done = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header, by its name in lower case."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    def buffered(self) -> int:
        """Bytes of the body that came and were not taken."""
        return self._size

    async def chunk(self) -> bytes:
        """What came since the last call, b"" at the end.

        Raises:
            Broken, TimedOut: there is no more, and there should be.
        """
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._done:
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._take()

    async def read(self) -> bytes:
        """The rest of the body, whole.

        Raises:
            Broken, TimedOut: it is not whole.
        """
        if self._done and not self._error:
            return self._take()
        self._limit = float("inf")
        if self._connection is not None:
            self._connection.resume()
        parts = []
        while data := await self.chunk():
            parts.append(data)
        return b"".join(parts)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[bytes]:
        while data := await self.chunk():
            yield data

    def close(self) -> None:
        """Nobody wants the rest: hang up, unless everything came already."""
        connection, self._connection = self._connection, None
        self._chunks.clear()
        self._size = 0
        if connection is not None:
            connection.abandon()

    def interrupt(self, reason: str) -> None:
        """Whoever reads gets Broken: it is known from elsewhere that nothing more will come."""
        connection = self._connection
        if connection is not None:
            connection.interrupt(reason)

    async def aclose(self) -> None:
        """The same as `close`, for `contextlib.aclosing`."""
        self.close()

    def _take(self) -> bytes:
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._size = 0
        if self._connection is not None:
            self._connection.resume()
        return data

    # What follows is called by the connection.

    def _feed(self, data: bytes) -> bool:
        """More of the body; whether the connection must wait for the reader."""
        self._chunks.append(data)
        self._size += len(data)
        self._wake()
        return self._size > self._limit

    def _finish(self, error: UpstreamError | None) -> None:
        self._done = True
        self._error = error
        self._connection = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One connection to a worker: idle, or in one exchange."""

    __slots__ = (
        "_answered",
        "_busy",
        "_framed",
        "_headers",
        "_lost",
        "_parser",
        "_paused",
        "_pool",
        "_response",
        "_target",
        "_timer",
        "_transport",
        "_waiter",
        "kept_since",
    )

    def __init__(self, pool: Upstream, target: _Target) -> None:
        self._pool = pool
        self._target = target
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._response: UpstreamResponse | None = None
        self._waiter: asyncio.Future[UpstreamResponse] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        self._answered = False
        self._framed = False
        self._paused = False
        self._lost = False
        self.kept_since = 0.0

    @property
    def url(self) -> str:
        return self._target.url

    @property
    def usable(self) -> bool:
        return not (self._lost or self._transport is None or self._transport.is_closing())

    async def exchange(self, head: bytes, body: bytes, deadline: float | None) -> UpstreamResponse:
        """Send a request and wait for the headers of its answer.

        Raises:
            ConnectFailed, TimedOut: as they say.
        """
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._busy = True
        self._answered = False
        waiter: asyncio.Future[UpstreamResponse] = loop.create_future()
        self._waiter = waiter
        if deadline is not None:
            self._timer = loop.call_later(max(0.0, deadline - time.monotonic()), self._time_out)
        # Small bodies go in one segment; large ones are not copied.
        if len(body) < BUFFER_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        try:
            return await waiter
        except asyncio.CancelledError:
            # An answer may have come in the same moment, and the connection be in other hands.
            if not waiter.cancelled() and waiter.exception() is None:
                waiter.result().close()
            elif self._waiter is waiter:
                self.abandon()
            raise
        finally:
            if self._waiter is waiter:
                self._waiter = None

    def abandon(self) -> None:
        """The exchange is of no interest any more."""
        self._fail(ConnectFailed(self.url, "given up"))
        self._abort()

    def interrupt(self, reason: str) -> None:
        """The exchange fails now."""
        self._fail(Broken(self.url, reason))
        self._abort()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def resume(self) -> None:
        """The reader took what there was."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (
                ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
                ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
                ("TCP_KEEPCNT", KEEPALIVE_PROBES),
            ):
                # Not every system has all three.
                if hasattr(socket, option):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def data_received(self, data: bytes) -> None:
        if not self._busy:
            # Nobody asked: whatever it is, the connection is out of step.
            self._abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(Broken(self.url, f"the answer is not HTTP: {error}"))
            self._abort()

    def eof_received(self) -> bool:
        self._end_of_input(None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._busy:
            self._end_of_input(exc)
        else:
            self._pool._drop(self)

    # httptools

    def on_message_begin(self) -> None:
        self._headers = []
        self._framed = False
        if not self._busy:
            self._abort()  # an answer nobody asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length" or name == b"transfer-encoding":
            self._framed = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._answered = True
        if status < 200 or not self._busy:
            return
        self._response = UpstreamResponse(
            self.url, status, self._headers, self, framed=self._framed
        )
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(self._response)

    def on_body(self, data: bytes) -> None:
        response = self._response
        if response is not None and response._feed(data) and not self._paused:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._response is None:
            return  # an informational answer: the real one follows
        assert self._transport is not None
        self._end(None)
        # An answer that came before the whole request was sent leaves the rest of it in the way.
        if self._parser.should_keep_alive() and not self._transport.get_write_buffer_size():
            self.kept_since = time.monotonic()
            self._pool._keep(self)
        else:
            self._transport.close()

    # ends

    def _end(self, error: UpstreamError | None) -> None:
        self._busy = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.resume()
        response, self._response = self._response, None
        if response is not None:
            response._finish(error)
        elif self._waiter is not None and not self._waiter.done():
            assert error is not None
            self._waiter.set_exception(error)

    def _fail(self, error: UpstreamError) -> None:
        if self._busy:
            self._end(error)

    def _end_of_input(self, exc: Exception | None) -> None:
        if not self._busy:
            return
        reason = "the connection was reset" if exc is not None else "the connection was closed"
        if self._response is None:
            self._fail(
                Broken(self.url, f"{reason} in the middle of the headers")
                if self._answered
                else ConnectFailed(self.url, f"{reason} before the answer", sent=True)
            )
        elif exc is None and not self._framed:
            # HTTP/1.0: the body lasts until the connection ends.
            self._end(None)
        else:
            self._fail(Broken(self.url, f"{reason} in the middle of the answer"))

    def _time_out(self) -> None:
        self._timer = None
        self._fail(TimedOut(self.url, "the request timed out"))
        self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _head(target: _Target, method: str, path: str, headers: Headers, body: bytes) -> bytes:
    """The request line and headers."""
    lines = [
        b"%b %b%b HTTP/1.1\r\nhost: %b\r\n"
        % (method.encode("ascii"), target.prefix, path.encode("ascii"), target.host_header)
    ]
    lines.extend([b"%b: %b\r\n" % pair for pair in headers])
    if body or method not in ("GET", "HEAD", "DELETE"):
        lines.append(b"content-length: %d\r\n\r\n" % len(body))
    else:
        lines.append(b"\r\n")
    return b"".join(lines)
