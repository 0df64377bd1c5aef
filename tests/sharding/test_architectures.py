"""Every architecture gives transformers' logits and greedy tokens, on one device and on a mesh."""

from __future__ import annotations

import numpy as np
import pytest

from tests.fixtures import ARCHITECTURE_FIXTURES, GQA_FIXTURES, LOGIT_TOLERANCE, load_fixture
from tests.harness import MeshModel, SliceRows

PAGES_PER_SEQUENCE = 54
NAMES = (*GQA_FIXTURES, *ARCHITECTURE_FIXTURES)
# (tp, dp, ep) and exchange: one device, DP attention with experts spread, heads cut over all.
LAYOUTS = {
    "single": ((1, 1, 1), "none"),
    "dpa": ((4, 2, 4), "all_to_all"),
    "heads": ((4, 1, 2), "none"),
}


def _pages(seed: int) -> list[int]:
    """Scattered pages: a mistake in a page table must show."""
    return list(np.random.default_rng(seed).permutation(np.arange(1, 160))[:PAGES_PER_SEQUENCE])


def check(model: MeshModel, fixture, prompts) -> None:
    """Prefill a round of prompts, one a slice, then decode; compare every logit and token."""
    d = model.layout.num_slices
    for i in range(0, len(prompts), d):
        group = prompts[i : i + d]
        idle = [SliceRows()] * (d - len(group))
        pages = [_pages(i + s) for s in range(len(group))]
        chunks = [
            SliceRows(chunks=[(p["prompt"], 0, t)]) for p, t in zip(group, pages, strict=True)
        ]
        results, _ = model.step([*chunks, *idle])
        sequences = [list(p["prompt"]) for p in group]
        for (_, parts), p, tokens in zip(results, group, sequences, strict=False):
            error = np.abs(parts[0] - fixture.logits[p["id"]]).max()
            assert error < LOGIT_TOLERANCE, (p["id"], error)
            tokens.append(int(parts[0][-1].argmax()))
        for _ in range(31):
            rows = [
                SliceRows(decode=[(tokens[-1], len(tokens) - 1, t)])
                for tokens, t in zip(sequences, pages, strict=True)
            ]
            results, _ = model.step([*rows, *idle])
            for (decoded, _), tokens in zip(results, sequences, strict=False):
                tokens.append(int(decoded[0].argmax()))
        for p, tokens in zip(group, sequences, strict=True):
            assert tokens[len(p["prompt"]) :] == p["tokens"], p["id"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_equal_the_reference(name, layout):
    fixture = load_fixture(name)
    sizes, exchange = LAYOUTS[layout]
    model = MeshModel(fixture.folder, sizes, exchange)
    check(model, fixture, fixture.prompts)


@pytest.mark.parametrize(
    ("name", "tp", "slots"), [("llama", 8, 8), ("llama3", 2, 4), ("minimax_m2", 8, 8)]
)
def test_key_value_heads_are_cut_copied_and_padded(name, tp, slots):
    """2 KV heads over 8 devices, 3 over 2 and over 8 (with a norm over all heads)."""
    fixture = load_fixture(name)
    model = MeshModel(fixture.folder, (tp, 1, 1))
    assert model.kv.shape[-2] == slots
    assert {s.data.nbytes for s in model.kv.addressable_shards} == {model.kv.nbytes // tp}
    check(model, fixture, fixture.prompts[1:3])
