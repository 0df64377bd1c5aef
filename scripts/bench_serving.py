"""A running server under load, through HTTP: time to first token, between tokens, and to the end.

Works with any server that has /v1/completions and streams. Requests come at random (Poisson) times
with --request-rate, or from --concurrency clients that each ask again when answered. Prompts are
token ids, so no tokenizer is needed. For example:

  python scripts/bench_serving.py --base-url http://127.0.0.1:30000 --workload gsp --concurrency 16
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx

from scripts.benchmarking import emit, say, spread, table
from scripts.workloads import (
    FIRST_TOKEN,
    Session,
    Tokens,
    add_arguments,
    from_arguments,
    num_turns,
    poisson_arrivals,
)


class BenchError(RuntimeError):
    """The benchmark cannot run; one sentence."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """What became of one request. Times are seconds of one clock; 0 means it never happened.

    Attributes:
        events: times at which text arrived.
        token_ids: the answer's tokens, where the server says them.
        cached: prompt tokens from the server's prefix cache; None where it does not say.
        error: None for a complete answer.
    """

    started: float
    ended: float = 0.0
    events: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt: int = 0
    completion: int = 0
    cached: int | None = None
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.events[0] - self.started

    @property
    def latency(self) -> float:
        return self.ended - self.started

    @property
    def gaps(self) -> list[float]:
        """Between one piece of text and the next."""
        return [b - a for a, b in itertools.pairwise(self.events)]


class Load:
    """Runs sessions against one server. Every request has a deadline, and so has the whole."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        *,
        model: str,
        timeout_s: float,
        max_seconds: float,
        return_token_ids: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`client` knows the base URL; no request starts later than `max_seconds`."""
        self.answers: list[Answer] = []
        self._client, self._model, self._clock = client, model, clock
        self._timeout_s, self._max_seconds = timeout_s, max_seconds
        self._return_token_ids = return_token_ids
        self._stop_at = 0.0

    async def closed_loop(self, sessions: Sequence[Session], concurrency: int) -> float:
        """`concurrency` clients, each takes the next session when its own is over; seconds."""
        rest = iter(sessions)

        async def client() -> None:
            for session in rest:
                await self._session(session)

        return await self._timed(lambda: _gather(client() for _ in range(concurrency)))

    async def open_loop(self, sessions: Sequence[Session], arrivals: Iterator[float]) -> float:
        """Sessions begin at their times, whatever became of the others; seconds."""

        async def come() -> None:
            began, tasks = self._clock(), []
            for session, at in zip(sessions, arrivals, strict=False):
                await asyncio.sleep(max(0.0, began + at - self._clock()))
                tasks.append(asyncio.create_task(self._session(session)))
            await _gather(tasks)

        return await self._timed(come)

    async def _timed(self, work: Callable[[], Awaitable[None]]) -> float:
        began = self._clock()
        self._stop_at = began + self._max_seconds
        await work()
        return self._clock() - began

    async def _session(self, session: Session) -> None:
        conversation = session.prefix
        for turn in session.turns:
            if self._clock() > self._stop_at:
                return
            conversation += turn
            answer = await self.ask(conversation, session.max_tokens)
            self.answers.append(answer)
            if answer.error is not None:
                return
            # A server that says no ids gets made-up ones back: it knows its own answer's length.
            said = tuple(answer.token_ids) or tuple(
                FIRST_TOKEN + i % 64 for i in range(session.max_tokens)
            )
            conversation += said

    async def ask(self, prompt: Tokens, max_tokens: int) -> Answer:
        """One streamed completion; what goes wrong is in the answer, never raised."""
        answer = Answer(started=self._clock())
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._return_token_ids:
            body["return_token_ids"] = True
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(body, answer)
        except TimeoutError:
            answer.error = f"no end within {self._timeout_s:g} s"
        except httpx.HTTPError as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.ended = self._clock()
        if answer.error is None and not answer.events:
            answer.error = "an empty answer"
            if answer.completion:  # a model with random weights, and another one's tokenizer
                answer.error = (
                    f"{answer.completion} tokens without any text; --return-token-ids counts tokens"
                )
        return answer

    async def _stream(self, body: dict[str, Any], answer: Answer) -> None:
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                answer.error = f"HTTP {response.status_code}: {text[:200]}"
                return
            ended = False
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    ended = True
                else:
                    self._take(json.loads(data), answer)
            if not ended and answer.error is None:
                answer.error = "the stream ended without [DONE]"

    def _take(self, event: dict[str, Any], answer: Answer) -> None:
        if "error" in event:
            answer.error = f"error event: {json.dumps(event['error'])[:200]}"
        for choice in event.get("choices") or ():
            # The last event may carry a finish reason and nothing else.
            ids = choice.get("token_ids") or ()
            if ids or choice.get("text") or choice.get("finish_reason") is None:
                answer.events.append(self._clock())
            answer.token_ids += ids
        usage = event.get("usage")
        if usage:
            answer.prompt = usage["prompt_tokens"]
            answer.completion = usage["completion_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            answer.cached = details.get("cached_tokens")


async def _gather(work: Any) -> None:
    await asyncio.gather(*work)


def summarise(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Counts, rates, and percentiles in milliseconds, of the complete answers."""
    good = [answer for answer in answers if answer.error is None]
    cached = [answer.cached for answer in good if answer.cached is not None]
    prompt, completion = sum(a.prompt for a in good), sum(a.completion for a in good)
    per_token = [(a.ended - a.events[0]) / (a.completion - 1) for a in good if a.completion > 1]
    return {
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "seconds": seconds,
        "requests/s": len(good) / seconds,
        "tokens in": prompt,
        "tokens out": completion,
        "out/s": completion / seconds,
        "total/s": (prompt + completion) / seconds,
        "hit rate": sum(cached) / prompt if cached else None,
        "latencies": {
            "time to first token": spread([a.ttft for a in good], "ms", 1e3),
            "between pieces of text": spread([g for a in good for g in a.gaps], "ms", 1e3),
            "per output token": spread(per_token, "ms", 1e3),
            "whole answer": spread([a.latency for a in good], "ms", 1e3),
        },
    }


async def server_facts(client: httpx.AsyncClient) -> dict[str, Any]:
    """/get_server_info, empty where the server has none.

    Raises:
        BenchError: nobody listens.
    """
    try:
        response = await client.get("/get_server_info")
    except httpx.HTTPError as error:
        raise BenchError(f"No answer from {client.base_url}: {error}.") from None
    return response.json() if response.status_code == 200 else {}


async def model_name(client: httpx.AsyncClient) -> str:
    """The first model that the server offers."""
    response = await client.get("/v1/models")
    if response.status_code != 200 or not response.json().get("data"):
        raise BenchError("The server lists no model at /v1/models; name one with --model.")
    return response.json()["data"][0]["id"]


def vocabulary_size(args: argparse.Namespace, facts: dict[str, Any]) -> int:
    size = args.vocab_size or facts.get("vocab_size") or facts.get("engine", {}).get("vocab_size")
    if size is None:
        raise BenchError(
            "The server does not say how many tokens its vocabulary has: give --vocab-size."
        )
    return int(size)


def cache_totals(facts: dict[str, Any]) -> tuple[int, int] | None:
    """Context tokens started so far on all slices and those found in the cache, if it says so."""
    parts = [p["counters"] for p in facts.get("internal_states", ()) if "counters" in p]
    if not parts:
        return None
    return sum(p["prompt_tokens"] for p in parts), sum(p["cached_tokens"] for p in parts)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--vocab-size", type=int, help="default: what /get_server_info says")
    parser.add_argument("--request-rate", type=float, help="sessions a second, at Poisson times")
    parser.add_argument(
        "--concurrency", type=int, help="clients in a closed loop (default: 16, if no rate)"
    )
    parser.add_argument("--warm-up", type=int, default=2, help="requests not counted (default: 2)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a request may take")
    parser.add_argument(
        "--max-seconds", type=float, default=600, help="no request starts later (default: 600)"
    )
    parser.add_argument(
        "--return-token-ids",
        action="store_true",
        help="ask for the answer's token ids, so that later turns of a chat repeat the real answer",
    )
    add_arguments(parser)
    return parser


async def bench(args: argparse.Namespace, client: httpx.AsyncClient) -> dict[str, Any]:
    """Warm up, run the workload, and sum up."""
    facts = await server_facts(client)
    vocab_size = vocabulary_size(args, facts)
    load = Load(
        client,
        model=args.model or await model_name(client),
        timeout_s=args.timeout,
        max_seconds=args.max_seconds,
        return_token_ids=args.return_token_ids,
    )
    for i in range(args.warm_up):
        answer = await load.ask((FIRST_TOKEN + i,) * 8, 4)
        if answer.error is not None:
            raise BenchError(f"The server refuses a small request: {answer.error}")
    sessions = from_arguments(args, vocab_size)
    say(f"{num_turns(sessions)} requests in {len(sessions)} sessions ...")
    before = cache_totals(await server_facts(client))
    if args.request_rate is not None:
        seconds = await load.open_loop(sessions, poisson_arrivals(args.request_rate, args.seed))
    else:
        seconds = await load.closed_loop(sessions, args.concurrency or 16)
    result = summarise(load.answers, seconds)
    info = await server_facts(client)
    after = cache_totals(info)
    if result["hit rate"] is None and before is not None and after is not None:
        result["hit rate"] = (after[1] - before[1]) / max(1, after[0] - before[0])
    result["recompilations"] = info.get("recompilations")
    result["error kinds"] = dict(Counter(a.error for a in load.answers if a.error).most_common(5))
    result["server"] = {key: info[key] for key in ("version", "topology") if key in info}
    return result


def show(result: dict[str, Any]) -> None:
    latencies = result["latencies"]
    nested = ("latencies", "error kinds", "server")
    print(table([{key: value for key, value in result.items() if key not in nested}]) + "\n")
    print(table([{"latency": name, **columns} for name, columns in latencies.items()]) + "\n")
    for error, count in result["error kinds"].items():
        print(f"{count} x {error}")


async def run(args: argparse.Namespace) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(
        base_url=args.base_url, headers=headers, timeout=args.timeout, limits=limits
    ) as client:
        return await bench(args, client)


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if args.request_rate is not None and args.concurrency is not None:
        print("bench_serving: error: give --request-rate or --concurrency.", file=sys.stderr)
        return 2
    try:
        result = asyncio.run(run(args))
    except BenchError as error:
        print(f"bench_serving: error: {error}", file=sys.stderr)
        return 1
    show(result)
    arguments = {key: value for key, value in vars(args).items() if key != "api_key"}
    emit("serving", arguments=arguments, **result)
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
