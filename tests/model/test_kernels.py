"""Every kernel against its XLA twin on fresh random inputs, interpreted; and lowered for CUDA.

The twin's own definition is tested in test_ops.py. Memory that a kernel must not look at is NaN.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.batch import Prefixes, find_prefixes
from model.config import ModelConfig
from model.layers import add_and_norm, rms_norm
from model.moe import route, routing_groups
from model.ops import dense, matrices, norm, routing
from model.ops.dense import StackedWeight, matmul, matmul_parts
from model.ops.grouped_mlp import grouped_mlp
from model.ops.grouped_mlp import pallas as grouped_mlp_kernels
from model.ops.grouped_mlp.pallas import block_rows, sort_pairs, tiles
from model.ops.kernels import XLA
from model.ops.matrices import Matrices
from model.ops.matrices import unsupported as fp8_unsupported
from model.ops.mla_attention import (
    decode,
    decode_attention,
    decode_heads,
    extend,
    extend_attention,
    hopper,
)
from model.ops.mla_attention.heads import per_head
from model.ops.mla_attention.inputs import finish_inputs
from model.ops.routing import unsupported as routing_unsupported
from model.quantization import AS_THEY_ARE, FP8
from model.rope import apply_rope
from tests.fixtures import DATA
from tests.fp8 import abstract_fp8, quantised
from tests.harness import KERNELS, lowered_for_cuda, needs_interpreter
from tests.paged import LAYERS, no_nan, pool_and_tables

LATENT, ROPE, NOPE, VALUE = 32, 16, 16, 32
SIZES = (LATENT, ROPE, NOPE, VALUE)
SCALE = 0.21


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("heads", "page_size", "kv_dtype"),
    [
        (16, 16, "float32"),
        (3, 64, "float32"),
        (40, 16, "float32"),
        (128, 32, "float32"),
        (128, 16, "bfloat16"),
        (16, 32, "float8_e4m3fn"),
    ],
)
def test_decode_attention_equals_its_twin(rng, heads, page_size, kv_dtype, splits):
    lengths = [1, 16, 17, 0, 129, 300]
    kv, tables = pool_and_tables(rng, lengths, page_size, 20, kv_dtype, LATENT + ROPE)
    dtype, bound = (jnp.bfloat16, 0.05) if kv_dtype == "bfloat16" else (jnp.float32, 3e-5)
    q_latent = jnp.asarray(rng.standard_normal((len(lengths), heads, LATENT)), dtype)
    q_rope = jnp.asarray(rng.standard_normal((len(lengths), heads, ROPE)), dtype)
    args = (jnp.int32(1), tables, jnp.array(lengths))
    want = decode_attention(q_latent, q_rope, no_nan(kv), *args, scale=SCALE)
    got = decode.decode_attention(
        q_latent, q_rope, kv, *args, scale=SCALE, interpret=True, splits=splits
    )
    np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (got, want)), atol=bound)
    assert (np.asarray(got[3]) == 0).all()


def extend_inputs(rng, rows, chunks, heads, shared=(), sizes=SIZES):
    """Arguments of `extend_attention` for chunks (start, rows), all but the keyword ones.

    `shared`: chunks that have the prefix of the chunk before them; `sizes`: as SIZES.
    """
    latent, rope, nope, value = sizes
    contexts = [start + n for start, n in chunks]
    contexts += [0] * (5 - len(chunks))
    kv, tables = pool_and_tables(rng, contexts, 16, 42, "float32", latent + rope)
    tables = np.array(tables)
    for i in shared:
        assert chunks[i][0] == chunks[i - 1][0]
        assert chunks[i][0] % 16 == 0
        tables[i, : chunks[i][0] // 16] = tables[i - 1, : chunks[i][0] // 16]
    first = np.full(5, rows, np.int32)
    counts, starts = np.zeros(5, np.int32), np.zeros(5, np.int32)
    latents = np.zeros((rows, latent + rope), np.float32)
    at = 0
    for i, (start, n) in enumerate(chunks):
        first[i], counts[i], starts[i] = at, n, start
        latents[at : at + n] = np.asarray(
            kv[1][tables[i]].reshape(-1, latent + rope)[start : start + n]
        )
        at += n
    shapes = [(rows, heads, nope), (rows, heads, rope), (heads, nope, latent)]
    arrays = [rng.standard_normal(s) for s in (*shapes, (heads, latent, value))]
    arrays[2:] = [a * LATENT / latent for a in arrays[2:]]  # scores of about the same size
    arrays = [jnp.asarray(a, jnp.float32) for a in (*arrays, latents)]
    numbers = [jnp.asarray(a) for a in (tables, first, counts, starts)]
    prefixes = find_prefixes(numbers[2], numbers[3], numbers[0], 16)
    return arrays, kv, numbers, prefixes


def run_extend(arrays, kv, numbers, prefixes, num_rows, kernels, rows=None):
    """Queries are of all prefill rows, or with `rows` the last ones of those."""
    return extend_attention(
        *(*arrays, kv, jnp.int32(1), *numbers, prefixes),
        rows=rows or slice(0, num_rows),
        num_rows=num_rows,
        scale=SCALE / 4,
        kernels=kernels,
    )


@pytest.mark.parametrize(
    ("rows", "chunks", "shared", "heads"),  # chunks: (start, rows); a program has one head
    [
        (32, [(0, 5), (7, 1), (120, 20)], (), 3),
        (300, [(0, 150), (130, 140)], (), 3),
        (256, [(0, 256)], (), 3),
        (16, [], (), 3),
        (130, [(500, 129)], (), 16),
        (200, [(0, 90), (0, 1), (0, 100)], (), 3),
        (150, [(96, 30), (96, 40), (96, 1), (32, 9), (32, 50)], (1, 2, 4), 3),
    ],
)
def test_extend_attention_equals_its_twin(rng, rows, chunks, shared, heads, monkeypatch):
    monkeypatch.setattr(extend, "MIN_PIECE", 64)  # prefixes take several pieces
    monkeypatch.setattr(extend, "MAX_PIECE", 128)
    arrays, kv, numbers, prefixes = extend_inputs(rng, rows, chunks, heads, shared)
    before = 3  # rows that are not prefill rows
    for i in (0, 1, 4):
        arrays[i] = jnp.pad(arrays[i], ((before, 0), *[(0, 0)] * (arrays[i].ndim - 1)))
    distinct = [start for i, (start, _) in enumerate(chunks) if i not in shared]
    assert int(prefixes.ends[-1]) == sum(distinct)
    got = run_extend(arrays, kv, numbers, prefixes, rows, KERNELS)
    want = run_extend(arrays, no_nan(kv), numbers, prefixes, rows, XLA)
    np.testing.assert_allclose(got[before:], want[before:], atol=1e-4)
    for found in ("some",) if any(distinct) else ("none", "some"):
        knowing = dataclasses.replace(KERNELS, prefixes=found)
        got = run_extend(arrays, kv, numbers, prefixes, rows, knowing)
        np.testing.assert_allclose(got[before:], want[before:], atol=1e-4)
    assert (np.asarray(got[before + sum(n for _, n in chunks) :]) == 0).all()


@needs_interpreter
@pytest.mark.parametrize(
    ("rows", "chunks", "shared", "before"),  # chunks: (start, rows)
    [
        (333, [(0, 333)], (), 0),
        (300, [(0, 150), (0, 1), (0, 128)], (), 3),
        (140, [(7, 5), (130, 90), (0, 20)], (), 8),
        (150, [(96, 30), (96, 41), (96, 1), (32, 9), (32, 50)], (1, 2, 4), 5),
        (20, [], (), 2),
    ],
)
def test_extend_attention_on_hopper_equals_its_twin(rng, rows, chunks, shared, before, monkeypatch):
    monkeypatch.setattr(hopper, "LEAST_ROWS", 0)
    monkeypatch.setattr(extend, "MIN_PIECE", 64)  # prefixes take several pieces
    monkeypatch.setattr(extend, "MAX_PIECE", 128)
    arrays, kv, numbers, prefixes = extend_inputs(rng, rows, chunks, 2, shared, (64, 64, 128, 64))
    want = run_extend(arrays, no_nan(kv), numbers, prefixes, rows, XLA)
    for i in (0, 1, 4):
        arrays[i] = jnp.pad(arrays[i], ((before, 0), *[(0, 0)] * (arrays[i].ndim - 1)))
    arrays[0] = jnp.pad(arrays[0], ((0, 0), (0, 0), (0, 64)), constant_values=jnp.nan)
    for found in ("perhaps",) if any(s for s, _ in chunks) else ("none", "some"):
        kernels = dataclasses.replace(KERNELS, extend_attention="hopper", prefixes=found)
        got = run_extend(arrays, kv, numbers, prefixes, rows, kernels)
        assert got.shape == (before + rows, 2, 64)
        np.testing.assert_allclose(got[before:], want, atol=1e-4)
        assert (np.asarray(got[before + sum(n for _, n in chunks) :]) == 0).all()


@needs_interpreter
def test_extend_attention_on_hopper_in_two_parts_is_that_of_all_rows(rng, monkeypatch):
    monkeypatch.setattr(hopper, "LEAST_ROWS", 0)
    rows, cut = 150, 70
    chunks = [(30, 100), (130, 40)]
    arrays, kv, numbers, prefixes = extend_inputs(rng, rows, chunks, 1, (), (64, 64, 64, 64))
    want = run_extend(arrays, no_nan(kv), numbers, prefixes, rows, XLA)
    kernels = dataclasses.replace(KERNELS, extend_attention="hopper")
    for part, before in ((slice(0, cut), 3), (slice(cut, rows), 2)):
        queries = [jnp.pad(a[part], ((before, 0), (0, 0), (0, 0))) for a in arrays[:2]]
        args = [*queries, *arrays[2:]], kv, numbers, prefixes, rows
        got = run_extend(*args, kernels, part)
        np.testing.assert_allclose(got[before:], want[part], atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "chunks", "cut"),  # chunks: (start, rows)
    [
        (300, [(0, 150), (130, 140)], 128),  # inside a chunk
        (300, [(30, 150), (130, 140)], 150),  # between two, no whole block
        (300, [(7, 150), (130, 20)], 200),  # in the padding
        (32, [(0, 5), (7, 1), (120, 20)], 10),
        (16, [], 5),
    ],
)
def test_extend_attention_in_two_parts_is_that_of_all_rows(rng, rows, chunks, cut):
    arrays, kv, numbers, prefixes = extend_inputs(rng, rows, chunks, heads=3)
    want = run_extend(arrays, no_nan(kv), numbers, prefixes, rows, XLA)
    arrays[-1] = jnp.pad(arrays[-1], ((4, 0), (0, 0)))  # entries of decode rows
    for pool, kernels in ((kv, KERNELS), (no_nan(kv), XLA)):
        for part, before in ((slice(0, cut), 3), (slice(cut, rows), 0), (slice(cut, rows), 2)):
            queries = [jnp.pad(a[part], ((before, 0), (0, 0), (0, 0))) for a in arrays[:2]]
            args = [*queries, *arrays[2:]], pool, numbers, prefixes, rows
            got = run_extend(*args, kernels, part)
            np.testing.assert_allclose(got[before:], want[part], atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "skew"),
    [(1, 4, 2, 0), (64, 8, 3, 0), (300, 3, 2, 0), (50, 8, 1, 1), (20, 5, 4, 2), (7, 4, 2, 3)],
)
def test_grouped_mlp_equals_its_twin(rng, tokens, experts, k, skew):
    width, inner = 64, 48
    x = jnp.asarray(rng.standard_normal((tokens, width)), jnp.float32)
    w1 = jnp.asarray(rng.standard_normal((2, experts, width, 2, inner)) * 0.2, jnp.float32)
    w2 = jnp.asarray(rng.standard_normal((2, experts, inner, width)) * 0.2, jnp.float32)
    ids = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    if skew == 1:
        ids[:] = 5  # all to one expert
    if skew == 2:
        ids[rng.random(ids.shape) < 0.6] = -1  # most pairs absent
        ids[3] = -1
    if skew == 3:
        ids[:] = -1
    weights = jnp.asarray(rng.random((tokens, k)), jnp.float32)
    args = (x, jnp.asarray(ids), weights, w1, w2, jnp.int32(1))
    got, want = grouped_mlp(*args, kernels=KERNELS), grouped_mlp(*args)
    np.testing.assert_allclose(got, want, atol=3e-5)


def test_a_token_is_computed_alike_beside_others(rng):
    """The bits of a token's sum do not depend on who shares its blocks."""
    x = jnp.asarray(rng.standard_normal((40, 32)), jnp.float32)
    w1 = jnp.asarray(rng.standard_normal((1, 4, 32, 2, 16)), jnp.float32)
    w2 = jnp.asarray(rng.standard_normal((1, 4, 16, 32)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 4, (40, 2)), jnp.int32)
    weights = jnp.asarray(rng.random((40, 2)), jnp.float32)
    alone = ids.at[1:].set(-1)
    together, single = (
        grouped_mlp(x, i, weights, w1, w2, jnp.int32(0), kernels=KERNELS) for i in (ids, alone)
    )
    np.testing.assert_array_equal(together[0], single[0])


@pytest.mark.parametrize("most_counts", [1 << 15, 1])  # the kernel adds blocks up, or XLA does
@pytest.mark.parametrize("pairs", [1, 128, 500, 1100, 5000])
def test_pairs_are_sorted_stably_without_absent_ones(rng, pairs, most_counts, monkeypatch):
    monkeypatch.setattr(grouped_mlp_kernels, "MOST_COUNTS", most_counts)
    ids = rng.integers(-1, 5, pairs).astype(np.int32)
    order, counts = sort_pairs(jnp.asarray(ids), 5, interpret=True)
    want = np.argsort(np.where(ids < 0, 5, ids), kind="stable")[: (ids >= 0).sum()]
    np.testing.assert_array_equal(order[: len(want)], want)
    np.testing.assert_array_equal(counts, [*np.bincount(ids[ids >= 0], minlength=5), 0, 0, 0])


def test_blocks_follow_the_mean_load():
    assert [block_rows(6 * t, 64) for t in (1, 64, 128, 256, 2048)] == [16, 16, 16, 32, 128]
    shape = jax.ShapeDtypeStruct((26, 64, 2048, 2, 1408), jnp.bfloat16)
    w1 = jax.eval_shape(lambda w: Matrices.of(w, 2, 1), shape)
    t = tiles(16, w1, 2, gated=True)
    assert (1408 % t.columns, 2048 % t.depth) == (0, 0)


FP8_BLOCKS = [(128, 128), (32, 16), (16, 64), (48, 32)]  # partial, dividing, coarser than it is


@pytest.mark.parametrize(
    ("contracted", "as_stored"),
    [
        ((1, 2), (0, 1, 3, 4, 2)),
        ((1, 1), (0, 1, 2, 4, 3)),
        ((2, 1), (0, 1, 4, 2, 3)),
        ((0, 0), None),
    ],
)
def test_fp8_weights_know_their_shape(rng, contracted, as_stored):
    weight = quantised(rng, (2, 3, 32, 2, 48), (16, 1, 12), contracted)
    assert weight.shape == (2, 3, 32, 2, 48) == weight[...].shape
    axes = range(5) if as_stored is None else as_stored
    assert weight.data.shape == tuple(weight.shape[axis] for axis in axes)
    values = np.transpose(np.asarray(weight.data.astype(jnp.float32)), np.argsort(axes))
    of_block = np.s_[0, 0, :16, 0, :12]
    values, numbers = values[of_block], np.asarray(weight[...])[of_block]
    assert len(np.unique(numbers[values != 0] / values[values != 0])) == 1
    assert (numbers[values == 0] == 0).all()  # a random number may round to it


@pytest.mark.parametrize("block", FP8_BLOCKS)
@pytest.mark.parametrize(("tokens", "absent"), [(1, 0), (20, 0.5), (300, 0.3), (9, 1)])
def test_grouped_mlp_reads_fp8(rng, block, tokens, absent):
    """Few rows (factors on the products) and many (on the weights), ragged, some experts idle."""
    width, inner, experts = 96, 160, 5
    x = jnp.asarray(rng.standard_normal((tokens, width)), jnp.float32)
    w1 = quantised(rng, (2, experts, width, 2, inner), (1, block[0], 1, block[1]), (1, 2))
    w2 = quantised(rng, (2, experts, inner, width), (1, *block), (1, 1))
    ids = np.stack([rng.permutation(experts)[:3] for _ in range(tokens)]).astype(np.int32)
    ids[(rng.random(ids.shape) < absent) | (ids == 3)] = -1
    weights = jnp.asarray(rng.random((tokens, 3)), jnp.float32)
    args = (x, jnp.asarray(ids), weights, w1, w2, jnp.int32(1))
    got, want = grouped_mlp(*args, kernels=KERNELS), grouped_mlp(*args)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert (np.asarray(want) != 0).any() == bool((ids >= 0).any())


@pytest.mark.parametrize("block", FP8_BLOCKS)
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("inside", "outside"), [((288,), (2, 176)), ((3, 96), (160,)), ((96,), (3, 192))]
)
def test_products_read_fp8(rng, block, rows, inside, outside, turned):
    of_stack = (1,) * (len(inside) - 1) + block[:1] + (1,) * (len(outside) - 1) + block[1:]
    contracted = (len(inside), len(outside)) if turned else AS_THEY_ARE
    stack = quantised(rng, (3, *inside, *outside), of_stack, contracted)
    weight = StackedWeight(stack=stack, layer=jnp.int32(2))
    assert dense.pallas.unsupported(stack, len(inside)) is None
    x = jnp.asarray(rng.standard_normal((rows, *inside)), jnp.float32)
    got, want = (matmul(x, weight, len(inside), k) for k in (KERNELS, XLA))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("contracted", [AS_THEY_ARE, (1, 2)])
def test_fp8_and_plain_weights_share_a_kernel(rng, contracted):
    x = jnp.asarray(rng.standard_normal((5, 128)), jnp.float32)
    plain = jnp.asarray(rng.standard_normal((3, 128, 80)), jnp.float32)
    stacks = quantised(rng, (3, 128, 2, 48), (64, 1, 48), contracted), plain
    weights = [StackedWeight(stack=stack, layer=jnp.int32(1)) for stack in stacks]
    for parts, weight in zip(matmul_parts(x, weights, 1, KERNELS), weights, strict=True):
        want = matmul(x, weight, 1, XLA)
        np.testing.assert_allclose(parts.sum(axis=0), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    ("shape", "block"), [((96, 96), (12, 20)), ((96, 2, 40), (32, 1, 32)), ((96, 96), (1, 32))]
)
def test_fp8_blocks_that_kernels_cannot_cut_are_named(shape, block):
    assert "not multiples of 16" in fp8_unsupported(shape, block)
    assert fp8_unsupported((4, 7168, 2, 2048), (128, 1, 128)) is None


@pytest.mark.parametrize(
    ("rows", "inside", "outside"),
    [(1, (64,), (48,)), (70, (256,), (2, 96)), (5, (4, 16), (32,))],
)
def test_products_with_a_stack_equal_those_with_its_layer(rng, rows, inside, outside):
    stack = jnp.asarray(rng.standard_normal((3, *inside, *outside)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((rows, *inside)), jnp.float32)
    weight = StackedWeight(stack=stack, layer=jnp.int32(2))
    got = matmul(x, weight, len(inside), KERNELS)
    assert got.shape == (rows, *outside)
    np.testing.assert_allclose(got, matmul(x, stack[2], len(inside), XLA), atol=1e-4)


def test_products_with_two_weights_in_one_kernel_equal_each(rng):
    x = jnp.asarray(rng.standard_normal((5, 128)), jnp.float32)
    stacks = [jnp.asarray(rng.standard_normal((3, 128, *s)), jnp.float32) for s in ((2, 48), (80,))]
    weights = [StackedWeight(stack=stack, layer=jnp.int32(2)) for stack in stacks]
    got = matmul_parts(x, weights, 1, KERNELS)
    for parts, weight, stack in zip(got, weights, stacks, strict=True):
        np.testing.assert_allclose(parts.sum(axis=0), matmul(x, stack[2], 1, XLA), atol=1e-4)
        np.testing.assert_allclose(parts.sum(axis=0), matmul(x, weight, 1, KERNELS), atol=1e-4)


@pytest.mark.parametrize(("depth", "columns"), [(64, 48), (16, 128), (256, 48)])
def test_products_of_every_head_equal_an_einsum(rng, depth, columns):
    stack = jnp.asarray(rng.standard_normal((2, 3, depth, columns)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((37, 3, depth + 8)), jnp.float32)
    got = per_head(x, stack, jnp.int32(1), interpret=True)
    want = jnp.einsum("bhk,hkn->bhn", x[..., :depth], stack[1], precision="highest")
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(("rows", "width", "many"), [(1, 64, 9), (11, 48, 9)])
def test_norm_by_stacked_weights_equals_its_definition(rng, rows, width, many, monkeypatch):
    monkeypatch.setattr(norm, "MANY_ROWS", many)
    x = jnp.asarray(rng.standard_normal((rows, width)), jnp.float32)
    stack = jnp.asarray(rng.standard_normal((3, width)), jnp.float32)
    got = norm.rms_norm(x, stack, jnp.int32(1), 1e-6, interpret=True)
    np.testing.assert_allclose(got, rms_norm(x, stack[1], 1e-6), atol=1e-5)


@pytest.mark.parametrize(("parts", "scale"), [(1, 1.0), (3, 0.3)])
@pytest.mark.parametrize(("rows", "many"), [(1, 1000), (10, 8)])
def test_residual_and_norm_equal_their_definition(rng, rows, many, parts, scale, monkeypatch):
    monkeypatch.setattr(norm, "MANY_ROWS", many)
    width = 96
    # Sums without rounding, in whatever order, so that both round alike to bfloat16.
    x = jnp.asarray(rng.integers(-40, 40, (rows, width)) / 8, jnp.bfloat16)
    y = jnp.asarray(rng.integers(-9, 9, (parts, rows, width)), jnp.float32)
    weight = StackedWeight(stack=jnp.asarray(rng.random((3, width)), x.dtype), layer=jnp.int32(1))
    want_x, want = add_and_norm(x, y, weight, 1e-6, XLA, scale=scale)
    got_x, got = add_and_norm(x, y, weight, 1e-6, KERNELS, scale=scale)
    assert (got_x.dtype, got.dtype) == (x.dtype, x.dtype)
    np.testing.assert_array_equal(*(a.astype(jnp.float32) for a in (got_x, want_x)))
    np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (got, want)), rtol=0.02)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("parts", "heads", "kv_dtype"), [(1, 3, "float32"), (2, 20, "float32"), (3, 4, "float8_e4m3fn")]
)
def test_inputs_of_attention_equal_their_definition(rng, parts, heads, kv_dtype, interleaved):
    t, page_size = 7, 4

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q, entry = normal(parts, t, heads, NOPE + ROPE), normal(2, t, LATENT + ROPE)
    norm, cos, sin = normal(3, LATENT), normal(t, ROPE // 2), normal(t, ROPE // 2)
    kv = normal(LAYERS, 9, page_size, LATENT + ROPE).astype(kv_dtype)
    pages = jnp.asarray(rng.permutation(9)[:t], jnp.int32)
    offsets = jnp.asarray(rng.integers(0, page_size, t), jnp.int32)
    places = (jnp.int32(1), pages, offsets)
    got_q, got_rope, got_entries, got_kv = finish_inputs(
        *(q, entry, norm, jnp.int32(2), cos, sin, kv, *places, jnp.float32),
        nope=NOPE,
        interleaved=interleaved,
        eps=1e-6,
        interpret=True,
    )
    rotate = functools.partial(apply_rope, cos=cos, sin=sin, interleaved=interleaved)
    q, entry = q.sum(axis=0), entry.sum(axis=0)
    latent = rms_norm(entry[:, :LATENT], norm[2], 1e-6)
    entries = jnp.concatenate([latent, rotate(entry[:, LATENT:])], axis=-1).astype(kv_dtype)
    np.testing.assert_allclose(got_q[..., :NOPE], q[..., :NOPE], atol=1e-6)
    np.testing.assert_allclose(got_rope, rotate(q[..., NOPE:]), atol=1e-5)
    close = {"rtol": 0.13 if kv_dtype == "float8_e4m3fn" else 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(got_entries, entries.astype(jnp.float32), **close)
    want = kv.at[places].set(got_entries.astype(kv_dtype))
    np.testing.assert_array_equal(*(a.astype(jnp.float32) for a in (got_kv, want)))


@pytest.mark.parametrize("rows", [1, 21, 150])
@pytest.mark.parametrize(
    "name", ["deepseek_v2_lite", "moonlight", "mixtral", "kimi_k2", "deepseek_v2", "deepseek_v3"]
)  # softmax; sigmoid with bias; normalised; experts that are no power of two; two kinds of groups
def test_routing_equals_its_twin(rng, name, rows):
    config = ModelConfig.from_folder(DATA / name)
    width, experts = 7 * 64, config.num_experts
    assert routing_unsupported(width) is None
    x = jnp.asarray(rng.standard_normal((rows, width)), jnp.float32)
    valid = jnp.asarray(rng.random(rows) < 0.8)
    stack = jnp.asarray(rng.standard_normal((3, width, experts)) / 12, jnp.float32)
    bias = jnp.asarray(rng.uniform(-1.5, -0.5, experts), jnp.float32)
    bias = bias if config.router_bias else None
    got = routing.route(
        x,
        stack,
        jnp.int32(1),
        bias,
        valid,
        k=config.num_experts_per_token,
        scoring=config.scoring,
        normalize=config.normalize_weights,
        scale=config.routed_scaling,
        groups=routing_groups(config),
        interpret=True,
    )
    ids, weights = route(jnp.dot(x, stack[1], precision="highest"), bias, config)
    np.testing.assert_array_equal(got[0], jnp.where(valid[:, None], ids, -1))
    np.testing.assert_allclose(got[1], weights, rtol=1e-4)


def test_groups_of_experts_that_are_equally_good_are_kept_in_order():
    """Equal scores everywhere: the first groups, and in them the first experts, as in XLA."""
    config = ModelConfig.from_folder(DATA / "deepseek_v3")
    x, stack = jnp.zeros((3, 64)), jnp.zeros((1, 64, config.num_experts))
    got, _ = routing.route(
        *(x, stack, jnp.int32(0), None, jnp.ones(3, bool)),
        k=config.num_experts_per_token,
        scoring="sigmoid",
        normalize=True,
        scale=1.0,
        groups=routing_groups(config),
        interpret=True,
    )
    want, _ = route(jnp.zeros((3, config.num_experts)), None, config)
    np.testing.assert_array_equal(got, want)


def test_rows_of_nan_go_to_no_expert(rng):
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32).at[1].set(jnp.nan)
    stack = jnp.asarray(rng.standard_normal((1, 64, 8)), jnp.float32)
    ids, _ = routing.route(
        *(x, stack, jnp.int32(0), None, jnp.ones(3, bool)),
        k=2,
        scoring="softmax",
        normalize=False,
        scale=1.0,
        interpret=True,
    )
    assert (np.asarray(ids[1]) == -1).all()
    assert (np.asarray(ids[::2]) >= 0).all()


def test_layers_out_of_reach_are_copied(monkeypatch, rng):
    """FP8 between 2 and 4 GiB: the same numbers from a stack of the layer alone."""
    assert [matrices.out_of_reach(n) for n in (2**31, 2**31 + 1, 2**32, 2**32 + 1)] == [
        *(False, True, True, False)
    ]
    stack = quantised(rng, (3, 2, 32, 48), (1, 32, 16))
    assert matrices.in_reach(stack, jnp.int32(2)) == (stack, jnp.int32(2))
    monkeypatch.setattr(matrices, "out_of_reach", lambda size: True)
    copy, index = matrices.in_reach(stack, jnp.int32(2))
    assert (copy.shape, copy.scale.shape, int(index)) == ((1, 2, 32, 48), (1, 2, 1, 3), 0)
    np.testing.assert_array_equal(copy[...][0], stack[...][2])


@pytest.mark.parametrize(
    ("extend_kernel", "dtype"),
    [("pallas", "bfloat16"), ("pallas", "float32"), ("hopper", "bfloat16")],
)
def test_extend_attention_of_a_real_model_lowers_for_cuda(extend_kernel, dtype):
    """The shapes of DeepSeek-V2-Lite: what interpret mode accepts, the back end may refuse."""
    kernels = dataclasses.replace(KERNELS, extend_attention=extend_kernel, interpret=False)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    i32 = jnp.int32
    text = lowered_for_cuda(
        lambda *a: extend_attention(
            *(*a[:-3], Prefixes(*a[-3:])),
            rows=slice(0, 2048),
            num_rows=2048,
            scale=0.1,
            kernels=kernels,
        ),
        *(array(2051, 16, 192), array(2051, 16, 64), array(16, 128, 512), array(16, 512, 128)),
        *(array(2051, 576), array(27, 1000, 16, 576), array(dtype=i32), array(64, 300, dtype=i32)),
        *(array(64, dtype=i32) for _ in range(6)),
    )
    assert ("mosaic_gpu" if extend_kernel == "hopper" else "triton") in text
    assert "mla_causal" in text
    assert "mla_prefix" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_of_a_real_model_lower_for_cuda(dtype):
    """The shapes of DeepSeek-V2-Lite: what interpret mode accepts, Triton may refuse."""
    kernels = dataclasses.replace(KERNELS, interpret=False)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    i32 = jnp.int32
    layer, pool = array(dtype=i32), array(27, 1000, 16, 576)
    text = lowered_for_cuda(
        lambda *a: decode_attention(*a, scale=0.1, kernels=kernels),
        *(array(64, 16, 512), array(64, 16, 64), pool, layer),
        *(array(64, 300, dtype=i32), array(64, dtype=i32)),
    )
    assert "triton" in text
    stacks = array(27, 16, 128, 512), array(27, 16, 512, 128)
    text = lowered_for_cuda(
        lambda q, r, uk, uv, pool, layer, *a: decode_heads(
            q,
            r,
            StackedWeight(stack=uk, layer=layer),
            StackedWeight(stack=uv, layer=layer),
            *(pool, layer, *a),
            scale=0.1,
            kernels=kernels,
        ),
        *(array(64, 16, 128), array(64, 16, 64), *stacks, pool, layer),
        *(array(64, 300, dtype=i32), array(64, dtype=i32)),
    )
    assert text.count("per_head") >= 2

    def inputs(*a):
        return finish_inputs(*a, jnp.bfloat16, nope=128, interleaved=True, eps=1e-6)

    for parts in (1, 4):
        text = lowered_for_cuda(
            inputs,
            *(array(parts, 64, 16, 192), array(parts, 64, 576), array(26, 512), layer),
            *(array(64, 32, dtype=jnp.float32), array(64, 32, dtype=jnp.float32)),
            *(pool, layer, array(64, dtype=i32), array(64, dtype=i32)),
        )
        assert "mla_inputs" in text
    text = lowered_for_cuda(
        lambda x, w, i: matmul(x, StackedWeight(stack=w, layer=i), 1, kernels),
        *(array(64, 2048), array(26, 2048, 2, 2816), layer),
    )
    assert "triton" in text
    text = lowered_for_cuda(
        lambda x, q, kv, i: matmul_parts(
            x, [StackedWeight(stack=w, layer=i) for w in (q, kv)], 1, kernels
        ),
        *(array(64, 2048), array(26, 2048, 16, 192), array(26, 2048, 576), layer),
    )
    assert "triton" in text
    for tokens in (64, 8448):
        text = lowered_for_cuda(
            lambda x, w, i: norm.rms_norm(x, w, i, 1e-6),
            *(array(tokens, 2048), array(26, 2048), layer),
        )
        assert "rms_norm" in text
        text = lowered_for_cuda(
            lambda x, w, i, valid: routing.route(
                x, w, i, None, valid, k=6, scoring="softmax", normalize=True, scale=1.0
            ),
            *(array(tokens, 2048), array(26, 2048, 64, dtype=jnp.float32), layer),
            array(tokens, dtype=jnp.bool_),
        )
        assert "triton" in text
    for tokens in (1, 64, 256, 4096):
        text = lowered_for_cuda(
            lambda *a: grouped_mlp(*a, kernels=kernels),
            *(
                array(tokens, 2048),
                array(tokens, 6, dtype=i32),
                array(tokens, 6, dtype=jnp.float32),
            ),
            *(array(26, 64, 2048, 2, 1408), array(26, 64, 1408, 2048), layer),
        )
        assert "triton" in text


def test_kernels_of_deepseek_v3_in_fp8_lower_for_cuda():
    """128 heads, 64 experts of 256 and groups of them on a device, weights and pool in FP8."""
    kernels = dataclasses.replace(KERNELS, interpret=False)
    bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
    array = jax.ShapeDtypeStruct
    layer, pool = array((), i32), array((5, 20000, 16, 576), FP8)
    experts = (
        abstract_fp8((3, 64, 7168, 2, 2048), (1, 128, 1, 128), (1, 2)),
        abstract_fp8((3, 64, 2048, 7168), (1, 128, 128), (1, 1)),
    )
    for tokens in (64, 4096):
        rows = (array((tokens, 7168), bf16), array((tokens, 8), i32), array((tokens, 8), f32))
        text = lowered_for_cuda(
            lambda *a: grouped_mlp(*a, num_experts=256, kernels=kernels), *rows, *experts, layer
        )
        assert "experts_down" in text
        text = lowered_for_cuda(
            lambda x, w, i, b, valid: routing.route(
                *(x, w, i, b, valid),
                **{"k": 8, "scoring": "sigmoid", "normalize": True, "scale": 2.5},
                groups=routing.Groups(8, 4, 2),
            ),
            *(rows[0], array((3, 7168, 256), f32), layer, array((256,), f32)),
            array((tokens,), bool),
        )
        assert "route" in text
    for rows in (64, 300):
        for shape, block, num_in, contracted in (
            ((1536, 128, 192), (128, 1, 64), 1, (1, 2)),
            ((7168, 576), (128, 128), 1, AS_THEY_ARE),
            ((128, 128, 7168), (1, 128, 128), 2, (2, 1)),
            ((7168, 2, 18432), (128, 1, 128), 1, (1, 2)),
        ):
            weight = abstract_fp8((5, *shape), block, contracted)
            text = lowered_for_cuda(
                lambda x, w, i, n=num_in: matmul(x, StackedWeight(stack=w, layer=i), n, kernels),
                *(array((rows, *shape[:num_in]), bf16), weight, layer),
            )
            assert "dense" in text
    stacks = array((5, 128, 128, 512), bf16), array((5, 128, 512, 128), bf16)
    text = lowered_for_cuda(
        lambda q, r, uk, uv, pool, layer, *a: decode_heads(
            *(q, r, StackedWeight(stack=uk, layer=layer), StackedWeight(stack=uv, layer=layer)),
            *(pool, layer, *a),
            scale=0.1,
            kernels=kernels,
        ),
        *(array((64, 128, 128), bf16), array((64, 128, 64), bf16), *stacks, pool, layer),
        *(array((64, 300), i32), array((64,), i32)),
    )
    assert "mla_decode" in text
