"""Random schedules against the fake runner: whatever arrives and leaves, nothing is lost."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.scheduler.fake_runner import Harness

SIZES = st.fixed_dictionaries(
    {
        "num_slices": st.integers(1, 5),
        "slots": st.integers(1, 6),
        "pages": st.integers(3, 20),
        "page_size": st.integers(1, 4),
        "prefill_tokens": st.integers(1, 12),
        "prefill_rows": st.integers(1, 3),
    }
)

# One event: (kind, wait, size, answer, stops). `wait` is the steps run before it; `size` is the
# prompt of a new request, or selects whom to abort.
WAIT = st.sampled_from([0, 0, 0, 1, 2, 5])
ADD = st.tuples(
    st.just("add"),
    WAIT,
    st.one_of(st.integers(1, 4), st.integers(1, 40)),
    st.integers(1, 40),
    st.integers(0, 3).map(lambda n: n == 0),
)
ABORT = st.tuples(
    st.sampled_from(["abort", "abort in flight"]),
    WAIT,
    st.integers(0, 40),
    st.just(0),
    st.just(False),
)
EVENTS = st.lists(st.one_of(ADD, ADD, ADD, ADD, ABORT), min_size=10, max_size=40)


def play(harness: Harness, events: list[tuple[str, int, int, int, bool]]) -> None:
    """Run the events with steps between them, then run until nothing is left."""
    pool = harness.scheduler.status()[0].total_tokens
    for number, (kind, wait, size, answer, stops) in enumerate(events):
        for _ in range(wait):
            if harness.scheduler.has_work:
                harness.step()
        if kind == "add":
            # Fold the lengths into what the pool can ever hold, keeping the largest cases.
            prompt = 1 + (size - 1) % max(pool - 1, 1)
            max_tokens = min(answer, pool - prompt)
            if max_tokens < 1:
                continue
            stop_ids = (3, 11, 19) if stops else ()
            harness.add(f"r{number}", prompt, max_tokens, seed=number % 3, stop_token_ids=stop_ids)
            continue
        in_flight = harness.plan() if kind != "abort" and harness.scheduler.has_work else None
        if harness.requests:
            rid = list(harness.requests)[size % len(harness.requests)]
            gone = rid in harness.finished or rid in harness.aborted
            assert harness.abort(rid) == (not gone)
        if in_flight is not None:
            harness.finish(in_flight)
    harness.drain()


@settings(max_examples=220, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes=SIZES, events=EVENTS)
def test_every_request_ends_once_with_the_tokens_it_gets_alone(sizes, events):
    play(Harness(**sizes), events)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    num_slices=st.integers(1, 3),
    page_size=st.integers(1, 3),
    pages=st.integers(5, 12),
    prefill_tokens=st.integers(1, 6),
    answers=st.lists(st.integers(8, 40), min_size=8, max_size=16),
)
def test_a_pool_far_too_small_for_the_load_only_slows_it_down(
    num_slices, page_size, pages, prefill_tokens, answers
):
    harness = Harness(
        num_slices=num_slices,
        slots=6,
        pages=pages,
        page_size=page_size,
        prefill_tokens=prefill_tokens,
    )
    capacity = (pages - 1) * page_size
    for number, answer in enumerate(answers):
        prompt = 1 + number % min(3, capacity - 1)
        harness.add(f"r{number}", prompt, min(answer, capacity - prompt))
    harness.drain()
