"""The experts' SwiGLU over tokens grouped by expert, in XLA: the definition and the CPU version.

`jax.lax.ragged_dot` computes every expert on every row where it has no kernel. Here the rows are
padded to blocks of one expert each, and a loop with a run-time trip count touches only the blocks
in use: padding rows and idle experts cost nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from model.quantization import BlockFP8, layer_weight


def _block_rows(pairs: int, experts: int) -> int:
    """Rows per block: about the mean load of an expert, between 8 and 128."""
    rows = 8
    while rows < 128 and rows * experts < pairs:
        rows *= 2
    return rows


def grouped_mlp(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    w1: jax.Array | BlockFP8,
    w2: jax.Array | BlockFP8,
    layer: jax.Array,
) -> jax.Array:
    """Weighted sum over each token's experts of down(silu(gate(x)) * up(x)).

    Args:
        x: [T, D].
        expert_ids: i32 [T, K], indices into this device's experts; -1 computes nothing.
        weights: f32 [T, K].
        w1: [L, E, D, 2, F], gate and up of all layers; w2: [L, E, F, D].
        layer: i32 scalar: the stacks are indexed here, so that no layer is ever sliced out.

    Returns:
        [T, D] in x's dtype, summed in float32.
    """
    (t, d), k = x.shape, expert_ids.shape[1]
    experts, f = w1.shape[1], w1.shape[-1]
    pairs = t * k
    rows = _block_rows(pairs, experts)
    num_blocks = -(-pairs // rows) + min(experts, pairs)

    flat = expert_ids.reshape(-1)  # [pairs]
    present = flat >= 0
    expert = jnp.where(present, flat, experts)  # absent pairs sort last
    counts = jnp.bincount(expert, length=experts + 1)[:experts]
    order = jnp.argsort(expert, stable=True)
    rank = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32))
    blocks = -(-counts // rows)  # [E]
    first_block = jnp.cumsum(blocks) - blocks
    first_pair = jnp.cumsum(counts) - counts
    mine = jnp.where(present, flat, 0)
    slot = first_block[mine] * rows + rank - first_pair[mine]
    slot = jnp.where(present, slot, num_blocks * rows)  # out of range: dropped on writing
    grouped = jnp.zeros((num_blocks * rows, d), x.dtype)
    grouped = grouped.at[slot].set(jnp.repeat(x, k, axis=0), mode="drop")
    grouped = grouped.reshape(num_blocks, rows, d)
    block_expert = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(num_blocks), side="right")
    block_expert = jnp.minimum(block_expert, experts - 1)

    def one_block(i: jax.Array, out: jax.Array) -> jax.Array:
        e = block_expert[i]
        gate_up = layer_weight(w1, layer, e).reshape(d, 2 * f)
        gate, up = jnp.split(grouped[i] @ gate_up, 2, axis=-1)
        return out.at[i].set((jax.nn.silu(gate) * up) @ layer_weight(w2, layer, e))

    out = lax.fori_loop(0, blocks.sum(), one_block, jnp.zeros_like(grouped))
    out = out.reshape(-1, d).at[slot].get(mode="fill", fill_value=0).reshape(t, k, d)
    return jnp.einsum("tkd,tk->td", out, weights.astype(jnp.float32)).astype(x.dtype)
