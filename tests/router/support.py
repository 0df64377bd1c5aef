"""A router in this loop before simulated workers, and clients that look at every byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from router.app import make_limiter
from router.config import RouterConfig
from router.front import Front
from router.metrics import RouterMetrics
from router.proxy import Proxy
from router.routing import Router
from router.upstream import Upstream, UpstreamError
from router.workers import WorkerRegistry, make_worker
from scripts.simulated_worker import SimulatedWorker

JSON = (b"content-type", b"application/json")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def run(main, seconds=30):
    """Run a test's coroutine, never for ever."""

    async def bounded():
        async with asyncio.timeout(seconds):
            await main()

    asyncio.run(bounded())


@dataclass
class Reply:
    """An answer as a client got it; `error` if it broke off."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str = ""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json()["error"]["code"]

    @property
    def events(self) -> list[str]:
        """The data of each event; a body that does not end with one fails."""
        assert self.body.endswith(b"\n\n"), self.body[-200:]
        events = self.body.decode().removesuffix("\n\n").split("\n\n")
        assert all(event.startswith("data: ") for event in events), events
        return [event.removeprefix("data: ") for event in events]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The chunks of a stream that ended as it should."""
        *chunks, done = self.events
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]

    def text(self, index=0) -> str:
        """The text of one answer, streamed or not."""
        if not self.headers["content-type"].startswith("text/event-stream"):
            choice = self.json()["choices"][index]
            return choice["text"] if "text" in choice else choice["message"]["content"]
        parts = []
        for chunk in self.chunks:
            for choice in chunk.get("choices", ()):
                if choice["index"] == index:
                    delta = choice.get("delta")
                    parts.append(choice["text"] if delta is None else delta.get("content", ""))
        return "".join(parts)


class Client:
    """Sends requests to one address."""

    def __init__(self, base: str) -> None:
        self.base = base
        self._http = Upstream()

    async def request(self, method, path, body=b"", headers=(JSON,), base=None) -> Reply:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        reply = Reply()
        try:
            response = await self._http.request(
                base or self.base, method, path, list(headers), body, 20
            )
            reply.status = response.status
            reply.headers = {k.decode(): v.decode() for k, v in response.headers}
            while data := await response.chunk():
                reply.body += data
        except UpstreamError as error:
            reply.error = f"{type(error).__name__}: {error}"
        return reply

    async def post(self, path, body, *headers, base=None) -> Reply:
        return await self.request("POST", path, body, (JSON, *headers), base)

    async def get(self, path, base=None) -> Reply:
        return await self.request("GET", path, headers=(), base=base)

    async def stream(self, path=COMPLETIONS, **fields) -> Reply:
        """A greedy streamed answer."""
        body = {"model": "mock-model", "stream": True, "temperature": 0, "max_tokens": 12}
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": "hello there"}]
        else:
            body["prompt"] = "hello there"
        return await self.post(path, body | fields)

    async def close(self) -> None:
        await self._http.close()


@contextlib.asynccontextmanager
async def workers(num, **settings):
    """So many simulated workers in this loop."""
    settings = {"tpot": 0.001, "prefill_base": 0.0, "prefill_tps": 1e9} | settings
    started = [await SimulatedWorker(**settings).start() for _ in range(num)]
    try:
        yield started
    finally:
        for worker in started:
            await worker.kill()


class Cutter:
    """Stands before a worker and cuts connections after so many bytes of an answer's body."""

    def __init__(self, url: str) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)
        self.cut_after: int | None = None
        self.num_cuts = 0
        self._server: asyncio.AbstractServer | None = None
        self._tasks: set[asyncio.Task] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def start(self) -> Cutter:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        worker_reader, worker_writer = await asyncio.open_connection(self._host, self._port)

        async def forth():
            while data := await reader.read(65536):
                worker_writer.write(data)
            worker_writer.close()

        sending = asyncio.create_task(forth())
        try:
            await self._back(worker_reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # it is cancelled by `stop` only, which waits for it
        finally:
            sending.cancel()
            worker_writer.transport.abort()
            writer.transport.abort()

    async def _back(self, reader, writer):
        seen, in_body = 0, False
        while data := await reader.read(65536):
            if not in_body:
                head, end, body = data.partition(b"\r\n\r\n")
                writer.write(head + end)
                in_body, data = True, body
            left = None if self.cut_after is None else self.cut_after - seen
            if left is not None and len(data) >= left:
                writer.write(data[:left])
                await writer.drain()
                await asyncio.sleep(0.005)
                self.num_cuts += 1
                return
            seen += len(data)
            writer.write(data)
            await writer.drain()


@contextlib.asynccontextmanager
async def cutting(url):
    cutter = await Cutter(url).start()
    try:
        yield cutter
    finally:
        await cutter.stop()


class Routed:
    """A running router: its parts, and a client for it."""

    def __init__(self, parts, front, base):
        self.__dict__.update(parts)
        self.front = front
        self.base = base
        self.client = Client(base)


@contextlib.asynccontextmanager
async def routed(urls, *, continues=True, **changes):
    """A router before these workers, all healthy; by round robin unless `changes` says else."""
    fields = {"retry_initial_backoff_ms": 1, "policy": "round_robin"} | changes
    config = RouterConfig(**fields)
    registry, metrics, rng = WorkerRegistry(), RouterMetrics(), random.Random(5)
    router = Router(
        config=config, registry=registry, metrics=metrics, clock=time.monotonic, rng=rng
    )
    for url in urls:
        worker = make_worker(config, url, clock=time.monotonic, supports_continuation=continues)
        registry.add(worker)
        router.worker_added(worker)
    upstream = Upstream(connect_timeout_s=2)
    parts = {
        "config": config,
        "registry": registry,
        "router": router,
        "upstream": upstream,
        "limiter": make_limiter(config, metrics),
        "metrics": metrics,
    }
    proxy = Proxy(answer_headers=lambda headers: [(b"vary", b"origin")], rng=rng, **parts)
    parts["proxy"] = proxy
    front = Front(proxy.handle, max_body=config.max_payload_size)
    listener = socket.create_server(("127.0.0.1", 0))
    await front.listen(listener)
    server = Routed(parts, front, f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        yield server
    finally:
        await server.client.close()
        await front.shut_down(0)
        await upstream.close()
