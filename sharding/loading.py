"""Weights onto the mesh: from a checkpoint straight into each device's shard, or drawn at random.

A stacked parameter is filled layer by layer into a donated buffer, so the host never holds more
than the local shard of one layer (small stacks are read at once).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.checkpoint import Index, Select, Stack, View, parameter_views, read_padded
from model.layers import INIT_STD
from sharding.step import ModelSpec, ParamInfo

WHOLE_STACK_BYTES = 4 << 20
"""Stacks up to this size are read in one piece: fewer, larger transfers."""


def load_weights(
    spec: ModelSpec, mesh: Mesh, tensor: Callable[[str], np.ndarray]
) -> list[jax.Array]:
    """Read a checkpoint into the mesh.

    Args:
        tensor: array of a checkpoint tensor's name, in the checkpoint's layout (memory-mapped).

    Returns:
        One array per entry of `spec.params`, in their dtype and sharding.
    """
    views = parameter_views(spec.config, tensor)
    return [_load_param(p, [_select(p, v) for v in views[p.path]], mesh) for p in spec.params]


def _select(param: ParamInfo, view: View) -> View:
    """The view (of one layer) with copied and padded heads in place."""
    for axis, entries in param.selected:
        view = Select(view, axis - param.stacked, entries)
    return view


def _load_param(param: ParamInfo, views: Sequence[View], mesh: Mesh) -> jax.Array:
    if not param.stacked:
        return _read(views[0], param.shape, param.dtype, NamedSharding(mesh, param.spec))
    if np.prod(param.shape) * param.dtype.itemsize <= WHOLE_STACK_BYTES:
        view = Stack(views, axis=0)
        return _read(view, param.shape, param.dtype, NamedSharding(mesh, param.spec))
    layer_sharding = NamedSharding(mesh, PartitionSpec(*param.spec[1:]))
    return _fill_stack(
        param,
        mesh,
        lambda layer: _read(views[layer], param.shape[1:], param.dtype, layer_sharding),
    )


def _read(
    view: View, shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding
) -> jax.Array:
    """An array whose shards are read one by one; replicas share one read."""
    pieces: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def piece(index: Index) -> np.ndarray:
        key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if key not in pieces:
            pieces[key] = np.ascontiguousarray(read_padded(view, index, shape), dtype=dtype)
        return pieces[key]

    return jax.make_array_from_callback(shape, sharding, piece)


def _fill_stack(param: ParamInfo, mesh: Mesh, layer_array: Callable[[int], jax.Array]) -> jax.Array:
    """A zero stack on the mesh, each layer written in place."""
    sharding = NamedSharding(mesh, param.spec)
    stack = jax.jit(lambda: jnp.zeros(param.shape, param.dtype), out_shardings=sharding)()
    for layer in range(param.shape[0]):
        stack = _set_layer(stack, layer, layer_array(layer))
        # One layer in flight: the host's copy is freed before the next is read.
        stack.block_until_ready()
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: int, value: jax.Array) -> jax.Array:
    return stack.at[layer].set(value)


def draw_weights(spec: ModelSpec, mesh: Mesh, seed: int) -> list[jax.Array]:
    """Random weights of the right shapes (`--load-format dummy`).

    Matrices are N(0, 0.02) and norms 1, so that routers spread tokens evenly over experts (as a
    trained model does; a constant would send all tokens to the same few). The values do not depend
    on the mesh; padding is zero, as in a loaded checkpoint.
    """
    key = jax.random.key(seed)
    return [_draw_param(p, mesh, jax.random.fold_in(key, i)) for i, p in enumerate(spec.params)]


def _draw_param(param: ParamInfo, mesh: Mesh, key: jax.Array) -> jax.Array:
    lead = 1 if param.stacked else 0
    shape, real = param.shape[lead:], param.real_shape[lead:]
    sharding = NamedSharding(mesh, PartitionSpec(*param.spec[lead:]))
    constant = 1.0 if param.path.endswith("norm") else 0.0 if len(real) == 1 else None

    @functools.partial(jax.jit, out_shardings=sharding)
    def draw(key: jax.Array) -> jax.Array:
        if constant is not None:
            return jnp.full(shape, constant, param.dtype)
        values = INIT_STD * jax.random.normal(key, real, param.dtype)
        for axis, entries in param.selected:
            outside = values.shape[axis - lead]  # -1 would count from the end
            index = jnp.array([outside if entry < 0 else entry for entry in entries])
            values = jnp.take(values, index, axis - lead, mode="fill", fill_value=0)
        return jnp.pad(values, [(0, n - m) for n, m in zip(shape, values.shape, strict=True)])

    if not param.stacked:
        return draw(key)
    return _fill_stack(param, mesh, lambda layer: draw(jax.random.fold_in(key, layer)))
