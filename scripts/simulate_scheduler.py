"""The real scheduler in virtual time: what phase policies and load-balance methods are worth.

A stub stands where the devices are: a step takes as long as its program's size says, and every
token is made up. Costs of a step are flags; their defaults are measured ones. Part `phases`
compares mixed, interleaved and aligned prefill by load and number of slices, with the costs of
DeepSeek-V2-Lite on an H100. Part `balance` compares the ways to choose a slice, over four slices
whose prefixes exceed three of their caches. Minutes of load take seconds. For example:

  python scripts/simulate_scheduler.py
  python scripts/simulate_scheduler.py --part balance --workloads zipf --requests 2000
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.benchmarking import emit, percentile, say, table
from scripts.workloads import (
    Session,
    Tokens,
    Vocabulary,
    independent,
    multi_turn,
    poisson_arrivals,
    shared_prefix,
)
from serving.request import Request, SamplingParams
from serving.scheduler.phases import PhasePolicy
from serving.scheduler.plan import SampledToken, StepPlan, StepResult
from serving.scheduler.scheduler import Scheduler, SchedulerConfig, TokenOutcome

METHODS = ("cache_aware", "round_robin", "total_requests", "total_tokens")
VOCABULARY = 32000


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of a step. All slices wait for the fullest one's program.

    A step without prefill takes what its decode bucket takes; one with prefill takes what the
    largest decode bucket takes, and its extend bucket's tokens on top. KV tokens that decode rows
    read are added to both.

    Attributes:
        decode: ascending (rows, seconds), one per program.
        extend: ascending prompt tokens, one per program; empty means that every number has one.
        prefill_token: seconds a prompt token of the bucket.
        context_token: seconds a KV token that the fullest slice's decode rows read.
        launch: seconds every step takes beside.
    """

    decode: tuple[tuple[int, float], ...]
    extend: tuple[int, ...]
    prefill_token: float
    context_token: float = 0.0
    launch: float = 0.0

    def step(self, plan: StepPlan) -> float:
        """How long the plan's program takes."""
        context = max(sum(row.position + 1 for row in s.decode) for s in plan.slices)
        seconds = self.launch + self.context_token * context
        tokens = max(sum(len(c.tokens) for c in s.prefill) for s in plan.slices)
        rows = max(len(s.decode) for s in plan.slices)
        if not tokens:
            return seconds + next(cost for bucket, cost in self.decode if rows <= bucket)
        padded = next((m for m in self.extend if tokens <= m), tokens)
        # Without buckets nothing is padded, decode rows neither.
        decode = self.decode[-1][1] if self.extend or rows else 0.0
        return seconds + decode + self.prefill_token * padded


H100_V2_LITE = Costs(
    # The peer's steps at context 1024, less what reading the context takes of each.
    decode=(
        (1, 3.94e-3),
        (8, 8.68e-3),
        (32, 12.5e-3),
        (64, 13.18e-3),
        (128, 14.17e-3),
        (256, 14.47e-3),
    ),
    extend=(128, 512, 2048, 8192),
    prefill_token=1 / 78_400,
    context_token=1.2e-8,
    launch=0.5e-3,
)
"""vLLM 0.26 on one H100, DeepSeek-V2-Lite in bfloat16: decode 3.95 to 17.63 ms at B = 1 to 256,
context 1024, 16.33 ms at B = 64, context 4096; prefill 78,400 tokens/s."""
SIMPLE_WORKER = Costs(decode=((1 << 30, 20e-3),), extend=(), prefill_token=1 / 20_000)
"""20 ms a decode step, 20,000 prompt tokens a second."""


class MadeUpTokens:
    """What the devices would sample: token ids that no two requests share."""

    def __init__(self) -> None:
        self._serial = itertools.count()

    def result(self, plan: StepPlan) -> StepResult:
        return StepResult(
            tokens=[
                [self._token() for _ in s.decode]
                + [self._token() if chunk.samples else None for chunk in s.prefill]
                for s in plan.slices
            ],
            scores={},
        )

    def _token(self) -> SampledToken:
        # Beyond the vocabulary of prompts, so that an answer is in the cache only for its owner.
        return SampledToken(VOCABULARY + next(self._serial), 0.0)


@dataclass(slots=True, kw_only=True)
class Client:
    """A session under way: the conversation so far, and the turn that is being answered."""

    session: Session
    turn: int = 0
    conversation: Tokens = ()
    asked: float = 0.0
    times: list[float]
    answer: list[int]


class Simulation:
    """One scheduler, its clients, and the virtual clock that both see."""

    def __init__(self, config: SchedulerConfig, costs: Costs) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(config, clock=lambda: self.now)
        self.steps = self.extend_steps = self.prefilling_slices = 0
        self.ttft: list[float] = []
        self.gaps: list[float] = []
        self.latency: list[float] = []
        self._costs, self._devices = costs, MadeUpTokens()
        self._clients: dict[str, Client] = {}
        self._serial = itertools.count()
        self._next_session: Callable[[], Session | None] = lambda: None

    def closed_loop(self, sessions: Sequence[Session], concurrency: int) -> None:
        """`concurrency` clients, each begins the next session when its own is over."""
        rest = iter(sessions)
        self._next_session = lambda: next(rest, None)
        for session in itertools.islice(rest, concurrency):
            self._begin(session)
        while self.scheduler.has_work:
            self._step()

    def open_loop(self, sessions: Sequence[Session], arrivals: Iterator[float]) -> None:
        """Sessions begin at their times."""
        coming = deque(zip(sessions, arrivals, strict=False))
        while coming or self.scheduler.has_work:
            if not self.scheduler.has_work:
                self.now = max(self.now, coming[0][1])
            while coming and coming[0][1] <= self.now:
                self._begin(*coming.popleft())
            self._step()

    def _begin(self, session: Session, at: float | None = None) -> None:
        client = Client(session=session, conversation=session.prefix, times=[], answer=[])
        self._ask(client, self.now if at is None else at)

    def _ask(self, client: Client, at: float) -> None:
        client.conversation += client.session.turns[client.turn]
        client.asked, client.times, client.answer = at, [], []
        rid = str(next(self._serial))
        self._clients[rid] = client
        params = SamplingParams(max_tokens=client.session.max_tokens, temperature=0.0)
        self.scheduler.add(Request(rid=rid, prompt=client.conversation, sampling=params))

    def _step(self) -> None:
        plan = self.scheduler.plan()
        if plan is None:
            raise RuntimeError("Requests are live, but the scheduler plans nothing.")
        self.now += self._costs.step(plan)
        self.steps += 1
        prefilling = sum(bool(s.prefill) for s in plan.slices)
        self.extend_steps += bool(prefilling)
        self.prefilling_slices += prefilling
        for outcome in self.scheduler.apply(plan, self._devices.result(plan)):
            self._take(outcome)

    def _take(self, outcome: TokenOutcome) -> None:
        client = self._clients[outcome.rid]
        client.times.append(self.now)
        client.answer.append(outcome.token_id)
        if outcome.finish_reason is None:
            return
        del self._clients[outcome.rid]
        self.ttft.append(client.times[0] - client.asked)
        self.latency.append(client.times[-1] - client.asked)
        self.gaps += [b - a for a, b in itertools.pairwise(client.times)]
        client.turn += 1
        if client.turn < len(client.session.turns):
            client.conversation += tuple(client.answer)
            self._ask(client, self.now)
        elif (session := self._next_session()) is not None:
            self._begin(session)

    def summary(self) -> dict[str, Any]:
        """Rates, percentiles in milliseconds, hit rate, and how evenly slices were used."""
        self.scheduler.check_integrity()
        counters = [load.counters for load in self.scheduler.status()]
        prompt, cached = (
            sum(getattr(c, name) for c in counters) for name in ("prompt_tokens", "cached_tokens")
        )
        work = [c.prompt_tokens - c.cached_tokens + c.generated_tokens for c in counters]
        tokens = [c.prompt_tokens + c.generated_tokens for c in counters]
        return {
            "req/s": len(self.latency) / self.now,
            "out/s": sum(c.generated_tokens for c in counters) / self.now,
            "hit rate": cached / prompt,
            "ttft p50": 1e3 * percentile(self.ttft, 50),
            "ttft p99": 1e3 * percentile(self.ttft, 99),
            "itl p50": 1e3 * percentile(self.gaps, 50),
            "itl p99": 1e3 * percentile(self.gaps, 99),
            "e2e p50": 1e3 * percentile(self.latency, 50),
            "e2e p99": 1e3 * percentile(self.latency, 99),
            "max/mean tokens": max(tokens) * len(tokens) / sum(tokens),
            "max/mean work": max(work) * len(work) / sum(work),
            "extend steps": self.extend_steps / self.steps,
            "slices in them": self.prefilling_slices / max(1, self.extend_steps),
            "retracted": sum(c.retracted for c in counters),
        }


def phase_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Phase policies at several loads per slice, arrivals at Poisson times."""
    policies = {
        "mixed": PhasePolicy(),
        f"interleaved {args.interval}": PhasePolicy(interval=args.interval),
        f"aligned {args.max_delay}": PhasePolicy(max_delay=args.max_delay),
    }
    costs = replace(H100_V2_LITE, prefill_token=1 / args.prefill_rate, launch=args.launch_ms / 1e3)
    slots = costs.decode[-1][0]
    for num_slices, load in itertools.product(args.slices, args.loads):
        vocabulary = Vocabulary(VOCABULARY, args.seed)
        sessions = independent(
            vocabulary,
            requests=args.phase_requests * num_slices,
            input_tokens=args.input_tokens,
            output_tokens=args.output_tokens,
            spread=0.5,
        )
        for name, policy in policies.items():
            config = SchedulerConfig(
                num_slices=num_slices,
                slots_per_slice=slots,
                pages_per_slice=1 + args.phase_kv_tokens // args.page_size,
                page_size=args.page_size,
                prefill_tokens_per_step=args.chunk_tokens,
                prefill_rows_per_step=64,
                max_context_tokens=16384,
                phases=policy,
            )
            simulation = Simulation(config, costs)
            simulation.open_loop(sessions, poisson_arrivals(load * num_slices, args.seed))
            facts = {"slices": num_slices, "req/s/slice": load, "policy": name}
            yield facts | {
                key: value
                for key, value in simulation.summary().items()
                if key not in ("hit rate", "max/mean tokens")
            }


def balance_sessions(name: str, args: argparse.Namespace) -> list[Session]:
    """The three workloads, --requests turns in all."""
    vocabulary = Vocabulary(VOCABULARY, args.seed)
    if name == "chat":
        return multi_turn(
            vocabulary,
            groups=64,
            conversations=-(-args.requests // 4),
            turns=4,
            prefix_tokens=1024,
            question_tokens=128,
            output_tokens=32,
            zipf=0.9,
        )
    return shared_prefix(
        vocabulary,
        groups=64,
        requests=args.requests,
        prefix_tokens=2048,
        question_tokens=128,
        output_tokens=32,
        zipf=1.1 if name == "zipf" else 0.0,
    )


def balance_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Load-balance methods over slices with small caches, clients in a closed loop."""
    for workload in args.workloads:
        for method in args.methods:
            config = SchedulerConfig(
                num_slices=args.balance_slices,
                slots_per_slice=args.balance_slots,
                pages_per_slice=1 + args.kv_tokens // args.page_size,
                page_size=args.page_size,
                prefill_tokens_per_step=args.chunk_tokens,
                prefill_rows_per_step=64,
                max_context_tokens=16384,
                schedule_policy=args.schedule_policy,
                load_balance=method,
            )
            simulation = Simulation(config, SIMPLE_WORKER)
            simulation.closed_loop(balance_sessions(workload, args), args.clients)
            yield {"workload": workload, "method": method, **simulation.summary()}


def _list(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(","))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("phases", "balance", "both"), default="both")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument(
        "--chunk-tokens", type=int, default=8192, help="a slice's prompt tokens in one step"
    )
    group = parser.add_argument_group("phases")
    group.add_argument("--slices", type=_list(int), default=(1, 4, 8), help="default: 1,4,8")
    group.add_argument(
        "--loads", type=_list(float), default=(2, 6, 10), help="requests a second and slice"
    )
    group.add_argument("--phase-requests", type=int, default=100, help="for each slice")
    group.add_argument("--input-tokens", type=int, default=1024, help="mean, +-50 %%")
    group.add_argument("--output-tokens", type=int, default=128, help="mean, +-50 %%")
    group.add_argument("--phase-kv-tokens", type=int, default=1_000_000, help="of each slice")
    group.add_argument("--interval", type=int, default=4, help="of the interleaved policy")
    group.add_argument("--max-delay", type=int, default=30, help="of the aligned policy")
    group.add_argument("--prefill-rate", type=float, default=78_400, help="tokens/s of a slice")
    group.add_argument("--launch-ms", type=float, default=0.5, help="of every step")
    group = parser.add_argument_group("balance")
    group.add_argument("--methods", type=_list(str), default=METHODS)
    group.add_argument("--workloads", type=_list(str), default=("gsp", "zipf", "chat"))
    group.add_argument("--schedule-policy", choices=("fcfs", "lpm"), default="fcfs")
    group.add_argument("--requests", type=int, default=614)
    group.add_argument("--clients", type=int, default=64)
    group.add_argument("--balance-slices", type=int, default=4)
    group.add_argument("--balance-slots", type=int, default=16, help="of each slice")
    group.add_argument("--kv-tokens", type=int, default=40_000, help="of each slice")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    results: dict[str, list[dict[str, Any]]] = {}
    for part, rows in (("phases", phase_rows), ("balance", balance_rows)):
        if args.part not in (part, "both"):
            continue
        began = time.perf_counter()
        results[part] = list(rows(args))
        print(table(results[part]) + "\n")
        say(f"{part}: {time.perf_counter() - began:.1f} s")
    costs = {"phases": asdict(H100_V2_LITE), "balance": asdict(SIMPLE_WORKER)}
    emit("scheduler", arguments=vars(args), costs=costs, **results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
