"""--dtype and --kv-cache-dtype: what each costs in accuracy, feeding the reference's tokens."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from model.quantization import FP8, saturating_cast
from tests.fixtures import load_fixture
from tests.harness import MeshModel, SliceRows
from tests.serving.engine.engines import finish, fixture_engine, request, uncompiled

PAGES = np.split(np.arange(1, 161), 4)
"""Of four sequences."""


def teacher_forced(name: str, kv_dtype: str) -> tuple[float, float]:
    """Share of the reference's tokens that are the best one, and the median of the largest error
    in a prompt position's logits. A prompt a step, then every answer token as decode row."""
    fixture = load_fixture(name)
    prompts = fixture.prompts[2:6]
    model = MeshModel(fixture.folder, (1, 1, 1), kv_dtype=kv_dtype, decode_rows=len(prompts))
    assert model.kv.dtype == jnp.dtype(kv_dtype)
    best, errors = [], []
    for prompt, pages in zip(prompts, PAGES, strict=True):
        results, _ = model.step([SliceRows(chunks=[(prompt["prompt"], 0, pages)])])
        logits = results[0][1][0]
        errors.append(np.abs(logits - fixture.logits[prompt["id"]]).max(axis=-1))
        best.append([int(logits[-1].argmax())])
    for i in range(len(prompts[0]["tokens"]) - 1):
        rows = [
            (p["tokens"][i], len(p["prompt"]) + i, pages)
            for p, pages in zip(prompts, PAGES, strict=True)
        ]
        results, _ = model.step([SliceRows(decode=rows)])
        for found, logits in zip(best, results[0][0], strict=True):
            found.append(int(logits.argmax()))
    equal = np.array(best) == np.array([p["tokens"] for p in prompts])
    return float(np.mean(equal)), float(np.median(np.concatenate(errors)))


@pytest.mark.parametrize(
    ("name", "kv_dtype", "least_equal", "most_error"),
    [
        ("deepseek_v2_lite", "float32", 1.0, 1e-4),
        ("deepseek_v2_lite", "bfloat16", 0.9, 0.1),
        ("deepseek_v2_lite", "float8_e4m3fn", 0.75, 1.0),
        ("deepseek_v3", "bfloat16", 0.75, 0.5),
        ("deepseek_v3", "float8_e4m3fn", 0.6, 3.0),
    ],
)
def test_kv_cache_dtypes_under_teacher_forcing(name, kv_dtype, least_equal, most_error):
    equal, error = teacher_forced(name, kv_dtype)
    print(f"{name} {kv_dtype}: {equal:.3f} of the tokens equal, median error {error:.4f}")
    assert equal >= least_equal
    assert error <= most_error


def test_a_pool_of_one_byte_numbers_has_pages_of_a_quarter():
    engines = {d: fixture_engine(kv_cache_dtype=d) for d in ("auto", "fp8_e4m3")}
    with uncompiled():
        engines["bfloat16"] = fixture_engine(kv_cache_dtype="bfloat16")
    sizes = {d: e.runner.page_bytes for d, e in engines.items()}
    assert sizes["auto"] == 2 * sizes["bfloat16"] == 4 * sizes["fp8_e4m3"]
    for engine in engines.values():
        runner = engine.runner
        assert runner.kv_bytes_per_device() == runner.num_pages * runner.page_bytes
    prompt = load_fixture("deepseek_v3").prompts[3]
    tokens = finish(engines["fp8_e4m3"], [request("a", prompt["prompt"])])["a"]
    assert len(tokens) == 32
    assert finish(engines["auto"], [request("a", prompt["prompt"])])["a"] == prompt["tokens"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_run(dtype):
    engine = fixture_engine("deepseek_v2_lite", dtype=dtype, tp=2, dp=2, ep=2)
    assert {str(w.dtype) for w in engine.runner.weights} == {dtype, "float32"}
    prompt = load_fixture("deepseek_v2_lite").prompts[3]
    tokens = finish(engine, [request("a", prompt["prompt"])])["a"]
    agree = [a == b for a, b in zip(tokens, prompt["tokens"], strict=True)]
    assert agree[0]


def test_too_large_numbers_saturate():
    x = jnp.array([1e6, -1e6, 448.0, 1.0])
    assert saturating_cast(x, FP8).astype(jnp.float32).tolist() == [448.0, -448.0, 448.0, 1.0]
    assert saturating_cast(x, jnp.float32) is not None
