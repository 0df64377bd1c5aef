"""What the attention kernels for Hopper GPUs (Mosaic) share: two warpgroups that compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.ops.kernels import load_as
from model.ops.mla_attention.pages import dot

GROUPS, ROWS = 2, 64
"""Warpgroups that compute, and the rows that each has: those of one `wgmma`."""
LESS, MORE = 24, 240
"""Registers of a thread that copies, and of one that computes."""
SWIZZLE = 128
"""Bytes of a row that are swizzled in shared memory."""
COLUMNS = 64
"""Sizes are multiples of it: a row of a tile, in numbers of two bytes."""
ALIGNMENT = 8
"""Rows of a tile: copies begin at a multiple of it."""
Product = tuple[int, Any, Any, bool]
"""Which accumulator, its factors [ROWS, k] and [k, n], and whether the latter lies transposed."""


def tiles(*shape: int, dtype: Any, swizzle: int = SWIZZLE) -> plgpu.SMEM:
    """Shared memory for numbers of two bytes that products and copies use."""
    tile = ALIGNMENT, swizzle // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform(tile), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def filled(size: float, shape: tuple[int, ...]) -> jax.Array:
    """An array of numbers for each row [ROWS], or for what a `wgmma` gives [ROWS, n]."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, size, jnp.float32), layout)


def load(ref: Any, ndim: int, *, optimized: bool = False) -> jax.Array:
    """Numbers from memory, laid out as `filled` does."""
    layout = plgpu.Layout.WGMMA if ndim == 2 else plgpu.Layout.WGMMA.reduce(1)
    return load_as(ref, layout, optimized=optimized)


def across(of_rows: jax.Array, width: int) -> jax.Array:
    return lax.broadcast_in_dim(of_rows, (ROWS, width), [0])


def iota(shape: tuple[int, int], dimension: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)


def multiply(
    accumulators: Sequence[jax.Array],
    products: Sequence[Product],
    *,
    issued: Callable[[], None] = lambda: None,
    interpret: bool,
) -> list[jax.Array]:
    """Accumulators f32 plus products; `issued` is called as soon as the last one is under way.

    Interpret mode has neither accumulators that begin with something nor factors in registers.
    """
    if interpret:
        sums = list(accumulators)
        for i, a, b, transposed in products:
            sums[i] += dot(a[...], b[...], transposed=transposed)
        issued()
        return sums

    def issue(refs: Sequence[Any]) -> None:
        for i, a, b, transposed in products:
            plgpu.wgmma(refs[i], a, b.transpose((1, 0)) if transposed else b)
        issued()

    return pl.run_state(issue)([plgpu.ACC.init(a) for a in accumulators])
