"""The experts' SwiGLU of many rows on Hopper GPUs: Mosaic kernels for products, Triton around them.

The tensor memory accelerator copies boxes, no scattered rows. So every token's row is first spread
to places of its experts, which have blocks of `ROWS` of them, the last one partly used. Two
persistent kernels compute gate and up with SiLU, then down, a tile of a block and some columns
after the other. XLA sums every token's weighted results from their places, fused with what follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from model.ops import hopper_products
from model.ops.grouped_mlp import placing
from model.ops.hopper_products import LAYOUT, PART, WARPGROUPS, Ring, launched, share_work
from model.ops.kernels import lowered_once

ROWS = WARPGROUPS * PART
ALIGNMENT = 8
"""Rows of a tile in shared memory: copies begin at a multiple of it."""
HALF = 128
"""Columns of an accumulator; a tile has two: gate and up, or neighbours."""
DEPTH = 64
"""Contracted numbers of a step: 128 bytes, as wide as shared memory is swizzled."""
STAGES = 4
"""Steps in shared memory: 48 of its 227 KiB each, beside 32 for results."""
LEAST_LOAD = 64
"""Pairs of an expert, in the mean, from which these kernels are faster than those for all GPUs.

They win at 72 and lose at 36 (docs/performance.md)."""


def unsupported(
    capability: str | None, dtype: jax.typing.DTypeLike, width: int, inner: int
) -> str | None:
    """Why the kernels cannot take experts of [width, inner] on such a GPU; None if they can."""
    if reason := hopper_products.unsupported(capability, dtype):
        return reason
    if width % (2 * HALF) or inner % HALF:
        return (
            f"width {width} must be a multiple of {2 * HALF} and expert width {inner} one of {HALF}"
        )
    return None


def for_tiles(used: jax.Array, columns: int, steps: int, do: Callable[..., None]) -> None:
    """`do` a program's tiles: given their block, their column, and the number of their first step.

    Programs side by side take columns of one block: they share x, and experts are few.

    Args:
        used: blocks; columns: tiles of a block; steps: of a tile.
    """
    me, programs = lax.axis_index("processor"), hopper_products.PROCESSORS

    def body(i, carry):
        number = me + i * programs
        do(lax.div(number, columns), lax.rem(number, columns), i * steps)
        return carry

    lax.fori_loop(0, lax.div(used * columns - me + programs - 1, programs), body, None)


def of_halves(first: jax.Array, second: jax.Array, gated: bool) -> tuple[jax.Array, ...]:
    """What a tile's halves come to: SwiGLU of gate and up, or both."""
    return (first * (1 / (1 + jnp.exp(-first))) * second,) if gated else (first, second)


def _copy_tile(ring: Ring, x_ref, w_ref, step, first_row, first_depth, columns) -> None:
    """All steps of a tile, the first one being number `step` of the program's.

    `first_row` of x; `first_depth`, the expert's first row of w; `columns`, where halves begin.
    """

    def body(k, carry):
        slot, depth = lax.rem(step + k, STAGES), k * DEPTH
        mgpu.barrier_wait(ring.free.at[slot])
        x = x_ref.at[pl.ds(first_row, ROWS), pl.ds(depth, DEPTH)]
        mgpu.copy_gmem_to_smem(x, ring.x.at[slot], ring.ready.at[slot])
        for i, column in enumerate(columns):
            w = w_ref.at[pl.ds(first_depth + depth, DEPTH), pl.ds(column, HALF)]
            mgpu.copy_gmem_to_smem(w, ring.w.at[slot, i], ring.ready.at[slot])
        return carry

    lax.fori_loop(0, x_ref.shape[1] // DEPTH, body, None)


def _multiply_tile(ring: Ring, group, step, steps: int) -> tuple[jax.Array, jax.Array]:
    """f32 [PART, HALF] twice: a warpgroup's rows times both halves of the columns."""

    def product(first, second):
        def body(k, carry):
            slot = lax.rem(step + k, STAGES)
            mgpu.barrier_wait(ring.ready.at[slot])
            x = ring.x.at[slot, pl.ds(group * PART, PART)]
            mgpu.wgmma(first, x, ring.w.at[slot, 0])
            mgpu.wgmma(second, x, ring.w.at[slot, 1])
            mgpu.wgmma_wait(2)  # the products of the step before are done

            @pl.when(k > 0)
            def _() -> None:
                mgpu.barrier_arrive(ring.free.at[lax.rem(step + k - 1, STAGES)])

            return carry

        lax.fori_loop(0, steps, body, None)
        mgpu.wgmma_wait(0)
        mgpu.barrier_arrive(ring.free.at[lax.rem(step + steps - 1, STAGES)])
        return first[...], second[...]

    accumulator = mgpu.ACC((PART, HALF), jnp.float32)
    return pl.run_scoped(product, accumulator, accumulator)


def _skip_tile(ring: Ring, step, steps: int) -> None:
    def body(k, carry):
        slot = lax.rem(step + k, STAGES)
        mgpu.barrier_wait(ring.ready.at[slot])
        mgpu.barrier_arrive(ring.free.at[slot])
        return carry

    lax.fori_loop(0, steps, body, None)


def _tiles_kernel(
    x_ref,
    w_ref,
    expert_ref,
    rows_ref,
    used_ref,
    layer_ref,
    out_ref,
    x_smem,
    w_smem,
    out_smem,
    ready,
    free,
    *,
    experts: int,
    gated: bool,
) -> None:
    """Every program's tiles of out: x @ w, or with `gated` silu(x @ gate) * (x @ up).

    x [blocks * ROWS, depth], w [layers * experts * depth, columns], expert and rows i32 [blocks],
    out_smem [WARPGROUPS, PART, HALF].
    """
    ring = Ring(x_smem, w_smem, ready, free)
    depth, width = x_ref.shape[1], out_ref.shape[1]
    steps, halves = depth // DEPTH, 1 if gated else 2
    group = lax.axis_index("warpgroup")
    each_tile = functools.partial(for_tiles, used_ref[0], width // (halves * HALF), steps)

    def first_row(block) -> jax.Array:
        """Where rows are no multiple of a block, the last one begins earlier."""
        return pl.multiple_of(jnp.minimum(block * ROWS, x_ref.shape[0] - ROWS), ALIGNMENT)

    def copy(block, column, step) -> None:
        first_depth = (layer_ref[0] * experts + expert_ref[block]) * depth
        at = column * halves * HALF
        other = at + (width if gated else HALF)
        _copy_tile(ring, x_ref, w_ref, step, first_row(block), first_depth, (at, other))

    def compute(block, column, step) -> None:
        first, second = _multiply_tile(ring, group, step, steps)
        for i, result in enumerate(of_halves(first, second, gated)):
            mgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[group] = result.astype(out_smem.dtype)
            mgpu.commit_smem()
            rows = pl.ds(first_row(block) + group * PART, PART)
            at = pl.ds((column * halves + i) * HALF, HALF)
            mgpu.copy_smem_to_gmem(out_smem.at[group], out_ref.at[rows, at])

    def compute_or_skip(block, column, step) -> None:
        lax.cond(
            rows_ref[block] > group * PART,
            lambda: compute(block, column, step),
            lambda: _skip_tile(ring, step, steps),
        )

    share_work(ring, each_tile, copy, compute_or_skip)


def _tiles(
    x: jax.Array,
    w: jax.Array,
    blocks: placing.Blocks,
    layer: jax.Array,
    width: int,
    *,
    gated: bool,
    interpret: bool,
) -> jax.Array:
    """[blocks * ROWS, width], see `_tiles_kernel`; w is [L, E, depth, columns]."""
    return launched(
        functools.partial(_tiles_kernel, experts=w.shape[1], gated=gated),
        jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),
        [
            mgpu.SMEM((STAGES, ROWS, DEPTH), x.dtype, transforms=LAYOUT),
            mgpu.SMEM((STAGES, 2, DEPTH, HALF), x.dtype, transforms=LAYOUT),
            mgpu.SMEM((WARPGROUPS, PART, HALF), x.dtype, transforms=LAYOUT),
            mgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            mgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        ],
        "experts_gate_up" if gated else "experts_down",
        lanes=False,
        interpret=interpret,
    )(x, w.reshape(-1, w.shape[-1]), *blocks, layer)


@lowered_once("interpret")
def grouped_mlp(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    layer: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """See `model.ops.grouped_mlp.grouped_mlp`."""
    d, (layers, experts, _, _, f) = x.shape[1], w1.shape
    layer = jnp.reshape(layer, (1,)).astype(jnp.int32)
    product = functools.partial(_tiles, layer=layer, interpret=interpret)

    def mlp(grouped: jax.Array, blocks: placing.Blocks) -> jax.Array:
        gate_up = w1.reshape(layers, experts, d, 2 * f)
        inner = product(grouped, gate_up, blocks, width=f, gated=True)
        return product(inner, w2, blocks, width=d, gated=False)

    return placing.by_expert(x, expert_ids, weights, experts, ROWS, mlp, interpret=interpret)


@lowered_once("interpret")
def gated_mlp(
    x: jax.Array, w1: jax.Array, w2: jax.Array, layer: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """down(silu(gate(x)) * up(x)) for rows [T, D]: an expert that all choose.

    T is a multiple of ALIGNMENT and at least ROWS.

    Args:
        w1: [L, D, 2, F], gate and up of all layers; w2: [L, F, D]; layer: i32.
    """
    (t, d), (layers, _, _, f) = x.shape, w1.shape
    n = -(-t // ROWS)
    blocks = placing.Blocks(
        jnp.zeros(n, jnp.int32), jnp.full(n, ROWS, jnp.int32), jnp.full(1, n, jnp.int32)
    )
    layer = jnp.reshape(layer, (1,)).astype(jnp.int32)
    product = functools.partial(_tiles, blocks=blocks, layer=layer, interpret=interpret)
    inner = product(x, w1.reshape(layers, 1, d, 2 * f), width=f, gated=True)
    return product(inner, w2[:, None], width=d, gated=False)
