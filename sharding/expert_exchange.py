"""How tokens reach their experts on other devices and come back: two exchanges, both dropless.

`gather_exchange` lets every device see all tokens and keeps what its experts need;
`all_to_all_exchange` sends each token once to every device that holds one of its experts. Both run
inside `shard_map`, never under a branch that devices may take differently.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from model.comm import ExpertFn
from sharding.sums import Sums, add_in_order

ONE_ROUND_TOKENS = 256
"""Up to this many tokens a device, all_to_all has room for every token at every destination;
beyond, it takes rounds of about the mean load."""


def _packed(expert_ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Ids and weights as one f32 [T, 2K], to cross devices in one collective (ids are exact)."""
    return jnp.concatenate([expert_ids.astype(jnp.float32), weights], axis=-1)


def _unpacked(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    ids, weights = jnp.split(packed, 2, axis=-1)
    return ids.astype(jnp.int32), weights


def _to_local(expert_ids: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """Global ids to indices into experts `first` .. `first + count`; -1 for all others."""
    local = expert_ids - first
    return jnp.where((local >= 0) & (local < count), local, -1)


def gather_exchange(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    experts: ExpertFn,
    num_local_experts: int,
    shared: jax.Array | None,
    sums: Sums,
) -> jax.Array:
    """All-gather tokens over the dp slices, compute the local experts, reduce-scatter the sums.

    Arguments and result are those of `Comm.moe`. Every device adds the part of the sum that its
    experts (and its share of their width) contribute; over the whole mesh these parts are complete.
    """
    layout = sums.layout
    packed = _packed(expert_ids, weights)
    if layout.num_slices > 1:
        x = lax.all_gather(x, layout.attn_dp, tiled=True)
        packed = lax.all_gather(packed, layout.attn_dp, tiled=True)
    expert_ids, weights = _unpacked(packed)
    first = lax.axis_index(layout.moe_ep) * num_local_experts
    y = experts(x, _to_local(expert_ids, first, num_local_experts), weights)
    y = sums.scattered(y, layout.attn_dp)
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
) -> jax.Array:
    """Send each token once to every expert group that it needs, and add what comes back.

    Arguments and result are those of `Comm.moe`. The exchange wants distinct tokens over moe_ep
    and equal ones over moe_tp. Where an axis belongs to attn_tp and moe_ep, equal tokens are first
    split over it (and gathered at the end); where it belongs to attn_dp and moe_tp, distinct ones
    are first gathered over it (and reduce-scattered at the end).
    """
    layout = sums.layout
    split = tuple(axis for axis in layout.attn_tp if axis in layout.moe_ep)
    gather = tuple(axis for axis in layout.attn_dp if axis in layout.moe_tp)
    tokens, parts = x.shape[0], layout.size(split)
    packed = _packed(expert_ids, weights)
    if parts > 1:
        pad = -tokens % parts
        x = jnp.pad(x, ((0, pad), (0, 0)))
        packed = jnp.pad(packed, ((0, pad), (0, 0)), constant_values=-1.0)
        share, part = x.shape[0] // parts, lax.axis_index(split)
        x = lax.dynamic_slice_in_dim(x, part * share, share)
        packed = lax.dynamic_slice_in_dim(packed, part * share, share)
    if layout.size(gather) > 1:
        x = lax.all_gather(x, gather, tiled=True)
        packed = lax.all_gather(packed, gather, tiled=True)

    y = _rounds(x, *_unpacked(packed), experts, num_local_experts, sums)

    y = sums.scattered(y, gather)
    y = sums.whole(y, tuple(axis for axis in layout.moe_tp if axis not in gather))
    if parts > 1:
        y = lax.all_gather(y, split, tiled=True)[:tokens]
    return y if shared is None else y + sums.whole(shared, layout.attn_tp)


def _rounds(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    experts: ExpertFn,
    num_local_experts: int,
    sums: Sums,
) -> jax.Array:
    """Dispatch, compute and combine over moe_ep, in as many rounds as the fullest queue needs."""
    (tokens, width), k = x.shape, expert_ids.shape[1]
    layout = sums.layout
    groups, axes = layout.size(layout.moe_ep), layout.moe_ep
    group = jnp.arange(groups)
    destination = jnp.where(expert_ids >= 0, expert_ids // num_local_experts, -1)
    wanted = (destination[:, None, :] == group[None, :, None]).any(axis=-1)  # [T, groups]
    queue = jnp.cumsum(wanted, axis=0) - 1  # place of each token in each destination's queue
    if tokens <= ONE_ROUND_TOKENS:
        capacity = tokens
    else:
        capacity = min(tokens, max(ONE_ROUND_TOKENS, -(-tokens * k // groups)))

    def exchange(block: jax.Array) -> jax.Array:  # [groups, capacity, ...]: block i to group i
        return lax.all_to_all(block, axes, split_axis=0, concat_axis=0) if groups > 1 else block

    def one_round(r: jax.Array, y: jax.Array) -> jax.Array:
        slot = jnp.where(wanted & (queue // capacity == r), queue % capacity, capacity)
        sent = jnp.full((groups, capacity), tokens)  # index of the token in each slot
        sent = sent.at[group[None], slot].set(jnp.arange(tokens)[:, None], mode="drop")
        ids = expert_ids.at[sent].get(mode="fill", fill_value=-1)  # [groups, capacity, K]
        ids = _to_local(ids, (group * num_local_experts)[:, None, None], num_local_experts)
        w = weights.at[sent].get(mode="fill", fill_value=0)
        received = exchange(x.at[sent].get(mode="fill", fill_value=0))
        local_ids, w = _unpacked(exchange(_packed(ids, w)).reshape(-1, 2 * k))
        back = exchange(
            experts(received.reshape(-1, width), local_ids, w).reshape(groups, capacity, width)
        )
        if sums.in_order:
            return y.at[group[:, None], sent].set(back, mode="drop")
        return y.at[sent].add(back, mode="drop")

    # In order, each group's part is kept until all rounds are done: a token's parts may come back
    # in any round, depending on the others.
    y = jnp.zeros((groups, tokens, width) if sums.in_order else (tokens, width), x.dtype)
    if capacity >= tokens:
        y = one_round(jnp.int32(0), y)
    else:
        longest = lax.pmax(jnp.max(queue) + 1, layout.axis_names)  # every device loops alike
        y = lax.fori_loop(0, -(-longest // capacity), one_round, y)
    return add_in_order(y) if sums.in_order else y
