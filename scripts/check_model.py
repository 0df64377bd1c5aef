"""A whole model with its kernels against the definitions in XLA, in bfloat16 and in float32.

Dummy weights of a published shape, a few layers of it, on one device; weights in FP8 stay so, for
all. Five steps: two prompts, their continuations behind one and behind several pieces of cached
prefix, a decode step beside another prompt, and one alone. Of every step's logits it prints the
norm of the difference from the float32 definition, relative to that definition's: what rounding to
bfloat16 costs the definition, and what it costs the kernels. They are bad if theirs is more than
half as much again. For example:

  python scripts/check_model.py --shape deepseek-v2-lite --layers 6
  python scripts/check_model.py --shape deepseek-v3 --layers 4
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from model.batch import ForwardBatch
from model.ops.kernels import XLA, Kernels
from scripts.bench_offline import SHAPES, configured
from scripts.benchmarking import Row, emit, own_parser, say, table
from scripts.check_kernels import relative_difference
from serving.config import ServerConfig
from serving.engine.engine import configure_jax, open_weights, resolve_layout
from serving.engine.implementations import choose_kernels
from sharding.comm import MeshComm
from sharding.mesh import make_mesh
from sharding.step import ModelSpec, sharded

PAGE = 16
SEQUENCES = 3
ROWS = 128
"""Of prompts, their multiples."""
MUCH = 1.5
"""Times the definition's own rounding."""
COPIES = 4
"""Of the rows of the last step: decode attention of many heads has a kernel for several."""
Step = tuple[str, list[tuple[int, int]], list[tuple[int, int, int]]]
"""A name, decode rows (sequence, position), and chunks (sequence, start, tokens)."""


def steps(unit: int) -> list[Step]:
    """Prompts of some `unit`s of tokens: with 100 of 1,900 to 3,000 rows, enough for any kernel."""
    chunks = [(0, 0, 7 * unit), (1, 0, 12 * unit)]
    behind = [(0, 7 * unit, 9 * unit), (1, 12 * unit, 10 * unit)]
    further = [(0, 16 * unit, 6 * unit), (1, 22 * unit, 18 * unit)]
    decodes = [(0, 22 * unit), (1, 40 * unit)]
    alone = [(0, 22 * unit + 1), (1, 40 * unit + 1), (2, 20 * unit)]
    return [
        ("prompts", [], chunks),
        ("behind prefixes", [], behind),
        ("behind long prefixes", [], further),
        ("decode beside a prompt", decodes, [(2, 0, 20 * unit)]),
        ("decode", alone * COPIES, []),
    ]


def batch_of(step: Step, tokens: np.ndarray, pages: int) -> ForwardBatch:
    """The rows of a step, those of prompts padded.

    Sequence s has the `tokens` [s] and, behind the sink, `pages` pages from number s * pages on.
    """
    _, decodes, chunks = step
    tables = 1 + np.arange(SEQUENCES * pages, dtype=np.int32).reshape(SEQUENCES, pages)
    lengths = [n for _, _, n in chunks]
    prompts = [token for s, start, n in chunks for token in tokens[s, start : start + n]]

    def numbers(values: Sequence[int]) -> jax.Array:
        return jnp.asarray(values, jnp.int32)

    return ForwardBatch(
        decode_tokens=numbers([tokens[s, at] for s, at in decodes]),
        decode_positions=numbers([at for _, at in decodes]),
        decode_tables=jnp.asarray(tables[[s for s, _ in decodes]].reshape(-1, pages)),
        prefill_tokens=jnp.pad(numbers(prompts), (0, -len(prompts) % ROWS)),
        chunk_first_row=numbers(np.cumsum([0, *lengths[:-1]])),
        chunk_rows=numbers(lengths),
        chunk_start=numbers([start for _, start, _ in chunks]),
        chunk_tables=jnp.asarray(tables[[s for s, _, _ in chunks]]),
    )


class Model:
    """A model on one device, and its pool."""

    def __init__(
        self, spec: ModelSpec, mesh: Any, weights: list[jax.Array], kernels: Kernels, pages: int
    ) -> None:
        self.spec, self._mesh, self._weights, self._kernels = spec, mesh, weights, kernels
        self._comm = MeshComm(spec.layout, "none")
        self._kv = jnp.zeros(spec.pool_shape(1 + SEQUENCES * pages, PAGE), spec.dtype)

    def logits(self, batch: ForwardBatch) -> np.ndarray:
        """f32 [decode rows + chunks, V], the pool updated."""
        shapes = [a.shape for a in batch]

        def program(weights: list[jax.Array], kv: jax.Array, used: list[jax.Array]) -> Any:
            # XLA of jaxlib 0.11.2 crashes on sharded empty arguments.
            given = iter(used)
            all_of_it = (jnp.zeros(s, jnp.int32) if 0 in s else next(given) for s in shapes)
            model = self.spec.merge(weights)
            rows = ForwardBatch(*all_of_it)
            logits, kv, _ = model(kv[0], rows, self._comm, kernels=self._kernels)
            return logits, kv[None]

        whole, pool = PartitionSpec(), self.spec.pool_spec
        used = [a for a in batch if a.size]
        specs = (self.spec.specs, pool, [whole] * len(used))
        run = sharded(program, self._mesh, specs, (whole, pool), donate=(1,))
        logits, self._kv = run(self._weights, self._kv, used)
        return np.asarray(logits, np.float32)


def models(config: ServerConfig, pages: int) -> Iterator[Model]:
    """By kernels in bfloat16, by definition in bfloat16, by definition in float32."""
    source, layout = open_weights(config), resolve_layout(config)
    mesh = make_mesh(layout)
    device = mesh.devices.flat[0]
    spec = ModelSpec(source.config, jnp.dtype(jnp.bfloat16), layout, source.fp8)
    weights = source.load(spec, mesh)
    kernels = choose_kernels(
        config,
        source.config,
        layout,
        platform=device.platform,
        capability=getattr(device, "compute_capability", None),
        dtype=jnp.bfloat16,
        fp8=spec.fp8_weights,
    )
    yield Model(spec, mesh, weights, kernels, pages)
    yield Model(spec, mesh, weights, XLA, pages)
    spec = ModelSpec(source.config, jnp.dtype(jnp.float32), layout, source.fp8)
    # Some parameters are float32 in any model, others FP8.
    wide = [w.astype(p.dtype) for w, p in zip(weights, spec.params, strict=True)]
    yield Model(spec, mesh, wide, XLA, pages)


def compare(config: ServerConfig, unit: int, seed: int) -> Iterator[Row]:
    """A row for each step."""
    longest = 2 + 40 * unit
    pages = -(-longest // PAGE)
    chosen = list(models(config, pages))
    vocab = chosen[0].spec.config.vocab_size
    tokens = np.random.default_rng(seed).integers(0, vocab, (SEQUENCES, longest))
    for step in steps(unit):
        batch = batch_of(step, tokens, pages)
        got, rounded, want = (model.logits(batch) for model in chosen)
        ours, theirs = (relative_difference(logits, want) for logits in (got, rounded))
        same = [int((a.argmax(-1) == want.argmax(-1)).sum()) for a in (got, rounded)]
        good = bool(np.isfinite(got).all()) and ours <= MUCH * theirs
        yield {
            "step": step[0],
            "result": "good" if good else "bad",
            "kernels": ours,
            "definition": theirs,
            "best tokens, kernels": f"{same[0]}/{len(want)}",
            "definition's": f"{same[1]}/{len(want)}",
        }


def main(argv: list[str]) -> int:
    parser = own_parser(__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), help="instead of --model-path")
    parser.add_argument("--layers", type=int, help="the first ones of --shape only")
    parser.add_argument("--unit", type=int, default=100, help="scale of the prompts (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default: 1)")
    args, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            fixed = ["--tp", "1", "--dtype", "bfloat16"]
            config = configured([*fixed, *flags], args.shape, Path(temporary), args.layers)
            configure_jax(config)
            rows = []
            for row in compare(config, args.unit, args.seed):
                say(f"  {row}")
                rows.append(row)
        except ValueError as error:  # ConfigError, LayoutError, CheckpointError: one sentence
            print(f"check_model: error: {error}", file=sys.stderr)
            return 2
    print(table(rows))
    emit("model", device=jax.devices()[0].device_kind, shape=args.shape, rows=rows)
    return int(any(row["result"] != "good" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
