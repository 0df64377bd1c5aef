"""The table of supported architectures: what each does differently from its kin.

One row of switches for each `architectures` entry of a `config.json`; `model.config` turns a row
and the file's numbers into a `ModelConfig`. A new architecture that only combines known switches
is a new row and a reference in tests/data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

AttentionKind = Literal["mla", "gqa"]
QKNorm = Literal["head", "projection"]
ExpertNames = Literal["mlp", "mlp_fused", "block_sparse_moe"]


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something this package does not compute; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterMethod:
    """How experts are scored and chosen; the names are DeepSeek's `topk_method`."""

    scoring: Literal["softmax", "sigmoid"]
    group_score: Literal["max", "top2"] = "max"
    grouped: bool = True
    bias: bool = False


ROUTER_METHODS: Mapping[str, RouterMethod] = {
    "greedy": RouterMethod(scoring="softmax", grouped=False),
    "group_limited_greedy": RouterMethod(scoring="softmax"),
    "noaux_tc": RouterMethod(scoring="sigmoid", group_score="top2", bias=True),
}
MISTRAL4_ROUTER = RouterMethod(scoring="softmax", group_score="top2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One row.

    Attributes:
        model_types: `model_type` values that mean this row where `architectures` is missing.
        attention: "mla" caches a latent, "gqa" keys and values (MHA and MQA included).
        rope_interleaved: neighbours rotate together; False pairs halves.
        rope_theta: where the file has none.
        qkv_bias: q, k and v have biases.
        qk_norm: RMSNorm on queries and keys, per head or over the whole projection.
        partial_rotary: only the first part of a head may be rotated.
        router: None for a dense model, a method, or the default name of a choosable method.
        normalize: whether chosen weights are divided by their sum, if the file does not say.
        first_dense: dense layers before the experts, if the file does not say.
        expert_names: where a checkpoint keeps its experts.
        expert_width: the key of an expert's width.
        sliding_window: "key" obeys the key of this name, "flag" only with `use_sliding_window`.
        default_window: the window of a file without the key.
        scaled: MiniCPM's factors on embeddings, residuals and logits.
        options: keys with the only value that is supported (if they are there at all).
    """

    model_types: tuple[str, ...]
    attention: AttentionKind
    rope_interleaved: bool = False
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: QKNorm | None = None
    partial_rotary: bool = False
    router: RouterMethod | str | None = None
    normalize: bool = True
    first_dense: int = 0
    expert_names: ExpertNames = "mlp"
    expert_width: str = "moe_intermediate_size"
    sliding_window: Literal["key", "flag"] | None = None
    default_window: int | None = None
    scaled: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


_UNBIASED = {"attention_bias": False, "mlp_bias": False}
_MINIMAX_OPTIONS = {
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "DeepseekV2ForCausalLM": Architecture(
        model_types=("deepseek_v2",),
        attention="mla",
        rope_interleaved=True,
        router="greedy",
        normalize=False,
        options=_UNBIASED,
    ),
    "DeepseekV3ForCausalLM": Architecture(
        model_types=("deepseek_v3", "kimi_k2"),
        attention="mla",
        rope_interleaved=True,
        router="noaux_tc",
        options=_UNBIASED,
    ),
    "Glm4MoeLiteForCausalLM": Architecture(
        model_types=("glm4_moe_lite",),
        attention="mla",
        rope_interleaved=True,
        router="noaux_tc",
        first_dense=1,
        options=_UNBIASED,
    ),
    "Mistral4ForCausalLM": Architecture(
        model_types=("mistral4",),
        attention="mla",
        rope_interleaved=True,
        router=MISTRAL4_ROUTER,
        expert_names="mlp_fused",
        options=_UNBIASED,
    ),
    "YoutuForCausalLM": Architecture(
        model_types=("youtu",), attention="mla", rope_interleaved=True, options=_UNBIASED
    ),
    "MiniCPM3ForCausalLM": Architecture(
        model_types=("minicpm3",), attention="mla", scaled=True, options=_UNBIASED
    ),
    "LlamaForCausalLM": Architecture(model_types=("llama",), attention="gqa", options=_UNBIASED),
    "MistralForCausalLM": Architecture(
        model_types=("mistral",),
        attention="gqa",
        sliding_window="key",
        default_window=4096,
        options=_UNBIASED,
    ),
    "Qwen2ForCausalLM": Architecture(
        model_types=("qwen2",), attention="gqa", qkv_bias=True, sliding_window="flag"
    ),
    "Qwen3ForCausalLM": Architecture(
        model_types=("qwen3",),
        attention="gqa",
        qk_norm="head",
        sliding_window="flag",
        options=_UNBIASED,
    ),
    "MixtralForCausalLM": Architecture(
        model_types=("mixtral",),
        attention="gqa",
        rope_theta=1e6,
        router=ROUTER_METHODS["greedy"],
        expert_names="block_sparse_moe",
        expert_width="intermediate_size",
        sliding_window="key",
        options=_UNBIASED,
    ),
    "Qwen3MoeForCausalLM": Architecture(
        model_types=("qwen3_moe",),
        attention="gqa",
        qk_norm="head",
        router=ROUTER_METHODS["greedy"],
        normalize=False,
        sliding_window="flag",
        options=_UNBIASED,
    ),
    "MiniMaxM2ForCausalLM": Architecture(
        model_types=("minimax_m2",),
        attention="gqa",
        rope_theta=5e6,
        qk_norm="projection",
        partial_rotary=True,
        router=ROUTER_METHODS["noaux_tc"],
        expert_names="block_sparse_moe",
        expert_width="intermediate_size",
        options={**_UNBIASED, **_MINIMAX_OPTIONS},
    ),
}
"""Supported `architectures` entries."""


def find_architecture(hf: Mapping[str, Any]) -> tuple[str, Architecture]:
    """The name and row of a `config.json`, by `architectures`, else by `model_type`.

    Raises:
        UnsupportedModelError: names what the file asks for and lists what is supported.
    """
    names, model_type = hf.get("architectures") or [], hf.get("model_type")
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    if not names:
        for name, row in ARCHITECTURES.items():
            if model_type in row.model_types:
                return name, row
    found = ", ".join(map(str, names)) or f"model_type {model_type}"
    raise UnsupportedModelError(
        f"Architecture {found} is not supported; supported are {', '.join(ARCHITECTURES)}."
    )
