"""The engine on eight devices: slices in different modes, padding, and one answer everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from serving.engine.engine import CompileCounter
from tests.fixtures import GQA_FIXTURES, load_fixture
from tests.harness import MeshModel, SliceRows
from tests.serving.engine.engines import finish, fixture_engine, request, uncompiled

PAGES = list(range(1, 55))


@pytest.mark.parametrize(
    ("layout", "exchange"), [((8, 8, 8), "all_to_all"), ((8, 4, 4), "none"), ((8, 1, 8), "none")]
)
def test_greedy_tokens_on_the_mesh(layout, exchange):
    tp, dp, ep = layout
    engine = fixture_engine(tp=tp, dp=dp, ep=ep, exchange=exchange)
    fixture = load_fixture("deepseek_v3")
    expected = [*fixture.prompts, *fixture.expected["text_prompts"], *fixture.expected["chats"]]
    counter = CompileCounter()
    tokens = finish(engine, [request(str(i), p["prompt"]) for i, p in enumerate(expected)])
    for i, p in enumerate(expected):
        assert tokens[str(i)] == p["tokens"]
    assert counter.count == 0
    if dp > 1:
        assert engine.totals.count < 32 * len(expected) / 2  # the slices worked at the same time


@pytest.mark.parametrize("name", GQA_FIXTURES)
def test_ordinary_attention_on_the_mesh(name, caplog):
    """DP attention works for it too, and the log says that it gains little."""
    with caplog.at_level("WARNING", "meshserve.engine"):
        engine = fixture_engine(name, tp=4, dp=2)
    assert "DP attention gains little" in caplog.text
    assert "2 of them" in caplog.text
    with uncompiled():
        whole = fixture_engine(name, tp=1).runner
    assert engine.runner.page_bytes * 2 == whole.page_bytes  # KV heads are cut over 2 devices
    prompts = load_fixture(name).prompts
    tokens = finish(engine, [request(p["id"], p["prompt"]) for p in prompts])
    assert all(tokens[p["id"]] == p["tokens"] for p in prompts)


def test_no_warning_where_dp_attention_gains(caplog):
    with uncompiled(), caplog.at_level("WARNING", "meshserve.engine"):
        fixture_engine(tp=2, dp=2)
        fixture_engine("llama", tp=2)
    assert "DP attention" not in caplog.text


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "minimax_m2", "mistral4"])
def test_experts_of_other_architectures_on_the_mesh(name):
    engine = fixture_engine(name, tp=4, dp=2, ep=4, exchange="all_to_all")
    prompts = load_fixture(name).prompts
    tokens = finish(engine, [request(p["id"], p["prompt"]) for p in prompts])
    assert all(tokens[p["id"]] == p["tokens"] for p in prompts)


@pytest.mark.parametrize("exchange", ["none", "all_to_all"])
def test_one_step_with_slices_in_four_modes(exchange):
    """One slice prefills, one decodes, one does both, one is idle: each as if alone."""
    prompts = load_fixture("deepseek_v3").prompts
    logits = load_fixture("deepseek_v3").logits
    model = MeshModel(load_fixture("deepseek_v3").folder, (8, 4, 8), exchange)
    long, short, other = prompts[5], prompts[3], prompts[4]
    idle = SliceRows()

    def prefix(prompt, n):
        return SliceRows(chunks=[(prompt["prompt"][:n], 0, PAGES)])

    model.step([idle, prefix(short, 32), prefix(other, 62), idle])
    results, counts = model.step(
        [
            SliceRows(chunks=[(long["prompt"], 0, PAGES)]),
            SliceRows(decode=[(short["prompt"][32], 32, PAGES)]),
            SliceRows(
                decode=[(other["prompt"][62], 62, PAGES)],
                chunks=[(long["prompt"][:40], 0, range(60, 100))],
            ),
            idle,
        ]
    )
    rows = [100, 1, 41, 0]
    k = model.config.num_experts_per_token
    assert counts.sum(axis=2).tolist() == [[n * k] * 3 for n in rows]
    got = [
        (results[0][1][0], logits["p05"]),
        (results[1][0][0], logits["p03"][32]),
        (results[2][0][0], logits["p04"][62]),
        (results[2][1][0], logits["p05"][:40]),
    ]
    for have, want in got:
        assert np.abs(have - want).max() < 2e-3


def test_padding_changes_neither_logits_nor_expert_counts():
    """The same rows in programs of different sizes, beside busy or idle slices."""
    fixture = load_fixture("deepseek_v3")
    prompt = fixture.prompts[3]
    seen = []
    for decode_rows, prefill_rows, chunks in ((1, 40, 1), (8, 192, 3)):
        model = MeshModel(
            fixture.folder,
            (2, 2, 2),
            decode_rows=decode_rows,
            prefill_rows=prefill_rows,
            chunks=chunks,
        )
        mine = SliceRows(chunks=[(prompt["prompt"], 0, PAGES)])
        for neighbour in (
            SliceRows(),
            SliceRows(chunks=[(fixture.prompts[2]["prompt"], 0, PAGES)]),
        ):
            results, counts = model.step([mine, neighbour])
            seen.append((results[0][1][0], counts[0]))
    for logits, counts in seen[1:]:
        np.testing.assert_array_equal(counts, seen[0][1])
        assert np.abs(logits - seen[0][0]).max() < 1e-4


def test_eight_slices_hold_eight_times_the_tokens():
    """Equal bytes a device: dp 8 holds 8 times what tp 8 holds, in live requests."""
    prompt = load_fixture("deepseek_v3").prompts[3]["prompt"]
    live = {}
    for dp in (1, 8):
        engine = fixture_engine(
            tp=8,
            dp=dp,
            ep=8,
            max_total_tokens=200,
            decode_buckets=(8,),
            extend_buckets=(48,),
            disable_radix_cache=True,
        )
        kv = engine.runner.kv_bytes_per_device()
        assert kv == 51 * engine.runner.page_bytes
        for i in range(8 * dp):  # more than have room at a time
            engine.add(request(str(i), prompt, max_tokens=16))
        most = 0
        while engine.has_work:
            engine.step()
            loads = engine.status()
            most = max(most, sum(load.running for load in loads))
        live[dp] = (kv, most)
    assert live[1][0] == live[8][0]
    assert 8 > live[1][1] > 0
    assert live[8][1] == 8 * live[1][1]
