"""The benchmark of layouts: its arithmetic, and a run on two emulated devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from scripts import bench_parallel
from scripts.bench_parallel import Spread, account, chosen_layouts, exchange_us, read_args
from scripts.parallel_tables import decode_table, modelled_ms, overview, ratios
from serving.config import parse_args
from tests.fixtures import DATA
from tests.serving.engine.engines import fixture_engine, uncompiled

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--model-path", str(DATA / "deepseek_v2_lite"), "--load-format", "dummy", "--device", "cpu"),
    *("--page-size", "4", "--kv-memory-gib", "0.0005", "--limit-context", "64"),
    *("--batches", "2", "--contexts", "16", "--prefill", "1x16", "--exchange", "2"),
    *("--check-batch", "1", "--check-context", "16", "--steps", "1", "--repeats", "1"),
]


@pytest.fixture(scope="module")
def runner():
    with uncompiled():
        return fixture_engine("deepseek_v2_lite", tp=2, dp=2, ep=2).runner


def facts(devices, slices, tokens, **more):
    row = {"kind": "facts", "devices": devices, "slices": slices, "KV tokens": tokens}
    row |= {"KV tokens in memory": 10 * tokens, "capped": False, "moe layers": 26}
    return row | {"weight bytes": 1, "KV bytes": 1} | more


def decode(why, batch, ms, **more):
    row = {"kind": "decode", "why": why, "batch": batch, "ms": ms, "tok/s": 1e3 * batch / ms}
    return row | {"context": 1024} | more


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (
            [],
            [
                *("tp2", "tp2dp2ep2-none", "replicas", "tp2dp2ep2-all_to_all", "tp2ep2"),
                "tp2dp2ep2-none-overlap",
            ],
        ),
        (["--quick"], ["tp2", "tp2dp2ep2-none", "replicas"]),
        (["--layout", "replicas", "--layout", "mine: --tp 2"], ["replicas", "mine"]),
        (["--devices", "1"], ["tp1"]),
    ],
)
def test_layouts_are_flags_the_server_takes(flags, names):
    layouts = chosen_layouts(read_args(flags)[0])
    assert list(layouts) == names
    for text in layouts.values():
        parse_args(text.split())


def test_eight_devices_add_layouts_between():
    layouts = chosen_layouts(read_args(["--devices", "8"])[0])
    sizes = {
        (c.tp_size, c.dp_size, c.ep_size) for c in map(parse_args, map(str.split, layouts.values()))
    }
    assert sizes == {(8, 1, 1), (8, 8, 8), (1, 1, 1), (8, 4, 8), (8, 2, 8), (8, 1, 8)}
    with pytest.raises(ValueError, match="no default layout of 8 devices"):
        chosen_layouts(read_args(["--devices", "8", "--layout", "tp2"])[0])


def test_a_total_batch_is_spread_over_slices_and_copies(runner):
    counts = [len(s.decode) for s in Spread(runner, 1, 0).decode(5, 16).slices]
    assert counts == [3, 2]
    assert [len(s.decode) for s in Spread(runner, 2, 0).decode(5, 16).slices] == [2, 1]
    assert Spread(runner, 2, 0).fullest(5) == 2


def test_an_exchange_is_timed(runner):
    assert 0 < exchange_us(runner, 3, 1, 0) < 1e6


def test_a_random_pool_has_no_entry_left_out(runner):
    runner.randomise_pool(3)
    assert runner._kv.shape[:3] == (2, 3, runner.num_pages)
    assert (jnp.abs(runner._kv).max(axis=-1) > 0).all()
    assert float(runner._kv.std()) == pytest.approx(1, abs=0.02)


def test_a_profile_is_accounted():
    ms = 1e6
    events = [
        ("mla_decode", 0 * ms, 4 * ms),
        ("ncclDevKernel_AllGather_RING_LL", 2 * ms, 6 * ms),  # half of it beside the first
        ("experts_gate_up", 7 * ms, 10 * ms),
        ("experts_down_1", 10 * ms, 12 * ms),
        ("ncclDevKernel_ReduceScatter", 18 * ms, 20 * ms),
    ]
    assert account(events, 2) == pytest.approx(
        {
            "busy ms": 13 / 2,
            "idle %": 35.0,
            "collective ms": 6 / 2,
            "exposed collective ms": 4 / 2,
            "expert ms": 5 / 2,
        }
    )
    assert account([], 2) == {}


def test_a_step_is_modelled_by_its_parts():
    at = {"each": 64, "context": 1024, "devices": 2}
    results = {
        "one": [
            facts(1, 2, 100),
            decode("check", 128, 14.0, **{"each slice": 64, "expert ms": 10.0}),
            decode("check", 256, 16.0, **{"each slice": 128, "expert ms": 11.0}),
        ],
        "dpa": [
            facts(2, 2, 200),
            decode("check", 128, 11.0, **{"each slice": 64}),
            {"kind": "exchange", "tokens": 64, "us": 50.0},
        ],
    }
    row = modelled_ms(results, "one", "dpa", **at)
    assert row["step"] == "2x64"
    assert row["model ms"] == pytest.approx(14 - 10 + 11 / 2 + 26 * 0.05)
    assert row["measured / model"] == pytest.approx(11 / 10.8)
    results["dpa"].pop()
    assert modelled_ms(results, "one", "dpa", **at) is None


def test_layouts_are_compared_with_plain_tp():
    results = {
        "tp2": [facts(2, 1, 100), decode("limit", 10, 10.0), decode("table", 4, 8.0)],
        "dpa": [
            facts(2, 2, 200, **{"KV tokens in memory": 1880}),
            decode("limit", 20, 11.0),
            decode("table", 4, 10.0),
            {"kind": "decode", "why": "table", "batch": 8, "context": 9, "note": "does not fit"},
            {"kind": "skipped", "what": "prefill"},
        ],
        "bad": [{"kind": "failed", "note": "exit status 1"}],
    }
    row = ratios(results, "tp2", "dpa")
    assert (row["KV tokens"], row["in memory"]) == (2, 1.88)
    assert row["decode tok/s"] == pytest.approx(20 / 11)
    assert row["share of KV ratio"] == pytest.approx(10 / 11)
    assert (row["goal 1.9 of 2"], row["goal 0.9"]) == (False, True)
    (line,) = decode_table(results, ["tp2", "bad"], ["dpa"])
    assert line["DPA / TP"] == pytest.approx(0.8)
    assert (line["tp2"], line["dpa"], line["bad"]) == (500, 400, None)
    notes = [line.get("note") for line in overview(results)]
    assert notes == [None, "1 rows skipped by the time limit", "exit status 1"]


def test_layouts_run_one_after_the_other_on_two_devices():
    command = [sys.executable, str(ROOT / "scripts" / "bench_parallel.py"), *TINY]
    command += ["--layout", "tp2", "--layout", "tp2dp2ep2-none"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    tp, dpa, summary = lines
    for line, batch in ((tp, 14), (dpa, 28)):
        by_kind = {row["kind"]: row for row in line["rows"]}
        assert set(by_kind) == {"facts", "decode", "exchange", "prefill"}
        assert by_kind["facts"]["largest batch"] == batch
        assert all("note" not in row for row in line["rows"])
    (ratio,) = summary["tables"]["ratios"]
    assert ratio["KV tokens"] == 2
    assert "Decode, tokens/s" in done.stdout


def test_what_cannot_run_is_said(capsys):
    flags = [*TINY, "--layout", "three:--tp 2 --dp-size 3 --enable-dp-attention"]
    assert bench_parallel.main(flags) == 1
    assert "tp_size % dp_size == 0 not satisfied" in capsys.readouterr().out
    assert bench_parallel.main(["--layout", "nothing"]) == 2
