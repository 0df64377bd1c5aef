"""Orbax checkpoints of our own parameters, independent of the mesh that wrote or reads them.

A folder holds config.json and the tokenizer's files as always, the parameters without padding
under `weights/`, and their description in `meshserve.json`. Restoring reads each device's shard and
pads it; factors of FP8 blocks are repeated where shards cut the blocks.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from model.checkpoint import CheckpointError, Select, View
from model.config import ModelConfig
from model.quantization import contracted_in_place, contracted_last
from sharding.loading import read_array
from sharding.step import ModelSpec, ParamInfo

DESCRIPTION = "meshserve.json"
WEIGHTS = "weights"
VERSION = 3
CHUNK_BYTES = 32 << 20
"""Arrays are stored in chunks of about this size, so that a shard reads little beside itself."""


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise CheckpointError(
            "Orbax checkpoints need the package orbax-checkpoint: install meshserve[orbax]."
        ) from None
    return ocp


def _key(param: ParamInfo) -> str:
    """The name under which an array is stored."""
    return param.path if param.block is None else f"{param.path}.scale"


class OrbaxFolder:
    """A converted checkpoint; a `WeightSource`."""

    def __init__(self, folder: str | Path, config: ModelConfig, *, keep_fp8: bool) -> None:
        """Read the description.

        Raises:
            CheckpointError: it is broken, of another version, or FP8 and to be dequantised.
        """
        self.folder, self.config = Path(folder).resolve(), config
        path = self.folder / DESCRIPTION
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            version = description["version"]
            self._shapes = {k: tuple(v) for k, v in description["shapes"].items()}
            self.fp8 = {k: tuple(v) for k, v in description["fp8"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path} is not the description of a checkpoint.") from None
        # Earlier versions have parameters in FP8 in another order of dimensions, all else as now.
        if version != VERSION and not (version in (1, 2) and not self.fp8):
            raise CheckpointError(
                f"{path} is of version {version}, this meshserve reads version {VERSION}: convert "
                "the checkpoint again."
            )
        if self.fp8 and not keep_fp8:
            raise CheckpointError(
                f"{folder} holds FP8 weights, which stay FP8: to dequantise them, convert the "
                "original again with --fp8-weights dequantize."
            )

    @staticmethod
    def is_one(folder: str | Path) -> bool:
        """Whether a folder is a converted checkpoint."""
        return (Path(folder) / DESCRIPTION).is_file()

    def load(self, spec: ModelSpec, mesh: Mesh) -> list[jax.Array]:
        """Restore into the shards of this mesh.

        Raises:
            CheckpointError: the files are broken, or do not fit config.json.
        """
        self._check(spec)
        ocp = _orbax()
        # Factors are small, and their blocks may be finer here; copied heads are picked one by one.
        whole = {_key(p) for p in spec.params if p.block is not None or p.selected}
        args = {}
        for p in spec.params:
            if _key(p) in whole:
                args[_key(p)] = ocp.RestoreArgs(restore_type=np.ndarray)
            else:
                args[_key(p)] = ocp.ArrayRestoreArgs(
                    sharding=NamedSharding(mesh, p.spec),
                    global_shape=p.shape,
                    dtype=p.dtype,
                    strict=False,
                )
        try:
            # Orbax reserves for whole arrays: the largest one is what the host must have room for.
            largest = max(math.prod(p.shape) * p.dtype.itemsize for p in spec.params)
            handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 10**9)
            with ocp.Checkpointer(handler) as checkpointer:
                arrays = checkpointer.restore(
                    self.folder / WEIGHTS,
                    args=ocp.args.PyTreeRestore(item=dict.fromkeys(args, 0), restore_args=args),
                )
        except Exception as error:  # Orbax and TensorStore raise what they like
            first = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise CheckpointError(
                f"The weights in {self.folder / WEIGHTS} cannot be read: {first}"
            ) from None
        return [
            self._from_host(p, arrays[_key(p)], mesh) if _key(p) in whole else arrays[_key(p)]
            for p in spec.params
        ]

    def _check(self, spec: ModelSpec) -> None:
        wanted = {_key(p): p for p in spec.params}
        missing = [key for key in wanted if key not in self._shapes]
        wrong = [
            key
            for key, p in wanted.items()
            if key in self._shapes and p.block is None and self._shapes[key] != p.real_shape
        ]
        if missing or wrong:
            raise CheckpointError(
                f"The Orbax checkpoint in {self.folder} does not fit config.json: "
                f"{len(missing)} arrays are missing, {len(wrong)} of a wrong shape, first "
                f"{(missing + wrong)[0]}."
            )
        if spec.not_kept:
            raise CheckpointError(
                f"This layout cuts the FP8 blocks of {spec.not_kept[0]} to pieces, so it would "
                "have to be dequantised, which an Orbax checkpoint cannot: take the original."
            )

    def _from_host(self, param: ParamInfo, array: np.ndarray, mesh: Mesh) -> jax.Array:
        """A whole array, its factors repeated for this layout's blocks, its heads selected."""
        if param.block is not None:
            lead = len(param.shape) - len(param.block)
            for axis, coarse in enumerate(contracted_last(self.fp8[param.path], param.contracted)):
                fine = param.block[axis]
                if coarse != fine:
                    array = np.repeat(array, coarse // fine, axis=lead + axis)
        view: View = array[tuple(slice(0, n) for n in param.real_shape)]
        for axis, entries in param.selected:
            view = Select(view, axis, entries)
        return read_array(view, param.shape, param.dtype, NamedSharding(mesh, param.spec))


def save(
    source: str | Path, folder: str | Path, spec: ModelSpec, weights: Sequence[jax.Array]
) -> None:
    """Write weights that were loaded on one device, and copy the small files beside them.

    Args:
        source: the folder that has config.json and the tokenizer's files.
        folder: to be made; must not exist.

    Raises:
        CheckpointError: the folder exists, or Orbax is missing.
    """
    folder = Path(folder).resolve()
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: name a folder that does not.")
    ocp = _orbax()
    folder.mkdir(parents=True)
    arrays = {_key(p): w for p, w in zip(spec.params, weights, strict=True)}
    # Weights hardly compress, and reading is what a checkpoint is for.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(
            folder / WEIGHTS,
            args=ocp.args.PyTreeSave(
                arrays,
                save_args={k: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for k in arrays},
            ),
        )
    for file in sorted(Path(source).iterdir()):
        small = file.suffix in (".json", ".jinja", ".model", ".txt", ".md")
        if file.is_file() and small and not file.name.endswith(".safetensors.index.json"):
            shutil.copy(file, folder / file.name)
    description = {
        "version": VERSION,
        "shapes": {k: list(a.shape) for k, a in arrays.items()},
        "fp8": {
            p.path: contracted_in_place(p.block, p.contracted)
            for p in spec.params
            if p.block is not None
        },
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
