"""Hugging Face configurations, in both dialects, and what is refused."""

from __future__ import annotations

import json

import pytest

from model.config import ModelConfig, UnsupportedModelError
from model.rope_scaling import yarn_mscale
from tests.fixtures import ARCHITECTURE_FIXTURES, DATA, MLA_FIXTURES


def hf(name="deepseek_v3", **changes):
    data = json.loads((DATA / name / "config.json").read_text())
    return {**data, **changes}


@pytest.mark.parametrize("name", MLA_FIXTURES)
def test_transformers_5_dialect_reads_like_the_published_one(name):
    old = hf(name)
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    scaling = dict(old["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type")
    new["rope_parameters"] = {**scaling, "rope_theta": old["rope_theta"]}
    new["dtype"] = old["torch_dtype"]
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)


def test_published_deepseek_v3_softmax_scale():
    published = hf(
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        rope_scaling={
            "type": "yarn",
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    )
    assert ModelConfig.from_hf(published).attention_scale == pytest.approx(0.13523, abs=1e-5)


def test_layers_are_dense_first_then_moe_and_runs_become_segments():
    config = ModelConfig.from_hf(hf(num_hidden_layers=5, first_k_dense_replace=2))
    assert config.segments == (("dense", 2), ("moe", 3))
    interleaved = ModelConfig.from_hf(
        hf(num_hidden_layers=5, first_k_dense_replace=1, moe_layer_freq=2)
    )
    assert interleaved.layer_kinds == ("dense", "dense", "moe", "dense", "moe")
    assert interleaved.segments == (("dense", 2), ("moe", 1), ("dense", 1), ("moe", 1))


def test_default_rope_has_no_yarn():
    config = ModelConfig.from_hf(hf(rope_scaling=None))
    assert config.rope_scaling is None
    assert config.attention_scale == config.qk_head_dim**-0.5


def test_mscale_counts_only_where_both_are_given():
    scaling = {**hf()["rope_scaling"], "mscale": 0.5}
    del scaling["mscale_all_dim"]
    config = ModelConfig.from_hf(hf(rope_scaling=scaling))
    assert (config.rope_scaling.mscale, config.rope_scaling.mscale_all_dim) == (1.0, 0.0)
    assert yarn_mscale(0.5, 1.0) == 1.0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": None, "model_type": "gru"}, "gru"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size None"),
        ({"index_topk": 2048}, "index_topk"),
        ({"topk_method": "noaux_tc", "scoring_func": "softmax"}, "noaux_tc"),
        ({"n_group": 3}, "n_group 3"),
        ({"n_group": 16}, "groups of one"),
        ({"num_experts_per_tok": 9}, "cannot be chosen from topk_group 2 of n_group 4"),
        ({"topk_group": 5}, "topk_group 5 of n_group 4"),
        ({"rope_scaling": {**hf()["rope_scaling"], "factor": "x"}}, "wrong type"),
        ({"moe_layer_freq": 0}, "wrong type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"hidden_size": "wide", "num_hidden_layers": "two"}, "wrong type"),
    ],
)
def test_unsupported_options_are_named(changes, text):
    with pytest.raises(UnsupportedModelError, match=text):
        ModelConfig.from_hf(hf(**changes))


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("llama", {"attention_bias": True}, "attention_bias true is not supported for Llama"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("kimi_k2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama3", {"rope_scaling": {"type": "llama3", "factor": 2}}, "llama3 needs original"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type"),
        ("minimax_m2", {"attn_type_list": [0, 1]}, "attn_type_list"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func softmax"),
        ("qwen2_yarn", {"rope_scaling": {"type": "ntk"}}, "supported are default, linear"),
    ],
)
def test_unsupported_options_of_other_architectures_are_named(name, changes, text):
    with pytest.raises(UnsupportedModelError, match=text):
        ModelConfig.from_hf(hf(name, **changes))


def test_an_unknown_architecture_is_told_what_there_is():
    with pytest.raises(UnsupportedModelError, match=r"LongcatFlash.*DeepseekV2.*MiniMaxM2"):
        ModelConfig.from_hf(hf(architectures=["LongcatFlashForCausalLM"]))


@pytest.mark.parametrize("name", ["deepseek_v2", "kimi_k2", "minicpm3", "llama", "minimax_m2"])
def test_the_model_type_will_do_without_an_architecture(name):
    assert ModelConfig.from_hf(hf(name, architectures=None)) == ModelConfig.from_hf(hf(name))


@pytest.mark.parametrize("name", ARCHITECTURE_FIXTURES)
def test_both_dialects_say_the_same(name):
    data = hf(name)
    other = {k: v for k, v in data.items() if not k.startswith("rope_") and "dtype" not in k}
    other["rope_interleave"] = data.get("rope_interleave", True)
    if "rope_parameters" in data:
        scaling = dict(data["rope_parameters"])
        other |= {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": data["dtype"]}
        kind = scaling.pop("rope_type")
        other["rope_scaling"] = None if kind == "default" else {**scaling, "type": kind}
    else:
        scaling = dict(data["rope_scaling"] or {"type": "default"})
        kind = scaling.pop("type")
        theta = data["rope_theta"]
        other["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": theta}
        other["dtype"] = data["torch_dtype"]
    assert ModelConfig.from_hf(other) == ModelConfig.from_hf(data)


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("mistral", {}, None),
        ("mistral", {"sliding_window": 64}, 64),
        ("mixtral", {"sliding_window": 64}, 64),
        ("llama", {"sliding_window": 64}, None),  # not a key of Llama's
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 64),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, None),
    ],
)
def test_sliding_windows(name, changes, window):
    assert ModelConfig.from_hf(hf(name, **changes)).sliding_window == window


def test_longrope_is_exact_up_to_its_original_context_only():
    data = hf("minicpm3")
    assert ModelConfig.from_hf(data).max_position_embeddings == 160
    rope = data["rope_parameters"]
    equal = {**rope, "long_factor": rope["short_factor"]}
    assert ModelConfig.from_hf({**data, "rope_parameters": equal}).max_position_embeddings == 512
    with pytest.raises(UnsupportedModelError, match="4 short_factor"):
        ModelConfig.from_hf({**data, "rope_parameters": {**rope, "short_factor": [1.0]}})


def test_a_missing_key_is_named():
    data = hf()
    del data["kv_lora_rank"]
    with pytest.raises(UnsupportedModelError, match="kv_lora_rank"):
        ModelConfig.from_hf(data)


def test_missing_and_broken_files_are_one_sentence(tmp_path):
    with pytest.raises(UnsupportedModelError, match="model path"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UnsupportedModelError, match="not a JSON object"):
        ModelConfig.from_folder(tmp_path)
