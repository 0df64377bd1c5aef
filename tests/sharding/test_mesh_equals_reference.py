"""Every layout and exchange gives the reference's logits and greedy tokens (float32)."""

from __future__ import annotations

import pytest

from sharding import expert_exchange
from tests.fixtures import LAYOUTS, MLA_FIXTURES, load_fixture
from tests.harness import MeshModel, check_prompts, sizes_for

CASES = [((1, 1, 1), "none"), *((w, x) for w in LAYOUTS for x in ("none", "all_to_all"))]


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
    # One slice has pages for six of the eight prompts.
    prompts = fixture.prompts[: None if layout[1] > 1 else 6]
    model = MeshModel(fixture.folder, layout, exchange, **sizes_for(len(prompts), layout[1]))
    _assert_layout_is_real(model, exchange)
    check_prompts(model, fixture, prompts)
