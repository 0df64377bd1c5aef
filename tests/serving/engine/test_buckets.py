"""Program sizes: which exist, which a plan takes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from serving.config import ConfigError, ServerConfig
from serving.engine.buckets import Shape, make_buckets
from serving.engine.programs import in_blocks
from serving.request import SamplingParams
from serving.scheduler.plan import DecodeRow, PrefillChunk, SlicePlan, StepPlan

SAMPLING = SamplingParams(max_tokens=1)


def plan(*slices, start=0):
    """Each slice: (decode rows, chunk sizes)."""

    def row(i):
        return DecodeRow(rid=f"d{i}", slot=i, position=3, pages=(1,), sampling=SAMPLING)

    def chunk(i, n):
        return PrefillChunk(
            rid=f"c{i}",
            slot=i,
            tokens=(5,) * n,
            start=start,
            pages=(1,),
            samples=True,
            sampling=SAMPLING,
        )

    return StepPlan(
        slices=tuple(
            SlicePlan(
                decode=tuple(row(i) for i in range(decode)),
                prefill=tuple(chunk(i, n) for i, n in enumerate(chunks)),
            )
            for decode, chunks in slices
        )
    )


def buckets(num_slices=2, max_context=4096, **flags):
    return make_buckets(
        ServerConfig(**flags), platform="cpu", num_slices=num_slices, max_context=max_context
    )


def test_a_step_runs_at_the_fullest_slices_size():
    b = buckets(decode_buckets=(1, 4, 16), extend_buckets=(64, 256))
    assert b.shape_for(plan((1, []), (0, []))) == Shape(decode_rows=1)
    assert b.shape_for(plan((2, []), (5, []))) == Shape(decode_rows=16)
    assert b.shape_for(plan((2, []), (0, [10]))).prefill_rows == 64
    assert b.shape_for(plan((2, [60, 5]), (0, [10]))).prefill_rows == 256
    # Extend programs have room for every running request.
    assert b.shape_for(plan((0, []), (0, [10]))).decode_rows == 16


def test_few_decode_rows_beside_prefill_do_not_pay_for_a_full_set():
    b = buckets(decode_buckets=(1, 8, 32, 64), extend_buckets=(64, 256))
    assert b.beside_prefill == (32, 64)
    for rows, beside in ((0, 32), (32, 32), (33, 64)):
        shape = b.shape_for(plan((rows, [10]), (0, [])))
        assert (shape.decode_rows, shape.prefill_rows) == (beside, 64)
        assert shape in b.shapes()
    assert b.shapes()[0] == Shape(decode_rows=64, prefill_rows=256, chunks=b.prefill_chunks)
    assert len({str(shape) for shape in b.shapes()}) == len(b.shapes())


def test_large_steps_with_nothing_cached_have_programs_of_their_own():
    config = ServerConfig(decode_buckets=(16,), extend_buckets=(64, 4096))
    b = make_buckets(config, platform="cuda", num_slices=1, max_context=4096, fresh=True)
    assert b.shape_for(plan((0, [10]))).prefixes == "perhaps"  # a small program takes both
    assert b.shape_for(plan((0, [100]), (0, [100]), start=16)).prefixes == "some"
    shape = b.shape_for(plan((0, [100]), (0, [100])))
    assert (shape.prefixes, shape.prefill_rows) == ("none", 4096)
    assert shape in b.shapes()
    assert [s.prefixes for s in b.shapes()] == ["some", "none", "perhaps", "perhaps"]
    assert len({str(shape) for shape in b.shapes()}) == len(b.shapes())


def test_extend_programs_take_equally_many_chunks():
    """So they sample equally many rows, and share their sampling programs."""
    b = buckets(decode_buckets=(8,), extend_buckets=(64, 256))
    assert b.prefill_chunks == 16
    assert b.shape_for(plan((0, [1] * 16))).prefill_rows == 64
    assert b.shape_for(plan((0, [5] * 16))).prefill_rows == 256
    with pytest.raises(ValueError, match="17 prompt tokens in 17 chunks"):
        b.shape_for(plan((0, [1] * 17)))
    assert b.sampled_rows == [24, 8]


def test_deterministic_inference_has_one_program_of_each_kind():
    b = buckets(enable_deterministic_inference=True)
    assert [(s.decode_rows, s.prefill_rows) for s in b.shapes()] == [(0, 512), (32, 0)]
    assert b.shape_for(plan((1, []), (0, []))) == b.shapes()[1]
    assert b.shape_for(plan((0, [1]), (0, []))) == b.shapes()[0]
    with pytest.raises(ValueError, match="either decode or prefill"):
        b.shape_for(plan((1, []), (0, [1])))
    flags = {"decode_buckets": (2, 4), "extend_buckets": (16, 48)}
    b = buckets(enable_deterministic_inference=True, **flags)
    assert (b.decode, b.extend) == ((4,), (48,))


def test_a_plan_beyond_every_program_is_an_error():
    b = buckets(decode_buckets=(4,), extend_buckets=(64,))
    with pytest.raises(ValueError, match="5 decode rows"):
        b.shape_for(plan((5, [])))
    with pytest.raises(ValueError, match="65 prompt tokens"):
        b.shape_for(plan((0, [65])))
    with pytest.raises(ValueError, match="beside 5 decode rows"):
        b.shape_for(plan((5, [1])))


def test_every_plan_the_limits_allow_has_a_compiled_shape():
    b = buckets()
    shapes = set(b.shapes())
    for decode in (0, 1, 2, 8, 9, 32):
        for chunks in ([], [1], [64], [65], [512], [16] * 32):
            if decode or chunks:
                assert b.shape_for(plan((decode, chunks))) in shapes


def test_limits_for_all_slices_are_shared_out():
    b = buckets(num_slices=4, max_running_requests=40, chunked_prefill_size=400)
    assert b.decode == (1, 8, 10)
    assert b.extend == (64, 100)
    with pytest.raises(ConfigError, match="--max-running-requests 3"):
        buckets(num_slices=4, max_running_requests=3)


def test_short_contexts_need_no_large_extend_programs():
    assert buckets(max_context=64).extend == (64,)
    assert buckets(max_context=128).extend == (64, 512)


@pytest.mark.parametrize("total", [1, 4, 5, 8, 11])
def test_rows_in_blocks_equal_rows_at_once(total):
    rows = {"a": jnp.arange(total * 3.0).reshape(total, 3), "b": jnp.arange(total)}
    sizes = []

    def fn(part):
        sizes.append(len(part["b"]))
        return part["a"].sum(axis=1) + part["b"], part["b"] * 2

    got, want = in_blocks(fn, rows, 4), fn(rows)
    assert max(sizes[:-1]) <= max(4, total % 4)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
