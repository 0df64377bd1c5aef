"""The benchmark of a long prompt's cost to others: each policy does what its name says."""

import pytest

from scripts.bench_imbalance import make_parser, measure, phase_policy
from serving.config import ServerConfig
from serving.scheduler.phases import PhasePolicy
from tests.fixtures import DATA
from tests.serving.engine.engines import fixture_engine

FLAGS = ["--batch", "2", "--context", "8", "--prompt-tokens", "200", "--repeats", "2"]


@pytest.fixture(scope="module")
def rows():
    flags = {"extend_buckets": (64,), "decode_buckets": (4,), "max_total_tokens": 2048}
    engine = fixture_engine("deepseek_v2_lite", tp=2, dp=2, ep=2, **flags)
    config = ServerConfig(
        model_path=str(DATA / "deepseek_v2_lite"), tp_size=2, dp_size=2, ep_size=2
    )
    args = make_parser().parse_args(
        [*FLAGS, "--budgets", "32,64,128", "--policies", "mixed,interleaved:3,aligned:5"]
    )
    rows = list(measure(engine.runner, config, args, float("inf")))
    late = list(measure(engine.runner, config, args, 0.0))
    assert {row["note"] for row in late} == {"skipped by the time limit"}
    return {(row["policy"], row["budget"]): row for row in rows}


def test_a_budget_that_no_program_has_is_left_out(rows):
    assert sorted({budget for _, budget in rows}) == [32, 64]


def test_every_row_has_both_kinds_of_gaps(rows):
    for row in rows.values():
        assert row["recompilations"] == 0
        assert 0 < row["other p50"] <= row["other p99"] <= row["other max"]
        assert 0 < row["own p50"] <= row["own max"] <= row["first token ms"] + row["calm ms"] * 50
        assert row["first token ms"] >= row["other p50"]


def test_decode_steps_between_chunks_give_more_tokens_meanwhile(rows):
    """Tokens until the first one of the long prompt: 200 tokens are 4 steps of 64."""

    # A token a step: the chunks, the steps between them, and up to two in flight.
    assert 3 <= rows["mixed", 64]["tokens meanwhile"] <= 6
    assert 3 + 3 * 3 <= rows["interleaved:3", 64]["tokens meanwhile"] <= 6 + 4 * 3
    assert 4 * 5 <= rows["aligned:5", 64]["tokens meanwhile"] <= 6 + 5 * 6
    assert rows["mixed", 32]["tokens meanwhile"] > rows["mixed", 64]["tokens meanwhile"]


def test_policies_are_the_flags_of_the_server():
    assert phase_policy("mixed") == PhasePolicy()
    assert phase_policy("interleaved:4") == PhasePolicy(interval=4)
    assert phase_policy("aligned:30") == PhasePolicy(max_delay=30)
    for text in ("mixed:1", "interleaved", "late:3"):
        with pytest.raises(ValueError, match=r"none of mixed|invalid literal"):
            phase_policy(text)
