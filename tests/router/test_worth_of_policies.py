"""What cache_aware is worth, in a simulated fleet: the order that must hold whatever the shape."""

import pytest

from router.config import RouterConfig
from tests.router.simulation import WORKLOADS, Fleet, workload

MODES = {
    "cost": {},
    "thresholds": {"cache_aware_mode": "thresholds"},
    "round_robin": {"policy": "round_robin"},
}


def play(name, seed, caches=(40_000,) * 4, *, clients=64, prepare=None, **changes):
    fleet = Fleet(RouterConfig(**changes), caches, seed)
    if prepare is not None:
        prepare(fleet)
    return fleet.run(workload(name, seed), clients=clients)


@pytest.fixture(scope="module")
def runs():
    return {
        (name, mode): [play(name, seed, **changes) for seed in (1, 2)]
        for name in WORKLOADS
        for mode, changes in MODES.items()
    }


def mean(runs, name):
    return sum(getattr(run, name) for run in runs) / len(runs)


def test_affinity_pays_on_long_shared_prefixes(runs):
    cost, spread = runs["gsp", "cost"], runs["gsp", "round_robin"]
    assert mean(cost, "hit_rate") > 3.4 * mean(spread, "hit_rate")
    assert mean(cost, "requests_per_s") > 1.7 * mean(spread, "requests_per_s")


@pytest.mark.parametrize(("name", "gain"), [("gsp", 0.98), ("zipf", 1.05), ("chat", 1.02)])
def test_cost_against_thresholds(runs, name, gain):
    """Complaints 3 and 4: thresholds overload the holders of hot prefixes, or throw all affinity
    away."""
    cost, thresholds = runs[name, "cost"], runs[name, "thresholds"]
    assert mean(cost, "hit_rate") > mean(thresholds, "hit_rate") - 0.015
    assert mean(cost, "requests_per_s") > gain * mean(thresholds, "requests_per_s")
    assert mean(cost, "max_over_mean") < 1.15
    assert mean(cost, "ttft_p99") < 1.03 * mean(thresholds, "ttft_p99")
    if name != "gsp":
        assert mean(cost, "ttft_mean") < 0.95 * mean(thresholds, "ttft_mean")


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_order_holds_when_a_worker_comes_halfway(name):
    def prepare(fleet):
        fleet.at(4.0, lambda: fleet.add(40_000))

    rates = {
        mode: play(name, 21, (40_000,) * 3, prepare=prepare, **changes).requests_per_s
        for mode, changes in MODES.items()
    }
    assert rates["cost"] > 0.99 * max(rates.values()), rates


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize(
    "caches", [(40_000,) * 8, (20_000, 20_000, 60_000, 60_000)], ids=["eight", "unequal"]
)
def test_the_order_holds_for_other_fleets(name, caches):
    clients = 16 * len(caches)
    rates = {
        mode: play(name, 11, caches, clients=clients, **changes).requests_per_s
        for mode, changes in MODES.items()
    }
    assert rates["cost"] > 0.97 * max(rates.values()), rates


def test_scale_out_takes_load():
    """A worker added to saturated ones gets its share within two seconds."""
    added = []

    def prepare(fleet):
        fleet.at(3.0, lambda: added.append(fleet.add(40_000)))

    for changes in ({}, {"cache_aware_mode": "cost"}):
        run = play("zipf", 3, (40_000,) * 2, prepare=prepare, **changes)
        url = added.pop().url
        window = [t for t in run.by_worker[url] if 3.0 <= t <= 5.0]
        everywhere = [t for starts in run.by_worker.values() for t in starts if 3.0 <= t <= 5.0]
        assert len(window) > 0.25 * len(everywhere)


def test_cache_aware_spreads_new_prefixes_when_idle():
    """Complaint 1: different prompts one after another go to different workers."""
    for changes in MODES.values():
        run = play("gsp", 4, clients=1, **changes)
        firsts = {url for url, starts in run.by_worker.items() if starts[0] < 4.0}
        assert len(firsts) == 4
        assert run.max_over_mean < 1.35
