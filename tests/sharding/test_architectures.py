"""Every architecture gives transformers' logits and greedy tokens, on one device and on a mesh."""

from __future__ import annotations

import pytest

from tests.fixtures import ARCHITECTURE_FIXTURES, GQA_FIXTURES, load_fixture
from tests.harness import MeshModel, check_prompts, sizes_for

NAMES = (*GQA_FIXTURES, *ARCHITECTURE_FIXTURES)
# (tp, dp, ep) and exchange: one device, DP attention with experts spread, heads cut over all.
LAYOUTS = {
    "single": ((1, 1, 1), "none"),
    "dpa": ((4, 2, 4), "all_to_all"),
    "heads": ((4, 1, 2), "none"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_equal_the_reference(name, layout):
    fixture = load_fixture(name)
    sizes, exchange = LAYOUTS[layout]
    rows = sizes_for(len(fixture.prompts), sizes[1])
    model = MeshModel(fixture.folder, sizes, exchange, **rows)
    check_prompts(model, fixture, fixture.prompts)


@pytest.mark.parametrize(
    ("name", "tp", "slots"), [("llama", 8, 8), ("llama3", 2, 4), ("minimax_m2", 8, 8)]
)
def test_key_value_heads_are_cut_copied_and_padded(name, tp, slots):
    """2 KV heads over 8 devices, 3 over 2 and over 8 (with a norm over all heads)."""
    fixture = load_fixture(name)
    model = MeshModel(fixture.folder, (tp, 1, 1))
    assert model.kv.shape[-2] == slots
    assert {s.data.nbytes for s in model.kv.addressable_shards} == {model.kv.nbytes // tp}
    check_prompts(model, fixture, fixture.prompts[1:3])
