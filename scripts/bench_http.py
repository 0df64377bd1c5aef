"""The HTTP front alone: requests and streamed events per second, and whether all arrive in order.

The front is the real one, over the real socket to its engine; in the engine's place stands a stub
that answers as fast as it can (or every --step-ms), one message a step as an engine does. Every
token follows from its prompt and position, so that a lost, doubled or misplaced event is seen.
Front, stub and client are three processes; where there are several cores, the front has one of its
own. What a machine shared with other work cannot blur is the front's own CPU time. For example:

  python scripts/bench_http.py
  python scripts/bench_http.py --concurrency 64 --kinds stream --profile /tmp/front.prof
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvloop

from scripts.benchmarking import ROOT, emit, say, table
from serving.config import DEMO_MODEL_PATH, ServerConfig
from serving.http.server import run
from serving.messages import (
    HEADER,
    Abort,
    FirstToken,
    GetPulse,
    GetStatus,
    Pulse,
    Ready,
    Shutdown,
    StepOutput,
    Submit,
    TokenEvent,
    decode_to_engine,
    frame,
)
from serving.tokenizer import Tokenizer

CONTEXT = 1 << 20
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
KINDS = ("whole", "stream", "chat")
"""Completions that are not streamed, streamed ones, and streamed chats."""
TAIL = b"0\r\n\r\n"
"""The end of a chunked body."""
START_S = 60.0


class BenchError(RuntimeError):
    """The benchmark cannot run, or the front did wrong; one sentence."""


class Script:
    """What the stub says: token `i` behind a prompt, each with a text that shows where it stands.

    The first token of a prompt chooses the answer, so that streams differ from each other.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        letters: dict[int, str] = {}
        for token_id in range(tokenizer.num_entries):
            content = tokenizer.token_bytes(token_id)
            if content.isascii() and content.isalpha() and not tokenizer.is_special(token_id):
                letters[token_id] = content.decode()
        self.ids = list(letters)
        self._texts = list(letters.values())

    def token(self, first: int, position: int) -> int:
        return self.ids[(first * 31 + position) % len(self.ids)]

    def texts(self, first: int, num: int) -> list[str]:
        """The texts of the first `num` tokens, which are what the events of a stream say."""
        return [self._texts[(first * 31 + i) % len(self.ids)] for i in range(num)]


# The stub engine, a process of its own.


class Stub:
    """Answers every request with `max_tokens` tokens, one for each live request a step."""

    def __init__(self, connection: socket.socket, script: Script, step_s: float) -> None:
        self._connection, self._script, self._step_s = connection, script, step_s
        self._live: dict[str, list[int]] = {}  # first prompt token, tokens said, tokens to say
        self._bytes = bytearray()

    def run(self) -> None:
        """Until the front says stop or is gone."""
        self._send(
            Ready(
                max_context_tokens=CONTEXT,
                max_total_tokens=CONTEXT,
                num_slices=1,
                topology="a stub in the engine's place",
                details={},
            )
        )
        due = time.perf_counter()
        while True:
            wait = max(0.0, due - time.perf_counter()) if self._live else None
            if select.select([self._connection], [], [], wait)[0]:
                received = self._connection.recv(1 << 20)
                if not received or not self._handle(received):
                    return
            if self._live and time.perf_counter() >= due:
                self._step()
                due = max(due + self._step_s, time.perf_counter())

    def _handle(self, received: bytes) -> bool:
        """Take messages in; False for the last one."""
        self._bytes += received
        at = 0
        while len(self._bytes) - at >= HEADER.size:
            (size,) = HEADER.unpack_from(self._bytes, at)
            end = at + HEADER.size + size
            if len(self._bytes) < end:
                break
            message = decode_to_engine(self._bytes[at + HEADER.size : end])
            at = end
            match message:
                case Submit(request=request):
                    tokens = request.sampling.max_tokens
                    self._live[request.rid] = [request.prompt[0], 0, tokens]
                case Abort(rid=rid):
                    self._live.pop(rid, None)
                case GetPulse(token=token):
                    self._send(Pulse(token, 0.0))
                case Shutdown():
                    return False
                case GetStatus():
                    pass  # the front waits 5 s for it, in a task that nothing else waits for
        del self._bytes[:at]
        return True

    def _step(self) -> None:
        events, ended = [], []
        for rid, state in self._live.items():
            first, position, num = state
            state[1] += 1
            last = position + 1 == num
            events.append(
                TokenEvent(
                    rid,
                    self._script.token(first, position),
                    "length" if last else None,
                    -0.5,
                    first=FirstToken(0, 0, 0.0) if position == 0 else None,
                )
            )
            if last:
                ended.append(rid)
        for rid in ended:
            del self._live[rid]
        self._send(StepOutput(events))

    def _send(self, message: Any) -> None:
        self._connection.sendall(frame(message))


def engine_main(args: argparse.Namespace) -> int:
    """The stub's process, started by the front as its engine."""
    sys.stdin.buffer.read()
    pin(args.cores)
    script = Script(Tokenizer.load(DEMO_MODEL_PATH))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(args.socket)
        Stub(connection, script, args.step_ms / 1e3).run()
    return 0


# The front, a process of its own.


def front_main(args: argparse.Namespace) -> int:
    """The real front with the stub for an engine."""
    pin(args.cores)
    stub = (
        *(sys.executable, __file__, "engine", "--step-ms", str(args.step_ms)),
        *("--cores", args.other_cores),
    )
    config = ServerConfig(port=0, log_level="warning", grammar_backend="none")
    if args.profile is None:
        return run(config, engine_command=stub)
    profile = cProfile.Profile()
    try:
        return profile.runcall(run, config, engine_command=stub)
    finally:
        profile.dump_stats(args.profile)


def split_cores() -> tuple[str, str]:
    """The front's core, and those of stub and client; nothing where there is only one."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    return (cores[0], ",".join(cores[1:])) if len(cores) > 1 else ("", "")


def pin(cores: str) -> None:
    """Keep this process on these cores ("0,1"); an empty text leaves it where it is."""
    if cores:
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])


class Front:
    """A running front.

    Attributes:
        port: where it listens.
    """

    def __init__(
        self, checkout: Path, *, cores: Sequence[str], step_ms: float, profile: Path | None = None
    ) -> None:
        command = [sys.executable, str(checkout / "scripts" / "bench_http.py"), "front"]
        command += ["--step-ms", str(step_ms), "--cores", cores[0], "--other-cores", cores[1]]
        if profile is not None:
            command += ["--profile", str(profile)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = 0
        for line in self._process.stdout:
            if line.startswith("Serving "):
                self.port = int(line.split(" at http://127.0.0.1:")[1].split(".")[0])
                return
        raise BenchError("The front did not start.")

    @property
    def cpu_s(self) -> float:
        """CPU time of the front so far, all threads, user and system."""
        threads = Path(f"/proc/{self._process.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    @property
    def resident_mib(self) -> float:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> None:
        """End it as a person would.

        Raises:
            BenchError: it did not end well.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise BenchError("The front did not end within 30 s of SIGTERM.") from None
        if code:
            raise BenchError(f"The front ended with exit code {code}.")


# The client, in this process.


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One HTTP request, and what tells its answer from the others'."""

    first: int
    payload: bytes


class Client(asyncio.Protocol):
    """One connection that asks one question after the other and keeps the answers' bytes."""

    def __init__(self, asks: deque[Ask], answers: list[tuple[Ask, bytes]]) -> None:
        self._asks, self._answers = asks, answers
        self._ask: Ask | None = None
        self._parts: list[bytes] = []
        self._length: int | None = None  # of an answer with a content-length
        self._size = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def begin(self) -> None:
        """Ask the next question, or hang up."""
        if not self._asks:
            self._transport.close()
            if not self.done.done():
                self.done.set_result(None)
            return
        self._ask, self._parts, self._length, self._size = self._asks.popleft(), [], None, 0
        self._transport.write(self._ask.payload)

    def data_received(self, data: bytes) -> None:
        if not self._parts:
            head, _, body = data.partition(b"\r\n\r\n")
            _, found, length = head.partition(b"content-length: ")
            self._length = int(length.split(b"\r\n")[0]) if found else None
            self._size = -len(data) + len(body)
        self._parts.append(data)
        self._size += len(data)
        end = self._size == self._length if self._length is not None else data.endswith(TAIL)
        if self._length is None and len(data) < len(TAIL):
            end = b"".join(self._parts[-len(TAIL) :]).endswith(TAIL)
        if end:
            assert self._ask is not None
            self._answers.append((self._ask, b"".join(self._parts)))
            self.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(BenchError(f"The front hung up: {exc}."))


def make_ask(kind: str, number: int, num_tokens: int, script: Script) -> Ask:
    """A request of `num_tokens`; its answer is that of its prompt's first token."""
    first = script.ids[number % len(script.ids)]
    body: dict[str, Any] = {"model": "demo", "max_tokens": num_tokens, "temperature": 0}
    if kind == "chat":
        # Their texts all begin with the same token; positions are what is checked.
        body["messages"] = [{"role": "user", "content": f"Tell me a story about number {number}."}]
    else:
        body["prompt"] = [first, *script.ids[:31]]
    if kind != "whole":
        body["stream"] = True
    content = json.dumps(body).encode()
    path = CHAT if kind == "chat" else COMPLETION
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return Ask(first=first, payload=head.encode() + content)


def check(kind: str, ask: Ask, answer: bytes, num_tokens: int, script: Script, bos: int) -> int:
    """Number of events in an answer.

    Raises:
        BenchError: it is not what the stub said, piece by piece.
    """
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise BenchError(f"An answer is not 200: {answer[:500]!r}")
    want = script.texts(bos if kind == "chat" else ask.first, num_tokens)
    if kind == "whole":
        text = json.loads(body)["choices"][0]["text"]
        if text != "".join(want):
            raise BenchError(f"An answer is wrong: {text[:200]!r}.")
        return 1
    events = [part for part in dechunked(body).split(b"\n\n") if part]
    if events[-1] != b"data: [DONE]":
        raise BenchError(f"A stream does not end with [DONE] but with {events[-1]!r}.")
    choices = [json.loads(part.removeprefix(b"data: "))["choices"][0] for part in events[:-1]]
    if kind == "chat":
        pieces = [choice["delta"].get("content") or "" for choice in choices]
        pieces = [piece for piece in pieces if piece]
    else:
        pieces = [choice["text"] for choice in choices]
    if pieces != want:
        wrong = next((i for i, (a, b) in enumerate(zip(pieces, want, strict=False)) if a != b), -1)
        raise BenchError(
            f"A stream of {num_tokens} tokens has {len(pieces)} events, the first wrong one is "
            f"{wrong}."
        )
    return len(events)


def dechunked(body: bytes) -> bytes:
    """The content of a chunked body."""
    parts, at = [], 0
    while True:
        line_end = body.index(b"\r\n", at)
        size = int(body[at:line_end], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2


async def load(
    front: Front, kind: str, concurrency: int, num_requests: int, num_tokens: int, script: Script
) -> dict[str, Any]:
    """One row: so many requests from so many connections, every answer checked.

    Raises:
        BenchError: an answer is wrong.
    """
    bos = Tokenizer.load(DEMO_MODEL_PATH).bos_token_id
    assert bos is not None
    asks = deque(make_ask(kind, i, num_tokens, script) for i in range(num_requests))
    answers: list[tuple[Ask, bytes]] = []
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(concurrency):
        _, client = await loop.create_connection(
            lambda: Client(asks, answers), "127.0.0.1", front.port
        )
        clients.append(client)
    cpu, began = front.cpu_s, time.perf_counter()
    for client in clients:
        client.begin()
    await asyncio.gather(*(client.done for client in clients))
    seconds = time.perf_counter() - began
    cpu = front.cpu_s - cpu
    if len(answers) != num_requests:
        raise BenchError(f"{len(answers)} answers to {num_requests} requests.")
    events = sum(check(kind, ask, answer, num_tokens, script, bos) for ask, answer in answers)
    row = {
        "kind": kind,
        "concurrency": concurrency,
        "tokens": num_tokens,
        "requests": num_requests,
        "seconds": seconds,
        "requests/s": num_requests / seconds,
        "front CPU": cpu / seconds,
        "us CPU/request": 1e6 * cpu / num_requests,
    }
    if kind != "whole":
        row |= {"events/s": events / seconds, "us CPU/event": 1e6 * cpu / events}
    return row


async def bench(args: argparse.Namespace, fronts: dict[str, Front]) -> list[dict[str, Any]]:
    """The rows, for each front the round of least CPU time; several fronts take turns."""
    script = Script(Tokenizer.load(DEMO_MODEL_PATH))
    rows = []
    for kind in args.kinds:
        tokens = args.whole_tokens if kind == "whole" else args.stream_tokens
        for concurrency in args.concurrency:
            num = max(concurrency, args.whole_requests if kind == "whole" else args.streams)
            best: dict[str, dict[str, Any]] = {}
            for number in range(args.rounds + 1):  # the first one warms
                for name, front in fronts.items():
                    row = await load(front, kind, concurrency, num, tokens, script)
                    if number and (
                        name not in best or row["us CPU/request"] < best[name]["us CPU/request"]
                    ):
                        best[name] = row
            rows += [{"front": name, **row} for name, row in best.items()]
            say(table(rows[-len(best) :]))
    for name, front in fronts.items() if args.crowd else ():
        row = await load(front, "stream", args.crowd, args.crowd, args.crowd_tokens, script)
        rows.append({"front": name, **row})
        say(f"{args.crowd} streams at once of {args.crowd_tokens} tokens: nothing lost, in order")
    return rows


def add_hidden(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--cores", default="")


def bench_main(args: argparse.Namespace) -> int:
    cores = split_cores()
    fronts: dict[str, Front] = {}
    try:
        checkouts = (
            {"this": ROOT} if args.against is None else {"this": ROOT, "other": args.against}
        )
        for name, checkout in checkouts.items():
            fronts[name] = Front(checkout, cores=cores, step_ms=args.step_ms, profile=args.profile)
        pin(cores[1])
        rows = uvloop.run(bench(args, fronts))
        memory = {f"{name}_front_mib": front.resident_mib for name, front in fronts.items()}
    except BenchError as error:
        print(f"bench_http.py: error: {error}", file=sys.stderr)
        return 1
    finally:
        for front in fronts.values():
            front.stop()
    print(table(rows))
    emit(
        "bench_http",
        configuration={"step_ms": args.step_ms, "cores": os.cpu_count()},
        results={"rows": rows, **memory},
    )
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3, help="the one of least CPU time is told")
    parser.add_argument("--whole-requests", type=int, default=1000)
    parser.add_argument("--whole-tokens", type=int, default=16, help="of an answer not streamed")
    parser.add_argument("--streams", type=int, default=256, help="in one row")
    parser.add_argument("--stream-tokens", type=int, default=64, help="of a streamed answer")
    parser.add_argument("--crowd", type=int, default=1000, help="streams all at once; 0 for none")
    parser.add_argument("--crowd-tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=0.0, help="time of the stub's step")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the front here")
    parser.add_argument(
        "--against", type=Path, help="another checkout with this script: both fronts, by turns"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["engine"]:
        parser = argparse.ArgumentParser()
        add_hidden(parser)
        parser.add_argument("socket")
        return engine_main(parser.parse_args(argv[1:]))
    if argv[:1] == ["front"]:
        parser = argparse.ArgumentParser()
        add_hidden(parser)
        parser.add_argument("--other-cores", default="")
        parser.add_argument("--profile", type=Path)
        return front_main(parser.parse_args(argv[1:]))
    return bench_main(make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
