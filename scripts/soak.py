"""Random traffic against a server for minutes, good and bad, and what must hold after it.

Everything comes from one seed: ordinary requests, clients that hang up, prompts that are too long,
bodies that are no JSON, wrong types, huge numbers, bursts beyond the queue. It fails when an answer
has a status that its request does not deserve, when anything hangs, when slices are not idle and
empty afterwards, when a program was compiled again, or when the server's memory goes on growing.
Without --base-url it starts a server of its own: the demo model, a small pool, a short queue.
For example:

  python scripts/soak.py --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import numpy as np

from scripts.benchmarking import ROOT, emit, percentile, say, table

START_TIMEOUT_S = 300
IDLE_TIMEOUT_S = 30
OWN_SERVER = (
    *("--device", "cpu", "--tp", "2", "--dp-size", "2", "--ep", "2", "--enable-dp-attention"),
    *("--max-total-tokens", "2048", "--max-queued-requests", "32"),
    *("--decode-buckets", "1,8", "--extend-buckets", "64,256", "--log-level", "warning"),
)
"""A pool and a queue that a burst overruns, so that retraction and refusal are part of the run."""
SPECIAL_TOKENS = 8
"""Prompts are made of ids from here on."""

OK, REFUSED, EITHER, ANY = "answered", "refused", "answered or refused", "any answer"
"""What a request deserves. A full queue may turn any of them away; ANY is for routes that are not
completions, or not there."""


class SoakError(RuntimeError):
    """The run cannot begin or end; one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One request of the traffic.

    Attributes:
        kind: for the summary.
        path: where it goes.
        content: the body, JSON or not.
        deserves: OK, REFUSED, EITHER or ANY.
        method: of HTTP.
        hang_up_s: seconds after which the client goes away; None stays.
    """

    kind: str
    path: str
    content: bytes
    deserves: str
    method: str = "POST"
    hang_up_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of an attempt: `status` 0 where the client hung up first; `wrong` says what
    should not have happened, None where all is well."""

    kind: str
    status: int
    seconds: float
    wrong: str | None = None


class Traffic:
    """Draws attempts. The same seed draws the same ones."""

    def __init__(
        self,
        seed: int,
        *,
        vocab_size: int,
        context: int,
        pool: int,
        num_slices: int,
        chat: bool,
        grammars: bool,
    ) -> None:
        """`context` and `pool` are the most tokens of one request and of a slice; `chat` and
        `grammars` tell whether the server has them."""
        self.rng = random.Random(seed)
        self._num_slices, self._grammars = num_slices, grammars
        self._vocab, self._context, self._chat = vocab_size, context, chat
        self._longest = max(2, min(context, pool) // 4)
        self._prefixes = [self._ids(self._longest // 2) for _ in range(4)]
        self._kinds: dict[Callable[[], Attempt], int] = {
            self.completion: 30,
            self.shared_prefix: 20,
            self.chat: 15 if chat else 0,
            self.hang_up: 15,
            self.too_long: 4,
            self.not_json: 4,
            self.wrong_type: 4,
            self.huge_number: 4,
            self.feature: 14,
            self.wrong_feature: 4,
            self.slow_grammar: 2 if grammars else 0,
            self.other_route: 5,
        }

    def draw(self) -> Attempt:
        """Any attempt."""
        (kind,) = self.rng.choices([*self._kinds], [*self._kinds.values()])
        return kind()

    def _ids(self, count: int) -> list[int]:
        return [self.rng.randrange(SPECIAL_TOKENS, self._vocab) for _ in range(count)]

    def _body(self, prompt: Any, **more: Any) -> dict[str, Any]:
        rng = self.rng
        body = {"prompt": prompt, "max_tokens": rng.randint(1, max(1, self._longest // 8)), **more}
        if rng.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if rng.random() < 0.5:
            body |= {"temperature": rng.choice([0, 0.7, 1.5]), "top_p": rng.uniform(0.1, 1)}
        if rng.random() < 0.3:
            body["seed"] = rng.randrange(1 << 31)
        if rng.random() < 0.5:
            body["ignore_eos"] = True
        return body

    def _completion(
        self,
        kind: str,
        body: Mapping[str, Any],
        deserves: str = OK,
        hang_up_s: float | None = None,
    ) -> Attempt:
        content = json.dumps(body).encode()
        return Attempt(
            kind=kind,
            path="/v1/completions",
            content=content,
            deserves=deserves,
            hang_up_s=hang_up_s,
        )

    # ---- what clients send -------------------------------------------------------------------

    def completion(self) -> Attempt:
        prompt: Any = self._ids(self.rng.randint(1, self._longest))
        if self.rng.random() < 0.2:
            prompt = [self._ids(self.rng.randint(1, 16)) for _ in range(self.rng.randint(1, 3))]
        return self._completion("completion", self._body(prompt))

    def shared_prefix(self) -> Attempt:
        prompt = self.rng.choice(self._prefixes) + self._ids(self.rng.randint(1, 20))
        return self._completion("shared prefix", self._body(prompt))

    def chat(self) -> Attempt:
        words = self.rng.choices(["the", "red", "kite", "flew", "home", "café", "雨"], k=8)
        body = self._body(None)
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": " ".join(words)}]
        return Attempt(
            kind="chat",
            path="/v1/chat/completions",
            content=json.dumps(body).encode(),
            deserves=OK,
        )

    def hang_up(self) -> Attempt:
        prompt = self._ids(self.rng.randint(1, self._longest))
        body = self._body(prompt, ignore_eos=True) | {"max_tokens": self._longest}
        after = self.rng.choice([0.0, 0.01, 0.1, 1.0]) * self.rng.random()
        return self._completion("hang-up", body, hang_up_s=after)

    def too_long(self) -> Attempt:
        beyond = self._context + self.rng.choice([0, 1, 1000])
        if self.rng.random() < 0.5:
            return self._completion("too long", self._body(self._ids(beyond)), REFUSED)
        body = self._body(self._ids(4)) | {"max_tokens": beyond}
        return self._completion("too long", body, REFUSED)

    def not_json(self) -> Attempt:
        content = json.dumps(self._body(self._ids(4))).encode()
        broken = self.rng.choice(
            [
                b"",
                content[: len(content) // 2],
                b"\xff\xfe\x00" + content,
                b"[" * 100_000,
                content.replace(b":", b"=", 1),
                b"null",
                b'{"prompt": "\\ud800"}',
            ]
        )
        return Attempt(kind="not JSON", path="/v1/completions", content=broken, deserves=REFUSED)

    def wrong_type(self) -> Attempt:
        wrong: list[dict[str, Any]] = [
            {"prompt": {"text": "a"}},
            {"prompt": [1, "a", [2]]},
            {"prompt": []},
            {"prompt": None},
            {"prompt": [-1]},
            {"prompt": [self._vocab + 10_000_000]},
            {"max_tokens": "many"},
            {"max_tokens": 1.5},
            {"temperature": "hot"},
            {"stream": "yes"},
            {"stop": 7},
            {"stop_token_ids": ["a"]},
            {"stream_options": []},
        ]
        body = self._body(self._ids(4)) | self.rng.choice(wrong)
        return self._completion("wrong type", body, REFUSED)

    def huge_number(self) -> Attempt:
        huge: list[dict[str, Any]] = [
            {"max_tokens": 10**30},
            {"max_tokens": 0},
            {"max_tokens": -(2**63)},
            {"temperature": -1},
            {"temperature": 1e308 * 10},
            {"top_p": 2},
            {"top_p": 0},
            {"logprobs": 10**9},
            {"n": 10**9},
            {"prompt": [2**64]},
        ]
        body = self._body(self._ids(4)) | self.rng.choice(huge)
        return self._completion("huge number", body, REFUSED)

    def feature(self) -> Attempt:
        """What must work."""
        valid: list[dict[str, Any]] = [
            {"n": 3},
            {"logprobs": 3},
            {"logprobs": 2, "echo": True},
            {"echo": True},
            {"min_p": 0.1},
            {"top_k": 5},
            {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2},
            {"logit_bias": {"20": 5.0, "21": -100.0}},
            {"min_tokens": 2, "max_tokens": 4},
            {"stop": ["a", "the"]},
            {"stop_token_ids": [20, 21, 22]},
            {"priority": 3},
            {"seed": -5},
            {"routed_dp_rank": self.rng.randrange(self._num_slices)},
        ]
        if self._grammars:
            schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
            valid += [
                {"regex": "[ab]{1,8}"},
                {"regex": "yes|no", "n": 4},
                {"ebnf": 'root ::= "yes" | "no"'},
                {"ebnf": 'root ::= "yes"' + "\n" * 32_700},
                {"json_schema": json.dumps(schema)},
                {"response_format": {"type": "json_object"}},
                {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
            ]
        body = self._body(self._ids(self.rng.randint(1, 40))) | self.rng.choice(valid)
        return self._completion("feature", body)

    def wrong_feature(self) -> Attempt:
        """What must be refused, whether or not the server has grammars."""
        wrong: list[dict[str, Any]] = [
            {"n": 0},
            {"n": 2, "best_of": 3},
            {"min_p": 2},
            {"presence_penalty": 3},
            {"logit_bias": {"20": 101}},
            {"logit_bias": {"twenty": 1}},
            {"min_tokens": 10**9},
            {"suffix": "after"},
            {"routed_dp_rank": self._num_slices},
            {"routed_dp_rank": -2},
            {"regex": "(a*)*b("},
            {"regex": "a", "ebnf": 'root ::= "a"'},
            {"ebnf": "\n" * 32_700},
            {"ebnf": " " * 32_700},
            {"ebnf": "-" * 32_700},
            {"json_schema": "{"},
            {"response_format": {"type": "xml"}},
        ]
        body = self._body(self._ids(self.rng.randint(1, 40))) | self.rng.choice(wrong)
        return self._completion("wrong feature", body, REFUSED)

    def slow_grammar(self) -> Attempt:
        """A small text that takes about a second to be refused; the client does not wait for it."""
        doubling = "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(30))
        text = f'root ::= r0\n{doubling}r30 ::= "{self.rng.choice("abcdefgh")}"\n'
        body = self._body(self._ids(4)) | {"ebnf": text}
        after = self.rng.choice([0.0, 0.05, 0.5])
        return self._completion("slow grammar", body, EITHER, hang_up_s=after)

    def other_route(self) -> Attempt:
        method, path = self.rng.choice(
            [
                ("GET", "/v1/models"),
                ("GET", "/v1/models/nothing"),
                ("GET", "/get_model_info"),
                ("GET", "/get_server_info"),
                ("GET", "/v1/loads?include=all"),
                ("GET", "/metrics"),
                ("GET", "/health"),
                ("POST", "/flush_cache"),
                ("POST", "/abort_request"),
                ("GET", "/v1/completions"),
                ("DELETE", "/v1/chat/completions"),
                ("POST", "/no/such/route"),
            ]
        )
        content = b'{"rid": "nobody"}' if method == "POST" else b""
        return Attempt(kind="other route", path=path, method=method, content=content, deserves=ANY)

    def burst(self, size: int) -> list[Attempt]:
        """Small requests, all at once."""
        bodies = [self._body(self._ids(self.rng.randint(1, 32))) for _ in range(size)]
        return [
            self._completion("burst", body | {"max_tokens": self.rng.randint(1, 8)})
            for body in bodies
        ]


class Soak:
    """Sends traffic and judges what comes back."""

    def __init__(self, client: httpx.AsyncClient, traffic: Traffic, *, deadline_s: float) -> None:
        self.outcomes: list[Outcome] = []
        self._client, self._traffic, self._deadline_s = client, traffic, deadline_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._bursts: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float, *, rate: float, burst: int, most_open: int) -> None:
        """Traffic at Poisson times, a burst about every 20 s; until all of it is answered.

        A burst waits until the one before is over.

        Args:
            rate: attempts a second.
            burst: attempts of a burst; 0 for none.
            most_open: no more than so many at a time, bursts excepted.
        """
        rng, end = self._traffic.rng, time.monotonic() + seconds
        next_burst = time.monotonic() + min(5.0, seconds / 3)
        while (now := time.monotonic()) < end:
            if burst and now >= next_burst and not self._bursts:
                next_burst = now + rng.uniform(10, 30)
                for attempt in self._traffic.burst(burst):
                    _start(self._bursts, self._attempt(attempt))
            if len(self._tasks) < most_open:
                if rng.random() < 0.03:
                    _start(self._tasks, self._raw())
                else:
                    _start(self._tasks, self._attempt(self._traffic.draw()))
            await asyncio.sleep(min(rng.expovariate(rate), 5.0))
        if rest := self._tasks | self._bursts:
            _, rest = await asyncio.wait(rest, timeout=2 * self._deadline_s)
            if rest:
                raise SoakError(f"{len(rest)} attempts outlived their deadline.")

    async def _attempt(self, attempt: Attempt) -> None:
        began, status, wrong = time.monotonic(), 0, None
        try:
            async with asyncio.timeout(self._deadline_s):
                status, wrong = await self._judge(attempt)
        except TimeoutError:
            wrong = f"no end within {self._deadline_s:g} s"
        except httpx.HTTPError as error:
            wrong = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - began
        self.outcomes.append(
            Outcome(kind=attempt.kind, status=status, seconds=seconds, wrong=wrong)
        )

    async def _judge(self, attempt: Attempt) -> tuple[int, str | None]:
        """Status of the answer (0: hung up before it) and what is wrong with it."""
        if attempt.hang_up_s is None:
            return await self._answer(attempt)
        try:
            async with asyncio.timeout(attempt.hang_up_s):
                return await self._answer(attempt)
        except TimeoutError:
            return 0, None

    async def _answer(self, attempt: Attempt) -> tuple[int, str | None]:
        headers = {"content-type": "application/json"}
        async with self._client.stream(
            attempt.method, attempt.path, content=attempt.content, headers=headers
        ) as response:
            content = await response.aread()
            return response.status_code, judge(
                attempt.deserves,
                response.status_code,
                response.headers.get("content-type", ""),
                content,
            )

    async def _raw(self) -> None:
        """Bytes that are no HTTP, or a body that never comes; then gone."""
        url, began = self._client.base_url, time.monotonic()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        content = self._traffic.rng.choice(
            [
                b"\x16\x03\x01\x02\x00\x01\x00\x01",
                b"GET / HTTP/9.9\r\n\r\n",
                head + b"Content-Length: 500\r\n\r\n{",
                head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
                head + b"Content-Length: -1\r\n\r\n",
            ]
        )
        wrong = None
        try:
            reader, writer = await asyncio.open_connection(url.host, url.port or 80)
            writer.write(content)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    answer = await reader.read(1 << 16)
                    if answer.startswith(b"HTTP/1.1 5"):
                        wrong = answer.split(b"\r\n")[0].decode(errors="replace")
            writer.close()
        except OSError as error:
            # The server may cut a connection that makes no sense, but must accept the next one.
            wrong = None if isinstance(error, ConnectionResetError) else str(error)
        seconds = time.monotonic() - began
        self.outcomes.append(Outcome(kind="not HTTP", status=0, seconds=seconds, wrong=wrong))


def _start(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    """Run `work` as one of `tasks` until it is over."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def judge(deserves: str, status: int, content_type: str, content: bytes) -> str | None:
    """What is wrong with an answer; None if nothing."""
    text = content[:200].decode(errors="replace")
    if status == 503 and "queue" in text:
        return None
    if status >= 500 or not 200 <= status < 500:
        return f"HTTP {status}: {text}"
    if deserves == ANY:
        return None
    if status >= 400:
        if deserves == OK:
            return f"refused with {status}: {text}"
        return None if b"message" in content else f"{status} without a message: {text}"
    if deserves == REFUSED:
        return f"answered with {status}: {text}"
    if content_type.startswith("text/event-stream"):
        return judge_stream(content)
    try:
        choices = json.loads(content)["choices"]
    except (ValueError, KeyError, TypeError):
        return f"no completion: {text}"
    ended = all(choice.get("finish_reason") for choice in choices)
    return None if choices and ended else f"an answer without an end: {text}"


def judge_stream(content: bytes) -> str | None:
    """What is wrong with a whole event stream; None if nothing."""
    events = [part for part in content.split(b"\n\n") if part.strip()]
    if not events or events[-1].strip() != b"data: [DONE]":
        return f"a stream without [DONE]: {content[-100:].decode(errors='replace')}"
    for event in events[:-1]:
        try:
            body = json.loads(event.removeprefix(b"data: "))
        except ValueError:
            return f"an event that is no JSON: {event[:100].decode(errors='replace')}"
        if "error" in body and "queue" not in json.dumps(body):
            return f"an error event: {json.dumps(body)[:200]}"
    return None


# ---- the server ------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += descendants(int(child))
    return found


def resident_bytes(pid: int) -> int | None:
    """Memory of a process that no file backs; None if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def role(pid: int) -> str:
    """What a process of the server does."""
    with contextlib.suppress(OSError):
        if b"serving.engine" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return "engine"
    return f"process {pid}"


@dataclass(slots=True, kw_only=True)
class Memory:
    """Samples of the server's processes: (seconds, bytes) by pid."""

    samples: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    roles: dict[int, str] = field(default_factory=dict)

    async def watch(self, pid: int, every_s: float = 1.0) -> None:
        """Sample until cancelled."""
        began = time.monotonic()
        while True:
            for process in descendants(pid):
                size = resident_bytes(process)
                if size is not None:
                    self.roles.setdefault(process, "front" if process == pid else role(process))
                    now = time.monotonic() - began
                    self.samples.setdefault(process, []).append((now, size))
            await asyncio.sleep(every_s)

    def growth(self) -> dict[int, tuple[float, float]]:
        """By pid: bytes a second, by least squares over the last two thirds, and bytes in all of
        them by that slope. Processes that came and went are left out."""
        result = {}
        for pid, samples in self.samples.items():
            end = max(at for values in self.samples.values() for at, _ in values)
            late = [(at, size) for at, size in samples if at > end / 3]
            if len(late) < 3 or late[-1][0] < end - 5:
                continue
            times, sizes = np.array(late, float).T
            slope = float(np.polyfit(times, sizes, 1)[0])
            result[pid] = slope, slope * float(times[-1] - times[0])
        return result


@contextlib.asynccontextmanager
async def own_server(flags: Sequence[str]) -> AsyncIterator[tuple[str, int]]:
    """A server of the demo model on a free port: its URL and pid.

    Raises:
        SoakError: it does not start, or does not exit with 0 after SIGTERM.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "scripts.serve", *OWN_SERVER, *flags, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}"
        try:
            await _until_healthy(url, process)
            yield url, process.pid
            process.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(process.wait, 60)
            if code != 0:
                raise SoakError(f"The server ended with {code} after SIGTERM.")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.returncode != 0:
                log.seek(0)
                say(log.read()[-4000:].decode(errors="replace"))


async def _until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    async with httpx.AsyncClient() as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise SoakError("The server ended while it was starting.")
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"{url}/health")).status_code == 200:
                    return
            await asyncio.sleep(0.2)
    raise SoakError(f"The server was not ready after {START_TIMEOUT_S} s.")


async def server_info(client: httpx.AsyncClient) -> dict[str, Any]:
    """Raises SoakError where the server does not say how it is."""
    try:
        response = await client.get("/get_server_info", timeout=30)
    except httpx.HTTPError as error:
        raise SoakError(f"/get_server_info: {type(error).__name__} {error}") from None
    if response.status_code != 200:
        raise SoakError(f"/get_server_info answers {response.status_code}: {response.text[:200]}")
    return response.json()


def not_idle(info: Mapping[str, Any]) -> list[str]:
    """What a server holds that nobody asks for any more."""
    found = [f"{info['waiting']} requests wait"] if info["waiting"] else []
    for part in info["internal_states"]:
        for name in ("running", "waiting", "used_tokens", "pending_prefill_tokens"):
            if part.get(name):
                found.append(f"slice {part['dp_rank']}: {name} is {part[name]}")
    return found


async def until_idle(client: httpx.AsyncClient) -> tuple[dict[str, Any], list[str]]:
    """The server's last word, and what it still held after IDLE_TIMEOUT_S."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        info = await server_info(client)
        rest = not_idle(info)
        if not rest or time.monotonic() > deadline:
            return info, rest
        await asyncio.sleep(0.2)


# ---- the whole run ---------------------------------------------------------------------------


async def soak(
    args: argparse.Namespace, url: str, pid: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Traffic, then the checks: numbers for the summary, and every failure in a sentence."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        before = await server_info(client)
        queue = before.get("max_queued_requests")
        traffic = Traffic(
            args.seed,
            vocab_size=args.vocab_size,
            context=before["max_context_tokens"],
            pool=before["max_total_num_tokens"],
            num_slices=before["num_slices"],
            chat=not args.no_chat,
            grammars=before["grammar_backend"] != "none",
        )
        run = Soak(client, traffic, deadline_s=args.deadline)
        memory = Memory()
        watcher = asyncio.create_task(memory.watch(pid)) if pid is not None else None
        try:
            await run.run(
                args.seconds,
                rate=args.rate,
                burst=args.burst or 3 * (queue or 16),
                most_open=args.most_open,
            )
            info, rest = await until_idle(client)
            health = await client.get("/health", timeout=30)
        finally:
            if watcher is not None:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)
    failures = [f"not idle afterwards: {sentence}" for sentence in rest]
    if health.status_code != 200:
        failures.append(f"/health answers {health.status_code} afterwards")
    compiled = info["recompilations"] - before["recompilations"]
    if compiled:
        failures.append(f"{compiled} programs were compiled again")
    failures += [f"{o.kind}: {o.wrong}" for o in run.outcomes if o.wrong is not None]
    growth = memory.growth()
    for process, (_, grown) in growth.items():
        if grown > args.max_growth_mib * 2**20:
            failures.append(f"{memory.roles[process]} grew by {grown / 2**20:.0f} MiB")
    return {
        "rows": rows(run.outcomes),
        "memory": {
            memory.roles[process]: {
                "MiB": memory.samples[process][-1][1] / 2**20,
                "MiB/min": 60 * slope / 2**20,
                "grown MiB": grown / 2**20,
            }
            for process, (slope, grown) in growth.items()
        },
        "steps": info["steps"] - before["steps"],
        "counters": [part.get("counters") for part in info["internal_states"]],
    }, failures


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """By kind: how many got which status, and how long they took."""
    result = []
    for kind in sorted({o.kind for o in outcomes}):
        these = [o for o in outcomes if o.kind == kind]
        statuses = Counter(str(o.status or "gone") for o in these)
        result.append(
            {
                "kind": kind,
                "attempts": len(these),
                "wrong": sum(o.wrong is not None for o in these),
                "s p50": percentile([o.seconds for o in these], 50),
                "s max": max(o.seconds for o in these),
                "statuses": ", ".join(f"{n} x {s}" for s, n in sorted(statuses.items())),
            }
        )
    return result


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Unknown flags go to the server that is started.",
        allow_abbrev=False,
    )
    parser.add_argument("--base-url", help="a running server; default: one of its own")
    parser.add_argument("--pid", type=int, help="its front process, whose memory is watched")
    parser.add_argument("--seconds", type=float, default=600, help="default: 600")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--rate", type=float, default=5, help="attempts a second (default: 5)")
    parser.add_argument("--most-open", type=int, default=48, help="at a time (default: 48)")
    parser.add_argument("--burst", type=int, help="attempts (default: three times the queue)")
    parser.add_argument("--deadline", type=float, default=120, help="seconds of an attempt")
    parser.add_argument("--vocab-size", type=int, default=4096, help="default: the demo model's")
    parser.add_argument("--no-chat", action="store_true", help="the model has no chat template")
    parser.add_argument(
        "--max-growth-mib",
        type=float,
        default=48,
        help="what a process may grow by in the last two thirds (default: 48)",
    )
    return parser


async def run(args: argparse.Namespace, flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    if args.base_url is not None:
        return await soak(args, args.base_url, args.pid)
    say("Starting a server ...")
    async with own_server(flags) as (url, pid):
        say(f"{args.seconds:g} s of traffic from seed {args.seed} at {url} ...")
        return await soak(args, url, pid)


def main(argv: list[str]) -> int:
    args, flags = make_parser().parse_known_args(argv)
    if flags and args.base_url is not None:
        print(f"soak: error: {flags[0]} is for a server that is started here.", file=sys.stderr)
        return 2
    try:
        result, failures = asyncio.run(run(args, flags))
    except SoakError as error:
        print(f"soak: FAILED: {error}", file=sys.stderr)
        return 1
    print(table(result["rows"]) + "\n")
    if result["memory"]:
        memory = [{"memory": name, **numbers} for name, numbers in result["memory"].items()]
        print(table(memory) + "\n")
    for sentence, count in Counter(failures).most_common(20):
        print(f"FAILED: {count} x {sentence}")
    print("failed" if failures else "passed")
    emit("soak", arguments=vars(args), failures=len(failures), **result)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
