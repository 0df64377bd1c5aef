"""All numbers that are compared with another engine, in one call: steps, prefill, whole workloads.

Runs scripts/bench_offline.py and scripts/bench_step.py on one GPU with the DeepSeek-V2-Lite shape
(dummy weights in bfloat16 that route evenly), one after the other, and sets what they measured
beside vLLM 0.26 on an H100 and the goals. The first starts with nothing compiled; the second has
the same programs and finds them compiled. Other engine flags go to both. For example:

  python scripts/bench_peer.py --device cuda
  python scripts/bench_peer.py --device cuda --only step --profile --bandwidth 4.3e12
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.benchmarking import Row, emit, own_parser, say, table

SCRIPTS = Path(__file__).resolve().parent
COMMON = ("--shape", "deepseek-v2-lite", "--context-length", "8192")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A number of a benchmark, the peer's and ours to be.

    Attributes:
        where: entries of the benchmark's row that has the number.
        key: the number's name there; more is better except for times.
        peer: None where none was measured.
    """

    where: Mapping[str, Any]
    key: str
    peer: float | None
    goal: float

    def row(self, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The line of the table; without a number if it was not measured."""
        name = " ".join(str(value) for value in self.where.values())
        line: dict[str, Any] = {"what": name, "unit": self.key}
        found = [row for row in measured if self.where.items() <= row.items() and self.key in row]
        if not found:
            return line | {"measured": None, "peer": self.peer, "goal": self.goal}
        value = found[0][self.key]
        reached = value <= self.goal if self.key in ("ms", "s") else value >= self.goal
        line |= {"measured": value, "peer": self.peer, "goal": self.goal}
        return line | {"reached": "yes" if reached else "no"}


def decode(size: str, peer: float, goal: float) -> Line:
    return Line(where={"decode": size}, key="ms", peer=peer, goal=goal)


STEP = (
    decode("1x1024", 3.95, 3.0),
    decode("8x1024", 8.78, 7.6),
    decode("32x1024", 12.90, 11.8),
    decode("64x1024", 13.97, 12.6),
    decode("128x1024", 15.75, 13.9),
    decode("256x1024", 17.63, 15.7),
    decode("64x4096", 16.33, 14.7),
    decode("128x4096", 20.56, 18.0),
    Line(where={"prefill": "16x2048"}, key="tok/s", peer=78_400, goal=95_000),
    Line(where={"prefill": "4x8000"}, key="tok/s", peer=77_300, goal=92_000),
    Line(where={"prefill": "1x2048"}, key="ms", peer=67, goal=35),
    Line(where={"start": "compiled before"}, key="s", peer=None, goal=30),
)
"""Of bench_step: decode is batch x context, prefill prompts x tokens."""
OFFLINE = (
    Line(where={"workload": "512 in / 128 out"}, key="out/s", peer=10_967, goal=12_600),
    Line(
        where={"workload": "16 shared 1024 + 128 in / 64 out"},
        key="out/s",
        peer=8_717,
        goal=10_000,
    ),
    Line(where={"workload": "memory"}, key="KV tokens", peer=1_382_096, goal=1_400_000),
    Line(where={"start": "nothing compiled"}, key="s", peer=None, goal=90),
)


def run(script: str, *flags: str) -> dict[str, Any]:
    """What a benchmark's JSON line says.

    Raises:
        RuntimeError: it failed.
    """
    say(f"{script} {' '.join(flags)}")
    command = [sys.executable, str(SCRIPTS / script), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"benchmark"')]
    if done.returncode or not lines:
        raise RuntimeError(f"{script} ended with status {done.returncode}.")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def compared(lines: Sequence[Line], measured: Sequence[Row]) -> list[Row]:
    return [line.row(measured) for line in lines]


def offline(programs: str, flags: Sequence[str]) -> list[Row]:
    """Whole workloads, by an engine that finds nothing compiled in the folder `programs`."""
    own = ("--workloads", "throughput,shared", "--compilation-cache-dir", programs)
    result = run("bench_offline.py", *COMMON, *own, *flags)
    memory = {"workload": "memory", "KV tokens": result["engine"]["kv_tokens"]}
    start = {"start": "nothing compiled", "s": result["ready_seconds"]}
    return compared(OFFLINE, [*result["rows"], memory, start])


def step(programs: str, kv_tokens: int | None, flags: Sequence[str]) -> list[Row]:
    """Steps. With as many `kv_tokens` as `offline` had, its programs are used again."""
    own = ["--compilation-cache-dir", programs]
    start: dict[str, Any] = {"start": "compiled before"}
    if kv_tokens is not None:
        own += ["--max-total-tokens", str(kv_tokens)]
    result = run("bench_step.py", *COMMON, *own, *flags)
    if kv_tokens is not None:
        start["s"] = result["ready_seconds"]
    return compared(STEP, [*result["rows"], start])


def main(argv: list[str]) -> int:
    parser = own_parser(__doc__)
    parser.add_argument("--only", choices=("step", "offline"), help="one of the two benchmarks")
    parser.add_argument("--profile", action="store_true", help="where the steps' time goes")
    parser.add_argument("--bandwidth", help="bytes/s of the steps' floor, see bench_step.py")
    args, flags = parser.parse_known_args(argv)
    of_step = ["--profile"] if args.profile else []
    if args.bandwidth is not None:
        of_step += ["--bandwidth", args.bandwidth]
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as programs:
            if args.only != "step":
                rows += offline(programs, flags)
            if args.only != "offline":
                found = [row["measured"] for row in rows if row["what"] == "memory"]
                rows += step(programs, found[0] if found else None, [*of_step, *flags])
    except RuntimeError as error:
        print(f"bench_peer: error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    emit("peer", flags=flags, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
