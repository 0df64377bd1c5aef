"""Sampling: the distribution that was asked for, from seed and position alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serving.engine.sampler import SamplingBatch, greedy, sample, top_logprobs

PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def batch(n, *, temperature=1.0, top_k=-1, top_p=1.0, seed=0, first_position=0):
    def full(value, dtype):
        return jnp.full(n, value, dtype)

    return SamplingBatch(
        positions=jnp.arange(first_position, first_position + n),
        seeds=full(seed, jnp.int32),
        temperatures=full(temperature, jnp.float32),
        top_ks=full(top_k, jnp.int32),
        top_ps=full(top_p, jnp.float32),
    )


def frequencies(**params):
    n = 20000
    logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (n, 1))
    tokens, _ = jax.jit(sample)(logits, batch(n, **params))
    return np.bincount(np.asarray(tokens), minlength=5) / n


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"top_k": 2}, PROBABILITIES * [1, 1, 0, 0, 0]),
        ({"top_p": 0.7}, PROBABILITIES * [1, 1, 0, 0, 0]),
        ({"top_p": 0.71}, PROBABILITIES * [1, 1, 1, 0, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0, 0]),
        # top-p counts within what top-k kept: 0.4 / 0.7 is less than 0.6, so two stay.
        ({"top_k": 2, "top_p": 0.6}, PROBABILITIES * [1, 1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0, 0]),
        ({"top_k": 50}, PROBABILITIES),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
    ],
)
def test_tokens_follow_the_distribution(params, want):
    want = np.asarray(want, float) / np.sum(want)
    np.testing.assert_allclose(frequencies(**params), want, atol=0.015)
    assert (frequencies(**params)[want == 0] == 0).all()


def test_a_draw_depends_on_its_seed_and_position_only():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 50)), jnp.float32)
    alone, _ = sample(logits[3:4], batch(1, seed=9, first_position=3))
    together, _ = sample(logits, batch(6, seed=9))
    assert alone[0] == together[3]
    tokens = {int(sample(logits[:1], batch(1, seed=s))[0][0]) for s in range(40)}
    assert len(tokens) > 5
    tokens = {int(sample(logits[:1], batch(1, first_position=p))[0][0]) for p in range(40)}
    assert len(tokens) > 5


def test_logprobs_are_the_models_own():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((4, 50)), jnp.float32)
    want = np.asarray(jax.nn.log_softmax(logits))
    tokens, logprobs = sample(logits, batch(4, temperature=3.0, top_k=5))
    np.testing.assert_allclose(logprobs, want[np.arange(4), tokens], rtol=1e-5)
    tokens, logprobs = greedy(logits)
    np.testing.assert_allclose(logprobs, want.max(axis=1), rtol=1e-5)
    ids, top = top_logprobs(logits)
    np.testing.assert_array_equal(ids[:, 0], tokens)
    np.testing.assert_allclose(top, np.sort(want)[:, ::-1][:, :20], rtol=1e-5)


def test_a_small_vocabulary_has_fewer_alternatives():
    ids, top = top_logprobs(jnp.zeros((2, 7)))
    assert ids.shape == top.shape == (2, 7)
