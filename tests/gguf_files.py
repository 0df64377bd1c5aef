"""GGUF files written from a Llama fixture, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from model.checkpoint import SafetensorsFolder
from model.formats.gguf_file import LAYER_NAMES, NAMES
from tests.fixtures import DATA


def write_gguf(path: Path, quantization: str = "F32", changes: dict | None = None) -> None:
    """The fixture `llama` as a GGUF file; matrices in the given quantisation."""
    import gguf

    folder = DATA / "llama"
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "context_length": config["max_position_embeddings"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
    }
    for key, value in (values | (changes or {})).items():
        if value is not None:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    _write_tokenizer(writer, folder, tokenizer)
    theirs = {ours: name for name, ours in NAMES.items()}
    layers = {ours: name for name, ours in LAYER_NAMES.items()}
    kind = gguf.GGMLQuantizationType[quantization]
    for name, tensor in SafetensorsFolder(folder).tensors.items():
        value = np.asarray(tensor, np.float32)
        parts = name.split(".")
        if name in theirs:
            new = theirs[name]
        else:
            new = f"blk.{parts[2]}.{layers['.'.join(parts[3:-1])]}.{parts[-1]}"
        for end, n in (("q_proj.weight", heads), ("k_proj.weight", kv_heads)):
            if name.endswith(end):  # to neighbouring pairs
                split = value.reshape(n, 2, -1, value.shape[1])
                value = split.swapaxes(1, 2).reshape(value.shape)
        if value.ndim == 1 or quantization == "F32":
            writer.add_tensor(new, value)
        else:
            writer.add_tensor(new, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer, folder: Path, tokenizer: dict) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    vocab = dict(tokenizer["model"]["vocab"])
    special = {}
    for token in tokenizer["added_tokens"]:
        vocab[token["content"]] = token["id"]
        special[token["content"]] = token["special"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if special.get(t) else 4 if t in special else 1 for t in tokens])
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)

    def id_of(name: str) -> int | None:
        token = config.get(name)
        return vocab.get(token["content"] if isinstance(token, dict) else token)

    if id_of("eos_token") is not None:
        writer.add_eos_token_id(id_of("eos_token"))
    writer.add_chat_template(config.get("chat_template") or _template(folder))


def _template(folder: Path) -> str:
    return (folder / "chat_template.jinja").read_text()
