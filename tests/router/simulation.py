"""A fleet of simulated workers before a `Router`, in simulated time: what a policy is worth.

Workers have a paged prefix cache of bounded size, prefill one prompt at a time, and decode in
bounded slots, as the engines do. Clients send one request after another. Everything is seeded, and
a run of minutes takes a second.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from router.config import RouterConfig
from router.request import RoutedRequest
from router.routing import Outcome, Router
from router.workers import Worker, WorkerRegistry, make_worker
from scripts.router_load import Session, sessions_of
from scripts.simulated_worker import CHARS_PER_TOKEN, PrefixCache

WORKLOADS = ("gsp", "zipf", "chat")


@lru_cache(8)
def workload(name: str, seed: int) -> list[Session]:
    """One of WORKLOADS, as the router's benchmark plays it."""
    return sessions_of(name, seed=seed)


# The same texts come again, for each policy that is played: what they are hashed to is kept.
@lru_cache(4096)
def _chain(text: str) -> list[int]:
    return PrefixCache(0).chain(text)


@lru_cache(4096)
def _parsed(path: str, body: bytes) -> RoutedRequest:
    return RoutedRequest.parse(path, body)


@dataclass(kw_only=True)
class Server:
    """One worker's machine."""

    cache: PrefixCache
    slots: int = 16
    prefill_tokens_per_s: float = 20_000.0
    prefill_base_s: float = 0.002
    token_s: float = 0.02
    running: int = 0
    queue: deque = field(default_factory=deque)
    prefill_free_at: float = 0.0


@dataclass(kw_only=True)
class Run:
    """What came out."""

    hit_rate: float
    requests_per_s: float
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    max_over_mean: float
    by_worker: dict[str, list[float]]


class NoMetrics:
    """Nothing is counted."""

    def __getattr__(self, name):
        return lambda *args: None


class Fleet:
    """Servers, the router before them, and a clock."""

    def __init__(self, config: RouterConfig, cache_tokens, seed: int = 0) -> None:
        self.now = 0.0
        self.config = config
        self.registry = WorkerRegistry()
        self.router = Router(
            config=config,
            registry=self.registry,
            metrics=NoMetrics(),
            clock=lambda: self.now,
            rng=random.Random(seed),
        )
        self.servers: dict[Worker, Server] = {}
        for tokens in cache_tokens:
            self.add(tokens)
        self._events: list = []
        self._count = itertools.count()
        self._tokens = self._cached = 0
        self.ttft: list[float] = []
        self.starts: dict[str, list[float]] = {}

    def add(self, cache_tokens: int) -> Worker:
        """One more worker, from now on."""
        url = f"http://worker{len(self.servers)}"
        worker = make_worker(
            self.config,
            url,
            clock=lambda: self.now,
            capacity_tokens=cache_tokens,
            max_running=16,
        )
        self.registry.add(worker)
        self.router.worker_added(worker)
        self.servers[worker] = Server(cache=PrefixCache(cache_tokens))
        return worker

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (seconds, next(self._count), what))

    def run(self, sessions, *, clients: int = 64, out: int = 32) -> Run:
        """Let so many clients work the sessions off."""
        todo = iter(sessions)
        for _ in range(clients):
            self.at(0.0, lambda: self._next_session(todo, out))
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.ttft.sort()
        sent = [len(starts) for starts in self.starts.values()]
        num = len(self.ttft)
        return Run(
            hit_rate=self._cached / self._tokens,
            requests_per_s=num / self.now,
            ttft_mean=sum(self.ttft) / num,
            ttft_p50=self.ttft[num // 2],
            ttft_p99=self.ttft[int(num * 0.99)],
            max_over_mean=max(sent) * len(self.servers) / num,
            by_worker=self.starts,
        )

    def _next_session(self, todo, out: int) -> None:
        session = next(todo, None)
        if session is not None:
            messages = [{"role": "system", "content": session.prefix}] if session.chat else []
            self._turn(session, 0, messages, todo, out)

    def _turn(self, session, number, messages, todo, out) -> None:
        if number == len(session.turns):
            self._next_session(todo, out)
            return
        question = session.turns[number]
        if session.chat:
            messages.append({"role": "user", "content": question})
            path, body = "/v1/chat/completions", {"messages": messages}
            text = "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"
        else:
            path, body = "/v1/completions", {"prompt": session.prefix + question}
            text = session.prefix + question
        request = _parsed(path, json.dumps({**body, "stream": True}).encode())

        def ended(answer: str) -> None:
            messages.append({"role": "assistant", "content": answer})
            self._turn(session, number + 1, messages, todo, out)

        self._send(request, text, out, ended)

    def _send(self, request, text, out, ended) -> None:
        ticket = self.router.begin(request)
        assert ticket is not None
        server, sent = self.servers[ticket.worker], self.now
        self.starts.setdefault(ticket.worker.url, []).append(sent)

        def start() -> None:
            begin = max(self.now, server.prefill_free_at)
            chain, num_tokens = _chain(text), len(text) // CHARS_PER_TOKEN
            cached = min(server.cache.match(chain), num_tokens - 1)
            server.cache.insert(chain)
            missing = num_tokens - cached
            seconds = server.prefill_base_s + missing / server.prefill_tokens_per_s
            server.prefill_free_at = begin + seconds
            self._tokens += num_tokens
            self._cached += cached
            self.at(begin + seconds, lambda: first(cached))

        def first(cached: int) -> None:
            ticket.first_token()
            self.ttft.append(self.now - sent)
            self.at(self.now + out * server.token_s, lambda: last(cached))

        def last(cached: int) -> None:
            answer = f"{hash(text) & 0xFFF:03x} " * out
            server.cache.insert(_chain(text + answer))
            ticket.usage(len(text) // CHARS_PER_TOKEN, cached, out)
            ticket.end(Outcome.OK)
            if server.queue:
                server.queue.popleft()()
            else:
                server.running -= 1
            ended(answer)

        if server.running < server.slots:
            server.running += 1
            start()
        else:
            server.queue.append(start)
