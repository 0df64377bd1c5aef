"""The experts' SwiGLU of many rows on Hopper GPUs: Mosaic kernels for products, Triton around them.

Copies by the tensor memory accelerator move boxes, not single rows. So each token's row is first
spread to its experts' places: every expert has blocks of `ROWS` places, the last of them partly
used. Two persistent kernels compute gate and up with SiLU, then down, a tile of one block's rows
and some columns at a time; the last sums every token's weighted results from their places.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from model.ops.grouped_mlp import placing

ROWS = 128
"""Of a tile: two warpgroups multiply half of them each, a third one copies."""
WARPGROUPS = 2
PART = ROWS // WARPGROUPS
COLUMNS = 256
"""Of a tile's product; half of them gate, half of them up in the first kernel."""
HALF = COLUMNS // 2
DEPTH = 64
"""Contracted numbers of a step: 128 bytes, as wide as shared memory is swizzled."""
STAGES = 4
"""Steps in shared memory: 48 KiB each of 227, beside 32 for results."""
PROCESSORS = 132
"""Of an H100 SXM or H200. With fewer, some programs wait for a place; with more, some idle."""
LAYOUT = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))


def _tile_kernel(
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
    """Tiles of out: x @ w of each block's expert, or with `gated` silu(x @ gate) * (x @ up).

    x [blocks * ROWS, depth], w [layers * experts * depth, columns], expert, rows i32 [blocks];
    x_smem [STAGES, ROWS, DEPTH], w_smem [STAGES, 2, DEPTH, HALF], out_smem [2, PART, HALF].
    """
    depth, wide = x_ref.shape[1], out_ref.shape[1]
    steps = depth // DEPTH
    columns = wide // (HALF if gated else COLUMNS)
    me, group = lax.axis_index("processor"), lax.axis_index("warpgroup")
    tiles = used_ref[0] * columns
    mine = lax.div(tiles - me + PROCESSORS - 1, PROCESSORS)

    def tile(i):
        number = me + i * PROCESSORS
        return lax.div(number, columns), lax.rem(number, columns)

    @pl.when(group == WARPGROUPS)
    def _() -> None:
        mgpu.set_max_registers(40, action="decrease")
        layer = layer_ref[0]

        def copy_tile(i, step):
            block, column = tile(i)
            first = (layer * experts + expert_ref[block]) * depth

            def copy_step(k, step):
                slot = lax.rem(step, STAGES)
                mgpu.barrier_wait(free.at[slot])
                x = x_ref.at[pl.ds(block * ROWS, ROWS), pl.ds(k * DEPTH, DEPTH)]
                mgpu.copy_gmem_to_smem(x, x_smem.at[slot], ready.at[slot])
                for half in range(2):
                    at = column * HALF + half * wide if gated else (2 * column + half) * HALF
                    w = w_ref.at[pl.ds(first + k * DEPTH, DEPTH), pl.ds(at, HALF)]
                    mgpu.copy_gmem_to_smem(w, w_smem.at[slot, half], ready.at[slot])
                return step + 1

            return lax.fori_loop(0, steps, copy_step, step)

        lax.fori_loop(0, mine, copy_tile, jnp.int32(0))
        for slot in range(STAGES):
            mgpu.barrier_wait(free.at[slot])

    @pl.when(group < WARPGROUPS)
    def _() -> None:
        mgpu.set_max_registers(232, action="increase")
        for slot in range(STAGES):
            mgpu.barrier_arrive(free.at[slot])
        part = pl.ds(group * PART, PART)

        def multiply(step, block, column):
            def product(first, second):
                def body(k, carry):
                    slot = lax.rem(step + k, STAGES)
                    mgpu.barrier_wait(ready.at[slot])
                    mgpu.wgmma(first, x_smem.at[slot, part], w_smem.at[slot, 0])
                    mgpu.wgmma(second, x_smem.at[slot, part], w_smem.at[slot, 1])
                    mgpu.wgmma_wait(2)  # the step before is done

                    @pl.when(k > 0)
                    def _() -> None:
                        mgpu.barrier_arrive(free.at[lax.rem(step + k - 1, STAGES)])

                    return carry

                lax.fori_loop(0, steps, body, None)
                mgpu.wgmma_wait(0)
                mgpu.barrier_arrive(free.at[lax.rem(step + steps - 1, STAGES)])
                return first[...], second[...]

            accumulator = mgpu.ACC((PART, HALF), jnp.float32)
            first, second = pl.run_scoped(product, accumulator, accumulator)
            if gated:
                halves = [first * (1 / (1 + jnp.exp(-first))) * second]
            else:
                halves = [first, second]
            for i, half in enumerate(halves):
                mgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[group] = half.astype(out_smem.dtype)
                mgpu.commit_smem()
                rows = pl.ds(block * ROWS + group * PART, PART)
                at = pl.ds((column * len(halves) + i) * HALF, HALF)
                mgpu.copy_smem_to_gmem(out_smem.at[group], out_ref.at[rows, at])

        def pass_over(step):
            def body(k, carry):
                slot = lax.rem(step + k, STAGES)
                mgpu.barrier_wait(ready.at[slot])
                mgpu.barrier_arrive(free.at[slot])
                return carry

            lax.fori_loop(0, steps, body, None)

        def compute_tile(i, step):
            block, column = tile(i)
            live = rows_ref[block] > group * PART
            lax.cond(live, lambda: multiply(step, block, column), lambda: pass_over(step))
            return step + steps

        lax.fori_loop(0, mine, compute_tile, jnp.int32(0))
        mgpu.wait_smem_to_gmem(0)


def _tiles(x, w, blocks: placing.Blocks, layer, width: int, *, experts, gated, interpret):
    """[x's rows, width]: the products of `_tile_kernel`."""
    return mgpu.kernel(
        functools.partial(_tile_kernel, experts=experts, gated=gated),
        out_type=jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),
        scratch_types=[
            mgpu.SMEM((STAGES, ROWS, DEPTH), x.dtype, transforms=LAYOUT),
            mgpu.SMEM((STAGES, 2, DEPTH, HALF), x.dtype, transforms=LAYOUT),
            mgpu.SMEM((WARPGROUPS, PART, HALF), x.dtype, transforms=LAYOUT),
            mgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            mgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        ],
        grid=(PROCESSORS,),
        grid_names=("processor",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=mgpu.CompilerParams(
            approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="experts_gate_up_hopper" if gated else "experts_down_hopper",
        interpret=mgpu.InterpretGPUParams() if interpret else None,
    )(x, w, blocks.experts, blocks.rows, blocks.used, layer)


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
    d, (experts, f) = x.shape[1], (w1.shape[1], w1.shape[-1])
    places, blocks = placing.place(expert_ids, experts, ROWS, interpret=interpret)
    layer = jnp.reshape(layer, (1,)).astype(jnp.int32)
    grouped = placing.spread(x, places, len(blocks.rows) * ROWS, interpret=interpret)
    product = functools.partial(_tiles, experts=experts, interpret=interpret)
    inner = product(grouped, w1.reshape(-1, 2 * f), blocks, layer, f, gated=True)
    out = product(inner, w2.reshape(-1, d), blocks, layer, d, gated=False)
    return placing.combine(out, places, weights, interpret=interpret)
