"""Both exchanges lose no token, whatever the routing, and skip padding."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import Var, jaxprs_in_params
from jax.sharding import PartitionSpec

from model.layers import ParamFactory
from model.moe import MoE
from model.ops.grouped_mlp import grouped_mlp
from model.ops.kernels import XLA
from sharding import expert_exchange
from sharding.comm import EXCHANGES, MeshComm
from sharding.dispatch_format import dequantize, quantize
from sharding.layout import make_layout
from sharding.mesh import make_mesh
from sharding.rules import padded_sizes
from sharding.sources import open_source
from sharding.step import sharded
from sharding.sums import Sums
from tests.fixtures import DATA, LAYOUTS
from tests.harness import MeshModel, SliceRows

EXPERTS, WIDTH, INNER, K = 16, 8, 8, 3
ROUTINGS = ("even", "one rank", "one expert", "mostly padding", "nothing")


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def routing(kind, slices, tokens):
    rng = np.random.default_rng(7)
    ids = np.stack([rng.permutation(EXPERTS)[:K] for _ in range(slices * tokens)]).reshape(
        slices, tokens, K
    )
    if kind == "one rank":
        ids = ids % 2  # every token of every slice wants the same device's experts
    if kind == "one expert":
        ids[..., 0], ids[..., 1:] = 5, -1
    if kind == "mostly padding":
        ids[:, 2:] = -1
        ids[0] = -1
    if kind == "nothing":
        ids[:] = -1
    return ids.astype(np.int32)


def exchanger(layout, exchange, **options):
    """`exchanger_fn` with NumPy arrays."""
    run = exchanger_fn(layout, exchange, **options)
    return lambda *batch: np.asarray(run(*batch))


def exchanger_fn(layout, exchange, *, in_order=False, fp8=False):
    """(x, ids, weights, shared), each by slice (shared: by device), to what the exchange gives."""
    w1, w2 = random(1, 1, EXPERTS, WIDTH, 2, INNER), random(2, 1, EXPERTS, INNER, WIDTH)

    def fn(x, ids, weights, shared, w1, w2):
        experts = functools.partial(grouped_mlp, w1=w1, w2=w2, layer=jnp.int32(0))
        sums = Sums(layout=layout, in_order=in_order)
        given = x[0], ids[0], weights[0], experts, w1.shape[1], shared[0], sums
        return EXCHANGES[exchange](*given, fp8=fp8)[None]

    rows = PartitionSpec(layout.attn_dp)
    partial = PartitionSpec((*layout.attn_dp, *layout.attn_tp))  # a part on every device
    expert = (
        PartitionSpec(None, layout.moe_ep, None, None, layout.moe_tp),
        PartitionSpec(None, layout.moe_ep, layout.moe_tp, None),
    )
    step = sharded(fn, make_mesh(layout), (rows, rows, rows, partial, *expert), rows)
    return lambda *batch: step(*batch, w1, w2)


def expected(layout, x, ids, weights, shared):
    w1, w2 = random(1, 1, EXPERTS, WIDTH, 2, INNER), random(2, 1, EXPERTS, INNER, WIDTH)
    flat = x.reshape(-1, WIDTH), ids.reshape(-1, K), weights.reshape(-1, K)
    want = grouped_mlp(*flat, w1, w2, jnp.int32(0)).reshape(x.shape)
    # Every device of a slice brought an equal part of the shared experts' sum.
    tp = layout.size(layout.attn_tp)
    return np.asarray(want) + shared.reshape(x.shape[0], tp, *x.shape[1:]).sum(axis=1)


def batch_of(layout, kind, tokens):
    slices = layout.num_slices
    return (
        random(3, slices, tokens, WIDTH),
        routing(kind, slices, tokens),
        np.abs(random(4, slices, tokens, K)),
        random(5, layout.num_devices, tokens, WIDTH),
    )


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
@pytest.mark.parametrize("layout", [*LAYOUTS, (8, 2, 8)])
def test_no_token_is_lost(layout, exchange, in_order, monkeypatch):
    # Small rounds: the skewed routings need several, and 21 tokens split unevenly.
    monkeypatch.setattr(expert_exchange, "dispatch_rows", lambda *_: 4)
    layout = make_layout(*layout)
    run = exchanger(layout, exchange, in_order=in_order)
    for kind in ROUTINGS:
        batch = batch_of(layout, kind, 21)
        np.testing.assert_allclose(run(*batch), expected(layout, *batch), atol=1e-4, err_msg=kind)


@pytest.mark.parametrize(
    ("layout", "tokens"), [((8, 8, 8), 16), ((8, 8, 8), 300), ((8, 4, 8), 600)]
)
def test_rounds_of_the_size_that_is_used(layout, tokens):
    """16 tokens go everywhere, 300 of a device in rounds of less; skewed ones need a second."""
    layout = make_layout(*layout)
    run = exchanger(layout, "all_to_all")
    for kind in ("even", "one rank"):
        batch = batch_of(layout, kind, tokens)
        np.testing.assert_allclose(run(*batch), expected(layout, *batch), atol=1e-4, err_msg=kind)


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
@pytest.mark.parametrize("layout", [(8, 8, 8), (8, 2, 8), (8, 8, 4)])
def test_float8_dispatch_is_the_exchange_of_rounded_tokens(layout, exchange, monkeypatch):
    """Every expert, near or far, sees a token as `quantize` leaves it; sums come back as ever."""
    monkeypatch.setattr(expert_exchange, "dispatch_rows", lambda *_: 4)
    layout = make_layout(*layout)
    run = exchanger(layout, exchange, fp8=True)
    for kind in ("even", "one rank", "mostly padding"):
        x, *rest = batch_of(layout, kind, 21)
        rounded = dequantize(*quantize(x.reshape(-1, WIDTH)), jnp.float32).reshape(x.shape)
        assert np.abs(rounded - x).max() > 1e-3
        want = expected(layout, np.asarray(rounded), *rest)
        np.testing.assert_allclose(run(x, *rest), want, atol=1e-4, err_msg=kind)


def test_a_model_with_float8_dispatch_is_nearly_the_same_model():
    """Logits move, by less than the worst rounding of a token (a sixteenth) in the mean square."""
    tokens = np.random.default_rng(0).integers(0, 100, 40)

    def logits(**options):
        model = MeshModel(DATA / "deepseek_v2_lite", (2, 2, 2), "none", **options)
        rows = SliceRows(chunks=[(tokens, 0, list(range(1, 20)))])
        return np.concatenate([chunks[0] for _, chunks in model.step([rows, rows])[0]])

    exact, rounded = logits(), logits(fp8_dispatch=True)
    moved = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 0 < moved < 1 / 16, moved
    np.testing.assert_allclose(*np.split(rounded, 2), atol=1e-4)  # both slices alike


def test_float8_is_nowhere_unless_asked_for():
    layout = make_layout(8, 8, 8)
    batch = batch_of(layout, "even", 4)

    def text(fp8):
        return str(jax.make_jaxpr(exchanger_fn(layout, "none", fp8=fp8))(*batch))

    assert "f8_e4m3" in text(True)
    assert "f8_e4m3" not in text(False)


TRAVEL = {"all_gather", "all_to_all", "reduce_scatter"}


def primitives(eqn):
    """Names of an equation's primitive and of those inside it."""
    inner = jaxprs_in_params(eqn.params)
    return {eqn.primitive.name}.union(*(primitives(e) for jaxpr in inner for e in jaxpr.eqns))


def reached(eqns, start):
    """Indices of the equations that need a result of those that `start` names."""
    found, known = set(), set()
    for i, eqn in enumerate(eqns):
        if start & primitives(eqn) or any(v in known for v in eqn.invars if isinstance(v, Var)):
            found.add(i)
            known.update(eqn.outvars)
    return found


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
@pytest.mark.parametrize("layout", [(8, 8, 8), (8, 2, 8)])
def test_shared_experts_and_travelling_tokens_do_not_wait_for_each_other(
    layout, exchange, monkeypatch
):
    """Else XLA could not compute the one during the other."""
    monkeypatch.setattr(expert_exchange, "dispatch_rows", lambda *_: 4)
    layout = make_layout(*layout)
    config = open_source(DATA / "deepseek_v2_lite").config
    sizes = padded_sizes(config, layout)
    moe = nnx.eval_shape(
        lambda: MoE(ParamFactory(nnx.Rngs(0), jnp.float32), config, sizes.shared_intermediate)
    )
    graph, state = nnx.split(moe)
    local = config.num_experts // layout.size(layout.moe_ep)

    class Marking(MeshComm):
        """Marks what the shared experts give by the only sine of the program."""

        def moe(self, x, ids, weights, experts, num_local_experts, shared):
            return super().moe(x, ids, weights, lambda x, *_: x, local, jnp.sin(shared))

    def fn(state, x):
        module, comm = nnx.merge(graph, state), Marking(layout, exchange)
        experts = SimpleNamespace(
            w1=SimpleNamespace(get_value=lambda: jnp.zeros((1, local, 1, 2, 1))),
            w2=SimpleNamespace(get_value=lambda: jnp.zeros((1, local, 1, 1))),
        )
        return module(x[0], jnp.ones(21, bool), experts, jnp.int32(0), comm, XLA)[0][None]

    rows = PartitionSpec(layout.attn_dp)
    step = sharded(fn, make_mesh(layout), (PartitionSpec(), rows), rows)
    x = jax.ShapeDtypeStruct((layout.num_slices, 21, config.hidden_size), jnp.float32)
    (jit,) = jax.make_jaxpr(step)(state, x).eqns
    (mapped,) = (e for e in jit.params["jaxpr"].eqns if e.primitive.name == "shard_map")
    eqns = mapped.params["jaxpr"].eqns
    shared = {i for i, e in enumerate(eqns) if "sin" in primitives(e)}
    travel = {i for i, e in enumerate(eqns) if TRAVEL & primitives(e)}
    assert len(shared) == 1
    assert len(travel) >= 3
    assert not shared & reached(eqns, TRAVEL)
    assert not travel & reached(eqns, {"sin"})
