"""Record what transformers computes for tiny random checkpoints, one for each architecture.

`python scripts/make_reference.py [NAME ...]` writes tests/data/NAME: config.json, bfloat16 weights,
logits.npz (float32 logits at every position of each prompt) and expected.json (prompts, 32 greedy
tokens each, the smallest margin, and how far float32 and float64 are apart). Needs torch and
transformers (made with 2.13.0 and 5.23.0); nothing else in the project does. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
PROMPT_LENGTHS = (5, 33, 90)
NEW_TOKENS = 32
MARGIN = 0.02
"""Every greedy step is at least this far from a tie."""
VARIETY = 8
"""Greedy tokens are at least this many different ones."""
NOISE = 1e-4
"""float32 and float64 logits are at most this far apart: no router decision is near a tie."""
COMMON = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
GQA = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 32, "factor": 8.0}
PAIRS = np.arange(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A class of transformers, its configuration, and keys to set in the written config.json."""

    name: str
    keys: Mapping[str, Any]
    written: Mapping[str, Any] = field(default_factory=dict)
    published_dialect: bool = False


RECIPES = {
    "kimi_k2": Recipe(
        name="DeepseekV3",
        keys={
            **COMMON,
            **MLA,
            **EXPERTS,
            "n_routed_experts": 11,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                **YARN,
                "factor": 32.0,
                "beta_fast": 1.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "rope_theta": 50000.0,
            },
        },
        written={
            "model_type": "kimi_k2",
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
        },
        published_dialect=True,
    ),
    "moonlight": Recipe(
        name="DeepseekV3",
        keys={
            **COMMON,
            **MLA,
            **EXPERTS,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.446,
            "first_k_dense_replace": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
        written={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
        published_dialect=True,
    ),
    "glm4_moe_lite": Recipe(
        name="Glm4MoeLite",
        keys={
            **COMMON,
            **MLA,
            **EXPERTS,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "v_head_dim": 20,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "youtu": Recipe(
        name="Youtu",
        keys={
            **COMMON,
            **MLA,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1.6e6},
        },
    ),
    "minicpm3": Recipe(
        name="MiniCPM3",
        keys={
            **COMMON,
            **MLA,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "scale_emb": 4,
            "scale_depth": 1.4,
            "dim_model_base": 96,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": (1 + 0.3 * PAIRS).tolist(),
                "long_factor": (2 + 1.5 * PAIRS).tolist(),
                "original_max_position_embeddings": 160,
            },
        },
    ),
    "mistral4": Recipe(
        name="Mistral4",
        keys={
            **COMMON,
            **MLA,
            **EXPERTS,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": {
                **YARN,
                "rope_theta": 10000.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "llama3": Recipe(
        name="Llama",
        keys={
            **COMMON,
            **GQA,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        published_dialect=True,
    ),
    "mistral": Recipe(
        name="Mistral",
        keys={
            **COMMON,
            **GQA,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen2_yarn": Recipe(
        name="Qwen2",
        keys={
            **COMMON,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rope_parameters": {**YARN, "factor": 4.0, "rope_theta": 1e6},
        },
        published_dialect=True,
    ),
    "mixtral": Recipe(
        name="Mixtral",
        keys={
            **COMMON,
            **GQA,
            "num_hidden_layers": 2,
            "intermediate_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        published_dialect=True,
    ),
    "qwen3_moe": Recipe(
        name="Qwen3Moe",
        keys={
            **COMMON,
            **GQA,
            "moe_intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "minimax_m2": Recipe(
        name="MiniMaxM2",
        keys={
            **COMMON,
            **GQA,
            "num_hidden_layers": 2,
            "intermediate_size": 16,
            "num_local_experts": 12,
            "num_experts_per_tok": 3,
            "rotary_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "partial_rotary_factor": 0.5,
            },
        },
        written={
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "attn_type_list": [1, 1],
            "shared_intermediate_size": 0,
        },
        published_dialect=True,
    ),
}


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights that spread logits and attention: a mistake must show, and no step is a near-tie."""
    rng = torch.Generator().manual_seed(seed)
    config = model.config
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "inv_freq" in name or name.endswith("embed_scale"):
                continue
            normal = torch.randn(tensor.shape, generator=rng)
            uniform = torch.rand(tensor.shape, generator=rng)
            if name.endswith("correction_bias"):
                value = 0.6 * uniform - 0.3
            elif "norm" in name.split(".")[-2]:
                value = 0.6 + 0.8 * uniform
            elif name.endswith(".bias"):
                value = normal
            elif "embed_tokens" in name:
                value = normal
                if config.tie_word_embeddings:
                    # The logits get the scale that a head of its own would have.
                    divisor = getattr(config, "logits_scaling", 1.0)
                    value = 2.5 * divisor / config.hidden_size**0.5 * normal
            else:
                value = normal / tensor.shape[-1] ** 0.5
                gains = {**GAINS, **TIED_GAINS} if config.tie_word_embeddings else GAINS
                value *= next((f for part, f in gains.items() if part in name), 1.0)
            tensor.copy_(value.to(torch.bfloat16))


GAINS = {"lm_head": 2.5, "q_proj": 2.0, "k_proj": 2.0, "q_b_proj": 2.0, "mlp.gate.": 3.0}
"""Standard deviations are 1/sqrt(fan-in), times these by part of the name."""
TIED_GAINS = {"o_proj": 4.0, "down_proj": 4.0}
"""Else the layers hardly move the residual stream and a token's best successor is itself."""


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of published checkpoints instead of those of transformers 5."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope.pop("partial_rotary_factor", None)
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    config["torch_dtype"] = config.pop("dtype")
    return config


def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[np.ndarray, list[int], float]:
    """Logits of the prompt, the greedy tokens after it (with a cache), the smallest margin."""
    ids, cache, tokens, margin, first = torch.tensor([prompt]), None, [], np.inf, None
    with torch.no_grad():
        while len(tokens) < NEW_TOKENS:
            out = model(ids, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0]
            first = logits.float().numpy() if first is None else first
            best = logits[-1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
            ids = torch.tensor([tokens[-1:]])
    return first, tokens, margin


def record(name: str, recipe: Recipe) -> None:
    """Write tests/data/`name`."""
    folder = DATA / name
    config = getattr(transformers, f"{recipe.name}Config")(**recipe.keys)
    model_class = getattr(transformers, f"{recipe.name}ForCausalLM")
    seed = sum(map(ord, name))
    model = model_class(config)
    draw_weights(model, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = model_class.from_pretrained(folder, dtype=torch.float32, **options).eval()
    precise = model_class.from_pretrained(folder, dtype=torch.float64, **options).eval()
    rng = np.random.default_rng(seed)
    prompts, logits = [], {}
    for i, length in enumerate(PROMPT_LENGTHS):
        for _ in range(2000):
            prompt = rng.integers(2, config.vocab_size, length).tolist()
            first, tokens, margin = greedy(model, prompt)
            if margin < MARGIN or len(set(tokens)) < VARIETY:
                continue
            exact, same, _ = greedy(precise, prompt)
            noise = float(np.abs(first - exact).max())
            if noise < NOISE and same == tokens:
                break
        else:
            raise RuntimeError(f"{name}: no prompt of {length} tokens without a near-tie or a loop")
        entry = {"id": f"p{i:02d}", "prompt": prompt, "tokens": tokens}
        prompts.append({**entry, "margin": round(margin, 4), "noise": noise})
        logits[f"p{i:02d}"] = first
    np.savez_compressed(folder / "logits.npz", **logits)
    made = {"torch": torch.__version__, "transformers": transformers.__version__, "seed": seed}
    expected = {"made": made, "class": model_class.__name__, "prompts": prompts}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    written = json.loads((folder / "config.json").read_text())
    if recipe.published_dialect:
        written = as_published(written)
    written.update(recipe.written)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    spread = np.concatenate(list(logits.values())).std()
    print(f"{name}: {size >> 10} KiB, logits std {spread:.2f}, {[p['margin'] for p in prompts]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    names = parser.parse_args().names or list(RECIPES)
    if unknown := [name for name in names if name not in RECIPES]:
        print(f"There is no {', '.join(unknown)}; there are {', '.join(RECIPES)}.", file=sys.stderr)
        return 2
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in names:
        record(name, RECIPES[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
