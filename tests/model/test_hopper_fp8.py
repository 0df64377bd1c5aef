"""The experts' kernels for FP8 weights on Hopper against their XLA twin, interpreted; and lowered.

What a kernel did not write, in memory of either kind, is NaN.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.ops.grouped_mlp import grouped_mlp, hopper_fp8
from model.ops.grouped_mlp.pallas import expected_rows
from tests.fp8 import abstract_fp8, quantised
from tests.harness import HOPPER, lowered_for_cuda

EXPERTS, K = 5, 2
WIDTH, INNER = 512, 256
BLOCKS = ((1, 128, 1, 128), (1, 128, 128))


def inputs(rng, tokens, blocks=BLOCKS):
    x = jnp.asarray(rng.standard_normal((tokens, WIDTH)), jnp.bfloat16)
    ids = np.stack([rng.permutation(EXPERTS)[:K] for _ in range(tokens)]).astype(np.int32)
    w1 = quantised(rng, (2, EXPERTS, WIDTH, 2, INNER), blocks[0], (1, 2), "bfloat16")
    w2 = quantised(rng, (2, EXPERTS, INNER, WIDTH), blocks[1], (1, 1), "bfloat16")
    return x, ids, jnp.asarray(rng.random((tokens, K)), jnp.float32), w1, w2, jnp.int32(1)


def assert_close(outputs):
    got, want = (np.asarray(a.astype(jnp.float32)) for a in outputs)
    assert np.isfinite(got).all()
    # Both round to bfloat16 between the products, and in different places.
    assert np.linalg.norm(got - want) <= 0.01 * np.linalg.norm(want)
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())


@pytest.mark.parametrize(("tokens", "rows"), [(1, 16), (30, 16), (40, 32), (100, 64), (300, 128)])
def test_they_equal_their_twin_and_tokens_do_not_see_each_other(rng, both, tokens, rows):
    """Blocks of all sizes, factors on products and on weights; some pairs are absent."""
    assert expected_rows((tokens, K), EXPERTS, None) == rows
    x, ids, *rest = inputs(rng, tokens)
    ids[1:][rng.random((tokens - 1, K)) < 0.3] = -1
    ids[ids == 3] = -1
    ids[0, 0] = 1
    together = both(x, ids, *rest)
    assert_close(together)
    ids[1:] = -1
    np.testing.assert_array_equal(both(x, ids, *rest)[0][0], together[0][0])


def test_no_token_has_an_expert_here(rng, both):
    """The kernels have no tile, and end."""
    x, ids, *rest = inputs(rng, 30)
    ids[:] = -1
    assert not np.asarray(both(x, ids, *rest)[0]).any()


def test_blocks_may_be_larger(rng, both):
    assert_close(both(*inputs(rng, 30, ((1, 256, 1, 128), (1, 256, 512)))))


def test_what_they_cannot_take_is_said():
    sizes = "bfloat16", 7168, 2048
    w1, w2 = (1, 1, 128, 128), (1, 128, 128)  # as they are stored
    assert hopper_fp8.unsupported("9.0", *sizes, (w1, w2)) is None
    assert "capability 8.0" in hopper_fp8.unsupported("8.0", *sizes, (w1, w2))
    assert "1x1x64x128" in hopper_fp8.unsupported("9.0", *sizes, ((1, 1, 64, 128), w2))
    assert "1x128x1" in hopper_fp8.unsupported("9.0", *sizes, (w1, (1, 128, 1)))
    for coarse in (((1, 1, 256, 128), w2), (w1, (1, 512, 128))):  # partial last blocks of columns
        assert "divide" in hopper_fp8.unsupported("9.0", "bfloat16", 1280, 384, coarse)


@pytest.mark.parametrize("tokens", [64, 600, 1024, 8192])
def test_they_lower_for_cuda(tokens):
    """DeepSeek-V3's sizes, a quarter of the experts here: what interpret mode accepts, Mosaic may
    refuse."""

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    text = lowered_for_cuda(
        lambda *a: grouped_mlp(
            *a, num_experts=256, kernels=dataclasses.replace(HOPPER, interpret=False)
        ),
        *(array(tokens, 7168), array(tokens, 8, dtype="int32"), array(tokens, 8, dtype="float32")),
        abstract_fp8((58, 64, 7168, 2, 2048), (1, 128, 1, 128), (1, 2)),
        abstract_fp8((58, 64, 2048, 7168), (1, 128, 128), (1, 1)),
        array(dtype="int32"),
    )
    assert text.count("mosaic_gpu") >= 2
