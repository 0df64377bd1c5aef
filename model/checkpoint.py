"""Hugging Face checkpoints: which tensor stands where, and safetensors files read lazily.

Every parameter of ours is described as NumPy *views* (transposed, reshaped, split, stacked) of the
checkpoint's tensors. Reading any slice of a view touches only the bytes of that slice, which is how
a device gets its shard without a whole tensor in memory; writing through the same views exports.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

from model.config import ModelConfig
from model.quantization import Contracted, contracted_in_place, contracted_last
from model.transformer import Transformer

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTensors:
    """The names of a MoE layer's tensors, below the layer's."""

    block: str = "mlp"
    bias: str = "gate.e_score_correction_bias"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: bool = False


MLP_TENSORS = ExpertTensors()
EXPERT_NAMES: Mapping[str, ExpertTensors] = {
    "mlp": MLP_TENSORS,
    "mlp_fused": ExpertTensors(fused=True),
    "block_sparse_moe": ExpertTensors(
        block="block_sparse_moe", bias="e_score_correction_bias", gate="w1", up="w3", down="w2"
    ),
}
"""By `ModelConfig.expert_names`."""


class CheckpointError(ValueError):
    """The checkpoint's files do not fit the model; the message names what is wrong."""


class Stack:
    """Arrays (or stacks) side by side along a new axis, read slice by slice, never materialised."""

    def __init__(self, parts: Sequence[np.ndarray | Stack], axis: int) -> None:
        self.parts, self.axis = parts, axis
        inner = parts[0].shape
        self.shape: tuple[int, ...] = (*inner[:axis], len(parts), *inner[axis:])

    def __getitem__(self, index: Index) -> np.ndarray:
        """Read a slice, in the dtype of the first part."""
        leaf = self.parts[0]
        while isinstance(leaf, Stack):
            leaf = leaf.parts[0]
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, self.shape, strict=True)]
        values = np.empty(sizes, leaf.dtype)
        self.read_into(values, index)
        return values

    def read_into(self, values: np.ndarray, index: Index) -> None:
        """`values[...] = self[index]`, one part after another, with no copy between."""
        inner = index[: self.axis] + index[self.axis + 1 :]
        for part, one in zip(
            self.parts[index[self.axis]], np.moveaxis(values, self.axis, 0), strict=True
        ):
            _read_into(one, part, inner)

    def __setitem__(self, index: Index, value: np.ndarray) -> None:
        inner = index[: self.axis] + index[self.axis + 1 :]
        values = np.moveaxis(value, self.axis, 0)
        for part, one in zip(self.parts[index[self.axis]], values, strict=True):
            part[inner] = one


class Select:
    """Entries of a view along one axis, in a given order, -1 for zeros (see `model.heads`)."""

    def __init__(self, view: np.ndarray | Stack, axis: int, entries: Sequence[int]) -> None:
        self.view, self.axis, self.entries = view, axis, tuple(entries)
        self.shape = (*view.shape[:axis], len(self.entries), *view.shape[axis + 1 :])

    def read_into(self, values: np.ndarray, index: Index) -> None:
        """`values[...] = self[index]`, one entry after another."""
        before, after = index[: self.axis], index[self.axis + 1 :]
        for i, entry in enumerate(self.entries[index[self.axis]]):
            one = values[(*(slice(None) for _ in before), slice(i, i + 1))]
            if entry < 0:
                one[...] = 0
            else:
                _read_into(one, self.view, (*before, slice(entry, entry + 1), *after))


class ContractedLast:
    """A view of a weight as a `BlockFP8` has it."""

    def __init__(self, view: np.ndarray | Stack, contracted: Contracted) -> None:
        self.view, self.contracted = view, contracted
        self.shape: tuple[int, ...] = contracted_last(view.shape, contracted)

    def __getitem__(self, index: Index) -> np.ndarray:
        inner = contracted_in_place(index, self.contracted)
        axes = contracted_last(range(len(index)), self.contracted)
        return np.transpose(self.view[inner], axes)

    def read_into(self, values: np.ndarray, index: Index) -> None:
        """`values[...] = self[index]`."""
        inner = contracted_in_place(index, self.contracted)
        axes = contracted_in_place(range(len(index)), self.contracted)
        _read_into(np.transpose(values, axes), self.view, inner)


View = np.ndarray | Stack | Select | ContractedLast


def _read_into(values: np.ndarray, view: View, index: Index) -> None:
    if isinstance(view, Stack | Select | ContractedLast):
        view.read_into(values, index)
    else:
        values[...] = view[index]


def read_padded(
    view: View,
    index: Index,
    shape: Sequence[int],
    dtype: np.dtype,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """`view[index]` where `index` addresses `view` zero-padded at the end to `shape`.

    The result is `out` where that is given.
    """
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    inside = tuple(
        slice(min(lo, n), min(hi, n)) for (lo, hi), n in zip(bounds, view.shape, strict=True)
    )
    sizes = tuple(s.stop - s.start for s in inside)
    values = np.empty([hi - lo for lo, hi in bounds], dtype) if out is None else out
    if sizes != values.shape:
        values[...] = 0
    if 0 not in sizes:
        _read_into(values[tuple(slice(0, n) for n in sizes)], view, inside)
    return values


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model has."""
    c, d = config, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, d)

    def mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (width, d)
        shapes[f"{prefix}.up_proj.weight"] = (width, d)
        shapes[f"{prefix}.down_proj.weight"] = (d, width)

    for i, kind in enumerate(c.layer_kinds):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (d,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
        shapes |= (_mla_shapes if c.is_mla else _gqa_shapes)(c, f"{layer}.self_attn")
        if kind == "dense":
            mlp(f"{layer}.mlp", c.intermediate_size)
            continue
        names = EXPERT_NAMES[c.expert_names]
        block = f"{layer}.{names.block}"
        shapes[f"{block}.gate.weight"] = (c.num_experts, d)
        if c.router_bias:
            shapes[f"{block}.{names.bias}"] = (c.num_experts,)
        if c.num_shared_experts:
            mlp(f"{block}.shared_experts", c.shared_intermediate_size)
        f = c.moe_intermediate_size
        if names.fused:
            shapes[f"{block}.experts.gate_up_proj"] = (c.num_experts, 2 * f, d)
            shapes[f"{block}.experts.down_proj"] = (c.num_experts, d, f)
            continue
        for e in range(c.num_experts):
            expert = f"{block}.experts.{e}"
            shapes[f"{expert}.{names.gate}.weight"] = (f, d)
            shapes[f"{expert}.{names.up}.weight"] = (f, d)
            shapes[f"{expert}.{names.down}.weight"] = (d, f)
    return shapes


def _mla_shapes(c: ModelConfig, attention: str) -> dict[str, tuple[int, ...]]:
    d = c.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if c.q_lora_rank is None:
        shapes[f"{attention}.q_proj.weight"] = (c.num_heads * c.qk_head_dim, d)
    else:
        shapes[f"{attention}.q_a_proj.weight"] = (c.q_lora_rank, d)
        shapes[f"{attention}.q_a_layernorm.weight"] = (c.q_lora_rank,)
        shapes[f"{attention}.q_b_proj.weight"] = (c.num_heads * c.qk_head_dim, c.q_lora_rank)
    shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (c.latent_dim, d)
    shapes[f"{attention}.kv_a_layernorm.weight"] = (c.kv_lora_rank,)
    shapes[f"{attention}.kv_b_proj.weight"] = (
        c.num_heads * (c.qk_nope_head_dim + c.v_head_dim),
        c.kv_lora_rank,
    )
    shapes[f"{attention}.o_proj.weight"] = (d, c.num_heads * c.v_head_dim)
    return shapes


def _gqa_shapes(c: ModelConfig, attention: str) -> dict[str, tuple[int, ...]]:
    d, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {f"{attention}.o_proj.weight": (d, q)}
    for name, size in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"{attention}.{name}_proj.weight"] = (size, d)
        if c.qkv_bias:
            shapes[f"{attention}.{name}_proj.bias"] = (size,)
    if c.qk_norm is not None:
        whole = c.qk_norm == "projection"
        shapes[f"{attention}.q_norm.weight"] = (q if whole else c.head_dim,)
        shapes[f"{attention}.k_norm.weight"] = (kv if whole else c.head_dim,)
    return shapes


def parameter_views(
    config: ModelConfig, tensor: Callable[[str], np.ndarray]
) -> dict[str, list[View]]:
    """For each parameter path of `Transformer`, its views: one per layer of a stacked parameter.

    Unstacked parameters (embedding, final norm, LM head) have a list of one view and no layer axis;
    their paths do not start with "segments".

    Args:
        tensor: gives the array of a checkpoint tensor's name, in the checkpoint's layout.
    """
    views: dict[str, list[View]] = {
        "embedding.weight": [tensor("model.embed_tokens.weight")],
        "norm": [tensor("model.norm.weight")],
    }
    if not config.tie_word_embeddings:
        views["lm_head.weight"] = [tensor("lm_head.weight").T]
    i = 0
    for s, (kind, num_layers) in enumerate(config.segments):
        for _ in range(num_layers):
            for path, view in _layer_views(config, f"model.layers.{i}", kind, tensor).items():
                views.setdefault(f"segments.{s}.{path}", []).append(view)
            i += 1
    return views


def _mlp_views(
    prefix: str, tensor: Callable[[str], np.ndarray], names: ExpertTensors = MLP_TENSORS
) -> tuple[View, View]:
    """gate_up [D, 2, F] and down [F, D] of one MLP."""
    gate, up = (tensor(f"{prefix}.{name}.weight").T for name in (names.gate, names.up))
    return Stack([gate, up], axis=1), tensor(f"{prefix}.{names.down}.weight").T


def _layer_views(
    config: ModelConfig, layer: str, kind: str, tensor: Callable[[str], np.ndarray]
) -> dict[str, View]:
    """The views of one layer's parameters, by path inside the segment."""
    views: dict[str, View] = {
        "layers.attention_norm": tensor(f"{layer}.input_layernorm.weight"),
        "layers.mlp_norm": tensor(f"{layer}.post_attention_layernorm.weight"),
    }
    attention = (_mla_views if config.is_mla else _gqa_views)(config, f"{layer}.self_attn", tensor)
    views |= {f"layers.attention.{path}": view for path, view in attention.items()}
    if kind == "dense":
        views["layers.mlp.gate_up"], views["layers.mlp.down"] = _mlp_views(f"{layer}.mlp", tensor)
        return views
    names = EXPERT_NAMES[config.expert_names]
    block = f"{layer}.{names.block}"
    views["layers.moe.router.weight"] = tensor(f"{block}.gate.weight").T
    if config.router_bias:
        views["layers.moe.router.bias"] = tensor(f"{block}.{names.bias}")
    if config.num_shared_experts:
        gate_up, down = _mlp_views(f"{block}.shared_experts", tensor)
        views["layers.moe.shared.gate_up"], views["layers.moe.shared.down"] = gate_up, down
    if names.fused:
        gate_up = tensor(f"{block}.experts.gate_up_proj")  # [E, 2 F, D]
        gate_up = gate_up.reshape(len(gate_up), 2, -1, gate_up.shape[-1])
        views["experts.w1"] = gate_up.transpose(0, 3, 1, 2)
        views["experts.w2"] = tensor(f"{block}.experts.down_proj").transpose(0, 2, 1)
        return views
    pairs = [_mlp_views(f"{block}.experts.{e}", tensor, names) for e in range(config.num_experts)]
    views["experts.w1"] = Stack([gate_up for gate_up, _ in pairs], axis=0)
    views["experts.w2"] = Stack([down for _, down in pairs], axis=0)
    return views


def _mla_views(
    c: ModelConfig, attention: str, tensor: Callable[[str], np.ndarray]
) -> dict[str, View]:
    views: dict[str, View] = {
        "kv_a": tensor(f"{attention}.kv_a_proj_with_mqa.weight").T,
        "kv_a_norm": tensor(f"{attention}.kv_a_layernorm.weight"),
    }
    by_head = (c.num_heads, c.qk_head_dim, -1)
    if c.q_lora_rank is None:
        q = tensor(f"{attention}.q_proj.weight").reshape(by_head)
        views["q_proj"] = q.transpose(2, 0, 1)
    else:
        views["q_a"] = tensor(f"{attention}.q_a_proj.weight").T
        views["q_a_norm"] = tensor(f"{attention}.q_a_layernorm.weight")
        q = tensor(f"{attention}.q_b_proj.weight").reshape(by_head)
        views["q_b"] = q.transpose(2, 0, 1)
    kv_b = tensor(f"{attention}.kv_b_proj.weight").reshape(c.num_heads, -1, c.kv_lora_rank)
    views["w_uk"] = kv_b[:, : c.qk_nope_head_dim]
    views["w_uv"] = kv_b[:, c.qk_nope_head_dim :].transpose(0, 2, 1)
    out = tensor(f"{attention}.o_proj.weight").reshape(-1, c.num_heads, c.v_head_dim)
    views["out"] = out.transpose(1, 2, 0)
    return views


def _gqa_views(
    c: ModelConfig, attention: str, tensor: Callable[[str], np.ndarray]
) -> dict[str, View]:
    q, k, v = (tensor(f"{attention}.{name}_proj.weight") for name in "qkv")

    def by_head(weight: np.ndarray) -> np.ndarray:  # [heads * d, D] -> [D, heads, d]
        return weight.reshape(-1, c.head_dim, c.hidden_size).transpose(2, 0, 1)

    out = tensor(f"{attention}.o_proj.weight").reshape(-1, c.num_heads, c.head_dim)
    views: dict[str, View] = {
        "q_proj": by_head(q),
        "kv_proj": Stack([by_head(k), by_head(v)], axis=1),
        "out": out.transpose(1, 2, 0),
    }
    if c.qkv_bias:
        q, k, v = (tensor(f"{attention}.{n}_proj.bias").reshape(-1, c.head_dim) for n in "qkv")
        views["q_bias"], views["kv_bias"] = q, Stack([k, v], axis=0)
    for name in ("q_norm", "k_norm") if c.qk_norm is not None else ():
        norm = tensor(f"{attention}.{name}.weight")
        views[name] = norm if c.qk_norm == "head" else norm.reshape(-1, c.head_dim)
    return views


def parameter_path(path: Sequence[str | int]) -> str:
    """The dotted name of a parameter in a flat `nnx.State`."""
    return ".".join(map(str, path))


def export_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """The model's weights with Hugging Face names, shapes and dtypes, ready for safetensors."""
    state = {
        parameter_path(path): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    dtype = state["embedding.weight"].dtype
    tensors = {
        name: np.zeros(shape, np.float32 if name.endswith("correction_bias") else dtype)
        for name, shape in hf_shapes(model.config).items()
    }
    for path, views in parameter_views(model.config, tensors.__getitem__).items():
        values = state[path] if path.startswith("segments") else [state[path]]
        for view, value in zip(views, values, strict=True):
            view[(slice(None),) * value.ndim] = value
    return tensors


class SafetensorsFolder:
    """The tensors of a checkpoint folder (one file, or shards with an index), memory-mapped."""

    def __init__(self, folder: str | Path) -> None:
        """Open every file and read the headers.

        Raises:
            CheckpointError: no files, a file missing from the index's set, or a broken file.
        """
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CheckpointError(f"{index} is not a safetensors index.") from None
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise CheckpointError(f"{folder} lacks {', '.join(missing)}, named in its index.")
            files = [folder / name for name in names]
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"There are no *.safetensors files in {folder}.")
        self.tensors: dict[str, np.ndarray] = {}
        for file in files:
            self.tensors.update(_map_file(file))
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def tensor(self, name: str) -> np.ndarray:
        """The memory-mapped tensor."""
        return self.tensors[name]

    def check(self, config: ModelConfig) -> None:
        """See `check_shapes`."""
        check_shapes(self.shapes, config)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Compare a checkpoint's names and shapes with what the model needs.

    Tolerated surplus: layers past the last one (multi-token prediction), rotary buffers, and a
    tied LM head.

    Raises:
        CheckpointError: names everything missing, surplus or misshapen (the first of many).
    """
    wanted = hf_shapes(config)
    problems = [
        ("missing", [name for name in wanted if name not in shapes]),
        (
            "not part of the model",
            [n for n in shapes if n not in wanted and not _tolerated(n, config)],
        ),
        (
            "of a wrong shape",
            [
                f"{name} {list(shapes[name])} instead of {list(shape)}"
                for name, shape in wanted.items()
                if name in shapes and shapes[name] != shape
            ],
        ),
    ]
    texts = []
    for what, names in problems:
        if names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            texts.append(f"{len(names)} tensors are {what}: {shown}")
    if texts:
        raise CheckpointError(f"The checkpoint does not fit config.json: {'; '.join(texts)}.")


def _tolerated(name: str, config: ModelConfig) -> bool:
    """Surplus tensors that published checkpoints have and that nothing needs."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and parts[2].isdigit():
        return int(parts[2]) >= config.num_layers or name.endswith("rotary_emb.inv_freq")
    return name == "lm_head.weight"


def _map_file(file: Path) -> Mapping[str, np.ndarray]:
    """Memory-map one safetensors file (8 bytes header length, JSON header, data)."""
    size = file.stat().st_size
    broken = CheckpointError(f"{file} is not a complete safetensors file.")
    with file.open("rb") as f:
        head = f.read(8)
        if len(head) < 8:
            raise broken
        (length,) = struct.unpack("<Q", head)
        if 8 + length > size:
            raise broken
        try:
            header: dict[str, dict] = json.loads(f.read(length))
        except ValueError:
            raise broken from None
    if not isinstance(header, dict):
        raise broken
    header.pop("__metadata__", None)
    data = np.memmap(file, np.uint8, "r", offset=8 + length) if header else np.empty(0, np.uint8)
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, (begin, end), shape = entry["dtype"], entry["data_offsets"], entry["shape"]
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"Tensor {name} in {file} has dtype {dtype}; supported are {', '.join(DTYPES)}."
                )
            tensors[name] = data[begin:end].view(DTYPES[dtype]).reshape(shape)
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError):  # cut off, or offsets that fit no shape
            raise broken from None
    return tensors
