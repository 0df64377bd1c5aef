"""How long other slices' tokens wait while one slice prefills a long prompt, by phase policy.

All slices run one program a step, so a prompt on one makes the tokens of all wait. Here every slice
decodes, then slice 0 gets a long prompt; measured are the gaps between tokens of the decoding
requests from its arrival to its first token, on the other slices and on its own, and how long that
first token takes. The engine and its programs are made once; each policy and each budget (most
prompt tokens of a slice in a step, as --chunked-prefill-size) has a real scheduler of its own.
Every flag of scripts/serve.py that concerns the engine may be added. For example:

  python scripts/bench_imbalance.py --shape deepseek-v2-lite --device cuda --tp 2 --dp-size 2 \\
      --ep 2 --enable-dp-attention --time-limit-s 90
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_offline import SHAPES, configured
from scripts.benchmarking import emit, own_parser, percentile, say, table
from scripts.workloads import Tokens, Vocabulary
from serving.config import ServerConfig
from serving.engine.engine import (
    CompileCounter,
    Engine,
    configure_jax,
    describe,
    make_engine,
    scheduler_config,
)
from serving.engine.runner import ModelRunner
from serving.request import Request, SamplingParams
from serving.scheduler.phases import PhasePolicy
from serving.scheduler.scheduler import Scheduler, TokenOutcome

POLICIES = "mixed,interleaved:1,interleaved:4,aligned:30"
SETTLE_STEPS = 20
"""Decode steps between two long prompts, whose gaps are the undisturbed ones."""


def phase_policy(text: str) -> PhasePolicy:
    """mixed, interleaved:N (--prefill-decode-interval N), or aligned:N (--enable-prefill-delayer
    with N --prefill-delayer-max-delay-passes).

    Raises:
        ValueError: it is none of these.
    """
    name, _, number = text.partition(":")
    match name:
        case "mixed" if not number:
            return PhasePolicy()
        case "interleaved":
            return PhasePolicy(interval=int(number))
        case "aligned":
            return PhasePolicy(max_delay=int(number))
    raise ValueError(f"{text!r} is none of mixed, interleaved:N, aligned:N.")


class Bench:
    """One scheduler over a runner, with decoding requests on every slice."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary) -> None:
        self.engine, self.vocabulary = engine, vocabulary
        self.times: dict[str, list[float]] = defaultdict(list)
        self.slice_of: dict[str, int] = {}
        self._serial = 0

    def add(self, prompt: Tokens, max_tokens: int, dp_rank: int) -> str:
        rid = str(self._serial)
        self._serial += 1
        self.slice_of[rid] = dp_rank
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.engine.add(Request(rid=rid, prompt=prompt, sampling=params, dp_rank=dp_rank))
        return rid

    def step(self) -> None:
        """One step, and the time at which its tokens were known.

        Raises:
            RuntimeError: a decoding request ended: the pool or the context is too small.
        """
        outcomes = self.engine.step()
        now = time.perf_counter()
        for outcome in outcomes:
            if not isinstance(outcome, TokenOutcome) or outcome.finish_reason is not None:
                raise RuntimeError(f"Request {outcome.rid} ended while it was measured.")
            self.times[outcome.rid].append(now)

    def fill(self, batch: int, context: int) -> None:
        """`batch` requests on every slice, until all decode."""
        slices = self.engine.scheduler.config.num_slices
        most = self.engine.scheduler.config.max_context_tokens - context
        rids = [
            self.add(self.vocabulary.draw(context), most, dp_rank)
            for _ in range(batch)
            for dp_rank in range(slices)
        ]
        while not all(self.times[rid] for rid in rids):
            self.step()

    def gaps(self, began: float, ended: float) -> dict[int, list[float]]:
        """Seconds between tokens, of gaps that end in the span, by slice."""
        found: dict[int, list[float]] = defaultdict(list)
        for rid, times in self.times.items():
            found[self.slice_of[rid]] += [
                b - a for a, b in itertools.pairwise(times) if began < b <= ended
            ]
        return found

    def disturb(self, prompt_tokens: int) -> tuple[float, float]:
        """Give slice 0 a long prompt: when it came, and when its first token did."""
        began = time.perf_counter()
        rid = self.add(self.vocabulary.draw(prompt_tokens), 2, 0)
        while not self.times[rid]:
            self.step()
        (ended,) = self.times.pop(rid)
        self.engine.abort(rid)
        return began, ended

    def close(self) -> None:
        """End everything, with nothing in flight."""
        for rid in list(self.times):
            self.engine.abort(rid)
        while self.engine.has_work:
            self.engine.step()


def measure_policy(
    runner: ModelRunner, config: ServerConfig, policy: str, budget: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One policy and budget: gaps in ms, without and with the long prompt."""
    settings = replace(
        scheduler_config(config, runner),
        phases=phase_policy(policy),
        prefill_tokens_per_step=budget,
        radix_cache=False,
    )
    engine = Engine(runner, Scheduler(settings), overlap=not config.disable_overlap_schedule)
    bench = Bench(engine, Vocabulary(runner.model.vocab_size, args.seed))
    bench.fill(args.batch, args.context)
    calm: list[float] = []
    other: list[float] = []
    own: list[float] = []
    first: list[float] = []
    compiles = CompileCounter()
    for _ in range(args.repeats):
        bench.step()
        began = time.perf_counter()
        for _ in range(SETTLE_STEPS):
            bench.step()
        calm += [g for gaps in bench.gaps(began, time.perf_counter()).values() for g in gaps]
        began, ended = bench.disturb(args.prompt_tokens)
        disturbed = bench.gaps(began, ended)
        own += disturbed.pop(0)
        other += [g for gaps in disturbed.values() for g in gaps]
        first.append(ended - began)
    bench.close()
    row: dict[str, Any] = {
        "policy": policy,
        "budget": budget,
        "calm ms": 1e3 * statistics.median(calm),
        "first token ms": 1e3 * statistics.median(first),
    }
    for name, gaps in (("other", other), ("own", own)):
        if gaps:
            row |= {f"{name} p50": 1e3 * percentile(gaps, 50)}
            row |= {f"{name} p99": 1e3 * percentile(gaps, 99), f"{name} max": 1e3 * max(gaps)}
    meanwhile = len(own + other) / (args.batch * settings.num_slices * args.repeats)
    row["tokens meanwhile"] = meanwhile
    # Of the tokens that undisturbed steps would have given in that time.
    row["kept %"] = 100 * meanwhile * row["calm ms"] / (1e3 * statistics.mean(first))
    return row | {"recompilations": compiles.count}


def measure(
    runner: ModelRunner, config: ServerConfig, args: argparse.Namespace, deadline: float
) -> Iterator[dict[str, Any]]:
    """A row for each policy and budget, large budgets first."""
    largest = runner.buckets.prefill_tokens
    budgets = [b for b in sorted(args.budgets, reverse=True) if b <= largest]
    for policy in args.policies:
        for budget in budgets:
            if time.monotonic() > deadline:
                yield {"policy": policy, "budget": budget, "note": "skipped by the time limit"}
            else:
                yield measure_policy(runner, config, policy, budget, args)


def make_parser() -> argparse.ArgumentParser:
    parser = own_parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=tuple(SHAPES), help="dummy weights of this published configuration")
    add(
        "--policies",
        type=lambda text: tuple(text.split(",")),
        default=tuple(POLICIES.split(",")),
        help=f"default: {POLICIES}",
    )
    add(
        "--budgets",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        default=(512, 2048, 8192),
        help="each is a size of program too, unless --extend-buckets says (default: 512,2048,8192)",
    )
    add("--batch", type=int, default=32, help="decoding requests of a slice (default: 32)")
    add("--context", type=int, default=512, help="their prompts (default: 512)")
    add("--prompt-tokens", type=int, default=8192, help="of the long prompt (default: 8192)")
    add("--repeats", type=int, default=3, help="long prompts of each row (default: 3)")
    add("--time-limit-s", type=float, default=600.0, help="what remains is skipped (default: 600)")
    add("--seed", type=int, default=1, help="default: 1")
    return parser


def main(argv: list[str]) -> int:
    deadline = time.monotonic()
    args, engine_flags = make_parser().parse_known_args(argv)
    deadline += args.time_limit_s
    with tempfile.TemporaryDirectory() as temporary:
        try:
            for policy in args.policies:
                phase_policy(policy)
            config = configured(engine_flags, args.shape, Path(temporary))
            config = replace(
                config,
                # One slot more than decode: the long prompt's.
                decode_buckets=config.decode_buckets or (args.batch + 1,),
                extend_buckets=config.extend_buckets or tuple(sorted(args.budgets)),
                context_length=config.context_length or args.prompt_tokens + 16,
                disable_radix_cache=True,
            )
            configure_jax(config)
            runner = make_engine(config).runner
        except ValueError as error:  # ConfigError, LayoutError, CheckpointError: one sentence
            print(f"bench_imbalance: error: {error}", file=sys.stderr)
            return 2
    assert isinstance(runner, ModelRunner)
    topology, details = describe(runner)
    say(topology)
    rows = []
    for row in measure(runner, config, args, deadline):
        say(f"  {row}")
        rows.append(row)
    print(table(rows))
    facts = {name: getattr(args, name) for name in ("batch", "context", "prompt_tokens", "repeats")}
    emit("imbalance", model=args.shape or config.model_path, engine=details, **facts, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
