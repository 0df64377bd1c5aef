"""One compiled program over a mesh that returns the logits of every row: what tests look into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import NamedSharding, PartitionSpec

from model.batch import ForwardBatch
from model.ops.kernels import XLA, Kernels
from sharding.comm import MeshComm
from sharding.layout import make_layout
from sharding.mesh import by_slice, make_mesh
from sharding.sources import open_source
from sharding.step import ModelSpec, abstract_array, sharded
from tests.fixtures import LOGIT_TOLERANCE, Fixture

PAGE_SIZE = 4
NUM_PAGES = 200
TABLE_WIDTH = 56
KERNELS = Kernels(
    decode_attention="pallas",
    extend_attention="pallas",
    mla_inputs="pallas",
    grouped_mlp="pallas",
    norm="pallas",
    dense="pallas",
    routing="pallas",
    interpret=True,
)
"""Every kernel, run as ordinary JAX operations."""
needs_interpreter = pytest.mark.skipif(
    not hasattr(mosaic_gpu, "InterpretGPUParams"),
    reason="Mosaic GPU kernels can be interpreted from jax 0.11 on",
)
HOPPER = replace(KERNELS, grouped_mlp="hopper", dense="hopper")
PROCESSORS = 2
"""That interpreted kernels for Hopper have: each has several tiles, not all have equally many."""
OPTIMISED = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
"""For a program that runs many steps: it runs several times as fast as conftest.py's, and takes
about twice as long to compile."""


def lowered_for_cuda(fn: Callable[..., object], *args: jax.ShapeDtypeStruct) -> str:
    """The program for a GPU, as text; needs none."""
    try:
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if "AbstractDevice" not in str(error):
            raise
    # Newer versions ask which GPU: an abstract one will do.
    device = jax.sharding.AbstractDevice(
        platform="cuda", device_kind="NVIDIA H100 80GB HBM3", num_cores=None
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@dataclass(kw_only=True)
class SliceRows:
    """What one slice computes in a step: decode (token, position, pages), chunks likewise."""

    decode: list[tuple[int, int, Sequence[int]]] = field(default_factory=list)
    chunks: list[tuple[Sequence[int], int, Sequence[int]]] = field(default_factory=list)


class MeshModel:
    """A checkpoint on a mesh; `step` returns logits of all rows, slice by slice."""

    def __init__(
        self,
        folder: Path,
        layout: tuple[int, int, int],
        exchange: str = "none",
        *,
        decode_rows: int = 2,
        prefill_rows: int = 112,
        chunks: int = 3,
        keep_fp8: bool = True,
        kv_dtype: str = "float32",
        deterministic: bool = False,
        fp8_dispatch: bool = False,
        kernels: Kernels = XLA,
        cut: int = 0,
        optimised: bool = False,
    ) -> None:
        source = open_source(folder, keep_fp8=keep_fp8)
        self.config = source.config
        self.layout = make_layout(*layout)
        self.mesh = make_mesh(self.layout)
        self.spec = ModelSpec(self.config, jnp.dtype(jnp.float32), self.layout, source.fp8)
        self.weights = source.load(self.spec, self.mesh)
        self.sizes = (decode_rows, prefill_rows, chunks)
        pool, pool_spec = self.spec.pool_shape(NUM_PAGES, PAGE_SIZE), self.spec.pool_spec
        self.sharding = by_slice(self.mesh, self.layout)
        self.kv = jax.device_put(jnp.zeros(pool, kv_dtype), NamedSharding(self.mesh, pool_spec))
        self.comm = MeshComm(
            self.layout, exchange, fp8_dispatch=fp8_dispatch, deterministic=deterministic
        )
        self.kernels, self.cut = kernels, cut
        self.options = OPTIMISED if optimised else {}

    @functools.cached_property
    def program(self) -> jax.stages.Compiled:
        """Compiled when it is first needed: some tests look at weights alone."""
        batch = self._pack([SliceRows() for _ in range(self.layout.num_slices)])
        shapes = ForwardBatch(*(a.shape[1:] for a in batch))
        num_rows = sum(self.sizes[:2])

        def forward(weights, kv, used):
            # Empty arrays are made here: XLA of jaxlib 0.11.2 crashes on sharded empty arguments.
            given = iter(used)
            one = ForwardBatch(
                *(next(given)[0] if 0 not in s else jnp.zeros(s, jnp.int32) for s in shapes)
            )
            rows = jnp.arange(num_rows)
            model = self.spec.merge(weights)
            logits, kv, counts = model(kv[0], one, self.comm, rows, self.kernels, self.cut)
            return logits[None], kv[None], counts[None]

        spec, pool_spec = PartitionSpec(self.layout.attn_dp), self.spec.pool_spec
        step = sharded(
            forward,
            self.mesh,
            (self.spec.specs, pool_spec, spec),
            (spec, pool_spec, spec),
            donate=(1,),
        )
        return step.lower(
            [abstract_array(p.shape, p.dtype, self.mesh, p.spec) for p in self.spec.params],
            abstract_array(self.kv.shape, self.kv.dtype, self.mesh, pool_spec),
            [abstract_array(a.shape, a.dtype, self.mesh, spec) for a in batch if a.size],
        ).compile(self.options)

    def _pack(self, slices: Sequence[SliceRows]) -> ForwardBatch:
        b, m, c = self.sizes
        d = len(slices)
        batch = ForwardBatch(
            decode_tokens=np.zeros((d, b), np.int32),
            decode_positions=np.full((d, b), -1, np.int32),
            decode_tables=np.zeros((d, b, TABLE_WIDTH), np.int32),
            prefill_tokens=np.zeros((d, m), np.int32),
            chunk_first_row=np.full((d, c), m, np.int32),
            chunk_rows=np.zeros((d, c), np.int32),
            chunk_start=np.zeros((d, c), np.int32),
            chunk_tables=np.zeros((d, c, TABLE_WIDTH), np.int32),
        )
        for s, rows in enumerate(slices):
            for i, (token, position, pages) in enumerate(rows.decode):
                batch.decode_tokens[s, i] = token
                batch.decode_positions[s, i] = position
                batch.decode_tables[s, i, : len(pages)] = pages
            first = 0
            for i, (tokens, start, pages) in enumerate(rows.chunks):
                batch.prefill_tokens[s, first : first + len(tokens)] = tokens
                batch.chunk_first_row[s, i] = first
                batch.chunk_rows[s, i] = len(tokens)
                batch.chunk_start[s, i] = start
                batch.chunk_tables[s, i, : len(pages)] = pages
                first += len(tokens)
        return batch

    def step(
        self, slices: Sequence[SliceRows]
    ) -> tuple[list[tuple[np.ndarray, list[np.ndarray]]], np.ndarray]:
        """Per slice (decode logits, logits of each chunk); and expert counts [D, MoE layers, E]."""
        batch = jax.device_put([a for a in self._pack(slices) if a.size], self.sharding)
        logits, self.kv, counts = self.program(self.weights, self.kv, batch)
        logits = np.asarray(logits)
        results = []
        for s, rows in enumerate(slices):
            at, parts = self.sizes[0], []
            for tokens, _, _ in rows.chunks:
                parts.append(logits[s, at : at + len(tokens)])
                at += len(tokens)
            results.append((logits[s, : len(rows.decode)], parts))
        return results, np.asarray(counts)


def sizes_for(num_prompts: int, num_slices: int) -> dict[str, int]:
    """Rows of a `MeshModel` that `generate`s for so many prompts. Several slices get fewer prefill
    rows: each device may compute those of all, padding too, and prompts may as well be cut."""
    return {
        "decode_rows": max(2, -(-num_prompts // num_slices)),
        "prefill_rows": 112 if num_slices == 1 else 24,
    }


def generate(
    model: MeshModel, prompts: Sequence[Sequence[int]], steps: int
) -> list[tuple[np.ndarray, list[int]]]:
    """Every prompt's logits [len(prompt), V] and its `steps` greedy tokens.

    Prompt i is on slice i % D; all are decoded together. Expert counts are checked on the way.
    """
    d = model.layout.num_slices
    slices = [range(s, len(prompts), d) for s in range(d)]
    pages = _scattered_pages([len(p) + steps for p in prompts], slices)
    k = model.config.num_experts_per_token

    logits = _prefill(model, prompts, slices, pages)
    tokens = [[int(rows[-1].argmax())] for rows in logits]
    for step in range(steps - 1):
        rows = [
            SliceRows(decode=[(tokens[i][-1], len(prompts[i]) + step, pages[i]) for i in numbers])
            for numbers in slices
        ]
        results, counts = model.step(rows)
        for numbers, (decoded, _), of_slice in zip(slices, results, counts, strict=True):
            assert (of_slice.sum(axis=1) == k * len(numbers)).all()
            for i, row in zip(numbers, decoded, strict=True):
                tokens[i].append(int(row.argmax()))
    return list(zip(logits, tokens, strict=True))


def _scattered_pages(lengths: Sequence[int], slices: Sequence[Sequence[int]]) -> list[list[int]]:
    """Pages of each sequence, in no order: a mistake in a page table must show."""
    pages: list[list[int]] = [[] for _ in lengths]
    for s, numbers in enumerate(slices):
        free = list(np.random.default_rng(s).permutation(np.arange(1, NUM_PAGES)))
        for i in numbers:
            need = -(-lengths[i] // PAGE_SIZE)
            assert need <= len(free)
            pages[i], free = free[:need], free[need:]
    return pages


def _prefill(
    model: MeshModel,
    prompts: Sequence[Sequence[int]],
    slices: Sequence[Sequence[int]],
    pages: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """Logits of all positions. A slice's prompts follow each other through its rows, cut where
    these end."""
    _, room, most_chunks = model.sizes
    k = model.config.num_experts_per_token
    parts: list[list[np.ndarray]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    while any(n < len(p) for n, p in zip(done, prompts, strict=True)):
        rows, chosen = [], []
        for numbers in slices:
            left, mine = room, SliceRows()
            chosen.append([i for i in numbers if done[i] < len(prompts[i])][:most_chunks])
            for i in chosen[-1]:
                chunk = prompts[i][done[i] : done[i] + left]
                if chunk:
                    mine.chunks.append((chunk, done[i], pages[i]))
                left -= len(chunk)
            rows.append(mine)
        results, counts = model.step(rows)
        for mine, numbers, (_, logits), of_slice in zip(rows, chosen, results, counts, strict=True):
            assert (of_slice.sum(axis=1) == k * sum(len(c[0]) for c in mine.chunks)).all()
            for i, part in zip(numbers, logits, strict=False):
                parts[i].append(part)
                done[i] += len(part)
    return [np.concatenate(p) for p in parts]


def check_prompts(model: MeshModel, fixture: Fixture, prompts: Sequence[dict[str, Any]]) -> None:
    """The reference's logits at every prompt position, and its greedy tokens."""
    found = generate(model, [p["prompt"] for p in prompts], len(prompts[0]["tokens"]))
    for p, (logits, tokens) in zip(prompts, found, strict=True):
        error = np.abs(logits - fixture.logits[p["id"]]).max()
        assert error < LOGIT_TOLERANCE, (p["id"], error)
        assert tokens == p["tokens"], p["id"]
