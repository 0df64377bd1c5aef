"""Devices into a mesh: the JAX side of `sharding.layout`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.layout import Layout, LayoutError


def make_mesh(layout: Layout, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a layout over the first devices (rank order is the devices' order).

    Raises:
        LayoutError: there are fewer devices than the layout needs.
    """
    devices = jax.devices() if devices is None else devices
    need = layout.num_devices
    if len(devices) < need:
        raise LayoutError(
            f"--tp {need} needs {need} devices, but there are {len(devices)} "
            f"({devices[0].device_kind}); --device cpu emulates any number."
        )
    grid = np.array(devices[:need], dtype=object).reshape(layout.axis_sizes)
    return Mesh(grid, layout.axis_names)


def is_gpu(platform: str) -> bool:
    """Whether devices of this platform are NVIDIA GPUs, which have two names in JAX."""
    return platform in ("cuda", "gpu")


def by_slice(mesh: Mesh, layout: Layout) -> NamedSharding:
    """The sharding of arrays with a leading dp-slice dimension (batches, KV pool, logits)."""
    return NamedSharding(mesh, PartitionSpec(layout.attn_dp))
