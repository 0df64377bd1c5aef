"""A few rows by FP8 weights on Hopper: the kernel against its XLA twin, interpreted; and lowered.

What the kernel did not write, in memory of either kind, is NaN.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from model.ops import hopper_products
from model.ops.dense import StackedWeight, hopper_fp8, matmul, matmul_parts, pallas
from model.ops.dense.hopper_fp8 import MAX_PARTS, Shares
from model.ops.kernels import XLA
from tests.fp8 import abstract_fp8, quantised
from tests.harness import HOPPER, lowered_for_cuda, needs_interpreter

CASES = {
    "few programs a tile": (5, (512,), (2, 256), (128, 1, 128)),
    "two contracted dimensions, blocks of rows": (130, (2, 128), (384,), (1, 128, 128)),
    "blocks of half a tile": (16, (384,), (2, 192), (128, 1, 64)),
    "many programs a tile, larger blocks": (40, (1024,), (128,), (256, 128)),
    "programs without work": (17, (128,), (128,), (128, 128)),
}


@pytest.fixture
def few_processors(monkeypatch):
    hopper_fp8.matmul_parts.clear_cache()  # traced with another number
    monkeypatch.setattr(hopper_products, "PROCESSORS", 3)


def product(stack, num_in, kernels):
    """All parts of rows times the stack's second layer."""

    def run(x):
        (parts,) = matmul_parts(
            x, [StackedWeight(stack=stack, layer=jnp.int32(1))], num_in, kernels
        )
        return parts

    return jax.jit(run)


@needs_interpreter
@pytest.mark.parametrize("case", CASES)
def test_it_equals_its_twin_and_rows_do_not_see_each_other(rng, few_processors, case):
    rows, inside, outside, block = CASES[case]
    sides = len(inside), len(outside)
    stack = quantised(rng, (3, *inside, *outside), block, sides, "bfloat16")
    assert hopper_fp8.unsupported(stack, sides[0]) is None
    x = jnp.asarray(rng.standard_normal((rows, *inside)), jnp.bfloat16)
    run = product(stack, sides[0], HOPPER)
    got, want = run(x), product(stack, sides[0], XLA)(x)[0]
    assert got.dtype == (x.dtype if len(got) == 1 else jnp.float32)
    total, want = (np.asarray(a.astype(jnp.float32)) for a in (got.sum(axis=0), want))
    # The twin multiplies weights that were rounded to bfloat16.
    assert np.linalg.norm(total - want) <= 0.005 * np.linalg.norm(want)
    np.testing.assert_array_equal(run(x.at[1:].set(7))[:, 0], got[:, 0])


@needs_interpreter
def test_equal_rows_give_equal_bits_wherever_they_stand(rng, few_processors):
    """Blocks of rows are cut alike, as --enable-deterministic-inference needs it."""
    stack = quantised(rng, (2, 1024, 512), (128, 128), (1, 1), "bfloat16")
    x = jnp.asarray(rng.standard_normal((128, 1024)), jnp.bfloat16)
    parts = product(stack, 1, HOPPER)(jnp.concatenate([x, x]))
    np.testing.assert_array_equal(parts[:, :128], parts[:, 128:])


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="jax 0.11 takes a wait for reads for none"
)
def test_warpgroups_and_copies_do_not_race(rng, monkeypatch, few_processors):
    """The ring goes round, programs store several parts; the detector would see a lost wait."""
    detecting = functools.partial(mosaic_gpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(hopper_products, "InterpretGPUParams", detecting)
    stack = quantised(rng, (2, 2176, 512), (128, 128), (1, 1), "bfloat16")
    x = jnp.ones((20, 2176), jnp.bfloat16)
    jax.block_until_ready(product(stack, 1, HOPPER)(x))
    hopper_fp8.matmul_parts.clear_cache()
    wait = mosaic_gpu.wait_smem_to_gmem
    monkeypatch.setattr(
        mosaic_gpu,
        "wait_smem_to_gmem",
        lambda n, wait_read_only=False: None if wait_read_only else wait(n),
    )
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(product(stack, 1, HOPPER)(x))


@pytest.mark.parametrize("steps", [1, 12, 56, 144])
@pytest.mark.parametrize("tiles", [1, 12, 131, 288])
def test_programs_share_all_steps_evenly(tiles, steps):
    """Each step once, a tile's parts from first to last, at most so many."""
    shares = Shares.of(tiles, steps)
    programs = hopper_products.PROCESSORS
    done = np.arange(tiles * steps) // shares.share
    assert done.max() < programs
    assert shares.share == max(-(-tiles * steps // programs), -(-steps // (MAX_PARTS - 1)))
    each = done.reshape(tiles, steps)
    assert shares.parts == 1 + (each[:, -1] - each[:, 0]).max() <= MAX_PARTS


@pytest.mark.parametrize("program", [0, 1, 2])
def test_a_program_takes_its_tiles_in_turn(few_processors, program):
    shares, seen = Shares.of(4, 5), []
    assert shares.share == 7
    with jax.disable_jit():
        shares.each(
            jnp.int32(program), 2, lambda *of: seen.append([int(n) for n in jax.tree.leaves(of)])
        )
    want = [
        [[0, 0, 0, 0, 5], [0, 1, 5, 0, 5], [1, 0, 10, 0, 2], [1, 1, 12, 0, 2]],
        [[1, 0, 0, 2, 5], [1, 1, 3, 2, 5], [2, 0, 6, 0, 4], [2, 1, 10, 0, 4]],
        [[2, 0, 0, 4, 5], [2, 1, 1, 4, 5], [3, 0, 2, 0, 5], [3, 1, 7, 0, 5]],
    ]  # tile, block of rows, number of the first step, from which to which
    assert seen == want[program]


def test_only_weights_that_it_takes_go_to_it(monkeypatch):
    """The others share the kernel for all GPUs; results are in the weights' order."""
    taken = []

    def fake(name, x, stacks, *args, **kwargs):
        taken.append(name)
        many = stacks if isinstance(stacks, list) else [stacks]
        results = [jnp.zeros((1, len(x), *stack.shape[2:])) for stack in many]
        return results if isinstance(stacks, list) else results[0]

    for module in (hopper_fp8, pallas):
        monkeypatch.setattr(module, "matmul_parts", functools.partial(fake, module))
    stacks = (
        jnp.zeros((2, 256, 48), jnp.bfloat16),
        abstract_fp8((2, 256, 2, 128), (128, 1, 128), (1, 2)),
        abstract_fp8((2, 256, 96), (128, 96)),
    )
    weights = [StackedWeight(stack=stack, layer=jnp.int32(0)) for stack in stacks]
    x = jnp.zeros((4, 256), jnp.bfloat16)
    for kernels, modules in (
        (HOPPER, {hopper_fp8, pallas}),
        (replace(HOPPER, dense="pallas"), {pallas}),
    ):
        taken.clear()
        results = matmul_parts(x, weights, 1, kernels)
        assert [a.shape[2:] for a in results] == [stack.shape[2:] for stack in stacks]
        assert set(taken) == modules
        assert len(taken) == len(modules)
    taken.clear()
    matmul_parts(x, weights[1:2], 1, HOPPER)
    assert taken == [hopper_fp8]


def test_what_it_cannot_take_is_said():
    assert hopper_products.unsupported("9.0", "bfloat16") is None
    assert "capability 8.9" in hopper_products.unsupported("8.9", "bfloat16")
    assert "float32" in hopper_products.unsupported("9.0", "float32")
    whole = abstract_fp8((3, 512, 2, 256), (128, 1, 128), (1, 2))
    assert hopper_fp8.unsupported(whole, 1) is None
    assert "not FP8" in hopper_fp8.unsupported(jnp.zeros((3, 512, 256)), 1)
    assert "side by side" in hopper_fp8.unsupported(abstract_fp8((3, 512, 256), (128, 128)), 1)
    for shape, block, contracted in (
        ((3, 512, 256), (64, 128), (1, 1)),  # of contracted numbers
        ((3, 512, 256), (128, 32), (1, 1)),  # of columns
        ((3, 512, 192), (128, 64), (1, 1)),  # the matrix has one and a half tiles
        ((3, 320, 256), (128, 128), (1, 1)),  # a partial block
        ((3, 2, 192, 256), (1, 128, 128), (2, 1)),
        ((3, 256, 2, 192), (128, 1, 128), (1, 2)),
        ((3, 256, 2, 128), (128, 2, 128), (1, 2)),
    ):
        reason = hopper_fp8.unsupported(abstract_fp8(shape, block, contracted), contracted[0])
        assert "multiples of 64 and 128" in reason


@pytest.mark.parametrize("rows", [1, 64, 500])
@pytest.mark.parametrize(
    ("inside", "outside", "block"),
    [
        ((1536,), (128, 192), (128, 1, 64)),
        ((128, 128), (7168,), (1, 128, 128)),
        ((7168,), (2, 18432), (128, 1, 128)),
    ],
)
def test_it_lowers_for_cuda(rows, inside, outside, block):
    """DeepSeek-V3's sizes: what interpret mode accepts, Mosaic may refuse."""
    sides = len(inside), len(outside)
    text = lowered_for_cuda(
        lambda x, stack, layer: matmul(
            x, StackedWeight(stack=stack, layer=layer), sides[0], replace(HOPPER, interpret=False)
        ),
        jax.ShapeDtypeStruct((rows, *inside), jnp.bfloat16),
        abstract_fp8((58, *inside, *outside), block, sides),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    assert "mosaic_gpu" in text
