"""The comparison with another engine: which measured number stands in which line."""

from __future__ import annotations

from scripts import bench_peer
from scripts.bench_peer import OFFLINE, STEP, compared


def test_numbers_stand_beside_their_goals():
    measured = [
        {"decode": "1x1024", "ms": 2.9},
        {"decode": "8x1024", "ms": 7.7},
        {"prefill": "16x2048", "tok/s": 95_001.0, "ms": 345.0},
        {"prefill": "1x2048", "tok/s": 60_000.0, "ms": 34.0},
        {"decode": "64x4096", "note": "does not fit"},
    ]
    lines = {line["what"]: line for line in compared(STEP, measured)}
    assert len(lines) == len(STEP)
    assert lines["1x1024"] == {
        **{"what": "1x1024", "unit": "ms", "measured": 2.9, "peer": 3.95, "goal": 3.0},
        "reached": "yes",
    }
    assert lines["8x1024"]["reached"] == "no"
    assert lines["16x2048"]["measured"] == 95_001.0
    assert lines["1x2048"]["measured"] == 34.0
    assert lines["64x4096"]["measured"] is None
    assert "reached" not in lines["64x4096"]


def test_the_workloads_are_those_of_the_offline_benchmark(monkeypatch, capsys):
    results = {
        "bench_offline.py": {
            "rows": [
                {"workload": "512 in / 128 out", "out/s": 13_000.0},
                {"workload": "16 shared 1024 + 128 in / 64 out", "out/s": 9_000.0},
            ],
            "engine": {"kv_tokens": 1_500_000},
            "ready_seconds": 91.0,
        },
        "bench_step.py": {"rows": [{"decode": "1x1024", "ms": 2.0}], "ready_seconds": 20.0},
    }
    given = {}

    def run(script, *flags):
        given[script] = flags
        return results[script]

    monkeypatch.setattr(bench_peer, "run", run)
    assert bench_peer.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:6]] == ["yes", "no", "yes", "no", "yes"]
    assert next(line for line in lines if line.startswith("compiled before")).endswith("yes")
    # The second finds the first one's programs: one folder, and one size of the pool.
    folders = {flags[flags.index("--compilation-cache-dir") + 1] for flags in given.values()}
    assert len(folders) == 1
    flags = given["bench_step.py"]
    assert flags[flags.index("--max-total-tokens") + 1] == "1500000"
    # Alone it finds nothing, so that its start is no second one.
    assert bench_peer.main(["--only", "step", "--bandwidth", "4.3e12"]) == 0
    assert given["bench_step.py"][-2:] == ("--bandwidth", "4.3e12")
    lines = capsys.readouterr().out.splitlines()
    assert "-" in next(line for line in lines if line.startswith("compiled before"))
    assert len(OFFLINE) == 4


def test_a_benchmark_that_fails_is_said(capsys):
    assert bench_peer.main(["--only", "step", "--device", "nonsense"]) == 1
    assert "bench_step.py ended with status" in capsys.readouterr().err


def test_peers_are_behind_the_goals():
    for line in (*STEP, *OFFLINE):
        if line.peer is not None:
            assert (line.goal < line.peer) == (line.key == "ms"), line
