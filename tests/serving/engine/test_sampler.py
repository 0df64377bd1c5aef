"""Sampling: the distribution that was asked for, from seed, position and history alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serving.engine.sampler import (
    IN_PROMPT,
    IS_STOP,
    ONE_IN_ANSWER,
    History,
    SamplingBatch,
    _gumbel,
    adjust,
    allowed,
    greedy,
    logprobs_of,
    sample,
    top_logprobs,
)

PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def batch(n, *, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, seed=0, first_position=0):
    def full(value, dtype):
        return jnp.full(n, value, dtype)

    return SamplingBatch(
        positions=jnp.arange(first_position, first_position + n),
        seeds=full(seed, jnp.int32),
        temperatures=full(temperature, jnp.float32),
        top_ks=full(top_k, jnp.int32),
        top_ps=full(top_p, jnp.float32),
        min_ps=full(min_p, jnp.float32),
        repetition=full(1.0, jnp.float32),
        presence=full(0.0, jnp.float32),
        frequency=full(0.0, jnp.float32),
    )


def frequencies(**params):
    n = 20000
    logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (n, 1))
    tokens = jax.jit(sample)(logits, batch(n, **params))
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
        ({"min_p": 0.3}, PROBABILITIES * [1, 1, 1, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        # Relative to the likeliest after temperature: (0.3 / 0.4) ** 2 = 0.56.
        ({"min_p": 0.6, "temperature": 0.5}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.5, "temperature": 0.5}, PROBABILITIES**2 * [1, 1, 0, 0, 0]),
        ({"min_p": 0.2, "top_k": 2}, PROBABILITIES * [1, 1, 0, 0, 0]),
    ],
)
def test_tokens_follow_the_distribution(params, want):
    want = np.asarray(want, float) / np.sum(want)
    np.testing.assert_allclose(frequencies(**params), want, atol=0.015)
    assert (frequencies(**params)[want == 0] == 0).all()


def test_a_draw_depends_on_its_seed_and_position_only():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 50)), jnp.float32)
    alone = sample(logits[3:4], batch(1, seed=9, first_position=3))
    together = sample(logits, batch(6, seed=9))
    assert alone[0] == together[3]
    tokens = {int(sample(logits[:1], batch(1, seed=s))[0]) for s in range(40)}
    assert len(tokens) > 5
    tokens = {int(sample(logits[:1], batch(1, first_position=p))[0]) for p in range(40)}
    assert len(tokens) > 5


def test_logprobs_are_the_models_own():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((4, 50)), jnp.float32)
    want = np.asarray(jax.nn.log_softmax(logits))
    tokens = sample(logits, batch(4, temperature=3.0, top_k=5))
    logprobs = logprobs_of(logits, tokens)
    np.testing.assert_allclose(logprobs, want[np.arange(4), tokens], rtol=1e-5)
    tokens, logprobs = greedy(logits)
    np.testing.assert_allclose(logprobs, want.max(axis=1), rtol=1e-5)
    ids, top = top_logprobs(logits)
    np.testing.assert_array_equal(ids[:, 0], tokens)
    np.testing.assert_allclose(top, np.sort(want)[:, ::-1][:, :20], rtol=1e-5)


def random_rows(seed, rows=7, vocab=45):
    """Logits, parameters, history and masks of rows that use everything at once."""
    rng = np.random.default_rng(seed)

    def real(low, high):
        return rng.uniform(low, high, rows).astype(np.float32)

    parameters = SamplingBatch(
        positions=rng.integers(5, 20, rows).astype(np.int32),
        seeds=rng.integers(-(2**31), 2**31, rows).astype(np.int32),
        temperatures=np.where(rng.random(rows) < 0.3, 0, real(0.3, 2)).astype(np.float32),
        top_ks=rng.choice([-1, 1, 3, 10, 100], rows).astype(np.int32),
        top_ps=np.where(rng.random(rows) < 0.3, 1, real(0.2, 1)).astype(np.float32),
        min_ps=np.where(rng.random(rows) < 0.3, 0, real(0, 0.5)).astype(np.float32),
        repetition=real(0.5, 2),
        presence=real(-2, 2),
        frequency=real(-2, 2),
    )
    prompts = rng.random((rows, vocab)) < 0.3
    answers = np.where(rng.random((rows, vocab)) < 0.3, rng.integers(1, 6, (rows, vocab)), 0)
    stops = rng.random((rows, vocab)) < 0.2
    ids = np.stack([rng.permutation(vocab)[:6] for _ in range(rows)]).astype(np.int32)
    values = np.where(np.arange(6) < 4, rng.uniform(-5, 5, (rows, 6)), 0).astype(np.float32)
    history = History(
        counts=(IN_PROMPT * prompts + IS_STOP * stops + ONE_IN_ANSWER * answers).astype(np.int32),
        bias_ids=ids,
        bias_values=values,
        stops_from=rng.integers(5, 20, rows).astype(np.int32),
    )
    may = rng.random((rows, vocab)) < 0.8
    padded = np.pad(may, ((0, 0), (0, -vocab % 32)))
    masks = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    logits = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    return logits, parameters, history, masks, (prompts, answers, stops, may)


def adjusted_by_hand(logits, p, history, facts):
    """The definition, token by token."""
    prompts, answers, stops, may = facts
    out = np.array(logits, np.float64)
    for r in range(len(out)):
        for token, value in zip(history.bias_ids[r], history.bias_values[r], strict=True):
            out[r, token] += value
        for v in range(out.shape[1]):
            count = answers[r, v]
            if prompts[r, v] or count:
                if out[r, v] > 0:
                    out[r, v] /= p.repetition[r]
                else:
                    out[r, v] *= p.repetition[r]
            if count:
                out[r, v] -= p.presence[r] + p.frequency[r] * count
            if stops[r, v] and p.positions[r] < history.stops_from[r]:
                out[r, v] = -np.inf
            if not may[r, v]:
                out[r, v] = -np.inf
    return out


def kept_by_hand(logits, k, top_p, min_p):
    """Which of one row's tokens may be drawn, from its logits after temperature."""
    p = np.exp(logits - logits.max())
    order = np.argsort(-logits, kind="stable")[: k if k > 0 else None]
    order = [v for v in order if np.isfinite(logits[v])]
    total = p[order].sum()
    kept, before = set(), 0.0
    for v in order:
        if before < top_p and p[v] >= min_p:
            kept.add(v)
        before += p[v] / total
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_everything_at_once_equals_the_definition(seed):
    logits, parameters, history, masks, facts = random_rows(seed)
    got = jax.jit(adjust)(logits, parameters, history, masks)
    want = adjusted_by_hand(logits, parameters, history, facts)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    tokens = np.asarray(jax.jit(sample)(got, parameters))
    noise = np.asarray(_gumbel(parameters, logits.shape[1]))
    for r, temperature in enumerate(parameters.temperatures):
        if temperature == 0:
            assert tokens[r] == want[r].argmax()
            continue
        scaled = want[r] / temperature
        kept = kept_by_hand(
            scaled, parameters.top_ks[r], parameters.top_ps[r], parameters.min_ps[r]
        )
        drawn = max(kept, key=lambda v: scaled[v] + noise[r, v])
        assert tokens[r] == drawn


@pytest.mark.parametrize(
    "change",
    ["bias_values", "repetition", "presence", "frequency", "stops_from", "masks"],
)
def test_each_part_counts(change):
    """Without it the definition gives something else: no part is tested by accident."""
    logits, parameters, history, masks, facts = random_rows(0)
    parts = {**parameters._asdict(), **history._asdict(), "masks": masks}
    neutral = {"repetition": 1.0, "stops_from": 0, "masks": -1}.get(change, 0)
    parts[change] = np.full_like(parts[change], neutral)
    got = jax.jit(adjust)(
        logits,
        SamplingBatch(**{name: parts[name] for name in SamplingBatch._fields}),
        History(**{name: parts[name] for name in History._fields}),
        parts["masks"],
    )
    want = adjusted_by_hand(logits, parameters, history, facts)
    assert not np.allclose(got, want, rtol=1e-3)


def test_an_empty_history_changes_nothing():
    logits = np.random.default_rng(3).normal(0, 3, (4, 40)).astype(np.float32)
    history = History(
        counts=np.zeros((4, 40), np.int32),
        bias_ids=np.zeros((4, 8), np.int32),
        bias_values=np.zeros((4, 8), np.float32),
        stops_from=np.zeros(4, np.int32),
    )
    # A padding row's penalties are zeros, not ones.
    for repetition in (1.0, 0.0):
        parameters = batch(4)._replace(repetition=jnp.full(4, repetition))
        got = jax.jit(adjust)(logits, parameters, history, np.full((4, 2), -1, np.int32))
        np.testing.assert_array_equal(got, logits)


def test_mask_bits_stand_for_tokens_in_order():
    masks = np.zeros((2, 3), np.int32)
    masks[0, 0] = 1 << 5
    masks[1, 1] = np.array(1 << 31, np.uint32).view(np.int32)
    masks[1, 2] = 1
    got = np.asarray(allowed(masks, 70))
    assert got.shape == (2, 70)
    assert np.argwhere(got).tolist() == [[0, 5], [1, 63], [1, 64]]


def test_the_greedy_program_sorts_nothing():
    text = str(jax.make_jaxpr(greedy)(jnp.zeros((3, 50))))
    assert "argmax" in text
    assert "sort" not in text
    assert "top_k" not in text
    # The text would show it: sampling does sort.
    assert "sort" in str(jax.make_jaxpr(sample)(jnp.zeros((3, 50)), batch(3)))


def test_a_small_vocabulary_has_fewer_alternatives():
    ids, top = top_logprobs(jnp.zeros((2, 7)))
    assert ids.shape == top.shape == (2, 7)
