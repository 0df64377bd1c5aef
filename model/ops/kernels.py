"""Which implementation each operation has in a program: the XLA definition or a kernel.

A `Kernels` is part of a program, chosen once before anything is compiled; nothing falls back at run
time. Every kernel's `unsupported` says, in a sentence, why it cannot take a model's sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams as InterpretGPUParams
except ImportError:  # jax 0.10 has it, but does not export it
    from jax._src.pallas.mosaic_gpu.interpret.params import (
        InterpretGPUParams as InterpretGPUParams,
    )

Implementation = Literal["xla", "pallas"]
HopperImplementation = Implementation | Literal["hopper"]
"""Of operations that have other kernels for GPUs of compute capability 9.0."""

PrefixesFound = Literal["none", "some", "perhaps"]
"""Which steps a program is for: no chunk begins behind cached tokens; at least one is expected to,
though it need not; nothing is known."""

MIN_BLOCK = 16
"""Triton multiplies no smaller matrices."""
HOPPER = "9.0"
"""The compute capability, and the only one, that has `wgmma` and its registers."""
PROCESSORS = 132
"""Of an H100 SXM or H200. Where there are fewer, or something else runs on some, programs wait for
others to end: decode attention of many heads and products in FP8, whose programs are equally long,
take twice the time then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The implementation of every operation that has more than one.

    Attributes:
        decode_attention, extend_attention: of MLA; GQA has the XLA definition only. "hopper" are
            kernels for GPUs of compute capability 9.0 alone.
        mla_inputs: norm, rotation and cache write between MLA's projections and its attention.
        grouped_mlp: of the routed experts; "hopper" has kernels of its own for many rows, for dense
            MLPs of many rows, and for experts in FP8; for the rest it is "pallas".
        routing: choosing and weighing experts.
        norm: RMSNorm by stacked weights.
        dense: products of a few rows with a layer of stacked weights; "hopper" has a kernel of its
            own for those in FP8 whose contracted numbers lie side by side, for the rest it is
            "pallas".
        unroll: how many layers of a segment become straight code in a decode program; the whole
            segment if that is not more. More takes longer to compile and copies fewer weights.
        prefixes: what is known of prompt chunks that begin behind cached tokens; extend attention
            of MLA in Pallas has fewer kernels the more is known.
        interpret: run kernels as ordinary JAX operations (tests on CPU).
    """

    decode_attention: HopperImplementation = "xla"
    extend_attention: HopperImplementation = "xla"
    mla_inputs: Implementation = "xla"
    grouped_mlp: HopperImplementation = "xla"
    routing: Implementation = "xla"
    norm: Implementation = "xla"
    dense: HopperImplementation = "xla"
    unroll: int = 1
    prefixes: PrefixesFound = "perhaps"
    interpret: bool = False


XLA = Kernels()
"""The definitions alone: what runs on CPU, and what kernels are compared with."""


def lowered_once(*static: str) -> Callable[[Callable[..., Any]], Any]:
    """A function around kernels that a program lowers once, however often it calls it.

    Lowering a kernel holds the interpreter's lock and is a good part of a first start; XLA inlines
    the calls. A module's constants are read when sizes are met for the first time.

    Args: static: names of arguments that are no arrays.
    """
    return functools.partial(jax.jit, static_argnames=static)


def load_as(ref: Any, layout: mosaic_gpu.Layout, *, optimized: bool = True) -> jax.Array:
    """All of a reference in a kernel of Mosaic GPU, laid out over threads as told.

    Args: optimized: refuse a way that is not fast.
    """
    index = [()] if jax.__version_info__ < (0, 11) else []  # which newer versions refuse
    return mosaic_gpu.load(ref, *index, layout=layout, optimized=optimized)


def covering_block(count: int, most: int) -> int:
    """The smallest power of two, from MIN_BLOCK on, that covers `count`, but at most `most`."""
    return min(most, max(MIN_BLOCK, 1 << (count - 1).bit_length()))


def largest_block(size: int, most: int) -> int:
    """The largest power of two, up to `most`, that divides `size`."""
    block = 1
    while block < most and size % (2 * block) == 0:
        block *= 2
    return block


def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Every program of a kernel sees all of an array of this shape."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def is_power_of_two(size: int) -> bool:
    return size > 0 and size & (size - 1) == 0
