"""Decode attention for many heads on Hopper: interpreted, against its twin; its plan; lowered."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.ops.kernels import XLA
from model.ops.mla_attention import decode_attention, hopper_decode
from model.ops.mla_attention.hopper_decode import BLOCK, LEAST_SHARE, shared_out
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


@pytest.mark.parametrize("workers", [1, 2, 7, 66])
@pytest.mark.parametrize("sequences", [1, 3, 64])
def test_every_block_has_one_worker_and_every_split_sequence_one_that_merges(
    rng, sequences, workers
):
    lengths = rng.integers(0, 3000, sequences).astype(np.int32)
    lengths[rng.random(sequences) < 0.2] = 0
    work = jax.jit(shared_out, static_argnums=1)(lengths, workers)
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


@needs_interpreter
@pytest.mark.parametrize(
    ("heads", "page_size", "processors", "lengths"),
    [
        (64, 16, PROCESSORS, [1, 64, 65, 0, 200, 130]),  # sequences in two programs
        (128, 32, 2 * PROCESSORS, [300, 7]),
        (20, 8, 4, [900]),  # one in all four
        (40, 128, 3, [0, 0, 9]),  # pages longer than blocks; a program without work
    ],
)
def test_it_equals_its_twin(rng, monkeypatch, heads, page_size, processors, lengths):
    monkeypatch.setattr(hopper_decode, "PROCESSORS", processors)
    monkeypatch.setattr(hopper_decode, "LEAST_ROWS", 0)
    hopper_decode.decode_attention.clear_cache()  # traced with other constants
    width = max(1, -(-max(lengths) // page_size))
    kv, tables = pool_and_tables(rng, lengths, page_size, width, "bfloat16", LATENT + ROPE)
    q_latent = jnp.asarray(rng.standard_normal((len(lengths), heads, LATENT)), jnp.bfloat16)
    q_rope = jnp.asarray(rng.standard_normal((len(lengths), heads, ROPE)), jnp.bfloat16)
    args = jnp.int32(1), tables, jnp.array(lengths)
    want = decode_attention(q_latent, q_rope, no_nan(kv), *args, scale=0.1, kernels=XLA)
    got = decode_attention(q_latent, q_rope, kv, *args, scale=0.1, kernels=KERNEL)
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
        ({"latent": 192}, "kv_lora_rank 192"),
        ({"latent": 1024}, "kv_lora_rank 1024"),
        ({"rope": 32}, "qk_rope_head_dim 32"),
        ({"heads": 16}, "of 16 heads"),
        ({"page_size": 24}, "pages of 24"),
        ({"page_size": 4}, "pages of 4"),
    ):
        assert text in hopper_decode.unsupported(**given | change)


@pytest.mark.parametrize("heads", [128, 64, 20])
def test_it_lowers_for_cuda(heads):
    """DeepSeek-V3's and Kimi-K2's sizes: what interpret mode accepts, Mosaic may refuse."""

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    text = lowered_for_cuda(
        lambda *a: decode_attention(
            *a, scale=0.1, kernels=dataclasses.replace(KERNEL, interpret=False)
        ),
        *(array(64, heads, 512), array(64, heads, 64), array(61, 1000, 16, 576)),
        *(array(dtype="int32"), array(64, 300, dtype="int32"), array(64, dtype="int32")),
    )
    assert "mosaic_gpu" in text
    assert "mla_merge" in text
