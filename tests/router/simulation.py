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
from bisect import bisect
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

from router.config import RouterConfig
from router.request import RoutedRequest
from router.routing import Outcome, Router
from router.workers import Worker, WorkerRegistry, make_worker

CHARS = 4
PAGE_CHARS = 64
WORDS = [a + b + c + " " for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwxyz"]


def words(rng: random.Random, tokens: int) -> str:
    return "".join(rng.choices(WORDS, k=tokens))


@dataclass(kw_only=True)
class Session:
    """A shared prefix and the turns behind it, each with the whole conversation so far."""

    prefix: str
    turns: list[str]
    chat: bool = False


def zipf(n: int, s: float, rng: random.Random) -> Callable[[], int]:
    weights = list(accumulate(1 / (i + 1) ** s for i in range(n)))
    return lambda: min(n - 1, bisect(weights, rng.random() * weights[-1]))


def gsp(seed: int, num: int = 600, skew: float = 0.0, groups: int = 64) -> list[Session]:
    """Questions behind long prefixes, every prefix equally often or by a zipf law."""
    rng = random.Random(seed)
    prefixes = [words(rng, 2048) for _ in range(groups)]
    if skew:
        pick = zipf(groups, skew, rng)
        order = [pick() for _ in range(num)]
    else:
        order = [i % groups for i in range(num)]
        rng.shuffle(order)
    return [Session(prefix=prefixes[g], turns=[words(rng, 128)]) for g in order]


def conversations(seed: int, num: int = 153) -> list[Session]:
    """Four turns behind system prompts of a skewed popularity."""
    rng = random.Random(seed)
    prefixes = [words(rng, 1024) for _ in range(64)]
    pick = zipf(64, 0.9, rng)
    return [
        Session(prefix=prefixes[pick()], turns=[words(rng, 128) for _ in range(4)], chat=True)
        for _ in range(num)
    ]


@lru_cache(8)
def workload(name: str, seed: int) -> list[Session]:
    """One of WORKLOADS."""
    match name:
        case "gsp":
            return gsp(seed)
        case "zipf":
            return gsp(seed, skew=1.1)
        case _:
            return conversations(seed)


WORKLOADS = ("gsp", "zipf", "chat")


# The same texts come again, for each policy that is played: what they are hashed to is kept.
@lru_cache(4096)
def _chain(text: str) -> tuple[int, ...]:
    chain, name = [], 0
    for end in range(PAGE_CHARS, len(text) + 1, PAGE_CHARS):
        name = hash((name, text[end - PAGE_CHARS : end]))
        chain.append(name)
    return tuple(chain)


@lru_cache(4096)
def _parsed(path: str, body: bytes) -> RoutedRequest:
    return RoutedRequest.parse(path, body)


class Cache:
    """Paged, bounded, the least recently used page goes first; leaves before their parents."""

    def __init__(self, tokens: int) -> None:
        self.limit = tokens * CHARS // PAGE_CHARS
        self.pages: OrderedDict[int, None] = OrderedDict()

    def take(self, text: str) -> int:
        """Tokens of the text that are cached; all of it is, from now on."""
        chain, num = _chain(text), 0
        for page in chain:
            if page not in self.pages:
                break
            num += 1
        for page in reversed(chain):
            self.pages[page] = None
            self.pages.move_to_end(page)
        while len(self.pages) > self.limit:
            self.pages.popitem(last=False)
        return num * PAGE_CHARS // CHARS


@dataclass(kw_only=True)
class Server:
    """One worker's machine."""

    cache: Cache
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
        self.servers[worker] = Server(cache=Cache(cache_tokens))
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
            cached = min(server.cache.take(text), len(text) // CHARS - 1)
            missing = len(text) // CHARS - cached
            seconds = server.prefill_base_s + missing / server.prefill_tokens_per_s
            server.prefill_free_at = begin + seconds
            self._tokens += len(text) // CHARS
            self._cached += cached
            self.at(begin + seconds, lambda: first(cached))

        def first(cached: int) -> None:
            ticket.first_token()
            self.ttft.append(self.now - sent)
            self.at(self.now + out * server.token_s, lambda: last(cached))

        def last(cached: int) -> None:
            answer = f"{hash(text) & 0xFFF:03x} " * out
            server.cache.take(text + answer)
            ticket.usage(len(text) // CHARS, cached, out)
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
