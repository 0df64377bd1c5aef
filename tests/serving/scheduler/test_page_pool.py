from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.scheduler.page_pool import PagePool


def test_allocation_starts_at_page_one_and_never_gives_the_sink():
    pool = PagePool(4)
    assert pool.allocate(3) == (1, 2, 3)
    assert pool.allocate(1) is None


def test_asking_for_too_much_changes_nothing():
    pool = PagePool(4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3


def test_nothing_can_be_asked_of_an_empty_pool():
    pool = PagePool(2)
    pool.allocate(1)
    assert pool.allocate(0) == ()


@pytest.mark.parametrize(
    ("page", "message"),
    [(0, "hands out 1 to 3"), (4, "hands out 1 to 3"), (-1, "hands out"), (2, "freed twice")],
)
def test_freeing_what_was_not_handed_out_is_refused(page, message):
    with pytest.raises(ValueError, match=message):
        PagePool(4).free([page])


def test_a_page_cannot_come_back_twice():
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.free(pages)
    with pytest.raises(ValueError, match=f"Page {pages[0]} is freed twice"):
        pool.free(pages)


def test_a_pool_of_the_sink_alone_is_refused():
    with pytest.raises(ValueError, match="at least 2 pages"):
        PagePool(1)


@settings(max_examples=40, deadline=None)
@given(
    num_pages=st.integers(2, 20),
    actions=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=30),
)
def test_pages_are_free_or_held_whatever_the_order(num_pages, actions):
    pool = PagePool(num_pages)
    held: list[tuple[int, ...]] = []
    for allocate, amount in actions:
        if allocate:
            pages = pool.allocate(amount)
            assert (pages is None) == (amount > num_pages - 1 - sum(map(len, held)))
            held += [pages] if pages else []
        elif held:
            pool.free(held.pop(amount % len(held)))
        everywhere = [*pool.free_pages(), *(page for pages in held for page in pages)]
        assert sorted(everywhere) == list(range(1, num_pages))
