"""Kernels alone on this GPU, those for all GPUs beside those for Hopper: products in FP8, decode.

Published sizes, random numbers, a stack of layers and a pool of them that no cache holds. The times
are the kernels' own, from a trace of jax.profiler, the best of three runs, and say what each layer
takes; decode attention includes the merging of parts, not what is worked out once in a step. Bytes
are those that must be read. For example:

  python scripts/bench_kernels.py
  python scripts/bench_kernels.py --only "products" --rows 64,252
  python scripts/bench_kernels.py --only "decode" --decode 252x8192,64x1024 --heads 128,64
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from model.ops.dense import MAX_ROWS, StackedWeight, matmul_parts
from model.ops.kernels import HopperImplementation, Kernels
from model.ops.mla_attention import decode_attention, hopper_decode, plan_decode
from scripts.bench_step import device_events, sizes
from scripts.benchmarking import Row, emit, numbers, own_parser, say, table
from scripts.check_kernels import BF16, LATENT, PAGE, ROPE, Draw, gpu_and_kernels

REPEATS, RUNS = 4, 3
MATRICES = {
    "out": ((128, 128), (7168,), (1, 128, 128)),
    "q_b": ((1536,), (128, 192), (128, 1, 64)),
    "dense gate and up": ((7168,), (2, 18432), (128, 1, 128)),
    "dense down": ((18432,), (7168,), (128, 128)),
    "shared gate and up": ((7168,), (2, 2048), (128, 1, 128)),
    "shared down": ((2048,), (7168,), (128, 128)),
}
"""DeepSeek-V3's that stay in FP8: dimensions in and out, and blocks."""
NAMES = re.compile("dense|mla_decode|mla_merge")
"""Of the kernels that are timed."""


class Case(NamedTuple):
    """One kernel at one size.

    Attributes:
        program: `REPEATS` layers of it; args: what it is given.
        read, operations: bytes that must be read and floating-point operations, of one layer.
    """

    name: str
    which: HopperImplementation
    program: Callable[..., Any]
    args: tuple[Any, ...]
    read: int
    operations: int


def products(name: str, rows: int, which: HopperImplementation) -> Case:
    inside, outside, block = MATRICES[name]
    sides, draw = (len(inside), len(outside)), Draw(0)
    stack = draw.fp8((REPEATS, *inside, *outside), block, sides)
    numbers = stack.data[0].size

    def program(x: jax.Array, stack: Any) -> list[jax.Array]:
        # Each of another layer: XLA computes equal products once.
        weights = (StackedWeight(stack=stack, layer=jnp.int32(i)) for i in range(REPEATS))
        return [matmul_parts(x, [w], sides[0], Kernels(dense=which))[0] for w in weights]

    args = draw.normal(rows, *inside), stack
    return Case(
        f"products FP8, {name}, {rows} rows", which, program, args, numbers, 2 * rows * numbers
    )


def decode(batch: int, context: int, heads: int, which: HopperImplementation) -> Case:
    draw, kernels = Draw(0), Kernels(decode_attention=which)
    lengths = np.full(batch, context, np.int32)
    kv, tables = draw.pool(lengths, BF16)
    q, rope = draw.normal(batch, heads, LATENT), draw.normal(batch, heads, ROPE)

    def program(q: jax.Array, rope: jax.Array, kv: jax.Array, *at: jax.Array) -> jax.Array:
        plan = plan_decode(*at, heads, PAGE, kernels)
        for i in range(REPEATS):  # one after the other
            q = decode_attention(
                q, rope, kv, jnp.int32(i % 2), *at, scale=0.07, plan=plan, kernels=kernels
            )
        return q

    tokens, width = batch * context, LATENT + ROPE
    return Case(
        f"decode attention, {batch} x {context}, {heads} heads",
        which,
        program,
        (q, rope, kv, tables, jnp.asarray(lengths)),
        tokens * width * 2,
        2 * tokens * heads * (width + LATENT),
    )


def layer_us(case: Case) -> float:
    """Microseconds of the case's kernels in a layer."""
    program = jax.jit(case.program)
    jax.block_until_ready(program(*case.args))
    times = []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(program(*case.args))
            events = device_events(folder)
        times.append(sum(end - start for name, start, end in events if NAMES.search(name)))
    return min(times) / REPEATS / 1e3


def measured(case: Case) -> Row:
    us = layer_us(case)
    return {
        "case": case.name,
        "kernel": case.which,
        "us": us,
        "TB/s": case.read / us / 1e6,
        "TFLOP/s": case.operations / us / 1e6,
    }


def cases(
    args: argparse.Namespace, kernels: Sequence[HopperImplementation]
) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Each one's name, and what makes it: a pool of 252 x 8192 takes 5 GB."""
    for name in MATRICES:
        for rows in args.rows:
            for which in kernels:
                yield f"products {name}", functools.partial(products, name, rows, which)
    for batch, context in args.decode:
        for heads in args.heads:
            for which in kernels:
                yield "decode", functools.partial(decode, batch, context, heads, which)


def main(argv: list[str]) -> int:
    parser = own_parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose names have this: decode, q_b")
    parser.add_argument("--rows", type=numbers, default="16,64,128,252,512", help="of products")
    parser.add_argument(
        "--decode", type=sizes, default="64x1024,64x4096,252x8192", help="batch x context"
    )
    parser.add_argument("--heads", type=numbers, default="128,64,32", help="of decode attention")
    args = parser.parse_args(argv)
    if max(args.rows) > MAX_ROWS:
        parser.error(f"--rows: kernels take up to {MAX_ROWS}")
    here = gpu_and_kernels("bench_kernels", "the times are those of its kernels.")
    if here is None:
        return 2
    device, kernels = here
    hopper_decode.LEAST_ROWS = 0  # below it the kernel is not chosen
    rows: list[Row] = []
    for name, make in cases(args, kernels):
        if args.only in name:
            rows.append(measured(make()))
            say(f"  {rows[-1]}")
    print(table(rows))
    emit("kernel times", device=device.device_kind, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
