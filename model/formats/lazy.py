"""Matrices that are computed when they are read: dequantised weights, factors of blocks.

NumPy's own view operations move two index arrays of stride 0 (the row and the column of every
element), so a transposed, split and sliced matrix knows which rows and columns it needs, and only
those are computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Index = slice | np.ndarray
"""Rows or columns of a matrix: neighbours, or any."""
ReadBlock = Callable[[Index, Index], np.ndarray]
"""(rows, columns) -> the elements where they meet."""


class LazyMatrix:
    """A matrix behind a function, and every view of it that splits, reorders or cuts dimensions."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: np.dtype,
        read: ReadBlock,
        rows: np.ndarray | None = None,
    ) -> None:
        """A whole matrix.

        Args:
            read: computes a block.
            rows: a permutation: row i of this matrix is row rows[i] for `read`.
        """
        self._rows, self._columns = _indices(*shape)
        if rows is not None:
            self._rows = np.broadcast_to(rows[:, None], shape)
        self.dtype, self._read = dtype, read

    def _view(self, change: Callable[[np.ndarray], np.ndarray]) -> LazyMatrix:
        view = object.__new__(LazyMatrix)
        view.dtype, view._read = self.dtype, self._read
        view._rows, view._columns = change(self._rows), change(self._columns)
        return view

    @property
    def shape(self) -> tuple[int, ...]:
        return self._rows.shape

    @property
    def ndim(self) -> int:
        return self._rows.ndim

    @property
    def T(self) -> LazyMatrix:
        return self._view(lambda a: a.T)

    def reshape(self, *shape: Any) -> LazyMatrix:
        return self._view(lambda a: a.reshape(*shape))

    def transpose(self, *axes: Any) -> LazyMatrix:
        return self._view(lambda a: a.transpose(*axes))

    def __getitem__(self, index: Any) -> LazyMatrix:
        return self._view(lambda a: a[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Compute it."""
        if 0 in self.shape:
            return np.zeros(self.shape, dtype or self.dtype)
        is_row = [stride != 0 for stride in self._rows.strides]
        rows = self._rows[tuple(slice(None) if r else 0 for r in is_row)]
        columns = self._columns[tuple(0 if r else slice(None) for r in is_row)]
        block = self._read(_as_slice(rows.ravel()), _as_slice(columns.ravel()))
        block = block.reshape(rows.shape + columns.shape)
        order = [d for d, r in enumerate(is_row) if r] + [d for d, r in enumerate(is_row) if not r]
        values = block.transpose(np.argsort(order))
        return values if dtype is None else values.astype(dtype, copy=False)

    def granularity(self, block: Sequence[int]) -> tuple[int, ...]:
        """Per dimension, how many neighbours surely lie in one of the matrix's blocks.

        Only the dimension that runs through single rows (or columns) has more than one: blocks
        must not cross into the next index of the others.
        """
        sizes = [1] * self.ndim
        for indices, size in ((self._rows, block[0]), (self._columns, block[1])):
            steps = [s // indices.itemsize for s in indices.strides]
            steps = [s if n > 1 else 0 for s, n in zip(steps, self.shape, strict=True)]
            if 1 in steps:
                others = [s for s in steps if s > 1]
                sizes[steps.index(1)] = math.gcd(size, int(indices.flat[0]), *others)
        return tuple(sizes)


@functools.lru_cache(maxsize=256)
def _indices(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every element; matrices of one shape (experts) share them."""
    shape = (rows, columns)
    return (
        np.broadcast_to(np.arange(rows)[:, None], shape),
        np.broadcast_to(np.arange(columns)[None], shape),
    )


def _as_slice(indices: np.ndarray) -> Index:
    """Neighbours as a slice: reading them needs no copy."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first == len(indices) - 1 and (np.diff(indices) == 1).all():
        return slice(first, last + 1)
    return indices
