"""Simulated LLM workers for the router's tests and benchmarks: a worker's HTTP without a model.

A worker has a paged prefix cache (leaf-first LRU), one prefill at a time and bounded decode slots,
and answers with text that depends on the prompt (and the seed, when sampling) alone, so that every
lost or doubled token shows. It continues broken streams as `docs/http.md` says. `Faults` makes it
misbehave, from Python or by `POST /_sim/faults`. Several workers may live in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import signal
import sys
import time
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, fields
from http import HTTPStatus
from typing import Any

import httptools
import msgspec
import uvloop

CHARS_PER_TOKEN = 4
DONE = b"data: [DONE]\n\n"
GENERATING = ("/v1/completions", "/v1/chat/completions", "/generate", "/v1/responses")

Prompt = str | list[int]


class PrefixCache:
    """Pages of a prompt by the chain of all pages before; evicting the oldest evicts a leaf.

    Every touch moves the pages of a sequence to the young end, the deepest first, so that a page is
    never older than those that follow it.
    """

    def __init__(self, capacity_tokens: int, page_size: int = 16) -> None:
        self.page_size = page_size
        self._capacity = max(0, capacity_tokens // page_size)
        self._pages: OrderedDict[int, None] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        return len(self._pages) * self.page_size

    def chain(self, prompt: Prompt) -> list[int]:
        """The keys of the whole pages of a prompt."""
        step = self.page_size * (CHARS_PER_TOKEN if isinstance(prompt, str) else 1)
        keys, key = [], 0
        for i in range(0, len(prompt) - step + 1, step):
            part = prompt[i : i + step]
            key = hash((key, part if isinstance(part, str) else tuple(part)))
            keys.append(key)
        return keys

    def match(self, chain: Sequence[int]) -> int:
        """How many tokens of a prompt are cached."""
        held = list(itertools.takewhile(self._pages.__contains__, chain))
        for key in reversed(held):
            self._pages.move_to_end(key)
        return len(held) * self.page_size

    def insert(self, chain: Sequence[int]) -> None:
        for key in reversed(chain):
            self._pages[key] = None
            self._pages.move_to_end(key)
        while len(self._pages) > self._capacity:
            self._pages.popitem(last=False)

    def clear(self) -> None:
        self._pages.clear()


@dataclass(slots=True, kw_only=True)
class Faults:
    """What goes wrong; nothing by default.

    Attributes:
        status: generating requests are answered with this status, `status_count` of them (-1: all).
        retry_after: the Retry-After header of those, in seconds.
        health: status of /health, after `health_delay` seconds.
        delay: seconds before any generating request is looked at.
        hang: generating requests are never answered.
        drop: the connection is cut instead.
        die_after_chunks: a stream is cut after so many events.
        cut_event: the event after those is sent by half first.
        error_event: instead of being cut, the stream ends with an error event of this code.
        truncate_body: half of a plain answer, then the connection is cut.
        load_tokens: what /get_load says, -1 for the truth; `load_status` its status.
    """

    status: int = 0
    status_count: int = -1
    retry_after: int = 0
    health: int = 200
    health_delay: float = 0.0
    delay: float = 0.0
    hang: bool = False
    drop: bool = False
    die_after_chunks: int = -1
    cut_event: bool = False
    error_event: int = 0
    truncate_body: bool = False
    load_tokens: int = -1
    load_status: int = 200

    def update(self, changes: dict[str, Any]) -> None:
        """Raises KeyError for a name that is none."""
        known = {f.name for f in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise KeyError(name)
            setattr(self, name, value)


@dataclass(slots=True, kw_only=True)
class Settings:
    """One simulated worker.

    Attributes:
        prefill_tps: prompt tokens per second, on top of `prefill_base` seconds a prompt.
        tpot: seconds per generated token.
        slots: requests that decode at once.
        canned: no simulation at all: one fixed answer at once, to measure a proxy.
        continues: streams can be continued; told by /get_model_info.
    """

    model: str = "mock-model"
    cache_tokens: int = 40_000
    page_size: int = 16
    prefill_tps: float = 20_000.0
    prefill_base: float = 0.002
    tpot: float = 0.010
    slots: int = 16
    dp_size: int = 1
    api_key: str | None = None
    default_max_tokens: int = 16
    canned: bool = False
    continues: bool = True


@dataclass(slots=True)
class Counts:
    """What a worker has seen and done."""

    requests: Counter[str] = field(default_factory=Counter)
    completed: int = 0
    aborted: int = 0
    continued: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    running: int = 0
    waiting: int = 0
    in_flight: int = 0
    max_in_flight: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A generating request as it came."""

    time: float
    path: str
    headers: dict[str, str]
    body: Any
    raw: bytes


class SimulatedWorker:
    """One worker on one port (0: any free one)."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1", **settings: Any) -> None:
        self.host, self.port = host, port
        self.settings = Settings(**settings)
        self.faults = Faults()
        self.counts = Counts()
        self.seen: deque[Seen] = deque(maxlen=256)
        self.cache = PrefixCache(self.settings.cache_tokens, self.settings.page_size)
        self.connections: set[_Connection] = set()
        self._server: asyncio.AbstractServer | None = None
        self._slots = asyncio.Semaphore(self.settings.slots)
        self._prefill = asyncio.Lock()
        self._ids = itertools.count()
        self._canned = _canned(self.settings)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def last(self) -> Seen:
        """The newest generating request."""
        return self.seen[-1]

    async def start(self) -> SimulatedWorker:
        """Listen; on the same port as before, if there was one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), self.host, self.port, reuse_address=True, backlog=2048
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def kill(self) -> None:
        """Die like a crashed process: no listener, every connection reset, everything forgotten."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.abort()
        self.cache.clear()
        await asyncio.sleep(0)

    def reset(self) -> None:
        """As new, but for what is under way."""
        in_flight = self.counts.in_flight
        self.counts = Counts(in_flight=in_flight)
        self.cache.clear()
        self.seen.clear()
        self.faults = Faults()

    def stats(self) -> dict[str, Any]:
        """Counters, as JSON."""
        counts = {f.name: getattr(self.counts, f.name) for f in fields(Counts)}
        counts["requests"] = dict(self.counts.requests)
        return {"url": self.url, **counts, "connections": len(self.connections)}

    def handle(
        self, connection: _Connection, path: str, headers: dict[str, str], body: bytes
    ) -> None:
        """A whole request came."""
        self.counts.requests[path] += 1
        if path in GENERATING:
            if self.settings.canned and not self.faults.status:
                self._answer_canned(connection, body)
            else:
                connection.spawn(self._counted(connection, path, headers, body))
            return
        if path in ("/health", "/health_generate"):
            if self.faults.health_delay:
                connection.spawn(self._health(connection))
            else:
                connection.reply(self.faults.health, b"")
            return
        answer = self._told(path, headers, body)
        if answer is None:
            connection.reply(404, _json({"error": {"message": f"no route {path}"}}))
        else:
            connection.reply(*answer)

    async def _health(self, connection: _Connection) -> None:
        await asyncio.sleep(self.faults.health_delay)
        connection.reply(self.faults.health, b"")

    def _told(
        self, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, bytes, bytes] | None:
        """Status, body and content type of everything that is not generating."""
        settings, counts = self.settings, self.counts
        load = self.faults.load_tokens
        tokens = load if load >= 0 else counts.in_flight * 100
        told: Any
        status = 200
        match path:
            case "/get_model_info" | "/model_info":
                told = {
                    "model_path": settings.model,
                    "is_generation": True,
                    "model_type": "llama",
                    "continue_from": settings.continues,
                }
            case "/get_server_info" | "/server_info":
                told = {
                    "model_path": settings.model,
                    "served_model_name": settings.model,
                    "dp_size": settings.dp_size,
                    "tp_size": 1,
                    "version": "simulated",
                    "max_total_num_tokens": settings.cache_tokens,
                    "max_running_requests": settings.slots,
                }
            case "/v1/models":
                model = {"id": settings.model, "object": "model", "created": 1, "owned_by": "sim"}
                told = {"object": "list", "data": [model]}
            case "/get_load":
                status = self.faults.load_status
                told = [
                    {
                        "dp_rank": rank,
                        "num_reqs": counts.in_flight,
                        "num_waiting_reqs": counts.waiting,
                        "num_tokens": tokens,
                    }
                    for rank in range(settings.dp_size)
                ]
            case "/flush_cache":
                self.cache.clear()
                return 200, b"Cache flushed.\n", b"text/plain"
            case "/metrics":
                return 200, self._metrics(), b"text/plain; version=0.0.4"
            case "/abort_request":
                told = {}
            case "/v1/embeddings" | "/v1/rerank" | "/rerank" | "/v1/classify":
                self.seen.append(_seen(path, headers, body))
                told = {
                    "object": "list",
                    "model": settings.model,
                    "usage": {"prompt_tokens": 1, "total_tokens": 1},
                    "data": [{"object": "embedding", "index": 0, "embedding": [0.0, 1.0]}],
                }
            case "/_sim/stats":
                told = self.stats()
            case "/_sim/reset":
                self.reset()
                told = {}
            case "/_sim/faults":
                try:
                    self.faults.update(json.loads(body))
                    told = {}
                except KeyError as error:
                    status, told = 400, {"error": f"unknown field {error}"}
            case _:
                return None
        return status, _json(told), b"application/json"

    def _metrics(self) -> bytes:
        counts = self.counts
        hit_rate = counts.cached_tokens / counts.prompt_tokens if counts.prompt_tokens else 0.0
        rows = [
            ("num_running_reqs", "gauge", counts.running),
            ("num_queue_reqs", "gauge", counts.waiting),
            ("cache_hit_rate", "gauge", hit_rate),
            ("prompt_tokens_total", "counter", counts.prompt_tokens),
            ("generation_tokens_total", "counter", counts.output_tokens),
        ]
        labels = f'{{model_name="{self.settings.model}"}}'
        return "".join(
            f"# HELP sglang:{name} simulated\n# TYPE sglang:{name} {kind}\n"
            f"sglang:{name}{labels} {value}\n"
            for name, kind, value in rows
        ).encode()

    # generating

    def _answer_canned(self, connection: _Connection, body: bytes) -> None:
        whole, events = self._canned
        if b'"stream":true' in body or b'"stream": true' in body:
            connection.spawn(self._stream_canned(connection, events))
            return
        self.counts.completed += 1
        connection.reply(200, whole)

    async def _stream_canned(self, connection: _Connection, events: list[bytes]) -> None:
        connection.begin_stream()
        for event in events:
            connection.chunk(event)
            await asyncio.sleep(self.settings.tpot)
            await connection.drain()
        connection.chunk(DONE)
        connection.end_stream()
        self.counts.completed += 1

    async def _counted(
        self, connection: _Connection, path: str, headers: dict[str, str], body: bytes
    ) -> None:
        counts = self.counts
        counts.in_flight += 1
        counts.max_in_flight = max(counts.max_in_flight, counts.in_flight)
        try:
            await self._generate(connection, path, headers, body)
        except (asyncio.CancelledError, ConnectionError):
            counts.aborted += 1
            raise
        finally:
            counts.in_flight -= 1

    async def _generate(
        self, connection: _Connection, path: str, headers: dict[str, str], body: bytes
    ) -> None:
        seen, faults, counts = _seen(path, headers, body), self.faults, self.counts
        self.seen.append(seen)
        if not isinstance(seen.body, dict):
            connection.reply(400, _json({"error": {"message": "bad JSON"}}))
            return
        key = self.settings.api_key
        if key is not None and headers.get("authorization") != f"Bearer {key}":
            connection.reply(401, _json({"error": {"message": "worker: bad API key"}}))
            return
        if faults.drop:
            connection.abort()
            return
        if faults.hang:
            await asyncio.Event().wait()
        await asyncio.sleep(faults.delay)
        if faults.status and faults.status_count:
            faults.status_count -= faults.status_count > 0
            error = {"message": f"simulated {faults.status}", "code": faults.status}
            after = b"retry-after: %d\r\n" % faults.retry_after if faults.retry_after else b""
            connection.reply(faults.status, _json({"error": error}), extra=after)
            return
        try:
            answer = _Answer(self, path, seen.body, headers, f"sim-{next(self._ids)}")
        except ValueError as error:
            connection.reply(400, _json({"error": {"message": str(error), "code": 400}}))
            return
        counts.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            counts.waiting -= 1
        counts.running += 1
        try:
            await self._run(connection, answer)
        finally:
            counts.running -= 1
            self._slots.release()

    async def _run(self, connection: _Connection, answer: _Answer) -> None:
        settings, counts = self.settings, self.counts
        chain = self.cache.chain(answer.prompt)
        async with self._prefill:
            answer.cached = min(self.cache.match(chain), answer.num_prompt - 1)
            missing = answer.num_prompt - answer.cached
            await asyncio.sleep(settings.prefill_base + missing / settings.prefill_tps)
            self.cache.insert(chain)
        counts.prompt_tokens += answer.num_prompt
        counts.cached_tokens += answer.cached
        if answer.stream:
            if not await self._stream(connection, answer):
                return
        else:
            await asyncio.sleep(settings.tpot * len(answer.words))
            counts.output_tokens += len(answer.words)
            whole = _json(answer.whole())
            if self.faults.truncate_body:
                connection.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\n\r\n%b" % (len(whole), whole[: len(whole) // 2])
                )
                await asyncio.sleep(0.02)
                connection.abort()
                return
            connection.reply(200, whole, extra=b"x-sim-worker: %d\r\n" % self.port)
        if isinstance(answer.prompt, str):
            self.cache.insert(self.cache.chain(answer.prompt + "".join(answer.words)))
        counts.completed += 1

    async def _stream(self, connection: _Connection, answer: _Answer) -> bool:
        """Whether it came to its end."""
        faults, counts = self.faults, self.counts
        counts.continued += answer.begun > 0
        connection.begin_stream()
        due = time.monotonic()
        for number, event in enumerate(answer.events()):
            if 0 <= faults.die_after_chunks <= number:
                if faults.error_event:
                    error = {"message": "simulated", "code": faults.error_event}
                    connection.chunk(b"data: " + _json({"error": error}) + b"\n\n")
                    connection.chunk(DONE)
                    connection.end_stream()
                    return False
                if faults.cut_event:
                    connection.chunk(event[: len(event) // 2])
                    await asyncio.sleep(0.01)
                connection.abort()
                return False
            connection.chunk(event)
            counts.output_tokens += 1
            due += self.settings.tpot
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await connection.drain()
        if answer.include_usage:
            connection.chunk(answer.usage_event())
        connection.chunk(DONE)
        connection.end_stream()
        return True


class _Answer:
    """What is said to one request."""

    def __init__(
        self,
        worker: SimulatedWorker,
        path: str,
        body: dict[str, Any],
        headers: dict[str, str],
        answer_id: str,
    ) -> None:
        settings = worker.settings
        params = body.get("sampling_params") or {}
        self.path = path
        self.id = headers.get("x-request-id", answer_id)
        self.model = settings.model
        self.created = int(time.time())
        self.prompt = _prompt_of(path, body)
        self.num_prompt = max(1, _num_tokens(self.prompt))
        self.stream = bool(body.get("stream"))
        self.token_ids = bool(body.get("return_token_ids")) and settings.continues
        self.include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self.cached = 0
        length = (
            body.get("max_tokens")
            or body.get("max_completion_tokens")
            or body.get("max_output_tokens")
            or params.get("max_new_tokens")
            or settings.default_max_tokens
        )
        seed = ""
        if body.get("temperature", 1):
            seed = str(body["seed"] if body.get("seed") is not None else random.random())
        self.ids = answer_ids(self.prompt, seed, length)
        self.words = [word_of(token_id) for token_id in self.ids]
        self.begun = self._begun(body) if settings.continues else 0

    def _begun(self, body: dict[str, Any]) -> int:
        """How many tokens the client has already.

        Raises:
            ValueError: they are not those of this answer.
        """
        given = body.get("continue_from")
        if given is None:
            return 0
        ids = given[0]["token_ids"]
        if len(given) != 1 or ids != self.ids[: len(ids)]:
            raise ValueError(f"continue_from does not fit: {given}, and the answer is {self.ids}")
        if len(ids) == len(self.ids) and not given[0].get("finished"):
            raise ValueError("continue_from: the answer has ended")
        return len(ids)

    @property
    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": len(self.ids),
            "total_tokens": self.num_prompt + len(self.ids),
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def events(self) -> Iterator[bytes]:
        for i in range(self.begun, len(self.words)):
            yield b"data: " + _json(self._event(i)) + b"\n\n"

    def usage_event(self) -> bytes:
        told = {**self._head("chunk"), "choices": [], "usage": self.usage}
        return b"data: " + _json(told) + b"\n\n"

    def whole(self) -> dict[str, Any]:
        text = "".join(self.words)
        if self.path == "/generate":
            return {"text": text, "meta_info": self._meta(len(self.words))}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        if self.path == "/v1/completions":
            choice["text"] = text
        else:
            choice["message"] = {"role": "assistant", "content": text}
        return {**self._head("whole"), "choices": [choice], "usage": self.usage}

    def _event(self, i: int) -> dict[str, Any]:
        if self.path == "/generate":
            return {"text": "".join(self.words[: i + 1]), "meta_info": self._meta(i + 1)}
        choice: dict[str, Any] = {"index": 0}
        if self.path == "/v1/completions":
            choice["text"] = self.words[i]
        else:
            role = {} if i else {"role": "assistant"}
            choice["delta"] = {**role, "content": self.words[i]}
        choice["finish_reason"] = "length" if i == len(self.words) - 1 else None
        if self.token_ids:
            choice["token_ids"] = [self.ids[i]]
        return {**self._head("chunk"), "choices": [choice]}

    def _meta(self, num: int) -> dict[str, Any]:
        last = num == len(self.words)
        return {
            "id": self.id,
            "prompt_tokens": self.num_prompt,
            "completion_tokens": num,
            "cached_tokens": self.cached,
            "finish_reason": {"type": "length", "length": num} if last else None,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        chat = "chat.completion.chunk" if kind == "chunk" else "chat.completion"
        name = "text_completion" if self.path == "/v1/completions" else chat
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}


def answer_ids(prompt: Prompt, seed: str, length: int) -> list[int]:
    """The tokens of an answer: the same in every process, no two in a row alike."""
    begin = zlib.crc32(f"{seed}|{prompt}".encode())
    return [(begin + 7 * i) & 0xFFF for i in range(length)]


def word_of(token_id: int) -> str:
    """A token's text, CHARS_PER_TOKEN long."""
    return f"{token_id:03x} "


def _prompt_of(path: str, body: dict[str, Any]) -> Prompt:
    if path == "/v1/chat/completions":
        parts = []
        for message in body.get("messages", ()):
            content = message.get("content")
            if isinstance(content, list):
                content = "".join(part.get("text", "") for part in content)
            parts.append(f"<{message.get('role')}>{content or ''}")
        return "".join(parts) + "<assistant>"
    names = ("text", "input_ids") if path == "/generate" else ("prompt", "input")
    prompt = next((body[name] for name in names if body.get(name)), "")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        return str(prompt[0])
    return prompt if isinstance(prompt, str | list) else str(prompt)


def _num_tokens(prompt: Prompt) -> int:
    return len(prompt) // CHARS_PER_TOKEN if isinstance(prompt, str) else len(prompt)


def _canned(settings: Settings) -> tuple[bytes, list[bytes]]:
    """A fixed answer, whole and in events."""
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": settings.model}
    num = settings.default_max_tokens
    usage = {"prompt_tokens": 8, "completion_tokens": num, "total_tokens": 8 + num}
    choice = {"index": 0, "text": "abc " * num, "finish_reason": "length", "logprobs": None}
    event = {"index": 0, "text": "abc ", "finish_reason": None}
    if settings.continues:
        event["token_ids"] = [5]
    data = b"data: " + _json({**head, "choices": [event]}) + b"\n\n"
    return _json({**head, "choices": [choice], "usage": usage}), [data] * num


def _seen(path: str, headers: dict[str, str], body: bytes) -> Seen:
    parsed: Any = None
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
        parsed = msgspec.json.decode(body)
    return Seen(time=time.monotonic(), path=path, headers=headers, body=parsed, raw=body)


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value)


class _Connection(asyncio.Protocol):
    """A small HTTP/1.1 server connection; one request at a time, no pipelining."""

    def __init__(self, worker: SimulatedWorker) -> None:
        self._worker = worker
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._writable: asyncio.Event | None = None
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self.closed = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._worker.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._worker.connections.discard(self)
        self.resume_writing()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()

    def pause_writing(self) -> None:
        self._writable = asyncio.Event()

    def resume_writing(self) -> None:
        if self._writable is not None:
            self._writable.set()
            self._writable = None

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", {}, []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        path = self._url.partition(b"?")[0].decode()
        self._worker.handle(self, path, self._headers, b"".join(self._body))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, ConnectionError):
            print(f"simulated_worker.py: {error!r}", file=sys.stderr)
            self.abort()

    async def drain(self) -> None:
        if self._writable is not None:
            await self._writable.wait()

    def write(self, data: bytes) -> None:
        if self.closed or self._transport is None:
            raise ConnectionResetError
        self._transport.write(data)

    def reply(
        self, status: int, body: bytes, kind: bytes = b"application/json", extra: bytes = b""
    ) -> None:
        phrase = HTTPStatus(status).phrase.encode()
        self.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n%b"
            % (status, phrase, kind, len(body), extra, body)
        )

    def begin_stream(self) -> None:
        self.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
        )

    def chunk(self, data: bytes) -> None:
        self.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        self.write(b"0\r\n\r\n")

    def abort(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Simulated LLM workers, one on each port.")
    parser.add_argument("--ports", type=int, nargs="+", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    for setting in fields(Settings):
        flag = "--" + setting.name.replace("_", "-")
        default = getattr(Settings(), setting.name)
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            kind = str if default is None else type(default)
            parser.add_argument(flag, type=kind, default=default)
    return parser


async def serve(args: argparse.Namespace) -> None:
    """Run the workers until a signal."""
    settings = {f.name: getattr(args, f.name) for f in fields(Settings)}
    workers = [SimulatedWorker(port, args.host, **settings) for port in args.ports]
    for worker in workers:
        await worker.start()
    print("ready", *(worker.url for worker in workers), flush=True)
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await stop.wait()
    for worker in workers:
        await worker.kill()


if __name__ == "__main__":
    uvloop.run(serve(make_parser().parse_args()))
