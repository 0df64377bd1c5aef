"""Random schedules against the fake runner: whatever arrives and leaves, nothing is lost.

`long_run` plays many more.
"""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.scheduler.phases import PhasePolicy
from tests.serving.scheduler.fake_runner import Harness

SIZES = st.fixed_dictionaries(
    {
        "num_slices": st.integers(1, 5),
        "slots": st.integers(1, 6),
        "pages": st.integers(3, 20),
        "page_size": st.integers(1, 4),
        "prefill_tokens": st.integers(1, 12),
        "prefill_rows": st.integers(1, 3),
        "overlap": st.booleans(),
        "radix_cache": st.booleans(),
        "schedule_policy": st.sampled_from(["fcfs", "lpm"]),
        "load_balance": st.sampled_from(
            ["cache_aware", "cache_aware", "round_robin", "total_requests", "total_tokens"]
        ),
        "phases": st.builds(
            PhasePolicy,
            interval=st.sampled_from([0, 0, 1, 3]),
            max_delay=st.sampled_from([None, None, 1, 4]),
            exclusive=st.booleans(),
        ),
        "reproducible": st.sampled_from([False, False, True]),
    }
)

# One event: (kind, wait, size, answer, other). `wait` is the steps run before it; `size` is the
# prompt of a new request, or selects whom to abort; `other` chooses its further fields.
WAIT = st.sampled_from([0, 0, 0, 1, 2, 5])
ADD = st.tuples(
    st.just("add"),
    WAIT,
    st.one_of(st.integers(1, 4), st.integers(1, 40)),
    st.integers(1, 40),
    st.integers(0, 1 << 12),
)
ABORT = st.tuples(
    st.sampled_from(["abort", "abort in flight"]),
    WAIT,
    st.integers(0, 40),
    st.just(0),
    st.just(0),
)
EVENTS = st.lists(st.one_of(ADD, ADD, ADD, ADD, ABORT), min_size=10, max_size=40)


def add(harness: Harness, number: int, size: int, answer: int, other: int) -> None:
    """A request whose lengths are folded into what the pool can ever hold, largest cases kept."""
    status = harness.scheduler.status()
    pool = status[0].total_tokens
    prompt = 1 + (size - 1) % max(pool - 1, 1)
    max_tokens = min(answer, pool - prompt)
    if max_tokens < 1:
        return
    shared = (0, prompt // 2, prompt, prompt)[other % 4]
    harness.add(
        f"r{number}",
        prompt,
        max_tokens,
        shared=shared,
        seed=number % 3,
        stop_token_ids=(3, 11, 19) if other // 4 % 4 == 0 else (),
        priority=(0, 0, 0, 5)[other // 16 % 4],
        dp_rank=other % len(status) if other // 64 % 8 == 0 else None,
        cache_key="salt" if other // 512 % 4 == 0 else "",
        prompt_logprobs=2 if other // 2048 else None,
    )


def play(harness: Harness, events: list[tuple[str, int, int, int, int]]) -> None:
    """Run the events with steps between them, then run until nothing is left."""
    for number, (kind, wait, size, answer, other) in enumerate(events):
        for _ in range(wait):
            if harness.scheduler.has_work:
                harness.step()
        if kind == "add":
            add(harness, number, size, answer, other)
            continue
        if kind == "abort in flight" and harness.scheduler.has_work and not harness.launched:
            harness._launch()
        if harness.requests:
            rid = list(harness.requests)[size % len(harness.requests)]
            gone = rid in harness.finished or rid in harness.aborted
            assert harness.abort(rid) == (not gone)
        while harness.launched and not harness.overlap:
            harness.finish(harness.launched[0][0])
    harness.drain()
    assert harness.scheduler.flush_cache()
    for load in harness.scheduler.status():
        assert load.cached_tokens == 0
    harness.scheduler.check_integrity()


@settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=SIZES, events=EVENTS)
def test_every_request_ends_once_with_the_tokens_it_gets_alone(sizes, events):
    play(Harness(**sizes), events)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    num_slices=st.integers(1, 3),
    page_size=st.integers(1, 3),
    pages=st.integers(5, 12),
    prefill_tokens=st.integers(1, 6),
    overlap=st.booleans(),
    radix_cache=st.booleans(),
    answers=st.lists(st.integers(8, 40), min_size=8, max_size=16),
)
def test_a_pool_far_too_small_for_the_load_only_slows_it_down(
    num_slices, page_size, pages, prefill_tokens, overlap, radix_cache, answers
):
    harness = Harness(
        num_slices=num_slices,
        slots=6,
        pages=pages,
        page_size=page_size,
        prefill_tokens=prefill_tokens,
        overlap=overlap,
        radix_cache=radix_cache,
    )
    capacity = (pages - 1) * page_size
    for number, answer in enumerate(answers):
        prompt = 1 + number % min(3, capacity - 1)
        harness.add(f"r{number}", prompt, min(answer, capacity - prompt))
    harness.drain()
