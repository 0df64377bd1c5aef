"""Pages by request and in the tree: who holds what, and what the integrity check notices."""

from __future__ import annotations

import pytest

from serving.scheduler.cache_manager import CacheManager, IntegrityError
from serving.scheduler.radix_cache import PrefixKey


def make_cache(num_pages: int = 8, page_size: int = 4, **options: bool) -> CacheManager:
    return CacheManager(num_pages=num_pages, page_size=page_size, **options)


def key(*tokens: int) -> PrefixKey:
    return PrefixKey.of(tokens)


def start(cache: CacheManager, rid: str, num_tokens: int, prefix: PrefixKey | None = None):
    """Pages for a request, on whatever of `prefix` is cached."""
    node = cache.match(prefix or key(), num_tokens)
    return cache.start(rid, node, num_tokens)


def test_pages_cover_the_tokens_asked_for():
    cache = make_cache()
    assert len(start(cache, "a", 4)) == 1
    assert len(start(cache, "b", 5)) == 2
    assert cache.used_tokens == 12
    assert cache.total_tokens == 28
    cache.check_integrity(["a", "b"])


def test_the_same_tuple_is_returned_until_a_page_is_added():
    cache = make_cache()
    pages = start(cache, "a", 3)
    assert cache.extend("a", 4) is pages
    assert cache.pages("a") is pages
    grown = cache.extend("a", 5)
    assert grown[:1] == pages
    assert len(grown) == 2


def test_extending_without_free_pages_changes_nothing():
    cache = make_cache(num_pages=3)
    pages = start(cache, "a", 4)
    start(cache, "b", 4)
    assert cache.extend("a", 5) is None
    assert cache.pages("a") is pages
    cache.release("b")
    assert len(cache.extend("a", 5)) == 2
    cache.check_integrity(["a"])


def test_starting_twice_is_refused_because_the_first_pages_would_be_lost():
    cache = make_cache()
    start(cache, "a", 1)
    with pytest.raises(ValueError, match="Request a holds 1 pages already"):
        start(cache, "a", 1)


def test_release_without_a_key_gives_everything_back():
    cache = make_cache()
    start(cache, "a", 28)
    assert cache.num_available_pages == 0
    cache.release("a")
    assert cache.num_available_pages == 7
    assert cache.cached_tokens == 0
    with pytest.raises(KeyError):
        cache.release("a")
    cache.check_integrity([])


def test_whole_pages_of_a_released_request_are_found_again():
    cache = make_cache()
    tokens = key(*range(10))
    pages = start(cache, "a", 10)
    cache.release("a", tokens, 10)
    assert (cache.used_tokens, cache.cached_tokens) == (0, 8)
    again = start(cache, "b", 10, tokens)
    assert again[:2] == pages[:2]
    assert (cache.used_tokens, cache.cached_tokens) == (12, 0)
    cache.check_integrity(["b"])


def test_only_as_much_is_matched_as_is_allowed():
    cache = make_cache()
    start(cache, "a", 8)
    cache.release("a", key(*range(8)), 8)
    assert cache.match(key(*range(8)), 7).depth == 1
    assert cache.match(key(*range(8)), 8).depth == 2
    assert cache.match(key(0, 1, 2, 3, 9, 9, 9, 9), 8).depth == 1
    assert cache.match(key(9, 1, 2, 3), 4).depth == 0
    assert cache.match(PrefixKey.of(range(8), "other namespace"), 8).depth == 0


def test_pages_are_shared_from_the_moment_they_are_published():
    cache = make_cache()
    tokens = key(*range(9))
    pages = start(cache, "a", 9)
    cache.publish("a", tokens, 6)
    assert cache.match(tokens, 9).depth == 1
    cache.publish("a", tokens, 9)
    assert start(cache, "b", 9, tokens)[:2] == pages[:2]
    assert cache.used_tokens == 4 * 4
    cache.release("a", tokens, 9)
    assert cache.used_tokens == 3 * 4
    cache.check_integrity(["b"])


def test_pages_that_repeat_cached_ones_stay_private_and_are_freed_at_the_end():
    cache = make_cache()
    tokens = key(*range(8))
    start(cache, "a", 8)
    start(cache, "b", 8)
    cache.publish("a", tokens, 8)
    cache.publish("b", tokens, 8)
    assert cache.used_tokens == 16
    cache.check_integrity(["a", "b"])
    cache.release("b", tokens, 8)
    cache.release("a", tokens, 8)
    assert (cache.used_tokens, cache.cached_tokens) == (0, 8)
    cache.check_integrity([])


def test_a_continuation_is_kept_below_the_prefix_it_shared():
    cache = make_cache()
    start(cache, "a", 4)
    cache.release("a", key(*range(4)), 4)
    start(cache, "b", 9, key(*range(4)))
    cache.release("b", key(*range(9)), 9)
    assert cache.match(key(*range(8)), 8).depth == 2
    cache.check_integrity([])


def test_the_least_recently_used_prefix_goes_first_and_from_its_end():
    cache = make_cache()
    for rid, first in (("a", 0), ("b", 100)):
        start(cache, rid, 8)
        cache.release(rid, key(*range(first, first + 8)), 8)
    start(cache, "c", 8, key(*range(8)))  # "a" is now the more recent one
    cache.release("c", key(*range(8)), 8)
    start(cache, "d", 16)  # three pages were free
    assert cache.match(key(*range(8)), 8).depth == 2
    assert cache.match(key(*range(100, 108)), 8).depth == 1
    assert cache.num_evicted_pages == 1
    cache.check_integrity(["d"])


def test_a_prefix_in_use_is_never_evicted_nor_counted_as_room():
    cache = make_cache(num_pages=5)
    start(cache, "a", 8)
    cache.release("a", key(*range(8)), 8)
    node = cache.match(key(*range(8)), 8)
    assert cache.num_available_pages == 4
    assert cache.spare_pages(node, 16) == 0
    assert cache.spare_pages(node, 17) == -1
    assert cache.start("b", node, 17) is None
    assert len(cache.start("b", node, 12)) == 3
    assert start(cache, "c", 8) is None
    assert start(cache, "c", 4) is not None
    assert cache.match(key(*range(8)), 8).depth == 2
    cache.check_integrity(["b", "c"])


def test_an_old_answer_is_a_hint_only_as_long_as_it_lives():
    cache = make_cache(num_pages=3)
    start(cache, "a", 4)
    cache.release("a", key(*range(4)), 4)
    old = cache.match(key(*range(8)), 8)
    assert old.depth == 1
    start(cache, "b", 8)
    assert not old.alive
    assert cache.match(key(*range(8)), 8, hint=old).depth == 0


def test_nothing_is_kept_where_the_cache_is_off():
    cache = make_cache(radix_cache=False)
    start(cache, "a", 8)
    cache.publish("a", key(*range(8)), 8)
    cache.release("a", key(*range(8)), 8)
    assert (cache.used_tokens, cache.cached_tokens) == (0, 0)
    assert cache.match(key(*range(8)), 8).depth == 0
    cache.check_integrity([])


def test_flushing_forgets_what_nobody_uses():
    cache = make_cache()
    for rid, tokens in (("a", range(8)), ("b", range(50, 54))):
        start(cache, rid, len(tokens))
        cache.release(rid, key(*tokens), len(tokens))
    start(cache, "c", 5, key(*range(4)))
    cache.flush()
    assert cache.cached_tokens == 0
    assert cache.match(key(*range(8)), 8).depth == 1
    cache.check_integrity(["c"])


def test_entries_of_the_eviction_order_do_not_pile_up():
    cache = make_cache()
    start(cache, "a", 8)
    cache.release("a", key(*range(8)), 8)
    for number in range(1000):
        start(cache, f"r{number}", 9, key(*range(8)))
        cache.release(f"r{number}", key(*range(9)), 9)
    assert len(cache._tree._leaves) < 100
    cache.flush()
    assert cache.num_available_pages == 7
    cache.check_integrity([])


def test_integrity_names_a_lost_page():
    cache = make_cache()
    start(cache, "a", 8)
    cache._holdings["a"].pages = cache.pages("a")[:1]
    with pytest.raises(IntegrityError, match=r"Pages \[2\] are lost"):
        cache.check_integrity(["a"])


def test_integrity_names_a_page_held_twice():
    cache = make_cache()
    start(cache, "a", 4)
    cache._holdings["b"] = cache._holdings["a"]
    with pytest.raises(IntegrityError, match="Page 1 is held by request a and by request b"):
        cache.check_integrity(["a", "b"])


def test_integrity_names_a_page_both_free_and_held():
    cache = make_cache()
    start(cache, "a", 4)
    cache._holdings["a"].pages += (5,)
    with pytest.raises(IntegrityError, match="Page 5 is held by the free list and by request a"):
        cache.check_integrity(["a"])


def test_integrity_names_the_sink():
    cache = make_cache()
    start(cache, "a", 4)
    cache._holdings["a"].pages += (0,)
    with pytest.raises(IntegrityError, match="Page 0 is held by request a"):
        cache.check_integrity(["a"])


def test_integrity_names_owners_that_do_not_run():
    cache = make_cache()
    start(cache, "a", 4)
    with pytest.raises(IntegrityError, match=r"Requests \['a'\] hold pages .* \['b'\] run but"):
        cache.check_integrity(["b"])


def test_integrity_names_a_lock_that_got_lost():
    cache = make_cache()
    start(cache, "a", 8)
    cache.publish("a", key(*range(8)), 8)
    cache._tree.unlock(cache._holdings["a"].node)
    with pytest.raises(IntegrityError, match="Cached page 2 counts 0 uses, but has 1 locks"):
        cache.check_integrity(["a"])


def test_integrity_names_a_wrong_count():
    cache = make_cache()
    start(cache, "a", 8)
    cache.release("a", key(*range(8)), 8)
    cache._tree._num_used = 1
    with pytest.raises(IntegrityError, match="counts 2 pages, 1 of them evictable, but has 2 and"):
        cache.check_integrity([])


def test_a_page_must_hold_something():
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        make_cache(page_size=0)
