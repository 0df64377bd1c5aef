"""uvicorn's HTTP/1.1 protocol with bounds that it lacks: on the size of a request's head, and on
the time a client may take to send a request. What is beyond is answered 431 or 408, and the
connection closed; so is a wish for another protocol that would cost a request its body.
"""

from __future__ import annotations

import asyncio
from asyncio.events import TimerHandle
from collections import deque
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.http.errors import ErrorBody

MAX_HEAD_BYTES = 64 << 10
"""Request line and header fields of one request, trailers included."""
HEAD_TIMEOUT_S = 20.0
"""From the first byte of a request (or a new connection) to the end of its head."""
BODY_TIMEOUT_S = 300.0
"""From there to the end of its body, 16 MiB at most."""


class BoundedHttp(HttpToolsProtocol):
    """One connection.

    What the parser keeps of a head that never ends is not visible here; it is bounded by the bytes
    that came in without anything having come out, which `_unparsed` counts.
    """

    head_timeout_s = HEAD_TIMEOUT_S
    body_timeout_s = BODY_TIMEOUT_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unparsed = 0
        self._head_bytes = 0
        self._in_request = self._in_head = False
        self._refused = False
        self._deadline: TimerHandle | None = None
        self._cycles: deque[Any] = deque()  # uvicorn's requests that may be without their answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_within(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        # uvicorn tells only the last of pipelined requests, and the one that runs is the first.
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._cycles.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES:
            self._refuse_head()
        elif self._deadline is None and not self._in_request and self._idle:
            # Empty lines between requests stop uvicorn's own timer.
            self._expect_within(self.head_timeout_s)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_request = self._in_head = True
        self._head_bytes = 0
        if self._deadline is None:
            self._expect_within(self.head_timeout_s)

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        elif not self._refused:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        elif self.parser.should_upgrade() and self._has_body:
            # The parser drops the body of such a request: other bytes could follow the head.
            self._refuse(
                400,
                "This server speaks HTTP/1.1 only: leave out the Upgrade header (in Java, ask for "
                "HttpClient.Version.HTTP_1_1).",
            )
        if not self._refused:
            self._in_head = False
            self._expect_within(self.body_timeout_s)
            super().on_headers_complete()
            while self._cycles and self._cycles[0].response_complete:
                self._cycles.popleft()
            self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._in_request = False
        if not self._refused:
            self._expect_nothing()
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: a server may ignore the wish, and a warning for each would fill the log."""

    @property
    def _has_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.headers
        )

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            super().send_400_response(msg)

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_within(self, seconds: float) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if not self._idle and self._in_head:
            # An answer is under way; what was begun behind it will not be served.
            self.cycle.keep_alive = False
        elif self._in_request:
            self._refuse(408, "The request did not arrive in time.")
        else:
            self.transport.close()

    def _refuse_head(self) -> None:
        self._refuse(431, f"The header fields are larger than {MAX_HEAD_BYTES >> 10} KiB.")

    def _refuse(self, status: int, message: str) -> None:
        """Answer, unless an answer is under way, and hang up."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._expect_nothing()
        cycle = self.cycle
        is_next = self._in_request and not self._in_head and not self.pipeline
        if self._idle or (is_next and not cycle.response_started):
            error = ErrorBody(message=message, type="BadRequestError", code=status)
            body = msgspec.json.encode(error)
            head = (
                b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[status] + head % len(body) + body)
        if not self._idle:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
