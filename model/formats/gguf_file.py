"""GGUF files (llama.cpp's format) of the Llama architecture, as if they were Hugging Face folders.

The metadata becomes the contents of a `config.json`, tensors get Hugging Face's names and row
order, and quantised ones are dequantised to float32 slice by slice as they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.checkpoint import CheckpointError
from model.config import UnsupportedModelError
from model.formats.lazy import Index, LazyMatrix

ARCHITECTURES = {"llama": "LlamaForCausalLM"}
"""`general.architecture` to the `architectures` entry of a config.json."""
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_gguf(path: str | Path) -> bool:
    """Whether a model path names a GGUF file rather than a folder."""
    return Path(path).suffix.lower() == ".gguf"


class GGUFFile:
    """One GGUF file, memory-mapped.

    Attributes:
        config: what its config.json would say.
        shapes: Hugging Face's names and shapes of its tensors.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: the file is missing or broken, or `gguf` is not installed.
            UnsupportedModelError: another architecture, or an option that nothing here computes.
        """
        path = Path(path)
        try:
            import gguf
        except ImportError:
            raise CheckpointError(
                f"Reading {path.name} needs the package gguf: install meshserve[gguf]."
            ) from None
        if not path.is_file():
            raise CheckpointError(f"There is no file {path}: is the model path right?")
        try:
            reader = gguf.GGUFReader(path)
            metadata = {
                key: field.contents()
                for key, field in reader.fields.items()
                if not key.startswith("tokenizer.") or key.endswith("_token_id")
            }
        except Exception as error:  # the library raises whatever reading rubbish leads to
            raise CheckpointError(
                f"{path} is not a complete GGUF file ({type(error).__name__}: {error})."
            ) from None
        self._quants, self._sizes = gguf.quants, gguf.GGML_QUANT_SIZES
        self._tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        try:
            self.config = self._config(metadata)
        except KeyError as error:
            raise CheckpointError(f"{path} lacks {error.args[0]}.") from None

    def _config(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        architecture = metadata["general.architecture"]
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"GGUF files of architecture {architecture} are not supported; supported are "
                f"{', '.join(ARCHITECTURES)}."
            )

        def value(key: str, *default: Any) -> Any:
            name = f"{architecture}.{key}"
            return metadata.get(name, default[0]) if default else metadata[name]

        scaling = value("rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.shapes:
            raise UnsupportedModelError(
                f"Rope scaling in GGUF files ({scaling}, rope_freqs) is not supported; take the "
                "safetensors files of this model."
            )
        if value("expert_count", 0):
            raise UnsupportedModelError(
                "GGUF files with experts are not supported; take the safetensors files."
            )
        heads, width = value("attention.head_count"), value("embedding_length")
        return {
            "architectures": [ARCHITECTURES[architecture]],
            "model_type": architecture,
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": width,
            "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": value("attention.head_count_kv", heads),
            "head_dim": value("attention.key_length", width // heads),
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
            "rope_theta": value("rope.freq_base", 10000.0),
            "max_position_embeddings": value("context_length"),
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        }

    def tensor(self, name: str) -> Any:
        """A vector, or a matrix that is dequantised where it is read."""
        tensor, shape = self._tensors[name], self.shapes[name]
        if len(shape) == 1:
            return self._quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        per_block, block_bytes = self._sizes[tensor.tensor_type]

        def read(rows: Index, columns: Index) -> np.ndarray:
            data = tensor.data[rows]
            if data.dtype != np.uint8:  # float32 or float16 as they are
                return np.asarray(data[:, columns])
            if isinstance(columns, slice):
                first, last = columns.start, columns.stop - 1
            else:
                first, last = int(columns.min()), int(columns.max())
            begin, end = first // per_block, last // per_block + 1
            data = np.ascontiguousarray(data[:, begin * block_bytes : end * block_bytes])
            values = self._quants.dequantize(data, tensor.tensor_type)
            start = begin * per_block
            if isinstance(columns, slice):
                return values[:, columns.start - start : columns.stop - start]
            return values[:, columns - start]

        return LazyMatrix(shape, np.dtype(np.float32), read, self._row_order(name))

    def _row_order(self, name: str) -> np.ndarray | None:
        """Where the file has each row of q_proj and k_proj.

        llama.cpp rotates neighbouring pairs, so its files have rows (0, d/2, 1, d/2 + 1, ...) of
        every head; Hugging Face rotates halves.
        """
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        kind = name.split(".")[-2]
        if kind not in heads:
            return None
        rows = np.arange(self.shapes[name][0])
        return rows.reshape(self.config[heads[kind]], -1, 2).swapaxes(1, 2).reshape(-1)


def _name(name: str) -> str:
    """Hugging Face's name of a tensor; an unknown name stays, and is reported as surplus."""
    if name in NAMES:
        return NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name
