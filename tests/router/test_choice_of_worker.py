"""Which worker gets a request, and what the router's books say."""

import json
import random
from collections import Counter

import pytest

from router.config import RouterConfig
from router.request import RoutedRequest
from router.routing import Outcome, Router
from router.workers import ReportedLoad, WorkerRegistry, make_worker
from tests.router.simulation import NoMetrics


class Fleet:
    """A router, its workers, and a clock that stands still."""

    def __init__(self, num=4, capacity_tokens=None, models=None, **changes):
        self.now = 100.0
        self.config = RouterConfig(**changes)
        self.registry = WorkerRegistry()
        self.router = Router(
            config=self.config,
            registry=self.registry,
            metrics=NoMetrics(),
            clock=lambda: self.now,
            rng=random.Random(3),
        )
        self.workers = []
        for i in range(num):
            fields = {} if models is None else {"model_id": models[i]}
            self.add(f"http://w{i}", capacity_tokens=capacity_tokens, **fields)

    def add(self, url, **fields):
        worker = make_worker(self.config, url, clock=lambda: self.now, **fields)
        self.registry.add(worker)
        self.router.worker_added(worker)
        self.workers.append(worker)
        return worker

    def begin(self, text="", exclude=(), **fields):
        return self.router.begin(request(text, **fields), exclude)

    def serve(self, text="", **fields):
        """One request from beginning to end; its worker."""
        ticket = self.begin(text, **fields)
        ticket.first_token()
        ticket.end(Outcome.OK)
        return ticket.worker

    def idle(self):
        return all(w.in_flight == 0 and w.backlog_tokens == 0 for w in self.workers)


def request(text="", headers=(), path="/v1/completions", **fields):
    body = json.dumps({"prompt": text, **fields}).encode()
    return RoutedRequest.parse(path, body, headers)


def prompt(seed, chars=2000):
    return "".join(random.Random(seed).choices("abcdefghij ", k=chars))


def test_round_robin_takes_turns():
    fleet = Fleet(policy="round_robin")
    assert Counter(fleet.serve().url for _ in range(40)) == dict.fromkeys(
        (w.url for w in fleet.workers), 10
    )


def test_random_is_even():
    counts = Counter(w.url for w in (Fleet.serve(f) for f in [Fleet(policy="random")] * 400))
    assert min(counts.values()) > 60


@pytest.mark.parametrize("policy", ["power_of_two", "cache_aware", "manual", "round_robin"])
def test_in_flight_is_counted_under_every_policy(policy):
    fleet = Fleet(policy=policy)
    tickets = [fleet.begin(prompt(i)) for i in range(9)]
    assert sum(w.in_flight for w in fleet.workers) == 9
    for ticket in tickets:
        ticket.end(Outcome.NEUTRAL)
        ticket.end(Outcome.OK)  # only the first counts
    assert fleet.idle()


def test_power_of_two_without_reports_uses_in_flight():
    fleet = Fleet(num=2, policy="power_of_two")
    fleet.workers[0].in_flight = 5
    assert {fleet.begin().worker.url for _ in range(4)} == {"http://w1"}


def test_reported_loads_do_not_go_stale_for_ever():
    """Complaint 13."""
    fleet = Fleet(num=2, policy="power_of_two")
    one, other = fleet.workers
    one.reported = ReportedLoad(tokens=1000, at=fleet.now)
    other.reported = ReportedLoad(tokens=10, at=fleet.now)
    assert {fleet.serve().url for _ in range(20)} == {other.url}
    fleet.now += 60
    assert {fleet.serve().url for _ in range(20)} == {one.url, other.url}


@pytest.mark.parametrize("mode", ["cost", "thresholds"])
def test_a_prefix_stays_with_its_worker(mode):
    fleet = Fleet(cache_aware_mode=mode)
    homes = {seed: fleet.serve(prompt(seed)).url for seed in range(8)}
    assert len(set(homes.values())) == 4
    for seed in random.Random(1).choices(range(8), k=40):
        assert fleet.serve(prompt(seed) + prompt(99, 200)).url == homes[seed]


def test_death_spiral():
    """Complaint 2: a miss goes to the least loaded worker, not to the one with the least cached."""
    for mode in ("cost", "thresholds"):
        fleet = Fleet(cache_aware_mode=mode)
        for seed in range(12):
            fleet.serve(prompt(seed))
        for worker in fleet.workers[:3]:
            worker.in_flight, worker.backlog_tokens = 3, 3000.0
        fleet.workers[3].in_flight = 1
        assert fleet.serve(prompt(77)).url == "http://w3"


def test_thresholds_are_strict_and_both_needed():
    fleet = Fleet(num=2, cache_aware_mode="thresholds", balance_abs_threshold=4)
    home = fleet.serve(prompt(1))
    other = next(w for w in fleet.workers if w is not home)
    home.in_flight = 4  # a difference of 4 is not above 4
    assert fleet.serve(prompt(1)) is home
    home.in_flight, other.in_flight = 15, 10  # 1.5 times is not above 1.5 times
    assert fleet.serve(prompt(1)) is home
    home.in_flight, other.in_flight = 16, 10
    assert fleet.serve(prompt(1)) is other


def test_cache_threshold():
    fleet = Fleet(num=2, cache_aware_mode="thresholds", cache_threshold=0.5)
    home = fleet.serve(prompt(1, 6400))
    home.in_flight = 1
    half = prompt(1, 6400)[:3200]
    assert fleet.serve(half + prompt(2, 3300)).url != home.url
    fleet.workers[0].in_flight = fleet.workers[1].in_flight = 0
    home.in_flight = 1
    assert fleet.serve(prompt(1, 6400)[:3500] + prompt(3, 3000)) is home


def test_a_hot_prefix_spreads():
    """Complaint 3: one prefix, many clients; its worker is not all there is."""
    fleet = Fleet()
    tickets = [fleet.begin(prompt(1) + str(i)) for i in range(64)]
    counts = Counter(t.worker.url for t in tickets)
    assert len(counts) >= 3
    assert max(counts.values()) < 40


def test_what_an_engine_evicted_is_forgotten():
    """Complaint 6: the answers' cached_tokens correct the shadow."""
    fleet = Fleet(num=2, capacity_tokens=4000)
    texts = [prompt(i, 3000) for i in range(8)]
    for text in texts:
        ticket = fleet.begin(text)
        ticket.usage(len(text) // 4, 0)
        ticket.end(Outcome.OK)
    before = [fleet.router.index.chars(w.bit) for w in fleet.workers]
    ticket = fleet.begin(texts[-1])
    ticket.usage(len(texts[-1]) // 4, 0)  # it was not there
    ticket.end(Outcome.OK)
    after = [fleet.router.index.chars(w.bit) for w in fleet.workers]
    assert sum(after) < sum(before) - 2000


def answer(fleet, text, cached, **fields):
    """One request whose answer says what was cached of it; its worker."""
    ticket = fleet.begin(text, **fields)
    ticket.first_token()
    ticket.usage(len(text) // 4, cached)
    ticket.end(Outcome.OK)
    return ticket.worker


def test_a_worker_that_was_restarted_between_two_checks_has_nothing():
    """Complaint 6: nothing cached, twice, of what nobody was computing."""
    fleet = Fleet(num=1, capacity_tokens=100_000)
    for seed in range(8):
        answer(fleet, prompt(seed, 4000), 0)
    full = fleet.router.index.chars(0)
    answer(fleet, prompt(0, 4000), 0)  # once may be a request that could not use the cache
    assert fleet.router.index.chars(0) == full
    answer(fleet, prompt(1, 4000), 990)
    answer(fleet, prompt(2, 4000), 0)
    assert fleet.router.index.chars(0) == full
    answer(fleet, prompt(3, 4000), 0)
    assert fleet.router.index.num_blocks(0) == 4000 // 64  # that one


def test_what_is_still_being_computed_is_no_surprise():
    fleet = Fleet(num=1, capacity_tokens=100_000)
    text = prompt(1, 4000)
    tickets = [fleet.begin(text) for _ in range(10)]
    for ticket in tickets:
        ticket.usage(1000, 0)
        ticket.end(Outcome.OK)
    assert fleet.router.index.num_blocks(0) == 4000 // 64
    assert fleet.workers[0].surprises == 0


@pytest.mark.parametrize("outcome", [Outcome.BUSY, Outcome.FAILED, Outcome.NEUTRAL])
def test_a_prompt_that_was_not_computed_is_not_cached(outcome):
    fleet = Fleet(num=2)
    home = fleet.serve(prompt(1))
    known = fleet.router.index.chars(home.bit)
    other = next(w for w in fleet.workers if w is not home)
    ticket = fleet.begin(prompt(1) + prompt(2), exclude=[other])
    assert fleet.router.index.chars(home.bit) > known
    ticket.end(outcome)
    assert fleet.router.index.chars(home.bit) == known
    ticket = fleet.begin(prompt(1) + prompt(2), exclude=[other])
    ticket.first_token()
    ticket.end(outcome)  # its stream broke, but the prompt is there
    assert fleet.router.index.chars(home.bit) > known


def test_token_sizes_are_those_of_each_model():
    fleet = Fleet(num=2, models=["a", "b"], enable_igw=True, capacity_tokens=1000)
    for seed in range(100):
        for model, per_token in (("a", 2), ("b", 5)):
            ticket = fleet.begin(prompt(seed, 3000), model=model)
            ticket.usage(3000 // per_token, 0)
            ticket.end(Outcome.OK)
    assert fleet.router.chars_per_token("a") == pytest.approx(2, rel=0.05)
    assert fleet.router.chars_per_token("b") == pytest.approx(5, rel=0.05)
    sizes = [fleet.router.index.chars(w.bit) for w in fleet.workers]
    assert sizes[0] <= 2100 < 4000 < sizes[1] <= 5100


def test_sizes_are_not_learned_from_what_is_not_all_of_the_prompt():
    fleet = Fleet(num=1)
    one = RoutedRequest.parse("/v1/rerank", json.dumps({"query": "q" * 400}).encode())
    for _ in range(50):
        ticket = fleet.router.begin(one)
        ticket.usage(10_000, 0)
        ticket.end(Outcome.OK)
    assert fleet.router.chars_per_token("unknown") == 4


def test_load_against_the_cache_is_told():
    told = []
    fleet = Fleet(num=2)
    fleet.router.metrics = type("Told", (NoMetrics,), {"rebalanced": lambda self: told.append(1)})()
    home = fleet.serve(prompt(1))
    assert fleet.serve(prompt(1)) is home
    assert told == []
    home.backlog_tokens = 50_000.0
    assert fleet.serve(prompt(1)) is not home
    assert told == [1]


def test_thresholds_are_the_rule_of_the_peer():
    """Section 10 of the behaviour that is reproduced, against a plain form of it: who may be
    chosen, step by step, on prompts of whole blocks."""
    rng = random.Random(5)
    settings = {"cache_threshold": 0.5, "balance_abs_threshold": 3, "balance_rel_threshold": 1.5}
    fleet = Fleet(num=3, cache_aware_mode="thresholds", **settings)
    held = {worker: set() for worker in fleet.workers}
    parts = [prompt(i, 64) for i in range(4)]
    kinds = Counter()
    running = []
    for _ in range(800):
        text = "".join(rng.choices(parts, weights=(8, 4, 2, 1), k=rng.randint(1, 8)))
        loads = {w: w.in_flight for w in fleet.workers}
        most, least = max(loads.values()), min(loads.values())
        lightest = {w for w in fleet.workers if loads[w] == least}
        deep = {
            w: max((n for n in range(64, len(text) + 1, 64) if text[:n] in held[w]), default=0)
            for w in fleet.workers
        }
        longest = max(deep.values())
        if most - least > 3 and most > 1.5 * least:
            kind, allowed = "uneven", lightest
        elif longest / len(text) > 0.5:
            kind, allowed = "hit", {w for w in fleet.workers if deep[w] == longest}
        else:
            kind, allowed = "miss", lightest
        kinds[kind] += 1
        ticket = fleet.begin(text)
        assert ticket.worker in allowed, kind
        ticket.first_token()
        held[ticket.worker].update(text[:n] for n in range(64, len(text) + 1, 64))
        running.append(ticket)
        while len(running) > rng.randint(0, 14):
            running.pop(rng.randrange(len(running))).end(Outcome.OK)
    assert min(kinds.values()) > 20, kinds


def test_affinity_yields_when_the_holder_is_gone():
    for mode in ("cost", "thresholds"):
        fleet = Fleet(cache_aware_mode=mode)
        home = fleet.serve(prompt(1))
        home.health.healthy = False
        others = [w for w in fleet.workers if w is not home]
        others[0].in_flight = others[1].in_flight = 1
        assert fleet.serve(prompt(1)) is others[2]


def test_tree_memory_is_bounded_at_every_moment():
    """Complaint 7."""
    fleet = Fleet(num=2, max_tree_size=20_000)
    for seed in range(200):
        fleet.serve(prompt(seed, 3000))
        assert all(fleet.router.index.chars(w.bit) <= 20_000 for w in fleet.workers)
    assert fleet.router.index.size < 2 * 20_000 / 64 + 1
    small = Fleet(num=1, capacity_tokens=1000)
    for seed in range(20):
        small.serve(prompt(seed, 3000))
    assert small.router.index.chars(0) <= 4000


def test_a_flushed_or_removed_worker_has_nothing():
    fleet = Fleet(num=2)
    home = fleet.serve(prompt(1))
    fleet.router.flushed(home)
    assert fleet.router.index.size == 0
    fleet.serve(prompt(1))
    holder = next(w for w in fleet.workers if fleet.router.index.chars(w.bit))
    ticket = fleet.begin(prompt(1))
    fleet.registry.remove(holder)
    fleet.router.worker_removed(holder)
    assert fleet.router.index.size == 0
    ticket.usage(500, 500)
    ticket.end(Outcome.OK)  # the books of a worker that left are closed like any
    again = fleet.add("http://new")
    assert again.bit == 0 or again.bit == 1
    assert fleet.router.index.chars(again.bit) == 0


def test_old_prefixes_are_forgotten():
    fleet = Fleet(num=1, max_prefix_age_secs=10)
    fleet.serve(prompt(1))
    fleet.now += 6
    fleet.serve(prompt(2))
    fleet.now += 6
    fleet.router.forget_old()
    assert fleet.router.index.num_blocks(0) == len(request(prompt(2)).blocks)


def test_characters_per_token_are_learned():
    fleet = Fleet(num=1, capacity_tokens=1000)
    for seed in range(200):
        text = prompt(seed, 3000)
        ticket = fleet.begin(text)
        ticket.usage(1500, 0)  # two characters each
        ticket.end(Outcome.OK)
    assert fleet.router.tokens(100) == pytest.approx(50, rel=0.05)
    assert fleet.router.index.chars(0) <= 2100


def test_excluded_unhealthy_draining_and_open_workers_get_nothing():
    fleet = Fleet(cb_failure_threshold=2)
    a, b, c, d = fleet.workers
    a.health.healthy = False
    b.draining = True
    for _ in range(2):
        c.breaker.end(c.breaker.begin(), False)
    for _ in range(8):
        assert fleet.serve(prompt(1)) is d
    assert fleet.begin(exclude=[d]) is None


def test_circuit_ignores_client_errors_and_backpressure():
    """Complaint 8."""
    fleet = Fleet(num=1, cb_failure_threshold=2)
    for outcome in (Outcome.NEUTRAL, Outcome.BUSY) * 5:
        fleet.begin().end(outcome)
    assert fleet.workers[0].breaker.state == "closed"
    for _ in range(2):
        fleet.begin().end(Outcome.FAILED)
    assert fleet.begin() is None


def test_several_models_behind_one_router():
    fleet = Fleet(num=4, models=["a", "a", "b", "b"], enable_igw=True, policy="round_robin")
    assert {fleet.serve(model="a").url for _ in range(4)} == {"http://w0", "http://w1"}
    assert fleet.begin(model="c") is None
    mixed = Fleet(num=4, models=["a", "a", "b", "b"], policy="round_robin")
    assert len({mixed.serve(model="c").url for _ in range(4)}) == 4


def test_ranks_are_workers_of_their_own():
    fleet = Fleet(num=0)
    for rank in range(4):
        fleet.add("http://w", rank=rank)
    homes = {seed: fleet.serve(prompt(seed)).rank for seed in range(4)}
    assert set(homes.values()) == {0, 1, 2, 3}
    assert [w.url for w in fleet.workers][:2] == ["http://w@0", "http://w@1"]


def key(value):
    return [(b"x-smg-routing-key", value.encode())]


@pytest.mark.parametrize("policy", ["manual", "consistent_hashing"])
def test_keys_stick(policy):
    fleet = Fleet(policy=policy)
    homes = {k: fleet.serve(headers=key(k)) for k in map(str, range(20))}
    assert len({w.url for w in homes.values()}) > 1
    assert all(fleet.serve(headers=key(k)) is w for k, w in homes.items())
    lost = homes["0"]
    lost.health.healthy = False
    second = fleet.serve(headers=key("0"))
    assert second is not lost
    moved = [k for k, w in homes.items() if fleet.serve(headers=key(k)) is not w]
    assert set(moved) == {k for k, w in homes.items() if w is lost}
    assert fleet.serve(headers=key("0")) is second
    lost.health.healthy = True
    assert fleet.serve(headers=key("0")) is lost


def test_manual_assignment_modes_and_idle_keys():
    groups = Fleet(policy="manual", assignment_mode="min_group", max_idle_secs=50)
    counts = Counter(groups.serve(headers=key(str(i))).url for i in range(16))
    assert set(counts.values()) == {4}
    groups.now += 60
    groups.serve()
    assert len(groups.router._policy) == 0
    least = Fleet(policy="manual", assignment_mode="min_load")
    for worker in least.workers[:3]:
        worker.in_flight = 2
    assert {least.serve(headers=key(str(i))).url for i in range(5)} == {"http://w3"}


def test_routing_keys_are_remembered_in_bounded_memory():
    fleet = Fleet(policy="manual")
    long = "k" * 60_000
    home = fleet.serve(headers=key(long))
    assert {fleet.serve(headers=key(long)) for _ in range(8)} == {home}
    assert all(len(k) <= 128 for k in fleet.router._policy._keys)


@pytest.mark.parametrize("policy", ["prefix_hash", "consistent_hashing"])
def test_a_ring_is_made_once(policy, monkeypatch):
    """Complaint 17: not for each set of candidates."""
    import router.routing as routing

    calls = []
    point = routing._point
    monkeypatch.setattr(routing, "_point", lambda text: calls.append(text) or point(text))
    fleet = Fleet(num=20, policy=policy)
    fleet.serve(prompt(1), headers=key("a"))
    made = len(calls)
    for worker in fleet.workers:
        assert fleet.begin(prompt(1), [worker], headers=key("a")).worker is not worker
    assert len(calls) <= made + 20
    assert made > 20 * routing.RING_POINTS - 1


def test_consistent_hashing_names_a_worker():
    fleet = Fleet(policy="consistent_hashing")
    for at in range(4):
        headers = [(b"x-smg-target-worker", str(at).encode())]
        assert fleet.serve(headers=headers) is fleet.workers[at]
    for wrong in (b"4", b"-1", b"x"):
        assert fleet.begin(headers=[(b"x-smg-target-worker", wrong)]) is None
    assert fleet.serve(headers=[(b"authorization", b"Bearer a")]) is fleet.serve(
        headers=[(b"authorization", b"Bearer a")]
    )


class Branches(NoMetrics):
    """Which ways choices went."""

    def __init__(self):
        self.taken = []

    def branch(self, policy, branch):
        self.taken.append(branch)


def branches(fleet):
    """The ways that the choices of a fleet go from now on."""
    fleet.router.metrics = fleet.router._policy._metrics = metrics = Branches()
    return metrics.taken


def test_metrics_tell_the_way_of_each_choice():
    fleet = Fleet(num=2, policy="manual")
    taken = branches(fleet)
    home = fleet.serve(headers=key("a"))
    fleet.serve(headers=key("a"))
    home.health.healthy = False
    fleet.serve(headers=key("a"))
    fleet.serve()
    for worker in fleet.workers:
        worker.health.healthy = False
    assert fleet.begin() is None
    assert taken == [
        *("vacant", "occupied_hit", "occupied_miss", "no_routing_id", "no_healthy_workers")
    ]
    assert fleet.router.num_routing_keys == 1

    fleet = Fleet(num=2, policy="consistent_hashing")
    taken = branches(fleet)
    for headers in (
        *([(b"x-smg-target-worker", b"1")], [(b"x-smg-target-worker", b"7")]),
        *(key("a"), [(b"cookie", b"a")], []),
    ):
        fleet.begin(headers=headers)
    assert taken == [
        *("target_worker_hit", "target_worker_miss"),
        *("routing_key_hit", "routing_key_hit", "random_fallback"),
    ]

    fleet = Fleet(policy="prefix_hash")
    taken = branches(fleet)
    home = fleet.serve(prompt(1))
    fleet.serve(prompt(1))
    home.in_flight = 20
    fleet.serve(prompt(1))
    fleet.serve("short")
    assert taken == ["ring_hit", "ring_hit", "load_balance_walk", "no_routing_key"]
    # The next one on the ring is home while the first one is not there.
    home.health.healthy = False
    fleet.serve(prompt(1))
    assert taken[-1] == "ring_hit"


def test_routing_keys_are_counted_while_their_requests_run():
    fleet = Fleet(num=1, policy="round_robin")
    tickets = [fleet.begin(headers=key(k)) for k in "aab"] + [fleet.begin()]
    (worker,) = fleet.workers
    assert worker.routing_keys == {"a": 2, "b": 1}
    for ticket in tickets:
        ticket.end(Outcome.OK)
        ticket.end(Outcome.OK)
    assert worker.routing_keys == {}


def test_prefix_hash_leaves_overloaded_workers():
    fleet = Fleet(policy="prefix_hash")
    home = fleet.serve(prompt(1))
    assert fleet.serve(prompt(1) + "x" * 500) is home
    home.in_flight = 20
    assert fleet.serve(prompt(1)) is not home


def test_scale_of_large_fleets():
    """Complaint 17: a choice among 200 workers takes well under a millisecond."""
    import time

    fleet = Fleet(num=200)
    requests = [request(prompt(i)) for i in range(50)]
    began = time.perf_counter()
    for one in requests * 4:
        fleet.router.begin(one).end(Outcome.OK)
    assert (time.perf_counter() - began) / 200 < 0.02  # a bound that only a wrong order breaks
