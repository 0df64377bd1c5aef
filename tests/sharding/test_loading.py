"""Weights on the mesh: padding of sizes that do not divide, dummy weights, replicas read once."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.checkpoint import SafetensorsFolder, hf_shapes
from model.config import ModelConfig
from model.heads import head_slots
from sharding import loading
from sharding.layout import make_layout
from sharding.mesh import make_mesh
from sharding.step import ModelSpec
from tests.fixtures import DATA

FOLDER = DATA / "deepseek_v3"


def spec_for(layout, config=None):
    config = config or ModelConfig.from_folder(FOLDER)
    return ModelSpec(config, jnp.dtype(jnp.float32), make_layout(*layout))


def by_path(spec, weights):
    return {p.path: np.asarray(w) for p, w in zip(spec.params, weights, strict=True)}


@pytest.mark.parametrize("whole_stack_bytes", [0, 1 << 30])
def test_uneven_sizes_are_padded_with_zeros(whole_stack_bytes, monkeypatch):
    monkeypatch.setattr(loading, "WHOLE_STACK_BYTES", whole_stack_bytes)
    config = dataclasses.replace(
        ModelConfig.from_folder(FOLDER),
        num_heads=3,
        vocab_size=509,
        intermediate_size=91,
        num_experts=13,
        num_groups=1,
        moe_intermediate_size=31,
    )
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in hf_shapes(config).items()
    }
    loaded = {}
    for layout in ((1, 1, 1), (8, 2, 4)):
        spec = spec_for(layout, config)
        weights = loading.load_weights(spec, make_mesh(spec.layout), tensors.__getitem__)
        loaded[layout] = by_path(spec, weights)
    for path, whole in loaded[1, 1, 1].items():
        padded = loaded[8, 2, 4][path]
        inside = tuple(slice(0, n) for n in whole.shape)
        np.testing.assert_array_equal(padded[inside], whole, err_msg=path)
        assert np.abs(padded).sum() == pytest.approx(np.abs(whole).sum(), rel=1e-4)
    assert loaded[8, 2, 4]["segments.1.experts.w1"].shape[1] == 16
    assert loaded[8, 2, 4]["segments.0.layers.attention.out"].shape[1] == 4


def test_every_byte_of_a_shard_is_read_once():
    spec = spec_for((8, 8, 8))
    tensors = SafetensorsFolder(FOLDER).tensors
    reads = []

    class Counting(np.ndarray):
        def __getitem__(self, index):
            reads.append(index)
            return np.asarray(self)[index]

    param = next(p for p in spec.params if p.path == "norm")
    view = np.asarray(tensors["model.norm.weight"]).view(Counting)
    loading._load_param(param, [view], make_mesh(spec.layout))
    assert len(reads) == 1  # replicated on eight devices


@pytest.fixture
def usual_code(monkeypatch):
    """The code that XLA generates for users: the older code generators, which conftest.py chooses,
    let a number's last bit depend on how a loop is cut."""
    usual = {"xla_backend_extra_options": ""}
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=usual))


@pytest.mark.usefixtures("usual_code")
@pytest.mark.parametrize("devices", [2, 8])
def test_dummy_heads_are_copied_and_padded_as_loaded_ones(devices):
    """3 KV heads and 6 query heads, with a norm over all of them."""
    config = ModelConfig.from_folder(DATA / "minimax_m2")
    specs = [spec_for((n, 1, 1), config) for n in (1, devices)]
    whole, cut = (by_path(s, loading.draw_weights(s, make_mesh(s.layout), seed=3)) for s in specs)
    slots = head_slots(6, 3, devices)
    for path, heads, axis in (("q_proj", slots.query, 2), ("kv_proj", slots.kv, 3)):
        want = np.moveaxis(whole[f"segments.0.layers.attention.{path}"], axis, 0)
        got = np.moveaxis(cut[f"segments.0.layers.attention.{path}"], axis, 0)
        assert len(got) == len(heads)
        for head, values in zip(heads, got, strict=True):
            np.testing.assert_array_equal(values, want[head] if head >= 0 else 0)


@pytest.mark.usefixtures("usual_code")
def test_dummy_weights_do_not_depend_on_the_mesh():
    drawn = []
    for layout in ((1, 1, 1), (8, 4, 4)):
        spec = spec_for(layout)
        drawn.append(by_path(spec, loading.draw_weights(spec, make_mesh(spec.layout), seed=3)))
    for path, value in drawn[0].items():
        np.testing.assert_array_equal(value, drawn[1][path], err_msg=path)
    assert (drawn[0]["norm"] == 1).all()
    assert (drawn[0]["segments.1.layers.moe.router.bias"] == 0).all()
    router = drawn[0]["segments.1.layers.moe.router.weight"]
    assert router.std() == pytest.approx(0.02, rel=0.1)
    layers = drawn[0]["segments.1.experts.w1"]
    assert not (layers[0] == layers[1]).any()
