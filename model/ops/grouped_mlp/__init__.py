"""The experts' SwiGLU over tokens grouped by expert.

`xla` defines it, `pallas` is for GPUs; for one kind of them `hopper` is for many rows, and
`hopper_fp8` for weights in FP8.
"""

from __future__ import annotations

import jax

from model.ops.grouped_mlp import hopper, hopper_fp8, pallas, xla
from model.ops.kernels import XLA, Kernels
from model.quantization import BlockFP8


def grouped_mlp(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array,
    w1: jax.Array | BlockFP8,
    w2: jax.Array | BlockFP8,
    layer: jax.Array,
    *,
    num_experts: int | None = None,
    kernels: Kernels = XLA,
) -> jax.Array:
    """Weighted sum over each token's experts of down(silu(gate(x)) * up(x)).

    Args:
        x: [T, D].
        expert_ids: i32 [T, K], indices into this device's experts; -1 computes nothing.
        weights: f32 [T, K].
        w1: [L, E, D, 2, F], gate and up of all layers; w2: [L, E, F, D].
        layer: i32 scalar: the stacks are indexed here, so that no layer is ever sliced out.
        num_experts: of all devices, among which tokens choose; by default those of this one.
        kernels: which implementation.

    Returns:
        [T, D] in x's dtype, summed in float32.
    """
    if kernels.grouped_mlp == "xla":
        return xla.grouped_mlp(x, expert_ids, weights, w1, w2, layer)
    on_hopper = kernels.grouped_mlp == "hopper"
    fp8 = [isinstance(w, BlockFP8) for w in (w1, w2)]
    if on_hopper and all(fp8):
        return hopper_fp8.grouped_mlp(
            *(x, expert_ids, weights, w1, w2, layer),
            num_experts=num_experts,
            interpret=kernels.interpret,
        )
    if on_hopper and any(fp8):
        raise TypeError("the experts' kernels for Hopper take FP8 weights only if all are")
    load = expert_ids.size / (num_experts or w1.shape[1])
    if on_hopper and load >= hopper.LEAST_LOAD:
        return hopper.grouped_mlp(
            x, expert_ids, weights, w1, w2, layer, interpret=kernels.interpret
        )
    return pallas.grouped_mlp(
        *(x, expert_ids, weights, w1, w2, layer),
        num_experts=num_experts,
        interpret=kernels.interpret,
    )
