"""The kernels on this GPU against their definitions in XLA: random inputs, ragged, published sizes.

The test suite runs kernels in interpreters on a CPU; this runs them for real. Sequences of length
0, absent experts, uneven loads, prefixes, FP8 weights and caches are among the cases, and what must
not be read is NaN. A case is bad if the norm of the difference is more than a bound times that of
the definition's result (both round to bfloat16), or if anything is not finite. For example:

  python scripts/check_kernels.py
  python scripts/check_kernels.py --only extend --seed 7
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from model.batch import find_prefixes
from model.layers import add_and_norm, gated_mlp
from model.ops import routing
from model.ops.dense import StackedWeight, matmul_parts
from model.ops.grouped_mlp import grouped_mlp, hopper
from model.ops.grouped_mlp.pallas import sort_pairs
from model.ops.kernels import HOPPER, XLA, HopperImplementation, Kernels
from model.ops.mla_attention import decode_heads, extend_attention, hopper_decode
from model.ops.mla_attention import hopper as hopper_attention
from model.quantization import (
    AS_THEY_ARE,
    FP8,
    BlockFP8,
    Contracted,
    contracted_last,
    factors_shape,
)
from scripts.benchmarking import Row, emit, own_parser, say, table

BF16 = jnp.bfloat16
BOUND = 0.012
"""Of the relative difference: results and what is between them are rounded to 8 bits."""
LATENT, ROPE, NOPE, VALUE, PAGE = 512, 64, 128, 128, 16
Case = tuple[str, Callable[[], tuple[Any, Any]]]
"""A name, and what gives the kernel's result and what it should be."""


def kernels(
    many: HopperImplementation = "pallas", decode: HopperImplementation = "pallas"
) -> Kernels:
    return Kernels(
        decode_attention=decode,
        extend_attention=many,
        mla_inputs="pallas",
        grouped_mlp=many,
        routing="pallas",
        norm="pallas",
        dense="pallas",
        interpret=jax.default_backend() == "cpu",
    )


class Draw:
    """Random arrays of one case."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: Any = BF16) -> jax.Array:
        key = jax.random.key(int(self.rng.integers(2**31)))
        return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    def fp8(
        self, shape: tuple[int, ...], block: tuple[int, ...], contracted: Contracted = AS_THEY_ARE
    ) -> BlockFP8:
        """A stack [L, ...] with blocks of its last dimensions."""
        shape, block = (contracted_last(sizes, contracted) for sizes in (shape, block))
        factors = factors_shape(shape, block)
        return BlockFP8(
            data=self.normal(*shape).astype(FP8),
            scale=0.02 * jnp.exp(self.normal(*factors, dtype=jnp.float32)),
            block=block,
            dtype=jnp.dtype(BF16),
            contracted=contracted,
        )

    def pool(
        self, contexts: np.ndarray, dtype: Any, page: int = PAGE
    ) -> tuple[jax.Array, jax.Array]:
        """A pool of 2 layers on scattered pages, NaN where no sequence has a token; page tables."""
        width = max(1, int(-(-contexts.max() // page)))
        pages = -(-contexts // page)
        ids = 1 + self.rng.permutation(int(pages.sum()))
        tables = np.zeros((len(contexts), width), np.int32)
        written = np.zeros((1 + len(ids), page), bool)
        for row, context, n, end in zip(tables, contexts, pages, np.cumsum(pages), strict=True):
            row[:n] = ids[end - n : end]
            written[row[:n]] = (np.arange(n * page) < context).reshape(n, page)
        kv = self.normal(2, *written.shape, LATENT + ROPE).astype(dtype)
        nothing = jnp.asarray(jnp.nan, jnp.float32).astype(dtype)
        return jnp.where(written[None, :, :, None], kv, nothing), jnp.asarray(tables)


def without_nan(kv: jax.Array) -> jax.Array:
    """For XLA, which multiplies what is not seen by zero."""
    return jnp.where(jnp.isnan(kv.astype(jnp.float32)), jnp.zeros((), kv.dtype), kv)


# ---- the cases -----------------------------------------------------------------------------------


def decode(
    seed: int,
    batch: int,
    heads: int,
    dtype: Any,
    kernel: HopperImplementation = "pallas",
    page: int = PAGE,
) -> tuple[Any, Any]:
    draw, at = Draw(seed), jnp.int32(1)
    contexts = draw.rng.integers(1, 2000, batch)
    contexts[3::7] = 0
    kv, tables = draw.pool(contexts, dtype, page)
    q, rope = draw.normal(batch, heads, NOPE), draw.normal(batch, heads, ROPE)
    stacks = [
        draw.normal(2, heads, NOPE, LATENT, scale=NOPE**-0.5),
        draw.normal(2, heads, LATENT, VALUE, scale=LATENT**-0.5),
    ]

    def run(kv: jax.Array, which: Kernels) -> jax.Array:
        def attend(q: jax.Array, rope: jax.Array, stacks: list[jax.Array], kv: jax.Array) -> Any:
            weights = [StackedWeight(stack=stack, layer=at) for stack in stacks]
            lengths = jnp.asarray(contexts, jnp.int32)
            return decode_heads(
                q, rope, *weights, kv, at, tables, lengths, scale=0.07, kernels=which
            )

        return jax.jit(attend)(q, rope, stacks, kv)

    return run(kv, kernels(decode=kernel)), run(without_nan(kv), XLA)


def extend(
    seed: int, chunks: list[tuple[int, int]], heads: int, many: HopperImplementation
) -> tuple[Any, Any]:
    """Chunks are (start, rows), packed, with some padding rows behind the last."""
    draw = Draw(seed)
    starts, counts = (np.array(numbers, np.int32) for numbers in zip(*chunks, strict=True))
    total = int(counts.sum())
    rows = total + -total % 64 + 64
    kv, tables = draw.pool((starts + counts).astype(np.int64), BF16)
    first = (np.cumsum(counts) - counts).astype(np.int32)
    own = [
        np.asarray(kv[1][tables[i]].astype(jnp.float32)).reshape(-1, LATENT + ROPE)[s : s + n]
        for i, (s, n) in enumerate(chunks)
    ]
    entries = np.zeros((rows, LATENT + ROPE), np.float32)
    entries[:total] = np.concatenate(own)
    arrays = [
        draw.normal(rows, heads, NOPE),
        draw.normal(rows, heads, ROPE),
        draw.normal(heads, NOPE, LATENT, scale=LATENT**-0.5),
        draw.normal(heads, LATENT, VALUE, scale=LATENT**-0.5),
        jnp.asarray(entries, BF16),
    ]
    numbers = [jnp.asarray(a) for a in (first, counts, starts)]
    prefixes = find_prefixes(numbers[1], numbers[2], tables, PAGE)

    def run(kv: jax.Array, which: Kernels) -> jax.Array:
        return jax.jit(
            lambda arrays, kv: extend_attention(
                *(*arrays, kv, jnp.int32(1), tables, *numbers, prefixes),
                rows=slice(0, rows),
                num_rows=rows,
                scale=0.07,
                kernels=which,
            )
        )(arrays, kv)

    return run(kv, kernels(many)), run(without_nan(kv), XLA)


def experts(
    seed: int, tokens: int, load: str, many: HopperImplementation, *, fp8: bool = False
) -> tuple[Any, Any]:
    draw, count, k = Draw(seed), 64, 6
    width, inner = 2048, 1408 if not fp8 else 1024
    if fp8:
        w1: Any = draw.fp8((2, count, width, 2, inner), (128, 1, 128), (1, 2))
        w2: Any = draw.fp8((2, count, inner, width), (128, 128), (1, 1))
    else:
        w1 = draw.normal(2, count, width, 2, inner, scale=width**-0.5)
        w2 = draw.normal(2, count, inner, width, scale=inner**-0.5)
    score = draw.rng.random((tokens, count))
    if load == "uneven":
        score *= np.arange(count) ** 2
    ids = np.argsort(-score, axis=1)[:, :k].astype(np.int32)
    if load == "absent":
        ids[draw.rng.random(ids.shape) < 0.4] = -1
    if load == "one expert":
        ids[:] = [5] + [-1] * (k - 1)
    if load == "none":
        ids[:] = -1
    weights = jnp.asarray(draw.rng.random((tokens, k)), jnp.float32)
    x = draw.normal(tokens, width)

    def run(which: Kernels) -> jax.Array:
        program = jax.jit(functools.partial(grouped_mlp, kernels=which))
        return program(x, jnp.asarray(ids), weights, w1, w2, jnp.int32(1))

    return run(kernels(many)), run(XLA)


def dense_mlp(seed: int, tokens: int) -> tuple[Any, Any]:
    draw, width, inner = Draw(seed), 2048, 2816
    x = draw.normal(tokens, width)
    w1 = draw.normal(2, width, 2, inner, scale=width**-0.5)
    w2 = draw.normal(2, inner, width, scale=inner**-0.5)

    def run(which: Kernels) -> jax.Array:
        def one(x: jax.Array, *stacks: jax.Array) -> jax.Array:
            weights = (StackedWeight(stack=stack, layer=jnp.int32(1)) for stack in stacks)
            return gated_mlp(x, *weights, which)

        return jax.jit(one)(x, w1, w2)

    return run(kernels("hopper")), run(XLA)


def routes(seed: int, tokens: int, groups: routing.Groups | None) -> tuple[Any, Any]:
    """The logits' own precision decides: against float64, the ids of every row.

    Of experts whose logits float32 cannot tell apart, one is as good as the other.
    """
    draw, width, k = Draw(seed), 2048, 6
    count = 64 if groups is None else 256
    x, stack = draw.normal(tokens, width), draw.normal(2, width, count, dtype=jnp.float32)
    valid = draw.rng.random(tokens) < 0.9
    got, _ = jax.jit(
        functools.partial(
            routing.route,
            k=k,
            scoring="sigmoid",
            normalize=True,
            scale=1.0,
            groups=groups,
            interpret=kernels().interpret,
        )
    )(x, stack * 0.02, jnp.int32(1), None, jnp.asarray(valid))
    logits = np.asarray(x, np.float64) @ np.asarray(stack[1] * 0.02, np.float64)
    if groups is not None:
        by_group = logits.reshape(tokens, groups.number, -1)
        scores = 1 / (1 + np.exp(-np.sort(by_group, axis=-1)[..., -groups.best :]))
        kept = np.argsort(-scores.sum(axis=-1), axis=1)[:, : groups.kept]
        keep = np.zeros(by_group.shape[:2], bool)
        np.put_along_axis(keep, kept, True, axis=1)
        logits = np.where(keep[..., None], by_group, -np.inf).reshape(tokens, -1)
    want = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    chosen = np.maximum(got, 0)
    same = np.isclose(*(np.take_along_axis(logits, ids, 1) for ids in (chosen, want)), 0, 1e-5)
    same &= [[len(set(ids)) == k] for ids in chosen.tolist()]
    return got, np.where(valid[:, None], np.where(same, chosen, want), -1)


def sort(seed: int, pairs: int, count: int) -> tuple[Any, Any]:
    ids = np.random.default_rng(seed).integers(-1, count, pairs).astype(np.int32)
    order, counts = jax.jit(
        functools.partial(sort_pairs, experts=count, interpret=kernels().interpret)
    )(jnp.asarray(ids))
    present = int((ids >= 0).sum())
    want = np.argsort(np.where(ids < 0, count, ids), kind="stable")[:present]
    got = np.concatenate([np.asarray(order)[:present], np.asarray(counts)[:count]])
    return got, np.concatenate([want, np.bincount(ids[ids >= 0], minlength=count)])


def norms(seed: int, tokens: int, parts: int) -> tuple[Any, Any]:
    draw = Draw(seed)
    x, weight = draw.normal(tokens, 2048), draw.normal(3, 2048)
    added = draw.normal(parts, tokens, 2048, dtype=BF16 if parts == 1 else jnp.float32)

    def run(which: Kernels) -> jax.Array:
        stacked = StackedWeight(stack=weight, layer=jnp.int32(1))
        return jnp.stack(
            jax.jit(lambda x, added: add_and_norm(x, added, stacked, 1e-6, which, scale=1.0))(
                x, added
            )
        )

    return run(kernels()), run(XLA)


class Matrix(NamedTuple):
    """Inner and outer dimensions of a weight, and the blocks that it has in FP8.

    `turned`: how FP8 is stored, with contracted numbers side by side or as they are.
    """

    inside: tuple[int, ...]
    outside: tuple[int, ...]
    block: tuple[int, ...] | None = None
    turned: bool = True


def products(
    seed: int, tokens: int, of: Matrix, dense: HopperImplementation = "pallas"
) -> tuple[Any, Any]:
    draw, sides = Draw(seed), (len(of.inside), len(of.outside))
    x, shape = draw.normal(tokens, *of.inside), (3, *of.inside, *of.outside)
    stack: Any
    if of.block is None:
        stack = draw.normal(*shape, scale=0.02)
    else:
        stack = draw.fp8(shape, of.block, sides if of.turned else AS_THEY_ARE)

    def run(which: Kernels) -> jax.Array:
        def one(x: jax.Array, stack: Any) -> jax.Array:
            weight = StackedWeight(stack=stack, layer=jnp.int32(2))
            (parts,) = matmul_parts(x, (weight,), sides[0], which)
            return parts.astype(jnp.float32).sum(axis=0)

        return jax.jit(one)(x, stack)

    return run(replace(kernels(), dense=dense)), run(XLA)


def gpu_and_kernels(script: str, why: str) -> tuple[Any, list[HopperImplementation]] | None:
    """The first device, and the back ends that it has kernels of; None, and a sentence printed, if
    it is no GPU.

    Args: script, why: who needs one, and what the sentence goes on with.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        sentence = f"{script}: error: this needs a GPU, not {device.platform}: {why}"
        print(sentence, file=sys.stderr)
        return None
    on_hopper = getattr(device, "compute_capability", None) == HOPPER
    return device, ["pallas", "hopper"] if on_hopper else ["pallas"]


def cases(many: Sequence[HopperImplementation], seed: int) -> Iterator[Case]:
    on_hopper = "hopper" in many
    for batch, heads, dtype in (
        *((1, 16, BF16), (9, 16, BF16), (64, 16, BF16), (200, 16, BF16), (64, 32, BF16)),
        *((64, 128, BF16), (5, 128, BF16), (64, 16, FP8), (64, 128, FP8)),
    ):
        name = f"decode {batch} sequences, {heads} heads, cache {jnp.dtype(dtype).name}"
        yield name, functools.partial(decode, seed, batch, heads, dtype)
    many_heads = (1, 128, 16), (9, 128, 64), (64, 128, 16), (200, 64, 32), (64, 20, 8), (9, 64, 128)
    for batch, heads, page in many_heads if on_hopper else ():
        run = functools.partial(decode, seed, batch, heads, BF16, "hopper", page)
        yield f"decode hopper {batch} sequences, {heads} heads, pages of {page}", run
    chunks = (
        [(0, 777)],
        [(0, 300), (0, 1), (0, 128), (0, 64)],
        [(7, 5), (1300, 90), (0, 200)],
        [(4999, 333), (16, 400)],
    )
    for which in many:
        for each in chunks:
            yield f"extend {which} {each}", functools.partial(extend, seed, each, 16, which)
        for tokens, load in (
            *((2048, "even"), (777, "absent"), (1025, "uneven"), (1025, "one expert")),
            (1025, "none"),
        ):
            run = functools.partial(experts, seed, tokens, load, which)
            yield f"experts {which} {tokens} tokens, {load}", run
    for tokens in (1032, 8448) if on_hopper else ():
        yield f"dense MLP {tokens} rows", functools.partial(dense_mlp, seed, tokens)
    for tokens in (1, 64, 300):
        yield (
            f"experts pallas {tokens} tokens",
            functools.partial(experts, seed, tokens, "absent", "pallas"),
        )
    for which, (tokens, load) in itertools.product(
        many,
        [*((n, "absent") for n in (1, 200, 400, 2500)), (64, "one expert"), (64, "none")],
    ):
        run = functools.partial(experts, seed, tokens, load, which, fp8=True)
        yield f"experts FP8 {which} {tokens} tokens, {load}", run
    for tokens in (1, 64, 700, 8448):
        yield f"routing {tokens} tokens", functools.partial(routes, seed, tokens, None)
    groups = routing.Groups(number=8, kept=4, best=2)
    for tokens in (64, 4096):
        yield f"routing {tokens} tokens, groups", functools.partial(routes, seed, tokens, groups)
    for pairs, count in ((6, 64), (384, 64), (3072, 64), (50688, 64), (66048, 256)):
        yield f"sort {pairs} pairs, {count} experts", functools.partial(sort, seed, pairs, count)
    for tokens, parts in ((1, 4), (64, 4), (300, 2), (8448, 1)):
        yield f"residual and norm {tokens}x{parts}", functools.partial(norms, seed, tokens, parts)
    for tokens in (1, 64, 300):
        run = functools.partial(products, seed, tokens, Matrix((2048,), (3072,)))
        yield f"products {tokens} rows", run
    matrices = (
        Matrix((1536,), (16, 192), (128, 1, 64)),
        Matrix((128, 128), (2048,), (1, 128, 128)),
        Matrix((2048,), (2, 4608), (128, 1, 128)),
        Matrix((2048,), (576,), (128, 128), turned=False),
    )
    for which, tokens, of in itertools.product(many, (1, 16, 64, 300), matrices):
        run = functools.partial(products, seed, tokens, of, which)
        yield f"products FP8 {which} {tokens} rows by {of.inside} x {of.outside}", run


def relative_difference(got: np.ndarray, want: np.ndarray) -> float:
    """The norm of the difference, relative to that of what it should be."""
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def compared(case: Case) -> dict[str, Any]:
    """A line of the table: what differs by how much, or what went wrong."""
    name, run = case
    began = time.perf_counter()
    try:
        got, want = (np.asarray(jnp.asarray(a).astype(jnp.float32)) for a in run())
    except Exception as error:  # one case must not hide the others
        return {"case": name, "result": "bad", "why": f"{type(error).__name__}: {error}"[:300]}
    difference = relative_difference(got, want)
    exact = name.startswith(("routing", "sort"))
    good = bool(np.isfinite(got).all()) and difference <= (0 if exact else BOUND)
    row = {"case": name, "result": "good" if good else "bad", "difference": difference}
    return row | {"s": time.perf_counter() - began}


def main(argv: list[str]) -> int:
    parser = own_parser(__doc__)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=[""],
        help="cases whose names have one of these, as decode,routing",
    )
    parser.add_argument("--seed", type=int, help="default: a new one each time, printed")
    args = parser.parse_args(argv)
    why = "on a CPU, tests/model/test_kernels.py runs kernels in interpreters."
    here = gpu_and_kernels("check_kernels", why)
    if here is None:
        return 2
    device, many = here
    # The definitions must not multiply float32 in fewer bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    seed = int(time.time()) if args.seed is None else args.seed
    hopper.LEAST_LOAD = hopper_attention.LEAST_ROWS = hopper_decode.LEAST_ROWS = 0
    chosen = [case for case in cases(many, seed) if any(part in case[0] for part in args.only)]
    rows: list[Row] = []
    with ThreadPoolExecutor(4) as pool:  # most of the time goes into compiling
        for row in pool.map(compared, chosen):
            say(f"  {row}")
            rows.append(row)
    print(table(rows))
    emit("kernels", device=device.device_kind, seed=seed, rows=rows)
    return int(any(row["result"] != "good" for row in rows) or not rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
