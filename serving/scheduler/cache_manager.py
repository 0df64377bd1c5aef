"""Which request uses which KV pages of one dp slice, and which pages the prefix tree keeps.

A request's pages are a tuple in position order: page i holds the KV entries of positions
i * page_size to (i + 1) * page_size - 1. The first of them may belong to the tree, locked by the
request and shared with others; the rest are its own. The tuple is replaced only when it grows, so
a plan can hold it without copying. Every page from 1 on is free, the tree's, or one request's;
`check_integrity` proves it.

            position 0                                          num_tokens
            |------------- tree's, locked -------------|-- own --|
    pages   (  7     ,    3     ,     9     ,    12    ,   4     )
               shared with whoever has this prefix  ^      ^ tail, a page partly filled
                                        `Holding.node`
"""

from __future__ import annotations

from collections.abc import Collection

from serving.scheduler.page_pool import PagePool
from serving.scheduler.radix_cache import Node, PrefixKey, RadixCache


class IntegrityError(RuntimeError):
    """The accounting is broken: a bug in the scheduler, never a user's mistake."""


class Holding:
    """What one request holds: its pages, and the deepest of them that is the tree's (locked)."""

    __slots__ = ("node", "pages")

    def __init__(self, pages: tuple[int, ...], node: Node) -> None:
        self.pages = pages
        self.node = node

    @property
    def own(self) -> tuple[int, ...]:
        return self.pages[self.node.depth :]


class CacheManager:
    """The pages of one slice by request. Sizes are KV tokens unless the name says pages."""

    def __init__(self, *, num_pages: int, page_size: int, radix_cache: bool = True) -> None:
        """`num_pages` counts the sink (page 0); without `radix_cache` nothing is ever shared.

        Raises ValueError for sizes that hold nothing.
        """
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}.")
        self.page_size = page_size
        self.shares = radix_cache
        self.num_evicted_pages = 0
        self._pool = PagePool(num_pages)
        self._tree = RadixCache(page_size)
        self._holdings: dict[str, Holding] = {}

    @property
    def total_tokens(self) -> int:
        """KV tokens that the slice can hold."""
        return (self._pool.num_pages - 1) * self.page_size

    @property
    def used_tokens(self) -> int:
        """KV tokens in pages that requests use; a page counts whole, and once."""
        return self.total_tokens - self.num_available_pages * self.page_size

    @property
    def cached_tokens(self) -> int:
        """KV tokens in the tree that no request uses: there for reuse, given up when needed."""
        return self._tree.num_evictable * self.page_size

    @property
    def num_available_pages(self) -> int:
        """Pages that are free or can be evicted."""
        return self._pool.num_free + self._tree.num_evictable

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` KV entries take."""
        return -(-num_tokens // self.page_size)

    def pages(self, rid: str) -> tuple[int, ...]:
        """The pages of a request. Raises KeyError for one that holds none."""
        return self._holdings[rid].pages

    def match(self, key: PrefixKey, max_tokens: int, hint: Node | None = None) -> Node:
        """The longest cached prefix of `key`, in whole pages and at most `max_tokens` long.

        Pass the last answer for this key as `hint`. The node may be gone by the next allocation.
        """
        return self._tree.match(key, max_tokens // self.page_size, hint)

    def spare_pages(self, node: Node, num_tokens: int) -> int:
        """Pages left to others if a request starts on prefix `node` with room for `num_tokens`.

        Negative if it cannot start.
        """
        new = self.pages_for(num_tokens) - node.depth
        return self.num_available_pages - self._tree.num_idle_above(node) - new

    def start(self, rid: str, node: Node, num_tokens: int) -> tuple[int, ...] | None:
        """Pages for a request's first `num_tokens` KV entries, those of prefix `node` shared.

        Returns None, and changes nothing, when too few pages are left.

        Raises:
            ValueError: the request holds pages already (they would be lost).
        """
        if rid in self._holdings:
            raise ValueError(f"Request {rid} holds {len(self.pages(rid))} pages already.")
        if self.spare_pages(node, num_tokens) < 0:
            return None
        self._tree.lock(node)
        own = self._take(self.pages_for(num_tokens) - node.depth)
        assert own is not None, "spare_pages promised them"
        pages = node.pages() + own
        self._holdings[rid] = Holding(pages, node)
        return pages

    def extend(self, rid: str, num_tokens: int) -> tuple[int, ...] | None:
        """Grow a request's pages to hold `num_tokens` KV entries, and return them all.

        Returns None, and changes nothing, when too few pages are left. Raises KeyError for a
        request that holds none.
        """
        holding = self._holdings[rid]
        if num_tokens <= len(holding.pages) * self.page_size:
            return holding.pages
        more = self._take(self.pages_for(num_tokens) - len(holding.pages))
        if more is None:
            return None
        holding.pages += more
        return holding.pages

    def publish(self, rid: str, key: PrefixKey, num_tokens: int) -> None:
        """Let others share the request's pages that hold its first `num_tokens` entries.

        `key` spells the tokens; entries count as written once the step that writes them is
        planned. Where the tree has other pages for the same tokens already, the request's stay
        its own.
        """
        if not self.shares:
            return
        holding = self._holdings[rid]
        node = holding.node
        for index in range(node.depth, num_tokens // self.page_size):
            edge = key.page(index, self.page_size)
            if edge in node.children:
                break
            node = self._tree.insert(node, edge, holding.pages[index])
        if node is not holding.node:
            self._tree.lock(node)
            self._tree.unlock(holding.node)
            holding.node = node

    def release(self, rid: str, key: PrefixKey | None = None, num_tokens: int = 0) -> None:
        """Let go of all pages of a request. Raises KeyError for one that holds none.

        The tree keeps the whole pages of its first `num_tokens` entries, whose tokens `key`
        spells, until their room is needed; the others are free.
        """
        holding = self._holdings.pop(rid)
        first_own = holding.node.depth
        kept = holding.node
        free = []
        whole = num_tokens // self.page_size if self.shares and key is not None else 0
        for index in range(first_own, len(holding.pages)):
            page = holding.pages[index]
            if index >= whole:
                free.append(page)
                continue
            assert key is not None
            edge = key.page(index, self.page_size)
            child = kept.children.get(edge)
            if child is None:
                kept = self._tree.insert(kept, edge, page)
            else:  # another request had the same tokens at the same time
                free.append(page)
                kept = child
        self._pool.free(free)
        self._tree.unlock(holding.node)

    def flush(self) -> None:
        """Forget all prefixes that no request uses."""
        self._pool.free(self._tree.clear())

    def check_integrity(self, owners: Collection[str]) -> None:
        """Prove that every page is free, the tree's or one request's, and that locks add up.

        Raises:
            IntegrityError: a page is lost, held twice, or is the sink; a request holds pages
                without being among `owners`, or the other way round; or the tree's counts are
                not those of the requests that use it.
        """
        if set(self._holdings) != set(owners):
            raise IntegrityError(
                f"Requests {sorted(set(self._holdings) - set(owners))} hold pages but do not run; "
                f"requests {sorted(set(owners) - set(self._holdings))} run but hold none."
            )
        holder: dict[int, str] = {}
        holders = [("the free list", self._pool.free_pages())]
        holders += [("the tree", tuple(node.page for node in self._tree.nodes()))]
        holders += [(f"request {rid}", held.own) for rid, held in self._holdings.items()]
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
            raise IntegrityError(f"Pages {lost} are lost: neither free, cached nor a request's.")
        self._check_tree()

    def _check_tree(self) -> None:
        """Prove that each node's `uses` is the locks and used children it stands for."""
        locks: dict[Node, int] = {}
        for rid, holding in self._holdings.items():
            node = holding.node
            if not node.alive or node.pages() != holding.pages[: node.depth]:
                raise IntegrityError(f"Request {rid} uses cached pages that the tree gave up.")
            locks[node] = locks.get(node, 0) + 1
        num_nodes = num_used = 0
        for node in self._tree.nodes():
            used_children = sum(child.uses > 0 for child in node.children.values())
            if node.uses != locks.get(node, 0) + used_children:
                raise IntegrityError(
                    f"Cached page {node.page} counts {node.uses} uses, but has "
                    f"{locks.get(node, 0)} locks and {used_children} children in use."
                )
            num_nodes += 1
            num_used += node.uses > 0
        if (num_nodes, num_nodes - num_used) != (self._tree.num_pages, self._tree.num_evictable):
            raise IntegrityError(
                f"The tree counts {self._tree.num_pages} pages, {self._tree.num_evictable} of them "
                f"evictable, but has {num_nodes} and {num_nodes - num_used}."
            )

    def _take(self, count: int) -> tuple[int, ...] | None:
        """`count` pages, evicting cached ones as needed; None (and no change) if too few."""
        missing = count - self._pool.num_free
        if missing > self._tree.num_evictable:
            return None
        if missing > 0:
            evicted = self._tree.evict(missing)
            self.num_evicted_pages += len(evicted)
            self._pool.free(evicted)
        return self._pool.allocate(count)
