"""Tokens travel whole, and as float8 within the bound that is promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.dispatch_format import decode, dequantize, encode, joined, parted, quantize

K = 3


def tokens(width, dtype, seed=0, rows=40):
    rng = np.random.default_rng(seed)
    # Magnitudes from 1e-4 to 1e4: the small ones of a block fall among float8's smallest numbers.
    x = rng.standard_normal((rows, width)) * 10 ** rng.uniform(-4, 4, (rows, width))
    return jnp.asarray(x, dtype)


def routed(rows=40):
    rng = np.random.default_rng(1)
    ids = rng.integers(-1, 256, (rows, K)).astype(np.int32)
    return ids, rng.random((rows, K)).astype(np.float32)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nothing_is_lost_on_the_way(dtype, fp8):
    x = tokens(200, jnp.float32).clip(-6e4, 6e4).astype(dtype)
    ids, weights = routed()
    rows = encode(x, ids, weights, fp8=fp8)
    words = joined(rows)
    assert words.dtype.itemsize == (1 if fp8 else x.dtype.itemsize)
    arrived = parted(words, x.shape[1], rows.data.dtype)
    got_x, got_ids, got_weights = decode(arrived, K, x.dtype)
    want = dequantize(*quantize(x), x.dtype) if fp8 else x
    assert got_x.dtype == x.dtype
    np.testing.assert_array_equal(got_x, want)
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_array_equal(got_weights, weights)


def test_rows_of_zeros_are_no_tokens():
    rows = encode(tokens(8, jnp.float32), *routed(), fp8=True)
    words = jnp.zeros_like(joined(rows))
    x, ids, weights = decode(parted(words, 8, rows.data.dtype), K, jnp.float32)
    assert (ids == -1).all()
    assert not weights.any()
    assert not x.any()


@pytest.mark.parametrize("largest", [1e-30, 1e-36, 1e-38, 1e-42])
def test_a_block_of_tiny_numbers_stays_finite(largest):
    """Never a division by a factor that a device takes for 0."""
    x = jnp.asarray([[largest, 0.0, -largest / 2]], jnp.float32)
    got = np.asarray(dequantize(*jax.jit(quantize)(x), jnp.float32))
    np.testing.assert_allclose(got, x, rtol=1 / 16, atol=6e-36)


@pytest.mark.parametrize("width", [8, 128, 200, 512])
def test_float8_keeps_its_bound(width):
    x = np.array(tokens(width, jnp.float32))
    x[3], x[4, 0] = 0, 1e30
    data, scale = quantize(jnp.asarray(x))
    assert scale.shape == (len(x), -(-width // 128))
    got = np.asarray(dequantize(data, scale, jnp.float32))
    largest = np.stack(
        [np.abs(x[:, i : i + 128]).max(axis=1) for i in range(0, width, 128)], axis=1
    )
    smallest = np.repeat(largest, 128, axis=1)[:, :width] / 448 * 2.0**-10
    bound = np.maximum(np.abs(x) / 16, smallest) * (1 + 1e-5)  # and float32's own rounding
    assert np.isfinite(got).all()
    assert (np.abs(got - x) <= bound).all()
    assert (np.abs(got - x) > bound / 4).any()
