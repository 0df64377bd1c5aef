"""Streams through the router while its workers are killed: no error, no lost or doubled token.

Simulated workers, each a process, or with --engines real ones with the demo model; every now and
then a random one gets SIGKILL and comes back. Clients hold streams all the time, greedy and seeded,
and compare every answer with what it must be. Exit code 0 if all were right.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
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
NUM_EXAMPLES = 3
"""Of each kind of wrong answer."""
NUM_QUESTIONS = 24
"""Of those whose answers real workers give before they are killed."""
THINGS = ("kite", "dog", "tree", "king", "boat", "star", "river", "cake")

Question = tuple[str, dict[str, Any], str]
"""Path, body, and the text of the answer."""
ENGINE_FLAGS = ["--tp", "1", "--device", "cpu", "--decode-buckets", "8", "--extend-buckets", "64"]
START_S = 240.0
DOWN_S = (0.2, 0.8)
"""How long a killed worker stays away, at least and at most."""


class Fleet:
    """Worker processes that can be killed and started again, each on its port.

    Args:
        command: of a worker; the port is put behind it.
    """

    def __init__(self, num: int, command: Sequence[str], log: Path) -> None:
        self.ports = [free_port() for _ in range(num)]
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.num_kills = 0
        self._command = command
        self._log = log
        self._running: dict[int, asyncio.subprocess.Process] = {}

    async def start(self, port: int) -> None:
        """Start one; returns when it is healthy."""
        with open(self._log, "ab") as output:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(port),
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        http = Upstream()
        try:
            async with asyncio.timeout(START_S):
                while True:
                    with contextlib.suppress(UpstreamError):
                        answer = await http.request(f"http://127.0.0.1:{port}", "GET", "/health")
                        if answer.status == 200:
                            break
                    await asyncio.sleep(0.1)
        except BaseException:
            _kill_group(process)
            raise
        finally:
            await http.close()
        self._running[port] = process

    async def kill(self, port: int) -> None:
        """Kill one with all its processes."""
        process = self._running.pop(port)
        _kill_group(process)
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
            # Most are always there: what is tested is not a fleet that is gone.
            if len(self._running) <= len(self.ports) // 2:
                continue
            port = rng.choice(sorted(self._running))
            await self.kill(port)
            task = asyncio.create_task(revive(port))
            revivals.add(task)
            task.add_done_callback(revivals.discard)


def _kill_group(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Clients:
    """Requests, `num` at once, each compared with what its answer must be.

    Args:
        question: draws a request and its answer.
    """

    def __init__(
        self, base: str, num: int, question: Callable[[random.Random], Question], seed: int
    ) -> None:
        self._base = base
        self._num = num
        self._question = question
        self._rng = random.Random(seed)
        self._http = Upstream()
        self._stop = False
        self._began = time.monotonic()
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
            if example and self.outcomes[outcome] <= NUM_EXAMPLES:
                self.examples.append(
                    f"{time.monotonic() - self._began:.0f} s, {outcome}: {example}"
                )
            self.latency.append(time.monotonic() - begin)
            if example:
                await asyncio.sleep(0.1)

    async def _ask(self, rng: random.Random) -> tuple[str, str]:
        """How it went, and what is wrong with it if something is."""
        path, body, expected = self._question(rng)
        kind = ("stream" if body["stream"] else "plain") + (
            ", seeded" if "seed" in body else ", greedy"
        )
        try:
            status, content = await ask(self._http, self._base, path, body)
        except UpstreamError as error:
            return f"{kind}: {type(error).__name__}", str(error)
        if status != 200:
            return f"{kind}: status {status}", repr(content[:300])
        if body["stream"]:
            if not content.endswith(b"data: [DONE]\n\n"):
                return f"{kind}: no [DONE]", repr(content[-300:])
            if b'{"error"' in content:
                return f"{kind}: error event", repr(content[-400:])
        got = answer_of(content, stream=body["stream"])
        if got != expected:
            return f"{kind}: wrong text", f"{got!r} instead of {expected!r}"
        return f"{kind}: right", ""


def simulated_question(rng: random.Random, most: int) -> Question:
    """A request that no other is like, and what a simulated worker says to it."""
    chat, stream, seeded = rng.random() < 0.5, rng.random() < 0.95, rng.random() < 0.5
    # A plain answer cannot go on, only be computed again: it must be shorter than a life.
    length = rng.randint(1, most if stream else min(20, most))
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
    return path, body, "".join(map(word_of, ids))


async def real_questions(url: str, num: int, most: int, seed: int) -> list[Question]:
    """Requests, and what a real worker says to them while nothing disturbs it."""
    rng, http, questions = random.Random(seed), Upstream(), []
    for i in range(num):
        prompt = f"Once upon a time there was a {rng.choice(THINGS)} that"
        body: dict[str, Any] = {"prompt": prompt, "stream": True, "ignore_eos": True}
        body["max_tokens"] = rng.randint(most // 2, most)
        body |= {"temperature": 1, "seed": i} if i % 2 else {"temperature": 0}
        path = "/v1/completions"
        _, content = await ask(http, url, path, body)
        questions.append((path, body, answer_of(content, stream=True)))
    await http.close()
    return questions


async def ask(http: Upstream, base: str, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """Status and body of an answer.

    Raises:
        UpstreamError: it did not come, or not whole.
    """
    content = json.dumps(body).encode()
    response = await http.request(base, "POST", path, [JSON], content, timeout=240)
    return response.status, await response.read()


def answer_of(content: bytes, *, stream: bool) -> str:
    """The text of an answer."""
    if stream:
        return text_of(content)
    choice = json.loads(content)["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


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
    scripts = ROOT / "scripts"
    simulated = [sys.executable, str(scripts / "simulated_worker.py")]
    simulated += ["--tpot", str(args.tpot), "--slots", "256", "--ports"]
    real = [sys.executable, str(scripts / "serve.py"), *ENGINE_FLAGS, "--port"]
    fleet = Fleet(args.engines or args.workers, real if args.engines else simulated, Path(args.log))
    clients_memory: list[float] = []
    try:
        if args.engines:
            # One after the other: compiling is shared then.
            for port in fleet.ports:
                await fleet.start(port)
            known = await real_questions(fleet.urls[0], NUM_QUESTIONS, args.max_tokens, args.seed)
        else:
            await asyncio.gather(*(fleet.start(port) for port in fleet.ports))
        async with own_router(fleet.urls, Path(args.log)) as (base, pid):

            def question(rng: random.Random) -> Question:
                return (
                    rng.choice(known) if args.engines else simulated_question(rng, args.max_tokens)
                )

            clients = Clients(base, args.streams, question, args.seed)

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
    parser.add_argument(
        "--engines", type=int, default=0, help="so many real workers with the demo model instead"
    )
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
