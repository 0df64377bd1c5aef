"""Per-device functions into programs over the mesh: `shard_map`, jit and donation in one place.

Weights travel as a flat list of arrays (merging the module happens while tracing): Flax's own jit
costs tens of milliseconds a call at hundreds of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.checkpoint import parameter_path
from model.config import ModelConfig
from model.quantization import (
    AS_THEY_ARE,
    FP8,
    BlockFP8,
    Contracted,
    contracted_last,
    factors_shape,
)
from model.transformer import Sizes, Transformer, kv_entry
from sharding.layout import Layout
from sharding.rules import padded_sizes, param_spec

MAX_SCALE_SHARE = 0.5
"""A parameter whose block factors would take more than this share of its FP8 values' bytes (its
shards cut the blocks to pieces) is dequantised instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamInfo:
    """One array of the weights: where it stands, its padded and real shape, and how it is cut.

    Attributes:
        block: None, but for the factors of an FP8 parameter (same path): elements of one block
            along each dimension of one layer's parameter.
        contracted: of an FP8 parameter's values and factors, `BlockFP8.contracted`. All else here,
            the spec too, is in their order.
        selected: (axis, entries) for each axis whose padded entries are not the real ones followed
            by zeros, but those named, -1 for zeros (heads that are copied, see `model.heads`).
    """

    path: str
    shape: tuple[int, ...]
    real_shape: tuple[int, ...]
    dtype: jnp.dtype
    spec: PartitionSpec
    block: tuple[int, ...] | None = None
    contracted: Contracted = AS_THEY_ARE
    selected: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def stacked(self) -> bool:
        return self.path.startswith("segments")


class ModelSpec:
    """The abstract model of a layout: structure and parameter list, no weights.

    Attributes:
        params: in the order of the flat weight lists that `merge` takes. An FP8 parameter is two
            of them, its values and its factors.
        recut: FP8 parameters whose shards cut the checkpoint's blocks: their factors are repeated
            for smaller blocks.
        not_kept: parameters that `fp8` named and that are dequantised, as `MAX_SCALE_SHARE` says.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        layout: Layout,
        fp8: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Args: fp8: paths that stay in FP8 with their blocks' sizes (`fp8_parameters`)."""

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
        self.params: list[ParamInfo] = []
        self.recut: list[str] = []
        self.not_kept: list[str] = []
        flat = []
        for (path, variable), (_, real_variable) in zip(
            nnx.to_flat_state(state), real, strict=True
        ):
            metadata = variable.get_metadata()
            info = ParamInfo(
                path=parameter_path(path),
                shape=variable.shape,
                real_shape=real_variable.shape,
                dtype=variable.dtype,
                spec=param_spec(metadata["axes"], layout),
                selected=_selected(metadata["axes"], real_variable.shape, sizes),
            )
            kept = self._in_fp8(info, (fp8 or {}).get(info.path), metadata["contracted"])
            if kept is None:
                self.params.append(info)
            else:
                values, scale = kept
                self.params += kept
                variable = variable.replace(
                    BlockFP8(
                        data=jax.ShapeDtypeStruct(values.shape, FP8),
                        scale=jax.ShapeDtypeStruct(scale.shape, scale.dtype),
                        block=scale.block,
                        dtype=dtype,
                        contracted=scale.contracted,
                    )
                )
            flat.append((path, variable))
        leaves, self._tree = jax.tree.flatten(nnx.from_flat_state(flat))
        # The flat state and the leaves must be in one order: shapes tell.
        if [leaf.shape for leaf in leaves] != [p.shape for p in self.params]:
            raise AssertionError("flax changed the order of flat states")

    def __repr__(self) -> str:
        """All that programs depend on: the engine finds compiled ones by it."""
        return f"ModelSpec({self.config!r}, {self.dtype}, {self.layout!r}, {self.params!r})"

    def _in_fp8(
        self, info: ParamInfo, block: tuple[int, ...] | None, contracted: Contracted
    ) -> tuple[ParamInfo, ParamInfo] | None:
        """The values and factors of a parameter that stays in FP8, None for one that does not.

        Blocks must not cross the border between two shards, so they are made as small as that
        takes, and their factors repeated.
        """
        if block is None:
            return None
        if contracted != AS_THEY_ARE and info.selected:
            raise AssertionError(f"{info.path}: heads are selected in the order of numbers")
        block = contracted_last(block, contracted)
        info = replace(
            info,
            shape=contracted_last(info.shape, contracted),
            real_shape=contracted_last(info.real_shape, contracted),
            dtype=FP8,
            spec=PartitionSpec(*contracted_last(info.spec, contracted)),
            contracted=contracted,
        )
        lead = len(info.shape) - len(block)
        parts = [_num_parts(axes, self.layout) for axes in info.spec]
        fitting = tuple(
            math.gcd(size, n // p) if p > 1 else size
            for size, n, p in zip(block, info.shape[lead:], parts[lead:], strict=True)
        )
        shape = factors_shape(info.shape, fitting)
        if math.prod(shape) * 4 > MAX_SCALE_SHARE * math.prod(info.shape):
            self.not_kept.append(info.path)
            return None
        if fitting != block:
            self.recut.append(info.path)
        factors = replace(
            info,
            shape=shape,
            real_shape=factors_shape(info.real_shape, fitting),
            dtype=jnp.dtype(jnp.float32),
            block=fitting,
        )
        return info, factors

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
    def fp8_weights(self) -> dict[str, BlockFP8]:
        """The parameters that stay in FP8, as a device has them, without numbers."""

        def local(info: ParamInfo) -> Any:
            return jax.ShapeDtypeStruct(
                _local_shape(info.shape, info.spec, self.layout), info.dtype
            )

        factors = {p.path: p for p in self.params if p.block is not None}
        return {
            p.path: BlockFP8(
                data=local(p),
                scale=local(factors[p.path]),
                block=factors[p.path].block,
                dtype=self.dtype,
                contracted=p.contracted,
            )
            for p in self.params
            if p.dtype == FP8
        }

    @property
    def pool_spec(self) -> PartitionSpec:
        """Cut over slices, and inside a slice by KV heads where there are any."""
        return PartitionSpec(
            self.layout.attn_dp, None, None, None, *param_spec(self._kv_entry[1], self.layout)
        )

    def device_bytes(self) -> int:
        """Bytes of weights on each device (shares are equal by padding)."""
        return sum(_share(p.shape, p.spec, self.layout) * p.dtype.itemsize for p in self.params)

    def page_bytes(self, page_size: int, kv_dtype: jnp.dtype) -> int:
        """Bytes of one page of the KV pool, all layers, on each device of its slice."""
        return page_bytes(self.config, self.layout, page_size, kv_dtype)


def page_bytes(config: ModelConfig, layout: Layout, page_size: int, kv_dtype: jnp.dtype) -> int:
    """Bytes of one page of a layout's KV pool, all layers, on each device of its slice."""
    shape, axes = kv_entry(config, padded_sizes(config, layout))
    numbers = config.num_layers * page_size * _share(shape, param_spec(axes, layout), layout)
    return numbers * jnp.dtype(kv_dtype).itemsize


def _share(shape: Sequence[int], spec: Sequence[Any], layout: Layout) -> int:
    """Numbers of an array that each device holds."""
    return math.prod(_local_shape(shape, spec, layout))


def _local_shape(shape: Sequence[int], spec: Sequence[Any], layout: Layout) -> tuple[int, ...]:
    return tuple(dim // _num_parts(axes, layout) for dim, axes in zip(shape, spec, strict=True))


def _num_parts(axes: str | tuple[str, ...] | None, layout: Layout) -> int:
    """Into how many parts a dimension with this entry of a PartitionSpec is cut."""
    # A PartitionSpec stores a tuple of one axis as the bare name.
    return layout.size((axes,) if isinstance(axes, str) else axes or ())


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
