"""What kernels for Hopper GPUs (Mosaic) that multiply by weights share: a ring of steps, FP8 tiles.

A weight in FP8 is the first factor of a product, which may come from registers, where a warpgroup
converts it on the way; it has 64 rows of that, which are columns of the weight. Tokens are the
second factor, from 16 of them on: so no more rows are multiplied than there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from model.ops.kernels import HOPPER, PROCESSORS, InterpretGPUParams, load_as

WARPGROUPS = 2
"""That multiply, each a part of a tile's rows; one more copies."""
PART = 64
HALF = WARPGROUPS * PART
"""Columns of an FP8 weight that the warpgroups share."""
DEPTH = 128
"""Contracted numbers of a step in FP8: as many bytes, as wide as shared memory is swizzled."""
COPYING_REGISTERS, MULTIPLYING_REGISTERS = 40, 232
"""Of a thread: 128 times the first and twice the second are the 64 Ki that there are."""
SHARED = 226 << 10
"""Bytes of shared memory that kernels fill; barriers need a few of the rest."""
LAYOUT = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))
"""Of numbers of two bytes in shared memory, of one byte, and of float32."""
FP8_LAYOUT = (mgpu.TilingTransform((8, DEPTH)), mgpu.SwizzleTransform(128))
F32_LAYOUT = (mgpu.TilingTransform((8, 32)), mgpu.SwizzleTransform(128))


def unsupported(capability: str | None, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these kernels cannot run on such a GPU or multiply such rows; None if they can."""
    if capability != HOPPER:
        return f"compute capability {capability} instead of {HOPPER}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"they multiply bfloat16, not {jnp.dtype(dtype)}"
    return None


class Ring(NamedTuple):
    """Steps on their way from the warpgroup that copies to those that multiply.

    Attributes:
        x: [stages, rows, depth].
        w: [stages, 2, depth, columns]; of weights in FP8 [stages, pieces of HALF columns, HALF,
            depth].
        ready, free: barriers [stages]: a step is there; all have multiplied it.
    """

    x: jax.Array
    w: jax.Array
    ready: jax.Array
    free: jax.Array


def share_work(
    ring: Ring,
    each_tile: Callable[[Callable[..., None]], None],
    copy: Callable[..., None],
    compute: Callable[..., None],
) -> None:
    """One warpgroup copies each tile, the others compute it."""
    group, stages = lax.axis_index("warpgroup"), ring.x.shape[0]

    @pl.when(group == WARPGROUPS)
    def _() -> None:
        mgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        each_tile(copy)
        for slot in range(stages):
            mgpu.barrier_wait(ring.free.at[slot])

    @pl.when(group < WARPGROUPS)
    def _() -> None:
        mgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        for slot in range(stages):
            mgpu.barrier_arrive(ring.free.at[slot])
        each_tile(compute)
        mgpu.wait_smem_to_gmem(0)


def launched(
    kernel: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    scratch: Sequence[Any],
    name: str,
    *,
    lanes: bool,
    interpret: bool,
) -> Callable[..., jax.Array]:
    """A kernel that runs once on every processor, a warpgroup that copies beside `WARPGROUPS`.

    Args: lanes: whether arrays say how they lie over lanes.
    """
    semantics = mgpu.LoweringSemantics.Lane if lanes else mgpu.LoweringSemantics.Warpgroup
    return mgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=scratch,
        grid=(PROCESSORS,),
        grid_names=("processor",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=mgpu.CompilerParams(approx_math=True, lowering_semantics=semantics),
        kernel_name=name,
        interpret=InterpretGPUParams() if interpret else None,
    )


class Steps(NamedTuple):
    """Contracted numbers of a tile, `DEPTH` by `DEPTH`.

    Attributes:
        number: of the first one, counting all of a program's.
        first, end: where they are among those of the whole product.
    """

    number: jax.Array
    first: jax.Array | int
    end: jax.Array | int

    def slot(self, k: jax.Array, stages: int) -> jax.Array:
        """Of step k in the ring."""
        return lax.rem(self.number + k - self.first, stages)


def copy_fp8_tile(ring: Ring, x_ref, w_ref, steps: Steps, first_row, columns) -> None:
    """Steps of a tile of x [rows, depth] by w [columns, depth].

    `first_row` of x; `columns`, where the tile's pieces begin in w.
    """
    stages, rows = ring.x.shape[:2]

    def body(k, carry):
        slot, depth = steps.slot(k, stages), pl.ds(k * DEPTH, DEPTH)
        mgpu.barrier_wait(ring.free.at[slot])
        ready = ring.ready.at[slot]
        mgpu.copy_gmem_to_smem(x_ref.at[pl.ds(first_row, rows), depth], ring.x.at[slot], ready)
        for i, column in enumerate(columns):
            w = w_ref.at[pl.ds(column, HALF), depth]
            mgpu.copy_gmem_to_smem(w, ring.w.at[slot, i], ready)
        return carry

    lax.fori_loop(steps.first, steps.end, body, None)


def _converted(w_ref: Any, factor: jax.Array | None, dtype: Any, interpret: bool) -> jax.Array:
    """A warpgroup's part of the weights of a step, as a product takes it from registers."""
    if interpret:
        w = w_ref[...]
    else:
        # A thread reads four numbers that are neighbours, and gives two of them to another one.
        w = load_as(w_ref, mgpu.Layout.WGMMA_UPCAST_2X)
        w = mgpu.layout_cast(w, mgpu.Layout.WGMMA)
    w = w.astype(jnp.float32)
    return (w if factor is None else w * factor).astype(dtype)


def multiply_fp8_tile(
    ring: Ring,
    scale_ref,
    group,
    steps: Steps,
    columns: Sequence[jax.Array],
    block: tuple[int, int],
    *,
    scaled_weights: bool,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """f32 [PART, rows] of each of the pieces' `columns`: a warpgroup's part of it times all rows.

    Args:
        scale_ref: f32 [columns / block[0], depth / block[1]].
        scaled_weights: factors go to weights, or else to products, which needs twice the registers
            for these, but is exact.
    """
    (stages, rows), dtype = ring.x.shape[:2], ring.x.dtype
    pieces = range(len(columns))

    def factors(k) -> list[jax.Array]:
        at = lax.div(k * DEPTH, jnp.int32(block[1]))
        return [scale_ref[lax.div(c + group * PART, jnp.int32(block[0])), at] for c in columns]

    def when_ready(k, multiply: Callable[[Any, list[jax.Array]], Any]) -> Any:
        """What `multiply` makes of step k, given its slot and factors."""
        slot, given = steps.slot(k, stages), factors(k)
        mgpu.barrier_wait(ring.ready.at[slot])
        result = multiply(slot, given)
        if interpret:  # its race detector wants a fence where the barrier is one
            mgpu.commit_smem()
        mgpu.barrier_arrive(ring.free.at[slot])
        return result

    def weights(slot, i: int, factor: jax.Array) -> jax.Array:
        w = ring.w.at[slot, i, pl.ds(group * PART, PART)]
        return _converted(w, factor if scaled_weights else None, dtype, interpret)

    def issue(sums, slot, given: list[jax.Array]) -> None:
        for i, total in enumerate(sums):
            mgpu.wgmma(total, weights(slot, i, given[i]), ring.x.at[slot].T)

    def products(slot, given: list[jax.Array]) -> list[jax.Array]:
        """Of one step; interpret mode has no factors in registers."""
        if interpret:
            x = ring.x[slot].T
            w = (weights(slot, i, given[i]) for i in pieces)
            return [jnp.dot(one, x, preferred_element_type=jnp.float32) for one in w]
        nothing = [mgpu.ACC.init(zero) for _ in pieces]
        return pl.run_state(lambda sums: issue(sums, slot, given))(nothing)

    def accumulate(*sums):
        def multiply(slot, given: list[jax.Array]) -> None:
            issue(sums, slot, given)
            mgpu.wgmma_wait(0)

        lax.fori_loop(steps.first, steps.end, lambda k, _: when_ready(k, multiply), None)
        return tuple(total[...] for total in sums)

    if scaled_weights and not interpret:
        return pl.run_scoped(accumulate, *(mgpu.ACC((PART, rows), jnp.float32) for _ in pieces))
    zero = zeros(rows, interpret)

    def add(k, sums):
        def multiply(slot, given: list[jax.Array]) -> tuple[jax.Array, ...]:
            parts = products(slot, given)
            if not scaled_weights:
                parts = [part * factor for part, factor in zip(parts, given, strict=True)]
            return tuple(total + part for total, part in zip(sums, parts, strict=True))

        return when_ready(k, multiply)

    return lax.fori_loop(steps.first, steps.end, add, tuple(zero for _ in pieces))


def zeros(rows: int, interpret: bool) -> jax.Array:
    """A result of `multiply_fp8_tile`."""
    zero = jnp.zeros((PART, rows), jnp.float32)
    return zero if interpret else mgpu.layout_cast(zero, mgpu.Layout.WGMMA)


def store_fp8_tile(result: jax.Array, out_smem, group, out_ref, *at, interpret: bool) -> None:
    """Begin to copy a result of `multiply_fp8_tile`, turned, to `out_ref.at[at]`.

    `out_smem` [WARPGROUPS, rows, PART].
    """
    mgpu.wait_smem_to_gmem(0, wait_read_only=True)
    result = result.astype(out_ref.dtype)
    if interpret:
        out_smem[group] = result.T
    else:
        out_smem.at[group].T[...] = mgpu.layout_cast(result, mgpu.Layout.WGMMA_TRANSPOSED)
    mgpu.commit_smem()
    mgpu.copy_smem_to_gmem(out_smem.at[group], out_ref.at[at])


def fp8_scratch(rows: int, pieces: int, dtype: Any, fp8: Any, out_dtype: Any) -> list[Any]:
    """x, w and out in shared memory, and barriers `ready` and `free`: as many stages as fit."""
    out_dtype = jnp.dtype(out_dtype)
    out_bytes = WARPGROUPS * rows * PART * out_dtype.itemsize
    stages = (SHARED - out_bytes) // (rows * DEPTH * 2 + pieces * HALF * DEPTH)
    out_layout = F32_LAYOUT if out_dtype == jnp.float32 else LAYOUT
    return [
        mgpu.SMEM((stages, rows, DEPTH), dtype, transforms=LAYOUT),
        mgpu.SMEM((stages, pieces, HALF, DEPTH), fp8, transforms=FP8_LAYOUT),
        mgpu.SMEM((WARPGROUPS, rows, PART), out_dtype, transforms=out_layout),
        mgpu.Barrier(num_arrivals=1 + pieces, num_barriers=stages),
        mgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    ]
