"""One model, one workload, several layouts of the same devices: what DP attention is worth.

Each layout runs in a process of its own, with the same bytes of KV pool on every device and dummy
weights that route evenly. Measured are decode steps over batch and context, the largest batch of
long contexts that the pool holds, prefill, one expert exchange by itself, and where a step's time
goes (from a profile, on GPUs). Contexts are random numbers in the pool, which nothing computed:
decode time does not depend on them. Batches are totals over all devices, spread over the slices;
replicas are one engine on its share of the devices, measured alone, its rates multiplied.

Layouts are NAME:FLAGS, flags being those of scripts/serve.py, or names of the default ones. Every
other engine flag goes to all layouts. Results are JSON lines (one a layout), then tables. Examples:

  python scripts/bench_parallel.py --shape deepseek-v2-lite --device cuda --devices 2
  python scripts/bench_parallel.py --shape deepseek-v2-lite --device cuda --devices 2 --quick \\
      --layout tp2 --layout tp2dp2ep2-none --layout "overlap:--tp 2 --dp-size 2 --ep 2 \\
      --enable-dp-attention --enable-two-batch-overlap"
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from scripts.bench_offline import SHAPES, configured
from scripts.bench_step import Plans, collective_time, covered, device_events, run
from scripts.benchmarking import emit, numbers, own_parser, say, table
from scripts.parallel_tables import Row, Rows, decode_table, first, modelled_ms, overview, ratios
from serving.config import ServerConfig
from serving.engine.engine import configure_jax, open_weights, resolve_layout
from serving.engine.runner import ModelRunner, resolve_dtype, resolve_kv_dtype
from serving.scheduler.plan import SlicePlan, StepPlan
from sharding.layout import Layout
from sharding.rules import padded_sizes
from sharding.step import ModelSpec, sharded

BATCHES, CONTEXTS = (16, 64, 128, 256), (1024, 4096, 8192)
QUICK_BATCHES, QUICK_CONTEXTS = (64, 256), (1024, 8192)
EXPERTS = re.compile(r"experts_(fp8_)?(gate_up|down)")
PROFILED_STEPS = 5
EXCHANGES, EXCHANGE_LAUNCHES = 25, 8
"""Exchanges of one program, and launches of it, that one measurement times."""
OVERLAP = "--enable-two-batch-overlap --tbo-min-prefill-tokens 1024 --tbo-min-decode-rows 64"
GRACE_S = 20.0
"""How long after the time limit a layout may finish the row it is at."""


# ---- which layouts -------------------------------------------------------------------------------


def default_layouts(devices: int) -> dict[str, str]:
    """Names and flags, the most telling first: what the time limit cuts off is at the end."""

    def dpa(dp: int, exchange: str) -> tuple[str, str]:
        flags = f"--tp {devices} --dp-size {dp} --ep {devices} --enable-dp-attention"
        name = f"tp{devices}dp{dp}ep{devices}-{exchange}"
        return name, f"{flags} --moe-a2a-backend {exchange}"

    if devices == 1:
        return {"tp1": "--tp 1"}
    layouts = {f"tp{devices}": f"--tp {devices}"}
    layouts |= [dpa(devices, "none")]
    layouts["replicas"] = "--tp 1"
    layouts |= [dpa(devices, "all_to_all")]
    layouts |= [dpa(dp, "none") for dp in (4, 2) if dp < devices and devices % dp == 0]
    layouts[f"tp{devices}ep{devices}"] = f"--tp {devices} --ep {devices}"
    name, flags = dpa(devices, "none")
    layouts[f"{name}-overlap"] = f"{flags} {OVERLAP}"
    return layouts


def chosen_layouts(args: argparse.Namespace) -> dict[str, str]:
    """Raises ValueError for a name that is no default layout and brings no flags."""
    known = default_layouts(args.devices)
    if not args.layout:
        names = list(known)
        return {name: known[name] for name in (names[:3] if args.quick else names)}
    layouts = {}
    for text in args.layout:
        name, colon, flags = text.partition(":")
        if not colon and name not in known:
            raise ValueError(
                f"--layout {name}: no default layout of {args.devices} devices "
                f"({', '.join(known)}), and no flags (NAME:FLAGS)."
            )
        layouts[name] = flags.strip() if colon else known[name]
    return layouts


# ---- one layout, in its own process --------------------------------------------------------------


class Spread:
    """Plans whose batches are totals over all slices, and over `copies` engines alike."""

    def __init__(self, runner: ModelRunner, copies: int, seed: int) -> None:
        self.runner, self.copies = runner, copies
        self.plans = Plans(runner, seed)
        self.slices = runner.layout.num_slices

    def fullest(self, batch: int) -> int:
        """Sequences of the fullest slice."""
        return fullest(batch, self.slices * self.copies)

    def decode(self, batch: int, context: int) -> StepPlan:
        """One decode step of the fullest engine."""
        mine = -(-batch // self.copies)
        share, more = divmod(mine, self.slices)
        counts = [share + (s < more) for s in range(self.slices)]
        return StepPlan(slices=tuple(self._decode(n, context) for n in counts))

    def _decode(self, batch: int, context: int) -> SlicePlan:
        return self.plans.decode(batch, context).slices[0]


def fullest(batch: int, slices: int) -> int:
    """Sequences of the fullest of `slices` slices."""
    return -(-batch // slices)


def sized(config: ServerConfig, spec: ModelSpec, args: argparse.Namespace) -> ServerConfig:
    """The configuration with a pool of --kv-memory-gib and just the programs that are measured.

    Raises:
        ValueError: the pool would not hold one sequence of --limit-context tokens, or a device
            would not hold the pool.
    """
    on_cpu = jax.default_backend() == "cpu"
    kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, spec.dtype)
    page = spec.page_bytes(config.page_size, kv_dtype)
    pages = int(args.kv_memory_gib * 2**30) // page
    most = largest_batch(pages, config.page_size, args)
    if most < 1:
        raise ValueError(
            f"--kv-memory-gib {args.kv_memory_gib} does not hold a sequence of "
            f"{args.limit_context} tokens."
        )
    need, limit = spec.device_bytes() + pages * page, memory_limit()
    if limit is not None and need > limit:
        raise ValueError(
            f"Weights and a pool of {args.kv_memory_gib:g} GiB take {need / 2**30:.1f} GiB a "
            f"device, more than the {limit / 2**30:.1f} of --mem-fraction-static."
        )
    slices = spec.layout.num_slices * (args.devices // spec.layout.num_devices)
    buckets = {min(most_slots(args), fullest(b, slices)) for b in args.batches}
    buckets |= set(check_batches(spec.layout, args))
    if not any(most <= b <= 1.1 * most for b in buckets):
        buckets.add(most)
    longest = max(args.limit_context, *args.contexts, args.check_context, args.prefill[1])
    return replace(
        config,
        max_total_tokens=(pages - 1) * config.page_size,
        decode_buckets=tuple(sorted(buckets)),
        extend_buckets=config.extend_buckets or ((64,) if on_cpu else (8192,)),
        context_length=config.context_length or longest,
    )


def memory_limit() -> int | None:
    """Bytes that each device may use; None on CPU."""
    stats = [device.memory_stats() for device in jax.devices()]
    return min((int(s["bytes_limit"]) for s in stats if s), default=None)


def largest_batch(pages: int, page_size: int, args: argparse.Namespace) -> int:
    """Sequences of --limit-context tokens that a slice's pool holds, at most --max-batch."""
    return min(args.max_batch, (pages - 1) // -(-args.limit_context // page_size))


def most_slots(args: argparse.Namespace) -> int:
    """The largest bucket that a slice may have."""
    return max(args.max_batch, args.check_batch * args.devices)


def check_batches(layout: Layout, args: argparse.Namespace) -> tuple[int, ...]:
    """Batches of a slice that the model of a step is checked at: of the layout itself, or of one
    device, that batch and all devices' together."""
    if layout.num_devices == 1:
        return args.check_batch, args.check_batch * args.devices
    return (args.check_batch,) if layout.num_slices > 1 else ()


class Worker:
    """Measures one layout, row by row, until the deadline."""

    def __init__(
        self, runner: ModelRunner, args: argparse.Namespace, tell: Callable[[Row], None]
    ) -> None:
        self.runner, self.args, self.tell = runner, args, tell
        self.copies = args.devices // runner.layout.num_devices
        self.spread = Spread(runner, self.copies, args.seed)
        self.most = largest_batch(runner.num_pages, runner.page_size, args)

    def measure(self) -> None:
        self.tell(self.facts())
        self.runner.randomise_pool(self.args.seed)
        slots = self.runner.buckets.slots
        # A short prompt in every slot: decode begins with tokens that differ.
        short = min(16, self.runner.max_context)
        run(self.runner, self.spread.plans.prefill(slots, short, short))
        for what, row in self.rows():
            if time.time() > self.args.deadline:
                self.tell({"kind": "skipped", "what": what})
            else:
                self.tell(row())

    def rows(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        """What to measure: a name, and how."""
        args, slices = self.args, self.spread.slices * self.copies
        limit = self.most * slices
        at = args.limit_context
        yield (
            f"decode {limit}x{at}",
            lambda: self.decode(limit, at, "limit", profiled=True),
        )
        for each in check_batches(self.runner.layout, args):
            batch, context = each * slices, args.check_context
            yield (
                f"decode {batch}x{context}",
                lambda b=batch, c=context: self.decode(b, c, "check", profiled=True),
            )
        if self.runner.layout.num_devices > 1 and self.runner.model.num_experts:
            for tokens in args.exchange:
                yield f"exchange {tokens}", lambda t=tokens: self.exchange(t)
        yield "prefill", self.prefill
        for context in args.contexts:
            for batch in args.batches:
                yield (
                    f"decode {batch}x{context}",
                    lambda b=batch, c=context: self.decode(b, c, "table"),
                )

    def facts(self) -> Row:
        runner, layout = self.runner, self.runner.layout
        slices = layout.num_slices * self.copies
        per_page = runner.page_size * slices
        in_memory = runner.pages_in_memory()
        return {
            "kind": "facts",
            "device": runner.mesh.devices.flat[0].device_kind,
            "devices": layout.num_devices,
            "copies": self.copies,
            "slices": slices,
            "roles": str(layout),
            "exchange": runner.config.moe_a2a_backend,
            "weight bytes": runner.spec.device_bytes(),
            "KV bytes": runner.kv_bytes_per_device(),
            "KV tokens": (runner.num_pages - 1) * per_page,
            "KV tokens in memory": None if in_memory is None else (in_memory - 1) * per_page,
            "memory fraction": runner.config.mem_fraction_static,
            "largest batch": self.most * slices,
            "capped": self.most == self.args.max_batch,
            "load s": runner.load_seconds,
            "compile s": runner.compile_seconds,
            "moe layers": sum(n for kind, n in runner.model.segments if kind == "moe"),
        }

    def decode(self, batch: int, context: int, why: str, *, profiled: bool = False) -> Row:
        """Steps of `batch` sequences in all, at `context` tokens each."""
        row: Row = {"kind": "decode", "why": why, "batch": batch, "context": context}
        each = self.spread.fullest(batch)
        if (note := self.spread.plans.fits(each, context)) is not None:
            return row | {"note": note}
        step, args = self.spread.decode(batch, context), self.args
        run(self.runner, [step] * 3)
        times = [run(self.runner, [step] * args.steps) / args.steps for _ in range(args.repeats)]
        seconds = statistics.median(times)
        row |= {
            "each slice": each,
            "ms": 1e3 * seconds,
            "spread ms": 1e3 * (max(times) - min(times)),
            "tok/s": batch / seconds,
        }
        return row | (profile(self.runner, [step] * PROFILED_STEPS) if profiled else {})

    def prefill(self) -> Row:
        """Every slice prefills the same number of fresh prompts."""
        prompts, tokens = self.args.prefill
        row: Row = {"kind": "prefill", "prompts": prompts, "tokens": tokens}
        if (note := self.spread.plans.fits(prompts, tokens)) is not None:
            return row | {"note": note}
        runs = [
            self.spread.plans.prefill(prompts, tokens, tokens) for _ in range(self.args.repeats + 1)
        ]
        times = [run(self.runner, steps) for steps in runs][1:]
        seconds, steps = statistics.median(times), len(runs[0])
        total = prompts * tokens * self.spread.slices * self.copies
        row |= {
            "steps": steps,
            "ms/step": 1e3 * seconds / steps,
            "spread ms": 1e3 * (max(times) - min(times)),
            "tok/s": total / seconds,
        }
        return row | profile(self.runner, runs[0])

    def exchange(self, tokens: int) -> Row:
        us = exchange_us(self.runner, tokens, self.args.repeats, self.args.seed)
        return {"kind": "exchange", "tokens": tokens, "us": us}


def exchange_us(runner: ModelRunner, tokens: int, repeats: int, seed: int) -> float:
    """Microseconds of one exchange of `tokens` tokens of every slice, with experts that give back
    their input: the median of some runs, each many exchanges one after the other."""
    model, layout, comm = runner.model, runner.layout, runner.comm
    local = padded_sizes(model, layout).experts // layout.size(layout.moe_ep)
    k = model.num_experts_per_token
    rng = np.random.default_rng(seed)
    shape = (layout.num_slices * tokens, model.num_experts)
    ids = np.argsort(rng.random(shape), axis=1)[:, :k].astype(np.int32)
    by_row = PartitionSpec(layout.attn_dp)

    def exchanges(x: jax.Array, ids: jax.Array) -> jax.Array:
        weights = jnp.full(ids.shape, 1 / k, jnp.float32)

        def one(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            def identity(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
                kept = jnp.where(ids >= 0, weights, 0).sum(axis=-1, keepdims=True)
                return x * kept.astype(x.dtype)

            return comm.moe(x, ids, weights, identity, local, None), None

        return lax.scan(one, x, None, length=EXCHANGES)[0]

    program = sharded(exchanges, runner.mesh, (by_row, by_row), by_row)
    sharding = NamedSharding(runner.mesh, by_row)
    drawn = rng.standard_normal((len(ids), model.hidden_size))
    x = jax.device_put(jnp.asarray(drawn, runner.dtype), sharding)
    ids = jax.device_put(ids, sharding)
    jax.block_until_ready(program(x, ids))

    def timed() -> float:
        began, y = time.perf_counter(), x
        for _ in range(EXCHANGE_LAUNCHES):
            y = program(y, ids)
        jax.block_until_ready(y)
        return time.perf_counter() - began

    return 1e6 * statistics.median(timed() for _ in range(repeats)) / EXCHANGES / EXCHANGE_LAUNCHES


def profile(runner: ModelRunner, plans: Sequence[StepPlan]) -> Row:
    """Where a step's time goes on the first GPU, and by how much the GPU that computes most does
    more than the mean; empty without GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(runner, plans)
        devices = [device_events(folder, d) for d in range(runner.layout.num_devices)]
    rows = [account(events, len(plans)) for events in devices]
    if not all(rows):
        return {}
    computing = [row["busy ms"] - row["exposed collective ms"] for row in rows]
    return rows[0] | {"imbalance %": 100 * (max(computing) / statistics.mean(computing) - 1)}


def account(events: Sequence[tuple[str, float, float]], steps: int) -> Row:
    """Milliseconds a step: busy, in collectives (waiting for other devices counts), of these with
    no other kernel beside, in the experts' matmuls; and the idle share. Empty without events.

    Args: events: (kernel, start, end) in ns, ordered by start.
    """
    if not events:
        return {}
    collective, exposed = collective_time(events)
    busy = covered([(start, end) for _, start, end in events])
    span = max(end for _, _, end in events) - events[0][1]
    per_step = 1e-6 / steps
    return {
        "busy ms": per_step * busy,
        "idle %": 100 * (1 - busy / span),
        "collective ms": per_step * collective,
        "exposed collective ms": per_step * exposed,
        "expert ms": per_step * sum(e - s for name, s, e in events if EXPERTS.search(name)),
    }


def measure_layout(args: argparse.Namespace, engine_flags: list[str]) -> int:
    """The process of one layout: rows as JSON lines on stdout."""

    def tell(row: Row) -> None:
        print(json.dumps(row), flush=True)
        say(f"  {row}")

    with tempfile.TemporaryDirectory() as temporary:
        try:
            config = configured(engine_flags, args.shape, Path(temporary), args.layers)
            if config.max_total_tokens is not None:
                raise ValueError("--max-total-tokens: give --kv-memory-gib, the same for all.")
            configure_jax(config)
            source = open_weights(config)
            layout = resolve_layout(config)
            if args.devices % layout.num_devices:
                raise ValueError(
                    f"{layout.num_devices} devices are no share of --devices {args.devices}."
                )
            dtype = resolve_dtype(config.dtype, jax.default_backend())
            spec = ModelSpec(source.config, dtype, layout, source.fp8)
            runner = ModelRunner(sized(config, spec, args), source, layout)
        except ValueError as error:  # ConfigError, LayoutError, CheckpointError: one sentence
            tell({"kind": "failed", "note": str(error)})
            return 2
    Worker(runner, args, tell).measure()
    return 0


# ---- all layouts ---------------------------------------------------------------------------------


def run_layout(argv: list[str], name: str, flags: str, deadline: float) -> list[Row]:
    """Start a layout's process and read its rows; it is ended soon after the deadline."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, *shlex.split(flags)]
    command += ["--measure", name, "--deadline", str(deadline)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        out, _ = process.communicate(timeout=max(1.0, deadline + GRACE_S - time.time()))
        note = None if process.returncode in (0, 2) else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, note = process.communicate()[0], "ended by the time limit"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return rows if note is None else [*rows, {"kind": "failed", "note": note}]


def report(results: Mapping[str, Rows], args: argparse.Namespace) -> None:
    """Tables for people, and the summary as a JSON line. Goals are stated, not enforced."""
    facts = {name: first(rows, "facts") for name, rows in results.items()}
    known = {name: f for name, f in facts.items() if f}
    bases = [n for n, f in known.items() if f["devices"] == args.devices and f["slices"] == 1]
    dpas = [n for n, f in known.items() if f["devices"] == args.devices and f["slices"] > 1]
    singles = [n for n, f in known.items() if f["devices"] == 1 and args.devices > 1]
    compared = [n for n in known if n not in bases]
    at = {"each": args.check_batch, "context": args.check_context, "devices": args.devices}
    tables = {
        "layouts": overview(results),
        "decode": decode_table(results, bases, dpas),
        "ratios": [ratios(results, base, name) for base in bases for name in compared],
        "model": [
            row
            for name in dpas
            for row in [modelled_ms(results, singles[0], name, **at) if singles else None]
            if row is not None
        ],
    }
    titles = {
        "layouts": f"Layouts: a device's weights and pool, all KV tokens (in memory: at "
        f"--mem-fraction-static), the largest batch at context {args.limit_context}, prefill",
        "decode": "Decode, tokens/s by context and total batch; the fastest of DPA and of TP",
        "ratios": "Against plain tensor parallelism",
        "model": f"A decode step at context {args.check_context} against a model of it",
    }
    for key, title in titles.items():
        if tables[key]:
            print(f"{title}\n{table(tables[key])}\n", flush=True)
    emit("parallel", shape=args.shape, layers=args.layers, devices=args.devices, tables=tables)


# ---- the command ---------------------------------------------------------------------------------


def pair(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def make_parser() -> argparse.ArgumentParser:
    parser = own_parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=tuple(SHAPES), help="dummy weights of this published configuration")
    add("--layers", type=int, help="the first ones of --shape only, for models that do not fit")
    add("--devices", type=int, default=2, help="of every layout (default: 2)")
    add("--layout", action="append", metavar="NAME[:FLAGS]", help="measure this one, repeatable")
    add("--quick", action="store_true", help="three layouts, fewer batches and contexts")
    add("--time-limit-s", type=float, help="what remains is skipped (default: 450; quick: 220)")
    add(
        "--kv-memory-gib",
        type=float,
        default=60.0,
        help="KV pool of each device, in every layout (default: 60)",
    )
    add("--batches", type=numbers, help=f"totals (default: {BATCHES}, quick: {QUICK_BATCHES})")
    add("--contexts", type=numbers, help=f"(default: {CONTEXTS}, quick: {QUICK_CONTEXTS})")
    add("--limit-context", type=int, default=8192, help="of the largest batch (default: 8192)")
    add("--max-batch", type=int, default=256, help="most sequences of a slice (default: 256)")
    add("--prefill", type=pair, default=(16, 2048), help="prompts x tokens a slice (16x2048)")
    add("--exchange", type=numbers, default=(64, 2048), help="tokens a slice (default: 64,2048)")
    add("--check-batch", type=int, default=64, help="a slice, of the model's check (default: 64)")
    add("--check-context", type=int, default=1024, help="default: 1024")
    add("--steps", type=int, default=20, help="decode steps of a run (default: 20)")
    add("--repeats", type=int, default=3, help="runs of each row (default: 3)")
    add("--seed", type=int, default=1, help="default: 1")
    add("--measure", help=argparse.SUPPRESS)  # the layout of this process
    add("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    return parser


def read_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own flags with what --quick decides, and the engine's."""
    args, engine_flags = make_parser().parse_known_args(argv)
    args.batches = args.batches or (QUICK_BATCHES if args.quick else BATCHES)
    args.contexts = args.contexts or (QUICK_CONTEXTS if args.quick else CONTEXTS)
    args.time_limit_s = args.time_limit_s or (220.0 if args.quick else 450.0)
    # The check of the model must be among what one exchange is measured for.
    args.exchange = tuple(sorted({*args.exchange, args.check_batch}))
    return args, engine_flags


def main(argv: list[str]) -> int:
    args, engine_flags = read_args(argv)
    if args.measure is not None:
        return measure_layout(args, engine_flags)
    try:
        layouts = chosen_layouts(args)
    except ValueError as error:
        print(f"bench_parallel: error: {error}", file=sys.stderr)
        return 2
    deadline = time.time() + args.time_limit_s
    results: dict[str, list[Row]] = {}
    for name, flags in layouts.items():
        began = time.time()
        if began > deadline:
            results[name] = [{"kind": "failed", "note": "skipped by the time limit"}]
        else:
            say(f"{name}: {flags}")
            results[name] = run_layout(argv, name, flags, deadline)
        seconds = time.time() - began
        emit("parallel layout", layout=name, flags=flags, seconds=seconds, rows=results[name])
    report(results, args)
    return 0 if any(first(rows, "facts") for rows in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
