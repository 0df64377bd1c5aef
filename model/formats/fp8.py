"""Block-FP8 checkpoints as DeepSeek-V3 publishes them: `weight` with its `weight_scale_inv`.

A quantised matrix is float8_e4m3fn values, each block of it multiplied by one float32 factor; the
last blocks may be partial. Tensors without factors (norms, router, embeddings) are as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from model.checkpoint import CheckpointError, Stack, View, hf_shapes, parameter_views
from model.config import ModelConfig
from model.formats import Checkpoint
from model.formats.lazy import Index, LazyMatrix

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE_SUFFIX = "_scale_inv"
NEVER_KEPT = ("attention.w_uk", "attention.w_uv")
"""The halves of kv_b_proj: queries are multiplied by them before the cache (absorption), and
they are small, so they are dequantised on load."""
_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def dequantized(values: np.ndarray) -> np.ndarray:
    """float8 to float32 through a table (three times as fast as a cast)."""
    return _VALUES[values.view(np.uint8)]


class Fp8Checkpoint:
    """A checkpoint of another kind whose quantised tensors are read as float32.

    Attributes:
        block: rows and columns of a block.
    """

    def __init__(self, base: Checkpoint, block: tuple[int, int]) -> None:
        """Pair weights with factors.

        Raises:
            CheckpointError: a factor array is missing, alone, or of a wrong shape.
        """
        self.block, self._base = block, base
        named = [name for name in base.shapes if name.endswith(SCALE_SUFFIX)]
        self._factors = {name.removesuffix(SCALE_SUFFIX): base.tensor(name) for name in named}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: shape for name, shape in base.shapes.items() if name not in set(named)
        }
        for name, factors in self._factors.items():
            shape = self.shapes.get(name)
            if shape is None:
                raise CheckpointError(f"The checkpoint has {name}{SCALE_SUFFIX} without {name}.")
            wanted = tuple(-(-n // b) for n, b in zip(shape, block, strict=False))
            if len(shape) != 2 or factors.shape != wanted:
                raise CheckpointError(
                    f"{name}{SCALE_SUFFIX} has shape {list(factors.shape)}; {name} "
                    f"{list(shape)} in blocks of {list(block)} needs {list(wanted)}."
                )
        for name in self.shapes:
            if base.tensor(name).dtype == FP8 and name not in self._factors:
                raise CheckpointError(f"{name} is FP8 but there is no {name}{SCALE_SUFFIX}.")

    def is_quantized(self, name: str) -> bool:
        return name in self._factors

    def tensor(self, name: str) -> Any:
        """The weights themselves; quantised ones as float32, computed slice by slice."""
        stored = self._base.tensor(name)
        if name not in self._factors:
            return stored

        def read(rows: Index, columns: Index) -> np.ndarray:
            # One index at a time: NumPy would pair two index arrays element by element.
            values = dequantized(stored[rows][:, columns])
            return np.multiply(values, self._factors_of(name, rows, columns), out=values)

        return LazyMatrix(stored.shape, np.dtype(np.float32), read)

    def stored(self, name: str) -> Any:
        """The tensor as the file has it."""
        return self._base.tensor(name)

    def scales(self, name: str) -> Any:
        """For a quantised tensor, the factor of every element; else the tensor (of no use)."""
        if name not in self._factors:
            return self._base.tensor(name)
        read = functools.partial(self._factors_of, name)
        return LazyMatrix(self.shapes[name], np.dtype(np.float32), read)

    def _factors_of(self, name: str, rows: Index, columns: Index) -> np.ndarray:
        blocks = (
            (np.arange(index.start, index.stop) if isinstance(index, slice) else index) // size
            for index, size in zip((rows, columns), self.block, strict=True)
        )
        return np.asarray(self._factors[name], np.float32)[np.ix_(*blocks)]


class BlockFactors:
    """Of a view that has the factor of every element, one per block."""

    def __init__(self, view: View, block: Sequence[int]) -> None:
        self._view, self._block = view, tuple(block)
        self.shape = tuple(-(-n // b) for n, b in zip(view.shape, block, strict=True))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        wanted = tuple(
            slice(s.start * b, min(s.stop * b, n), b)
            for s, b, n in zip(index, self._block, self._view.shape, strict=True)
        )
        return np.asarray(self._view[wanted])


def fp8_parameters(
    config: ModelConfig, is_quantized: Callable[[str], bool]
) -> dict[str, tuple[int, ...]]:
    """Parameters that can stay in FP8 (all their tensors are), each with its blocks' sizes.

    The sizes are those along each dimension of one layer's parameter, as far as the dimensions let
    them be: a block never reaches over the border between two heads, for instance.
    """
    if config.fp8_block is None:
        return {}
    shapes = hf_shapes(config)

    def probe(name: str) -> Any:
        if not is_quantized(name):
            return np.broadcast_to(np.int8(0), shapes[name])
        return LazyMatrix(shapes[name], FP8, _never_read)

    found = {}
    for path, views in parameter_views(config, probe).items():
        leaves = [leaf for view in views for leaf in _leaves(view)]
        kept = path.startswith("segments") and not path.endswith(NEVER_KEPT)
        if kept and all(isinstance(leaf, LazyMatrix) for leaf in leaves):
            found[path] = _granularity(views[0], config.fp8_block)
    return found


def is_quantized_by_habit(name: str) -> bool:
    """What published block-FP8 checkpoints quantise: the projections inside layers."""
    ends = ("_proj.weight", "kv_a_proj_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    return name.endswith(ends)


def _never_read(rows: Index, columns: Index) -> np.ndarray:
    raise AssertionError("a probe has no elements")


def _leaves(view: View) -> Iterator[View]:
    if isinstance(view, Stack):
        for part in view.parts:
            yield from _leaves(part)
    else:
        yield view


def _granularity(view: Any, block: tuple[int, int]) -> tuple[int, ...]:
    if isinstance(view, Stack):
        inner = _granularity(view.parts[0], block)
        return (*inner[: view.axis], 1, *inner[view.axis :])
    sizes: tuple[int, ...] = view.granularity(block)
    return sizes
