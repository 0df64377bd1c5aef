"""Scoring, choosing and weighing experts in one Pallas (Triton) kernel.

The definition is `model.moe.route` on logits of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import largest_block, whole
from model.quantization import layer_weight

MIN_BLOCK = 16
"""Triton multiplies no smaller matrices."""
ROWS, DEPTH = 64, 64
"""Rows and numbers of a row that one program multiplies at a time."""
FEW_ROWS = 4096
"""Up to so many rows XLA computes the logits and the kernel only chooses: on an H200, 512 rows of
2048 numbers take XLA 9 us and the kernel's own products 28 us, 8448 rows 65 us and 43 us."""

FEW_EXPERTS = 64
"""Up to so many (and without groups of them), the kernel's own products leave it registers to
choose in; with 256 experts in groups it takes minutes to compile."""


class Groups(NamedTuple):
    """Groups of experts of which only the best ones are chosen from, by a score of each group.

    `best`: how many of a group's best experts its score adds up.
    """

    number: int
    kept: int
    best: int


def unsupported(width: int) -> str | None:
    """Why the kernel cannot route rows of that width; None if it can."""
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


def _products(x_ref, w_ref, layer_ref, row: jax.Array, expert: jax.Array) -> jax.Array:
    """Logits [rows, columns] of some rows of x [T, D] and a layer of w [L, D, E]."""
    layer, (width, experts) = layer_ref[0], w_ref.shape[1:]
    depth = largest_block(width, DEPTH)

    def body(i, logits):
        across = i * depth + lax.broadcasted_iota(jnp.int32, (1, depth), 1)
        down = i * depth + lax.broadcasted_iota(jnp.int32, (depth, 1), 0)
        x = plgpu.load(x_ref.at[row, across], mask=row < x_ref.shape[0], other=0)
        w = plgpu.load(w_ref.at[layer, down, expert], mask=expert < experts, other=0)
        return logits + _dot(x, w)

    nothing = jnp.zeros((row.shape[0], expert.shape[1]), jnp.float32)
    return lax.fori_loop(0, width // depth, body, nothing)


def _best(choice: jax.Array, numbers: jax.Array, n: int) -> Iterator[tuple[jax.Array, ...]]:
    """The n largest of each row of choice [rows, columns], the first of equal ones first.

    Yields the largest [rows], its number [rows], and bool [rows, columns], where it stands.
    """
    for _ in range(n):
        best = jnp.max(choice, axis=1)
        first = jnp.min(jnp.where(choice == best[:, None], numbers, choice.shape[1]), axis=1)
        here = numbers == first[:, None]
        yield best, first, here
        choice = jnp.where(here, -jnp.inf, choice)


def _in_kept_groups(
    choice: jax.Array, numbers: jax.Array, experts: int, groups: Groups
) -> jax.Array:
    """choice [rows, columns], -inf outside of each row's best groups."""
    size = experts // groups.number
    inside = [(numbers >= g * size) & (numbers < (g + 1) * size) for g in range(groups.number)]
    scores = []
    for mine in inside:
        best = _best(jnp.where(mine, choice, -jnp.inf), numbers, groups.best)
        scores.append(functools.reduce(jnp.add, [score for score, _, _ in best]))
    kept = jnp.zeros(choice.shape, jnp.bool_)
    for g, mine in enumerate(inside):
        rank = jnp.zeros(choice.shape[:1], jnp.int32)
        for h, score in enumerate(scores):
            if h != g:  # of equal groups the first one is better
                better = score >= scores[g] if h < g else score > scores[g]
                rank += better.astype(jnp.int32)
        kept |= mine & (rank < groups.kept)[:, None]
    return jnp.where(kept, choice, -jnp.inf)


def _kernel(
    *refs,
    rows: int,
    columns: int,
    k: int,
    scoring: str,
    normalize: bool,
    scale: float,
    groups: Groups | None,
):
    """Logits [T, E], or what they are `_products` of, and bias [E] to ids and weights [T, k].

    The largest choice comes first.
    """
    *sources, bias_ref, ids_ref, weights_ref = refs
    experts = bias_ref.shape[0]
    row = pl.program_id(0) * rows + lax.broadcasted_iota(jnp.int32, (rows,), 0)
    live, numbers = row < ids_ref.shape[0], lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
    expert = lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    if len(sources) == 1:
        there = live[:, None] & (expert < experts)
        logits = plgpu.load(sources[0].at[row[:, None], expert], mask=there, other=0)
    else:
        logits = _products(*sources, row[:, None], expert)
    if scoring == "softmax":
        logits = jnp.where(numbers < experts, logits, -jnp.inf)
        scores = jnp.exp(logits - jnp.max(logits, axis=1)[:, None])
        scores = scores / jnp.sum(scores, axis=1)[:, None]
    else:
        scores = 1 / (1 + jnp.exp(-logits))
    bias = plgpu.load(bias_ref.at[expert], mask=expert < experts, other=0)
    choice = jnp.where(numbers < experts, scores + bias, -jnp.inf)
    if groups is not None:
        choice = _in_kept_groups(choice, numbers, experts, groups)
    ids, weights = [], []
    for _, chosen, here in _best(choice, numbers, k):
        ids.append(chosen)
        weights.append(jnp.sum(jnp.where(here, scores, 0.0), axis=1))
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
    groups: Groups | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Rows [T, D] to expert ids i32 [T, k] and weights f32 [T, k], see `model.moe.route`.

    stack is f32 [L, D, E], of which layer i32 is taken; bias f32 [E] or None. Without `groups` all
    experts may be chosen.
    """
    t, experts = x.shape[0], stack.shape[-1]
    if bias is None:
        bias = jnp.zeros(experts, jnp.float32)
    if t <= FEW_ROWS or experts > FEW_EXPERTS or groups is not None:
        operands = (x.astype(jnp.float32) @ layer_weight(stack, layer), bias)
        rows, warps = 1, 1  # a warp finds the best of a row fast, and there are warps enough
    else:
        operands = (x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32), bias)
        rows, warps = ROWS, 4

    return pl.pallas_call(
        functools.partial(
            _kernel,
            rows=rows,
            columns=max(MIN_BLOCK, 1 << (experts - 1).bit_length()),
            k=k,
            scoring=scoring,
            normalize=normalize,
            scale=scale,
            groups=groups,
        ),
        grid=(-(-t // rows),),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=[whole((t, k))] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((t, k), jnp.int32),
            jax.ShapeDtypeStruct((t, k), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name="route",
    )(*operands)
