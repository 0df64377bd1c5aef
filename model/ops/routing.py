"""Choosing and weighing experts from scores, in one Pallas (Triton) kernel.

The definition is `model.moe.route`; the kernel does its case without groups of experts.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import is_power_of_two

ROWS = 1
"""Tokens of one program: a warp finds the best of a row fast, and there are warps enough."""


def unsupported(experts: int, groups: int) -> str | None:
    """Why the kernel cannot route over so many experts and groups; None if it can."""
    if groups > 1:
        return "experts are chosen by groups"
    if not is_power_of_two(experts):
        return f"the number of experts, {experts}, must be a power of two"
    return None


def _kernel(
    logits_ref, bias_ref, ids_ref, weights_ref, *, k: int, scoring: str, normalize: bool, scale
):
    """Rows of logits [rows, E] to ids and weights [rows, k], the largest choice first."""
    logits = logits_ref[...]
    if scoring == "softmax":
        scores = jnp.exp(logits - jnp.max(logits, axis=1)[:, None])
        scores = scores / jnp.sum(scores, axis=1)[:, None]
    else:
        scores = 1 / (1 + jnp.exp(-logits))
    choice = scores + bias_ref[...][None]
    numbers = lax.broadcasted_iota(jnp.int32, choice.shape, 1)
    ids, weights = [], []
    for _ in range(k):
        best = jnp.max(choice, axis=1)[:, None]
        chosen = jnp.min(jnp.where(choice == best, numbers, choice.shape[1]), axis=1)
        here = numbers == chosen[:, None]
        ids.append(chosen)
        weights.append(jnp.sum(jnp.where(here, scores, 0.0), axis=1))
        choice = jnp.where(here, -jnp.inf, choice)
    factor = jnp.full(ids[0].shape, scale, jnp.float32)
    if normalize:
        factor = factor / (functools.reduce(jnp.add, weights) + 1e-20)
    for i in range(k):
        ids_ref[:, i] = ids[i]
        weights_ref[:, i] = weights[i] * factor


def route(
    logits: jax.Array,
    bias: jax.Array | None,
    *,
    k: int,
    scoring: Literal["softmax", "sigmoid"],
    normalize: bool,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Logits f32 [T, E] to expert ids i32 [T, k] and weights f32 [T, k], see `model.moe.route`."""
    t, e = logits.shape
    logits = jnp.pad(logits, ((0, -t % ROWS), (0, 0)))
    if bias is None:
        bias = jnp.zeros(e, jnp.float32)
    padded = logits.shape[0]
    ids, weights = pl.pallas_call(
        functools.partial(_kernel, k=k, scoring=scoring, normalize=normalize, scale=scale),
        grid=(padded // ROWS,),
        in_specs=[
            pl.BlockSpec((ROWS, e), lambda i: (i, 0)),
            pl.BlockSpec((e,), lambda i: (0,)),
        ],
        out_specs=[pl.BlockSpec((ROWS, k), lambda i: (i, 0))] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((padded, k), jnp.int32),
            jax.ShapeDtypeStruct((padded, k), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="route",
    )(logits, bias)
    return ids[:t], weights[:t]
