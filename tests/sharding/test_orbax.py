"""Converted checkpoints restore onto any mesh with the values that the original gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from model.checkpoint import CheckpointError
from sharding.layout import make_layout
from sharding.mesh import make_mesh
from sharding.orbax_folder import OrbaxFolder
from sharding.sources import open_source
from sharding.step import ModelSpec
from tests.fixtures import DATA
from tests.fp8 import write_fp8

pytest.importorskip("orbax.checkpoint", reason="meshserve[orbax] is not installed")
ROOT = Path(__file__).resolve().parents[2]


def convert(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "scripts/convert_checkpoint.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def load(folder: Path, layout: tuple[int, int, int], dtype: str = "float32") -> dict:
    """Every array by path and kind, whole and padded."""
    source = open_source(folder)
    spec = ModelSpec(source.config, jnp.dtype(dtype), make_layout(*layout), source.fp8)
    weights = source.load(spec, make_mesh(spec.layout))
    for p, w in zip(spec.params, weights, strict=True):
        assert (w.shape, w.dtype) == (p.shape, p.dtype)
        assert w.sharding.spec == p.spec
    return {
        (p.path, p.block is not None): np.asarray(w)
        for p, w in zip(spec.params, weights, strict=True)
    }


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(original, converted): bfloat16, and FP8 with blocks that shards cut."""
    folder = tmp_path_factory.mktemp("orbax")
    fp8, _ = write_fp8(folder, (12, 20))
    pairs = {"plain": (DATA / "deepseek_v3", folder / "a"), "fp8": (fp8, folder / "b")}
    pairs["gqa"] = (DATA / "qwen3", folder / "c")
    for kind, (original, out) in pairs.items():
        # kv_b_proj is dequantised before it is stored, and bfloat16 would round it.
        result = convert(original, out, "--dtype", "float32" if kind == "fp8" else "auto")
        assert result.returncode == 0, result.stderr
        assert "MiB, read in" in result.stdout
    return pairs


@pytest.mark.parametrize("kind", ["plain", "fp8", "gqa"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (8, 8, 8), (8, 4, 4), (6, 1, 3)])
def test_restores_onto_any_mesh(converted, kind, layout):
    original, out = converted[kind]
    assert OrbaxFolder.is_one(out)
    wanted, got = load(original, layout), load(out, layout)
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(got[key], value, err_msg=str(key))


def test_the_small_files_come_along(converted):
    original, out = converted["plain"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (original / name).read_bytes()
    assert not list(out.glob("*.safetensors*"))


def test_errors_are_one_sentence(converted, tmp_path):
    original, out = converted["plain"]
    result = convert(original, out)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "exists already" in result.stderr
    with pytest.raises(CheckpointError, match="--load-format safetensors"):
        open_source(out, "safetensors")
    with pytest.raises(CheckpointError, match="--fp8-weights dequantize"):
        open_source(converted["fp8"][1], keep_fp8=False)

    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    for file in (broken / "weights").rglob("*"):
        if file.is_file() and file.stat().st_size > 4096:
            file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        load(broken, (1, 1, 1))
    assert "\n" not in str(error.value)

    description = json.loads((broken / "meshserve.json").read_text())
    for change, text in (
        ({"version": 99}, "version 99"),
        ({"shapes": {}}, "arrays are missing"),
        ({"shapes": 3}, "not the description"),
    ):
        (broken / "meshserve.json").write_text(json.dumps(description | change))
        with pytest.raises(CheckpointError, match=text):
            load(broken, (1, 1, 1))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_older_folders_are_read_where_nothing_is_stored_otherwise(
    converted, tmp_path, kind, version
):
    older = tmp_path / kind
    shutil.copytree(converted[kind][1], older)
    description = json.loads((older / "meshserve.json").read_text())
    (older / "meshserve.json").write_text(json.dumps(description | {"version": version}))
    if kind == "plain":
        assert load(older, (1, 1, 1))
    else:
        with pytest.raises(CheckpointError, match=f"version {version}"):
            load(older, (1, 1, 1))
