"""Block-FP8 versions of a fixture, as DeepSeek-V3 is published, and their dequantised twins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from model.checkpoint import SafetensorsFolder
from model.formats.fp8 import is_quantized_by_habit
from model.quantization import AS_THEY_ARE, BlockFP8, contracted_last, factors_shape
from tests.fixtures import DATA

FP8 = ml_dtypes.float8_e4m3fn


def quantize(weight: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Values and factors; the largest of each block becomes 448, float8's largest."""
    factors = np.zeros([-(-n // b) for n, b in zip(weight.shape, block, strict=True)], np.float32)
    values = np.zeros(weight.shape, FP8)
    for i, j in np.ndindex(*factors.shape):
        part = tuple(slice(k * b, (k + 1) * b) for k, b in zip((i, j), block, strict=True))
        factors[i, j] = max(np.abs(weight[part]).max() / 448.0, 1e-12)
        values[part] = (weight[part] / factors[i, j]).astype(FP8)
    return values, factors


def dequantize(values: np.ndarray, factors: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The definition: every element times its block's factor, in float32."""
    whole = np.repeat(np.repeat(factors, block[0], axis=0), block[1], axis=1)
    rows, columns = values.shape
    return values.astype(np.float32) * whole[:rows, :columns]


def write_fp8(
    folder: Path,
    block: tuple[int, int],
    name: str = "deepseek_v3",
    keep_plain: tuple[str, ...] = (),
) -> tuple[Path, Path]:
    """Two folders: the fixture in FP8 blocks, and the same numbers in float32."""
    source = DATA / name
    config = json.loads((source / "config.json").read_text())
    quantized, plain = {}, {}
    for key, tensor in SafetensorsFolder(source).tensors.items():
        if not is_quantized_by_habit(key) or key.endswith(keep_plain or ("/",)):
            quantized[key] = plain[key] = np.array(tensor)
            continue
        values, factors = quantize(np.asarray(tensor, np.float32), block)
        quantized[key], quantized[f"{key}_scale_inv"] = values, factors
        plain[key] = dequantize(values, factors, block)
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    folders = folder / "fp8", folder / "plain"
    for path, tensors, extra in (
        (folders[0], quantized, {"quantization_config": quantization}),
        (folders[1], plain, {}),
    ):
        path.mkdir(parents=True)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config | extra))
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (source / file).exists():
                shutil.copy(source / file, path / file)
    return folders


def quantised(rng, shape, block, contracted=AS_THEY_ARE, dtype="float32"):
    """A random weight in FP8 blocks (the last ones partial), most of its factors far apart."""
    shape, block = (contracted_last(sizes, contracted) for sizes in (shape, block))
    scale = 0.02 * 2.0 ** rng.integers(-4, 5, factors_shape(shape, block))
    return BlockFP8(
        data=jnp.asarray(rng.standard_normal(shape) * 4, jnp.float32).astype(FP8),
        scale=jnp.asarray(scale, jnp.float32),
        block=block,
        dtype=jnp.dtype(dtype),
        contracted=contracted,
    )


def abstract_fp8(shape, block, contracted=AS_THEY_ARE):
    shape, block = (contracted_last(sizes, contracted) for sizes in (shape, block))
    return BlockFP8(
        data=jax.ShapeDtypeStruct(shape, FP8),
        scale=jax.ShapeDtypeStruct(factors_shape(shape, block), jnp.float32),
        block=block,
        dtype=jnp.dtype(jnp.bfloat16),
        contracted=contracted,
    )
