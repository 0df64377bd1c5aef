"""The whole-sequence forward pass: equal to the fixtures, differentiable."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import reference
from model.checkpoint import SafetensorsFolder
from model.config import ModelConfig
from model.transformer import Transformer
from sharding.layout import make_layout
from sharding.loading import load_weights
from sharding.mesh import make_mesh
from sharding.step import ModelSpec
from tests.fixtures import (
    ARCHITECTURE_FIXTURES,
    GQA_FIXTURES,
    LOGIT_TOLERANCE,
    MLA_FIXTURES,
    load_fixture,
)


def load(folder, **changes):
    config = dataclasses.replace(ModelConfig.from_folder(folder), **changes)
    layout = make_layout(1)
    spec = ModelSpec(config, jnp.dtype(jnp.float32), layout)
    tensors = SafetensorsFolder(folder).tensors
    return spec.merge(load_weights(spec, make_mesh(layout), tensors.__getitem__))


def forward_of(model):
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: reference.forward(nnx.merge(graph, state), tokens))
    return lambda tokens: forward(state, jnp.array([tokens]))


@pytest.mark.parametrize("name", [*MLA_FIXTURES, *GQA_FIXTURES, *ARCHITECTURE_FIXTURES])
def test_logits_equal_the_reference(name):
    fixture = load_fixture(name)
    model = load(fixture.folder)
    forward = forward_of(model)
    for prompt in (fixture.prompts[1], fixture.prompts[-2]):
        logits, counts = forward(prompt["prompt"])
        assert np.abs(logits[0] - fixture.logits[prompt["id"]]).max() < LOGIT_TOLERANCE
        used = len(prompt["prompt"]) * model.config.num_experts_per_token
        assert (np.asarray(counts).sum(axis=1) == used).all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("kimi_k2", {"rope_scaling": None}),
        ("moonlight", {"routed_scaling": 1.0}),
        ("glm4_moe_lite", {"normalize_weights": False}),
        ("youtu", {"rope_interleaved": False}),
        ("minicpm3", {"rope_interleaved": True}),
        ("minicpm3", {"rope_scaling": None}),
        ("minicpm3", {"embedding_scale": 1.0}),
        ("minicpm3", {"residual_scale": 1.0}),
        ("minicpm3", {"logits_divisor": 1.0}),
        ("mistral4", {"query_scale_beta": 0.0}),
        ("mistral4", {"group_score": "max"}),
        ("mistral4", {"scoring": "sigmoid"}),
        ("llama3", {"rope_scaling": None}),
        ("qwen2_yarn", {"rope_scaling": None}),
        ("mixtral", {"normalize_weights": False}),
        ("qwen3_moe", {"qk_norm": None}),
        ("minimax_m2", {"rotary_dim": 16}),
        ("minimax_m2", {"rope_interleaved": True}),
        ("minimax_m2", {"scoring": "softmax"}),
    ],
)
def test_a_switch_left_out_cannot_hide_in_the_tolerance(name, changes):
    fixture = load_fixture(name)
    prompt = fixture.prompts[-1]
    logits, _ = forward_of(load(fixture.folder, **changes))(prompt["prompt"])
    assert np.abs(logits[0] - fixture.logits[prompt["id"]]).max() > 20 * LOGIT_TOLERANCE


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax_m2", "qwen2"])
def test_every_weight_gets_a_gradient(name):
    config = ModelConfig.from_folder(load_fixture(name).folder)
    model = Transformer(config, jnp.float32, nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)
    tokens = jnp.arange(64).reshape(2, 32)

    def loss(state):
        logits, _ = reference.forward(nnx.merge(graph, state), tokens)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], 2)
        return -picked.mean()

    grads = jax.jit(jax.grad(loss))(state)
    for path, grad in nnx.to_flat_state(grads):
        if path[-1] != "bias":  # it chooses experts and has no gradient, by design
            assert float(jnp.abs(grad[...]).max()) > 0, path
