"""Small parts: parameters with logical axes, RMSNorm, SwiGLU, embedding and LM head.

A parameter names its dimensions in `axes` metadata ("heads", "kv_heads", "vocab", "mlp", "experts",
"expert_mlp", or None for a dimension that is never cut); `sharding` turns the names into specs.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from model.comm import Comm
from model.ops import norm
from model.ops.dense import MAX_ROWS, StackedWeight, matmul, sum_parts
from model.ops.grouped_mlp import hopper
from model.ops.kernels import HOPPER, XLA, Kernels
from model.quantization import AS_THEY_ARE, Contracted

Axis = Literal["heads", "kv_heads", "vocab", "mlp", "experts", "expert_mlp"] | None
INIT_STD = 0.02
"""Standard deviation of freshly drawn matrices: small enough that random routers route evenly."""


class ParamFactory:
    """Draws the parameters of a module tree; `lead` (stacked layers) precedes every shape."""

    def __init__(self, rngs: nnx.Rngs, dtype: jnp.dtype, lead: tuple[int, ...] = ()) -> None:
        self.rngs, self.dtype, self.lead = rngs, dtype, lead

    def stacked(self, num_layers: int) -> ParamFactory:
        """The same factory for parameters with a leading layer dimension."""
        return ParamFactory(self.rngs, self.dtype, (num_layers,))

    def _param(
        self, value: jax.Array, axes: tuple[Axis, ...], contracted: Contracted = AS_THEY_ARE
    ) -> nnx.Param:
        return nnx.Param(value, axes=(None,) * len(self.lead) + axes, contracted=contracted)

    def normal(
        self,
        shape: tuple[int, ...],
        axes: tuple[Axis, ...],
        dtype: jnp.dtype | None = None,
        contracted: Contracted = AS_THEY_ARE,
    ) -> nnx.Param:
        """N(0, INIT_STD). Args: contracted: `BlockFP8.contracted`, if it comes to stay in FP8."""
        value = INIT_STD * jax.random.normal(
            self.rngs.params(), self.lead + shape, dtype or self.dtype
        )
        return self._param(value, axes, contracted)

    def ones(self, *shape: int, axes: tuple[Axis, ...] = (None,)) -> nnx.Param:
        """Norm weights."""
        return self._param(jnp.ones((*self.lead, *shape), self.dtype), axes)

    def zeros_f32(self, size: int) -> nnx.Param:
        """A float32 vector, whatever the model's dtype (the router's correction bias)."""
        return self._param(jnp.zeros((*self.lead, size), jnp.float32), (None,))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last dimension, computed in float32 (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


def norm_rows(x: jax.Array, weight: Any, eps: float, kernels: Kernels = XLA) -> jax.Array:
    """`rms_norm` of rows [T, D] by a weight, an array or a layer of a stack."""
    if kernels.norm == "pallas" and isinstance(weight, StackedWeight):
        return norm.rms_norm(x, weight.stack, weight.layer, eps, interpret=kernels.interpret)
    return rms_norm(x, weight[...], eps)


def add_and_norm(
    x: jax.Array, parts: jax.Array, weight: Any, eps: float, kernels: Kernels, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """A residual and the norm behind it: x + scale * y, and `norm_rows` of that, both [T, D].

    Args:
        parts: [P, T, D], whose sum is y (see `model.ops.dense.matmul_parts`).
    """
    if kernels.norm == "pallas" and isinstance(weight, StackedWeight):
        return norm.add_and_norm(
            x, parts, weight.stack, weight.layer, eps, scale=scale, interpret=kernels.interpret
        )
    x = x + scaled(sum_parts(parts, x.dtype), scale)
    return x, rms_norm(x, weight[...], eps)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a constant, which most models do not have."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def gated_mlp(x: jax.Array, w1: Any, w2: Any, kernels: Kernels = XLA) -> jax.Array:
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202), [T, D] -> [T, D].

    Args:
        w1: [D, 2, F], gate and up; w2: [F, D], down; arrays or layers of stacks.
    """
    on_hopper = (  # where SwiGLU costs nothing
        kernels.grouped_mlp == "hopper"
        and len(x) > MAX_ROWS
        and len(x) % hopper.ALIGNMENT == 0
        and all(isinstance(w, StackedWeight) and isinstance(w.stack, jax.Array) for w in (w1, w2))
        and hopper.unsupported(HOPPER, x.dtype, x.shape[1], w2.stack.shape[1]) is None
    )
    if on_hopper:
        return hopper.gated_mlp(x, w1.stack, w2.stack, w1.layer, interpret=kernels.interpret)
    gate, up = jnp.moveaxis(matmul(x, w1, 1, kernels), 1, 0)
    return matmul(jax.nn.silu(gate) * up, w2, 1, kernels)


class MLP(nnx.Module):
    """`gated_mlp`. Gate and up share one matrix."""

    def __init__(self, make: ParamFactory, width: int, intermediate: int) -> None:
        self.gate_up = make.normal((width, 2, intermediate), (None, None, "mlp"), contracted=(1, 2))
        self.down = make.normal((intermediate, width), ("mlp", None), contracted=(1, 1))

    def __call__(self, x: jax.Array, kernels: Kernels = XLA) -> jax.Array:
        """[T, D] -> [T, D], a partial sum where the width is cut over devices."""
        return gated_mlp(x, self.gate_up.get_value(), self.down.get_value(), kernels)


class Embedding(nnx.Module):
    """Token embedding, its rows (and, tied, the LM head) cut over devices."""

    def __init__(self, make: ParamFactory, vocab: int, width: int) -> None:
        self.weight = make.normal((vocab, width), ("vocab", None))

    def __call__(self, tokens: jax.Array, comm: Comm) -> jax.Array:
        """i32 [T] -> [T, D]: each device looks up the rows it has, the sum is complete."""
        weight = self.weight[...]
        local = tokens - comm.first_row(weight.shape[0])
        here = (local >= 0) & (local < weight.shape[0])
        rows = weight[jnp.where(here, local, 0)]
        return comm.sum_heads(jnp.where(here[:, None], rows, 0))

    def logits(self, x: jax.Array, comm: Comm) -> jax.Array:
        """[B, D] -> f32 [B, padded vocabulary], for a model with tied embeddings."""
        local = jnp.einsum("bd,vd->bv", x, self.weight[...], preferred_element_type=jnp.float32)
        return comm.gather_vocab(local)


class LMHead(nnx.Module):
    """The output matrix, its columns cut over devices."""

    def __init__(self, make: ParamFactory, vocab: int, width: int) -> None:
        self.weight = make.normal((width, vocab), (None, "vocab"))

    def logits(self, x: jax.Array, comm: Comm) -> jax.Array:
        """[B, D] -> f32 [B, padded vocabulary]."""
        local = jnp.einsum("bd,dv->bv", x, self.weight[...], preferred_element_type=jnp.float32)
        return comm.gather_vocab(local)
