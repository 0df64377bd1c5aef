"""Mixture of experts: the router of DeepSeek-V2 and V3, the routed and the shared experts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from model.comm import Comm
from model.config import ModelConfig
from model.layers import MLP, ParamFactory
from model.ops import routing
from model.ops.dense import as_stacked
from model.ops.grouped_mlp import grouped_mlp
from model.ops.kernels import XLA, Kernels


class Router(nnx.Module):
    """Scores experts in float32. Every device has the whole router."""

    def __init__(self, make: ParamFactory, config: ModelConfig) -> None:
        self.weight = make.normal(
            (config.hidden_size, config.num_experts), (None, None), dtype=jnp.float32
        )
        if config.router_bias:
            self.bias = make.zeros_f32(config.num_experts)
        self.config = config

    def __call__(
        self, x: jax.Array, valid: jax.Array | None = None, kernels: Kernels = XLA
    ) -> tuple[jax.Array, jax.Array]:
        """[T, D] -> (expert ids i32 [T, K], weights f32 [T, K]).

        Rows that are not valid, bool [T], go to no expert: their ids are -1. None: all are.
        """
        if valid is None:
            valid = jnp.ones(len(x), bool)
        c = self.config
        bias = self.bias[...] if c.router_bias else None
        if kernels.routing == "xla":
            ids, weights = route(x.astype(jnp.float32) @ self.weight[...], bias, c)
            return jnp.where(valid[:, None], ids, -1), weights
        if reason := routing.unsupported(c.hidden_size):
            raise ValueError(f"The routing kernel cannot route this model: {reason}.")
        weight = as_stacked(self.weight.get_value())
        return routing.route(
            x,
            weight.stack,
            weight.layer,
            bias,
            valid,
            k=c.num_experts_per_token,
            scoring=c.scoring,
            normalize=c.normalize_weights,
            scale=c.routed_scaling,
            groups=routing_groups(c),
            interpret=kernels.interpret,
        )


def routing_groups(config: ModelConfig) -> routing.Groups | None:
    """The groups of experts that a model chooses from, as the kernel takes them."""
    if config.num_groups == 1:
        return None
    best = 1 if config.group_score == "max" else 2
    return routing.Groups(config.num_groups, config.topk_groups, best)


def route(
    logits: jax.Array, bias: jax.Array | None, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Choose and weigh experts.

    DeepSeek-V2 (arXiv:2405.04434, section 2.2): softmax scores, optionally only inside the groups
    with the best single expert. DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): sigmoid scores; the
    correction bias takes part in choosing groups (sum of their two best) and experts, never in the
    weights. Experts outside the chosen groups are excluded with -inf, so that a negative biased
    score inside still wins.

    Args:
        logits: f32 [T, E]; bias: f32 [E] or None.

    Returns:
        expert ids i32 [T, K] and weights f32 [T, K].
    """
    scores = jax.nn.softmax(logits) if config.scoring == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if config.num_groups > 1:
        t = choice.shape[0]
        grouped = choice.reshape(t, config.num_groups, -1)
        if config.group_score == "max":
            group_score = grouped.max(axis=-1)
        else:
            group_score = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
        _, groups = jax.lax.top_k(group_score, config.topk_groups)
        kept = jax.nn.one_hot(groups, config.num_groups, dtype=bool).any(axis=1)  # [T, groups]
        choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(t, -1)
    _, ids = jax.lax.top_k(choice, config.num_experts_per_token)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if config.normalize_weights:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return ids.astype(jnp.int32), weights * config.routed_scaling


class Experts(nnx.Module):
    """The routed experts of a whole segment, [L, E, ...]; never sliced by layer.

    Experts are spread over devices, and one expert's width may be cut as well.
    """

    def __init__(self, make: ParamFactory, width: int, num_experts: int, intermediate: int) -> None:
        self.w1 = make.normal(
            (num_experts, width, 2, intermediate),
            ("experts", None, None, "expert_mlp"),
            contracted=(1, 2),
        )
        self.w2 = make.normal(
            (num_experts, intermediate, width), ("experts", "expert_mlp", None), contracted=(1, 1)
        )


class MoE(nnx.Module):
    """Router and shared experts of a layer; the routed experts are handed in."""

    def __init__(self, make: ParamFactory, config: ModelConfig, shared_intermediate: int) -> None:
        self.router = Router(make, config)
        if config.num_shared_experts:
            self.shared = MLP(make, config.hidden_size, shared_intermediate)
        self.config = config

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        experts: Experts,
        layer: jax.Array,
        comm: Comm,
        kernels: Kernels,
    ) -> tuple[jax.Array, jax.Array]:
        """Route, exchange, compute.

        Args:
            x: [T, D]; valid: bool [T], padding rows go to no expert.
            experts: of the whole segment; layer: i32, index in the segment.

        Returns:
            [T, D], complete, and i32 [E]: how many of this slice's tokens each expert got.
        """
        ids, weights = self.router(x, valid, kernels)
        counts = jnp.bincount(
            jnp.where(ids < 0, self.config.num_experts, ids).reshape(-1),
            length=self.config.num_experts + 1,
        )[:-1]
        # The stacks themselves (not `[...]`): FP8 ones are dequantised expert by expert.
        w1, w2 = experts.w1.get_value(), experts.w2.get_value()
        compute = functools.partial(
            grouped_mlp,
            w1=w1,
            w2=w2,
            layer=layer,
            num_experts=self.config.num_experts,
            kernels=kernels,
        )
        # No input of the exchange until the combine: computed while tokens travel.
        shared = self.shared(x, kernels) if self.config.num_shared_experts else None
        return comm.moe(x, ids, weights, compute, w1.shape[1], shared), counts
