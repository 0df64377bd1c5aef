"""Choices by load and by expected cost."""

from __future__ import annotations

import pytest

from router.policies import (
    MISS_WEIGHT,
    REQUEST_CHARGE,
    Load,
    Offer,
    cheapest,
    fewest_requests,
    least_loaded,
)


def offer(miss: int, wait: int = 0, requests: int = 0, tokens: int = 0) -> Offer:
    return Offer(miss=miss, wait=wait, requests=requests, tokens=tokens)


def test_tokens_then_requests_or_requests_then_tokens():
    loads = [Load(tokens=5, requests=1), Load(tokens=3, requests=9), Load(tokens=3, requests=2)]
    assert least_loaded(loads) == 2
    assert fewest_requests(loads) == 0


def test_equal_candidates_take_turns():
    same = [Load(tokens=1, requests=1)] * 3
    assert [least_loaded(same, turn) for turn in range(4)] == [0, 1, 2, 0]
    assert [fewest_requests(same, turn) for turn in range(4)] == [0, 1, 2, 0]
    assert [cheapest([offer(7)] * 2, turn) for turn in range(3)] == [0, 1, 0]


def test_a_cached_prefix_wins_until_the_queue_behind_it_outweighs_it():
    saved = 100
    assert cheapest([offer(saved), offer(0, wait=MISS_WEIGHT * saved - 1)]) == 1
    assert cheapest([offer(saved), offer(0, wait=MISS_WEIGHT * saved + 1)]) == 0


def test_requests_beside_it_cost_something_and_tokens_break_ties():
    assert cheapest([offer(0, requests=1), offer(0, wait=REQUEST_CHARGE - 1)]) == 1
    assert cheapest([offer(5, tokens=10), offer(5, tokens=9)]) == 1


@pytest.mark.parametrize("choose", [least_loaded, fewest_requests, cheapest])
def test_no_candidate_is_an_error(choose):
    with pytest.raises(ValueError, match="at least one candidate"):
        choose([])
