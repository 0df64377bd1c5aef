"""Which worker has cached which prefixes, as far as the router knows: a shadow of every cache.

Prefixes are chains of blocks (`router.request`). All shadows share one table from a block to the
set of its holders, so that one walk along a request's blocks matches it with every worker. Each
shadow is bounded at every moment and forgets what was not asked for the longest, the end of a
prefix before its beginning, as the engines' caches do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from router.request import BLOCK_CHARS, BLOCKS_OF_FIRST_SIZE, LONG_BLOCK_CHARS


class _Shadow:
    """One worker's blocks, least recently used first, and their characters."""

    __slots__ = ("blocks", "chars", "limit")

    def __init__(self, limit: int) -> None:
        self.blocks: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self.chars = 0
        self.limit = limit


class PrefixIndex:
    """The shadows of all workers; a worker is a small number, its place in a set of bits."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._shadows: dict[int, _Shadow] = {}

    def add(self, worker: int, limit: int) -> None:
        """A worker with an empty cache of so many characters."""
        self._shadows[worker] = _Shadow(limit)

    def remove(self, worker: int) -> None:
        """Forget a worker."""
        self.clear(worker)
        del self._shadows[worker]

    def clear(self, worker: int) -> None:
        """Its cache is empty now."""
        shadow = self._shadows[worker]
        while shadow.blocks:
            self._pop(worker, shadow)

    def resize(self, worker: int, limit: int) -> None:
        """Its cache holds so many characters."""
        shadow = self._shadows[worker]
        shadow.limit = limit
        self._fit(worker, shadow)

    def chars(self, worker: int) -> int:
        """Characters that are known to be cached there."""
        return self._shadows[worker].chars

    def num_blocks(self, worker: int) -> int:
        return len(self._shadows[worker].blocks)

    @property
    def size(self) -> int:
        """Different blocks that are remembered."""
        return len(self._holders)

    def match(self, blocks: Sequence[int], workers: int) -> dict[int, int]:
        """By worker, how many of the blocks it has from the first on; workers without are left out.

        Args:
            workers: set of bits, those to look at.
        """
        depths: dict[int, int] = {}
        alive, get = workers, self._holders.get
        for index, block in enumerate(blocks):
            holders = get(block, 0) & alive
            if holders != alive:
                if index:
                    _note(depths, alive & ~holders, index)
                if not holders:
                    return depths
                alive = holders
        if blocks:
            _note(depths, alive, len(blocks))
        return depths

    def insert(self, worker: int, blocks: Sequence[int], now: float) -> None:
        """The worker computes a prompt of these blocks and keeps it."""
        shadow = self._shadows[worker]
        mine, holders, bit = shadow.blocks, self._holders, 1 << worker
        # One pair for all blocks of a size: there may be millions.
        short, long = (BLOCK_CHARS, now), (LONG_BLOCK_CHARS, now)
        # From the end, so that a beginning is always younger than what goes on from it.
        for index in range(len(blocks) - 1, -1, -1):
            block = blocks[index]
            note = short if index < BLOCKS_OF_FIRST_SIZE else long
            if block in mine:
                mine[block] = note
                mine.move_to_end(block)
            else:
                mine[block] = note
                shadow.chars += note[0]
                holders[block] = holders.get(block, 0) | bit
                while shadow.chars > shadow.limit and shadow.blocks:
                    # Room is made at once, so that the bound holds for the longest prompt too. What
                    # goes first are the oldest prefixes, and then the end of this one.
                    self._pop(worker, shadow)

    def forget(self, worker: int, blocks: Sequence[int]) -> None:
        """The worker did not compute the end of a prompt after all."""
        shadow = self._shadows[worker]
        for block in blocks:
            note = shadow.blocks.pop(block, None)
            if note is not None:
                self._release(worker, shadow, block, note[0])

    def forget_oldest(self, worker: int, chars: int) -> None:
        """The cache holds less than was thought."""
        shadow = self._shadows[worker]
        target = shadow.chars - chars
        while shadow.blocks and shadow.chars > target:
            self._pop(worker, shadow)

    def forget_before(self, time: float) -> None:
        """Forget what was last asked for before a moment."""
        for worker, shadow in self._shadows.items():
            while shadow.blocks and next(iter(shadow.blocks.values()))[1] < time:
                self._pop(worker, shadow)

    def _fit(self, worker: int, shadow: _Shadow) -> None:
        while shadow.chars > shadow.limit and shadow.blocks:
            self._pop(worker, shadow)

    def _pop(self, worker: int, shadow: _Shadow) -> None:
        block, (size, _) = shadow.blocks.popitem(last=False)
        self._release(worker, shadow, block, size)

    def _release(self, worker: int, shadow: _Shadow, block: int, size: int) -> None:
        shadow.chars -= size
        left = self._holders[block] & ~(1 << worker)
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]


def _note(depths: dict[int, int], workers: int, depth: int) -> None:
    while workers:
        low = workers & -workers
        depths[low.bit_length() - 1] = depth
        workers ^= low
