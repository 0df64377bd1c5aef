"""The benchmark of an engine's own steps at a toy size: it measures what it says."""

from __future__ import annotations

import pytest

from scripts import bench_step
from scripts.bench_step import (
    Floors,
    Plans,
    collective_time,
    experts_touched,
    make_parser,
    measure,
)
from tests.serving.engine.engines import fixture_engine

FLAGS = ["--decode", "2x24,8x24,2x9000", "--prefill", "3x50,1x9000", "--steps", "2"]


@pytest.fixture(scope="module")
def runner():
    return fixture_engine("deepseek_v2_lite").runner


def test_rows_are_measured_where_they_fit(runner):
    args = make_parser().parse_args([*FLAGS, "--repeats", "2", "--profile"])
    prefill, long, decode, slots, beyond = measure(runner, args)
    assert prefill["steps"] == 3  # 150 tokens in steps of 64
    assert prefill["tok/s"] == pytest.approx(150e3 / prefill["ms"])
    assert decode["tok/s"] == pytest.approx(2e3 / decode["ms"])
    assert decode["x floor"] == pytest.approx(decode["ms"] / decode["floor ms"])
    assert "more than the 4 slots" in slots["note"]
    assert all("does not fit" in row["note"] for row in (long, beyond))
    assert "kernels/step" not in decode  # a CPU has none to count


def test_prompts_are_packed_into_whole_steps(runner):
    plans = Plans(runner, 1).prefill(3, 50, 50)
    chunks = [[(c.start, len(c.tokens), c.samples) for c in p.slices[0].prefill] for p in plans]
    assert chunks == [
        [(0, 50, True), (0, 14, False)],
        [(14, 36, True), (0, 28, False)],
        [(28, 22, True)],
    ]
    pages = [set(c.pages) for p in plans for c in p.slices[0].prefill]
    assert pages[0].isdisjoint(pages[1])
    assert all(0 not in p for p in pages)


def test_floors_count_every_weight_once(runner):
    floors, config = Floors.of(runner), runner.model
    experts = floors.moe_layers * config.num_experts * floors.expert
    assert floors.dense + experts + config.vocab_size * config.hidden_size == sum(
        p.real_shape and int(bench_step.np.prod(p.real_shape)) for p in runner.spec.params
    )
    assert floors.touched(1) == pytest.approx(config.num_experts_per_token)
    assert floors.decode_bytes(2, 10) - floors.decode_bytes(2, 9) == 2 * 4 * 48 * 3


def test_collective_time_is_hidden_where_another_kernel_runs():
    events = [
        ("fusion_1", 0, 10),
        ("ncclDevKernel_AllGather_RING_LL", 5, 25),  # 10 to 15 alone
        ("gemm", 15, 20),
        ("fusion_2", 18, 22),  # 22 to 25 alone
        ("ncclDevKernel_SendRecv", 30, 40),  # all alone, two at once
        ("ncclDevKernel_AllReduce", 35, 40),
    ]
    assert collective_time(events) == (30, 18)
    assert collective_time([("gemm", 0, 5)]) == (0, 0)


def test_experts_of_a_batch_are_counted(runner):
    few, many = experts_touched(runner, 1, 0), experts_touched(runner, 64, 0)
    assert few == runner.model.num_experts_per_token
    assert few < many <= runner.model.num_experts
