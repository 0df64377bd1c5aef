"""What cannot be served ends `serve.py` with one sentence, exit code 1 and no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.checkpoint import SafetensorsFolder
from tests.fixtures import DATA
from tests.fp8 import write_fp8
from tests.gguf_files import write_gguf

ROOT = Path(__file__).resolve().parents[2]
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def serve(path: Path, *flags: str) -> str:
    """The sentence on standard error."""
    command = [sys.executable, "scripts/serve.py", "--model-path", str(path), "--port", "0"]
    result = subprocess.run(
        [*command, "--device", "cpu", "--log-level", "error", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr + result.stdout
    prefix = "serve.py: error: "
    assert result.stderr.startswith(prefix), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix(prefix).strip()


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"!" * 200 + data[208:])


def without_a_tensor(folder: Path) -> None:
    tensors = {k: np.array(v) for k, v in SafetensorsFolder(folder).tensors.items()}
    del tensors["model.layers.2.mlp.experts.7.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (truncate, "not a complete safetensors file"),
        (corrupt, "not a complete safetensors file"),
        (without_a_tensor, "missing: model.layers.2.mlp.experts.7.down_proj.weight"),
        (lambda f: rewrite(f, moe_intermediate_size=48), "of a wrong shape"),
        (lambda f: rewrite(f, num_hidden_layers=9), "missing"),
        (lambda f: rewrite(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
        (lambda f: rewrite(f, quantization_config={"quant_method": "awq"}), "awq"),
        (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors files"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "meshserve.json").write_text("{"), "not the description"),
    ],
)
def test_broken_folders(tmp_path, change, text):
    for name in FILES:
        shutil.copy(DATA / "deepseek_v3" / name, tmp_path / name)
    change(tmp_path)
    assert text in serve(tmp_path)


def test_other_formats(tmp_path):
    fp8, _ = write_fp8(tmp_path, (16, 16))
    rewrite(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 16]})
    assert "_scale_inv has shape" in serve(fp8)
    pytest.importorskip("gguf", reason="meshserve[gguf] is not installed")
    path = tmp_path / "model.gguf"
    assert "There is no file" in serve(path)
    write_gguf(path, "Q8_0")
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a complete GGUF file" in serve(path)
    write_gguf(path, changes={"block_count": 4})
    assert "missing" in serve(path) or "not supported" in serve(path)
    write_gguf(path)
    assert "--load-format orbax" in serve(path, "--load-format", "orbax")
