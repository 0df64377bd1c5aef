"""The operations against their textbook definitions in NumPy, on ragged random inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.ops import gqa_attention
from model.ops.grouped_mlp import grouped_mlp
from model.ops.mla_attention.xla import decode_attention, extend_attention

LAYERS, PAGES, PAGE_SIZE, LATENT, ROPE, HEADS, NOPE, VALUE = 2, 200, 16, 24, 8, 3, 12, 10
SCALE = 0.21


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def tables_for(lengths, seed, width=40):
    """Scattered, disjoint pages."""
    free = list(np.random.default_rng(seed).permutation(np.arange(1, PAGES)))
    tables = np.zeros((len(lengths), width), np.int32)
    for row, length in zip(tables, lengths, strict=True):
        for i in range(-(-length // PAGE_SIZE)):
            row[i] = free.pop()
    return tables


def cached(kv, layer, table, length):
    return kv[layer][table].reshape(-1, kv.shape[-1])[:length]


@pytest.mark.parametrize("lengths", [[1, 16, 17, 0, 128, 129, 500], [0, 0], [3]])
def test_decode_attention_over_ragged_lengths(lengths):
    kv = random(0, LAYERS, PAGES, PAGE_SIZE, LATENT + ROPE)
    kv[:, 0] = np.nan  # the sink page must not be read into a result
    tables = tables_for(lengths, 1)
    q_latent, q_rope = random(2, len(lengths), HEADS, LATENT), random(3, len(lengths), HEADS, ROPE)
    safe = np.nan_to_num(kv)
    out = jax.jit(decode_attention, static_argnames="scale")(
        q_latent, q_rope, jnp.asarray(safe), jnp.int32(1), tables, jnp.array(lengths), scale=SCALE
    )
    for i, length in enumerate(lengths):
        if not length:
            assert (np.asarray(out[i]) == 0).all()
            continue
        c = cached(safe, 1, tables[i], length)
        q = np.concatenate([q_latent[i], q_rope[i]], axis=-1)
        want = softmax(q @ c.T * SCALE) @ c[:, :LATENT]
        np.testing.assert_allclose(out[i], want, atol=2e-5)


def test_padding_in_the_sink_page_changes_nothing():
    lengths = [5, 200]
    kv = random(0, LAYERS, PAGES, PAGE_SIZE, LATENT + ROPE)
    other = kv.copy()
    other[:, 0] = 1e3
    tables = tables_for(lengths, 1)
    q = random(2, 2, HEADS, LATENT), random(3, 2, HEADS, ROPE)
    a, b = (
        decode_attention(*q, jnp.asarray(x), jnp.int32(0), tables, jnp.array(lengths), scale=SCALE)
        for x in (kv, other)
    )
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("rows", "chunks"),  # chunks: (start, rows)
    [
        (32, [(0, 5), (7, 1), (120, 20)]),
        (300, [(0, 150), (130, 140)]),
        (256, [(0, 256)]),
        (16, []),
        (130, [(500, 129)]),
    ],
)
def test_extend_attention_over_prefixes_and_chunks(rows, chunks):
    contexts = [start + n for start, n in chunks]
    kv = random(0, LAYERS, PAGES, PAGE_SIZE, LATENT + ROPE)
    tables = tables_for(contexts + [0] * (4 - len(chunks)), 1)
    w_uk, w_uv = random(2, HEADS, NOPE, LATENT), random(3, HEADS, LATENT, VALUE)
    q_nope, q_rope = random(4, rows, HEADS, NOPE), random(5, rows, HEADS, ROPE)
    first = np.full(4, rows, np.int32)
    counts, starts = np.zeros(4, np.int32), np.zeros(4, np.int32)
    at = 0
    for i, (start, n) in enumerate(chunks):
        first[i], counts[i], starts[i] = at, n, start
        at += n
    out = np.asarray(
        jax.jit(extend_attention, static_argnames="scale")(
            *(q_nope, q_rope, w_uk, w_uv, jnp.asarray(kv), jnp.int32(1), tables),
            *(first, counts, starts),
            scale=SCALE,
        )
    )
    assert (out[at:] == 0).all()
    for i, (start, n) in enumerate(chunks):
        c = cached(kv, 1, tables[i], start + n)
        k = np.einsum("tc,hnc->htn", c[:, :LATENT], w_uk)
        v = np.einsum("tc,hcv->htv", c[:, :LATENT], w_uv)
        rope = c[:, LATENT:]
        mine = slice(first[i], first[i] + n)
        scores = np.einsum("mhn,htn->hmt", q_nope[mine], k)
        scores += np.einsum("mhr,tr->hmt", q_rope[mine], rope)
        seen = np.arange(start + n)[None] <= (start + np.arange(n))[:, None]
        p = softmax(np.where(seen, scores * SCALE, -np.inf))
        np.testing.assert_allclose(
            out[mine], np.einsum("hmt,htv->mhv", p, v), atol=3e-5, err_msg=f"chunk {i}"
        )


KV_HEADS, GROUP, HEAD = 2, 3, 10


def test_gqa_decode_over_ragged_lengths():
    lengths = [1, 16, 17, 0, 128, 129, 500]
    kv = random(0, LAYERS, PAGES, PAGE_SIZE, 2, KV_HEADS, HEAD)
    tables = tables_for(lengths, 1)
    q = random(2, len(lengths), KV_HEADS, GROUP, HEAD)
    out = jax.jit(gqa_attention.decode_attention, static_argnames="scale")(
        q, jnp.asarray(kv), jnp.int32(1), tables, jnp.array(lengths), scale=SCALE
    )
    for i, length in enumerate(lengths):
        entries = kv[1][tables[i]].reshape(-1, 2, KV_HEADS, HEAD)[:length]
        scores = np.einsum("ngk,tnk->ngt", q[i], entries[:, 0]) * SCALE
        want = np.einsum("ngt,tnk->ngk", softmax(scores), entries[:, 1]) if length else 0 * q[i]
        np.testing.assert_allclose(out[i], want, atol=2e-5)


def test_gqa_extend_over_prefixes_and_chunks():
    rows, chunks = 300, [(0, 5), (130, 140), (7, 1)]  # (start, rows)
    kv = random(0, LAYERS, PAGES, PAGE_SIZE, 2, KV_HEADS, HEAD)
    tables = tables_for([start + n for start, n in chunks] + [0], 1)
    q = random(2, rows, KV_HEADS, GROUP, HEAD)
    first, counts, starts = np.array([[0, 5, 145, rows], [5, 140, 1, 0], [0, 130, 7, 0]], np.int32)
    out = np.asarray(
        jax.jit(gqa_attention.extend_attention, static_argnames="scale")(
            q, jnp.asarray(kv), jnp.int32(1), tables, first, counts, starts, scale=SCALE
        )
    )
    assert (out[146:] == 0).all()
    for i, (start, n) in enumerate(chunks):
        entries = kv[1][tables[i]].reshape(-1, 2, KV_HEADS, HEAD)[: start + n]
        mine = slice(first[i], first[i] + n)
        scores = np.einsum("mngk,tnk->mngt", q[mine], entries[:, 0]) * SCALE
        seen = np.arange(start + n)[None] <= (start + np.arange(n))[:, None]
        p = softmax(np.where(seen[:, None, None], scores, -np.inf))
        want = np.einsum("mngt,tnk->mngk", p, entries[:, 1])
        np.testing.assert_allclose(out[mine], want, atol=3e-5, err_msg=f"chunk {i}")


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "skew"),
    [(1, 4, 2, 0), (7, 4, 2, 0), (64, 8, 3, 0), (300, 3, 2, 0), (50, 8, 1, 1), (20, 8, 4, 2)],
)
def test_grouped_mlp_sums_the_chosen_experts(tokens, experts, k, skew):
    rng = np.random.default_rng(tokens)
    width, inner = 16, 12
    x = random(1, tokens, width)
    w1 = random(2, 2, experts, width, 2, inner) * 0.3
    w2 = random(3, 2, experts, inner, width) * 0.3
    ids = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    if skew == 1:
        ids[:] = 5  # all to one expert
    if skew == 2:
        ids[rng.random(ids.shape) < 0.6] = -1  # most pairs absent
        ids[3] = -1
    weights = rng.random((tokens, k)).astype(np.float32)
    out = np.asarray(jax.jit(grouped_mlp)(x, ids, weights, w1, w2, jnp.int32(1)))
    for t in range(tokens):
        want = np.zeros(width, np.float32)
        for e, w in zip(ids[t], weights[t], strict=True):
            if e >= 0:
                gate, up = x[t] @ w1[1, e, :, 0], x[t] @ w1[1, e, :, 1]
                want += w * ((gate / (1 + np.exp(-gate)) * up) @ w2[1, e])
        np.testing.assert_allclose(out[t], want, atol=2e-5, err_msg=f"token {t}")


def test_absent_pairs_cost_no_blocks():
    """The loop's trip count follows the tokens present, not the padded size."""
    x, w1, w2 = jnp.ones((64, 8)), jnp.ones((1, 4, 8, 2, 4)), jnp.ones((1, 4, 4, 8))
    ids = jnp.full((64, 2), -1).at[0, 0].set(2)
    text = jax.jit(grouped_mlp).lower(x, ids, jnp.ones((64, 2)), w1, w2, jnp.int32(0)).as_text()
    assert "stablehlo.while" in text
    out = grouped_mlp(x, ids, jnp.ones((64, 2)), w1, w2, jnp.int32(0))
    assert float(jnp.abs(out[1:]).max()) == 0
    assert float(jnp.abs(out[0]).max()) > 0
