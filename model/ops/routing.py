"""Scoring, choosing and weighing experts in two Pallas (Triton) kernels.

The definition is `model.moe.route` on logits of float32.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from model.ops.kernels import MIN_BLOCK, covering_block, largest_block, lowered_once, whole

ROWS, COLUMNS, DEPTH = 64, 64, 64
"""Of a block of logits, and numbers of a row that are multiplied at a time."""
PROGRAMS = 264
"""Twice the multiprocessors of an H100: rows are cut into parts until so many work."""


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


def _logits_kernel(x_ref, w_ref, layer_ref, out_ref, *, rows: int, columns: int, depth: int):
    """A block of rows and experts of out [P, T, E], over this program's part of the width."""
    layer, (width, experts) = layer_ref[0], w_ref.shape[1:]
    part, share = pl.program_id(1), width // out_ref.shape[0]
    row = pl.program_id(2) * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    expert = pl.program_id(0) * columns + lax.broadcasted_iota(jnp.int32, (1, columns), 1)

    def body(i, total):
        first = part * share + i * depth
        across = first + lax.broadcasted_iota(jnp.int32, (1, depth), 1)
        down = first + lax.broadcasted_iota(jnp.int32, (depth, 1), 0)
        x = plgpu.load(x_ref.at[row, across], mask=row < x_ref.shape[0], other=0)
        w = plgpu.load(w_ref.at[layer, down, expert], mask=expert < experts, other=0)
        return total + _dot(x, w)

    total = lax.fori_loop(0, share // depth, body, jnp.zeros((rows, columns), jnp.float32))
    there = (row < x_ref.shape[0]) & (expert < experts)
    plgpu.store(out_ref.at[part, row, expert], total, mask=there)


def _logits(x: jax.Array, stack: jax.Array, layer: jax.Array, *, interpret: bool) -> jax.Array:
    """x @ stack[layer] in parts f32 [P, T, E] whose sum it is."""
    t, (width, experts) = x.shape[0], stack.shape[1:]
    rows, columns = covering_block(t, ROWS), covering_block(experts, COLUMNS)
    depth = largest_block(width, DEPTH)
    blocks, row_blocks = -(-experts // columns), -(-t // rows)
    parts = 1
    while 2 * parts * blocks * row_blocks <= PROGRAMS and width % (2 * parts * depth) == 0:
        parts *= 2
    operands = (x, stack, jnp.reshape(layer, (1,)).astype(jnp.int32))
    return pl.pallas_call(
        functools.partial(_logits_kernel, rows=rows, columns=columns, depth=depth),
        grid=(blocks, parts, row_blocks),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=whole((parts, t, experts)),
        out_shape=jax.ShapeDtypeStruct((parts, t, experts), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="router_logits",
    )(*operands)


def _best(choice: jax.Array, numbers: jax.Array, n: int) -> Iterator[tuple[jax.Array, ...]]:
    """The n largest of choice [columns], the first of equal ones first.

    Yields the largest, its number, and bool [columns], where it stands.
    """
    for _ in range(n):
        best = jnp.max(choice)
        first = jnp.min(jnp.where(choice == best, numbers, choice.shape[0]))
        here = numbers == first
        yield best, first, here
        choice = jnp.where(here, -jnp.inf, choice)


def _in_kept_groups(
    choice: jax.Array, numbers: jax.Array, experts: int, groups: Groups
) -> jax.Array:
    """choice [columns], -inf outside of the best groups."""
    size = experts // groups.number
    inside = [(numbers >= g * size) & (numbers < (g + 1) * size) for g in range(groups.number)]
    scores = []
    for mine in inside:
        best = _best(jnp.where(mine, choice, -jnp.inf), numbers, groups.best)
        scores.append(functools.reduce(operator.add, [score for score, _, _ in best]))
    kept = jnp.zeros(choice.shape, jnp.bool_)
    for g, mine in enumerate(inside):
        rank = jnp.int32(0)
        for h, score in enumerate(scores):
            if h != g:  # of equal groups the first one is better
                better = score >= scores[g] if h < g else score > scores[g]
                rank += better.astype(jnp.int32)
        kept |= mine & (rank < groups.kept)
    return jnp.where(kept, choice, -jnp.inf)


def _choose_kernel(
    logits_ref,
    valid_ref,
    *refs,
    columns: int,
    k: int,
    scoring: str,
    normalize: bool,
    scale: float,
    groups: Groups | None,
):
    """A row's logits [P, T, E], in parts, and bias [E], if any, to its ids and weights [T, k].

    The largest choice comes first.
    """
    *bias_refs, ids_ref, weights_ref = refs
    parts, _, experts = logits_ref.shape
    row = pl.program_id(0)
    numbers = lax.broadcasted_iota(jnp.int32, (columns,), 0)
    there = numbers < experts
    logits = jnp.zeros((columns,), jnp.float32)
    for part in range(parts):
        logits += plgpu.load(logits_ref.at[jnp.int32(part), row, numbers], mask=there, other=0)
    if scoring == "softmax":
        logits = jnp.where(there, logits, -jnp.inf)
        scores = jnp.exp(logits - jnp.max(logits))
        scores = scores / jnp.sum(scores)
    else:
        scores = 1 / (1 + jnp.exp(-logits))
    choice = scores
    for ref in bias_refs:
        choice += plgpu.load(ref.at[numbers], mask=there, other=0)
    choice = jnp.where(there, choice, -jnp.inf)
    if groups is not None:
        choice = _in_kept_groups(choice, numbers, experts, groups)
    ids, weights = [], []
    for _, chosen, here in _best(choice, numbers, k):
        ids.append(chosen)
        weights.append(jnp.sum(jnp.where(here, scores, 0.0)))
    factor = scale
    if normalize:
        factor = factor / (functools.reduce(operator.add, weights) + 1e-20)
    valid = valid_ref[row]
    for i in range(k):
        # Where no logit is a number none is the largest: such a row goes to no expert.
        ids_ref[row, i] = jnp.where(valid & (ids[i] < experts), ids[i], -1)
        weights_ref[row, i] = weights[i] * factor


@lowered_once("k", "scoring", "normalize", "scale", "groups", "interpret")
def route(
    x: jax.Array,
    stack: jax.Array,
    layer: jax.Array,
    bias: jax.Array | None,
    valid: jax.Array,
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
    experts may be chosen. Rows that are not valid, bool [T], or whose logits are NaN,
    get the ids -1.
    """
    t, experts = x.shape[0], stack.shape[-1]
    logits = _logits(x, stack, layer, interpret=interpret)
    operands = (logits, valid) if bias is None else (logits, valid, bias)
    return pl.pallas_call(
        functools.partial(
            _choose_kernel,
            columns=max(MIN_BLOCK, 1 << (experts - 1).bit_length()),
            k=k,
            scoring=scoring,
            normalize=normalize,
            scale=scale,
            groups=groups,
        ),
        grid=(t,),
        in_specs=[whole(a.shape) for a in operands],
        out_specs=[whole((t, k))] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((t, k), jnp.int32),
            jax.ShapeDtypeStruct((t, k), jnp.float32),
        ],
        # A warp finds the best of a row fast.
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="route",
    )(*operands)
