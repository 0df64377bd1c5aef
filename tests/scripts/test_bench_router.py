"""The router's benchmarks run from end to end, in small."""

import json

import pytest

from scripts import bench_router
from scripts.router_load import sessions_of, text_of

pytestmark = pytest.mark.timeout(120)

SMALL = ["--runs", "1", "--seconds", "0.3", "--warmup", "0.1", "--workers", "2"]


def measured(capsys, *flags):
    assert bench_router.main([*flags, *SMALL]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_overhead(capsys):
    rows = measured(capsys, "overhead", "--concurrency", "4", "--stream-tokens", "8")
    kinds = [(row["kind"], row["router"]) for row in rows]
    assert kinds == [("json", "direct"), ("json", "ours"), ("sse", "direct"), ("sse", "ours")]
    assert all(row["errors"] == 0 and row["done"] > 0 for row in rows)
    for row in rows:
        if row["kind"] == "sse":
            assert row["events"] == 9 * row["done"]


def test_routing(capsys):
    flags = ["--workloads", "gsp", "--policies", "cache_aware", "--scale", "0.05"]
    (row,) = measured(capsys, "routing", *flags, "--tpot", "0.001")
    assert (row["requests"], row["failed"]) == (30, 0)
    assert 0 <= row["hit rate"] < 1


def test_memory(capsys):
    rows = measured(capsys, "memory", "--requests", "500")
    assert rows[-1]["requests"] >= 500
    assert all(row["MiB"] > 1 and row["errors"] == 0 for row in rows)


@pytest.mark.parametrize("workload", ["gsp", "zipf", "chat"])
def test_workloads_are_seeded(workload):
    one, same, other = (sessions_of(workload, seed=seed, scale=0.1) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) == (15 if workload == "chat" else 61)
    assert all(len(s.turns) == (4 if workload == "chat" else 1) for s in one)


def test_a_router_that_does_not_start_is_one_sentence(capsys):
    assert bench_router.main(["overhead", "--peer", "false", *SMALL]) == 1
    assert "The router ended at its start" in capsys.readouterr().err


def test_the_text_of_a_stream():
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant"}}]},
        {"choices": [{"index": 0, "delta": {"content": "a"}}]},
        {"choices": [{"index": 0, "text": "b"}]},
        {"choices": []},
    ]
    stream = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    assert text_of(stream + b"data: [DONE]\n\n") == "ab"
