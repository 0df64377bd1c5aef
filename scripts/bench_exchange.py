"""The expert exchange alone: microseconds there and back, by tokens, exchange and dispatch format.

One program repeats the exchange with experts that hardly compute (they hand tokens back), so
launching costs nothing; beside it stands the same program without an exchange, and the difference
is what the exchange costs. --shared-width adds shared experts to both: what they hide shows in the
difference. --xla compiles everything once more with other options of XLA. For example:

  python scripts/bench_exchange.py --tp 2 --dp 2 --ep 2 --device cuda
  python scripts/bench_exchange.py --tp 2 --dp 2 --ep 2 --device cuda --tokens 64,2048
    --shared-width 0,2816 --xla sync:xla_gpu_enable_latency_hiding_scheduler=false
  python scripts/bench_exchange.py --tp 8 --dp 8 --ep 8 --device cpu --width 64 --tokens 4,64
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from scripts.bench_step import device_events
from scripts.benchmarking import emit, numbers, own_parser, say, table
from serving.config import ConfigError, ServerConfig
from serving.engine.engine import configure_jax, resolve_layout
from serving.engine.runner import resolve_dtype
from sharding.comm import EXCHANGES, MeshComm
from sharding.exchange_choice import dispatch_rows
from sharding.mesh import make_mesh
from sharding.step import sharded

Options = tuple[str, tuple[tuple[str, str | bool], ...]]
"""A set of options of XLA: what it is called here, and (option, value) of each."""
DISPATCH, SUMS = ("auto", "fp8_e4m3"), ("fast", "in_order")
COMPILE_THREADS = 8
MOST_TOKENS = 400_000
"""Tokens of a slice in one run: larger exchanges repeat less often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one program exchanges.

    Attributes:
        exchange: a name of `EXCHANGES`; None computes without any exchange.
        options: what it is compiled with.
    """

    tokens: int
    exchange: str | None
    fp8: bool
    in_order: bool
    shared_width: int
    options: Options

    def columns(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "exchange": f"{self.exchange}{' in order' if self.in_order else ''}",
            "dispatch": "fp8_e4m3" if self.fp8 else "auto",
            "shared": self.shared_width,
            "xla": self.options[0],
        }


class Bench:
    """Programs of one mesh and one shape of model."""

    def __init__(self, args: argparse.Namespace, config: ServerConfig) -> None:
        self.args = args
        self.layout = resolve_layout(config)
        self.mesh = make_mesh(self.layout)
        self.device = self.mesh.devices.flat[0]
        self.dtype = resolve_dtype(args.dtype, self.device.platform)
        groups = self.layout.size(self.layout.moe_ep)
        if args.experts % groups:
            raise ConfigError(f"--experts {args.experts} must be a multiple of {groups} groups.")
        self.local_experts = args.experts // groups

    def repeats(self, case: Case) -> int:
        return max(2, min(self.args.exchanges_per_run, MOST_TOKENS // case.tokens))

    def arguments(self, case: Case) -> list[np.ndarray]:
        """Tokens and ids of every slice, and weights of the shared experts."""
        rng = np.random.default_rng(self.args.seed)
        a, d = self.args, self.layout.num_slices
        scores = rng.random((d, case.tokens, a.experts))
        arguments = [
            rng.standard_normal((d, case.tokens, a.width)).astype(self.dtype),
            np.argsort(scores)[..., : a.top_k].astype(np.int32),
        ]
        if case.shared_width:
            shapes = (a.width, 2 * case.shared_width), (case.shared_width, a.width)
            arguments += [(1e-3 * rng.standard_normal(s)).astype(self.dtype) for s in shapes]
        return arguments

    def lower(self, case: Case) -> Any:
        a, layout = self.args, self.layout
        comm = MeshComm(
            layout,
            "none" if case.exchange is None else case.exchange,
            fp8_dispatch=case.fp8,
            deterministic=case.in_order,
        )
        part = 1 / layout.size(layout.moe_tp)  # of an expert's width

        def experts(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
            weight = part * jnp.sum(jnp.where(ids >= 0, weights, 0), axis=1, keepdims=True)
            return (x * weight).astype(x.dtype)

        def shared_experts(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
            gate, up = jnp.split(x @ gate_up, 2, axis=-1)
            return (jax.nn.silu(gate) * up) @ down

        def program(x: jax.Array, ids: jax.Array, *mlp: jax.Array) -> jax.Array:
            weights = jnp.full(ids.shape[1:], 1 / a.top_k, jnp.float32)

            def once(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
                moved = (ids[0] + i) % a.experts  # nothing may be hoisted out of the loop
                shared = shared_experts(x, *mlp) if mlp else None
                if case.exchange is not None:
                    y = comm.moe(x, moved, weights, experts, self.local_experts, shared)
                    return y, None
                y = experts(x, moved, weights / part)
                return (y if shared is None else y + shared), None

            return jax.lax.scan(once, x[0], jnp.arange(self.repeats(case)))[0][None]

        rows, whole = PartitionSpec(layout.attn_dp), PartitionSpec()
        arrays = self.arguments(case)
        specs = (rows, rows, *(whole for _ in arrays[2:]))
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        return sharded(program, self.mesh, specs, rows).lower(*shapes)

    def compiled(self, case: Case) -> Callable[..., jax.Array] | str:
        """The program, or why XLA does not make it."""
        try:
            return self.lower(case).compile(compiler_options=dict(case.options[1]) or None)
        except jax.errors.JaxRuntimeError as error:
            if not case.options[1]:
                raise
            return str(error).splitlines()[0][:120]

    def measure(self, case: Case, program: Callable[..., jax.Array]) -> dict[str, Any]:
        """Median of several runs, us an exchange, and how far the result is from the tokens."""
        arrays = self.arguments(case)
        given = [
            jax.device_put(array, sharding)
            for array, sharding in zip(arrays, program.input_shardings[0], strict=True)
        ]
        y = np.asarray(program(*given)).astype(np.float32)
        x = arrays[0].astype(np.float32)
        times = []
        for _ in range(self.args.runs):
            began = time.perf_counter()
            program(*given).block_until_ready()
            times.append(1e6 * (time.perf_counter() - began) / self.repeats(case))
        row = {
            "us": statistics.median(times),
            "spread us": max(times) - min(times),
            "moved by": float(np.abs(y - x).max() / np.abs(x).max()),
        }
        if self.args.profile and case.exchange is not None:
            row["kernels"] = kernels(lambda: program(*given), self.repeats(case))
        return row


def kernels(run: Callable[[], jax.Array], repeats: int) -> list[str]:
    """What ran on the first GPU: us an exchange, launches an exchange, name."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run().block_until_ready()
        events = device_events(folder)
    us: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for name, start, stop in events:
        name = re.sub(r"[._]\d+", "", name)
        us[name] += (stop - start) / 1e3
        count[name] += 1
    return [
        f"{total / repeats:8.2f} us {count[name] / repeats:6.2f} x {name[:90]}"
        for name, total in us.most_common(12)
    ]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every program, the one without an exchange before those that are compared with it."""
    for options, width, tokens in itertools.product(args.xla, args.shared_width, args.tokens):
        common = {"tokens": tokens, "shared_width": width, "options": options}
        yield Case(exchange=None, fp8=False, in_order=False, **common)
        for exchange, dispatch, order in itertools.product(
            args.exchanges, args.dispatch, args.sums
        ):
            fp8, in_order = dispatch == "fp8_e4m3", order == "in_order"
            yield Case(exchange=exchange, fp8=fp8, in_order=in_order, **common)


def measured(bench: Bench, wanted: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """A row for every exchange; "exchange us" is the time beyond the program without one."""
    layout, k = bench.layout, bench.args.top_k
    alone: dict[str, Any] = {}
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:  # all of them, before anything is timed
        programs = list(pool.map(bench.compiled, wanted))
    for case, program in zip(wanted, programs, strict=True):
        row = case.columns()
        if isinstance(program, str):
            if case.exchange is not None:
                yield row | {"note": program}
            continue
        row |= bench.measure(case, program)
        if case.exchange is None:
            alone = row
            continue
        row["exchange us"] = row["us"] - alone["us"]
        sent = -(-case.tokens // layout.size(layout.split)) * layout.size(layout.gather)
        if case.exchange == "all_to_all":
            row["rows"] = dispatch_rows(sent, k, layout.size(layout.moe_ep))
        yield row


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def options(text: str) -> Options:
    """ "name:option=value;option=value", where JAX wants booleans as such."""
    name, _, given = text.partition(":")
    pairs = [part.partition("=") for part in given.split(";") if part]
    known = {"true": True, "false": False}
    return name, tuple((option, known.get(value, value)) for option, _, value in pairs)


def make_parser() -> argparse.ArgumentParser:
    parser = own_parser(__doc__)
    parser.add_argument("--tp", type=int, default=2, help="devices (default: 2)")
    parser.add_argument("--dp", type=int, default=2, help="dp slices (default: 2)")
    parser.add_argument("--ep", type=int, default=2, help="expert groups (default: 2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument(
        "--tokens",
        type=numbers,
        default="16,64,256,1024,2048,8192",
        help="of a slice (default: 16,64,256,1024,2048,8192)",
    )
    parser.add_argument(
        "--exchanges", type=names, default=tuple(EXCHANGES), help="default: all of them"
    )
    parser.add_argument(
        "--dispatch", type=names, default="auto,fp8_e4m3", help="default: auto,fp8_e4m3"
    )
    parser.add_argument(
        "--sums", type=names, default="fast", help="fast, in_order or both (default: fast)"
    )
    parser.add_argument("--width", type=int, default=2048, help="of a token (default: 2048)")
    parser.add_argument("--experts", type=int, default=64, help="default: 64")
    parser.add_argument("--top-k", type=int, default=6, help="experts of a token (default: 6)")
    parser.add_argument(
        "--shared-width",
        type=numbers,
        default="0",
        help="inner width of shared experts (default: 0)",
    )
    parser.add_argument(
        "--xla",
        type=options,
        action="append",
        help="NAME:OPTION=VALUE;OPTION=VALUE, a set of options to compile with; may be repeated",
    )
    parser.add_argument("--exchanges-per-run", type=int, default=200, help="at most (default: 200)")
    parser.add_argument("--runs", type=int, default=5, help="of each program (default: 5)")
    parser.add_argument("--profile", action="store_true", help="list the kernels of an exchange")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    args.xla = args.xla or [("default", ())]
    try:
        for flag, given, known in (
            ("--exchanges", args.exchanges, EXCHANGES),
            ("--dispatch", args.dispatch, DISPATCH),
            ("--sums", args.sums, SUMS),
        ):
            if unknown := sorted(set(given) - set(known)):
                raise ConfigError(f"{flag}: {', '.join(unknown)} is none of {', '.join(known)}.")
        config = ServerConfig(tp_size=args.tp, dp_size=args.dp, ep_size=args.ep, device=args.device)
        configure_jax(config)
        bench = Bench(args, config)
    except ValueError as error:  # ConfigError, LayoutError: one sentence
        print(f"bench_exchange: error: {error}", file=sys.stderr)
        return 2
    began, rows = time.perf_counter(), []
    for row in measured(bench, list(cases(args))):
        say(f"  { {key: value for key, value in row.items() if key != 'kernels'} }")
        for line in row.get("kernels", ()):
            say(f"    {line}")
        rows.append(row)
    print(table([{k: v for k, v in row.items() if k != "kernels"} for row in rows]) + "\n")
    emit(
        "exchange",
        device=bench.device.device_kind,
        layout=str(bench.layout),
        dtype=str(bench.dtype),
        width=args.width,
        experts=args.experts,
        top_k=args.top_k,
        seconds=time.perf_counter() - began,
        rows=rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
