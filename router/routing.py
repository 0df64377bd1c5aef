"""Which worker gets a request, and the books about it.

`Router.begin` chooses a worker by the policy and opens a `Ticket`, the account of one attempt: it
counts as load from then on, its prompt counts as cached there, and what the worker answers corrects
both. Nothing here waits, and every number that a choice depends on is kept here or in `Worker`.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import NamedTuple, Protocol

from router.config import RouterConfig
from router.policies import expected_cost, least
from router.prefix_index import PrefixIndex
from router.request import BLOCK_CHARS, RoutedRequest, block_end
from router.workers import UNKNOWN_MODEL, Worker, WorkerRegistry

FIRST_CHARS_PER_TOKEN = 4.0
SMOOTHING = 0.05
"""Weight of one answer in the running estimate of characters per token."""
DRIFT = 0.02
"""Share by which that estimate may move before the sizes that rest on it are made anew."""
LEARNED_FROM = frozenset({"chat", "completions", "generate"})
"""Endpoints whose routing key is all that the worker counts as prompt."""
LOST_CHARS = 2048
SURPRISES = 2
"""A worker that has nothing cached of a prefix of LOST_CHARS which nobody was computing, and whose
cache was not full, so many times in a row, was restarted or flushed behind the router's back."""
NO_SLOT_TOKENS = 2500
SLOT_WAIT_TOKENS = 1000
"""What it costs, in prompt tokens, to find no slot free at a worker, and to wait for each request
that must end there before. Tuned by `tests/router/simulation.py` together with
`router.policies.MISS_WEIGHT`: more of these balances better and hits less."""
PREFIX_HASH_CHARS = 1024
PREFIX_HASH_OVERLOAD = 1.25
"""The policy prefix_hash leaves a worker that has so many times the mean load."""
RING_POINTS = 64
"""Points of each worker on the hash ring."""
MAX_ROUTING_KEYS = 1 << 20
MAX_KEY_CHARS = 128
"""Of a routing key as it is remembered; of a longer one, its digest is."""
BRANCHED = frozenset({"manual", "consistent_hashing", "prefix_hash"})
"""Policies whose metrics tell the way that each choice took."""
FRESH_S = 5.0
"""A reported load that is older says nothing about now."""


class Outcome(Enum):
    """How an attempt ended, as far as its worker is concerned."""

    OK = "ok"
    FAILED = "failed"
    ABSENT = "absent"
    """Nobody is there: no connection came about."""
    BUSY = "busy"
    """It is full, not broken."""
    NEUTRAL = "neutral"
    """The client's fault, or the client left."""


_SUCCESS = {
    Outcome.OK: True,
    Outcome.FAILED: False,
    Outcome.ABSENT: False,
    Outcome.BUSY: None,
    Outcome.NEUTRAL: None,
}


class RoutingMetrics(Protocol):
    """What is told while routing; see `router.metrics`."""

    def selection(self, worker: str, policy: str, model: str) -> None: ...

    def cache(self, worker: str, hit_tokens: int, prompt_tokens: int) -> None: ...

    def expected(self, worker: str, hit_tokens: int, prompt_tokens: int) -> None: ...

    def rebalanced(self) -> None: ...

    def branch(self, policy: str, branch: str) -> None: ...

    def breaker_outcome(self, worker: str, outcome: str) -> None: ...


class Choice(NamedTuple):
    """A worker, how many blocks of the request it is thought to have cached, and how many whoever
    has most of them."""

    worker: Worker
    depth: int = 0
    deepest: int = 0


class Policy(Protocol):
    """Chooses among candidates, of which there is at least one."""

    def choose(self, candidates: Sequence[Worker], request: RoutedRequest) -> Choice | None:
        """None if the request names a worker that is not there."""


class Ticket:
    """The account of one attempt. `end` must be called, and may be called again."""

    __slots__ = (
        "_alone",
        "_backlog",
        "_computed",
        "_depth",
        "_era",
        "_open",
        "_proved",
        "_request",
        "_router",
        "worker",
    )

    def __init__(self, router: Router, request: RoutedRequest, choice: Choice) -> None:
        worker = self.worker = choice.worker
        self._router = router
        self._request = request
        self._depth = choice.depth
        self._backlog = router.tokens(request.num_chars - _chars(choice.depth), worker.model_id)
        # Then all that is thought to be cached there must be: nobody is still computing it.
        self._alone = worker.backlog_tokens < 1
        self._computed = False
        self._proved = False
        self._open = True
        worker.in_flight += 1
        key = request.routing_key
        if key is not None:
            worker.routing_keys[key] = worker.routing_keys.get(key, 0) + 1
        worker.backlog_tokens += self._backlog
        self._era = worker.breaker.begin()

    def first_token(self) -> None:
        """The prompt is computed."""
        self._computed = True
        self._proved = self._proved or self.worker.breaker.prove(self._era)
        self._close_backlog()

    def _release_key(self) -> None:
        keys, key = self.worker.routing_keys, self._request.routing_key
        if key is not None:
            keys[key] -= 1
            if not keys[key]:
                del keys[key]

    def _close_backlog(self) -> None:
        worker = self.worker
        worker.backlog_tokens -= self._backlog
        self._backlog = 0.0
        if worker.backlog_tokens < 1e-6:  # what rounding left
            worker.backlog_tokens = 0.0

    def usage(
        self,
        prompt_tokens: int,
        cached_tokens: int | None = None,
        completion_tokens: int | None = None,
    ) -> None:
        """What the worker said the prompt was and had of it."""
        self._computed = True
        self._router._learn_size(self.worker, self._request, prompt_tokens)
        if cached_tokens is not None:
            self._router.metrics.cache(self.worker.url, cached_tokens, prompt_tokens)
            self._router._learn_cached(
                self.worker, self._request, self._depth, cached_tokens, alone=self._alone
            )

    def answered(self, answer: str | Sequence[int]) -> None:
        """The whole answer: text, or token ids for a prompt of those. It is cached as well."""
        self._router._remember_answer(self.worker, self._request, answer)

    def end(self, outcome: Outcome) -> None:
        """The attempt is over; only the first call counts."""
        if not self._open:
            return
        self._open = False
        self._close_backlog()
        self.worker.in_flight -= 1
        self._release_key()
        if not self._computed and outcome is not Outcome.OK:
            self._router._not_computed(self.worker, self._request, self._depth)
        success = _SUCCESS[outcome]
        absent = outcome is Outcome.ABSENT
        self.worker.breaker.end(self._era, success, proved=self._proved, absent=absent)
        if success is not None:
            self._router.metrics.breaker_outcome(
                self.worker.url, "success" if success else "failure"
            )


class Router:
    """Chooses workers. One loop calls it.

    Attributes:
        index: what each worker has cached, as far as is known (policy cache_aware).
    """

    def __init__(
        self,
        *,
        config: RouterConfig,
        registry: WorkerRegistry,
        metrics: RoutingMetrics,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.metrics = metrics
        self.index = PrefixIndex()
        self._config = config
        self._registry = registry
        self._clock = clock
        self._remembers = config.policy == "cache_aware"
        self._ratios: dict[str, _Ratio] = {}
        self._free_bits: list[int] = []
        self._num_bits = 0
        self._policy = _make_policy(
            config, self.index, self.chars_per_token, registry, metrics, clock, rng
        )

    def begin(self, request: RoutedRequest, exclude: Collection[Worker] = ()) -> Ticket | None:
        """Give a request to a worker; None if there is none that may have it."""
        candidates = self.candidates(request, exclude)
        if not candidates:
            if self._config.policy in BRANCHED:
                self.metrics.branch(self._config.policy, "no_healthy_workers")
            return None
        choice = self._policy.choose(candidates, request)
        if choice is None:
            return None
        worker = choice.worker
        ticket = Ticket(self, request, choice)
        self.metrics.selection(worker.url, self._config.policy, worker.model_id)
        if self._remembers:
            per_token = self.chars_per_token(worker.model_id)
            self.metrics.expected(
                worker.url,
                round(_chars(choice.depth) / per_token),
                round(request.num_chars / per_token),
            )
            if choice.depth < choice.deepest:
                self.metrics.rebalanced()
            self.index.insert(worker.bit, request.blocks, self._clock())
        return ticket

    def candidates(
        self, request: RoutedRequest, exclude: Collection[Worker] = ()
    ) -> Sequence[Worker]:
        """The workers that may have a request now."""
        model = request.model if self._config.enable_igw else None
        return self._registry.available(model, exclude)

    def tokens(self, num_chars: float, model: str = UNKNOWN_MODEL) -> float:
        """Estimated tokens of so many characters, for the workers of a model."""
        return num_chars / self.chars_per_token(model)

    @property
    def num_routing_keys(self) -> int:
        """Keys that the policy manual remembers."""
        return len(self._policy) if isinstance(self._policy, StickyKeys) else 0

    def chars_per_token(self, model: str) -> float:
        """By what the workers of a model have counted lately."""
        ratio = self._ratios.get(model)
        return FIRST_CHARS_PER_TOKEN if ratio is None else ratio.value

    @property
    def remembers(self) -> bool:
        """Whether prompts and answers are of use to the policy."""
        return self._remembers

    def worker_added(self, worker: Worker) -> None:
        """A worker has joined the registry, with an empty cache."""
        if self._free_bits:
            worker.bit = self._free_bits.pop()
        else:
            worker.bit = self._num_bits
            self._num_bits += 1
        self.index.add(worker.bit, self._limit(worker))

    def worker_removed(self, worker: Worker) -> None:
        """A worker has left the registry; tickets of it may still be open."""
        self.index.remove(worker.bit)
        self._free_bits.append(worker.bit)
        worker.bit = -1
        if all(other.model_id != worker.model_id for other in self._registry.list()):
            self._ratios.pop(worker.model_id, None)

    def flushed(self, worker: Worker) -> None:
        """A worker has lost its cache: it was flushed, or began anew."""
        worker.surprises = 0
        if worker.bit >= 0:
            self.index.clear(worker.bit)

    def capacity_changed(self, worker: Worker) -> None:
        """A worker has said anew how much it can cache."""
        if worker.bit >= 0:
            self.index.resize(worker.bit, self._limit(worker))

    def forget_old(self) -> None:
        """Forget prefixes that were not asked for lately; call every --eviction-interval-secs."""
        self.index.forget_before(self._clock() - self._config.max_prefix_age_secs)

    def _limit(self, worker: Worker) -> int:
        """Characters of a worker's shadow."""
        most = self._config.max_tree_size
        if worker.capacity_tokens is None:
            return most
        return min(most, int(worker.capacity_tokens * self.chars_per_token(worker.model_id)))

    def _learn_size(self, worker: Worker, request: RoutedRequest, prompt_tokens: int) -> None:
        """Correct the estimate of characters per token by an answer."""
        short = request.num_chars < 4 * BLOCK_CHARS
        if short or prompt_tokens <= 0 or request.endpoint not in LEARNED_FROM:
            return
        ratio = self._ratios.setdefault(worker.model_id, _Ratio())
        now = min(max(request.num_chars / prompt_tokens, 0.5), 16.0)
        ratio.value += SMOOTHING * (now - ratio.value)
        if abs(ratio.value / ratio.applied - 1) > DRIFT:
            ratio.applied = ratio.value
            for other in self._registry.list():
                if other.model_id == worker.model_id:
                    self.capacity_changed(other)

    def _learn_cached(
        self,
        worker: Worker,
        request: RoutedRequest,
        depth: int,
        cached_tokens: int,
        *,
        alone: bool,
    ) -> None:
        """Correct a worker's shadow by what it had cached of `depth` blocks that it should have."""
        if not self._remembers or worker.bit < 0:
            return
        matched = _chars(depth)
        missing = matched - round(cached_tokens * self.chars_per_token(worker.model_id))
        # A prefix that is being computed by another request counts as cached here and not there:
        # only a cache that may be full has lost something.
        if self.index.chars(worker.bit) > self._limit(worker) / 2:
            if missing > max(2 * BLOCK_CHARS, matched // 8):
                self.index.forget_oldest(worker.bit, missing)
        elif cached_tokens > 0:
            worker.surprises = 0
        elif alone and matched >= LOST_CHARS:
            worker.surprises += 1
            if worker.surprises >= SURPRISES:
                self.flushed(worker)
                self.index.insert(worker.bit, request.blocks, self._clock())

    def _remember_answer(
        self, worker: Worker, request: RoutedRequest, answer: str | Sequence[int]
    ) -> None:
        """The next turn of a conversation begins with prompt and answer."""
        if not self._remembers or worker.bit < 0 or not answer:
            return
        blocks = request.blocks_with(answer)
        if len(blocks) > len(request.blocks):
            self.index.insert(worker.bit, blocks, self._clock())

    def _not_computed(self, worker: Worker, request: RoutedRequest, depth: int) -> None:
        """A worker refused a prompt, or failed or was stopped before it was through."""
        if self._remembers and worker.bit >= 0:
            self.index.forget(worker.bit, request.blocks[depth:])


class _Ratio:
    """Characters per token of one model's prompts: now, and as the shadows' limits have it."""

    __slots__ = ("applied", "value")

    def __init__(self) -> None:
        self.value = self.applied = FIRST_CHARS_PER_TOKEN


# ---- policies ----------------------------------------------------------------------------------


def _make_policy(
    config: RouterConfig,
    index: PrefixIndex,
    chars_per_token: Callable[[str], float],
    registry: WorkerRegistry,
    metrics: RoutingMetrics,
    clock: Callable[[], float],
    rng: random.Random,
) -> Policy:
    match config.policy:
        case "cache_aware" if config.cache_aware_mode == "cost":
            return CheapestWorker(index, chars_per_token)
        case "cache_aware":
            return CacheThresholds(config, index)
        case "round_robin":
            return RoundRobin()
        case "random":
            return RandomWorker(rng)
        case "power_of_two":
            return PowerOfTwo(rng, clock)
        case "prefix_hash":
            return PrefixHash(registry, metrics, rng)
        case "consistent_hashing":
            return ConsistentHashing(registry, metrics, rng)
        case "manual":
            return StickyKeys(config, metrics, clock, rng)
        case name:
            raise ValueError(f"There is no policy {name}.")


def _mask(candidates: Sequence[Worker]) -> int:
    mask = 0
    for worker in candidates:
        mask |= 1 << worker.bit
    return mask


def _chars(num_blocks: int) -> int:
    return block_end(num_blocks - 1) if num_blocks else 0


class CheapestWorker:
    """By expected cost: what the worker must compute, and what is to be computed there first.

    Equals take the one with the least cached, so that prefixes spread over an idle fleet.
    """

    def __init__(self, index: PrefixIndex, chars_per_token: Callable[[str], float]) -> None:
        self._index, self._chars_per_token = index, chars_per_token
        self._turn = 0

    def choose(self, candidates: Sequence[Worker], request: RoutedRequest) -> Choice:
        depths = self._index.match(request.blocks, _mask(candidates))
        per_token = {w.model_id: 1.0 for w in candidates}
        for model in per_token:
            per_token[model] = self._chars_per_token(model)
        keys = []
        for worker in candidates:
            depth = depths.get(worker.bit)
            missing = request.num_chars - (_chars(depth) if depth else 0)
            running, wait = worker.in_flight, worker.backlog_tokens
            if worker.max_running is not None and running >= worker.max_running:
                wait += NO_SLOT_TOKENS + SLOT_WAIT_TOKENS * (running + 1 - worker.max_running)
            cost = expected_cost(missing / per_token[worker.model_id], wait, running)
            keys.append((cost, self._index.chars(worker.bit)))
        worker = candidates[least(keys, self._turn)]
        self._turn += 1
        return Choice(worker, depths.get(worker.bit, 0), max(depths.values(), default=0))


class CacheThresholds:
    """SGLang's rule: the holder of the longest prefix if that is long enough and loads are even
    enough, else the least loaded worker. Equals take turns."""

    def __init__(self, config: RouterConfig, index: PrefixIndex) -> None:
        self._config, self._index = config, index
        self._turn = 0

    def choose(self, candidates: Sequence[Worker], request: RoutedRequest) -> Choice:
        config = self._config
        depths = self._index.match(request.blocks, _mask(candidates))
        loads = [worker.in_flight for worker in candidates]
        most, least = max(loads), min(loads)
        uneven = (
            most - least > config.balance_abs_threshold
            and most > least * config.balance_rel_threshold
        )
        longest = max(depths.values(), default=0)
        rate = _chars(longest) / request.num_chars if request.num_chars else 0.0
        pool = candidates
        if not uneven and rate > config.cache_threshold:
            pool = [worker for worker in candidates if depths.get(worker.bit, 0) == longest]
        worker = _fewest_in_flight(pool, self._turn)
        self._turn += 1
        return Choice(worker, depths.get(worker.bit, 0), longest)


def _fewest_in_flight(workers: Sequence[Worker], turn: int) -> Worker:
    return workers[least([(worker.in_flight, 0) for worker in workers], turn)]


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[Worker], request: RoutedRequest) -> Choice:
        worker = candidates[self._turn % len(candidates)]
        self._turn += 1
        return Choice(worker)


class RandomWorker:
    """Any."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Worker], request: RoutedRequest) -> Choice:
        return Choice(self._rng.choice(candidates))


class PowerOfTwo:
    """The less loaded of two drawn at random: by their own fresh word, else by what runs there."""

    def __init__(self, rng: random.Random, clock: Callable[[], float]) -> None:
        self._rng, self._clock = rng, clock

    def choose(self, candidates: Sequence[Worker], request: RoutedRequest) -> Choice:
        if len(candidates) == 1:
            return Choice(candidates[0])
        one, other = self._rng.sample(candidates, 2)
        if one.in_flight == other.in_flight:
            fresh = self._clock() - FRESH_S
            said = [w.reported.tokens for w in (one, other) if w.reported and w.reported.at > fresh]
            if len(said) == 2 and said[1] < said[0]:
                return Choice(other)
            return Choice(one)
        return Choice(one if one.in_flight < other.in_flight else other)


@dataclass(frozen=True, slots=True)
class _Ring:
    """Workers on a hash ring."""

    points: list[int]
    workers: list[Worker]

    @classmethod
    def of(cls, workers: Sequence[Worker]) -> _Ring:
        marks = sorted(
            (_point(f"{worker.url}#{i}"), n)
            for n, worker in enumerate(workers)
            for i in range(RING_POINTS)
        )
        return cls([point for point, _ in marks], [workers[n] for _, n in marks])

    def walk(self, point: int) -> Iterator[Worker]:
        """The workers in their order from a point on; the same one may come again."""
        at = bisect_left(self.points, point)
        for index in range(at, at + len(self.workers)):
            yield self.workers[index % len(self.workers)]


def _point(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class _Rings:
    """The ring of all registered workers, available or not: it costs something to make."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self._registry = registry
        self._workers: tuple[Worker, ...] = ()
        self._ring = _Ring([], [])

    def now(self) -> _Ring:
        workers = self._registry.list()
        if self._workers is not workers:
            self._workers = workers
            self._ring = _Ring.of(workers)
        return self._ring


class PrefixHash:
    """By the beginning of the prompt on a hash ring; an overloaded worker gives way to the next."""

    def __init__(
        self, registry: WorkerRegistry, metrics: RoutingMetrics, rng: random.Random
    ) -> None:
        self._rings, self._metrics, self._rng = _Rings(registry), metrics, rng

    def choose(self, candidates: Sequence[Worker], request: RoutedRequest) -> Choice:
        if not request.blocks:
            self._metrics.branch("prefix_hash", "no_routing_key")
            return Choice(self._rng.choice(candidates))
        block = request.blocks[min(len(request.blocks), PREFIX_HASH_CHARS // BLOCK_CHARS) - 1]
        mean = (1 + sum(worker.in_flight for worker in candidates)) / len(candidates)
        # Somebody is never above the mean.
        light = {w for w in candidates if w.in_flight <= PREFIX_HASH_OVERLOAD * mean}
        there, moved = set(candidates), False
        for worker in self._rings.now().walk(block % (1 << 64)):
            if worker in light:
                self._metrics.branch("prefix_hash", "load_balance_walk" if moved else "ring_hit")
                return Choice(worker)
            moved = moved or worker in there
        raise AssertionError("every worker is on the ring")


class ConsistentHashing:
    """By the client's key on a hash ring, so that few keys move when workers come and go.

    The header x-smg-target-worker names a worker by its place; else x-smg-routing-key, else what
    tells clients apart (authorization, x-forwarded-for, cookie) is the key; else any.
    """

    def __init__(
        self, registry: WorkerRegistry, metrics: RoutingMetrics, rng: random.Random
    ) -> None:
        self._registry, self._metrics, self._rng = registry, metrics, rng
        self._rings = _Rings(registry)

    def choose(self, candidates: Sequence[Worker], request: RoutedRequest) -> Choice | None:
        workers = self._registry.list()
        if request.target is not None:
            digits = request.target
            at = int(digits) if digits.isascii() and digits.isdigit() else -1
            named = workers[at] if 0 <= at < len(workers) else None
            if named is None or named not in candidates:
                self._metrics.branch("consistent_hashing", "target_worker_miss")
                return None
            self._metrics.branch("consistent_hashing", "target_worker_hit")
            return Choice(named)
        key = request.routing_key or request.implicit_key
        if key is None:
            self._metrics.branch("consistent_hashing", "random_fallback")
            return Choice(self._rng.choice(candidates))
        self._metrics.branch("consistent_hashing", "routing_key_hit")
        there = set(candidates)
        return Choice(next(w for w in self._rings.now().walk(_point(key)) if w in there))


class StickyKeys:
    """The client's routing key stays with its worker; a new one is given out by --assignment-mode.

    A key remembers two workers: the second one takes over while the first is not available.
    """

    def __init__(
        self,
        config: RouterConfig,
        metrics: RoutingMetrics,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._mode, self._max_idle_s = config.assignment_mode, config.max_idle_secs
        self._metrics = metrics
        self._clock, self._rng = clock, rng
        self._keys: OrderedDict[str, tuple[list[str], float]] = OrderedDict()
        self._num_keys: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def choose(self, candidates: Sequence[Worker], request: RoutedRequest) -> Choice:
        now, key = self._clock(), request.routing_key
        if key is not None and len(key) > MAX_KEY_CHARS:
            key = blake2b(key.encode()).hexdigest()
        self._expire(now)
        if key is None:
            self._metrics.branch("manual", "no_routing_id")
            return Choice(self._rng.choice(candidates))
        urls = self._keys[key][0] if key in self._keys else []
        by_url = {worker.url: worker for worker in candidates}
        worker = next((by_url[url] for url in urls if url in by_url), None)
        if worker is not None:
            branch = "occupied_hit"
        else:
            branch = "occupied_miss" if urls else "vacant"
            worker = self._assign(candidates)
            urls = [*urls, worker.url]
            self._count(worker.url, 1)
            if len(urls) > 2:
                self._count(urls[0], -1)
                urls = urls[1:]
        self._metrics.branch("manual", branch)
        self._keys[key] = urls, now
        self._keys.move_to_end(key)
        return Choice(worker)

    def _assign(self, candidates: Sequence[Worker]) -> Worker:
        match self._mode:
            case "min_load":
                fewest = min(worker.in_flight for worker in candidates)
                candidates = [w for w in candidates if w.in_flight == fewest]
            case "min_group":
                fewest = min(self._num_keys.get(worker.url, 0) for worker in candidates)
                candidates = [w for w in candidates if self._num_keys.get(w.url, 0) == fewest]
        return self._rng.choice(candidates)

    def _expire(self, now: float) -> None:
        while self._keys:
            key, (urls, used) = next(iter(self._keys.items()))
            if now - used < self._max_idle_s and len(self._keys) <= MAX_ROUTING_KEYS:
                return
            del self._keys[key]
            for url in urls:
                self._count(url, -1)

    def _count(self, url: str, change: int) -> None:
        number = self._num_keys.get(url, 0) + change
        if number:
            self._num_keys[url] = number
        else:
            self._num_keys.pop(url, None)
