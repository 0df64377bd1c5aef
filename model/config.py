"""Sizes and hyper-parameters of a model, read from a Hugging Face `config.json`.

Both dialects are understood: published checkpoints (`rope_theta`, `rope_scaling`, `torch_dtype`)
and transformers 5 (`rope_parameters`, `dtype`). Anything this package cannot compute exactly is
refused here, in one sentence, before a weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.architectures import (
    ROUTER_METHODS,
    Architecture,
    AttentionKind,
    ExpertNames,
    QKNorm,
    UnsupportedModelError,
    find_architecture,
)
from model.rope_scaling import (
    RopeScaling,
    YarnConfig,
    read_rope_scaling,
    rope_parameters,
    yarn_mscale,
)

__all__ = ["LayerKind", "ModelConfig", "UnsupportedModelError"]

LayerKind = Literal["dense", "moe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One transformer: dense layers and mixture-of-experts layers in any order.

    Attributes:
        attention: "mla" (multi-head latent attention) or "gqa" (keys and values of
            `num_kv_heads` heads are cached; MHA where that is `num_heads`).
        head_dim: width of a head under GQA; 0 under MLA, which has the five widths below.
        qkv_bias, qk_norm: of GQA; the norm is over each head or over the whole projection.
        rotary_dim: how much of a head is rotated, from its start (MLA: the rope part R).
        q_lora_rank: width of the query latent (Q); None projects queries directly.
        kv_lora_rank: width of the cached latent (C).
        num_experts: routed experts (E) of a MoE layer; 0 in a dense model.
        scoring: router scores, softmax (DeepSeek-V2) or sigmoid (DeepSeek-V3).
        router_bias: whether a correction bias takes part in choosing experts (never in weighing).
        num_groups, topk_groups: experts are chosen inside the best `topk_groups` of `num_groups`.
        group_score: a group's score, its best expert (V2) or the sum of its two best (V3).
        normalize_weights: divide the chosen experts' weights by their sum.
        routed_scaling: factor on the chosen experts' weights.
        expert_names: where a checkpoint keeps its experts, see `model.checkpoint`.
        query_scale_beta, query_scale_period: queries are multiplied by
            1 + beta ln(1 + floor(position / period)), as in Llama 4; no scaling with beta 0.
        embedding_scale, residual_scale, logits_divisor: constant factors (MiniCPM).
        sliding_window: attention is exact for contexts up to this only; None for any.
        max_position_embeddings: the longest context.
        fp8_block: rows and columns of a block in a block-FP8 checkpoint; None: not quantised.
    """

    vocab_size: int
    hidden_size: int
    layer_kinds: tuple[LayerKind, ...]
    num_heads: int
    intermediate_size: int
    rotary_dim: int
    attention: AttentionKind = "mla"
    num_kv_heads: int = 0
    head_dim: int = 0
    qkv_bias: bool = False
    qk_norm: QKNorm | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0
    moe_intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_token: int = 0
    num_shared_experts: int = 0
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    normalize_weights: bool = False
    routed_scaling: float = 1.0
    expert_names: ExpertNames = "mlp"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleaved: bool = True
    rope_scaling: RopeScaling | None = None
    query_scale_beta: float = 0.0
    query_scale_period: int = 1
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    sliding_window: int | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    fp8_block: tuple[int, int] | None = None
    model_type: str = "deepseek_v3"

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def is_mla(self) -> bool:
        return self.attention == "mla"

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key of one head (MLA: both parts)."""
        return self.qk_nope_head_dim + self.rotary_dim if self.is_mla else self.head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers that MLA caches per token and layer: latent and shared rope key (C + R)."""
        return self.kv_lora_rank + self.rotary_dim

    @property
    def shared_intermediate_size(self) -> int:
        """The shared experts are one MLP of this width."""
        return self.num_shared_experts * self.moe_intermediate_size

    @property
    def segments(self) -> tuple[tuple[LayerKind, int], ...]:
        """Runs of equal layers, as (kind, number of layers)."""
        runs: list[tuple[LayerKind, int]] = []
        for kind in self.layer_kinds:
            if runs and runs[-1][0] == kind:
                runs[-1] = (kind, runs[-1][1] + 1)
            else:
                runs.append((kind, 1))
        return tuple(runs)

    @property
    def attention_scale(self) -> float:
        """Softmax scale: (head width)^-1/2; MLA with YaRN times m(mscale_all_dim) squared."""
        scale = self.qk_head_dim**-0.5
        if self.is_mla and isinstance(self.rope_scaling, YarnConfig):
            yarn = self.rope_scaling
            if yarn.mscale_all_dim:
                scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
        return scale

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder/config.json`.

        Raises:
            UnsupportedModelError: the file is missing or broken, or the model is not supported.
        """
        path = Path(folder) / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UnsupportedModelError(f"There is no {path}: is the model path right?") from None
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(f"{path} cannot be read: {error}.") from None
        if not isinstance(data, dict):
            raise UnsupportedModelError(f"{path} is not a JSON object.")
        return cls.from_hf(data)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Translate the contents of a `config.json`.

        Raises:
            UnsupportedModelError: architecture or option not supported, or a key is missing.
        """
        architecture, row = find_architecture(hf)
        try:
            return _translate(hf, architecture, row)
        except KeyError as error:
            raise UnsupportedModelError(
                f"config.json of this {architecture} lacks the key {error}."
            ) from None
        except (TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise UnsupportedModelError(
                f"config.json has a value of a wrong type or size: {error}."
            ) from None


def _translate(hf: Mapping[str, Any], architecture: str, row: Architecture) -> ModelConfig:
    _refuse_unsupported(hf, architecture, row)
    attention = _mla(hf) if row.attention == "mla" else _gqa(hf, row)
    moe = _moe(hf, row)
    rope_scaling, longest = read_rope_scaling(hf, attention["rotary_dim"])
    eos, rope = hf.get("eos_token_id"), rope_parameters(hf)
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        layer_kinds=_layer_kinds(hf, row, moe.get("num_experts", 0)),
        num_heads=hf["num_attention_heads"],
        intermediate_size=hf["intermediate_size"],
        attention=row.attention,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or row.rope_theta),
        rope_interleaved=row.rope_interleaved and bool(hf.get("rope_interleave", True)),
        rope_scaling=rope_scaling,
        sliding_window=_sliding_window(hf, row),
        max_position_embeddings=longest,
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch."),
        fp8_block=_fp8_block(hf),
        model_type=str(hf.get("model_type") or row.model_types[0]),
        **attention,
        **moe,
        **(_scales(hf) if row.scaled else {}),
    )


def _refuse_unsupported(hf: Mapping[str, Any], architecture: str, row: Architecture) -> None:
    """Options that change the numbers and that nothing here computes."""
    for key, only in {**row.options, "hidden_act": "silu"}.items():
        if hf.get(key) is not None and hf[key] != only:
            raise UnsupportedModelError(
                f"{key} {json.dumps(hf[key])} is not supported for {architecture}, only "
                f"{json.dumps(only)}."
            )
    if "index_topk" in hf:
        raise UnsupportedModelError("Sparse attention (index_topk) is not supported.")
    if any(kind != 1 for kind in hf.get("attn_type_list") or ()):
        raise UnsupportedModelError(
            "Linear attention (attn_type_list with anything but 1) is not supported."
        )


def _fp8_block(hf: Mapping[str, Any]) -> tuple[int, int] | None:
    """`weight_block_size` of a block-FP8 checkpoint, None for one that is not quantised."""
    quantization = hf.get("quantization_config")
    if not quantization:
        return None
    method, size = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8":
        raise UnsupportedModelError(
            f"Quantised checkpoints of kind {method} are not supported, only fp8 in blocks."
        )
    if quantization.get("fmt", "e4m3") != "e4m3":
        raise UnsupportedModelError(
            f"FP8 weights in format {quantization['fmt']} are not supported, only e4m3."
        )
    if not isinstance(size, list) or len(size) != 2 or min(map(int, size)) < 1:
        raise UnsupportedModelError(
            f"FP8 weights with weight_block_size {size} are not supported, only with one factor "
            "per block of [rows, columns]."
        )
    return int(size[0]), int(size[1])


def _mla(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The widths of multi-head latent attention, and Llama 4's query scaling."""
    rope, nope = hf["qk_rope_head_dim"], hf["qk_nope_head_dim"]
    keys = rope_parameters(hf)
    partial = keys.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    # Both mean "all of the rope part", which is the whole of its own head or of the key.
    if partial is not None and partial not in (1, rope / (rope + nope)):
        raise UnsupportedModelError(
            f"partial_rotary_factor {partial} is not supported for MLA, whose rope part is "
            "qk_rope_head_dim."
        )
    beta = float(keys.get("llama_4_scaling_beta") or 0.0)
    return {
        "rotary_dim": rope,
        "q_lora_rank": hf.get("q_lora_rank"),
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_nope_head_dim": nope,
        "v_head_dim": hf.get("v_head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "query_scale_beta": beta,
        "query_scale_period": int(keys["original_max_position_embeddings"]) if beta else 1,
    }


def _gqa(hf: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
    """Heads and widths of ordinary attention."""
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
        )
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    partial = rope_parameters(hf).get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    rotary_dim = int(head_dim * (1 if partial is None else partial))
    if partial is None and row.partial_rotary:
        rotary_dim = hf.get("rotary_dim") or head_dim
    if rotary_dim != head_dim and not row.partial_rotary:
        raise UnsupportedModelError(
            f"partial_rotary_factor {partial} is not supported for {row.model_types[0]} models."
        )
    return {
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "qkv_bias": row.qkv_bias,
        "qk_norm": row.qk_norm,
    }


def _moe(hf: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
    """Router and experts; {} for a dense model."""
    keys = ("n_routed_experts", "num_local_experts", "num_experts")
    num_experts = next((hf[key] for key in keys if hf.get(key)), 0)
    if row.router is None or not num_experts:
        return {}
    method = row.router
    if isinstance(method, str):
        name = hf.get("topk_method") or method
        scoring = hf.get("scoring_func")
        if name not in ROUTER_METHODS or scoring not in (None, ROUTER_METHODS[name].scoring):
            known = ", ".join(f"{n} with {m.scoring}" for n, m in ROUTER_METHODS.items())
            raise UnsupportedModelError(
                f"Router topk_method {name} with scoring_func {scoring} is not supported; "
                f"supported are {known}."
            )
        method = ROUTER_METHODS[name]
    elif hf.get("scoring_func") not in (None, method.scoring):
        raise UnsupportedModelError(
            f"scoring_func {hf['scoring_func']} is not supported here, only {method.scoring}."
        )
    num_groups = (hf.get("n_group") or 1) if method.grouped else 1
    if num_experts % num_groups:
        raise UnsupportedModelError(
            f"n_routed_experts {num_experts} is not a multiple of n_group {num_groups}."
        )
    if method.group_score == "top2" and num_experts // num_groups < 2:
        raise UnsupportedModelError(
            f"n_group {num_groups} leaves groups of one expert; a group's score is the sum of two."
        )
    topk_groups = (hf.get("topk_group") or 1) if method.grouped else 1
    reachable = topk_groups * (num_experts // num_groups)
    if topk_groups > num_groups or hf["num_experts_per_tok"] > reachable:
        raise UnsupportedModelError(
            f"num_experts_per_tok {hf['num_experts_per_tok']} experts cannot be chosen from "
            f"topk_group {topk_groups} of n_group {num_groups} groups of "
            f"{num_experts // num_groups} experts."
        )
    normalize = bool(hf.get("norm_topk_prob", row.normalize))
    scaling = float(hf.get("routed_scaling_factor") or 1.0)
    if row.model_types == ("deepseek_v2",) and normalize and scaling != 1.0:
        raise UnsupportedModelError(
            "norm_topk_prob together with routed_scaling_factor is ambiguous for DeepSeek-V2 "
            "(implementations differ), so it is not supported."
        )
    return {
        "num_experts": num_experts,
        "moe_intermediate_size": hf[row.expert_width],
        "num_experts_per_token": hf["num_experts_per_tok"],
        "num_shared_experts": hf.get("n_shared_experts") or 0,
        "scoring": method.scoring,
        "router_bias": method.bias,
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "group_score": method.group_score,
        "normalize_weights": normalize,
        "routed_scaling": scaling,
        "expert_names": row.expert_names,
    }


def _layer_kinds(
    hf: Mapping[str, Any], row: Architecture, num_experts: int
) -> tuple[LayerKind, ...]:
    """Which layers have experts: listed one by one, or dense first ones, or every n-th one."""
    layers, listed = range(hf["num_hidden_layers"]), hf.get("mlp_layer_types")
    if not num_experts:
        return tuple("dense" for _ in layers)
    if listed:
        return tuple("moe" if listed[i] == "sparse" else "dense" for i in layers)
    first_dense = hf.get("first_k_dense_replace", row.first_dense)
    freq, step = hf.get("moe_layer_freq", 1), hf.get("decoder_sparse_step", 1)
    dense_only = hf.get("mlp_only_layers") or ()
    return tuple(
        "moe"
        if i >= first_dense and i % freq == 0 and (i + 1) % step == 0 and i not in dense_only
        else "dense"
        for i in layers
    )


def _sliding_window(hf: Mapping[str, Any], row: Architecture) -> int | None:
    """The window, where any layer has one."""
    if row.sliding_window is None:
        return None
    if row.sliding_window == "flag":
        first = hf.get("max_window_layers")
        if not hf.get("use_sliding_window") or (first or 0) >= hf["num_hidden_layers"]:
            return None
    return hf.get("sliding_window", row.default_window)


def _scales(hf: Mapping[str, Any]) -> dict[str, float]:
    """MiniCPM's factors; its class has defaults, and null means none."""
    layers, width = hf["num_hidden_layers"], hf["hidden_size"]
    depth, base = hf.get("scale_depth", 1.4), hf.get("dim_model_base", 256)
    return {
        "embedding_scale": float(hf.get("scale_emb", 12)),
        "residual_scale": 1.0 if depth is None else depth / math.sqrt(layers),
        "logits_divisor": 1.0 if base is None else width / base,
    }
