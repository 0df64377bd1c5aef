"""Two micro-batches give what all rows together give, on every layout, wherever the cut is."""

from __future__ import annotations

import numpy as np
import pytest

from model.batch import ForwardBatch, MicroBatch, micro_batches
from model.ops.kernels import XLA
from sharding import expert_exchange
from tests.fixtures import LOGIT_TOLERANCE, load_fixture
from tests.harness import KERNELS, MeshModel, SliceRows

ROUNDING = 1e-4
"""A product of fewer rows, or over more devices, may add in another order."""


LONG, OTHER_LONG = range(60, 110), range(110, 160)


def pages(seed):
    return list(np.random.default_rng(seed).permutation(np.arange(1, 55)))


def test_a_cut_makes_ranges_of_decode_and_prefill_rows():
    none = np.zeros(0, np.int32)
    batch = ForwardBatch(np.zeros(4, np.int32), none, none, np.zeros(6, np.int32), *[none] * 4)
    whole = MicroBatch(slice(0, 10), slice(0, 4), slice(0, 6))
    assert micro_batches(batch) == micro_batches(batch, 10) == (whole,)
    assert micro_batches(batch, 3) == (
        MicroBatch(slice(0, 3), slice(0, 3), slice(0, 0)),
        MicroBatch(slice(3, 10), slice(3, 4), slice(0, 6)),
    )
    assert micro_batches(batch, 5) == (
        MicroBatch(slice(0, 5), slice(0, 4), slice(0, 1)),
        MicroBatch(slice(5, 10), slice(4, 4), slice(1, 6)),
    )


def steps(model, prompts):
    """A prefix, then a step with slices in four modes, then decoding; all logits, all counts."""
    long, short, other = (p["prompt"] for p in prompts)
    idle = [SliceRows()] * (model.layout.num_slices - 2)
    logits, counts = [], []

    def take(*slices):
        results, of_step = model.step([*slices, *idle][: model.layout.num_slices])
        for decode, chunks in results:
            logits.extend([decode, *chunks])
        counts.append(of_step)

    take(
        SliceRows(chunks=[(other[:30], 0, pages(0))]),
        SliceRows(chunks=[(short[:-1], 0, pages(1)), (long[:40], 0, LONG)]),
    )
    take(  # the first slice's second chunk is cut, the second slice's rows end before the cut
        SliceRows(
            decode=[(other[30], 30, pages(0))],
            chunks=[(short[:9], 0, LONG), (long, 0, OTHER_LONG)],
        ),
        SliceRows(decode=[(short[-1], len(short) - 1, pages(1))], chunks=[(long[40:], 40, LONG)]),
    )
    take(SliceRows(), SliceRows(decode=[(7, len(short), pages(1)), (9, len(long), LONG)]))
    return np.concatenate(logits), np.stack(counts)


@pytest.fixture(scope="module")
def one_batch():
    """Logits and counts of two slices whose rows are computed together."""
    fixture = load_fixture("deepseek_v3")
    prompts = [fixture.prompts[i] for i in (5, 3, 4)]
    return prompts, *steps(MeshModel(fixture.folder, (2, 2, 2)), prompts)


@pytest.mark.parametrize(
    ("layout", "exchange", "cut", "rows_of_a_round"),
    [
        ((2, 2, 2), "none", 1, None),  # between the two decode rows
        ((8, 8, 8), "all_to_all", 71, None),  # inside a chunk
        ((8, 4, 8), "all_to_all", 71, 5),  # each half in as many rounds as it needs
        ((8, 2, 8), "none", 71, None),
    ],
)
def test_logits_and_expert_counts_are_those_of_one_batch(
    layout, exchange, cut, rows_of_a_round, one_batch, monkeypatch
):
    if rows_of_a_round is not None:
        monkeypatch.setattr(expert_exchange, "dispatch_rows", lambda *_: rows_of_a_round)
    prompts, want, want_counts = one_batch
    folder = load_fixture("deepseek_v3").folder
    got, counts = steps(MeshModel(folder, layout, exchange, cut=cut), prompts)
    np.testing.assert_array_equal(counts[:, :2], want_counts)
    assert not counts[:, 2:].any()
    np.testing.assert_allclose(got, want, atol=ROUNDING)


@pytest.mark.parametrize(
    ("name", "kernels", "tolerance"),
    [("qwen3_moe", XLA, ROUNDING), ("deepseek_v2_lite", KERNELS, LOGIT_TOLERANCE)],
)
def test_ordinary_attention_and_kernels_in_two_batches(name, kernels, tolerance):
    fixture = load_fixture(name)
    short, middle, long = sorted(fixture.prompts, key=lambda p: len(p["prompt"]))[-3:]
    prompts = [long, short, middle]
    options = {"kernels": kernels, "cut": 71}
    whole, cut = (
        MeshModel(fixture.folder, (2, 2, 2), prefill_rows=192, **more) for more in ({}, options)
    )
    want, want_counts = steps(whole, prompts)
    got, counts = steps(cut, prompts)
    np.testing.assert_array_equal(counts, want_counts)
    np.testing.assert_allclose(got, want, atol=tolerance)
