"""The free pages of one dp slice.

Page 0 is never handed out: it is the sink that padding rows and padded page-table entries point
to, so allocation starts at 1. The pool knows which pages are free, not who owns the others.
"""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Pages 1 .. num_pages - 1, each free or handed out. Most recently freed pages go out first."""

    def __init__(self, num_pages: int) -> None:
        """Raises ValueError when no page is left beside the sink."""
        if num_pages < 2:
            raise ValueError(
                f"A slice needs at least 2 pages (page 0 is the sink for padding), got {num_pages}."
            )
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._is_free = bytearray([0]) + bytearray([1]) * (num_pages - 1)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` pages, or None (and nothing changes) when fewer are free."""
        if count > len(self._free):
            return None
        pages = tuple(self._free.pop() for _ in range(count))
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Take pages back.

        Raises:
            ValueError: a page is not of this pool, is the sink, or is free already.
        """
        for page in pages:
            if not 0 < page < self.num_pages:
                raise ValueError(
                    f"Page {page} cannot be freed: this pool hands out 1 to {self.num_pages - 1}."
                )
            if self._is_free[page]:
                raise ValueError(f"Page {page} is freed twice.")
            self._is_free[page] = 1
            self._free.append(page)

    def free_pages(self) -> tuple[int, ...]:
        """All free pages, for integrity checks."""
        return tuple(self._free)
