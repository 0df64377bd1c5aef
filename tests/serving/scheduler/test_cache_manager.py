from __future__ import annotations

import pytest

from serving.scheduler.cache_manager import CacheManager, IntegrityError


def make_cache(num_pages: int = 8, page_size: int = 4) -> CacheManager:
    return CacheManager(num_pages=num_pages, page_size=page_size)


def test_pages_cover_the_tokens_asked_for():
    cache = make_cache()
    assert len(cache.allocate("a", 4)) == 1
    assert len(cache.allocate("b", 5)) == 2
    assert cache.used_tokens == 12
    assert cache.total_tokens == 28
    cache.check_integrity(["a", "b"])


def test_the_same_tuple_is_returned_until_a_page_is_added():
    cache = make_cache()
    pages = cache.allocate("a", 3)
    assert cache.extend("a", 4) is pages
    assert cache.pages("a") is pages
    grown = cache.extend("a", 5)
    assert grown[:1] == pages
    assert len(grown) == 2


def test_extending_without_free_pages_changes_nothing():
    cache = make_cache(num_pages=3)
    pages = cache.allocate("a", 4)
    cache.allocate("b", 4)
    assert cache.extend("a", 5) is None
    assert cache.pages("a") is pages
    cache.release("b")
    assert len(cache.extend("a", 5)) == 2
    cache.check_integrity(["a"])


def test_allocating_twice_is_refused_because_the_first_pages_would_be_lost():
    cache = make_cache()
    cache.allocate("a", 1)
    with pytest.raises(ValueError, match="Request a owns 1 pages already"):
        cache.allocate("a", 1)


def test_release_gives_everything_back():
    cache = make_cache()
    cache.allocate("a", 28)
    assert cache.num_free_pages == 0
    cache.release("a")
    assert cache.num_free_pages == 7
    with pytest.raises(KeyError):
        cache.release("a")
    cache.check_integrity([])


def test_integrity_names_a_lost_page():
    cache = make_cache()
    cache.allocate("a", 8)
    cache._pages["a"] = cache._pages["a"][:1]
    with pytest.raises(IntegrityError, match=r"Pages \[2\] are lost"):
        cache.check_integrity(["a"])


def test_integrity_names_a_page_owned_twice():
    cache = make_cache()
    cache.allocate("a", 4)
    cache._pages["b"] = cache._pages["a"]
    with pytest.raises(IntegrityError, match="Page 1 is held by request a and by request b"):
        cache.check_integrity(["a", "b"])


def test_integrity_names_a_page_both_free_and_owned():
    cache = make_cache()
    cache.allocate("a", 4)
    cache._pages["a"] += (5,)
    with pytest.raises(IntegrityError, match="Page 5 is held by the free list and by request a"):
        cache.check_integrity(["a"])


def test_integrity_names_the_sink():
    cache = make_cache()
    cache.allocate("a", 4)
    cache._pages["a"] += (0,)
    with pytest.raises(IntegrityError, match="Page 0 is held by request a"):
        cache.check_integrity(["a"])


def test_integrity_names_owners_that_do_not_run():
    cache = make_cache()
    cache.allocate("a", 4)
    with pytest.raises(IntegrityError, match=r"Requests \['a'\] own pages .* \['b'\] run but own"):
        cache.check_integrity(["b"])


def test_a_page_must_hold_something():
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        make_cache(page_size=0)
