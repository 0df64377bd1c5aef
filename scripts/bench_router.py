"""The router against simulated workers: `bench_router.py --help` lists what is measured.

overhead: what the proxy costs, in requests per second, added latency and processor time. routing:
what the policy is worth, in prefix cache hits, throughput and time to first token. memory: whether
a long run of different prompts makes it grow. With --peer another router (any with the flags of
`sglang-router`) is measured in the same run, the two by turns, on the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.benchmarking import emit, say, table  # noqa: E402
from scripts.router_load import NUMBER, FixedLoad, SessionLoad, sessions_of  # noqa: E402

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
START_S = 40.0
FLAGS = (
    "--worker-urls {urls} --host 127.0.0.1 --port {port} --prometheus-host 127.0.0.1 "
    "--prometheus-port {prometheus_port} --log-level warn --policy {policy}"
)


class BenchError(RuntimeError):
    """The benchmark cannot go on; one sentence."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, timeout: float = 5.0, data: bytes | None = None) -> tuple[int, bytes]:
    """Status and body; status 0 if there is no connection."""
    try:
        with urllib.request.urlopen(url, data=data, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(error).encode()


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
            for child in children:
                found += family(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its descendants."""
    total = 0
    for each in family(pid):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(stat[11]) + int(stat[12])
    return total / TICKS


def resident_mib(pid: int) -> float:
    pages = 0
    for each in family(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return pages * PAGE / 2**20


def busy_seconds() -> float:
    """Processor time of the whole machine."""
    with open("/proc/stat", encoding="ascii") as file:
        parts = [int(part) for part in file.readline().split()[1:]]
    return (sum(parts[:8]) - parts[3] - parts[4]) / TICKS


class OtherLoad:
    """What processes that are not ours used meanwhile, in cores: comparisons need like load.

    Ours are this process and its descendants.
    """

    def __init__(self) -> None:
        self._busy, self._own = busy_seconds(), cpu_seconds(os.getpid())
        self._began = time.monotonic()

    def cores(self) -> float:
        own = cpu_seconds(os.getpid()) - self._own
        return max(0.0, (busy_seconds() - self._busy - own) / (time.monotonic() - self._began))


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, cores: set[int] | None) -> Iterator[Any]:
    """A process in a group of its own, ended with everything that it started."""

    def pin() -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)

    with open(log, "ab") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=pin,
            cwd=ROOT,
        )
    try:
        yield child
    finally:
        for signum, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(seconds)


@contextlib.contextmanager
def fleet(args: argparse.Namespace, log: Path, *flags: str) -> Iterator[list[str]]:
    """URLs of simulated workers, all in one process."""
    ports = [str(free_port()) for _ in range(args.workers)]
    script = str(ROOT / "scripts" / "simulated_worker.py")
    command = [sys.executable, script, "--ports", *ports, *flags]
    with process(command, log, {0} if args.pin else None):
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        for url in urls:
            _wait_for(lambda url=url: get(url + "/health")[0] == 200, f"worker {url}", log)
        yield urls


class Router:
    """A running router."""

    def __init__(self, name: str, base: str, pid: int) -> None:
        self.name, self.base, self.pid = name, base, pid


@contextlib.contextmanager
def router(
    name: str, args: argparse.Namespace, urls: Sequence[str], policy: str, log: Path
) -> Iterator[Router]:
    """Ours or the peer's, with all workers registered."""
    port = free_port()
    launch = {"ours": f"{sys.executable} scripts/launch_router.py", "peer": args.peer}[name]
    policy, _, extra = policy.partition("+")
    flags = FLAGS.format(urls=" ".join(urls), port=port, prometheus_port=free_port(), policy=policy)
    command = shlex.split(f"{launch} {flags} {extra.replace('~', ' ')}")
    with process(command, log, {1} if args.pin else None) as child:
        base = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            if child.poll() is not None:
                raise BenchError(f"The router ended at its start, see {log}: {command}")
            status, body = get(base + "/workers")
            if status != 200:
                return False
            workers = json.loads(body)["workers"]
            return sum(bool(worker.get("is_healthy")) for worker in workers) >= len(urls)

        _wait_for(ready, f"router {name}", log)
        yield Router(name, base, child.pid)


def _wait_for(condition: Any, what: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > until:
            raise BenchError(f"No {what} within {START_S:g} s; see {log}.")
        time.sleep(0.05)


def middle(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number; a sum where it counts what went wrong."""
    sums = ("errors", "failed")
    return {
        key: (sum if key in sums else statistics.median)([row[key] for row in rows])
        for key in rows[0]
    }


def names(args: argparse.Namespace) -> list[str]:
    return ["ours", "peer"] if args.peer else ["ours"]


def overhead(args: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    """A row for each kind of request, concurrency and router; "direct" is without any."""
    prompt = "Say hello to the world, please. " * 4
    body = {"model": "mock-model", "prompt": prompt, "max_tokens": args.stream_tokens}
    flags = ["--canned", "--tpot", "0", "--default-max-tokens", str(args.stream_tokens)]
    rows = []
    with contextlib.ExitStack() as stack:
        urls = stack.enter_context(fleet(args, log, *flags))
        routers = [
            stack.enter_context(router(name, args, urls, "round_robin", log))
            for name in names(args)
        ]
        for stream in (False, True):
            for concurrency in args.concurrency:
                found: dict[str, list[dict[str, Any]]] = {}
                for _ in range(args.runs):
                    for target in [Router("direct", urls[0], 0), *routers]:
                        sent = {**body, "stream": True} if stream else body
                        row = _overhead_once(args, target, sent, concurrency, stream)
                        found.setdefault(target.name, []).append(row)
                direct = middle(found["direct"])
                for name, runs in found.items():
                    row = middle(runs)
                    head = {"kind": "sse" if stream else "json", "clients": concurrency}
                    added = row["p50_ms"] - direct["p50_ms"]
                    rows.append({**head, "router": name, "added p50 ms": added, **row})
                    say(table(rows[-1:]))
    return rows


def _overhead_once(
    args: argparse.Namespace, target: Router, body: dict[str, Any], clients: int, stream: bool
) -> dict[str, Any]:
    load = FixedLoad(target.base + "/v1/completions", body, clients, args.seconds, args.warmup)
    other = OtherLoad()
    before = cpu_seconds(target.pid) if target.pid else 0.0
    row = dict(uvloop.run(load.run()))
    used = cpu_seconds(target.pid) - before if target.pid else 0.0
    row["cpu us/request"] = 1e6 * used / max(1, row["done"])
    row["cpu us/event"] = 1e6 * used / row["events"] if stream and row["events"] else 0.0
    row["MiB"] = resident_mib(target.pid) if target.pid else 0.0
    row["other cores"] = other.cores()
    return row


def routing(args: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    """A row for each workload, policy and router."""
    flags = ["--cache-tokens", str(args.cache_tokens), "--prefill-tps", str(args.prefill_tps)]
    flags += ["--tpot", str(args.tpot), "--slots", str(args.slots)]
    plan = [("ours", policy) for policy in args.policies]
    if args.peer:
        plan += [("peer", policy) for policy in args.peer_policies]
    rows = []
    for workload in args.workloads:
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in range(args.runs):  # outermost: a slow spell hits all alike
            for name, policy in plan:
                sessions = sessions_of(workload, seed=args.seed + run, scale=args.scale)
                with fleet(args, log, *flags) as urls:
                    with router(name, args, urls, policy, log) as target:
                        other = OtherLoad()
                        load = SessionLoad(sessions, args.clients, target.base)
                        row = dict(uvloop.run(load.run()))
                        for failure in load.failures[:3]:
                            say(f"failed: {failure}")
                        row["other cores"] = other.cores()
                    stats = [json.loads(get(url + "/_sim/stats")[1]) for url in urls]
                tokens = [each["prompt_tokens"] for each in stats]
                row["hit rate"] = sum(each["cached_tokens"] for each in stats) / sum(tokens)
                row["imbalance"] = max(tokens) * len(tokens) / sum(tokens)
                found.setdefault((name, policy), []).append(row)
        for (name, policy), runs in found.items():
            head = {"workload": workload, "router": name, "policy": policy}
            rows.append({**head, **middle(runs)})
            say(table(rows[-1:]))
    return rows


def memory(args: argparse.Namespace, log: Path) -> list[dict[str, Any]]:
    """Resident memory after each tenth of `--requests` different prompts."""
    flags = ["--canned", "--tpot", "0"]
    body = {"model": "mock-model", "prompt": f"Prompt {NUMBER} " + "and so on. " * 40}
    rows = []
    with fleet(args, log, *flags) as urls, router("ours", args, urls, "cache_aware", log) as target:
        total = 0
        while total < args.requests:
            load = FixedLoad(target.base + "/v1/completions", body, 32, args.seconds, 0.0)
            load.num_done = total
            row = uvloop.run(load.run())
            total = int(row["done"])
            row = {"requests": total, "MiB": resident_mib(target.pid), "errors": row["errors"]}
            rows.append(row)
            say(table(rows[-1:]))
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=["overhead", "routing", "memory"])
    parser.add_argument("--peer", help='e.g. "VENV/bin/python -m sglang_router.launch_router"')
    parser.add_argument("--policies", nargs="*", default=["cache_aware", "round_robin"])
    parser.add_argument(
        "--peer-policies",
        nargs="*",
        default=["cache_aware"],
        help="'name' or 'name+--flag~value' (~ is a space); also for --policies",
    )
    parser.add_argument("--workloads", nargs="*", default=["gsp", "zipf", "chat"])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the workloads")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--warmup", type=float, default=0.7)
    parser.add_argument("--stream-tokens", type=int, default=64)
    parser.add_argument("--cache-tokens", type=int, default=40_000)
    parser.add_argument("--prefill-tps", type=float, default=20_000)
    parser.add_argument("--tpot", type=float, default=0.02)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200_000, help="of the memory suite")
    parser.add_argument("--pin", action="store_true", help="the router on core 1, the rest on 0")
    return parser


def main(argv: Sequence[str]) -> int:
    args = make_parser().parse_args(argv)
    if args.pin:
        os.sched_setaffinity(0, {0})
    log = Path(tempfile.gettempdir()) / f"bench_router.{os.getpid()}.log"
    suite = {"overhead": overhead, "routing": routing, "memory": memory}[args.suite]
    try:
        rows = suite(args, log)
    except BenchError as error:
        print(f"bench_router.py: error: {error}", file=sys.stderr)
        return 1
    say(table(rows))
    emit(f"router_{args.suite}", config=vars(args), rows=rows)
    return 0


if __name__ == "__main__":
    # So that what was started is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
