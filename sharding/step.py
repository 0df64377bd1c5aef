"""Per-device functions into programs over the mesh: `shard_map`, jit and donation in one place.

Weights travel as a flat list of arrays (merging the module happens while tracing): Flax's own jit
costs tens of milliseconds a call at hundreds of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.checkpoint import parameter_path
from model.config import ModelConfig
from model.transformer import Sizes, Transformer, kv_entry
from sharding.layout import Layout
from sharding.rules import padded_sizes, param_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamInfo:
    """One parameter: where it stands, its padded and real shape, and how it is cut.

    Attributes:
        selected: (axis, entries) for each axis whose padded entries are not the real ones followed
            by zeros, but those named, -1 for zeros (heads that are copied, see `model.heads`).
    """

    path: str
    shape: tuple[int, ...]
    real_shape: tuple[int, ...]
    dtype: jnp.dtype
    spec: PartitionSpec
    selected: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def stacked(self) -> bool:
        return self.path.startswith("segments")


class ModelSpec:
    """The abstract model of a layout: structure and parameter list, no weights.

    Attributes:
        params: in the order of the flat weight lists that `merge` takes.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, layout: Layout) -> None:
        def abstract(sizes: Any) -> tuple[Any, Any]:
            return nnx.split(
                nnx.eval_shape(lambda: Transformer(config, dtype, nnx.Rngs(0), sizes)),
                nnx.Param,
            )

        self.config, self.dtype, self.layout = config, dtype, layout
        sizes = padded_sizes(config, layout)
        self._kv_entry = kv_entry(config, sizes)
        self._graph, state = abstract(sizes)
        real = nnx.to_flat_state(abstract(None)[1])
        flat = nnx.to_flat_state(state)
        self.params = [
            ParamInfo(
                path=parameter_path(path),
                shape=variable.shape,
                real_shape=real_variable.shape,
                dtype=variable.dtype,
                spec=param_spec(variable.get_metadata()["axes"], layout),
                selected=_selected(variable.get_metadata()["axes"], real_variable.shape, sizes),
            )
            for (path, variable), (_, real_variable) in zip(flat, real, strict=True)
        ]
        leaves, self._tree = jax.tree.flatten(state)
        # The flat state and the leaves must be in one order: shapes tell.
        if [leaf.shape for leaf in leaves] != [p.shape for p in self.params]:
            raise AssertionError("flax changed the order of flat states")

    def merge(self, weights: Sequence[jax.Array]) -> Transformer:
        """The module around these arrays (whole or local shards), in the order of `params`."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))

    @property
    def specs(self) -> list[PartitionSpec]:
        return [p.spec for p in self.params]

    def pool_shape(self, num_pages: int, page_size: int) -> tuple[int, ...]:
        """[D, L, N, S, ...]: the KV pools of all slices."""
        slices, layers = self.layout.num_slices, self.config.num_layers
        return (slices, layers, num_pages, page_size, *self._kv_entry[0])

    @property
    def pool_spec(self) -> PartitionSpec:
        """Cut over slices, and inside a slice by KV heads where there are any."""
        return PartitionSpec(
            self.layout.attn_dp, None, None, None, *param_spec(self._kv_entry[1], self.layout)
        )

    def device_bytes(self) -> int:
        """Bytes of weights on each device (shares are equal by padding)."""
        mesh_sizes = dict(zip(self.layout.axis_names, self.layout.axis_sizes, strict=True))
        total = 0
        for p in self.params:
            size = p.dtype.itemsize
            for dim, axes in zip(p.shape, p.spec, strict=True):
                # A PartitionSpec stores a tuple of one axis as the bare name.
                for axis in (axes,) if isinstance(axes, str) else axes or ():
                    dim //= mesh_sizes[axis]
                size *= dim
            total += size
        return total


def _selected(
    axes: Sequence[str | None], real_shape: Sequence[int], sizes: Sizes
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """`ParamInfo.selected` of a parameter with these logical axes."""
    if sizes.slots is None:
        return ()
    entries = {"heads": sizes.slots.query, "kv_heads": sizes.slots.kv}
    return tuple(
        (i, entries[axis])
        for i, axis in enumerate(axes)
        if axis in entries and entries[axis] != tuple(range(real_shape[i]))
    )


def sharded(
    fn: Callable[..., Any],
    mesh: Mesh,
    in_specs: Any,
    out_specs: Any,
    donate: tuple[int, ...] = (),
) -> Any:
    """Jit a per-device function over the mesh; arguments `donate` are updated in place."""
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate)


def abstract_array(
    shape: Sequence[int], dtype: Any, mesh: Mesh, spec: PartitionSpec
) -> jax.ShapeDtypeStruct:
    """A shape with its sharding, to lower a program before its arguments exist."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec))
