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

ARCHITECTURES = {
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
"""Supported `architectures` entries and the model type each stands for."""

LayerKind = Literal["dense", "moe"]


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something this package does not compute; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071), as DeepSeek uses it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One MLA transformer: dense layers and mixture-of-experts layers in any order.

    Attributes:
        q_lora_rank: width of the query latent (Q); None projects queries directly.
        kv_lora_rank: width of the cached latent (C).
        num_experts: routed experts (E) of a MoE layer; 0 in a dense model.
        scoring: router scores, softmax (DeepSeek-V2) or sigmoid (DeepSeek-V3).
        router_bias: whether a correction bias takes part in choosing experts (never in weighing).
        num_groups, topk_groups: experts are chosen inside the best `topk_groups` of `num_groups`.
        group_score: a group's score, its best expert (V2) or the sum of its two best (V3).
        normalize_weights: divide the chosen experts' weights by their sum.
        routed_scaling: factor on the chosen experts' weights.
    """

    vocab_size: int
    hidden_size: int
    layer_kinds: tuple[LayerKind, ...]
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
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
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleaved: bool = True
    yarn: YarnConfig | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    model_type: str = "deepseek_v3"

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key of one head, both parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: latent and shared rope key (C + R)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

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
        """Softmax scale: (nope + rope)^-1/2, times YaRN's m(mscale_all_dim) squared."""
        scale = self.qk_head_dim**-0.5
        if self.yarn is not None and self.yarn.mscale_all_dim:
            scale *= yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2
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
        architecture = _architecture(hf)
        try:
            return _from_deepseek(hf, ARCHITECTURES[architecture])
        except KeyError as error:
            raise UnsupportedModelError(
                f"config.json of this {architecture} lacks the key {error}."
            ) from None
        except (TypeError, AttributeError) as error:
            raise UnsupportedModelError(
                f"config.json has a value of a wrong type: {error}."
            ) from None


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's m(x) = 0.1 x ln(factor) + 1 (1 for factors up to 1)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _architecture(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    found = ", ".join(map(str, names)) or f"model_type {hf.get('model_type')}"
    raise UnsupportedModelError(
        f"Architecture {found} is not supported; supported are {', '.join(ARCHITECTURES)}."
    )


def _from_deepseek(hf: Mapping[str, Any], model_type: str) -> ModelConfig:
    v3 = model_type == "deepseek_v3"
    _refuse_unsupported(hf)
    num_experts = hf.get("n_routed_experts") or 0
    method = hf.get("topk_method") or ("noaux_tc" if v3 else "greedy")
    scoring = hf.get("scoring_func") or ("sigmoid" if v3 else "softmax")
    known = {"greedy": "softmax", "group_limited_greedy": "softmax", "noaux_tc": "sigmoid"}
    if num_experts and known.get(method) != scoring:
        raise UnsupportedModelError(
            f"Router topk_method {method} with scoring_func {scoring} is not supported; supported "
            f"are {', '.join(f'{m} with {s}' for m, s in known.items())}."
        )
    grouped = num_experts > 0 and method != "greedy"
    num_groups = (hf.get("n_group") or 1) if grouped else 1
    if num_experts % num_groups:
        raise UnsupportedModelError(
            f"n_routed_experts {num_experts} is not a multiple of n_group {num_groups}."
        )
    if v3 and num_experts and num_experts // num_groups < 2:
        raise UnsupportedModelError(
            f"n_group {num_groups} leaves groups of one expert; a group's score is the sum of two."
        )
    normalize = bool(hf.get("norm_topk_prob", v3))
    if not v3 and normalize and hf.get("routed_scaling_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            "norm_topk_prob together with routed_scaling_factor is ambiguous for DeepSeek-V2 "
            "(implementations differ), so it is not supported."
        )
    eos = hf.get("eos_token_id")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        layer_kinds=_layer_kinds(hf, num_experts),
        num_heads=hf["num_attention_heads"],
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=hf["kv_lora_rank"],
        qk_nope_head_dim=hf["qk_nope_head_dim"],
        qk_rope_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        intermediate_size=hf["intermediate_size"],
        moe_intermediate_size=hf["moe_intermediate_size"] if num_experts else 0,
        num_experts=num_experts,
        num_experts_per_token=hf["num_experts_per_tok"] if num_experts else 0,
        num_shared_experts=(hf.get("n_shared_experts") or 0) if num_experts else 0,
        scoring=scoring,
        router_bias=v3,
        num_groups=num_groups,
        topk_groups=(hf.get("topk_group") or 1) if grouped else 1,
        group_score="top2" if v3 else "max",
        normalize_weights=normalize,
        routed_scaling=float(hf.get("routed_scaling_factor", 1.0)),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_interleaved=hf.get("rope_interleave", True),
        max_position_embeddings=hf["max_position_embeddings"],
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch."),
        model_type=model_type,
        **_rope(hf),
    )


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    """Options that change the numbers and that nothing here computes."""
    if hf.get("attention_bias"):
        raise UnsupportedModelError("attention_bias true is not supported for MLA models.")
    if hf.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act {hf['hidden_act']} is not supported, only silu.")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        raise UnsupportedModelError(f"Quantised checkpoints ({method}) are not supported yet.")
    if "index_topk" in hf:
        raise UnsupportedModelError("Sparse attention (index_topk) is not supported.")


def _layer_kinds(hf: Mapping[str, Any], num_experts: int) -> tuple[LayerKind, ...]:
    """Dense first layers, then every `moe_layer_freq`-th layer has experts."""
    first_dense = hf.get("first_k_dense_replace", 0)
    freq = hf.get("moe_layer_freq", 1)
    return tuple(
        "moe" if num_experts and i >= first_dense and i % freq == 0 else "dense"
        for i in range(hf["num_hidden_layers"])
    )


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `yarn`, from either dialect."""
    scaling = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = scaling.get("rope_theta", hf.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {"rope_theta": float(theta), "yarn": None}
    if kind != "yarn":
        raise UnsupportedModelError(f"Rope scaling of type {kind} is not supported, only yarn.")
    original = scaling.get("original_max_position_embeddings")
    if original is None:
        raise UnsupportedModelError("YaRN needs original_max_position_embeddings.")
    both_mscales = bool(scaling.get("mscale") and scaling.get("mscale_all_dim"))
    yarn = YarnConfig(
        factor=float(scaling["factor"]),
        original_max_position_embeddings=int(original),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        # transformers uses mscale only where both are given.
        mscale=float(scaling["mscale"]) if both_mscales else 1.0,
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0.0),
    )
    return {"rope_theta": float(theta), "yarn": yarn}
