"""The whole-sequence forward pass: equal to the fixtures, differentiable."""

from __future__ import annotations

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
from tests.fixtures import LOGIT_TOLERANCE, MLA_FIXTURES, load_fixture


def load(folder):
    config = ModelConfig.from_folder(folder)
    layout = make_layout(1)
    spec = ModelSpec(config, jnp.dtype(jnp.float32), layout)
    tensors = SafetensorsFolder(folder).tensors
    return spec.merge(load_weights(spec, make_mesh(layout), tensors.__getitem__))


@pytest.mark.parametrize("name", MLA_FIXTURES)
def test_logits_equal_the_reference(name):
    fixture = load_fixture(name)
    model = load(fixture.folder)
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: reference.forward(nnx.merge(graph, state), tokens))
    for prompt in (fixture.prompts[3], fixture.prompts[6]):
        logits, counts = forward(state, jnp.array([prompt["prompt"]]))
        assert np.abs(logits[0] - fixture.logits[prompt["id"]]).max() < LOGIT_TOLERANCE
        used = len(prompt["prompt"]) * model.config.num_experts_per_token
        assert (np.asarray(counts).sum(axis=1) == used).all()


def test_every_weight_gets_a_gradient():
    config = ModelConfig.from_folder(load_fixture("deepseek_v3").folder)
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
