"""The serving benchmark and the soak test against an app with a fake engine, and how they judge."""

import argparse
import asyncio
import contextlib
import json
import os
import random

import httpx
import pytest

from scripts import bench_serving, soak
from scripts.bench_serving import Load
from scripts.workloads import Session
from serving.grammar import GrammarCompiler
from tests.fakes import VOCAB_SIZE, FakeEngine
from tests.serving.http.support import TOKENIZER, listening, run

SMALL = ["--num-requests", "6", "--output-tokens", "4", "--prefix-tokens", "24", "--groups", "2"]


def arguments(*more):
    small = ["--question-tokens", "8", "--input-tokens", "16", "--vocab-size", str(VOCAB_SIZE)]
    return bench_serving.make_parser().parse_args([*SMALL, *small, *more])


@pytest.mark.parametrize("workload", ["random", "gsp", "zipf", "chat"])
def test_a_workload_runs_to_its_end(workload):
    async def main():
        args = arguments("--workload", workload, "--concurrency", "2", "--turns", "3")
        async with listening() as (url, _, engine):
            args.base_url = url
            result = await bench_serving.run(args)
        assert (result["requests"], result["errors"]) == (6, 0)
        assert result["tokens out"] == 24
        prompts = [r.prompt for r in engine.seen if len(r.prompt) > 8]
        assert result["tokens in"] == sum(map(len, prompts))
        if workload == "chat":  # later turns repeat the conversation so far
            first, second = prompts[0], next(p for p in prompts if len(p) == 24 + 8 + 4 + 8)
            assert second[:24] in (first[:24], prompts[1][:24])
        assert result["latencies"]["whole answer"]["ms p50"] > 0

    run(main)


def test_poisson_arrivals_do_not_wait_for_answers():
    async def main():
        args = arguments("--request-rate", "200", "--warm-up", "0")
        async with listening(FakeEngine(delay_s=0.1)) as (url, _, _):
            args.base_url = url
            result = await bench_serving.run(args)
        assert result["errors"] == 0
        assert result["seconds"] < 3  # one after another: 6 answers of 4 steps of 0.1 s

    run(main)


def test_what_the_server_does_not_say_must_be_given():
    async def main():
        args = arguments("--workload", "random")
        args.vocab_size = None
        async with listening() as (url, _, _):
            args.base_url = url
            with pytest.raises(bench_serving.BenchError, match="--vocab-size"):
                await bench_serving.run(args)
        with pytest.raises(bench_serving.BenchError, match="No answer from"):
            await bench_serving.run(args)

    run(main)


DONE = b"data: [DONE]\n\n"
TEXT = b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
END = b'data: {"choices": [{"text": "", "finish_reason": "length", "token_ids": %s}]}\n\n'
USAGE = (
    b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1, '
    b'"prompt_tokens_details": {"cached_tokens": 4}}}\n\n'
)


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [
        (200, TEXT + USAGE + DONE, None),
        (200, END % b"[7]" + USAGE + DONE, None),
        (200, END % b"[]" + USAGE + DONE, "1 tokens without any text"),
        (200, TEXT + USAGE, "ended without"),
        (200, DONE, "empty answer"),
        (200, USAGE + DONE, "1 tokens without any text; --return-token-ids"),
        (200, TEXT + b'data: {"error": {"message": "broke"}}\n\n' + DONE, "broke"),
        (503, b'{"message": "full"}', "HTTP 503.*full"),
    ],
)
def test_an_answer_is_an_error_unless_it_is_whole(status, content, error):
    async def main():
        transport = httpx.MockTransport(lambda _: httpx.Response(status, content=content))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            load = Load(client, model="m", timeout_s=5, max_seconds=5)
            await load.closed_loop([Session(group=0, prefix=(), turns=((5,),), max_tokens=1)], 1)
        (answer,) = load.answers
        summary = bench_serving.summarise(load.answers, 1.0)
        if error is None:
            assert answer.error is None
            assert (answer.prompt, answer.completion, answer.cached) == (9, 1, 4)
            assert summary["hit rate"] == pytest.approx(4 / 9)
        else:
            with pytest.raises(AssertionError, match=error):
                raise AssertionError(answer.error)
            assert summary["errors"] == 1

    run(main)


def test_a_request_that_hangs_ends_at_its_deadline():
    async def main():
        async with (
            listening(FakeEngine(hold=True)) as (url, _, _),
            httpx.AsyncClient(base_url=url) as client,
        ):
            load = Load(client, model="tiny", timeout_s=0.3, max_seconds=5)
            answer = await load.ask((9, 9), 4)
        assert answer.error == "no end within 0.3 s"

    run(main)


# ---- soak ------------------------------------------------------------------------------------


def traffic(seed=1, *, grammars=True):
    return soak.Traffic(
        seed,
        vocab_size=VOCAB_SIZE,
        context=256,
        pool=4096,
        num_slices=2,
        chat=True,
        grammars=grammars,
    )


def test_a_server_without_grammars_is_not_asked_for_them():
    source = traffic(grammars=False)
    drawn = [source.draw() for _ in range(1000)]
    assert "slow grammar" not in {attempt.kind for attempt in drawn}
    fields = ("regex", "ebnf", "json_schema", "response_format")
    for attempt in drawn:
        if attempt.kind == "feature":
            assert not any(field in json.loads(attempt.content) for field in fields)


def test_a_seed_names_the_traffic():
    drawn = []
    for seed in (1, 1, 2):
        source = traffic(seed)
        drawn.append([source.draw() for _ in range(400)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({attempt.kind for attempt in drawn[0]}) == 12


SOME_KINDS = ("completion", "hang-up", "wrong type", "feature", "wrong feature", "slow grammar")


def test_traffic_against_a_good_server_passes():
    async def main():
        args = soak.make_parser().parse_args(
            ["--seconds", "4", "--rate", "60", "--vocab-size", str(VOCAB_SIZE), "--deadline", "8"]
        )
        grammars = GrammarCompiler(lambda: TOKENIZER)
        async with listening(FakeEngine(delay_s=0.002), grammars=grammars) as (url, _, engine):
            result, failures = await soak.soak(args, url, None)
        assert not failures
        attempts = {row["kind"]: row["attempts"] for row in result["rows"]}
        assert attempts["burst"] >= 48
        assert min(attempts.get(kind, 0) for kind in SOME_KINDS) > 0
        assert engine.aborted

    run(main)


def test_a_server_that_hangs_fails():
    async def main():
        async with (
            listening(FakeEngine(hold=True)) as (url, _, _),
            httpx.AsyncClient(base_url=url, timeout=None) as client,
        ):
            run = soak.Soak(client, traffic(), deadline_s=0.3)
            await run._attempt(traffic().completion())
        assert [o.wrong for o in run.outcomes] == ["no end within 0.3 s"]

    run(main)


GOOD = b'{"choices": [{"text": "a", "finish_reason": "length"}]}'
JSON, SSE = "application/json", "text/event-stream; charset=utf-8"


@pytest.mark.parametrize(
    ("deserves", "status", "kind", "content", "wrong"),
    [
        (soak.OK, 200, JSON, GOOD, False),
        (soak.OK, 400, JSON, b'{"message": "no"}', True),
        (soak.OK, 500, JSON, b'{"message": "oops"}', True),
        (soak.OK, 503, JSON, b'{"message": "The request queue is full."}', False),
        (soak.OK, 503, JSON, b'{"message": "The engine is gone."}', True),
        (soak.OK, 200, JSON, b'{"choices": []}', True),
        (soak.OK, 200, JSON, b"[]", True),
        (soak.OK, 200, SSE, TEXT + DONE, False),
        (soak.OK, 200, SSE, TEXT, True),
        (soak.OK, 200, SSE, b"", True),
        (soak.OK, 200, SSE, b'data: {"error": {"message": "oops"}}\n\n' + DONE, True),
        (soak.REFUSED, 400, JSON, b'{"message": "no"}', False),
        (soak.REFUSED, 200, JSON, GOOD, True),
        (soak.REFUSED, 400, JSON, b"no", True),
        (soak.EITHER, 200, JSON, GOOD, False),
        (soak.EITHER, 400, JSON, b'{"message": "no"}', False),
        (soak.EITHER, 500, JSON, b'{"message": "oops"}', True),
        (soak.ANY, 200, "text/plain", b"OK", False),
        (soak.ANY, 404, JSON, b"", False),
        (soak.ANY, 500, JSON, b'{"message": "oops"}', True),
    ],
)
def test_an_answer_is_judged_by_what_its_request_deserves(deserves, status, kind, content, wrong):
    assert (soak.judge(deserves, status, kind, content) is not None) == wrong


def test_growth_is_that_of_the_last_two_thirds():
    rng = random.Random(1)
    noise = [rng.uniform(-1e4, 1e4) for _ in range(90)]
    memory = soak.Memory()
    memory.samples = {
        1: [(t, 1e6 * min(t, 30) + noise[t]) for t in range(90)],  # warms up, then stays
        2: [(t, 1e5 * t + noise[t]) for t in range(90)],  # leaks
        3: [(t, 1e5 * t) for t in range(20)],  # ended early
    }
    growth = memory.growth()
    assert set(growth) == {1, 2}
    assert abs(growth[1][0]) < 1e3
    assert growth[2][0] == pytest.approx(1e5, rel=0.01)
    assert growth[2][1] == pytest.approx(58e5, rel=0.02)


def test_what_is_left_behind_is_named():
    part = {"dp_rank": 1, "running": 1, "used_tokens": 16, "cached_tokens": 99}
    assert soak.not_idle({"waiting": 0, "internal_states": [part | {"running": 0}]}) == [
        "slice 1: used_tokens is 16"
    ]
    assert len(soak.not_idle({"waiting": 2, "internal_states": [part]})) == 3


def test_memory_of_a_process_is_watched():
    async def main():
        memory = soak.Memory()
        task = asyncio.create_task(memory.watch(os.getpid(), every_s=0.02))
        await asyncio.sleep(0.2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert len(memory.samples[os.getpid()]) > 3
        assert all(size > 1 << 20 for _, size in memory.samples[os.getpid()])

    run(main)


def test_the_summary_counts_statuses():
    outcomes = [
        soak.Outcome(kind="a", status=200, seconds=1.0),
        soak.Outcome(kind="a", status=0, seconds=3.0, wrong="no end"),
    ]
    (row,) = soak.rows(outcomes)
    assert (row["attempts"], row["wrong"], row["s max"]) == (2, 1, 3.0)
    assert row["statuses"] == "1 x 200, 1 x gone"
    assert json.dumps(row)
    assert isinstance(soak.make_parser(), argparse.ArgumentParser)
