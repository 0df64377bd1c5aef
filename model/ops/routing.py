"""Scoring, choosing and weighing experts in one Pallas (Triton) kernel, two for few rows.

The definition is `model.moe.route` on logits of float32; the kernel does its case without groups of
experts.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import largest_block

MIN_BLOCK = 16
"""Triton multiplies no smaller matrices."""
DEPTH = 64
PARTS = 16
FEW_ROWS = 1024
"""Up to so many, one program would spend most of its time waiting for its share of the weights."""


def unsupported(width: int, groups: int) -> str | None:
    """Why the kernel cannot route rows of that width with so many groups; None if it can."""
    if groups > 1:
        return "experts are chosen by groups"
    if width % MIN_BLOCK:
        return f"the width {width} must be a multiple of {MIN_BLOCK}"
    return None


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w for w of float32, as exact as float32: with x of bfloat16, w is cut into three."""
    if x.dtype == jnp.float32:
        return jnp.dot(x, w, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)
    total = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
    for _ in range(3):
        part = w.astype(x.dtype)
        total += jnp.dot(x, part, preferred_element_type=jnp.float32)
        w = w - part.astype(jnp.float32)
    return total


def _product(x_ref, w_ref, layer, row, first, size: int, depth: int, columns: int) -> jax.Array:
    """Scores before anything else, f32 [rows, columns], over `size` numbers of x from `first` on.

    There may be fewer numbers, in whole blocks.
    """
    live, experts = row < x_ref.shape[0], w_ref.shape[2]
    expert = lax.broadcasted_iota(jnp.int32, (1, columns), 1)

    def body(i, logits):
        start = first + i * depth
        across = start + lax.broadcasted_iota(jnp.int32, (1, depth), 1)
        down = start + lax.broadcasted_iota(jnp.int32, (depth, 1), 0)
        x = plgpu.load(x_ref.at[row[:, None], across], mask=live[:, None], other=0)
        w = plgpu.load(w_ref.at[layer, down, expert], mask=expert < experts, other=0)
        return logits + _dot(x, w)

    blocks = jnp.minimum(size, x_ref.shape[1] - first) // depth
    return lax.fori_loop(0, blocks, body, jnp.zeros((row.shape[0], columns), jnp.float32))


def _part_kernel(x_ref, w_ref, layer_ref, out_ref, *, rows: int, depth: int, share: int):
    """Scores of a block of rows over one part of x, f32 [P, T, columns]."""
    part, columns = pl.program_id(1), out_ref.shape[2]
    row = pl.program_id(0) * rows + lax.broadcasted_iota(jnp.int32, (rows,), 0)
    logits = _product(x_ref, w_ref, layer_ref[0], row, part * share, share, depth, columns)
    at = lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    plgpu.store(out_ref.at[part, row[:, None], at], logits, mask=(row < x_ref.shape[0])[:, None])


def _route_kernel(
    *refs: Any,
    rows: int,
    depth: int,
    columns: int,
    experts: int,
    k: int,
    scoring: str,
    normalize: bool,
    scale: float,
):
    """Rows to ids and weights [T, k], the largest choice first.

    `refs`: x, weights and layer, or the parts of the scores, f32 [P, T, columns]; the bias; the ids
    and weights.
    """
    *source, bias_ref, ids_ref, weights_ref = refs
    row = pl.program_id(0) * rows + lax.broadcasted_iota(jnp.int32, (rows,), 0)
    live, numbers = row < ids_ref.shape[0], lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
    expert = lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    if len(source) == 1:
        part = lax.broadcasted_iota(jnp.int32, (source[0].shape[0], 1, 1), 0)
        at = part, row[None, :, None], expert[None]
        logits = jnp.sum(plgpu.load(source[0].at[at], mask=live[None, :, None], other=0), axis=0)
    else:
        x_ref, w_ref, layer_ref = source
        logits = _product(x_ref, w_ref, layer_ref[0], row, 0, x_ref.shape[1], depth, columns)
    if scoring == "softmax":
        logits = jnp.where(numbers < experts, logits, -jnp.inf)
        scores = jnp.exp(logits - jnp.max(logits, axis=1)[:, None])
        scores = scores / jnp.sum(scores, axis=1)[:, None]
    else:
        scores = 1 / (1 + jnp.exp(-logits))
    bias = plgpu.load(bias_ref.at[expert], mask=expert < experts, other=0)
    choice = jnp.where(numbers < experts, scores + bias, -jnp.inf)
    ids, weights = [], []
    for _ in range(k):
        best = jnp.max(choice, axis=1)[:, None]
        chosen = jnp.min(jnp.where(choice == best, numbers, columns), axis=1)
        here = numbers == chosen[:, None]
        ids.append(chosen)
        weights.append(jnp.sum(jnp.where(here, scores, 0.0), axis=1))
        choice = jnp.where(here, -jnp.inf, choice)
    factor = jnp.full(ids[0].shape, scale, jnp.float32)
    if normalize:
        factor = factor / (functools.reduce(jnp.add, weights) + 1e-20)
    for i in range(k):
        at = jnp.full((rows,), i, jnp.int32)
        plgpu.store(ids_ref.at[row, at], ids[i], mask=live)
        plgpu.store(weights_ref.at[row, at], weights[i] * factor, mask=live)


def route(
    x: jax.Array,
    stack: jax.Array,
    layer: jax.Array,
    bias: jax.Array | None,
    *,
    k: int,
    scoring: Literal["softmax", "sigmoid"],
    normalize: bool,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Rows [T, D] to expert ids i32 [T, k] and weights f32 [T, k], see `model.moe.route`.

    stack is f32 [L, D, E], of which layer i32 is taken; bias f32 [E] or None.
    """
    (t, width), experts = x.shape, stack.shape[-1]
    if bias is None:
        bias = jnp.zeros(experts, jnp.float32)
    columns = max(MIN_BLOCK, 1 << (experts - 1).bit_length())
    depth = largest_block(width, DEPTH)
    source = [x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32)]

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    def call(kernel, grid, operands, shapes, warps: int, name: str):
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[whole(a.shape) for a in operands],
            out_specs=[whole(a.shape) for a in shapes],
            out_shape=shapes,
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=3),
            interpret=interpret,
            name=name,
        )(*operands)

    rows, warps = 64, 4
    if t <= FEW_ROWS:  # x is cut over programs, and one program after it chooses for one row
        share = -(-width // depth // PARTS) * depth
        kernel = functools.partial(_part_kernel, rows=MIN_BLOCK, depth=depth, share=share)
        shape = jax.ShapeDtypeStruct((PARTS, t, columns), jnp.float32)
        grid = (-(-t // MIN_BLOCK), PARTS)
        source = call(kernel, grid, source, [shape], 4, "route_scores")
        rows, warps = 1, max(1, columns // 128)
    kernel = functools.partial(
        _route_kernel,
        rows=rows,
        depth=depth,
        columns=columns,
        experts=experts,
        k=k,
        scoring=scoring,
        normalize=normalize,
        scale=scale,
    )
    shapes = [jax.ShapeDtypeStruct((t, k), dtype) for dtype in (jnp.int32, jnp.float32)]
    return tuple(call(kernel, (-(-t // rows),), (*source, bias), shapes, warps, "route"))
