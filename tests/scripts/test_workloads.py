"""What the benchmarks share: seeded workloads, percentiles, tables, the JSON line."""

import itertools
import json
from collections import Counter

import pytest

from scripts import benchmarking, workloads
from scripts.workloads import FIRST_TOKEN, Vocabulary

SIZES = {"prefix_tokens": 20, "question_tokens": 5, "output_tokens": 3}


def gsp(seed=1, zipf=0.0):
    return workloads.shared_prefix(Vocabulary(50, seed), groups=8, requests=80, zipf=zipf, **SIZES)


def chats(seed=1):
    return workloads.multi_turn(
        Vocabulary(50, seed), groups=8, conversations=10, turns=3, zipf=0.9, **SIZES
    )


@pytest.mark.parametrize("make", [gsp, chats])
def test_a_seed_names_a_workload(make):
    assert make() == make()
    assert make() != make(seed=2)


def test_groups_share_their_prefix_and_nothing_else():
    sessions = gsp()
    assert Counter(s.group for s in sessions) == dict.fromkeys(range(8), 10)
    assert [s.group for s in sessions] != sorted(s.group for s in sessions)
    assert len({s.prefix for s in sessions}) == 8
    assert len({(s.group, s.prefix) for s in sessions}) == 8
    assert len({s.turns for s in sessions}) == 80
    assert {len(s.prefix) for s in sessions} == {20}
    assert {len(t) for s in sessions for t in s.turns} == {5}


def test_zipf_prefers_the_first_groups():
    counts = Counter(s.group for s in gsp(zipf=1.5))
    assert counts[0] > 2 * counts[3] > 0


def test_conversations_have_turns():
    assert workloads.num_turns(chats()) == 30
    assert all(len(s.turns) == 3 for s in chats())


def test_lengths_vary_within_the_spread():
    def lengths(spread):
        sessions = workloads.independent(
            Vocabulary(50, 1), requests=300, input_tokens=40, output_tokens=10, spread=spread
        )
        return [len(s.turns[0]) for s in sessions], [s.max_tokens for s in sessions]

    assert [set(values) for values in lengths(0.0)] == [{40}, {10}]
    ins, outs = lengths(0.5)
    assert (min(ins), max(ins), min(outs), max(outs)) == (20, 60, 5, 15)


def test_tokens_are_in_the_vocabulary():
    assert set(Vocabulary(FIRST_TOKEN + 2, 1).draw(200)) == {FIRST_TOKEN, FIRST_TOKEN + 1}
    with pytest.raises(ValueError, match="more than 3 tokens"):
        Vocabulary(FIRST_TOKEN, 1)


def test_arrivals_come_at_their_rate():
    times = list(itertools.islice(workloads.poisson_arrivals(20.0, 1), 2000))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(100, rel=0.1)


def test_percentiles_are_among_the_values():
    values = [5, 1, 4, 2, 3]
    assert [benchmarking.percentile(values, p) for p in (0, 20, 50, 99, 100)] == [1, 1, 3, 5, 5]
    columns = benchmarking.spread(values, "ms", 10)
    assert columns == {"ms mean": 30.0, "ms p50": 30, "ms p90": 50, "ms p99": 50}
    assert benchmarking.table([benchmarking.spread([], "ms")]).split("\n")[1].split() == ["-"] * 4


def test_a_table_has_a_column_for_every_key():
    text = benchmarking.table([{"name": "a", "x": 12345}, {"name": "bcd", "y": 0.12345}])
    assert text == "name       x       y\na     12,345       -\nbcd        -  0.1235"


def test_the_line_is_json_without_nan(capsys):
    benchmarking.emit("test", rows=[{"a": float("nan"), "b": 1 / 3}], sizes=(1, 2))
    line = json.loads(capsys.readouterr().out)
    assert line.pop("commit")
    expected = {"benchmark": "test", "rows": [{"a": None, "b": 0.333333}], "sizes": [1, 2]}
    assert line == expected
