"""--enable-deterministic-inference: the same bits in any company, on any slice, cached or not."""

from __future__ import annotations

import dataclasses
import random

import pytest

from tests.fixtures import load_fixture
from tests.serving.engine.engines import fixture_engine, request

LAYOUTS = {
    "one device": {},
    "two slices": {"tp": 2, "dp": 2, "ep": 2},
    "four devices, all_to_all": {"tp": 4, "dp": 2, "ep": 4, "exchange": "all_to_all"},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def engine(request):
    return fixture_engine(
        enable_deterministic_inference=True,
        decode_buckets=(4, 8),
        extend_buckets=(32, 64),
        **LAYOUTS[request.param],
    )


def run(engine, requests):
    """(token, log probability, alternatives) of every step, by request."""
    answers = {r.rid: [] for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work:
        for o in engine.step():
            answers[o.rid].append((o.token_id, o.logprob, o.top_logprobs))
        engine.scheduler.check_integrity()
    return answers


def company(number: int):
    """Requests of every kind beside the one that is watched."""
    draw = random.Random(number)
    return [
        request(
            f"c{number}.{i}",
            [draw.randrange(9, 500) for _ in range(draw.randint(1, 90))],
            max_tokens=draw.randint(1, 20),
            temperature=draw.choice([0.0, 0.8]),
            seed=i,
            frequency_penalty=draw.choice([0.0, 0.5]),
        )
        for i in range(9)
    ]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 5}])
def test_company_slice_and_cache_change_no_bit(engine, sampling):
    prompt = load_fixture("deepseek_v3").prompts[5]["prompt"]  # 100 tokens: two chunks or more
    num_slices = len(engine.status())

    def watched(rid):
        return request(rid, prompt, max_tokens=16, logprobs=3, **sampling)

    alone = run(engine, [watched("alone")])["alone"]
    assert len(alone) == 16
    for number in range(3):
        others = company(number)
        if number < 2:
            assert engine.scheduler.flush_cache()  # the third time the prompt is cached
        requests = [*others[: number * 3], watched("a"), *others[number * 3 :]]
        assert run(engine, requests)["a"] == alone
    for rank in range(num_slices):
        forced = dataclasses.replace(watched(f"on {rank}"), dp_rank=rank)
        assert run(engine, [forced, *company(7 + rank)])[forced.rid] == alone


def test_nothing_is_retracted_however_small_the_pool():
    engine = fixture_engine(
        enable_deterministic_inference=True,
        decode_buckets=(8,),
        extend_buckets=(32,),
        max_total_tokens=220,
    )
    alone = {r.rid: run(engine, [r])[r.rid] for r in company(1)}
    assert run(engine, company(1)) == alone
    assert engine.scheduler.num_retracted == 0
