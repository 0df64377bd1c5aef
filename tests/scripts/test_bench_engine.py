"""The offline and the host benchmark at toy sizes: they measure what they say."""

import json

import pytest

from model.config import ModelConfig
from scripts import bench_host, bench_offline
from scripts.bench_offline import Bench, Scale, measure, read_flags
from serving.config import ConfigError
from tests.serving.engine.engines import fixture_engine

SCALE = Scale(
    decode_batches=(2, 8),
    decode_contexts=(24, 4000),
    decode_steps=6,
    prefills=((2, 16), (1, 5000)),
    throughput=(6, 12, 5),
    shared=(6, 2, 16, 4, 3),
)


@pytest.fixture(scope="module")
def rows():
    engine = fixture_engine()
    bench = Bench(engine, engine.runner.model.vocab_size, 1)
    rows = list(measure(bench, SCALE, bench_offline.WORKLOADS, 2))
    assert not engine.has_work
    assert all(load.used_tokens == 0 for load in engine.status())
    return rows


def test_decode_steps_are_measured_where_they_fit(rows):
    fits, slots, long, _ = (row for row in rows if row["workload"] == "decode")
    assert fits["ms/step"] > 0
    assert fits["out/s"] == pytest.approx(2e3 / fits["mean"])
    assert "more than the 4 slots" in slots["note"]
    assert "does not fit" in long["note"]


def test_rates_are_tokens_by_seconds(rows):
    prefill, beyond, throughput, shared = rows[4:]
    assert "does not fit" in beyond["note"]
    for row, tokens_in, tokens_out in ((prefill, 32, 2), (throughput, 72, 30), (shared, 120, 18)):
        assert (row["tokens in"], row["tokens out"]) == (tokens_in, tokens_out)
        assert row["out/s"] == pytest.approx(tokens_out / row["seconds"])
    assert throughput["hit rate"] == 0
    # Four of six requests find their group's prefix, whole pages of 4 tokens.
    assert shared["hit rate"] == pytest.approx(4 * 16 / 120)


def test_nothing_compiles_while_measuring(rows):
    assert sum(row.get("recompilations", 0) for row in rows) == 0


def test_a_shape_becomes_a_model_with_dummy_weights(tmp_path):
    flags = ["--shape", "deepseek-v2-lite", "--scale", "small", "--decode-steps", "7", "--tp", "1"]
    args, config, scale = read_flags(flags, tmp_path)
    assert (config.model_path, config.load_format) == (str(tmp_path), "dummy")
    assert scale.decode_steps == 7
    assert scale.prefills == bench_offline.SCALES["small"].prefills
    model = ModelConfig.from_folder(tmp_path)
    assert (model.vocab_size, model.hidden_size, model.num_experts) == (102400, 2048, 64)
    assert args.seed == 1


@pytest.mark.parametrize("flags", [["--workloads", "decode,sing"], ["--no-such-flag"]])
def test_unknown_flags_are_refused(flags, tmp_path):
    with pytest.raises(ConfigError):
        read_flags(flags, tmp_path)


@pytest.mark.parametrize("slices", [1, 2])
def test_the_parts_of_a_host_step_add_up(slices):
    args = bench_host.make_parser().parse_args(
        ["--batch", "3", "--context", "20", "--max-context", "64", "--steps", "20"]
    )
    row = bench_host.measure(args, slices)
    assert all(row[part] > 0 for part in bench_host.PARTS)
    assert 0 < row["host"] < 1000
    assert row["host"] >= max(row[part] for part in bench_host.COUNTED)
    assert row["target"] is None  # it is for a batch of 64
    assert json.dumps(row)
