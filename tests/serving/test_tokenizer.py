"""Tokenizer files of six model families, incremental decoding, stop strings across borders."""

import json
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as FastTokenizer

from serving.tokenizer import (
    LONG_TOKENS,
    ChatTemplateError,
    StopMatcher,
    Tokenizer,
    TokenizerError,
)

DATA = Path(__file__).resolve().parent.parent / "data"
FIXTURES = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: Tokenizer.from_folder(DATA / name) for name in FIXTURES}


def pieces_of(tokenizer, ids):
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", FIXTURES)
def test_reference_prompts_chats_and_texts(tokenizers, name):
    tokenizer = tokenizers[name]
    expected = json.loads((DATA / name / "expected.json").read_text())
    assert expected["text_prompts"]
    assert expected["chats"]
    for case in expected["text_prompts"]:
        assert tokenizer.encode(case["text"]) == case["prompt"]
    for case in expected["chats"]:
        assert tokenizer.render_chat(case["messages"]) == case["rendered"]
        assert tokenizer.encode_chat(case["messages"]) == case["prompt"]
    for case in [*expected["text_prompts"], *expected["chats"]]:
        assert tokenizer.decode(case["tokens"]) == case["output_text"]
        assert "".join(pieces_of(tokenizer, case["tokens"])) == case["output_text"]


@pytest.mark.parametrize("name", FIXTURES)
def test_special_ids(tokenizers, name):
    tokenizer = tokenizers[name]
    deepseek = name.startswith("deepseek")
    assert tokenizer.vocab_size == 512
    assert tokenizer.bos_token_id == (0 if deepseek else None)
    assert tokenizer.eos_token_ids == ((1,) if deepseek else (2,))


def copy_without(tmp_path, name="deepseek_v3", *missing):
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        if file not in missing:
            shutil.copy(DATA / name / file, tmp_path / file)
    return tmp_path


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "flag", "bos"),
    [
        ("deepseek_v2", True, 1),  # the post-processor adds one too
        ("deepseek_v2", False, 0),
        ("deepseek_v2", None, 1),
        ("deepseek_v3", True, 1),  # nothing but the flag asks for it
        ("deepseek_v3", False, 0),
        ("deepseek_v3", None, 0),
    ],
)
def test_the_flag_decides_about_bos(tmp_path, name, flag, bos):
    folder = copy_without(tmp_path, name)
    edit_json(folder / "tokenizer_config.json", add_bos_token=flag)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("The old man").count(0) == bos
    assert tokenizer.encode("").count(0) == bos


def test_eos_ids_come_from_every_file(tmp_path):
    folder = copy_without(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    edit_json(folder / "config.json", eos_token_id=6)
    assert Tokenizer.from_folder(folder).eos_token_ids == (1, 6, 7, 8)


def test_tokenizer_in_another_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 640, "eos_token_id": 5}')
    tokenizer = Tokenizer.from_folder(tmp_path, tokenizer_path=DATA / "llama")
    assert tokenizer.vocab_size == 640
    assert tokenizer.eos_token_ids == (2, 5)
    assert tokenizer.token_bytes(639) == b""
    assert "".join(pieces_of(tokenizer, [639, 287, 600])) == tokenizer.decode([639, 287, 600])


def test_template_file_beats_config_and_override_beats_both(tmp_path):
    folder = copy_without(tmp_path)
    (folder / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert Tokenizer.from_folder(folder).render_chat([]) == "file <｜begin▁of▁sentence｜>"
    override = tmp_path / "mine.jinja"
    override.write_text("mine {{ x }}")
    tokenizer = Tokenizer.from_folder(folder, chat_template=override)
    assert tokenizer.render_chat([], {"x": 1}) == "mine 1"


def test_named_templates_default_is_used(tmp_path):
    folder = copy_without(tmp_path)
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.from_folder(folder).render_chat([]) == "d"


def test_template_helpers(tmp_path):
    folder = copy_without(tmp_path)
    edit_json(
        folder / "tokenizer_config.json",
        chat_template="{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}\n{% endfor %}\n{{ strftime_now('%Y') | length }}",
    )
    messages = [{"content": "<é 猫>"}, {"content": "no"}]
    assert Tokenizer.from_folder(folder).render_chat(messages) == '{"content": "<é 猫>"}\n4'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_template_refusals_are_one_error(tmp_path, template, reason):
    folder = copy_without(tmp_path)
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(ChatTemplateError, match=reason):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_no_template_says_so(tmp_path):
    folder = copy_without(tmp_path)
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    tokenizer = Tokenizer.from_folder(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.encode_chat([])


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "[1]", "must hold a JSON object"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template is broken"),
        ("config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("generation_config.json", "\0", "generation_config.json cannot be read"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path, file, content, reason):
    folder = copy_without(tmp_path, "deepseek_v3", file)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(TokenizerError, match=reason) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


def test_missing_override_is_an_error():
    with pytest.raises(TokenizerError, match=r"nowhere\.jinja"):
        Tokenizer.from_folder(DATA / "llama", chat_template="nowhere.jinja")


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(FIXTURES), ids=st.lists(st.integers(0, 520), max_size=60))
def test_pieces_equal_the_whole_for_any_tokens(tokenizers, name, ids):
    tokenizer = tokenizers[name]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), name=st.sampled_from(FIXTURES))
def test_characters_are_never_halved(tokenizers, name, text):
    tokenizer = tokenizers[name]
    pieces = pieces_of(tokenizer, tokenizer._fast.encode(text, add_special_tokens=False).ids)
    whole = tokenizer.decode(tokenizer._fast.encode(text, add_special_tokens=False).ids)
    assert "".join(pieces) == whole
    if "\N{REPLACEMENT CHARACTER}" not in whole:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.fixture(scope="module")
def sentencepiece_like():
    """A vocabulary whose decoder strips the first space and spells unknown bytes <0x..>."""
    vocab = {"<unk>": 0, "<s>": 1, "▁": 2, "▁old": 3, "man": 4, "▁man": 5, ",": 6, "é": 7}
    vocab |= {f"<0x{byte:02X}>": 8 + byte for byte in range(256)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    fast.add_special_tokens([AddedToken("<s>", special=True)])
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(fast=fast, config={}, chat_template=None, eos_token_ids=(), vocab_size=None)


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(
        st.one_of(
            st.sampled_from([[1], [2], [3], [4], [5], [6], [7]]),
            st.characters(min_codepoint=0x80, exclude_categories=["Cs"]).map(
                lambda char: [8 + byte for byte in char.encode()]
            ),
        ),
        max_size=20,
    )
)
def test_other_decoders_too(sentencepiece_like, words):
    ids = [i for word in words for i in word]
    pieces = pieces_of(sentencepiece_like, ids)
    assert "".join(pieces) == sentencepiece_like.decode(ids)


def test_bytes_of_tokens(tokenizers, sentencepiece_like):
    tokenizer = tokenizers["deepseek_v3"]
    ids = tokenizer._fast.encode("naïve 猫", add_special_tokens=False).ids
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == "naïve 猫".encode()
    assert tokenizer.token_bytes(3) == "<｜User｜>".encode()
    assert sentencepiece_like.token_bytes(8 + 0xE4) == b"\xe4"


def cut(text, stops):
    """The definition: up to the stop string that is complete first, of several the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab猫", max_size=4), max_size=12),
    stops=st.lists(st.text("ab猫", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_wherever_the_borders_fall(pieces, stops):
    matcher = StopMatcher(stops)
    out, matched = "", None
    for piece in pieces:
        text, matched = matcher.push(piece)
        out += text
        if matched is not None:
            break
        assert cut("".join(pieces), stops)[0].startswith(out)
    if matched is None:
        out += matcher.flush()
    assert (out, matched) == cut("".join(pieces), stops)


def test_only_a_possible_beginning_is_held_back():
    matcher = StopMatcher(["\n\nQ:", "END"])
    assert matcher.push("Yes.\n") == ("Yes.", None)
    assert matcher.push("No E") == ("\nNo ", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("!") == ("EN!", None)
    assert matcher.push("\n\nQ: why") == ("", "\n\nQ:")


def test_long_stop_strings_that_nearly_match_cost_little():
    """Clients choose them, and while one answer is searched all others wait."""
    stops = ["x" * 1000 + "!", *("y" * k + "x" * (1000 - k) for k in range(1, 64))]
    matcher = StopMatcher(stops)
    began = time.perf_counter()
    out = "".join(matcher.push("xxxx")[0] for _ in range(500))
    assert time.perf_counter() - began < 1.0  # comparing every length takes ten times as long
    assert out == "x" * 1000
    assert matcher.push("!?") == ("", stops[0])
    assert matcher.push("!") == ("!", None)


def test_long_lists_are_decoded_like_short_ones(tokenizers):
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode("an old man, ") * (LONG_TOKENS // 4)
        assert len(ids) > LONG_TOKENS
        whole = tokenizer._fast.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids) == whole


@pytest.mark.parametrize("window", [False, True])
def test_special_tokens_appear_where_they_are_asked_for(tokenizers, window, tmp_path):
    tokenizer = tokenizers["deepseek_v3"]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    if window:  # the same vocabulary behind another decoder: the general way of decoding
        folder = copy_without(tmp_path)
        edit_json(
            folder / "tokenizer.json",
            decoder={"type": "Sequence", "decoders": [byte_level, {"type": "Fuse"}]},
        )
        tokenizer = Tokenizer.from_folder(folder)
    ids = [*tokenizer.encode("an old man"), *tokenizer.eos_token_ids]
    for skip in (True, False):
        detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
        pieces = [*map(detokenizer.push, ids), detokenizer.flush()]
        text = "".join(pieces)
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)
        assert ("end▁of▁sentence" in text) is not skip


def test_tools_reach_the_template(tmp_path):
    folder = copy_without(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools[0].function.name }}{% else %}none{% endif %}"
    )
    tokenizer = Tokenizer.from_folder(folder)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert tokenizer.render_chat([], tools=tools) == "weather"
    assert tokenizer.render_chat([]) == "none"
    assert tokenizer.encode_chat([], tools=tools) == tokenizer.encode("weather")[1:]


def test_special_tokens_may_be_objects(tmp_path):
    folder = copy_without(tmp_path)
    token = {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>", "lstrip": False}
    edit_json(folder / "tokenizer_config.json", bos_token=token, add_bos_token=True)
    assert Tokenizer.from_folder(folder).encode("The")[:1] == [0]
