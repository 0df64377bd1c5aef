"""The experts' kernels for Hopper against their XLA twin, interpreted; and lowered for CUDA.

What a kernel did not write, in memory of either kind, is NaN.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import layers
from model.ops import hopper_products
from model.ops.dense import StackedWeight
from model.ops.grouped_mlp import grouped_mlp, hopper, placing
from tests.harness import HOPPER, KERNELS, PROCESSORS, lowered_for_cuda

TOKENS, EXPERTS, K = 150, 5, 2
WIDTH, INNER = 512, 256  # two tiles of columns each


def inputs(rng):
    """x, ids, weights and two layers of stacks, of which the second is meant."""
    x = rng.standard_normal((TOKENS, WIDTH))
    w1 = rng.standard_normal((2, EXPERTS, WIDTH, 2, INNER)) * WIDTH**-0.5
    w2 = rng.standard_normal((2, EXPERTS, INNER, WIDTH)) * INNER**-0.5
    ids = np.stack([rng.permutation(EXPERTS)[:K] for _ in range(TOKENS)]).astype(np.int32)
    x, w1, w2 = (jnp.asarray(a, jnp.bfloat16) for a in (x, w1, w2))
    return x, ids, jnp.asarray(rng.random((TOKENS, K)), jnp.float32), w1, w2, jnp.int32(1)


def assert_close(outputs):
    got, want = (np.asarray(a.astype(jnp.float32)) for a in outputs)
    assert np.isfinite(got).all()
    # Both round to bfloat16 between the products, and in different places.
    assert np.linalg.norm(got - want) <= 0.01 * np.linalg.norm(want)
    np.testing.assert_allclose(got, want, atol=0.05)


def test_they_equal_their_twin_and_tokens_do_not_see_each_other(rng, both):
    """Experts have none, one or two warpgroups' rows of a block, or more; some pairs are absent."""
    x, ids, *rest = inputs(rng)
    ids[ids == 1] = -1
    ids[70:, 0] = np.where(rng.random(80) < 0.7, -1, ids[70:, 0])
    ids[3] = -1
    together = both(x, ids, *rest)
    assert_close(together)
    others = np.arange(TOKENS) != 70
    ids[others] = -1
    np.testing.assert_array_equal(both(x, ids, *rest)[0][70], together[0][70])


@pytest.mark.parametrize("expert", [3, -1])
def test_all_tokens_choose_the_same(rng, both, expert):
    x, ids, *rest = inputs(rng)
    ids[:] = [expert, -1]
    outputs = both(x, ids, *rest)
    assert_close(outputs)
    assert (np.asarray(outputs[0]) == 0).all() == (expert < 0)


@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_places_are_in_blocks_of_their_experts(rng, tokens):
    ids = rng.integers(-1, 5, (tokens, 3)).astype(np.int32)
    places, blocks = placing.place(jnp.asarray(ids), 5, 16, interpret=True)
    counts = np.bincount(ids[ids >= 0], minlength=5)
    used = -(-counts // 16)
    first = 16 * (np.cumsum(used) - used)
    for expert in range(5):
        want = first[expert] + np.arange(counts[expert])
        np.testing.assert_array_equal(places[ids == expert], want)
    assert (np.asarray(places)[ids < 0] == -1).all()
    assert int(blocks.used[0]) == used.sum() <= len(blocks.rows)
    np.testing.assert_array_equal(blocks.experts[: used.sum()], np.repeat(np.arange(5), used))
    want = [min(16, n - i) for n in counts for i in range(0, n, 16)]
    np.testing.assert_array_equal(blocks.rows, want + [0] * (len(blocks.rows) - len(want)))


def test_only_steps_of_many_rows_take_them(rng, monkeypatch):
    calls = []
    monkeypatch.setattr(hopper, "grouped_mlp", lambda x, *a, **k: calls.append(len(x)) or x)
    x, ids, weights, *rest = inputs(rng)
    monkeypatch.setattr(hopper, "LEAST_LOAD", TOKENS * K // EXPERTS)
    for tokens in (TOKENS - 1, TOKENS):
        args = x[:tokens], jnp.asarray(ids[:tokens]), weights[:tokens], *rest
        grouped_mlp(*args, kernels=HOPPER)
        grouped_mlp(*args, kernels=KERNELS)
    assert calls == [TOKENS]


def test_what_they_cannot_take_is_said():
    assert hopper.unsupported("9.0", "bfloat16", 2048, 1408) is None
    assert "not float32" in hopper.unsupported("9.0", "float32", 2048, 1408)
    assert "multiple of 256" in hopper.unsupported("9.0", "bfloat16", 2048, 704)
    assert "multiple of 256" in hopper.unsupported("9.0", "bfloat16", 1920, 1408)
    assert "capability 10.0" in hopper.unsupported("10.0", "bfloat16", 2048, 1408)


def test_they_lower_for_cuda():
    """The shapes of DeepSeek-V2-Lite: what interpret mode accepts, Mosaic may refuse."""

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    text = lowered_for_cuda(
        lambda *a: grouped_mlp(*a, kernels=dataclasses.replace(HOPPER, interpret=False)),
        *(array(8448, 2048), array(8448, 6, dtype="int32"), array(8448, 6, dtype="float32")),
        *(array(26, 64, 2048, 2, 1408), array(26, 64, 1408, 2048), array(dtype="int32")),
    )
    assert text.count("mosaic_gpu") >= 2
    text = lowered_for_cuda(
        lambda x, w1, w2, layer: layers.gated_mlp(
            x,
            *(StackedWeight(stack=stack, layer=layer) for stack in (w1, w2)),
            dataclasses.replace(HOPPER, interpret=False),
        ),
        *(array(1032, 2048), array(26, 2048, 2, 2816), array(26, 2816, 2048)),
        array(dtype="int32"),
    )
    assert text.count("mosaic_gpu") >= 2


def test_a_dense_mlp_equals_its_definition(rng, monkeypatch):
    hopper.gated_mlp.clear_cache()
    monkeypatch.setattr(hopper_products, "PROCESSORS", PROCESSORS)
    monkeypatch.setattr(layers, "MAX_ROWS", 0)
    rows = hopper.ROWS + 24  # the last block begins early
    x, *stacks = (
        jnp.asarray(rng.standard_normal(shape) * WIDTH**-0.5, jnp.bfloat16)
        for shape in ((rows, WIDTH), (2, WIDTH, 2, INNER), (2, INNER, WIDTH))
    )
    weights = [StackedWeight(stack=stack, layer=jnp.int32(1)) for stack in stacks]
    with monkeypatch.context() as patch:
        patch.setattr(layers, "matmul", None)  # not by the definition
        got = layers.gated_mlp(x, *weights, HOPPER)
    assert_close((got, layers.gated_mlp(x, *weights)))
    hopper.gated_mlp.clear_cache()
    monkeypatch.setattr(hopper, "gated_mlp", None)  # not for rows that cannot be cut into tiles
    assert_close((layers.gated_mlp(x[1:], *weights, HOPPER), layers.gated_mlp(x[1:], *weights)))
