"""Checkpoints: lazy views, padding, round trips, and errors that name the tensor."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.checkpoint import (
    CheckpointError,
    SafetensorsFolder,
    Stack,
    export_tensors,
    hf_shapes,
    read_padded,
)
from model.config import ModelConfig
from tests.fixtures import ARCHITECTURE_FIXTURES, DATA, GQA_FIXTURES, MLA_FIXTURES
from tests.model.test_reference import load


@pytest.fixture
def folder(tmp_path):
    """A writable copy of a fixture."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(DATA / "deepseek_v3" / file, tmp_path / file)
    return tmp_path


def rewrite(folder, change):
    tensors = {k: np.asarray(v) for k, v in SafetensorsFolder(folder).tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def check(folder):
    SafetensorsFolder(folder).check(ModelConfig.from_folder(folder))


def test_stack_reads_the_same_as_numpy():
    arrays = [np.arange(12).reshape(3, 4) + 100 * i for i in range(5)]
    for axis in (0, 1, 2):
        stack, whole = Stack(arrays, axis), np.stack(arrays, axis)
        assert stack.shape == whole.shape
        index = (slice(1, 3), slice(0, 2), slice(1, None))
        np.testing.assert_array_equal(stack[index], whole[index])


def test_read_padded_gives_zeros_beyond_the_view():
    view = np.arange(6, dtype=np.float32).reshape(2, 3)
    whole = np.zeros((4, 5), np.float32)
    whole[:2, :3] = view
    for rows in (slice(0, 2), slice(1, 3), slice(2, 4), slice(None)):
        for columns in (slice(0, 3), slice(2, 5), slice(3, 5)):
            got = read_padded(view, (rows, columns), (4, 5), view.dtype)
            np.testing.assert_array_equal(got, whole[rows, columns])


@pytest.mark.parametrize("name", [*MLA_FIXTURES, *GQA_FIXTURES, *ARCHITECTURE_FIXTURES])
def test_export_gives_back_every_tensor(name):
    original = SafetensorsFolder(DATA / name).tensors
    exported = export_tensors(load(DATA / name))
    assert exported.keys() == original.keys()
    for key, value in exported.items():
        np.testing.assert_array_equal(value, np.asarray(original[key], np.float32), err_msg=key)


def test_shards_and_one_file_are_read_alike(tmp_path):
    sharded = SafetensorsFolder(DATA / "deepseek_v2").tensors
    save_file({k: np.asarray(v) for k, v in sharded.items()}, tmp_path / "model.safetensors")
    single = SafetensorsFolder(tmp_path).tensors
    assert single.keys() == sharded.keys()
    assert all((single[k] == sharded[k]).all() for k in single)
    library = load_file(tmp_path / "model.safetensors")
    assert all((np.asarray(library[k]) == single[k]).all() for k in single)


def test_the_multi_token_prediction_layer_is_skipped(folder):
    rewrite(
        folder, lambda t: t.update({"model.layers.4.eh_proj.weight": np.zeros((2, 2), np.float32)})
    )
    check(folder)


def test_missing_surplus_and_misshapen_tensors_are_named_together(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.0.self_attn.rank.weight"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(63, np.float32)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        check(folder)
    text = str(error.value)
    assert "missing: model.layers.1.mlp.experts.3.up_proj.weight" in text
    assert "not part of the model: model.layers.0.self_attn.rank.weight" in text
    assert "model.norm.weight [63] instead of [64]" in text
    assert "\n" not in text


def test_a_truncated_file_is_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            SafetensorsFolder(folder)


def test_other_broken_files_are_refused(folder):
    file = folder / "model.safetensors"
    header = json.dumps({"x": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"1")
    with pytest.raises(CheckpointError, match="dtype I8"):
        SafetensorsFolder(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors files"):
        SafetensorsFolder(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match=r"lacks gone\.safetensors"):
        SafetensorsFolder(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        SafetensorsFolder(folder)


def test_tied_embeddings_need_no_lm_head():
    data = json.loads((DATA / "deepseek_v3" / "config.json").read_text())
    tied = ModelConfig.from_hf({**data, "tie_word_embeddings": True})
    assert "lm_head.weight" not in hf_shapes(tied)
