"""The scheduler in virtual time: what a step costs, and that clock and clients are right."""

import json

import pytest

from scripts.simulate_scheduler import Costs, Simulation, main
from scripts.workloads import Session, Vocabulary, independent, shared_prefix
from serving.request import SamplingParams
from serving.scheduler.plan import DecodeRow, PrefillChunk, SlicePlan, StepPlan
from serving.scheduler.scheduler import SchedulerConfig

COSTS = Costs(
    decode=((1, 1.0), (4, 2.0)),
    extend=(8, 32),
    prefill_token=0.1,
    context_token=0.01,
    launch=0.5,
)
PARAMS = SamplingParams(max_tokens=1)


def config(**changes):
    sizes = {
        "num_slices": 2,
        "slots_per_slice": 4,
        "pages_per_slice": 65,
        "page_size": 4,
        "prefill_tokens_per_step": 32,
        "prefill_rows_per_step": 8,
        "max_context_tokens": 128,
    }
    return SchedulerConfig(**sizes | changes)


def decode(*positions):
    return tuple(DecodeRow(str(p), 0, p, (1,), PARAMS) for p in positions)


def prefill(*sizes):
    return tuple(PrefillChunk(str(n), 0, (5,) * n, 0, (1,), True, PARAMS) for n in sizes)


@pytest.mark.parametrize(
    ("slices", "seconds"),
    [
        ([SlicePlan(decode=decode(9)), SlicePlan()], 0.5 + 1.0 + 0.1),
        ([SlicePlan(decode=decode(9, 9)), SlicePlan(decode=decode(4))], 0.5 + 2.0 + 0.2),
        ([SlicePlan(prefill=prefill(3, 4)), SlicePlan(prefill=prefill(5))], 0.5 + 2.0 + 0.8),
        ([SlicePlan(prefill=prefill(9), decode=decode(9)), SlicePlan()], 0.5 + 2.0 + 3.2 + 0.1),
    ],
)
def test_a_step_costs_the_fullest_slices_program(slices, seconds):
    assert COSTS.step(StepPlan(slices=tuple(slices))) == pytest.approx(seconds)


def test_without_buckets_every_token_counts():
    costs = Costs(decode=((9, 2.0),), extend=(), prefill_token=0.1)
    assert costs.step(StepPlan(slices=(SlicePlan(prefill=prefill(5)),))) == pytest.approx(0.5)


def test_one_request_takes_a_prefill_and_its_decode_steps():
    session = Session(group=0, prefix=(), turns=((5,) * 7,), max_tokens=3)
    simulation = Simulation(config(), COSTS)
    simulation.open_loop([session], iter([10.0]))
    first = 0.5 + 2.0 + 0.8
    gaps = [0.5 + 1.0 + 0.08, 0.5 + 1.0 + 0.09]
    assert simulation.ttft == [pytest.approx(first)]
    assert simulation.gaps == pytest.approx(gaps)
    assert simulation.now == pytest.approx(10 + first + sum(gaps))


def test_a_turn_waits_for_the_one_before_and_repeats_it():
    session = Session(group=0, prefix=(5,) * 8, turns=((6,) * 4, (7,) * 4), max_tokens=4)
    simulation = Simulation(config(), COSTS)
    simulation.closed_loop([session], concurrency=1)
    summary = simulation.summary()
    assert len(simulation.latency) == 2
    # Second turn: 12 tokens of the first prompt and 4 of its answer, of which the last is not
    # written, so 3 pages; of 12 + 20 tokens in all.
    assert summary["hit rate"] == pytest.approx(12 / 32)
    assert simulation.now == pytest.approx(sum(simulation.latency))


def test_clients_of_a_closed_loop_are_never_more_than_asked_for():
    sessions = independent(Vocabulary(99, 1), requests=12, input_tokens=8, output_tokens=4)
    simulation = Simulation(config(), COSTS)
    most = 0
    step = simulation._step

    def watched():
        nonlocal most
        most = max(most, len(simulation._clients))
        step()

    simulation._step = watched
    simulation.closed_loop(sessions, concurrency=3)
    assert most == 3
    assert len(simulation.latency) == 12


def test_affinity_is_worth_something_when_prefixes_exceed_a_cache():
    """Eight prefixes of 64 tokens, of which one slice's pool holds about half."""

    def hit_rate(method):
        sessions = shared_prefix(
            Vocabulary(99, 1),
            groups=8,
            requests=96,
            prefix_tokens=64,
            question_tokens=4,
            output_tokens=2,
        )
        simulation = Simulation(config(pages_per_slice=97, load_balance=method), COSTS)
        simulation.closed_loop(sessions, concurrency=4)
        return simulation.summary()["hit rate"]

    assert hit_rate("cache_aware") > 1.2 * hit_rate("round_robin")


def test_the_command_prints_tables_and_a_line(capsys):
    small = ["--slices", "2", "--loads", "5", "--phase-requests", "4", "--requests", "16"]
    assert main([*small, "--workloads", "chat", "--methods", "cache_aware"]) == 0
    out = capsys.readouterr().out.splitlines()
    line = json.loads(out[-1])
    assert [row["policy"] for row in line["phases"]] == ["mixed", "interleaved 4", "aligned 30"]
    assert [row["method"] for row in line["balance"]] == ["cache_aware"]
    assert all(row["out/s"] > 0 for row in line["phases"] + line["balance"])
