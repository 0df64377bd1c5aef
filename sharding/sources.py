"""Where weights come from: the files of a model path, or random numbers, behind one small seam.

A source knows the model's configuration before anything is loaded, says which parameters stay in
FP8, and fills the mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import jax
from jax.sharding import Mesh

from model.checkpoint import CheckpointError, SafetensorsFolder, check_shapes
from model.config import ModelConfig
from model.formats import Checkpoint
from model.formats.fp8 import Fp8Checkpoint, fp8_parameters, is_quantized_by_habit
from model.formats.gguf_file import GGUFFile, is_gguf
from sharding.loading import draw_weights, load_weights
from sharding.orbax_folder import OrbaxFolder
from sharding.step import ModelSpec


class WeightSource(Protocol):
    """One model's weights, not loaded yet.

    Attributes:
        config: of the model.
        fp8: parameters that stay in FP8, each with its blocks' sizes.
    """

    config: ModelConfig
    fp8: Mapping[str, tuple[int, ...]]

    def load(self, spec: ModelSpec, mesh: Mesh) -> list[jax.Array]:
        """The arrays of `spec.params`."""


class FileSource:
    """Safetensors or GGUF, quantised in FP8 blocks or not."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, *, keep_fp8: bool) -> None:
        """Check that names and shapes are the model's.

        Raises:
            CheckpointError: they are not.
        """
        self.config, self.fp8 = config, {}
        if config.fp8_block is not None:
            checkpoint = Fp8Checkpoint(checkpoint, config.fp8_block)
        check_shapes(checkpoint.shapes, config)
        if keep_fp8 and isinstance(checkpoint, Fp8Checkpoint):
            self.fp8 = fp8_parameters(config, checkpoint.is_quantized)
        self.checkpoint = checkpoint

    def load(self, spec: ModelSpec, mesh: Mesh) -> list[jax.Array]:
        fp8 = self.checkpoint if isinstance(self.checkpoint, Fp8Checkpoint) else None
        return load_weights(spec, mesh, self.checkpoint.tensor, fp8)


class DummySource:
    """Random weights of the right shapes."""

    def __init__(self, config: ModelConfig, seed: int, *, keep_fp8: bool) -> None:
        self.config, self._seed = config, seed
        self.fp8 = fp8_parameters(config, is_quantized_by_habit) if keep_fp8 else {}

    def load(self, spec: ModelSpec, mesh: Mesh) -> list[jax.Array]:
        return draw_weights(spec, mesh, self._seed)


def open_source(
    path: str | Path, load_format: str = "auto", *, keep_fp8: bool = True, seed: int = 0
) -> WeightSource:
    """The weights at a model path.

    Args:
        load_format: auto (by what is there), safetensors, gguf, orbax or dummy.
        keep_fp8: leave block-FP8 weights as they are, instead of dequantising them on load.
        seed: for dummy weights.

    Raises:
        UnsupportedModelError, CheckpointError: with the sentence for the user.
    """
    if is_gguf(path):
        _expect(path, load_format, "a GGUF file", "gguf")
        file = GGUFFile(path)
        config = ModelConfig.from_hf(file.config)
        if load_format == "dummy":
            return DummySource(config, seed, keep_fp8=keep_fp8)
        return FileSource(config, file, keep_fp8=keep_fp8)
    config = ModelConfig.from_folder(path)
    if load_format == "dummy":
        return DummySource(config, seed, keep_fp8=keep_fp8)
    if OrbaxFolder.is_one(path):
        _expect(path, load_format, "an Orbax checkpoint", "orbax")
        return OrbaxFolder(path, config, keep_fp8=keep_fp8)
    _expect(path, load_format, "a folder of safetensors", "safetensors")
    return FileSource(config, SafetensorsFolder(path), keep_fp8=keep_fp8)


def _expect(path: str | Path, asked: str, found: str, format_name: str) -> None:
    if asked not in ("auto", "dummy", format_name):
        raise CheckpointError(
            f"--load-format {asked}: {path} is {found}; leave the flag out or give {format_name}."
        )
