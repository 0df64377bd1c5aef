"""Decode attention for many heads on Hopper: interpreted, against its twin; its plan; lowered."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.batch import ForwardBatch
from model.comm import SingleDevice
from model.config import ModelConfig
from model.ops.kernels import XLA
from model.ops.mla_attention import decode_attention, hopper_decode, plan_decode
from model.ops.mla_attention.hopper_decode import BLOCK, LEAST_SHARE, shared_out
from scripts.bench_offline import SHAPES
from sharding.layout import make_layout
from sharding.step import ModelSpec
from tests.harness import KERNELS, PROCESSORS, lowered_for_cuda, needs_interpreter
from tests.paged import no_nan, pool_and_tables

LATENT, ROPE = 128, 64
KERNEL = dataclasses.replace(KERNELS, decode_attention="hopper")


def workers_of(work, sequences, workers):
    """For every block, in a row, its worker, by what the kernel's loops read."""
    found = np.full(int(work.ends[-1]), -1)
    for worker in range(workers):
        begin = worker * int(work.share[0])
        for sequence in range(int(work.first[worker]), int(work.last[worker]) + 1):
            assert sequence < sequences
            first = int(work.ends[sequence] - work.blocks[sequence])
            mine = slice(
                max(first, begin), min(int(work.ends[sequence]), begin + int(work.share[0]))
            )
            assert mine.start < mine.stop
            assert (found[mine] == -1).all()
            found[mine] = worker
    return found


def lengths_of(rng, kind, sequences):
    """Random ones, some without tokens; or all alike, at the borders of blocks."""
    if kind != "random":
        return np.full(sequences, kind, np.int32)
    lengths = rng.integers(0, 3000, sequences).astype(np.int32)
    lengths[rng.random(sequences) < 0.2] = 0
    return lengths


@pytest.mark.parametrize("kind", ["random", 0, BLOCK, 2 * BLOCK, 8 * BLOCK + 1])
@pytest.mark.parametrize("workers", [1, 2, 7, 66])
@pytest.mark.parametrize("sequences", [1, 3, 64])
def test_every_block_has_one_worker_and_every_split_sequence_one_that_merges(
    rng, sequences, workers, kind
):
    lengths = lengths_of(rng, kind, sequences)
    tables = rng.integers(0, 9, (sequences, 5)).astype(np.int32)
    work = jax.jit(shared_out, static_argnums=(2, 3))(tables, lengths, 16, workers)
    np.testing.assert_array_equal(work.pages, 16 * tables)
    np.testing.assert_array_equal(work.lengths, lengths)
    np.testing.assert_array_equal(work.blocks, np.maximum(1, -(-lengths // BLOCK)))
    found = workers_of(work, sequences, workers)
    assert (found >= 0).all()
    counts = np.bincount(found, minlength=workers)
    assert counts.max() <= max(LEAST_SHARE, -(-len(found) // workers))
    parts = {}  # of split sequences: their first and last worker
    for sequence, end in enumerate(np.asarray(work.ends)):
        of_sequence = found[end - work.blocks[sequence] : end]
        if of_sequence[0] != of_sequence[-1]:
            parts[sequence] = (of_sequence[0], of_sequence[-1])
    merged = {
        int(sequence): (worker, int(last))
        for worker, (sequence, last) in enumerate(zip(work.split, work.last_part, strict=True))
        if sequence >= 0
    }
    assert merged == parts


@pytest.fixture
def constants(monkeypatch):
    """Sets constants of the kernel; what is traced with them is forgotten before and after."""

    def patch(**values):
        for name, value in values.items():
            monkeypatch.setattr(hopper_decode, name, value)
        hopper_decode.decode_attention.clear_cache()

    yield patch
    hopper_decode.decode_attention.clear_cache()


@needs_interpreter
@pytest.mark.parametrize(
    ("heads", "page_size", "processors", "lengths", "dtype"),
    [
        (64, 16, PROCESSORS, [1, 64, 65, 0, 200, 130], "bfloat16"),  # sequences in two programs
        (128, 32, 2 * PROCESSORS, [300, 7], "float16"),
        (20, 8, 4, [900], "bfloat16"),  # one in all four
        (20, 16, 22, [1300, 64], "bfloat16"),  # more parts than are merged at a time
        (40, 128, 3, [0, 0, 9], "bfloat16"),  # pages longer than blocks; one program has no work
    ],
)
def test_it_equals_its_twin(rng, constants, heads, page_size, processors, lengths, dtype):
    constants(PROCESSORS=processors, LEAST_ROWS=0)
    width = max(1, -(-max(lengths) // page_size))
    kv, tables = pool_and_tables(rng, lengths, page_size, width, dtype, LATENT + ROPE)
    q_latent = jnp.asarray(rng.standard_normal((len(lengths), heads, LATENT)), dtype)
    q_rope = jnp.asarray(rng.standard_normal((len(lengths), heads, ROPE)), dtype)
    args = jnp.int32(1), tables, jnp.array(lengths)
    want = decode_attention(q_latent, q_rope, no_nan(kv), *args, scale=0.1, kernels=XLA)
    plan = plan_decode(*args[1:], heads, page_size, KERNEL)
    got = decode_attention(q_latent, q_rope, kv, *args, scale=0.1, plan=plan, kernels=KERNEL)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    got, want = (np.asarray(a.astype(jnp.float32)) for a in (got, want))
    np.testing.assert_allclose(got, want, atol=0.01)
    assert np.linalg.norm(got - want) <= 0.005 * np.linalg.norm(want)
    assert (got[np.array(lengths) == 0] == 0).all()


def test_what_it_cannot_take_is_said():
    given = {"capability": "9.0", "dtype": "bfloat16", "kv_dtype": "bfloat16", "latent": 512}
    given |= {"rope": 64, "heads": 128, "page_size": 16}
    assert hopper_decode.unsupported(**given) is None
    for change, text in (
        ({"capability": "8.0"}, "capability 8.0"),
        ({"dtype": "float32", "kv_dtype": "float32"}, "float32"),
        ({"kv_dtype": "float8_e4m3fn"}, "cache of float8_e4m3fn"),
        ({"latent": 384}, "kv_lora_rank 384"),
        ({"latent": 64}, "kv_lora_rank 64"),
        ({"latent": 1024}, "kv_lora_rank 1024"),
        ({"rope": 32}, "qk_rope_head_dim 32"),
        ({"heads": 16}, "of 16 heads"),
        ({"page_size": 24}, "pages of 24"),
        ({"page_size": 4}, "pages of 4"),
    ):
        assert text in hopper_decode.unsupported(**given | change)


@pytest.mark.parametrize(
    ("sequences", "heads", "dtype", "taken"),
    [
        (64, 128, "bfloat16", True),  # DeepSeek-V3's
        (252, 64, "float16", True),  # Kimi-K2's
        (64, 20, "bfloat16", True),  # GLM-4.7-Flash's
        (8, 64, "bfloat16", True),
        (7, 64, "bfloat16", False),  # too few for it
    ],
)
def test_it_lowers_for_cuda(sequences, heads, dtype, taken):
    """What interpret mode accepts, Mosaic may refuse."""

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    kernels = dataclasses.replace(KERNEL, interpret=False)

    def attend(q_latent, q_rope, kv, layer, tables, lengths):
        plan = plan_decode(tables, lengths, heads, kv.shape[2], kernels)
        assert (plan is not None) is taken
        args = q_latent, q_rope, kv, layer, tables, lengths
        return decode_attention(*args, scale=0.1, plan=plan, kernels=kernels)

    text = lowered_for_cuda(
        attend,
        *(array(sequences, heads, 512), array(sequences, heads, 64), array(61, 1000, 16, 576)),
        *(array(dtype="int32"), array(sequences, 300, dtype="int32")),
        array(sequences, dtype="int32"),
    )
    assert ("mosaic_gpu" in text) is taken
    assert ("mla_merge_parts" in text) is taken


def primitives(jaxpr, *, in_scan=False):
    """Names of what a program does in the bodies of its loops over layers."""
    for equation in jaxpr.eqns:
        name = str(equation.primitive)
        if in_scan:
            yield name
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, in_scan=in_scan or name == "scan")


def test_a_step_shares_out_its_work_once_for_all_layers():
    config = ModelConfig.from_hf(SHAPES["deepseek-v3"] | {"num_hidden_layers": 3})  # all dense
    spec = ModelSpec(config, jnp.dtype("bfloat16"), make_layout(1, 1, 1))
    kernels = dataclasses.replace(KERNEL, interpret=False)

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    def forward(weights, kv, batch):
        return spec.merge(weights)(kv, batch, SingleDevice(), kernels=kernels)

    rows, pages, chunks = 64, 300, 2
    batch = ForwardBatch(
        *(array(rows), array(rows), array(rows, pages), array(16)),
        *(array(chunks), array(chunks), array(chunks), array(chunks, pages)),
    )
    program = jax.make_jaxpr(forward)(
        [array(*p.shape, dtype=p.dtype) for p in spec.params],
        array(3, 1000, 16, config.latent_dim, dtype="bfloat16"),
        batch,
    )
    of_layers = set(primitives(program.jaxpr))
    assert "mla_decode_many_heads" in str(program)
    assert "wgmma_ref" in of_layers
    assert "cumsum" not in of_layers
