"""The prefix tree over the KV pages of one dp slice: which page holds the entries of which tokens.

A radix tree whose every edge is one page of tokens: a node is a page, and the path from the root
to it spells the tokens whose KV entries the pages on the path hold. Requests lock the deepest node
they use; what no request uses can be evicted, least recently used leaves first.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

TOKEN_BYTES = array("i").itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixKey:
    """What a sequence is looked up by: its tokens as bytes (they hash and compare fastest).

    Sequences of different namespaces share nothing.
    """

    namespace: bytes
    tokens: bytes

    @classmethod
    def of(cls, tokens: Iterable[int], namespace: str = "") -> PrefixKey:
        return cls(namespace=namespace.encode(), tokens=array("i", tokens).tobytes())

    def extended(self, tokens: Iterable[int]) -> PrefixKey:
        """The key of this sequence with more tokens behind it."""
        more = array("i", tokens).tobytes()
        return PrefixKey(namespace=self.namespace, tokens=self.tokens + more)

    def page(self, index: int, page_size: int) -> bytes:
        """The tokens of page `index`; the first one also says the namespace."""
        width = page_size * TOKEN_BYTES
        part = self.tokens[index * width : (index + 1) * width]
        return part if index else self.namespace + part


class Node:
    """One cached page.

    Attributes:
        page: its number; 0 for the root.
        depth: pages on the path from the root, this one included.
        edge: `PrefixKey.page` of its tokens.
        children: the nodes one page longer.
        uses: locks on this node, plus children whose own `uses` is not 0: so a node is in use
            exactly if it or something below it is locked.
        last_used: when it was last in use, by the tree's own count of operations.
        alive: False once it is evicted.
    """

    __slots__ = ("alive", "children", "depth", "edge", "last_used", "page", "parent", "uses")

    def __init__(self, page: int, edge: bytes, parent: Node | None) -> None:
        self.page, self.edge, self.parent = page, edge, parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[bytes, Node] = {}
        self.uses = 0
        self.last_used = 0
        self.alive = True

    def pages(self) -> tuple[int, ...]:
        """The pages from the root to here, in position order."""
        pages = []
        node = self
        while node.parent is not None:
            pages.append(node.page)
            node = node.parent
        return tuple(reversed(pages))


class RadixCache:
    """The tree. It owns the pages that were inserted until `evict` or `clear` gives them up."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node(0, b"", None)
        self.num_pages = 0
        self._num_used = 0
        self._time = 0
        self._leaves: list[tuple[int, int, Node]] = []  # candidates, by last use; some are stale

    @property
    def num_evictable(self) -> int:
        """Pages that no request uses."""
        return self.num_pages - self._num_used

    def match(self, key: PrefixKey, max_pages: int, hint: Node | None = None) -> Node:
        """The deepest node whose path is a prefix of `key`, at most `max_pages` deep.

        `hint` is an earlier answer for the same key: if it is still there, the walk goes on from
        it. Nothing is locked or marked as used.
        """
        node = self.root if hint is None or not hint.alive else hint
        while node.depth < max_pages:
            child = node.children.get(key.page(node.depth, self.page_size))
            if child is None:
                break
            node = child
        return node

    def insert(self, parent: Node, edge: bytes, page: int) -> Node:
        """Hand a page over to the tree, below `parent`; unused at first.

        Raises:
            ValueError: these tokens are cached there already.
        """
        if edge in parent.children:
            raise ValueError(f"Page {page} repeats what page {parent.children[edge].page} holds.")
        node = parent.children[edge] = Node(page, edge, parent)
        self.num_pages += 1
        self._became_idle(node)
        return node

    def lock(self, node: Node) -> None:
        """Keep a node and all above it until `unlock`. Locks count."""
        while True:
            node.uses += 1
            if node.uses > 1 or node.parent is None:
                return
            self._num_used += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Take one lock back."""
        while True:
            node.uses -= 1
            if node.uses or node.parent is None:
                return
            self._num_used -= 1
            self._became_idle(node)
            node = node.parent

    def num_idle_above(self, node: Node) -> int:
        """How many nodes on the path to `node` are in no request's use: locking it uses them."""
        count = 0
        while node.parent is not None and not node.uses:
            count += 1
            node = node.parent
        return count

    def evict(self, count: int) -> list[int]:
        """Forget the `count` least recently used pages (or all evictable ones); their numbers."""
        pages: list[int] = []
        while len(pages) < count and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            if not node.alive or node.uses or node.children or node.last_used != last_used:
                continue
            parent = node.parent
            assert parent is not None
            del parent.children[node.edge]
            node.alive = False
            self.num_pages -= 1
            pages.append(node.page)
            if parent.parent is not None and not parent.uses and not parent.children:
                self._push(parent)
        return pages

    def clear(self) -> list[int]:
        """Forget everything that no request uses; the pages."""
        return self.evict(self.num_evictable)

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, parents first; for integrity checks."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _became_idle(self, node: Node) -> None:
        self._time += 1
        node.last_used = self._time
        if not node.children:
            self._push(node)

    def _push(self, node: Node) -> None:
        heapq.heappush(self._leaves, (node.last_used, node.page, node))
        if len(self._leaves) > 2 * self.num_pages + 64:
            # Mostly stale: a leaf that is used again and again leaves an entry each time.
            self._leaves = [
                (n.last_used, n.page, n) for n in self.nodes() if not n.uses and not n.children
            ]
            heapq.heapify(self._leaves)
