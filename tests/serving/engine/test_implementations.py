"""Who runs an operation: flags and sizes into a choice, refusals, and what the log says."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from model.config import ModelConfig
from model.ops.kernels import Kernels
from serving.config import ConfigError, ServerConfig, parse_args
from serving.engine.buckets import Shape
from serving.engine.implementations import LAYER_UNROLL, choose_kernels
from serving.engine.programs import GRAPH_OPTIONS, ProgramFactory
from sharding.layout import make_layout
from tests.fixtures import DATA


def choose(name, platform="cuda", layout=(1, 1, 1), fp8=(), **flags):
    model = ModelConfig.from_folder(DATA / name)
    config = ServerConfig(**flags)
    return choose_kernels(config, model, make_layout(*layout), platform=platform, fp8=fp8)


def test_a_gpu_gets_kernels_and_a_cpu_the_definitions():
    pallas = {field.name for field in dataclasses.fields(Kernels)} - {
        *("unroll", "prefixes", "interpret")
    }
    chosen = choose("deepseek_v2_lite")
    assert all(getattr(chosen, name) == "pallas" for name in pallas)
    assert chosen.unroll == LAYER_UNROLL
    assert choose("deepseek_v2_lite", layer_unroll=5).unroll == 5
    assert choose("deepseek_v2_lite", platform="cpu") == Kernels()


def test_what_has_no_kernel_runs_in_xla_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO, "meshserve.engine"):
        gqa = choose("qwen3_moe")
        groups = choose("deepseek_v3")  # v_head_dim 24; experts in groups
        fp8 = choose("deepseek_v2_lite", fp8=["segments.1.experts.w1", "segments.1.layers.out"])
    assert (gqa.decode_attention, gqa.dense, gqa.grouped_mlp) == ("xla", "xla", "pallas")
    assert (groups.extend_attention, groups.routing) == ("xla", "xla")
    assert (fp8.grouped_mlp, fp8.decode_attention) == ("xla", "pallas")
    for text in ("only multi-head latent", "v_head_dim 24", "by groups", "stay in FP8: xla"):
        assert text in caplog.text


def test_widths_are_those_of_a_device():
    assert choose("deepseek_v2_lite", layout=(2, 1, 1)).grouped_mlp == "pallas"  # 32 / 2
    assert choose("deepseek_v2_lite", layout=(4, 1, 1)).grouped_mlp == "xla"  # 32 / 4


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


def test_cuda_graphs_of_decode_programs_run_side_by_side_on_one_gpu():
    def options(platform, devices, shape):
        factory = object.__new__(ProgramFactory)
        device = SimpleNamespace(platform=platform)
        factory.mesh = SimpleNamespace(devices=np.array([device] * devices), size=devices)
        return factory.options(shape)

    decode = Shape(decode_rows=64, prefill_rows=0, chunks=0)
    extend = Shape(decode_rows=64, prefill_rows=128, chunks=4)
    assert options("cuda", 1, decode) is GRAPH_OPTIONS
    assert options("cuda", 1, extend) is None
    assert options("cuda", 2, decode) is None
    assert options("cpu", 1, decode) is None
