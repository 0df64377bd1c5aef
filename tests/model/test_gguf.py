"""GGUF files as checkpoints: names, row order, dequantised slices, broken files."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest

from model.checkpoint import CheckpointError, SafetensorsFolder
from model.config import UnsupportedModelError
from model.formats.gguf_file import GGUFFile, is_gguf
from tests.fixtures import DATA
from tests.gguf_files import write_gguf

gguf = pytest.importorskip("gguf", reason="meshserve[gguf] is not installed")


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_tensors_are_those_of_the_original(tmp_path, quantization):
    path = tmp_path / "model.gguf"
    write_gguf(path, quantization)
    file, original = GGUFFile(path), SafetensorsFolder(DATA / "llama")
    assert file.shapes == original.shapes
    for name in original.shapes:
        wanted = np.asarray(original.tensor(name), np.float32)
        got = np.asarray(file.tensor(name))
        assert got.dtype == np.float32 or quantization == "F16"
        if quantization in ("F32", "BF16"):  # the fixture is bfloat16
            np.testing.assert_array_equal(got, wanted, err_msg=name)
        else:
            worst = {"F16": 1e-3, "Q8_0": 0.01, "Q4_1": 0.15}[quantization]
            assert np.abs(got - wanted).max() < worst * np.abs(wanted).max(), name


@pytest.mark.parametrize("quantization", ["F32", "Q4_1"])
def test_slices_are_dequantised_alone(tmp_path, quantization, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(path, quantization)
    file = GGUFFile(path)
    whole = {name: np.asarray(file.tensor(name)) for name in file.shapes}
    dequantized = []
    real = gguf.quants.dequantize

    def dequantize(data, kind):
        dequantized.append(data.nbytes)
        return real(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        rows, columns = slice(17, 33), slice(5, 41)
        got = np.asarray(file.tensor(name)[rows, columns])
        np.testing.assert_array_equal(got, whole[name][rows, columns])
        np.testing.assert_array_equal(
            np.asarray(file.tensor(name).T[columns, rows]), whole[name].T[columns, rows]
        )
    if quantization == "Q4_1":
        assert max(dequantized) == 16 * 2 * 20  # 16 rows, 2 blocks of 32 numbers in 20 bytes


def test_the_configuration_is_that_of_the_original(tmp_path):
    path = tmp_path / "model.GGUF"
    write_gguf(path)
    assert is_gguf(path)
    assert not is_gguf(DATA / "llama")
    original = json.loads((DATA / "llama" / "config.json").read_text())
    config = GGUFFile(path).config
    assert config.pop("head_dim") == original["hidden_size"] // original["num_attention_heads"]
    assert config.pop("rms_norm_eps") == pytest.approx(original["rms_norm_eps"])
    for key, value in config.items():
        assert value == original[key], key


def test_what_is_not_supported_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, changes={"expert_count": 8})
    with pytest.raises(UnsupportedModelError, match="with experts"):
        GGUFFile(path)
    write_gguf(path, changes={"block_count": None})
    with pytest.raises(CheckpointError, match=r"lacks llama\.block_count"):
        GGUFFile(path)
    data = path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba")
    path.write_bytes(data)
    with pytest.raises(UnsupportedModelError, match="architecture mamba"):
        GGUFFile(path)


def test_broken_files_are_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match="There is no file"):
        GGUFFile(path)
    write_gguf(path, "Q8_0")
    data = path.read_bytes()
    for size in (0, 3, 100, 5000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="not a complete GGUF file") as error:
            GGUFFile(path)
        assert "\n" not in str(error.value)
    path.write_bytes(b"rubbish " * 1000)
    with pytest.raises(CheckpointError, match="not a complete GGUF file"):
        GGUFFile(path)

    real = builtins.__import__

    def no_gguf(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_gguf)
    with pytest.raises(CheckpointError, match=r"install meshserve\[gguf\]"):
        GGUFFile(path)
