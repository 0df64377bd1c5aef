"""Token shards on disk and rows in memory: how the corpus is stored, and how documents of any
length become equal rows that begin with a document and hold no padding."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

POOL = 256
"""Documents among which packing looks for one that fits."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Documents end to end: tokens u16 [N], and starts i64 [documents + 1]."""

    tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[self.starts[i] : self.starts[i + 1]]

    @classmethod
    def join(cls, documents: Iterable[np.ndarray]) -> Shard:
        parts = list(documents)
        starts = np.concatenate([[0], np.cumsum([len(p) for p in parts], dtype=np.int64)])
        return cls(np.concatenate([np.zeros(0, np.uint16), *parts]), starts)

    @classmethod
    def merge(cls, shards: Iterable[Shard]) -> Shard:
        """Shards behind one another."""
        tokens, starts, end = [np.zeros(0, np.uint16)], [np.zeros(1, np.int64)], 0
        for shard in shards:
            tokens.append(shard.tokens)
            starts.append(shard.starts[1:] + end)
            end += len(shard.tokens)
        return cls(np.concatenate(tokens), np.concatenate(starts))

    def save(self, folder: Path, name: str) -> None:
        np.save(folder / f"{name}.tokens.npy", self.tokens)
        np.save(folder / f"{name}.starts.npy", self.starts)

    @classmethod
    def load(cls, folder: Path, name: str) -> Shard:
        return cls(np.load(folder / f"{name}.tokens.npy"), np.load(folder / f"{name}.starts.npy"))


def mixture(world: Shard, prose: Shard, share: float) -> tuple[Shard, np.ndarray]:
    """World and prose as one shard, and the documents of one pass: i64 ids, prose repeated (or cut
    short) until it makes up `share` of the tokens."""
    both = Shard.merge([world, prose])
    ids = np.arange(len(world))
    if len(prose) and share > 0:
        wanted = share / (1 - share) * len(world.tokens) / len(prose.tokens) * len(prose)
        ids = np.concatenate([ids, len(world) + np.arange(round(wanted)) % len(prose)])
    return both, ids


def pack_rows(shard: Shard, ids: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Rows u16 [R, length] of the documents `ids` in random order.

    A row is filled with documents that fit; what is left at its end takes the beginning of a
    further document (which comes whole elsewhere). Longer documents are cut off at `length`.
    """
    rng = np.random.default_rng(seed)
    sizes = np.minimum(np.diff(shard.starts), length)
    order = iter(rng.permutation(ids).tolist())
    draws = iter(rng.integers(0, POOL, 4 * len(ids) + 8 * POOL).tolist())
    pool: list[tuple[int, int]] = []  # (size, document), sorted
    for _, i in zip(range(POOL), order, strict=False):
        bisect.insort(pool, (int(sizes[i]), i))
    rows: list[np.ndarray] = []
    while pool:
        row, free = np.empty(length, np.uint16), length
        while free and pool:
            at = next(draws) % len(pool)
            if pool[at][0] > free:
                at = bisect.bisect_right(pool, (free, len(shard))) - 1
            if at < 0:
                break
            size, i = pool.pop(at)
            row[length - free :][:size] = shard[i][:size]
            free -= size
            if (fresh := next(order, None)) is not None:
                bisect.insort(pool, (int(sizes[fresh]), fresh))
        if free:  # the beginning of a document that comes again, or of one long enough
            if not pool:
                break
            filler = shard[pool[-1][1]][:free]
            row[length - free :][: len(filler)] = filler
            if len(filler) < free:
                break
        rows.append(row)
    return np.stack(rows) if rows else np.empty((0, length), np.uint16)
