"""What the scheduler decides, case by case."""

from __future__ import annotations

import random

import pytest

from serving.request import Request, SamplingParams
from serving.scheduler.cache_manager import IntegrityError
from serving.scheduler.plan import SampledToken, StepResult
from serving.scheduler.scheduler import RequestTooLong, Scheduler, SchedulerConfig
from tests.serving.scheduler.fake_runner import Harness, rids, tokens_alone


def running_by_slice(harness: Harness) -> list[int]:
    return [load.running for load in harness.scheduler.status()]


def chunk_tokens(plan) -> list[list[int]]:
    return [[len(chunk.tokens) for chunk in rows.prefill] for rows in plan.slices]


# Rows of one request


def test_a_prompt_is_prefilled_then_decoded_at_the_next_positions():
    harness = Harness()
    harness.add("a", prompt_tokens=5, max_tokens=3)
    prefill, first, second = harness.drain()
    (chunk,) = prefill.slices[0].prefill
    assert (chunk.start, len(chunk.tokens), chunk.samples) == (0, 5, True)
    assert [row.position for plan in (first, second) for row in plan.slices[0].decode] == [5, 6]
    assert prefill.is_extend
    assert not first.is_extend


def test_one_token_ends_with_the_prefill():
    harness = Harness()
    harness.add("a", prompt_tokens=3, max_tokens=1)
    assert len(harness.drain()) == 1
    assert harness.finished == {"a": "length"}


def test_a_long_prompt_goes_in_chunks_of_the_budget_and_only_the_last_samples():
    harness = Harness(prefill_tokens=4)
    harness.add("a", prompt_tokens=10, max_tokens=2)
    chunks = [chunk for plan in harness.drain() for chunk in plan.slices[0].prefill]
    assert [(chunk.start, len(chunk.tokens), chunk.samples) for chunk in chunks] == [
        (0, 4, False),
        (4, 4, False),
        (8, 2, True),
    ]
    assert len({chunk.slot for chunk in chunks}) == 1


def test_several_prompts_share_a_step_and_only_the_last_is_cut():
    harness = Harness(prefill_tokens=10)
    for rid in "abc":
        harness.add(rid, prompt_tokens=4)
    assert chunk_tokens(harness.step()) == [[4, 4, 2]]
    second = harness.step()
    assert rids(second) == [(["a", "b"], ["c"])]
    assert chunk_tokens(second) == [[2]]
    harness.drain()


def test_no_more_chunks_than_rows_in_one_step():
    harness = Harness(prefill_rows=2)
    for rid in "abc":
        harness.add(rid, prompt_tokens=1)
    assert rids(harness.step()) == [([], ["a", "b"])]
    assert rids(harness.step()) == [(["a", "b"], ["c"])]
    harness.drain()


def test_an_unfinished_prompt_goes_before_new_ones():
    harness = Harness(prefill_tokens=4)
    harness.add("long", prompt_tokens=9)
    harness.step()
    harness.add("new", prompt_tokens=1)
    assert rids(harness.step()) == [([], ["long"])]
    assert rids(harness.step()) == [([], ["long", "new"])]
    harness.drain()


def test_pages_are_the_same_tuple_until_one_is_added():
    harness = Harness(page_size=4)
    harness.add("a", prompt_tokens=4, max_tokens=6)
    prefill, *decodes = harness.drain()
    rows = [plan.slices[0].decode[0] for plan in decodes]
    assert [row.position for row in rows] == [4, 5, 6, 7, 8]
    assert [len(row.pages) for row in rows] == [2, 2, 2, 2, 3]
    assert all(row.pages is prefill.slices[0].prefill[0].pages for row in rows[:4])


# Ends


def test_a_stop_token_ends_the_request_and_is_reported():
    harness = Harness()
    harness.add("free", prompt_tokens=3, max_tokens=5)
    stop = tokens_alone(harness.requests["free"])[2]
    harness.drain()
    harness = Harness()
    harness.add("free", prompt_tokens=3, max_tokens=5, stop_token_ids=(stop,))
    harness.drain()
    assert harness.tokens["free"][-1] == stop
    assert harness.finished == {"free": "stop"}


def test_a_stop_token_that_is_also_the_last_allowed_one_counts_as_stop():
    harness = Harness()
    harness.add("a", prompt_tokens=3, max_tokens=1)
    stop = tokens_alone(harness.requests["a"])[0]
    harness.drain()
    harness.add("a", prompt_tokens=3, max_tokens=1, stop_token_ids=(stop,))
    harness.finished.clear()
    harness.tokens["a"].clear()
    harness.drain()
    assert harness.finished == {"a": "stop"}


def test_log_probabilities_pass_through():
    scheduler = Harness().scheduler
    scheduler.add(Request(rid="a", prompt=(1,), sampling=SamplingParams(max_tokens=1)))
    plan = scheduler.plan()
    token = SampledToken(token_id=7, logprob=-0.5, top_logprobs=((7, -0.5), (8, -1.5)))
    (outcome,) = scheduler.apply(plan, StepResult(tokens=[[token]], scores={}))
    assert (outcome.token_id, outcome.logprob) == (7, -0.5)
    assert outcome.top_logprobs == ((7, -0.5), (8, -1.5))


def test_the_slot_of_a_finished_request_is_free_in_the_next_step():
    harness = Harness(slots=1)
    harness.add("a", prompt_tokens=1, max_tokens=1)
    harness.add("b", prompt_tokens=1, max_tokens=1)
    assert rids(harness.step()) == [([], ["a"])]
    assert rids(harness.step()) == [([], ["b"])]


# The queue


def test_requests_start_in_order_of_arrival_even_where_a_later_one_would_fit():
    harness = Harness(pages=9, page_size=4, prefill_tokens=64)
    harness.add("first", prompt_tokens=20, max_tokens=2)
    harness.add("large", prompt_tokens=20, max_tokens=2)
    harness.add("small", prompt_tokens=1, max_tokens=1)
    started = [chunk.rid for plan in harness.drain() for chunk in plan.slices[0].prefill]
    assert started == ["first", "large", "small"]


def test_a_request_binds_late_to_the_slice_that_is_free_first():
    harness = Harness(num_slices=2, slots=1)
    harness.add("short", prompt_tokens=2, max_tokens=2)
    harness.add("long", prompt_tokens=2, max_tokens=9)
    harness.add("next", prompt_tokens=2, max_tokens=1)
    assert rids(harness.step()) == [([], ["short"]), ([], ["long"])]
    assert rids(harness.step()) == [(["short"], []), (["long"], [])]
    assert rids(harness.step()) == [([], ["next"]), (["long"], [])]
    harness.drain()


def test_one_at_a_time_requests_take_turns_over_idle_slices():
    harness = Harness(num_slices=4)
    used = []
    for number in range(8):
        harness.add(f"r{number}", prompt_tokens=2, max_tokens=1)
        plan = harness.step()
        used += [rank for rank, rows in enumerate(plan.slices) if rows.prefill]
    assert used == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_burst_is_levelled_over_slices():
    harness = Harness(num_slices=4, prefill_tokens=64, prefill_rows=8)
    for number in range(8):
        harness.add(f"r{number}", prompt_tokens=6)
    assert chunk_tokens(harness.step()) == [[6, 6]] * 4
    harness.drain()


def test_a_short_prompt_goes_beside_the_long_one_rather_than_behind_it():
    harness = Harness(num_slices=2, prefill_tokens=128, pages=64)
    harness.add("old", prompt_tokens=60, max_tokens=30)
    harness.step()
    # Slice 0 holds the most KV tokens by far, yet slice 1 with 48 prompt tokens is the one that
    # all slices wait for in this step.
    harness.add("long", prompt_tokens=48, max_tokens=2)
    harness.add("short", prompt_tokens=32, max_tokens=2)
    assert rids(harness.step()) == [(["old"], ["short"]), ([], ["long"])]
    harness.drain()


def test_a_prompt_over_the_budget_starts_where_most_of_it_fits():
    harness = Harness(num_slices=2, prefill_tokens=16, pages=64)
    harness.add("old", prompt_tokens=16, max_tokens=30)
    harness.step()
    harness.add("small", prompt_tokens=8, max_tokens=2)
    harness.add("long", prompt_tokens=32, max_tokens=2)
    plan = harness.step()
    assert rids(plan) == [(["old"], ["long"]), ([], ["small"])]
    assert chunk_tokens(plan) == [[16], [8]]
    harness.drain()


def test_load_decides_where_the_step_gets_no_longer():
    harness = Harness(num_slices=2, prefill_tokens=64, pages=64)
    harness.add("big", prompt_tokens=40, max_tokens=9)
    harness.add("little", prompt_tokens=4, max_tokens=9)
    harness.step()
    harness.add("new", prompt_tokens=4, max_tokens=9)
    assert rids(harness.step()) == [(["big"], []), (["little"], ["new"])]
    harness.drain()


def test_one_step_in_which_slices_prefill_decode_do_both_and_idle():
    harness = Harness(num_slices=4, slots=2, prefill_tokens=8, pages=64)
    harness.add("both", prompt_tokens=2, max_tokens=8)
    harness.add("decodes", prompt_tokens=4, max_tokens=8)
    harness.add("ends", prompt_tokens=4, max_tokens=2)
    harness.add("fills", prompt_tokens=26, max_tokens=2)
    harness.step()
    harness.add("joins", prompt_tokens=20, max_tokens=2)
    harness.step()
    plan = harness.step()
    assert sorted(rids(plan)) == [
        ([], []),
        ([], ["fills"]),
        (["both"], ["joins"]),
        (["decodes"], []),
    ]
    harness.drain()


# Retraction


def test_the_newest_request_is_retracted_and_its_tokens_do_not_change():
    harness = Harness(pages=7, page_size=2, slots=3, prefill_tokens=16, radix_cache=False)
    harness.add("old", prompt_tokens=2, max_tokens=9)
    harness.add("new", prompt_tokens=2, max_tokens=9)
    plans = harness.drain()
    assert harness.scheduler.num_retracted > 0
    chunks = [chunk for plan in plans for chunk in plan.slices[0].prefill]
    again = [chunk for chunk in chunks if len(chunk.tokens) > 2]
    assert {chunk.rid for chunk in again} == {"new"}
    request = harness.requests["new"]
    for chunk in again:
        everything = request.prompt + tuple(tokens_alone(request))
        assert chunk.tokens == everything[: len(chunk.tokens)]
        assert chunk.samples
    assert list(harness.finished) == ["old", "new"]


def test_a_retracted_request_goes_before_those_that_wait():
    harness = Harness(pages=7, page_size=2, slots=2, prefill_tokens=16)
    for rid in ("old", "new", "waiting"):
        harness.add(rid, prompt_tokens=2, max_tokens=9)
    harness.drain()
    assert harness.scheduler.num_retracted > 0
    assert list(harness.finished) == ["old", "new", "waiting"]


def test_requests_retracted_on_several_slices_keep_their_order():
    harness = Harness(num_slices=2, pages=7, page_size=2, slots=2, prefill_tokens=16)
    for rid in "abcd":
        harness.add(rid, prompt_tokens=2, max_tokens=9)
    plans = harness.drain()
    assert harness.scheduler.num_retracted >= 2
    again = [
        chunk.rid
        for plan in plans
        for rows in plan.slices
        for chunk in rows.prefill
        if len(chunk.tokens) > 2
    ]
    assert again == sorted(again)


def test_a_retracted_request_may_come_back_on_another_slice():
    harness = Harness(num_slices=2, pages=8, page_size=2, slots=2, prefill_tokens=16)
    harness.add("a", prompt_tokens=2, max_tokens=12)
    harness.add("b", prompt_tokens=4, max_tokens=3)
    harness.add("c", prompt_tokens=2, max_tokens=12)
    harness.add("d", prompt_tokens=4, max_tokens=2)
    plans = harness.drain()
    slices_of_c = {
        rank
        for plan in plans
        for rank, names in enumerate(rids(plan))
        if "c" in names[0] + names[1]
    }
    assert harness.scheduler.num_retracted > 0
    assert slices_of_c == {0, 1}


@pytest.mark.parametrize(("prompt_tokens", "starts"), [(1, True), (3, False)])
def test_a_page_is_kept_back_for_each_running_request_that_may_still_grow(prompt_tokens, starts):
    harness = Harness(pages=5, page_size=2, slots=4, prefill_tokens=16, radix_cache=False)
    harness.add("grows", prompt_tokens=3, max_tokens=5)
    harness.step()
    # Two of four pages are free. A prompt of two pages would fit, but "grows" is going to take
    # one of them; a prompt of one page leaves the other to it.
    harness.add("new", prompt_tokens, max_tokens=1)
    assert rids(harness.step()) == [(["grows"], ["new"] if starts else [])]
    harness.drain()
    assert harness.scheduler.num_retracted == 0


def test_no_page_is_kept_back_for_requests_that_end_within_theirs():
    harness = Harness(pages=5, page_size=2, slots=4, prefill_tokens=16, radix_cache=False)
    harness.add("ends", prompt_tokens=2, max_tokens=2)
    harness.step()
    harness.add("large", prompt_tokens=3, max_tokens=1)
    assert rids(harness.step()) == [(["ends"], ["large"])]
    harness.drain()


# Aborts


@pytest.mark.parametrize("in_flight", [False, True])
def test_an_aborted_request_frees_everything_and_says_no_more(in_flight):
    harness = Harness()
    harness.add("stays", prompt_tokens=3)
    harness.add("goes", prompt_tokens=3)
    harness.step()
    plan = harness.plan() if in_flight else None
    assert harness.abort("goes")
    assert not harness.abort("goes")
    assert harness.scheduler.status()[0].running == 1
    if plan is not None:
        assert [outcome.rid for outcome in harness.finish(plan)] == ["stays"]
    harness.drain()


def test_a_waiting_request_can_be_aborted():
    harness = Harness(slots=1)
    harness.add("runs", prompt_tokens=1)
    harness.add("waits", prompt_tokens=1)
    harness.step()
    assert harness.scheduler.num_waiting == 1
    assert harness.abort("waits")
    assert harness.scheduler.num_waiting == 0
    harness.drain()


def test_an_aborted_rid_may_be_used_again_at_once_and_gets_no_tokens_of_the_first():
    harness = Harness()
    harness.add("a", prompt_tokens=3)
    plan = harness.plan()
    harness.scheduler.abort("a")
    harness.add("a", prompt_tokens=5, max_tokens=2)
    assert harness.finish(plan) == []
    harness.drain()


def test_aborting_what_nobody_knows_is_no_error():
    assert not Harness().scheduler.abort("nobody")


def test_aborting_everything_in_flight_leaves_nothing_to_do():
    harness = Harness()
    harness.add("a", prompt_tokens=3)
    plan = harness.plan()
    harness.abort("a")
    assert not harness.scheduler.has_work
    assert harness.finish(plan) == []
    assert harness.scheduler.plan() is None


# What is refused


def test_a_request_over_the_context_is_refused_with_the_numbers():
    harness = Harness(max_context_tokens=100, pages=64)
    harness.add("fits", prompt_tokens=90, max_tokens=10)
    with pytest.raises(
        RequestTooLong,
        match="prompt has 90 tokens and max_tokens is 11, together 101, but the context holds at "
        "most 100",
    ):
        harness.add("too long", prompt_tokens=90, max_tokens=11)
    harness.drain()


def test_a_request_over_the_pool_is_refused_and_one_that_just_fits_runs():
    harness = Harness(pages=5, page_size=4)
    harness.add("fits", prompt_tokens=10, max_tokens=6)
    with pytest.raises(RequestTooLong, match="together 17, but the KV pool holds at most 16"):
        harness.add("too long", prompt_tokens=10, max_tokens=7)
    harness.drain()


def test_malformed_requests_are_refused():
    harness = Harness()
    with pytest.raises(ValueError, match="prompt is empty"):
        harness.add("empty", prompt_tokens=0)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        harness.add("nothing asked", prompt_tokens=1, max_tokens=0)
    harness.add("a", prompt_tokens=1)
    with pytest.raises(ValueError, match="Request id 'a' is in use"):
        harness.add("a", prompt_tokens=1)
    harness.drain()


@pytest.mark.parametrize(
    "size",
    [
        "num_slices",
        "slots_per_slice",
        "page_size",
        "prefill_tokens_per_step",
        "prefill_rows_per_step",
        "max_context_tokens",
    ],
)
def test_sizes_with_which_nothing_runs_are_refused(size):
    sizes = {
        "num_slices": 1,
        "slots_per_slice": 1,
        "pages_per_slice": 2,
        "page_size": 1,
        "prefill_tokens_per_step": 1,
        "prefill_rows_per_step": 1,
        "max_context_tokens": 1,
    }
    Scheduler(SchedulerConfig(**sizes))
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Scheduler(SchedulerConfig(**{**sizes, size: 0}))


def test_two_steps_may_be_in_flight_and_are_applied_in_order():
    harness = Harness()
    harness.add("a", prompt_tokens=1)
    first, second = harness.plan(), harness.plan()
    with pytest.raises(RuntimeError, match="two steps that have not been applied"):
        harness.scheduler.plan()
    nothing = StepResult(tokens=[[None]], scores={})
    with pytest.raises(ValueError, match="not the oldest in flight"):
        harness.scheduler.apply(second, nothing)
    harness.finish(first)
    harness.finish(second)
    with pytest.raises(ValueError, match="not the oldest in flight"):
        harness.scheduler.apply(first, nothing)


@pytest.mark.parametrize("tokens", [[], [[]], [[None, None]], [[None]]])
def test_tokens_that_do_not_match_the_rows_are_refused(tokens):
    harness = Harness()
    harness.add("a", prompt_tokens=1)
    with pytest.raises(ValueError, match=r"has \[1\] rows by slice|is missing"):
        harness.scheduler.apply(harness.plan(), StepResult(tokens=tokens, scores={}))


def test_integrity_names_a_slot_that_got_lost():
    harness = Harness(slots=2)
    harness.scheduler._ranks[0]._free_slots.pop()
    with pytest.raises(IntegrityError, match=r"Slots 0 to 1 are held as \[1\]"):
        harness.scheduler.check_integrity()


def test_integrity_names_a_request_that_got_lost():
    harness = Harness()
    harness.add("a", prompt_tokens=1)
    harness.scheduler._queues[-1].clear()
    with pytest.raises(IntegrityError, match="1 requests are live, but 0 run and 0 wait"):
        harness.scheduler.check_integrity()


# All at once


def test_the_load_is_told_by_slice():
    harness = Harness(num_slices=2, pages=11, page_size=4)
    harness.add("a", prompt_tokens=5)
    harness.step()
    first, second = harness.scheduler.status()
    assert (first.dp_rank, first.running, first.used_tokens, first.total_tokens) == (0, 1, 8, 40)
    assert (second.dp_rank, second.running, second.used_tokens) == (1, 0, 0)
    harness.drain()


def test_planning_twice_from_the_start_gives_the_same_plans():
    def play() -> list[object]:
        harness = Harness(num_slices=3, pages=9, page_size=2, slots=3)
        for number in range(12):
            harness.add(f"r{number}", prompt_tokens=1 + number % 5, max_tokens=1 + number % 7)
        return harness.drain()

    assert play() == play()


def long_random_traffic(seed: int) -> int:
    """80 requests through a tight pool; how many were retracted."""
    draw = random.Random(seed)
    harness = Harness(
        num_slices=draw.choice([1, 2, 4, 8]),
        slots=draw.randint(4, 8),
        pages=draw.randint(16, 24),
        page_size=draw.choice([1, 2, 4]),
        prefill_tokens=draw.choice([2, 8, 32]),
        prefill_rows=draw.randint(1, 4),
    )
    pool = harness.scheduler.status()[0].total_tokens
    for number in range(80):
        prompt = draw.randint(1, pool // 4)
        harness.add(f"r{number}", prompt, draw.randint(1, pool // 2), seed=number)
        for _ in range(draw.choice([0, 0, 0, 1, 4])):
            if harness.scheduler.has_work:
                harness.step()
        if draw.random() < 0.1:
            harness.abort(f"r{draw.randrange(number + 1)}")
    harness.drain()
    assert max(running_by_slice(harness)) == 0
    return harness.scheduler.num_retracted


def test_long_random_traffic_through_a_tight_pool():
    assert sum(map(long_random_traffic, range(12))) > 20
