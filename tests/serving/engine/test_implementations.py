"""Who runs an operation: flags and sizes into a choice, refusals, and what the log says."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.formats.fp8 import fp8_parameters, is_quantized_by_habit
from model.ops.dense.hopper_fp8 import unsupported
from model.ops.kernels import Kernels
from scripts.bench_offline import SHAPES
from serving.config import ConfigError, ServerConfig, parse_args
from serving.engine.buckets import Shape
from serving.engine.implementations import LAYER_UNROLL, choose_kernels
from serving.engine.programs import (
    GRAPH_OPTIONS,
    OVERLAP_OPTIONS,
    PREFILL_OPTIONS,
    ProgramFactory,
)
from sharding.layout import make_layout
from sharding.step import ModelSpec
from tests.fixtures import DATA
from tests.fp8 import abstract_fp8


def choose(
    name,
    platform="cuda",
    layout=(1, 1, 1),
    fp8=None,
    capability="8.0",
    dtype="bfloat16",
    kv_dtype=None,
    sizes=(),
    **flags,
):
    model = dataclasses.replace(ModelConfig.from_folder(DATA / name), **dict(sizes))
    return choose_kernels(
        ServerConfig(**flags),
        model,
        make_layout(*layout),
        platform=platform,
        capability=capability,
        dtype=dtype,
        kv_dtype=kv_dtype,
        fp8=fp8,
    )


def choose_for(config, layout, fp8, capability="9.0", **flags):
    """Of a model on GPUs that has these weights in FP8."""
    return choose_kernels(
        *(ServerConfig(**flags), config, layout),
        platform="cuda",
        capability=capability,
        dtype="bfloat16",
        fp8=fp8,
    )


def test_a_gpu_gets_kernels_and_a_cpu_the_definitions():
    pallas = {field.name for field in dataclasses.fields(Kernels)} - {
        *("unroll", "prefixes", "interpret")
    }
    chosen = choose("deepseek_v2_lite")
    assert all(getattr(chosen, name) == "pallas" for name in pallas)
    assert chosen.unroll == LAYER_UNROLL
    assert choose("deepseek_v2_lite", layer_unroll=5).unroll == 5
    assert choose("deepseek_v2_lite", platform="cpu") == Kernels()


def test_hopper_gpus_have_an_extend_kernel_for_heads_of_its_sizes(caplog):
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "rotary_dim": 64}
    sizes |= {"v_head_dim": 128}
    with caplog.at_level(logging.INFO, "meshserve.engine"):
        taken = choose("deepseek_v2_lite", capability="9.0", sizes=sizes)
        others = [
            choose("deepseek_v2_lite", capability="9.0"),  # qk_rope_head_dim 16
            choose("deepseek_v2_lite", capability="9.0", sizes=sizes | {"v_head_dim": 256}),
            choose("deepseek_v2_lite", capability="9.0", sizes=sizes, dtype="float32"),
            choose("deepseek_v2_lite", capability="10.0", sizes=sizes),
        ]
    assert dataclasses.replace(taken, extend_attention="pallas") == others[0]
    assert taken.extend_attention == "hopper"
    by_name = choose("deepseek_v2_lite", capability="9.0", sizes=sizes, attention_backend="pallas")
    assert by_name.extend_attention == "pallas"
    assert {other.extend_attention for other in others} == {"pallas"}
    for text in ("qk_rope_head_dim", "v_head_dim 256", "float32 is no", "capability 10.0"):
        assert text in caplog.text


def test_hopper_gpus_have_a_decode_kernel_for_many_heads(caplog):
    sizes = {"kv_lora_rank": 512, "rotary_dim": 64, "num_heads": 128}
    with caplog.at_level(logging.INFO, "meshserve.engine"):
        taken = choose("deepseek_v2_lite", capability="9.0", sizes=sizes)
        cut = [
            choose("deepseek_v2_lite", layout=(4, 1, 1), capability="9.0", sizes=sizes),
            choose("deepseek_v2_lite", layout=(8, 8, 8), capability="9.0", sizes=sizes),
        ]
        others = [
            choose("deepseek_v2_lite", layout=(8, 1, 1), capability="9.0", sizes=sizes),
            choose("deepseek_v2_lite", capability="9.0", sizes=sizes, kv_dtype="float8_e4m3fn"),
            choose("deepseek_v2_lite", capability="9.0", sizes=sizes, page_size=24),
            choose("deepseek_v2_lite", capability="10.0", sizes=sizes),
            # Its bits depend on who decodes beside.
            choose(
                "deepseek_v2_lite",
                capability="9.0",
                sizes=sizes,
                enable_deterministic_inference=True,
            ),
            choose("deepseek_v2_lite", capability="9.0", sizes=sizes, attention_backend="pallas"),
        ]
    assert {chosen.decode_attention for chosen in (taken, *cut)} == {"hopper"}
    assert {other.decode_attention for other in others} == {"pallas"}
    for text in ("of 16 heads", "cache of float8_e4m3fn", "pages of 24", "capability 10.0"):
        assert text in caplog.text


def test_what_has_no_kernel_runs_in_xla_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO, "meshserve.engine"):
        gqa = choose("qwen3_moe")
        v3 = choose("deepseek_v3")  # v_head_dim 24
        odd = choose(
            "deepseek_v2_lite",
            fp8={
                "segments.1.experts.w1": abstract_fp8((26, 64, 64, 2, 32), (1, 12, 1, 20)),
                "segments.1.layers.attention.out": abstract_fp8((26, 4, 16, 64), (1, 4, 20)),
            },
        )
    assert (gqa.decode_attention, gqa.dense, gqa.grouped_mlp) == ("xla", "xla", "pallas")
    assert (v3.extend_attention, v3.routing) == ("xla", "pallas")
    assert (odd.grouped_mlp, odd.decode_attention) == ("xla", "pallas")
    for text in (
        *("only multi-head latent", "v_head_dim 24"),
        *("FP8 blocks of 1x12x1x20", "layers.attention.out: xla, no kernel for it: FP8 blocks"),
    ):
        assert text in caplog.text


def published_fp8(layers, layout):
    """DeepSeek-V3's own configuration, cut to some layers, and its FP8 parameters on a device."""
    config = ModelConfig.from_hf(SHAPES["deepseek-v3"] | {"num_hidden_layers": layers})
    names = fp8_parameters(config, is_quantized_by_habit)
    return config, ModelSpec(config, jnp.dtype("bfloat16"), layout, names).fp8_weights


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 4, 4), (8, 8, 8), (4, 1, 1), (8, 4, 8)])
def test_published_fp8_blocks_get_kernels(caplog, sizes):
    layout = make_layout(*sizes)
    config, blocks = published_fp8(4, layout)
    assert len(blocks) == 2 * 4 + 2 + 4
    with caplog.at_level(logging.INFO, "meshserve.engine"):
        chosen = choose_for(config, layout, blocks, capability="8.0")
    assert {chosen.grouped_mlp, chosen.dense, chosen.routing, chosen.extend_attention} == {"pallas"}
    assert "no kernel" not in caplog.text


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 4, 4), (8, 8, 8), (4, 1, 1), (8, 4, 8)])
def test_published_fp8_experts_get_kernels_of_their_own_on_hopper_gpus(caplog, sizes):
    layout = make_layout(*sizes)
    config, blocks = published_fp8(5, layout)

    def experts(fp8, **given):
        return choose_for(config, layout, fp8, **given).grouped_mlp

    with caplog.at_level(logging.INFO, "meshserve.engine"):
        assert experts(blocks) == "hopper"
        assert "is copied before it is read" not in caplog.text
        down_only = {path: block for path, block in blocks.items() if not path.endswith("w1")}
        assert experts(down_only) == "pallas"
        interleaved = blocks | {"segments.3.experts.w1": blocks["segments.1.experts.w1"]}
        assert experts(interleaved) == "pallas"
    assert "of segments.1.experts only w2 is FP8" in caplog.text
    assert "of segments.3.experts only w1 is FP8" in caplog.text
    assert experts(blocks, capability="8.9") == "pallas"
    assert experts(blocks, moe_runner_backend="pallas") == "pallas"


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (8, 8, 8), (8, 1, 1), (16, 16, 16)])
def test_published_fp8_products_have_a_kernel_of_their_own_on_hopper_gpus(caplog, sizes):
    """It reads stacks of any size, among them those of 61 layers that others do not reach."""
    layout = make_layout(*sizes)
    config, fp8 = published_fp8(61, layout)
    dense = {path: weight for path, weight in fp8.items() if ".experts." not in path}
    taken = [path for path, w in dense.items() if unsupported(w, w.contracted[0]) is None]
    assert {path.rpartition(".")[2] for path in taken} == {"q_b", "out", "gate_up", "down"}
    assert {path.rpartition(".")[2] for path in dense.keys() - taken} == {"q_a", "kv_a"}
    with caplog.at_level(logging.INFO, "meshserve.engine"):
        assert choose_for(config, layout, fp8).dense == "hopper"
        assert (
            choose_for(config, layout, fp8, enable_deterministic_inference=True).dense == "hopper"
        )
    assert "is copied before it is read" not in caplog.text
    assert "products with" not in caplog.text
    assert choose_for(config, layout, fp8, capability="8.9").dense == "pallas"
    assert choose_for(config, layout, fp8, attention_backend="pallas").dense == "pallas"
    assert choose_for(config, layout, {}).dense == "pallas"


def test_products_that_stay_with_the_kernel_for_all_gpus_are_named(caplog):
    layout = make_layout(32, 1, 1)  # cuts what down contracts into blocks of 64
    config, fp8 = published_fp8(5, layout)
    with caplog.at_level(logging.INFO, "meshserve.engine"):
        assert choose_for(config, layout, fp8).dense == "hopper"
    lines = [r.message for r in caplog.records if r.message.startswith("products with")]
    assert len(lines) == 2
    for path, line in zip(("0.layers.mlp.down", "1.layers.moe.shared.down"), lines, strict=True):
        assert f"segments.{path}: pallas" in line
        assert "FP8 blocks of 128x64" in line


def test_stacks_that_kernels_do_not_reach_are_named(caplog):
    layout = make_layout(4, 4, 4)
    config, blocks = published_fp8(5, layout)  # 2 MoE layers: 64 experts' w1 are 3.5 GiB
    with caplog.at_level(logging.INFO, "meshserve.engine"):
        choose_for(config, layout, blocks, capability="8.0")
    assert caplog.text.count("is copied before it is read") == 1
    assert "segments.1.experts.w1: kernels reach no FP8 weights of 3.5 GiB" in caplog.text


def test_widths_are_those_of_a_device():
    assert choose("deepseek_v2_lite", layout=(2, 1, 1)).grouped_mlp == "pallas"  # 32 / 2
    assert choose("deepseek_v2_lite", layout=(4, 1, 1)).grouped_mlp == "xla"  # 32 / 4


def test_hopper_gpus_get_kernels_of_their_own_for_experts_of_many_rows(caplog):
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256}

    def grouped(capability="9.0", **given):
        return choose("deepseek_v2_lite", capability=capability, sizes=sizes, **given).grouped_mlp

    with caplog.at_level(logging.INFO, "meshserve.engine"):
        taken = [grouped(), grouped(layout=(2, 1, 1))]  # expert width 256 / 2
        others = [
            grouped(layout=(4, 1, 1)),
            grouped(dtype="float32"),
            grouped(capability="10.0"),
            grouped(
                fp8={
                    "segments.1.experts.w1": abstract_fp8(
                        (1, 8, 512, 2, 256), (1, 128, 1, 128), (1, 2)
                    )
                }
            ),
        ]
        assert grouped(moe_runner_backend="xla") == "xla"
        assert grouped(moe_runner_backend="pallas") == "pallas"
    assert (set(taken), set(others)) == ({"hopper"}, {"pallas"})
    for text in ("expert width 64", "not float32", "capability 10.0", "only w1 is FP8"):
        assert text in caplog.text


@pytest.mark.parametrize("options", [GRAPH_OPTIONS, OVERLAP_OPTIONS, PREFILL_OPTIONS])
def test_xla_knows_what_it_is_told(options):
    jax.jit(lambda x: x + 1).lower(1.0).compile(options)  # unknown ones raise on every platform


def test_a_back_end_asked_for_by_name_is_taken_or_refused():
    asked = choose("deepseek_v2_lite", moe_runner_backend="xla", attention_backend="pallas")
    assert (asked.grouped_mlp, asked.routing, asked.dense) == ("xla", "xla", "pallas")
    with pytest.raises(ConfigError, match=r"--attention-backend pallas: .* this is cpu"):
        choose("deepseek_v2_lite", platform="cpu", attention_backend="pallas")
    with pytest.raises(ConfigError, match=r"--moe-runner-backend pallas: .* multiples of 16"):
        choose("deepseek_v2_lite", layout=(4, 1, 1), moe_runner_backend="pallas")


def test_deterministic_inference_keeps_the_extend_definition():
    chosen = choose("deepseek_v2_lite", enable_deterministic_inference=True)
    assert dataclasses.replace(chosen, extend_attention="pallas") == choose("deepseek_v2_lite")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--moe-runner-backend", "deep_gemm"), ("--attention-backend", "flashmla")],
)
def test_other_engines_names_mean_the_kernels_and_say_so(flag, value):
    config = parse_args([flag, value, "--tp", "1"])
    assert getattr(config, flag[2:].replace("-", "_")) == "pallas"
    assert any(value in warning and "pallas" in warning for warning in config.warnings)


def test_xla_is_told_what_suits_the_program_and_the_number_of_gpus():
    def options(platform, devices, shape):
        factory = object.__new__(ProgramFactory)
        device = SimpleNamespace(platform=platform)
        factory.mesh = SimpleNamespace(devices=np.array([device] * devices), size=devices)
        return factory.options(shape)

    decode = Shape(decode_rows=64, prefill_rows=0, chunks=0)
    extend = Shape(decode_rows=64, prefill_rows=128, chunks=4)
    assert options("cuda", 1, decode) == GRAPH_OPTIONS
    assert options("cuda", 1, extend) == GRAPH_OPTIONS | PREFILL_OPTIONS
    assert options("cuda", 2, decode) is None
    assert options("cuda", 2, extend) == PREFILL_OPTIONS
    cut = dataclasses.replace(extend, cut=96)
    assert options("cuda", 2, cut) == OVERLAP_OPTIONS | PREFILL_OPTIONS
    assert options("cpu", 1, decode) is None
