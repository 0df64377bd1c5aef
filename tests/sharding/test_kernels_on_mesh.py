"""Kernels inside the whole model, under shard_map: the reference's logits, on one device and cut.

Interpreted, so one prompt and a few decode steps must do.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.fixtures import LOGIT_TOLERANCE, load_fixture
from tests.harness import KERNELS, MeshModel, SliceRows


@pytest.mark.parametrize(
    ("name", "layout", "exchange"),
    [("deepseek_v2_lite", (1, 1, 1), "none"), ("deepseek_v3", (2, 2, 2), "all_to_all")],
)
def test_logits_equal_the_reference(name, layout, exchange):
    fixture = load_fixture(name)
    prompt = fixture.prompts[3]
    tokens = prompt["prompt"]
    model = MeshModel(
        fixture.folder, layout, exchange, decode_rows=2, prefill_rows=64, kernels=KERNELS
    )
    pages = list(np.random.default_rng(0).permutation(np.arange(1, 160))[:54])
    idle = [SliceRows() for _ in range(model.layout.num_slices - 1)]
    cut = len(tokens) // 2  # the second chunk has a cached prefix, the third is decoded
    wanted = fixture.logits[prompt["id"]]
    for start, end in ((0, cut), (cut, len(tokens) - 1)):
        chunk = SliceRows(chunks=[(tokens[start:end], start, pages)])
        results, _ = model.step([chunk, *idle])
        assert np.abs(results[0][1][0] - wanted[start:end]).max() < LOGIT_TOLERANCE
    last = SliceRows(decode=[(tokens[-1], len(tokens) - 1, pages)])
    results, _ = model.step([last, *idle])
    assert np.abs(results[0][0][0] - wanted[-1]).max() < LOGIT_TOLERANCE
