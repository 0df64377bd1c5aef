"""Streams through the router while its workers are killed: no error, no lost or doubled token.

Simulated workers, each a process; every second a random one gets SIGKILL and comes back a little
later. Clients hold streams all the time, greedy and seeded, and compare every answer with what it
must be. Exit code 0 if all were right.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from router.upstream import Upstream, UpstreamError  # noqa: E402
from scripts.bench_router import free_port, resident_mib  # noqa: E402
from scripts.benchmarking import emit, percentile, say, table  # noqa: E402
from scripts.router_load import JSON, text_of  # noqa: E402
from scripts.simulated_worker import answer_ids, word_of  # noqa: E402

REPORT_S = 10.0
DOWN_S = (0.2, 0.8)
"""How long a killed worker stays away, at least and at most."""


class Fleet:
    """Worker processes that can be killed and started again, each on its port."""

    def __init__(self, num: int, flags: Sequence[str]) -> None:
        self.ports = [free_port() for _ in range(num)]
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.num_kills = 0
        self._flags = flags
        self._running: dict[int, asyncio.subprocess.Process] = {}

    async def start(self, port: int) -> None:
        script = str(ROOT / "scripts" / "simulated_worker.py")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            script,
            "--ports",
            str(port),
            *self._flags,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdout is not None
        await process.stdout.readline()
        self._running[port] = process

    async def kill(self, port: int) -> None:
        process = self._running.pop(port)
        process.send_signal(signal.SIGKILL)
        self.num_kills += 1
        await process.wait()

    async def stop(self) -> None:
        kills = self.num_kills
        for port in list(self._running):
            await self.kill(port)
        self.num_kills = kills

    async def harass(self, rng: random.Random, every_s: float) -> None:
        """Kill one at random, again and again; each comes back after a while."""
        revivals: set[asyncio.Task[None]] = set()

        async def revive(port: int) -> None:
            await asyncio.sleep(rng.uniform(*DOWN_S))
            await self.start(port)

        while True:
            await asyncio.sleep(every_s)
            # One is always left: nobody could answer otherwise.
            if len(self._running) < 2:
                continue
            port = rng.choice(sorted(self._running))
            await self.kill(port)
            task = asyncio.create_task(revive(port))
            revivals.add(task)
            task.add_done_callback(revivals.discard)


class Clients:
    """Streams and plain requests, `num` at once, each compared with what it must be."""

    def __init__(self, base: str, num: int, max_tokens: int, seed: int) -> None:
        self._base = base
        self._num = num
        self._max_tokens = max_tokens
        self._rng = random.Random(seed)
        self._http = Upstream()
        self._stop = False
        self.outcomes: Counter[str] = Counter()
        self.examples: list[str] = []
        self.latency: list[float] = []

    async def run(self, seconds: float) -> None:
        tasks = [asyncio.create_task(self._client()) for _ in range(self._num)]
        await asyncio.sleep(seconds)
        self._stop = True
        await asyncio.gather(*tasks)
        await self._http.close()

    async def _client(self) -> None:
        while not self._stop:
            begin = time.monotonic()
            outcome, example = await self._ask(self._rng)
            self.outcomes[outcome] += 1
            if example and len(self.examples) < 20:
                self.examples.append(f"{outcome}: {example}")
            self.latency.append(time.monotonic() - begin)
            if example:
                await asyncio.sleep(0.1)

    async def _ask(self, rng: random.Random) -> tuple[str, str]:
        """How it went, and what is wrong with it if something is."""
        chat, stream, seeded = rng.random() < 0.5, rng.random() < 0.95, rng.random() < 0.5
        # A plain answer cannot go on, only be computed again: it must be shorter than a life.
        length = rng.randint(1, self._max_tokens if stream else min(20, self._max_tokens))
        content = f"Question {rng.getrandbits(40)}: " + "what is it? " * rng.randint(1, 20)
        body: dict[str, Any] = {"model": "mock-model", "stream": stream, "max_tokens": length}
        if chat:
            body["messages"] = [{"role": "user", "content": content}]
            prompt, path = f"<user>{content}<assistant>", "/v1/chat/completions"
        else:
            body["prompt"] = prompt = content
            path = "/v1/completions"
        if seeded:
            body |= {"temperature": 1, "seed": rng.getrandbits(31)}
        else:
            body["temperature"] = 0
        ids = answer_ids(prompt, str(body.get("seed", "")), length)
        expected = "".join(map(word_of, ids))
        kind = ("stream" if stream else "plain") + (", seeded" if seeded else ", greedy")
        content_bytes = b""
        try:
            response = await self._http.request(
                self._base, "POST", path, [JSON], json.dumps(body).encode(), timeout=120
            )
            while data := await response.chunk():
                content_bytes += data
        except UpstreamError as error:
            return f"{kind}: {type(error).__name__}", f"{error}; {content_bytes[-300:]!r}"
        if response.status != 200:
            return f"{kind}: status {response.status}", repr(content_bytes[:300])
        if stream:
            if not content_bytes.endswith(b"data: [DONE]\n\n"):
                return f"{kind}: no [DONE]", repr(content_bytes[-300:])
            if b'"error"' in content_bytes:
                return f"{kind}: error event", repr(content_bytes[-400:])
            got = text_of(content_bytes)
        else:
            choice = json.loads(content_bytes)["choices"][0]
            got = choice["text"] if "text" in choice else choice["message"]["content"]
        if got != expected:
            return f"{kind}: wrong text", f"{got!r} instead of {expected!r}"
        return f"{kind}: right", ""


@contextlib.asynccontextmanager
async def own_router(urls: Sequence[str], log: Path) -> AsyncIterator[tuple[str, int]]:
    """(base URL, process id) of a router before these workers, once all are registered."""
    port = free_port()
    flags = ["--worker-urls", *urls, "--host", "127.0.0.1", "--port", str(port)]
    flags += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    flags += ["--log-level", "warn", "--health-check-interval-secs", "1"]
    # A worker that was killed is back within a second: it must not be shunned for a minute.
    flags += ["--cb-timeout-duration-secs", "1"]
    with open(log, "ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ROOT / "scripts" / "launch_router.py"),
            *flags,
            stdout=output,
            stderr=output,
            cwd=ROOT,
        )
    base, http = f"http://127.0.0.1:{port}", Upstream()
    try:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(UpstreamError):
                    answer = await http.request(base, "GET", "/workers")
                    listed = json.loads(await answer.read())["workers"]
                    if sum(worker["is_healthy"] for worker in listed) == len(urls):
                        break
                await asyncio.sleep(0.05)
        yield base, process.pid
    finally:
        await http.close()
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                process.kill()


async def chaos(args: argparse.Namespace) -> dict[str, Any]:
    """Run it all; what happened."""
    fleet = Fleet(args.workers, ["--tpot", str(args.tpot), "--slots", "256"])
    clients_memory: list[float] = []
    try:
        await asyncio.gather(*(fleet.start(port) for port in fleet.ports))
        async with own_router(fleet.urls, Path(args.log)) as (base, pid):
            clients = Clients(base, args.streams, args.max_tokens, args.seed)

            async def report() -> None:
                while True:
                    await asyncio.sleep(min(REPORT_S, args.seconds / 3))
                    clients_memory.append(resident_mib(pid))
                    say(
                        f"{sum(clients.outcomes.values())} requests, {fleet.num_kills} kills, "
                        f"router {clients_memory[-1]:.1f} MiB"
                    )

            others = [
                asyncio.create_task(fleet.harass(random.Random(args.seed), args.every)),
                asyncio.create_task(report()),
            ]
            try:
                await clients.run(args.seconds)
            finally:
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
    finally:
        await fleet.stop()
    wrong = sum(n for what, n in clients.outcomes.items() if not what.endswith("right"))
    return {
        "requests": sum(clients.outcomes.values()),
        "wrong": wrong,
        "kills": fleet.num_kills,
        "outcomes": dict(clients.outcomes),
        "examples": clients.examples,
        "latency_p50_s": percentile(clients.latency, 50),
        "latency_p99_s": percentile(clients.latency, 99),
        "router_mib": clients_memory,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two kills")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--tpot", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", default="/dev/null", help="what the router says")
    return parser


def main(argv: Sequence[str]) -> int:
    args = make_parser().parse_args(argv)
    result = uvloop.run(chaos(args))
    say(table([{"outcome": what, "number": n} for what, n in sorted(result["outcomes"].items())]))
    for example in result["examples"]:
        say(example)
    emit("chaos_router", config=vars(args), **result)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
