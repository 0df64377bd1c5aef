"""The tokenizer of a GGUF file is the folder's, token for token."""

from __future__ import annotations

import json

import pytest

from serving.tokenizer import Tokenizer, TokenizerError
from tests.fixtures import DATA
from tests.gguf_files import write_gguf

gguf = pytest.importorskip("gguf", reason="meshserve[gguf] is not installed")


@pytest.fixture
def path(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_texts_and_chats_give_the_same_ids(path):
    tokenizer, folder = Tokenizer.load(path), Tokenizer.load(DATA / "llama")
    expected = json.loads((DATA / "llama" / "expected.json").read_text())
    for case in expected["text_prompts"]:
        assert tokenizer.encode(case["text"]) == case["prompt"]
        assert tokenizer.decode(case["tokens"]) == case["output_text"]
    for case in expected["chats"]:
        assert tokenizer.render_chat(case["messages"]) == case["rendered"]
        assert tokenizer.encode_chat(case["messages"]) == case["prompt"]
    assert tokenizer.eos_token_ids == folder.eos_token_ids
    assert tokenizer.bos_token_id == folder.bos_token_id
    assert tokenizer.vocab_size == folder.vocab_size
    for token in range(folder.vocab_size):
        assert tokenizer.token_bytes(token) == folder.token_bytes(token)
        assert tokenizer.is_special(token) == folder.is_special(token)


def test_overrides(path, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("mine")
    assert Tokenizer.load(path, chat_template=template).render_chat([]) == "mine"
    other = Tokenizer.load(path, tokenizer_path=DATA / "deepseek_v3")
    assert other.bos_token_id == 0


def test_what_cannot_be_read_is_one_sentence(path):
    data = path.read_bytes()
    for old, new, text in (
        (b"gpt-2", b"gpt-9", "text splitting 'gpt-9' is not known"),
        (b"gpt2", b"bert", "of kind bert"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez", "lacks ggml.merges"),
        (data[3000:], b"", "not a complete GGUF file"),
    ):
        path.write_bytes(data.replace(old, new))
        with pytest.raises(TokenizerError, match=text) as error:
            Tokenizer.load(path)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(TokenizerError, match="There is no file"):
        Tokenizer.load(path)
