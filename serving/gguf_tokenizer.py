"""The tokenizer inside a GGUF file, as the parts that `serving.tokenizer` builds on.

Only byte-level BPE ("gpt2" in GGUF's words) is read: its vocabulary, merges and token kinds stand
in the metadata; how text is split before merging is known by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens that are matched whole in a text; control tokens are special."""
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")


class GGUFTokenizerError(ValueError):
    """The file holds no tokenizer that can be read; one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTokenizer:
    """What a model folder's files would say.

    Attributes:
        config: as tokenizer_config.json.
        eos_token_ids: ids that end an answer.
    """

    fast: Tokenizer
    config: dict[str, Any]
    chat_template: str | None
    eos_token_ids: tuple[int, ...]


def read_gguf_tokenizer(path: Path) -> GGUFTokenizer:
    """Build the tokenizer of a GGUF file.

    Raises:
        GGUFTokenizerError: `gguf` is missing, the file is broken, or its tokenizer of another kind.
    """
    try:
        import gguf
    except ImportError:
        raise GGUFTokenizerError(
            f"Reading {path.name} needs the package gguf: install meshserve[gguf]."
        ) from None
    if not path.is_file():
        raise GGUFTokenizerError(f"There is no file {path}: is the model path right?")
    try:
        fields = gguf.GGUFReader(path).fields
        data = {
            key.removeprefix("tokenizer."): field.contents()
            for key, field in fields.items()
            if key.startswith("tokenizer.")
        }
    except Exception as error:  # the library raises whatever reading rubbish leads to
        raise GGUFTokenizerError(
            f"{path} is not a complete GGUF file ({type(error).__name__}: {error})."
        ) from None
    kind = data.get("ggml.model")
    if kind != "gpt2":
        raise GGUFTokenizerError(
            f"The tokenizer in {path} is of kind {kind}; only gpt2 (byte-level BPE) is supported: "
            "name a folder with tokenizer.json by --tokenizer-path."
        )
    try:
        return _build(data)
    except KeyError as error:
        raise GGUFTokenizerError(f"The tokenizer in {path} lacks {error.args[0]}.") from None
    except GGUFTokenizerError as error:
        raise GGUFTokenizerError(f"{path}: {error}") from None
    except Exception as error:  # the library raises plain Exception
        raise GGUFTokenizerError(f"The tokenizer in {path} is broken: {error}.") from None


def _build(data: Mapping[str, Any]) -> GGUFTokenizer:
    tokens: list[str] = data["ggml.tokens"]
    kinds: list[int] = data.get("ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ", 1)) for merge in data["ggml.merges"]]
    split = data.get("ggml.pre", "default")
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        ignore_merges=split == "llama-bpe",
    )
    fast = Tokenizer(bpe)
    fast.pre_tokenizer = _pre_tokenizer(split)
    fast.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, k in zip(tokens, kinds, strict=True)
            if k == kind
        ]
        if special:
            fast.add_special_tokens(added)
        else:
            fast.add_tokens(added)
    config: dict[str, Any] = {"add_bos_token": bool(data.get("ggml.add_bos_token", False))}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = data.get(f"ggml.{theirs}_token_id")
        if token_id is not None:
            config[f"{ours}_token"] = tokens[token_id]
    ends = {data.get("ggml.eos_token_id"), data.get("ggml.eot_token_id")} - {None}
    return GGUFTokenizer(
        fast=fast,
        config=config,
        chat_template=data.get("chat_template"),
        eos_token_ids=tuple(sorted(ends)),
    )


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is split before merges, by llama.cpp's name for it."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in ("default", "gpt-2"):
        return gpt2
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, gpt2])
    patterns = {"llama-bpe": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}
    if name not in patterns:
        raise GGUFTokenizerError(
            f"text splitting '{name}' is not known; known are default, gpt-2, smollm, "
            f"{', '.join(patterns)}: name a folder with tokenizer.json by --tokenizer-path."
        )
    pattern = pre_tokenizers.Split(Regex(patterns[name]), behavior="isolated")
    return pre_tokenizers.Sequence([pattern, bytes_only])
