"""What requests share, where the queue sends them for it, and what that must never break."""

from __future__ import annotations

import pytest

from serving.scheduler.plan import TokenScore
from serving.scheduler.rank import RankScheduler
from serving.scheduler.scheduler import MAX_PASSED_OVER, QueueFull
from tests.serving.scheduler.fake_runner import Harness, rids, score


def started_on(harness: Harness) -> dict[str, int]:
    return {rid: first.dp_rank for rid, first in harness.first.items()}


def hits(harness: Harness) -> dict[str, int]:
    return {rid: first.cached_tokens for rid, first in harness.first.items()}


def test_a_second_prompt_takes_the_whole_pages_of_the_first():
    harness = Harness(page_size=4)
    harness.add("a", prompt_tokens=14, shared=11)
    harness.drain()
    harness.add("b", prompt_tokens=14, shared=11)
    (chunk,) = harness.step().slices[0].prefill
    assert (chunk.start, len(chunk.tokens)) == (8, 6)
    harness.drain()
    assert hits(harness) == {"a": 0, "b": 8}
    counters = harness.scheduler.status()[0].counters
    assert (counters.prompt_tokens, counters.cached_tokens) == (28, 8)


def test_the_last_token_of_a_prompt_is_always_computed():
    harness = Harness(page_size=4)
    for rid in "ab":
        harness.add(rid, prompt_tokens=8, shared=8)
        harness.drain()
    assert hits(harness) == {"a": 0, "b": 4}


def test_answers_are_cached_too_for_the_next_turn():
    harness = Harness(page_size=2)
    harness.add("a", prompt_tokens=4, max_tokens=9)
    harness.drain()
    # The last token of the answer was never fed: its entry does not exist.
    assert harness.scheduler.status()[0].cached_tokens == 12


@pytest.mark.parametrize("overlap", [False, True])
def test_prompts_that_arrive_together_share_within_the_step(overlap):
    harness = Harness(page_size=4, prefill_tokens=32, overlap=overlap)
    for rid in ("s0", "s1", "s2"):
        harness.add(rid, prompt_tokens=10, shared=10, seed=ord(rid[1]))
    plan = harness.step()
    assert [(c.start, len(c.tokens)) for c in plan.slices[0].prefill] == [(0, 10), (8, 2), (8, 2)]
    assert harness.scheduler.status()[0].used_tokens == (2 + 3) * 4
    harness.drain()


def test_a_prompt_waits_for_the_one_that_is_computing_its_prefix():
    harness = Harness(page_size=4, prefill_tokens=8)
    harness.add("leader", prompt_tokens=20, shared=20)
    harness.step()
    harness.add("follower", prompt_tokens=21, shared=20)
    harness.add("other", prompt_tokens=3)
    # Without waiting, the follower would compute tokens 8 to 20 again beside its leader.
    assert rids(harness.step()) == [([], ["leader"])]
    assert rids(harness.step()) == [([], ["leader", "follower", "other"])]
    harness.drain()
    assert hits(harness)["follower"] == 20


def test_prompts_of_other_namespaces_share_nothing():
    harness = Harness(page_size=4)
    harness.add("a", prompt_tokens=9, shared=9)
    harness.drain()
    harness.add("b", prompt_tokens=9, shared=9, cache_key="tenant")
    harness.drain()
    harness.add("c", prompt_tokens=9, shared=9, cache_key="tenant")
    harness.drain()
    assert hits(harness) == {"a": 0, "b": 0, "c": 8}


def test_prompt_log_probabilities_need_every_position():
    harness = Harness(page_size=4, prefill_tokens=6)
    harness.add("a", prompt_tokens=13, shared=13)
    harness.drain()
    harness.add("b", prompt_tokens=13, shared=13, prompt_logprobs=2)
    chunks = [chunk for plan in harness.drain() for chunk in plan.slices[0].prefill]
    assert [(c.start, len(c.tokens), len(c.targets)) for c in chunks] == [
        (0, 6, 6),
        (6, 6, 6),
        (12, 1, 0),
    ]
    scores = harness.first["b"].scores
    assert scores[0] == TokenScore(1, -1.0, ((0, -1.0), (1, -2.0)))
    assert scores == tuple(score(token, 2) for token in harness.requests["b"].prompt[1:])


def test_a_retracted_request_finds_what_is_left_of_its_pages():
    harness = Harness(pages=7, page_size=2, slots=3, prefill_tokens=16)
    harness.add("old", prompt_tokens=2, max_tokens=9)
    harness.add("new", prompt_tokens=2, max_tokens=9)
    plans = harness.drain()
    assert harness.scheduler.num_retracted > 0
    again = [c for plan in plans for c in plan.slices[0].prefill if c.start > 0]
    assert {chunk.rid for chunk in again} == {"new"}
    assert harness.first["new"].cached_tokens == 0


def test_the_cache_is_flushed_only_when_nothing_is_live():
    harness = Harness()
    harness.add("a", prompt_tokens=9)
    assert not harness.scheduler.flush_cache()
    harness.drain()
    assert harness.scheduler.status()[0].cached_tokens > 0
    assert harness.scheduler.flush_cache()
    assert harness.scheduler.status()[0].cached_tokens == 0


# Which slice


def test_a_request_goes_where_its_prefix_is():
    harness = Harness(num_slices=4, page_size=4, prefill_tokens=64)
    for rid, cache_key in (("a", "x"), ("b", "y"), ("c", "z")):
        harness.add(rid, prompt_tokens=32, shared=32, cache_key=cache_key)
    harness.drain()
    homes = started_on(harness)
    assert len(set(homes.values())) == 3
    for rid, cache_key in (("b2", "y"), ("a2", "x"), ("c2", "z"), ("b3", "y")):
        harness.add(rid, prompt_tokens=33, shared=32, cache_key=cache_key)
        harness.drain()
        assert harness.first[rid].cached_tokens == 32
        home = started_on(harness)[rid]
        assert home == homes[{"x": "a", "y": "b", "z": "c"}[cache_key]]


def test_a_long_prefix_is_worth_a_step_of_waiting():
    harness = Harness(num_slices=2, page_size=4, prefill_tokens=32, pages=200)
    harness.add("warm", prompt_tokens=200, shared=200, max_tokens=1)
    harness.drain()
    home = started_on(harness)["warm"]
    harness.add("busy", prompt_tokens=40, dp_rank=home, max_tokens=1)
    harness.add("again", prompt_tokens=201, shared=200, max_tokens=1)
    first, second = harness.step(), harness.step()
    assert [chunk.rid for chunk in first.slices[home].prefill] == ["busy"]
    assert not first.slices[1 - home].prefill
    assert [chunk.rid for chunk in second.slices[home].prefill] == ["busy", "again"]
    harness.drain()
    assert harness.first["again"].cached_tokens == 200


def test_a_short_prefix_is_not_worth_a_long_wait():
    harness = Harness(num_slices=2, page_size=4, prefill_tokens=32, pages=200)
    harness.add("warm", prompt_tokens=8, shared=8, max_tokens=1)
    harness.drain()
    home = started_on(harness)["warm"]
    harness.add("busy", prompt_tokens=300, dp_rank=home, max_tokens=1)
    harness.add("again", prompt_tokens=9, shared=8, max_tokens=1)
    plan = harness.step()
    assert [chunk.rid for chunk in plan.slices[1 - home].prefill] == ["again"]
    harness.drain()


def test_those_behind_a_request_that_waits_for_its_slice_go_elsewhere():
    harness = Harness(num_slices=2, page_size=4, prefill_tokens=32, pages=200)
    harness.add("bound", prompt_tokens=100, dp_rank=1, max_tokens=1)
    harness.add("bound too", prompt_tokens=10, dp_rank=1, max_tokens=1)
    harness.add("free", prompt_tokens=10, max_tokens=1)
    plan = harness.step()
    assert rids(plan) == [([], ["free"]), ([], ["bound"])]
    assert [load.waiting for load in harness.scheduler.status()] == [0, 1]
    harness.drain()
    assert started_on(harness) == {"bound": 1, "bound too": 1, "free": 0}


def test_a_slice_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="DP rank 2 is not active: ranks 0 to 1 are"):
        Harness(num_slices=2).add("a", 3, dp_rank=2)


def test_round_robin_takes_turns_whatever_is_cached():
    harness = Harness(num_slices=3, load_balance="round_robin")
    for number in range(6):
        harness.add(f"r{number}", prompt_tokens=12, shared=12)
        harness.drain()
    assert list(started_on(harness).values()) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("method", "home"), [("total_requests", 1), ("total_tokens", 0)])
def test_the_least_loaded_slice_by_requests_or_by_tokens(method, home):
    harness = Harness(num_slices=2, load_balance=method, pages=200, prefill_tokens=128)
    harness.add("long", prompt_tokens=100, max_tokens=9, dp_rank=1)
    harness.add("short", prompt_tokens=4, max_tokens=9, dp_rank=0)
    harness.add("short too", prompt_tokens=4, max_tokens=9, dp_rank=0)
    harness.step()
    harness.add("new", prompt_tokens=3, max_tokens=2)
    harness.drain()
    assert started_on(harness)["new"] == home


def test_a_hot_prefix_spreads_over_idle_slices_and_holds_up_nobody():
    """Requests are held for the slice that has their prefix, but not while others stand idle."""
    harness = Harness(num_slices=4, slots=2, page_size=4, prefill_tokens=256, pages=200)
    for number in range(30):
        harness.add(f"hot{number}", prompt_tokens=101, shared=100, max_tokens=8)
    harness.add("cold", prompt_tokens=12, max_tokens=1, cache_key="other")
    plans = harness.drain()
    idle = sum(not rows.decode and not rows.prefill for plan in plans for rows in plan.slices)
    assert len(plans) < 45  # 30 answers of 8 steps on 8 slots take 30 at least
    assert idle < len(plans)
    assert len(set(started_on(harness).values())) == 4


def test_nobody_takes_the_pages_of_a_request_just_retracted():
    harness = Harness(pages=9, page_size=2, slots=6, prefill_tokens=32, overlap=True)
    for rid in ("a", "b"):
        harness.add(rid, prompt_tokens=3, max_tokens=12)
    harness.step()
    for number in range(3):
        harness.add(f"young{number}", prompt_tokens=2, max_tokens=12)
    harness.drain()
    assert harness.scheduler.num_retracted > 0
    assert list(harness.finished)[:2] == ["a", "b"]


def test_a_long_queue_for_one_slice_is_not_walked():
    harness = Harness(num_slices=2, slots=1)
    for number in range(50):
        harness.add(f"r{number}", prompt_tokens=2, max_tokens=2, dp_rank=0)
    harness.step()
    seen = []
    find = RankScheduler.find_prefix

    def spy(rank, live, index):
        seen.append(live)
        return find(rank, live, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankScheduler, "find_prefix", spy)
        harness.step()
    assert len(seen) <= 1
    harness.drain()


# The queue


def test_higher_priority_starts_first_and_is_retracted_last():
    harness = Harness(slots=1)
    harness.add("runs", prompt_tokens=2, max_tokens=2)
    harness.step()
    for rid, priority in (("low", 0), ("high", 3), ("high too", 3), ("lowest", -1)):
        harness.add(rid, prompt_tokens=2, max_tokens=1, priority=priority)
    harness.drain()
    assert list(harness.finished) == ["runs", "high", "high too", "low", "lowest"]
    harness = Harness(pages=7, page_size=2, slots=2)
    harness.add("old", prompt_tokens=2, max_tokens=9)
    harness.add("important", prompt_tokens=2, max_tokens=9, priority=1)
    harness.drain()
    assert harness.scheduler.num_retracted > 0
    assert list(harness.finished) == ["important", "old"]


def test_the_longest_prefix_goes_first_where_the_policy_says_so():
    for policy, order in (("fcfs", ["cold", "warm"]), ("lpm", ["warm", "cold"])):
        harness = Harness(slots=1, schedule_policy=policy)
        harness.add("first", prompt_tokens=12, shared=12, max_tokens=2)
        harness.step()
        harness.add("cold", prompt_tokens=12, max_tokens=1)
        harness.add("warm", prompt_tokens=12, shared=12, max_tokens=1)
        harness.drain()
        assert list(harness.finished) == ["first", *order]


def test_longest_prefix_first_starves_nobody():
    harness = Harness(slots=1, schedule_policy="lpm", pages=400)
    harness.add("first", prompt_tokens=12, shared=12, max_tokens=1)
    harness.step()
    harness.add("cold", prompt_tokens=12, max_tokens=1)
    for number in range(2 * MAX_PASSED_OVER):
        harness.add(f"warm{number}", prompt_tokens=12, shared=12, max_tokens=1)
    harness.drain()
    assert list(harness.finished).index("cold") == MAX_PASSED_OVER + 1


def test_a_full_queue_refuses_and_takes_again():
    harness = Harness(slots=1, max_queued=2)
    harness.add("a", prompt_tokens=2)
    harness.add("b", prompt_tokens=2)
    with pytest.raises(QueueFull, match="The request queue is full: 2 requests wait already"):
        harness.add("c", prompt_tokens=2)
    harness.step()
    harness.add("c", prompt_tokens=2)
    harness.drain()


def test_the_time_in_the_queue_is_told():
    harness = Harness(slots=1)
    harness.add("a", prompt_tokens=2, max_tokens=2)
    harness.add("b", prompt_tokens=2, max_tokens=1)
    for _ in range(3):
        harness.step()
        harness.now += 1.5
    harness.drain()
    assert (harness.first["a"].queue_s, harness.first["b"].queue_s) == (0.0, 3.0)


# Bit-exact mode


def test_reproducible_requests_are_never_retracted_and_share_only_prompts():
    harness = Harness(pages=9, page_size=2, slots=4, reproducible=True)
    for rid in ("s0", "s1", "s2"):
        harness.add(rid, prompt_tokens=5, shared=5, max_tokens=8)
    harness.drain()
    assert harness.scheduler.num_retracted == 0
    assert harness.scheduler.status()[0].cached_tokens == 4
    assert hits(harness) == {"s0": 0, "s1": 4, "s2": 4}
