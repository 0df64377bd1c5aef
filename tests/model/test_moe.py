"""The router against a plain transcription of the papers' formulas."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from model.config import ModelConfig
from model.moe import route
from tests.fixtures import DATA


def naive_route(logits, bias, c):
    """One token at a time, with loops."""
    all_ids, all_weights = [], []
    for z in logits:
        s = 1 / (1 + np.exp(-z)) if c.scoring == "sigmoid" else np.exp(z) / np.exp(z).sum()
        choice = s + (0 if bias is None else bias)
        size = len(z) // c.num_groups
        groups = [choice[g * size : (g + 1) * size] for g in range(c.num_groups)]
        score = [np.sort(g)[-2:].sum() if c.group_score == "top2" else g.max() for g in groups]
        best = np.argsort(score)[::-1][: c.topk_groups]
        allowed = [e for e in range(len(z)) if e // size in best]
        ids = sorted(allowed, key=lambda e: -choice[e])[: c.num_experts_per_token]
        w = s[ids]
        if c.normalize_weights:
            w = w / w.sum()
        all_ids.append(ids)
        all_weights.append(w * c.routed_scaling)
    return np.array(all_ids), np.array(all_weights)


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v2", "deepseek_v3"])
def test_route_follows_the_paper(name):
    config = ModelConfig.from_folder(DATA / name)
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((50, config.num_experts)).astype(np.float32) * 2
    bias = None
    if config.router_bias:
        # Strongly negative biases: an excluded expert scored 0 would win over allowed ones.
        bias = rng.uniform(-1.5, -0.5, config.num_experts).astype(np.float32)
    ids, weights = route(logits, bias, config)
    want_ids, want_weights = naive_route(logits, bias, config)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5)


def test_bias_chooses_but_does_not_weigh():
    config = dataclasses.replace(
        ModelConfig.from_folder(DATA / "deepseek_v3"), num_groups=1, topk_groups=1
    )
    logits = np.zeros((1, config.num_experts), np.float32)
    bias = np.zeros(config.num_experts, np.float32)
    bias[[3, 5, 7, 9]] = 10.0
    ids, weights = route(logits, bias, config)
    assert sorted(np.asarray(ids)[0]) == [3, 5, 7, 9]
    np.testing.assert_allclose(weights[0], config.routed_scaling / 4, rtol=1e-6)
