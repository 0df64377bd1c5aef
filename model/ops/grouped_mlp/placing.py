"""Rows to places of their experts, in Pallas (Triton), for kernels that cannot gather rows.

Every expert has blocks of places, as many as its pairs of (token, expert) need, one expert's behind
another's.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import largest_block, whole

PAIRS = 128
"""That one program of `place` finds places for."""
TOKENS = 16
"""Of a program of `spread`, some columns of them."""
COLUMNS = 256


class Blocks(NamedTuple):
    """What the blocks of places hold; at least `most_blocks` of them.

    Attributes:
        experts: i32 [blocks], whose a block is.
        rows: i32 [blocks], how many of its places are taken, the first ones.
        used: i32 [1], the number of blocks that have any.
    """

    experts: jax.Array
    rows: jax.Array
    used: jax.Array


def most_blocks(pairs: int, experts: int, rows: int) -> int:
    """That pairs can need, however they are spread over experts."""
    return -(-pairs // rows) + min(experts, pairs)


def counted_before(of_blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pairs of each block and expert, i32 [blocks, E], to those of all blocks before, i32
    [blocks, E], and of all blocks, i32 [E].

    By a product with a triangle, which is exact: a cumulative sum is dozens of kernels.
    """
    blocks = len(of_blocks)
    before = jnp.matmul(
        jnp.tril(jnp.ones((blocks, blocks), jnp.bfloat16), -1),
        of_blocks.astype(jnp.bfloat16),  # at most 128 pairs of a block
        preferred_element_type=jnp.float32,
    ).astype(jnp.int32)
    return before, before[-1] + of_blocks[-1]


def _place_kernel(
    ids_ref, before_ref, counts_ref, places_ref, experts_ref, rows_ref, used_ref, *, rows: int
):
    """Places of some pairs, and a part of the table of blocks.

    `before_ref`: pairs of each expert in the parts before [E]; `counts_ref`: in all of them [E].
    """
    part = pl.program_id(0)
    ids, counts = ids_ref[...], counts_ref[...]
    blocks = (counts + rows - 1) // rows
    ends = jnp.cumsum(blocks)
    first = (ends - blocks) * rows + before_ref[...]
    mine = ids[:, None] == lax.broadcasted_iota(jnp.int32, (PAIRS, counts.shape[0]), 1)
    mine = mine.astype(jnp.int32)
    inside = jnp.cumsum(mine, axis=0) - mine
    places = jnp.sum(mine * (first[None] + inside), axis=1)
    places_ref[...] = jnp.where(ids >= 0, places, -1)

    some = experts_ref.shape[0]  # blocks of the table, by each program
    block = part * some + lax.broadcasted_iota(jnp.int32, (some, 1), 0)
    number = block - (ends - blocks)[None]  # [some, E]: among those of the expert
    theirs = ((number >= 0) & (number < blocks[None])).astype(jnp.int32)
    experts_ref[...] = jnp.sum(theirs * lax.broadcasted_iota(jnp.int32, theirs.shape, 1), axis=1)
    rows_ref[...] = jnp.sum(theirs * jnp.minimum(counts[None] - number * rows, rows), axis=1)
    used_ref[...] = jnp.sum(blocks)[None]


def place(
    expert_ids: jax.Array, experts: int, rows: int, *, interpret: bool = False
) -> tuple[jax.Array, Blocks]:
    """A place for every pair, those of an expert side by side in the pairs' order.

    Args:
        expert_ids: i32 [T, K], -1 for absent.
        rows: of a block.

    Returns:
        i32 [T, K], -1 for absent.
    """
    pairs = expert_ids.size
    ids = jnp.pad(expert_ids.reshape(-1), (0, -pairs % PAIRS), constant_values=-1)
    parts, padded = len(ids) // PAIRS, 1 << (experts - 1).bit_length()
    of_parts = jnp.sum(
        ids.reshape(parts, 1, PAIRS) == jnp.arange(padded)[:, None], axis=-1, dtype=jnp.int32
    )
    before, counts = counted_before(of_parts)
    blocks = most_blocks(pairs, experts, rows)
    some = 1 << (-(-blocks // parts) - 1).bit_length()  # a power of two, as Triton wants
    places, *table = pl.pallas_call(
        functools.partial(_place_kernel, rows=rows),
        grid=(parts,),
        in_specs=[
            pl.BlockSpec((PAIRS,), lambda i: (i,)),
            pl.BlockSpec((None, padded), lambda i: (i, 0)),
            whole(counts.shape),
        ],
        out_specs=[*(pl.BlockSpec((n,), lambda i: (i,)) for n in (PAIRS, some, some)), whole((1,))],
        out_shape=[
            jax.ShapeDtypeStruct((n,), jnp.int32) for n in (len(ids), parts * some, parts * some, 1)
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="place_pairs",
    )(ids, before, counts)
    return places[:pairs].reshape(expert_ids.shape), Blocks(*table)


def _spread_kernel(x_ref, places_ref, out_ref, *, k: int, columns: int):
    """Copies of some columns of some tokens, one for each of their places."""
    row = pl.program_id(0) * TOKENS + lax.broadcasted_iota(jnp.int32, (TOKENS,), 0)
    column = pl.program_id(1) * columns + lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    inside = row < x_ref.shape[0]
    x = plgpu.load(x_ref.at[row[:, None], column], mask=inside[:, None], other=0.0)
    for i in range(k):
        place = plgpu.load(places_ref.at[row * k + i], mask=inside, other=-1)
        live = place >= 0
        # No two lanes name one place: where masks are emulated, a dead lane writes what it read.
        place = jnp.where(live, place, out_ref.shape[0] + row)
        plgpu.store(out_ref.at[place[:, None], column], x, mask=live[:, None])


def spread(x: jax.Array, places: jax.Array, size: int, *, interpret: bool = False) -> jax.Array:
    """[size, D] with every token's row at each of its places, undefined elsewhere.

    Args:
        x: [T, D]; places: i32 [T, K], -1 for absent.
    """
    (t, d), k = x.shape, places.shape[1]
    columns = largest_block(d, COLUMNS)
    return pl.pallas_call(
        functools.partial(_spread_kernel, k=k, columns=columns),
        grid=(-(-t // TOKENS), d // columns),
        in_specs=[whole(x.shape), whole((t * k,))],
        out_specs=whole((size, d)),
        out_shape=jax.ShapeDtypeStruct((size, d), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="spread_rows",
    )(x, places.reshape(-1))


def by_expert(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    experts: int,
    rows: int,
    mlp: Callable[[jax.Array, Blocks], jax.Array],
    *,
    interpret: bool = False,
) -> jax.Array:
    """Every token's weighted results, summed in float32: [T, D].

    Args:
        x: [T, D]; expert_ids: i32 [T, K], -1 for absent; weights: f32 [T, K].
        rows: of a block.
        mlp: of rows in their experts' places, [places, D] -> [places, D]; what stands in places
            that are not taken is undefined, and is not used.
    """
    places, blocks = place(expert_ids, experts, rows, interpret=interpret)
    size = most_blocks(expert_ids.size, experts, rows) * rows
    out = mlp(spread(x, places, size, interpret=interpret), blocks)

    def weighted(place: jax.Array, weight: jax.Array) -> jax.Array:
        """A result of each token, 0 without: what stands there is not to be used."""
        row = out.at[jnp.maximum(place, 0)].get(mode="promise_in_bounds").astype(jnp.float32)
        return jnp.where(place[:, None] >= 0, row * weight[:, None].astype(jnp.float32), 0)

    # Additions in a row fuse with what follows; a reduction is a kernel of its own.
    return functools.reduce(operator.add, map(weighted, places.T, weights.T)).astype(out.dtype)
