"""How tokens reach their experts on other devices and come back: two exchanges, both dropless.

`gather_exchange` lets every device see all tokens and keeps what its experts need;
`all_to_all_exchange` sends each token once to every device that holds one of its experts. Both run
inside `shard_map`, never under a branch that devices may take differently. Neither looks at the
shared experts before the combine, so that these may be computed while tokens travel.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from model.comm import ExpertFn
from sharding.dispatch_format import Dispatched, decode, encode, joined, parted
from sharding.exchange_choice import dispatch_rows
from sharding.layout import Axes
from sharding.sums import Sums, add_in_order

Compute = Callable[[Dispatched], jax.Array]
"""Tokens that arrived [T, ...] -> [T, D], what this device's experts make of them."""

COUNT_BLOCK = 128
"""Tokens that one product with a triangle counts."""


def gather_exchange(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    experts: ExpertFn,
    num_local_experts: int,
    shared: jax.Array | None,
    sums: Sums,
    *,
    fp8: bool = False,
) -> jax.Array:
    """All-gather tokens over the dp slices, compute the local experts, reduce-scatter the sums.

    Arguments and result are those of `Comm.moe`; `fp8`: tokens travel in float8. Every device adds
    the part of the sum that its experts (and its share of their width) contribute; over the whole
    mesh these parts are complete.
    """
    layout = sums.layout
    if layout.num_devices == 1:  # nothing travels
        y = experts(x, expert_ids, weights)
    else:
        compute = _local_experts(experts, num_local_experts, sums, expert_ids.shape[1], x.dtype)
        rows = encode(x, expert_ids, weights, fp8=fp8 and layout.num_slices > 1)
        y = _everywhere(rows, layout.attn_dp, compute, sums)
    if shared is not None:
        y = y + shared
    return sums.whole(y, layout.attn_tp)


def all_to_all_exchange(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    experts: ExpertFn,
    num_local_experts: int,
    shared: jax.Array | None,
    sums: Sums,
    *,
    fp8: bool = False,
) -> jax.Array:
    """Send each token once to every expert group that it needs, and add what comes back.

    Arguments and result are those of `Comm.moe`; `fp8`: tokens travel in float8. The exchange
    wants distinct tokens over moe_ep and equal ones over moe_tp. Where an axis belongs to attn_tp
    and moe_ep, equal tokens are first split over it (and gathered at the end); where it belongs to
    attn_dp and moe_tp, distinct ones are first gathered over it (and reduce-scattered at the end).
    """
    layout = sums.layout
    split, gather = layout.split, layout.gather
    tokens, parts = x.shape[0], layout.size(split)
    if parts > 1:
        pad = ((0, -tokens % parts), (0, 0))
        share, part = -(-tokens // parts), lax.axis_index(split)
        x, expert_ids, weights = (
            lax.dynamic_slice_in_dim(jnp.pad(a, pad, constant_values=fill), part * share, share)
            for a, fill in ((x, 0), (expert_ids, -1), (weights, 0))
        )
    rows = encode(x, expert_ids, weights, fp8=fp8)
    rows = _all_gather(rows, gather, layout.size(gather))

    k, sent, groups = expert_ids.shape[1], rows.data.shape[0], layout.size(layout.moe_ep)
    compute = _local_experts(experts, num_local_experts, sums, k, x.dtype)
    capacity = dispatch_rows(sent, k, groups)
    if capacity >= sent:  # all to everybody: nothing to sort out
        y = _everywhere(rows, layout.moe_ep, compute, sums)
    else:
        wanted = _wanted(rows, k, num_local_experts, groups)
        y = _rounds(rows, wanted, capacity, compute, sums, x.dtype)

    y = sums.scattered(y, gather)
    y = sums.whole(y, tuple(axis for axis in layout.moe_tp if axis not in gather))
    if parts > 1:
        y = lax.all_gather(y, split, tiled=True)[:tokens]
    return y if shared is None else y + sums.whole(shared, layout.attn_tp)


def _all_gather(rows: Dispatched, axes: Axes, size: int) -> Dispatched:
    # Two arrays, not one: on GPUs XLA makes one collective of neighbours, without copying them.
    if size == 1:
        return rows
    return Dispatched(*(lax.all_gather(part, axes, tiled=True) for part in rows))


def _local_experts(
    experts: ExpertFn, num_local: int, sums: Sums, k: int, dtype: jnp.dtype
) -> Compute:
    def compute(rows: Dispatched) -> jax.Array:
        x, ids, weights = decode(rows, k, dtype)
        ids = ids - lax.axis_index(sums.layout.moe_ep) * num_local
        return experts(x, jnp.where((ids >= 0) & (ids < num_local), ids, -1), weights)

    return compute


def _everywhere(rows: Dispatched, axes: Axes, compute: Compute, sums: Sums) -> jax.Array:
    """Send all tokens to all devices along `axes`, and each its own tokens' sums back."""
    return sums.scattered(compute(_all_gather(rows, axes, sums.layout.size(axes))), axes)


def _wanted(rows: Dispatched, k: int, num_local: int, groups: int) -> jax.Array:
    """bool [T, groups]: whether a group holds an expert of the token."""
    ids = rows.side[:, :k].astype(jnp.int32) - 1
    group = jnp.where(ids >= 0, ids // num_local, -1)
    return (group[:, None, :] == jnp.arange(groups)[None, :, None]).any(axis=-1)


def _count_before(wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bool [T, groups] -> i32 [T, groups], how many rows before each are set; i32 [groups], all.

    By products with triangles of ones, exact in f32 and two kernels; a cumulative sum is dozens.
    """
    tokens, groups = wanted.shape
    blocks = jnp.pad(wanted.astype(jnp.float32), ((0, -tokens % COUNT_BLOCK), (0, 0)))
    blocks = blocks.reshape(-1, COUNT_BLOCK, groups)

    def before(counts: jax.Array) -> jax.Array:  # [..., n, groups], along n
        n = counts.shape[-2]
        triangle = jnp.tril(jnp.ones((n, n), jnp.float32), -1)
        return jnp.einsum("ij,...jg->...ig", triangle, counts, precision=lax.Precision.HIGHEST)

    of_block = blocks.sum(axis=1)
    counts = before(blocks) + before(of_block)[:, None]
    counts = counts.reshape(-1, groups)[:tokens]
    return counts.astype(jnp.int32), of_block.sum(axis=0).astype(jnp.int32)


def _rounds(
    rows: Dispatched,
    wanted: jax.Array,
    capacity: int,
    compute: Compute,
    sums: Sums,
    dtype: jnp.dtype,
) -> jax.Array:
    """Dispatch, compute and combine over moe_ep, in as many rounds as the fullest queue needs.

    Args:
        wanted: bool [T, groups], see `_wanted`.
        capacity: rows of a round for each group.
    """
    tokens, width = rows.data.shape
    axes, groups = sums.layout.moe_ep, wanted.shape[1]
    group = jnp.arange(groups)
    queue, in_all = _count_before(wanted)  # place of each token in each group's queue
    words = joined(rows)

    def exchange(block: jax.Array) -> jax.Array:  # [groups, capacity, n]: block i to group i
        return lax.all_to_all(block, axes, split_axis=0, concat_axis=0)

    def one_round(r: int | jax.Array, y: jax.Array) -> jax.Array:
        place = queue - r * capacity
        here = wanted & (place >= 0) & (place < capacity)
        sent = jnp.full((groups, capacity), tokens)  # index of the token in each place
        sent = sent.at[group, jnp.where(here, place, capacity)].set(
            jnp.arange(tokens)[:, None], mode="drop"
        )
        received = exchange(words.at[sent].get(mode="fill", fill_value=0))
        arrived = parted(received.reshape(-1, words.shape[1]), width, rows.data.dtype)
        back = exchange(compute(arrived).reshape(groups, capacity, width))
        # A token finds its parts where it was put; a scatter would add them atomically.
        at = jnp.where(here, place, 0)
        parts = [
            jnp.where(here[:, g, None], back[g].at[at[:, g]].get(mode="promise_in_bounds"), 0)
            for g in range(groups)
        ]
        if sums.in_order:
            return jnp.where(here.T[..., None], jnp.stack(parts), y)
        added = functools.reduce(operator.add, (part.astype(jnp.float32) for part in parts))
        return (y.astype(jnp.float32) + added).astype(dtype)

    # In order, each group's part is kept until all rounds are done: a token's parts may come back
    # in any round, depending on the others.
    y = jnp.zeros((groups, tokens, width) if sums.in_order else (tokens, width), dtype)
    # The first round is not part of the loop: most often it is the only one.
    y = one_round(0, y)
    longest = lax.pmax(in_all.max(), axes)  # who exchanges with each other loops alike
    y = lax.fori_loop(1, -(-longest // capacity), one_round, y)
    return add_in_order(y) if sums.in_order else y
