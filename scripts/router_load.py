"""Load for the router's benchmarks: seeded conversations as text, and two kinds of clients.

`FixedLoad` sends one request again and again and costs next to nothing, so that what is measured is
the proxy; `SessionLoad` behaves as users do, turn after turn, and streams every answer. A token is
four characters here, as in `simulated_worker`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from bisect import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

from router.upstream import Upstream, UpstreamError
from scripts.benchmarking import percentile

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [a + b + c + " " for a in LETTERS for b in LETTERS[::2] for c in LETTERS[::3]]
JSON = (b"content-type", b"application/json")
SLACK_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One client: a prefix that others of its group share, and turns that follow one another."""

    prefix: str
    turns: tuple[str, ...]
    max_tokens: int
    chat: bool = False


def text(rng: random.Random, num_tokens: int) -> str:
    return "".join(rng.choices(WORDS, k=num_tokens))


def zipf_picker(num: int, exponent: float, rng: random.Random) -> Callable[[], int]:
    """Draws from 0 to num - 1, the first most often; evenly where the exponent is 0."""
    weights = list(accumulate(1 / (i + 1) ** exponent for i in range(num)))
    return lambda: min(num - 1, bisect(weights, rng.random() * weights[-1]))


def shared_prefix(
    *,
    groups: int = 64,
    requests: int = 614,
    prefix_tokens: int = 2048,
    question_tokens: int = 128,
    max_tokens: int = 32,
    exponent: float = 0.0,
    seed: int = 1,
) -> list[Session]:
    """Single requests over long prefixes; with exponent 0 every group equally often, shuffled."""
    rng = random.Random(seed)
    prefixes = [text(rng, prefix_tokens) for _ in range(groups)]
    if exponent:
        pick = zipf_picker(groups, exponent, rng)
        order = [pick() for _ in range(requests)]
    else:
        order = [i % groups for i in range(requests)]
        rng.shuffle(order)
    return [
        Session(prefix=prefixes[g], turns=(text(rng, question_tokens),), max_tokens=max_tokens)
        for g in order
    ]


def multi_turn(
    *,
    groups: int = 64,
    conversations: int = 153,
    turns: int = 4,
    prefix_tokens: int = 1024,
    question_tokens: int = 128,
    max_tokens: int = 32,
    exponent: float = 0.9,
    seed: int = 2,
) -> list[Session]:
    """Conversations whose system prompts are shared by groups of different popularity."""
    rng = random.Random(seed)
    prefixes = [text(rng, prefix_tokens) for _ in range(groups)]
    pick = zipf_picker(groups, exponent, rng)
    return [
        Session(
            prefix=prefixes[pick()],
            turns=tuple(text(rng, question_tokens) for _ in range(turns)),
            max_tokens=max_tokens,
            chat=True,
        )
        for _ in range(conversations)
    ]


def sessions_of(workload: str, *, seed: int, scale: float = 1.0) -> list[Session]:
    """The sessions of gsp, zipf or chat (`gsp` uniform and `zipf` skewed shared prefixes)."""
    num = int(614 * scale)
    match workload:
        case "gsp":
            return shared_prefix(requests=num, seed=seed)
        case "zipf":
            return shared_prefix(requests=num, exponent=1.1, seed=seed)
        case "chat":
            return multi_turn(conversations=num // 4, seed=seed)
    raise ValueError(f"A workload is gsp, zipf or chat, got '{workload}'.")


class _LoadConnection(asyncio.Protocol):
    """Sends the same request again and again; notes how long each answer took."""

    def __init__(self, load: FixedLoad) -> None:
        self._load = load
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._fire()

    def _fire(self) -> None:
        self._buffer = b""
        self._needed = -1
        self._chunked = False
        self._first = 0.0
        self._sent = time.perf_counter()
        self._transport.write(self._load.next_payload())

    def data_received(self, data: bytes) -> None:
        load = self._load
        self._buffer = buffer = self._buffer + data if self._buffer else data
        if self._needed < 0 and not self._chunked:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = buffer[:end].lower()
            self._status = int(buffer[9:12])
            at = head.find(b"content-length:")
            if at >= 0:
                line = head.find(b"\r\n", at)
                self._needed = end + 4 + int(head[at + 15 : line if line > 0 else len(head)])
            else:
                self._chunked = True
        if self._chunked:
            load.events += data.count(b"data: ")
            if not self._first and b"data: " in data:
                self._first = time.perf_counter()
            if not buffer.endswith(b"0\r\n\r\n"):
                self._buffer = buffer[-8:]
                return
        elif len(buffer) < self._needed:
            return
        now = time.perf_counter()
        load.done(self._status, now - self._sent, (self._first or now) - self._sent, now)
        if now < load.stop_at:
            self._fire()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.lost(exc)


NUMBER = "0123456789"
"""What a body may contain for `FixedLoad` to put another number there in every request."""


class FixedLoad:
    """A closed loop of one request on `concurrency` connections for `seconds`."""

    def __init__(
        self, url: str, body: dict[str, Any], concurrency: int, seconds: float, warmup: float = 0.5
    ) -> None:
        self._numbered = NUMBER in json.dumps(body)
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        content = json.dumps(body).encode()
        self.payload = (
            f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        ).encode() + content
        self._concurrency = concurrency
        self._seconds, self._warmup = seconds, warmup
        self._latency: list[float] = []
        self._ttft: list[float] = []
        self.events = self._errors = self._other = 0
        self.num_done = 0

    def next_payload(self) -> bytes:
        if not self._numbered:
            return self.payload
        return self.payload.replace(NUMBER.encode(), b"%010d" % self.num_done)

    def done(self, status: int, seconds: float, first: float, now: float) -> None:
        self.num_done += 1
        if status != 200:
            self._other += 1
        elif now >= self._measure_at:
            self._latency.append(seconds)
            self._ttft.append(first)

    def lost(self, exc: Exception | None) -> None:
        if exc is not None or time.perf_counter() < self.stop_at:
            self._errors += 1
        self._live -= 1
        if not self._live and not self._finished.done():
            self._finished.set_result(None)

    async def run(self) -> dict[str, float]:
        """Rates and latencies (ms) after the warm-up."""
        loop = asyncio.get_running_loop()
        self._finished = loop.create_future()
        self._live = self._concurrency
        begin = time.perf_counter()
        self._measure_at = begin + self._warmup
        self.stop_at = self._measure_at + self._seconds
        for _ in range(self._concurrency):
            await loop.create_connection(lambda: _LoadConnection(self), self._host, self._port)
        await asyncio.wait_for(self._finished, self._warmup + self._seconds + SLACK_S)
        seconds = time.perf_counter() - self._measure_at
        return {
            "rps": len(self._latency) / seconds,
            "p50_ms": 1e3 * percentile(self._latency, 50),
            "p99_ms": 1e3 * percentile(self._latency, 99),
            "ttft_p50_ms": 1e3 * percentile(self._ttft, 50),
            "done": self.num_done,
            "events": self.events,
            "errors": self._errors + self._other,
        }


class SessionLoad:
    """Runs sessions, `clients` at once; every answer is streamed."""

    def __init__(self, sessions: Iterable[Session], clients: int, base: str) -> None:
        self._sessions = sessions
        self._clients = clients
        self._base = base
        self._http = Upstream()
        self._ttft: list[float] = []
        self._latency: list[float] = []
        self.failures: list[str] = []
        self._tokens = 0

    async def run(self) -> dict[str, float]:
        """Rates and latencies (ms); requests per second count whole answers only."""
        sessions = iter(self._sessions)

        async def client() -> None:
            for session in sessions:
                await self._converse(session)

        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(self._clients)))
        seconds = time.perf_counter() - begin
        await self._http.close()
        return {
            "requests": len(self._latency),
            "failed": len(self.failures),
            "req_per_s": len(self._latency) / seconds,
            "tok_per_s": self._tokens / seconds,
            "ttft_p50_ms": 1e3 * percentile(self._ttft, 50),
            "ttft_p99_ms": 1e3 * percentile(self._ttft, 99),
            "latency_p50_ms": 1e3 * percentile(self._latency, 50),
            "latency_p99_ms": 1e3 * percentile(self._latency, 99),
        }

    async def _converse(self, session: Session) -> None:
        messages = [{"role": "system", "content": session.prefix}]
        for turn in session.turns:
            body: dict[str, Any] = {"model": "mock-model", "max_tokens": session.max_tokens}
            body |= {"stream": True, "temperature": 0}
            if session.chat:
                messages.append({"role": "user", "content": turn})
                path = "/v1/chat/completions"
                body["messages"] = messages
                size = sum(len(message["content"]) for message in messages)
            else:
                path = "/v1/completions"
                body["prompt"] = session.prefix + turn
                size = len(body["prompt"])
            answer = await self._ask(path, body)
            if answer is None:
                return
            self._tokens += size // 4 + session.max_tokens
            messages.append({"role": "assistant", "content": answer})

    async def _ask(self, path: str, body: dict[str, Any]) -> str | None:
        """The answer's text, None if there was none (then `failures` has one more)."""
        begin = time.perf_counter()
        first = 0.0
        content = b""
        try:
            response = await self._http.request(
                self._base, "POST", path, [JSON], json.dumps(body).encode(), timeout=300
            )
            while data := await response.chunk():
                first = first or time.perf_counter()
                content += data
        except UpstreamError as error:
            self.failures.append(str(error))
            return None
        if response.status != 200 or not content.endswith(b"data: [DONE]\n\n"):
            self.failures.append(f"{response.status}: {content[-200:]!r}")
            return None
        self._latency.append(time.perf_counter() - begin)
        self._ttft.append(first - begin)
        return text_of(content)


def text_of(stream: bytes) -> str:
    """The text of a whole stream of one answer."""
    parts = []
    for event in stream.split(b"\n\n"):
        if event.startswith(b"data: {"):
            for choice in json.loads(event[6:]).get("choices", ()):
                delta = choice.get("delta")
                parts.append(choice["text"] if delta is None else delta.get("content", ""))
    return "".join(parts)
