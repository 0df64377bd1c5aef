"""Which request owns which KV pages of one dp slice.

A request's pages are a tuple in position order: page i holds the KV entries of positions
i * page_size to (i + 1) * page_size - 1. The tuple is replaced only when it grows, so a plan can
hold it without copying. Every page from 1 on is free or owned once; `check_integrity` proves it.
"""

from __future__ import annotations

from collections.abc import Collection

from serving.scheduler.page_pool import PagePool


class IntegrityError(RuntimeError):
    """The accounting is broken: a bug in the scheduler, never a user's mistake."""


class CacheManager:
    """The pages of one slice by request. Sizes are KV tokens unless the name says pages."""

    def __init__(self, *, num_pages: int, page_size: int) -> None:
        """`num_pages` counts the sink (page 0). Raises ValueError for sizes that hold nothing."""
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}.")
        self.page_size = page_size
        self._pool = PagePool(num_pages)
        self._pages: dict[str, tuple[int, ...]] = {}

    @property
    def total_tokens(self) -> int:
        """KV tokens that the slice can hold."""
        return (self._pool.num_pages - 1) * self.page_size

    @property
    def used_tokens(self) -> int:
        """KV tokens in pages that are owned; a page counts whole."""
        return self.total_tokens - self._pool.num_free * self.page_size

    @property
    def num_free_pages(self) -> int:
        return self._pool.num_free

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` KV entries take."""
        return -(-num_tokens // self.page_size)

    def pages(self, rid: str) -> tuple[int, ...]:
        """The pages of a request. Raises KeyError for one that owns none."""
        return self._pages[rid]

    def allocate(self, rid: str, num_tokens: int) -> tuple[int, ...] | None:
        """Pages for a request's first `num_tokens` KV entries; None when too few are free.

        Raises:
            ValueError: the request owns pages already (they would be lost).
        """
        if rid in self._pages:
            raise ValueError(f"Request {rid} owns {len(self._pages[rid])} pages already.")
        pages = self._pool.allocate(self.pages_for(num_tokens))
        if pages is not None:
            self._pages[rid] = pages
        return pages

    def extend(self, rid: str, num_tokens: int) -> tuple[int, ...] | None:
        """Grow a request's pages to hold `num_tokens` KV entries, and return them all.

        Returns None, and changes nothing, when too few pages are free. Raises KeyError for a
        request that owns none.
        """
        pages = self._pages[rid]
        if num_tokens <= len(pages) * self.page_size:
            return pages
        more = self._pool.allocate(self.pages_for(num_tokens) - len(pages))
        if more is None:
            return None
        pages = self._pages[rid] = pages + more
        return pages

    def release(self, rid: str) -> None:
        """Free all pages of a request. Raises KeyError for one that owns none."""
        self._pool.free(self._pages.pop(rid))

    def check_integrity(self, owners: Collection[str]) -> None:
        """Prove that every page is free or owned exactly once, and that `owners` own them.

        Raises:
            IntegrityError: a page is lost, owned twice, or is the sink; or a request owns pages
                without being among `owners`, or the other way round.
        """
        if set(self._pages) != set(owners):
            raise IntegrityError(
                f"Requests {sorted(set(self._pages) - set(owners))} own pages but do not run; "
                f"requests {sorted(set(owners) - set(self._pages))} run but own none."
            )
        holder: dict[int, str] = {}
        holders = [("the free list", self._pool.free_pages())]
        holders += [(f"request {rid}", pages) for rid, pages in self._pages.items()]
        for name, pages in holders:
            for page in pages:
                if page in holder:
                    raise IntegrityError(f"Page {page} is held by {holder[page]} and by {name}.")
                if not 0 < page < self._pool.num_pages:
                    raise IntegrityError(
                        f"Page {page} is held by {name}, but only pages 1 to "
                        f"{self._pool.num_pages - 1} may be handed out."
                    )
                holder[page] = name
        lost = [page for page in range(1, self._pool.num_pages) if page not in holder]
        if lost:
            raise IntegrityError(f"Pages {lost} are lost: neither free nor owned by a request.")
