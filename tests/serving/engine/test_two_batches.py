"""Two-batch overlap in the engine: where steps are cut, what is refused, and the same answers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from serving.config import ConfigError, ServerConfig, parse_args
from serving.engine.batch_builder import Packing, cut_tokens
from serving.engine.buckets import Shape, make_buckets
from serving.engine.engine import CompileCounter
from serving.request import SamplingParams
from serving.scheduler.plan import DecodeRow, PrefillChunk, SlicePlan
from tests.fixtures import LOGIT_TOLERANCE, load_fixture
from tests.serving.engine.engines import fixture_engine, request
from tests.serving.engine.random_steps import OVERLAP, play

DPA = ["--tp", "2", "--dp-size", "2", "--ep", "2", "--enable-dp-attention"]
SAMPLING = SamplingParams(max_tokens=1, temperature=0.0)


# ---- where a step is cut ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "beside", "threshold", "want"),
    [
        ([30, 30], 0, 0.48, 30),  # two equal prompts
        ([28, 30], 0, 0.48, 28),  # 48.3 % in the smaller half
        ([25, 35], 0, 0.48, 30),  # 41.7 %: inside the second
        ([25, 35], 0, 0.4, 25),
        ([10, 50], 0, 0.0, 10),  # 0 never cuts a prompt
        ([60], 0, 0.0, 0),  # not even the only one
        ([60], 0, 0.48, 30),
        ([60], 0, 0.5, 30),
        ([20, 10, 30], 0, 0.48, 30),
        ([30, 10], 20, 0.48, 10),  # 20 decode rows are in the first half
        ([10, 10], 40, 0.48, 0),  # more decode rows than tokens: all that is left
        ([], 5, 0.48, 0),
    ],
)
def test_where_a_slices_tokens_are_cut(sizes, beside, threshold, want):
    cut = cut_tokens(sizes, beside=beside, first_room=100, second_room=100, threshold=threshold)
    assert cut == want


def test_no_half_gets_more_than_it_has_room_for():
    """A full bucket is cut at the program's own row; 0 then cuts a prompt after all."""

    def cut(sizes, threshold, beside=0):
        return cut_tokens(sizes, beside=beside, first_room=40, second_room=60, threshold=threshold)

    assert cut([100], 0.0) == cut([100], 0.5) == 40
    assert cut([50, 45], 0.48) == 40
    assert cut([70], 0.0) == 35  # neither 0 nor 70 is possible, so the middle is as good as any
    assert cut([65, 5], 0.0) == 35
    assert cut([30, 40], 0.0) == 30
    for sizes in itertools.product(range(1, 50, 7), repeat=2):
        for threshold in (0.0, 0.3, 0.5):
            for beside in (0, 3, 30):
                first = cut(sizes, threshold, beside)
                assert 0 <= first <= 40
                assert 0 <= sum(sizes) - first <= 60


def test_chunks_stand_where_the_program_cuts_them():
    """The first chunk's row is such that the cut, a fixed row, meets the wanted token."""
    shape = Shape(decode_rows=4, prefill_rows=64, chunks=4, cut=34)
    packing = Packing(shape=shape, table_width=4, num_slots=4, threshold=0.48)

    def first(decode, *sizes):
        return packing.first_prefill_row(
            SlicePlan(
                decode=tuple(DecodeRow("d", i, 3, (1,), SAMPLING) for i in range(decode)),
                prefill=tuple(
                    PrefillChunk("c", i, (5,) * n, 0, (1,), True, SAMPLING)
                    for i, n in enumerate(sizes)
                ),
            )
        )

    assert first(0, 20) == 30 - 10
    assert first(0, 10, 10) == 30 - 10
    assert first(4, 10, 14) == 30 - 10
    assert first(0, 64) == 0
    assert first(0, 40, 20) == 0
    assert first(3) == 0


def test_which_programs_are_cut():
    flags = {"decode_buckets": (1, 8, 32), "extend_buckets": (16, 64, 512, 2048)}
    overlap = {"enable_two_batch_overlap": True, "dp_size": 2, "tp_size": 2}

    def cuts(**more):
        config = ServerConfig(**flags, **more)
        b = make_buckets(config, platform="cpu", num_slices=2, max_context=4096)
        return {str(shape): shape.cut for shape in b.shapes() if shape.cut}

    assert cuts() == {}
    assert cuts(**overlap) == {}  # small programs gain nothing
    assert cuts(**overlap, tbo_min_prefill_tokens=512) == {
        "extend 512 beside 32": 32 + 256,  # whole blocks of 128 prefill rows
        "extend 2048 beside 32": 32 + 1024,
    }
    assert cuts(**overlap, tbo_min_prefill_tokens=1, tbo_min_decode_rows=8) == {
        "extend 64 beside 32": 48,
        "extend 512 beside 32": 32 + 256,
        "extend 2048 beside 32": 32 + 1024,
        "decode 8": 4,
        "decode 32": 16,
    }  # 16 prefill rows are fewer than the decode rows beside them
    flags = {"decode_buckets": (16, 64), "extend_buckets": (512,)}
    assert cuts(**overlap, tbo_min_prefill_tokens=1) == {
        "extend 512 beside 64": 64 + 256,
        "extend 512 beside 16": 16 + 256,
    }


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--enable-two-batch-overlap"], None),  # whatever devices there are
        ([*DPA, "--enable-two-batch-overlap"], None),
        (["--tp", "2", "--ep", "2", "--enable-two-batch-overlap"], "has nothing to overlap here"),
        (["--tp", "2", "--enable-two-batch-overlap"], "needs DP attention"),
        (
            [*DPA, "--enable-two-batch-overlap", "--enable-deterministic-inference"],
            "does not go with --enable-deterministic-inference",
        ),
        (["--tbo-token-distribution-threshold", "0.6"], "between 0 and 0.5, got 0.6"),
        (["--tbo-token-distribution-threshold", "-0.1"], "between 0 and 0.5, got -0.1"),
        (["--tbo-min-prefill-tokens", "0"], "must be at least 1"),
    ],
)
def test_flags(flags, text):
    if text is None:
        assert parse_args(flags).enable_two_batch_overlap
        return
    with pytest.raises(ConfigError, match=text):
        parse_args(flags)


def test_an_exchange_over_one_slice_may_be_overlapped():
    flags = ["--tp", "2", "--ep", "2", "--moe-a2a-backend", "all_to_all"]
    assert parse_args([*flags, "--enable-two-batch-overlap"]).enable_two_batch_overlap


def test_a_model_without_experts_is_refused():
    with pytest.raises(ConfigError, match="model of this size has no experts"):
        fixture_engine("llama", tp=2, dp=2, enable_two_batch_overlap=True)


# ---- the same answers ------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.48])
def test_tokens_and_scores_equal_the_reference(threshold):
    fixture = load_fixture("deepseek_v3")
    engine = fixture_engine(tp=2, dp=2, ep=2, tbo_token_distribution_threshold=threshold, **OVERLAP)
    assert all(shape.cut for shape in engine.runner.buckets.shapes())
    counter = CompileCounter()
    scored = {}
    for p in fixture.prompts:
        plain = request(p["id"], p["prompt"])
        engine.add(replace(plain, prompt_logprobs=0))
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for outcome in engine.step():
            tokens.setdefault(outcome.rid, []).append(outcome.token_id)
            if outcome.first is not None:
                scored[outcome.rid] = outcome.first.scores
    for p in fixture.prompts:
        assert tokens[p["id"]] == p["tokens"]
        logits = fixture.logits[p["id"]].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        want = logprobs[np.arange(len(p["prompt"]) - 1), p["prompt"][1:]]
        got = [score.logprob for score in scored[p["id"]]]
        np.testing.assert_allclose(got, want, atol=LOGIT_TOLERANCE)
    assert counter.count == 0


def test_the_pool_is_updated_in_place():
    """Two micro-batches write it once a layer: no copy."""
    runner = fixture_engine(tp=2, dp=2, ep=2, max_total_tokens=1 << 16, **OVERLAP).runner
    pool = runner.kv_bytes_per_device()
    assert pool > 48 << 20
    for shape in runner.buckets.shapes():
        assert shape.cut
        memory = runner.memory_analysis(shape)
        assert memory.temp_size_in_bytes < pool / 8, shape
        assert memory.alias_size_in_bytes >= pool


@pytest.mark.timeout(240)
def test_random_steps():
    """On more layouts, in more buckets, 1,000 of them:
    `python -m tests.serving.engine.random_steps 1000`."""
    happened = play((8, 4, 8), "all_to_all", steps=30, seed=1, decode_buckets=(8,))
    assert happened["aborts"] > 0
    assert happened["steps with slices in 3 modes"] > 0
