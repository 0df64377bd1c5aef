"""Weights onto the mesh: from a checkpoint straight into each device's shard, or drawn at random.

A stacked parameter is filled layer by layer and shard by shard into donated buffers, so the host
never holds more than one device's shard of one layer's parameter (small stacks are read at once).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from model.checkpoint import (
    ContractedLast,
    Index,
    Select,
    Stack,
    View,
    parameter_views,
    read_padded,
)
from model.formats.fp8 import BlockFactors, Fp8Checkpoint
from model.layers import INIT_STD
from model.quantization import AS_THEY_ARE, FP8
from sharding.step import ModelSpec, ParamInfo

WHOLE_STACK_BYTES = 16 << 20
"""Stacks whose shards have up to this size are read in one piece a shard: filling layer by layer
takes a program for every device."""


def load_weights(
    spec: ModelSpec,
    mesh: Mesh,
    tensor: Callable[[str], np.ndarray],
    fp8: Fp8Checkpoint | None = None,
) -> list[jax.Array]:
    """Read a checkpoint into the mesh.

    Args:
        tensor: array of a checkpoint tensor's name, in the checkpoint's layout (memory-mapped).
        fp8: where the values and factors of parameters stand that stay in FP8.

    Returns:
        One array per entry of `spec.params`, in their dtype and sharding.
    """
    views = parameter_views(spec.config, tensor)
    stored = parameter_views(spec.config, fp8.stored) if fp8 else {}
    scales = parameter_views(spec.config, fp8.scales) if fp8 else {}
    weights = []
    for p in spec.params:
        source = scales if p.block is not None else stored if p.dtype == FP8 else views
        chosen: Sequence[View] = source[p.path]
        if p.contracted != AS_THEY_ARE:
            chosen = [ContractedLast(v, p.contracted) for v in chosen]
        if p.block is not None:
            chosen = [BlockFactors(v, p.block) for v in chosen]
        weights.append(_load_param(p, [selected(p, v) for v in chosen], mesh))
    return weights


def selected(param: ParamInfo, view: View) -> View:
    """The view (of one layer) with copied and padded heads in place."""
    for axis, entries in param.selected:
        view = Select(view, axis - param.stacked, entries)
    return view


def _load_param(param: ParamInfo, views: Sequence[View], mesh: Mesh) -> jax.Array:
    sharding = NamedSharding(mesh, param.spec)
    if not param.stacked:
        return read_array(views[0], param.shape, param.dtype, sharding)
    shard_bytes = math.prod(sharding.shard_shape(param.shape)) * param.dtype.itemsize
    if shard_bytes <= WHOLE_STACK_BYTES or len(views) == 1:
        return read_array(Stack(views, axis=0), param.shape, param.dtype, sharding)
    stack = _zeros(param, sharding)
    buffers = {shard.device: shard.data for shard in stack.addressable_shards}
    shards = _shards(sharding, param.shape)
    del stack
    # One piece in flight, of one layer and shard, is all that the host holds beside the result.
    piece = _aligned(sharding.shard_shape(param.shape)[1:], param.dtype)
    for layer, view in enumerate(views):
        for index, devices in shards:
            read_padded(view, index[1:], param.shape[1:], param.dtype, piece)
            for device in devices:
                value = jax.device_put(piece, device)
                buffers[device] = _set_layer(buffers[device], layer, value)
                buffers[device].block_until_ready()  # `piece` may be written again
    return jax.make_array_from_single_device_arrays(param.shape, sharding, list(buffers.values()))


def _aligned(shape: Sequence[int], dtype: jnp.dtype) -> np.ndarray:
    """An array on a 64-byte border: XLA uses such memory on CPU without copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _shards(
    sharding: NamedSharding, shape: tuple[int, ...]
) -> list[tuple[Index, list[jax.Device]]]:
    """The different slices of an array on this host's devices, each with those that hold it."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        holders.setdefault(key, []).append(device)
    return [(tuple(slice(*b) for b in key), devices) for key, devices in holders.items()]


def read_array(
    view: View, shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding
) -> jax.Array:
    """An array whose shards are read one by one; replicas share one read."""
    arrays = []
    for index, devices in _shards(sharding, shape):
        piece = read_padded(view, index, shape, dtype)
        arrays += [jax.device_put(piece, device) for device in devices]
        jax.block_until_ready(arrays)  # the host's copy is freed before the next is read
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _zeros(param: ParamInfo, sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(param.shape, param.dtype), out_shardings=sharding)()


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: int, value: jax.Array) -> jax.Array:
    return stack.at[layer].set(value)


def draw_weights(spec: ModelSpec, mesh: Mesh, seed: int) -> list[jax.Array]:
    """Random weights of the right shapes (`--load-format dummy`).

    Matrices are N(0, 0.02) and norms 1, so that routers spread tokens evenly over experts (as a
    trained model does; a constant would send all tokens to the same few). The values do not depend
    on the mesh; padding is zero, as in a loaded checkpoint.
    """
    return [_draw_param(p, mesh, (seed, i)) for i, p in enumerate(spec.params)]


def _draw_param(param: ParamInfo, mesh: Mesh, seeds: tuple[int, ...]) -> jax.Array:
    lead = 1 if param.stacked else 0
    shape, real = param.shape[lead:], param.real_shape[lead:]
    constant = 1.0 if param.path.endswith("norm") else 0.0 if len(real) == 1 else None
    std = INIT_STD
    if param.block is not None:  # of FP8 values that are N(0, 1)
        constant = INIT_STD
    elif param.dtype == FP8:
        std = 1.0

    def draw(words: jax.Array) -> jax.Array:
        if constant is not None:
            return jnp.full(shape, constant, param.dtype)
        values = (std * _normal(words, real)).astype(param.dtype)
        for axis, entries in param.selected:
            outside = values.shape[axis - lead]  # -1 would count from the end
            index = jnp.array([outside if entry < 0 else entry for entry in entries])
            values = jnp.take(values, index, axis - lead, mode="fill", fill_value=0)
        return jnp.pad(values, [(0, n - m) for n, m in zip(shape, values.shape, strict=True)])

    sharding = NamedSharding(mesh, param.spec)
    if not param.stacked:
        return jax.jit(draw, out_shardings=sharding)(np.array(seeds, np.uint32))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def draw_layer(stack: jax.Array, layer: int, words: jax.Array) -> jax.Array:
        return stack.at[layer].set(draw(words))

    stack = _zeros(param, sharding)
    for layer in range(param.shape[0]):
        stack = draw_layer(stack, layer, np.array((*seeds, layer), np.uint32))
    return stack


def _normal(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """f32 N(0, 1): each number a function of `words`, u32 [n], and of its own place.

    XLA makes one pass of it, on each device over its own shard. The generator of jax.random is a
    kernel of its own on GPUs: every device would draw all, with six arrays beside the result.
    """

    def mixed(h: jax.Array) -> jax.Array:  # the finalizer of MurmurHash3
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    h = jnp.uint32(0x9E3779B9)
    for word in words:
        h = mixed(h ^ word) + jnp.uint32(0x9E3779B9)
    h = jnp.broadcast_to(h, shape)
    for axis in range(len(shape)):
        h = mixed(h ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) + jnp.uint32(0x9E3779B9)
    inside = ((h >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1  # (-1, 1)
    return math.sqrt(2) * jax.lax.erf_inv(inside)
