"""Corpus, training, a kill, resuming and export, end to end at a toy size."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *args: object) -> str:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_training_resumes_after_a_kill_and_exports_a_model_folder(tmp_path: Path) -> None:
    corpus, out, checkpoints = tmp_path / "corpus", tmp_path / "out", tmp_path / "checkpoints"
    tokenizer = ROOT / "model" / "demo" / "tokenizer.json"
    run("make_corpus.py", "--out", corpus, "--megabytes", 0.4, "--workers", 1,
        "--tokenizer", tokenizer)  # fmt: skip
    train = ("train.py", "--corpus", corpus, "--out", out, "--checkpoints", checkpoints, "--tiny",
             "--steps", 4, "--batch-tokens", 256, "--row", 128, "--long-share", 0,
             "--eval-steps", 100)  # fmt: skip
    assert "Left at step 2." in run(*train, "--stop-after", 2)
    assert not out.exists()
    text = run(*train)
    assert "parameters, step 2," in text  # went on where it was
    assert json.loads(text.splitlines()[-1])["step"] == 4
    assert {f.name for f in out.iterdir()} == {
        "config.json", "generation_config.json", "loss.png", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip

    from model.checkpoint import SafetensorsFolder
    from model.config import ModelConfig

    folder, config = SafetensorsFolder(out), ModelConfig.from_folder(out)
    folder.check(config)
    bias = folder.tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == np.float32
    assert np.abs(bias).max() > 0  # balancing moved it
    assert folder.tensors["model.norm.weight"].dtype.name == "bfloat16"


def test_the_loss_weighs_replies_and_only_replies() -> None:
    import jax.numpy as jnp

    from scripts.train import in_replies

    #       bos user text asst a  b  eos user q asst c eos bos text
    row = [0, 3, 50, 4, 60, 61, 1, 3, 70, 4, 80, 1, 0, 90]
    found = in_replies(jnp.array([row]))[0].tolist()
    assert [t for t, f in zip(row, found, strict=True) if f] == [60, 61, 1, 80, 1]
