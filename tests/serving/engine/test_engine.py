"""The engine on one device: greedy tokens, chunks, sampling, aborts, retraction, memory."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from serving.config import ConfigError
from serving.engine.engine import CompileCounter, describe
from serving.scheduler.scheduler import RequestTooLong
from tests.fixtures import DATA, GQA_FIXTURES, MLA_FIXTURES, load_fixture
from tests.serving.engine.engines import finish, fixture_engine, request


@pytest.fixture(scope="module")
def engine():
    return fixture_engine()


@pytest.fixture(scope="module")
def prompts():
    return load_fixture("deepseek_v3").prompts


@pytest.mark.parametrize("name", [*MLA_FIXTURES, *GQA_FIXTURES])
def test_greedy_tokens_and_logprobs_equal_the_reference(name):
    engine, fixture = fixture_engine(name), load_fixture(name)
    expected = [*fixture.prompts, *fixture.expected["text_prompts"], *fixture.expected["chats"]]
    logprobs: dict[str, list] = {}
    for i, p in enumerate(expected):
        engine.add(request(str(i), p["prompt"], logprobs=5))
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for o in engine.step():
            tokens.setdefault(o.rid, []).append(o.token_id)
            logprobs.setdefault(o.rid, []).append(o)
    for i, p in enumerate(expected):
        assert tokens[str(i)] == p["tokens"]
        got = np.array([o.logprob for o in logprobs[str(i)]])
        np.testing.assert_allclose(got, p["logprobs"], atol=1e-3)
        for o, ids, values in zip(logprobs[str(i)], p["top5_ids"], p["top5_logprobs"], strict=True):
            assert len(o.top_logprobs) == 5
            np.testing.assert_allclose([v for _, v in o.top_logprobs], values, atol=1e-3)
            assert o.top_logprobs[0][0] == ids[0]


def test_nothing_compiles_after_warm_up(engine, prompts):
    counter = CompileCounter()
    for n in (1, 3, 6):
        finish(engine, [request(str(i), p["prompt"]) for i, p in enumerate(prompts[:n])])
    finish(engine, [request("s", prompts[0]["prompt"], temperature=1.0, seed=3, logprobs=2)])
    assert counter.count == 0


def test_the_counter_sees_compilations():
    import jax
    import jax.numpy as jnp

    counter = CompileCounter()
    jax.jit(lambda x: x * 3.25 + counter.count)(jnp.ones(11)).block_until_ready()
    assert counter.count > 0


@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_the_pool_is_updated_in_place(name):
    engine = fixture_engine(name, max_total_tokens=1 << 16)
    runner = engine.runner
    pool = runner.kv_bytes_per_device()
    assert pool > 48 << 20
    for shape in runner.buckets.shapes():
        memory = runner.memory_analysis(shape)
        assert memory.temp_size_in_bytes < pool / 8, shape
        assert memory.alias_size_in_bytes >= pool
    before = [s.data.unsafe_buffer_pointer() for s in runner._kv.addressable_shards]
    finish(engine, [request("a", range(3, 90))])
    after = [s.data.unsafe_buffer_pointer() for s in runner._kv.addressable_shards]
    assert before == after


def test_chunked_prefill_gives_the_same_tokens(prompts):
    small = fixture_engine(extend_buckets=(16,))
    requests = [request(p["id"], p["prompt"]) for p in prompts]
    for p, tokens in zip(prompts, finish(small, requests).values(), strict=True):
        assert tokens == p["tokens"]


def test_a_tiny_pool_retracts_and_changes_no_token(prompts):
    # Five prompts fit at first (118 tokens), their answers do not (278).
    tiny = fixture_engine(max_total_tokens=212, decode_buckets=(8,))
    tokens = finish(tiny, [request(p["id"], p["prompt"]) for p in prompts])
    assert tiny.scheduler.num_retracted > 0
    for p in prompts:
        assert tokens[p["id"]] == p["tokens"]


def test_seeded_sampling_does_not_depend_on_company(engine, prompts):
    def sampled(rid):
        return request(rid, prompts[2]["prompt"], temperature=1.0, top_p=0.95, seed=11)

    alone = finish(engine, [sampled("a")])["a"]
    crowd = [request(p["id"], p["prompt"], temperature=0.7, seed=5) for p in prompts]
    together = finish(engine, [*crowd[:3], sampled("b"), *crowd[3:]])
    assert together["b"] == alone
    assert together["p02"] != alone
    other = finish(engine, [request("c", prompts[2]["prompt"], temperature=1.0, seed=12)])
    assert other["c"] != alone


def test_stop_token_and_length_end_a_request(engine, prompts):
    want = prompts[3]["tokens"]
    stop = want[6]
    first = want.index(stop)
    engine.add(request("a", prompts[3]["prompt"], stop_token_ids=(stop,)))
    outcomes = []
    while engine.has_work:
        outcomes += engine.step()
    assert [o.token_id for o in outcomes] == want[: first + 1]
    assert [o.finish_reason for o in outcomes] == [None] * first + ["stop"]
    assert finish(engine, [request("b", prompts[3]["prompt"], max_tokens=1)])["b"] == want[:1]


def test_an_abort_frees_everything_and_others_go_on(engine, prompts):
    for p in prompts[:5]:
        engine.add(request(p["id"], p["prompt"]))
    tokens: dict[str, list[int]] = {}
    for step in range(1000):
        if not engine.has_work:
            break
        if step == 3:
            assert engine.abort("p01")
            assert engine.abort("p04")
            assert not engine.abort("p04")
        for outcome in engine.step():
            tokens.setdefault(outcome.rid, []).append(outcome.token_id)
        engine.scheduler.check_integrity()
    for p in prompts[:5]:
        if p["id"] in ("p01", "p04"):
            assert len(tokens.get(p["id"], [])) < 32
        else:
            assert tokens[p["id"]] == p["tokens"]
    assert all(load.used_tokens == 0 for load in engine.status())


def test_requests_that_can_never_run_are_refused(engine):
    with pytest.raises(RequestTooLong, match="512 tokens per request"):
        engine.add(request("long", range(2, 500), max_tokens=32))
    with pytest.raises(ValueError, match="empty"):
        engine.add(request("none", []))
    assert not engine.has_work


def test_context_longer_than_the_models_is_refused():
    with pytest.raises(ConfigError, match="--context-length 4096 is longer"):
        fixture_engine(context_length=4096)


def test_a_context_beyond_the_sliding_window_is_refused(tmp_path):
    """Up to its window such a model is exact, and served."""
    for file in (DATA / "mistral").iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 128}))
    with pytest.raises(ConfigError, match="--context-length 128 serves it, 256 does not"):
        fixture_engine(tmp_path)
    engine, prompt = (
        fixture_engine(tmp_path, context_length=128),
        load_fixture("mistral").prompts[2],
    )
    assert finish(engine, [request("a", prompt["prompt"])])["a"] == prompt["tokens"]


def test_a_pool_without_room_is_refused():
    with pytest.raises(ConfigError, match="No memory is left"):
        fixture_engine(max_total_tokens=None, page_size=1 << 22)


def test_describe_states_bytes_and_tokens(engine):
    line, details = describe(engine.runner)
    assert "KV 1024 tokens in each of 1 slices" in line
    assert details["kv_tokens"] == 1024
    assert details["kv_bytes_per_device"] == 257 * 4 * engine.runner.model.latent_dim * 4 * 4
