"""The benchmark of the exchange, small: tokens come back as they went, and every row is there."""

from __future__ import annotations

import json

import pytest

from scripts import bench_exchange

SMALL = ["--device", "cpu", "--width", "32", "--experts", "16", "--exchanges-per-run", "2"]
MESH = ["--tp", "8", "--dp", "4", "--ep", "8", "--runs", "2"]


def measured(capsys, *flags):
    assert bench_exchange.main([*SMALL, *MESH, *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_every_exchange_brings_tokens_back(capsys):
    flags = ("--tokens", "4,800", "--sums", "fast,in_order", "--top-k", "2")
    rows = measured(capsys, *flags)
    assert len(rows) == 2 * 2 * 2 * 2
    for row in rows:
        assert row["us"] > 0
        assert row["moved by"] < (0.1 if row["dispatch"] == "fp8_e4m3" else 1e-5)
    assert {r["rows"] for r in rows if "all_to_all" in r["exchange"]} == {2, 152}


def test_sets_of_options_are_compiled_each(capsys):
    flags = ("--tokens", "4", "--exchanges", "none", "--dispatch", "auto", "--shared-width", "8")
    options = ("--xla", "plain:", "--xla", "other:xla_cpu_enable_fast_math=false")
    rows = measured(capsys, *flags, *options, "--xla", "wrong:xla_no_such_option=1")
    assert [row["xla"] for row in rows] == ["plain", "other", "wrong"]
    assert "xla_no_such_option" in rows[2]["note"]
    assert rows[0]["us"] > rows[0]["exchange us"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--exchanges", "deepep"], "deepep"),
        (["--dispatch", "auto,fp8"], "--dispatch: fp8 is none of auto, fp8_e4m3"),
        (["--sums", "exact"], "--sums: exact is none of fast, in_order"),
        (["--experts", "12"], "multiple of 8"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(capsys, flags, sentence):
    assert bench_exchange.main([*SMALL, *MESH, *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
