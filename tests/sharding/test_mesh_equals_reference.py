"""Every layout and exchange gives the reference's logits and greedy tokens (float32)."""

from __future__ import annotations

import numpy as np
import pytest

from sharding import expert_exchange
from tests.fixtures import LAYOUTS, LOGIT_TOLERANCE, MLA_FIXTURES, load_fixture
from tests.harness import MeshModel, SliceRows

CASES = [((1, 1, 1), "none"), *((w, x) for w in LAYOUTS for x in ("none", "all_to_all"))]
PAGES_PER_SEQUENCE = 54


def _pages(seed: int) -> list[int]:
    """Scattered pages: a mistake in a page table must show."""
    return list(np.random.default_rng(seed).permutation(np.arange(1, 160))[:PAGES_PER_SEQUENCE])


def _expected_collectives(model: MeshModel, exchange: str) -> set[str]:
    """Which collectives a layout needs, from the roles alone."""
    layout = model.layout
    wanted = set()
    if layout.size(layout.attn_tp) > 1:
        wanted |= {"all-reduce", "all-gather"}  # head-parallel sums; logits
    if exchange == "none" and layout.num_slices > 1:
        wanted |= {"all-gather", "reduce-scatter"}
    if exchange == "all_to_all" and layout.size(layout.moe_ep) > 1:
        wanted.add("all-to-all")
    return wanted


def _assert_layout_is_real(model: MeshModel, exchange: str) -> None:
    """Each device holds its share of every weight and of the pool, and no more."""
    layout = model.layout
    share = {
        "experts.w1": layout.num_devices,
        "experts.w2": layout.num_devices,
        "attention.out": layout.size(layout.attn_tp),
        "attention.w_uk": layout.size(layout.attn_tp),
        "attention.kv_a": 1,
        "embedding.weight": layout.size(layout.attn_tp),
        "lm_head.weight": layout.size(layout.attn_tp),
        "shared.down": layout.size(layout.attn_tp),
    }
    seen = set()
    for param, array in zip(model.spec.params, model.weights, strict=True):
        for suffix, parts in share.items():
            if param.path.endswith(suffix):
                seen.add(suffix)
                assert {s.data.nbytes for s in array.addressable_shards} == {
                    array.nbytes // parts
                }, param.path
    assert seen == set(share)
    per_device: dict[int, int] = {}
    for array in model.weights:
        for shard in array.addressable_shards:
            per_device[shard.device.id] = per_device.get(shard.device.id, 0) + shard.data.nbytes
    assert set(per_device.values()) == {model.spec.device_bytes()}
    assert len(per_device) == layout.num_devices
    pool = {s.data.nbytes for s in model.kv.addressable_shards}
    assert pool == {model.kv.nbytes // layout.num_slices}
    text = model.program.as_text()
    found = {
        name
        for name in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
        if f" {name}(" in text or f" {name}-start(" in text
    }
    assert found >= _expected_collectives(model, exchange), found
    if layout.num_devices == 1:
        assert not found
    if exchange == "none":
        assert "all-to-all" not in found


@pytest.mark.parametrize("name", MLA_FIXTURES)
@pytest.mark.parametrize(("layout", "exchange"), CASES)
def test_logits_and_greedy_tokens_equal_the_reference(name, layout, exchange, monkeypatch):
    # Two rounds and more: all these tokens would have room in one.
    monkeypatch.setattr(expert_exchange, "dispatch_rows", lambda tokens, *_: -(-tokens // 2))
    fixture = load_fixture(name)
    model = MeshModel(fixture.folder, layout, exchange)
    _assert_layout_is_real(model, exchange)
    d = model.layout.num_slices
    # Two rounds of prompts over the slices, all eight prompts where there are few slices.
    prompts = fixture.prompts if d > 1 else fixture.prompts[:6]
    rounds = [prompts[i : i + d] for i in range(0, len(prompts), d)][: 2 if d == 1 else None]
    for group in rounds:
        states = [(p, _pages(i), list(p["prompt"])) for i, p in enumerate(group)]
        slices = [SliceRows(chunks=[(p["prompt"], 0, pages)]) for p, pages, _ in states]
        slices += [SliceRows() for _ in range(d - len(slices))]
        results, counts = model.step(slices)
        for s, (prompt, _, tokens) in enumerate(states):
            logits = results[s][1][0]
            error = np.abs(logits - fixture.logits[prompt["id"]]).max()
            assert error < LOGIT_TOLERANCE, (prompt["id"], error)
            tokens.append(int(logits[-1].argmax()))
            per_layer = len(prompt["prompt"]) * model.config.num_experts_per_token
            assert (counts[s].sum(axis=1) == per_layer).all()
        while len(states[0][2]) < len(states[0][0]["prompt"]) + 32:
            results, _ = model.step(
                [SliceRows(decode=[(t[-1], len(t) - 1, pages)]) for _, pages, t in states]
                + [SliceRows() for _ in range(d - len(states))]
            )
            for (_, _, tokens), (decoded, _) in zip(states, results, strict=False):
                tokens.append(int(decoded[0].argmax()))
        for prompt, _, tokens in states:
            assert tokens[len(prompt["prompt"]) :] == prompt["tokens"], prompt["id"]
