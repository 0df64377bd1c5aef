"""FP8 weights give the logits of the dequantised ones, whatever the mesh does to the blocks."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from model.checkpoint import CheckpointError, SafetensorsFolder
from model.config import ModelConfig
from model.formats.fp8 import Fp8Checkpoint, fp8_parameters, is_quantized_by_habit
from model.ops.matrices import unsupported
from model.quantization import BlockFP8
from sharding.layout import make_layout
from sharding.sources import open_source
from sharding.step import ModelSpec
from tests.fixtures import DATA, load_fixture
from tests.fp8 import FP8, dequantize, quantize, write_fp8
from tests.harness import KERNELS, MeshModel, SliceRows

PAGES = list(range(1, 55))
ROUNDING = 2e-4
"""Far below what one wrong factor costs (whole units), above what the order of sums does."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Blocks that divide nothing: partial ends, across heads, across shards."""
    return write_fp8(tmp_path_factory.mktemp("odd"), (12, 20))


def logits_of(model: MeshModel, name: str = "deepseek_v3") -> np.ndarray:
    """A prompt, then three decoded tokens on top, on the first slice."""
    prompt = load_fixture(name).prompts[:6][-1]["prompt"]
    rest = [SliceRows() for _ in range(model.layout.num_slices - 1)]
    results, _ = model.step([SliceRows(chunks=[(prompt[:-3], 0, PAGES)]), *rest])
    rows = [results[0][1][0]]
    for i in range(len(prompt) - 3, len(prompt)):
        results, _ = model.step([SliceRows(decode=[(prompt[i], i, PAGES)]), *rest])
        rows.append(results[0][0])
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("layout", "exchange"),
    [
        ((1, 1, 1), "none"),
        ((4, 2, 2), "none"),
        ((8, 4, 8), "all_to_all"),
        ((8, 8, 4), "none"),
        ((8, 1, 1), "none"),
    ],
)
def test_logits_equal_those_of_the_dequantised_weights(folders, layout, exchange):
    fp8, plain = folders
    wanted = logits_of(MeshModel(plain, layout, exchange))
    kept = MeshModel(fp8, layout, exchange)
    assert any(w.dtype == FP8 for w in kept.weights)
    assert np.abs(logits_of(kept) - wanted).max() < ROUNDING
    loaded = MeshModel(fp8, layout, exchange, keep_fp8=False)
    assert all(w.dtype == np.float32 for w in loaded.weights)
    np.testing.assert_array_equal(logits_of(loaded), wanted)
    # The model computes: quantising moves the fixture's logits, but not far.
    prompt = load_fixture("deepseek_v3").prompts[:6][-1]["id"]
    moved = np.abs(wanted - load_fixture("deepseek_v3").logits[prompt]).max(axis=-1)
    assert 0.05 < np.median(moved) < 4


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("minimax_m2", (8, 2, 4)),
        ("mixtral", (4, 1, 2)),
        ("qwen2", (8, 1, 1)),
        ("kimi_k2", (2, 2, 2)),
    ],
)
def test_other_architectures(tmp_path, name, layout):
    """Experts under other names, biases and norms beside FP8, copied key/value heads."""
    fp8, plain = write_fp8(tmp_path, (12, 20), name)
    kept = MeshModel(fp8, layout)
    assert any(p.dtype == FP8 for p in kept.spec.params)
    wanted = logits_of(MeshModel(plain, layout), name)
    assert np.abs(logits_of(kept, name) - wanted).max() < ROUNDING


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 2)])
def test_kernels_give_the_logits_of_the_definitions(tmp_path, layout):
    """Experts, dense products and routing by groups, the weights staying in FP8."""
    fp8, _ = write_fp8(tmp_path, (16, 32))
    wanted = MeshModel(fp8, layout)
    fp8_weights = wanted.spec.fp8_weights.items()
    taken = [path for path, w in fp8_weights if not unsupported(w.data.shape, w.block)]
    assert {path.rpartition(".")[2] for path in taken} >= {"w1", "w2", "q_a", "gate_up", "down"}
    got = MeshModel(fp8, layout, kernels=KERNELS)
    assert np.abs(logits_of(got) - logits_of(wanted)).max() < ROUNDING


@pytest.mark.parametrize("block", [(128, 128), (16, 16), (5, 7), (1, 64)])
def test_dequantised_parameters_are_exact(tmp_path, block):
    """The device's product is the definition's, bit by bit."""
    fp8, plain = write_fp8(tmp_path, block)
    kept, wanted = MeshModel(fp8, (4, 1, 2)), MeshModel(plain, (4, 1, 2))
    merged = {p.path: value for p, value in zip(wanted.spec.params, wanted.weights, strict=True)}
    pairs = list(zip(kept.spec.params, kept.weights, strict=True))
    checked = 0
    for i, (param, value) in enumerate(pairs):
        if value.dtype == FP8:
            scale, factors = pairs[i + 1]
            assert scale.path == param.path
            value = BlockFP8(
                data=jnp.asarray(np.asarray(value)),
                scale=jnp.asarray(np.asarray(factors)),
                block=scale.block,
                dtype=jnp.dtype(jnp.float32),
                contracted=param.contracted,
            )[...]
            checked += 1
        elif param.block is not None:
            continue
        np.testing.assert_array_equal(
            np.asarray(value), np.asarray(merged[param.path]), err_msg=param.path
        )
    assert checked + len(kept.spec.not_kept) == len(open_source(fp8).fp8)


def test_blocks_cut_to_pieces_are_dequantised(tmp_path):
    fp8, plain = write_fp8(tmp_path, (3, 2))
    kept = MeshModel(fp8, (1, 1, 1))
    assert kept.spec.not_kept
    assert np.abs(logits_of(kept) - logits_of(MeshModel(plain, (1, 1, 1)))).max() < ROUNDING


def test_published_blocks_survive_every_layout():
    """DeepSeek-V3's own sizes: nothing is dequantised, and the factors stay small."""
    hf = {
        **json.loads((DATA / "deepseek_v3" / "config.json").read_text()),
        **{"hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536},
        **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048},
        **{"n_routed_experts": 256, "n_group": 8, "num_hidden_layers": 5},
        **{"vocab_size": 129280, "first_k_dense_replace": 3, "n_shared_experts": 1},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    config = ModelConfig.from_hf(hf)
    names = fp8_parameters(config, is_quantized_by_habit)
    assert len(names) == 2 * 4 + 2 + 4  # q_a q_b kv_a out; dense; shared and routed
    assert names["segments.1.layers.attention.q_b"] == (128, 1, 64)  # heads of 192
    for layout in ((1, 1, 1), (8, 8, 8), (8, 1, 1), (16, 16, 4), (16, 2, 4)):
        kept = ModelSpec(config, jnp.dtype(jnp.bfloat16), make_layout(*layout), names)
        whole = ModelSpec(config, jnp.dtype(jnp.bfloat16), make_layout(*layout))
        assert not kept.not_kept
        factors = sum(np.prod(p.shape) * 4 for p in kept.params if p.block is not None)
        values = sum(np.prod(p.shape) for p in kept.params if p.dtype == FP8)
        assert factors < 0.002 * values
        assert kept.device_bytes() < 0.7 * whole.device_bytes()  # embeddings stay bfloat16


def test_device_bytes_are_what_the_devices_hold(folders):
    model = MeshModel(folders[0], (8, 4, 8))
    held: dict[int, int] = {}
    for array in model.weights:
        for shard in array.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    assert set(held.values()) == {model.spec.device_bytes()}
    plain = MeshModel(folders[1], (8, 4, 8))
    assert model.spec.device_bytes() < 0.6 * plain.spec.device_bytes()


def test_tensors_left_unquantised_are_taken_as_they_come(tmp_path):
    fp8, plain = write_fp8(
        tmp_path, (16, 16), keep_plain=("experts.3.up_proj.weight", "o_proj.weight")
    )
    kept = MeshModel(fp8, (2, 1, 2))
    names = {p.path for p in kept.spec.params if p.dtype == FP8}
    assert not [n for n in names if n.endswith((".out", "experts.w1"))]
    assert [n for n in names if n.endswith("experts.w2")]
    assert np.abs(logits_of(kept) - logits_of(MeshModel(plain, (2, 1, 2)))).max() < ROUNDING


def test_reading_any_slice_equals_the_definition():
    rng = np.random.default_rng(0)
    block = (4, 3)
    weight = rng.standard_normal((10, 11)).astype(np.float32)
    values, factors = quantize(weight, block)

    class Memory:
        shapes = {"w": values.shape, "w_scale_inv": factors.shape}  # noqa: RUF012

        def tensor(self, name):
            return values if name == "w" else factors

    whole = dequantize(values, factors, block)
    lazy = Fp8Checkpoint(Memory(), block).tensor("w")
    np.testing.assert_array_equal(np.asarray(lazy), whole)
    np.testing.assert_array_equal(np.asarray(lazy.T[2:7, 1:]), whole.T[2:7, 1:])
    split = lazy.reshape(5, 2, 11).transpose(2, 0, 1)[3:9, 1:4, :1]
    np.testing.assert_array_equal(
        np.asarray(split), whole.reshape(5, 2, 11).transpose(2, 0, 1)[3:9, 1:4, :1]
    )
    assert np.asarray(lazy[:0]).shape == (0, 11)


def test_factors_that_do_not_fit_are_named(tmp_path):
    fp8, _ = write_fp8(tmp_path, (16, 16))
    name = "model.layers.0.mlp.up_proj.weight"
    scale = f"{name}_scale_inv"

    def without(key):
        return lambda base: base.shapes.pop(key)

    def misshapen(base):
        base.tensors[scale] = np.ones((1, 1), np.float32)

    for change, text in (
        (without(name), "without"),
        (without(scale), f"{name} is FP8"),
        (misshapen, "needs"),
    ):
        base = SafetensorsFolder(fp8)
        change(base)
        with pytest.raises(CheckpointError, match=text):
            Fp8Checkpoint(base, (16, 16))
