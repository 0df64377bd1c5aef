"""Device time of the engine's own programs: decode steps and prefill, against their floors.

Plans go straight to the runner, without scheduler or HTTP. Contexts are filled by real prefill of
random tokens, dummy weights route evenly, and the benchmark counts how many experts a batch
touches. With --profile it adds kernels per step, the device's idle share, the time in collectives
and how much of it nothing else hides, and the top kernels, read from a trace of jax.profiler. Every
flag of scripts/serve.py that concerns the engine may be added.
For example:

  python scripts/bench_step.py --shape deepseek-v2-lite --device cuda --profile
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from model.batch import ForwardBatch
from model.config import ModelConfig
from scripts.bench_offline import SHAPES, configured
from scripts.benchmarking import emit, own_parser, say, table
from serving.engine.engine import configure_jax, open_weights, resolve_layout
from serving.engine.runner import ModelRunner
from serving.request import SamplingParams
from serving.scheduler.plan import DecodeRow, PrefillChunk, SlicePlan, StepPlan
from sharding.step import sharded

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
DECODES = "1x1024,8x1024,32x1024,64x1024,128x1024,256x1024,64x4096,128x4096"
PREFILLS = "16x2048,4x8000,1x2048"
BANDWIDTH, FLOPS = 3.0e12, 989e12
"""Of an H100: measured copy, counting bytes read and written; bf16 matrix products by its sheet."""
COLLECTIVE = re.compile(r"nccl|all.?reduce|all.?gather|all.?to.?all|reduce.?scatter", re.I)
"""In the names of kernels: NCCL's, and those that XLA has itself."""


# ---- the floors ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """What a step must move and compute, on one device that holds the whole model.

    Attributes:
        dense: weights that every step reads, in numbers; expert: of one expert, all layers alike.
        dense_bytes, expert_bytes: the same in bytes, factors of FP8 weights included.
        kv_bytes: of a cached token, all layers.
    """

    config: ModelConfig
    dense: int
    dense_bytes: int
    expert: int
    expert_bytes: int
    moe_layers: int
    kv_bytes: int

    @classmethod
    def of(cls, runner: ModelRunner) -> Floors:
        config, tied = runner.model, runner.model.tie_word_embeddings
        layers = sum(n for kind, n in config.segments if kind == "moe")
        numbers, sizes = Counter[bool](), Counter[bool]()  # of routed experts or not
        for p in runner.spec.params:
            if p.path.startswith("embedding") and not tied:
                continue
            routed, number = ".experts." in p.path, math.prod(p.real_shape)
            sizes[routed] += number * p.dtype.itemsize
            if p.block is None:
                numbers[routed] += number
        of_all = max(1, layers * config.num_experts)
        return cls(
            config=config,
            dense=numbers[False],
            dense_bytes=sizes[False],
            expert=numbers[True] // of_all,
            expert_bytes=sizes[True] // of_all,
            moe_layers=layers,
            kv_bytes=runner.page_bytes // runner.page_size,
        )

    def touched(self, tokens: int) -> float:
        """Experts of a layer that `tokens` tokens meet when every expert is equally likely."""
        e, k = self.config.num_experts, self.config.num_experts_per_token
        return e * (1 - (1 - k / e) ** tokens) if e else 0.0

    def decode_bytes(self, batch: int, context: int) -> float:
        experts = self.moe_layers * self.touched(batch) * self.expert_bytes
        return self.dense_bytes + experts + batch * context * self.kv_bytes

    def prefill_flops(self, prompts: int, tokens: int) -> float:
        """Two for every weight that a token meets (the vocabulary's for one token a prompt), and
        attention."""
        c = self.config
        head = c.vocab_size * c.hidden_size
        met = self.dense - head + self.moe_layers * c.num_experts_per_token * self.expert
        width = c.num_heads * (c.qk_head_dim + (c.v_head_dim if c.is_mla else c.head_dim))
        attention = c.num_layers * width * tokens * tokens  # the causal half, two each
        return prompts * (2.0 * tokens * met + 2.0 * head + attention)


# ---- plans ---------------------------------------------------------------------------------------


class Plans:
    """Steps for slots that each own the same pages for ever; slices do the same."""

    def __init__(self, runner: ModelRunner, seed: int) -> None:
        self.runner = runner
        self._rng = np.random.default_rng(seed)
        self.vocab = runner.model.vocab_size
        self._serial = itertools.count()

    def fits(self, slots: int, context: int) -> str | None:
        """Why so many contexts cannot be held; None if they can."""
        if slots > self.runner.buckets.slots:
            return f"more than the {self.runner.buckets.slots} slots"
        pages = -(-context // self.runner.page_size)
        if context > self.runner.max_context or slots * pages > self.runner.num_pages - 1:
            return "does not fit the context or the KV pool"
        return None

    def _pages(self, slot: int, context: int) -> tuple[int, ...]:
        each = -(-context // self.runner.page_size)
        return tuple(range(1 + slot * each, 1 + (slot + 1) * each))

    def decode(self, batch: int, context: int) -> StepPlan:
        """One decode step of `batch` sequences whose newest token is number `context`."""
        rows = tuple(
            DecodeRow(str(s), s, context - 1, self._pages(s, context), GREEDY) for s in range(batch)
        )
        return self._everywhere(SlicePlan(decode=rows))

    def prefill(self, prompts: int, tokens: int, context: int) -> list[StepPlan]:
        """The steps that prefill fresh random prompts, packed like the scheduler's."""
        budget, chunks = self.runner.buckets.prefill_tokens, self.runner.buckets.prefill_chunks
        steps: list[list[PrefillChunk]] = [[]]
        room = budget
        for slot in range(prompts):
            prompt = tuple(self._rng.integers(0, self.vocab, tokens).tolist())
            at = 0
            while at < tokens:
                if not room or len(steps[-1]) == chunks:
                    steps.append([])
                    room = budget
                n = min(room, tokens - at)
                steps[-1].append(
                    PrefillChunk(
                        rid=str(next(self._serial)),
                        slot=slot,
                        tokens=prompt[at : at + n],
                        start=at,
                        pages=self._pages(slot, context),
                        samples=at + n == tokens,
                        sampling=GREEDY,
                    )
                )
                at, room = at + n, room - n
        return [self._everywhere(SlicePlan(prefill=tuple(step))) for step in steps]

    def _everywhere(self, plan: SlicePlan) -> StepPlan:
        return StepPlan(slices=(plan,) * self.runner.layout.num_slices)


def run(runner: ModelRunner, plans: Sequence[StepPlan]) -> float:
    """Seconds of these steps back to back, two in flight, from an idle device to an idle device."""
    began, before = time.perf_counter(), None
    for plan in plans:
        step = runner.launch(plan)
        step.sample()
        if before is not None:
            before.result()
        before = step
    before.result()
    return time.perf_counter() - began


# ---- the profile ---------------------------------------------------------------------------------


def device_events(folder: str, device: int = 0) -> list[tuple[str, float, float]]:
    """(kernel, start, end) in ns of what ran on the streams of a GPU, the first one, in order."""
    events = []
    for path in Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not re.match(rf"/device:GPU:{device}\b", plane.name):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    events += [
                        (e.name, e.start_ns, e.start_ns + e.duration_ns) for e in line.events
                    ]
    return sorted(events, key=lambda event: event[1])


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (start, end), ordered by start."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def collective_time(events: Sequence[tuple[str, float, float]]) -> tuple[float, float]:
    """ns in collectives, and of these the ns in which no other kernel runs.

    Args:
        events: (kernel, start, end) in ns of one device, by start. Waiting for other devices is
            part of a collective; several at once count once.
    """
    collectives = [(start, end) for name, start, end in events if COLLECTIVE.search(name)]
    others = [(start, end) for name, start, end in events if not COLLECTIVE.search(name)]
    busy = covered([(start, end) for _, start, end in events])
    return covered(collectives), busy - covered(others)


def profile(runner: ModelRunner, plans: Sequence[StepPlan], top: int) -> dict[str, Any]:
    """Kernels a step, busy ms, idle share, time in collectives and how much of it is hidden, and
    the kernels that took most; empty without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(runner, plans)
        events = device_events(folder)
    if not events:
        return {}
    n = len(plans)
    by_name: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for name, start, stop in events:
        name = re.sub(r"[._]\d+", "", name)
        by_name[name] += stop - start
        count[name] += 1
    busy = covered([(start, stop) for _, start, stop in events])
    span = max(stop for _, _, stop in events) - events[0][1]
    collective, exposed = collective_time(events)
    collectives = {}
    if collective:
        collectives = {
            "collective ms": collective / n / 1e6,
            "exposed ms": exposed / n / 1e6,
            "hidden %": 100 * (1 - exposed / collective),
        }
    return {
        "kernels/step": len(events) / n,
        "busy ms": busy / n / 1e6,
        "idle %": 100 * (1 - busy / span),
        **collectives,
        "top": [
            f"{ns / n / 1e6:8.3f} ms {count[name] / n:7.1f} x {name[:90]}"
            for name, ns in by_name.most_common(top)
        ],
    }


# ---- measuring -----------------------------------------------------------------------------------


def experts_touched(runner: ModelRunner, tokens: int, seed: int) -> float:
    """Experts of a layer that a batch of random tokens really meets, the mean over layers."""
    spec, comm = runner.spec, runner.comm
    shape = spec.pool_shape(tokens + 1, runner.page_size)
    drawn = np.random.default_rng(seed).integers(0, spec.config.vocab_size, tokens)

    def counts(weights: list[jax.Array], kv: jax.Array) -> jax.Array:
        none = jnp.zeros(0, jnp.int32)
        batch = ForwardBatch(
            decode_tokens=jnp.asarray(drawn, jnp.int32),
            decode_positions=jnp.zeros(tokens, jnp.int32),
            decode_tables=jnp.arange(1, tokens + 1, dtype=jnp.int32)[:, None],
            prefill_tokens=none,
            chunk_first_row=none,
            chunk_rows=none,
            chunk_start=none,
            chunk_tables=jnp.zeros((0, 1), jnp.int32),
        )
        return spec.merge(weights).hidden(kv[0], batch, comm)[2][None]

    by_slice = jax.sharding.PartitionSpec(spec.layout.attn_dp)
    program = sharded(counts, runner.mesh, (spec.specs, spec.pool_spec), by_slice)
    kv = jax.device_put(
        np.zeros(shape, runner.kv_dtype), jax.sharding.NamedSharding(runner.mesh, spec.pool_spec)
    )
    return float((np.asarray(program(runner.weights, kv))[0] > 0).sum(axis=1).mean())


def measure_decode(
    plans: Plans, floors: Floors, batch: int, context: int, args: argparse.Namespace
) -> dict[str, Any]:
    row: dict[str, Any] = {"decode": f"{batch}x{context}"}
    if (note := plans.fits(batch, context)) is not None:
        return row | {"note": note}
    step = plans.decode(batch, context)
    run(plans.runner, [step] * 5)
    times = [run(plans.runner, [step] * args.steps) / args.steps for _ in range(args.repeats)]
    ms = 1e3 * statistics.median(times)
    floor = 1e3 * floors.decode_bytes(batch, context) / args.bandwidth
    row |= {
        "ms": ms,
        "spread ms": 1e3 * (max(times) - min(times)),
        "tok/s": batch / ms * 1e3,
        "floor ms": floor,
        "x floor": ms / floor,
    }
    return row | (profile(plans.runner, [step] * 5, args.top) if args.profile else {})


def measure_prefill(
    plans: Plans, floors: Floors, prompts: int, tokens: int, args: argparse.Namespace
) -> dict[str, Any]:
    row: dict[str, Any] = {"prefill": f"{prompts}x{tokens}"}
    if (note := plans.fits(prompts, tokens)) is not None:
        return row | {"note": note}
    run(plans.runner, plans.prefill(prompts, tokens, tokens))
    runs = [plans.prefill(prompts, tokens, tokens) for _ in range(args.repeats)]
    times = [run(plans.runner, steps) for steps in runs]
    ms = 1e3 * statistics.median(times)
    flops = floors.prefill_flops(prompts, tokens)
    row |= {
        "ms": ms,
        "spread ms": 1e3 * (max(times) - min(times)),
        "tok/s": prompts * tokens / ms * 1e3,
        "floor ms": 1e3 * flops / args.flops,
        "x floor": ms * 1e-3 * args.flops / flops,
        "TFLOP/s": flops / ms / 1e9,
        "steps": len(runs[0]),
    }
    return row | (profile(plans.runner, runs[0], args.top) if args.profile else {})


def measure(runner: ModelRunner, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows, prefill first; contexts are filled once for the largest batch of each."""
    plans, floors = Plans(runner, args.seed), Floors.of(runner)
    for prompts, tokens in args.prefill:
        yield measure_prefill(plans, floors, prompts, tokens, args)
    filled: tuple[int, int] = (0, 0)
    for context in dict.fromkeys(context for _, context in args.decode):
        batches = [b for b, c in args.decode if c == context]
        fitting = [b for b in batches if plans.fits(b, context) is None]
        if fitting and (max(fitting), context) != filled:
            filled = (max(fitting), context)
            run(runner, plans.prefill(*filled, context))
        for batch in batches:
            yield measure_decode(plans, floors, batch, context, args)


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """ "1x1024,64x4096" -> ((1, 1024), (64, 4096)); "none" -> ()."""
    if text == "none":
        return ()
    pairs = [part.split("x") for part in text.split(",")]
    return tuple((int(a), int(b)) for a, b in pairs)


def make_parser() -> argparse.ArgumentParser:
    parser = own_parser(__doc__)
    parser.add_argument(
        "--shape",
        choices=tuple(SHAPES),
        help="dummy weights of this published configuration, instead of --model-path",
    )
    parser.add_argument(
        "--layers", type=int, help="the first ones of --shape only, for models that do not fit"
    )
    parser.add_argument(
        "--decode", type=sizes, default=DECODES, help=f"batch x context, or none ({DECODES})"
    )
    parser.add_argument(
        "--prefill", type=sizes, default=PREFILLS, help=f"prompts x tokens, or none ({PREFILLS})"
    )
    parser.add_argument("--steps", type=int, default=20, help="decode steps of a run (default: 20)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row (default: 3)")
    parser.add_argument(
        "--touched", type=int, default=64, help="batch to count experts of; 0: none"
    )
    parser.add_argument("--profile", action="store_true", help="trace a few steps of each row")
    parser.add_argument("--top", type=int, default=16, help="kernels to list (default: 16)")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes/s of the floor")
    parser.add_argument("--flops", type=float, default=FLOPS, help="flop/s of the floor")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default: 1)")
    return parser


def main(argv: list[str]) -> int:
    args, engine_flags = make_parser().parse_known_args(argv)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            config = configured(engine_flags, args.shape, Path(temporary), args.layers)
            configure_jax(config)
            source = open_weights(config)
            runner = ModelRunner(config, source, resolve_layout(config))
        except ValueError as error:  # ConfigError, LayoutError, CheckpointError: one sentence
            print(f"bench_step: error: {error}", file=sys.stderr)
            return 2
    ready = time.perf_counter() - began
    say(f"ready after {ready:.1f} s, {runner.compile_seconds:.1f} compiling")
    tokens = (runner.num_pages - 1) * runner.page_size
    facts: dict[str, Any] = {"ready_seconds": ready, "KV tokens": tokens}
    rows = []
    for row in measure(runner, args):
        say(f"  { {key: value for key, value in row.items() if key != 'top'} }")
        for line in row.get("top", ()):
            say(f"    {line}")
        rows.append(row)
    if args.touched and runner.model.num_experts:
        facts["experts touched"] = experts_touched(runner, args.touched, args.seed)
        facts["evenly"] = Floors.of(runner).touched(args.touched)
    say(f"{facts}")
    for kind in ("decode", "prefill"):
        part = [{k: v for k, v in r.items() if k != "top"} for r in rows if kind in r]
        if part:
            print(table(part) + "\n")
    emit("step", model=args.shape or config.model_path, **facts, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
