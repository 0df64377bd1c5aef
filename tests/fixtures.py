"""The reference checkpoints in tests/data and the outputs that transformers gave for them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"
MLA_FIXTURES = ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3")
GQA_FIXTURES = ("llama", "qwen2", "qwen3")
# Smaller ones (without tokenizers), made by scripts/make_reference.py.
MLA_ARCHITECTURES = ("kimi_k2", "moonlight", "glm4_moe_lite", "youtu", "minicpm3", "mistral4")
GQA_ARCHITECTURES = ("llama3", "mistral", "qwen2_yarn", "mixtral", "qwen3_moe", "minimax_m2")
ARCHITECTURE_FIXTURES = (*MLA_ARCHITECTURES, *GQA_ARCHITECTURES)
LOGIT_TOLERANCE = 2e-3

# (tp, dp, ep): every case of the mesh, both ways round the middle axis.
LAYOUTS = ((8, 8, 8), (8, 4, 8), (8, 4, 4), (8, 1, 8), (8, 2, 1), (8, 8, 4))


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """One folder: its prompts (with greedy tokens) and its logits at every prompt position."""

    folder: Path
    expected: dict[str, Any]
    logits: dict[str, np.ndarray]

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return self.expected["prompts"]


@functools.cache
def load_fixture(name: str) -> Fixture:
    folder = DATA / name
    with np.load(folder / "logits.npz") as logits:
        return Fixture(
            folder=folder,
            expected=json.loads((folder / "expected.json").read_text(encoding="utf-8")),
            logits=dict(logits),
        )
