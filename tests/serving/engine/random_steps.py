"""Random steps of a mesh whose slices prefill, decode, do both or idle, with everything on:
`python -m tests.serving.engine.random_steps 1000` plays so many on each of three layouts.

Two-batch overlap cuts every program, requests come in bursts for some of the slices, some are given
up, prefixes are shared, pages run out. Every answer must be the one that one device gives to the
request alone. A step that takes longer than STEP_SECONDS ends the process with a traceback.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import time
from collections import Counter
from typing import Any

from serving.engine.engine import Engine
from serving.request import Request
from tests.serving.engine.engines import fixture_engine, request

LAYOUTS = (((8, 8, 8), "all_to_all"), ((8, 4, 8), "all_to_all"), ((8, 2, 8), "none"))
"""(tp, dp, ep) and the exchange."""
OVERLAP = {
    "enable_two_batch_overlap": True,
    "tbo_min_prefill_tokens": 1,
    "tbo_min_decode_rows": 2,
}
"""Flags that cut programs of any size."""
SETTINGS = {"decode_buckets": (4, 8), "extend_buckets": (32, 96), "max_total_tokens": 240}
STEP_SECONDS = 60
MARGIN = 1e-3
"""Where the reference's two best tokens are closer, another order of sums may swap them."""


def burst(draw: random.Random, engine: Engine, prefixes: list[list[int]], serial: int) -> list:
    """Some requests for one slice, or for whichever the scheduler chooses."""
    rank = draw.choice([None, draw.randrange(engine.runner.layout.num_slices)])
    requests = []
    for number in range(draw.choice([1, 1, 2, 5])):
        prompt = draw.choice(prefixes)[: draw.randint(0, 60)] if draw.random() < 0.5 else []
        prompt = prompt + [
            draw.randrange(9, 500) for _ in range(draw.choice([1, 3, 20, 40, 90, 120]))
        ]
        tokens = draw.choice([1, 2, 6, 20])
        one = request(f"r{serial + number}", prompt, max_tokens=tokens)
        requests.append(
            Request(rid=one.rid, prompt=one.prompt, sampling=one.sampling, dp_rank=rank)
        )
    return requests


def play(
    layout: tuple[int, int, int], exchange: str, *, steps: int, seed: int, **flags: Any
) -> Counter[str]:
    """Play random steps and check every token; `flags` of the engine, besides SETTINGS.

    Returns:
        how often what happened: requests, aborts, retractions, steps by how many kinds of work
        their slices had.

    Raises:
        AssertionError: a token differs, or the accounting is wrong.
    """
    tp, dp, ep = layout
    draw = random.Random(seed)
    flags = {**SETTINGS, **OVERLAP, **flags}
    engine = fixture_engine(tp=tp, dp=dp, ep=ep, exchange=exchange, **flags)
    assert all(shape.cut for shape in engine.runner.buckets.shapes())
    prefixes = [[draw.randrange(9, 500) for _ in range(60)] for _ in range(6)]
    requests: dict[str, Request] = {}
    answers: dict[str, list[int]] = {}
    happened: Counter[str] = Counter()
    launch = engine.runner.launch

    def counted_launch(plan):
        kinds = {(bool(s.decode), bool(s.prefill)) for s in plan.slices}
        happened[f"steps with slices in {len(kinds)} modes"] += 1
        return launch(plan)

    engine.runner.launch = counted_launch
    aborted, live = set(), set()
    for step in range(steps):
        if not live or (draw.random() < 0.4 and len(live) < 8 * engine.runner.layout.num_slices):
            for one in burst(draw, engine, prefixes, len(requests)):
                requests[one.rid], answers[one.rid] = one, []
                live.add(one.rid)
                engine.add(one)
        if draw.random() < 0.1:
            given_up = draw.choice(sorted(live))
            assert engine.abort(given_up)
            aborted.add(given_up)
            live.remove(given_up)
        _take(engine, answers, live)
        if step % 10 == 0:
            engine.scheduler.check_integrity()
    while engine.has_work:
        _take(engine, answers, live)
    assert not live
    faulthandler.cancel_dump_traceback_later()
    engine.scheduler.check_integrity()
    assert all(load.used_tokens == 0 and load.running == 0 for load in engine.status())
    happened["requests"], happened["aborts"] = len(requests), len(aborted)
    happened["retractions"] = engine.scheduler.num_retracted
    happened["answers that differ at a near tie"] = _check(requests, answers, aborted)
    return happened


def _take(engine: Engine, answers: dict[str, list[int]], live: set[str]) -> None:
    faulthandler.dump_traceback_later(STEP_SECONDS, exit=True)
    for outcome in engine.step():
        answers[outcome.rid].append(outcome.token_id)
        if outcome.finish_reason is not None:
            live.discard(outcome.rid)


def _check(requests: dict[str, Request], answers: dict[str, list[int]], aborted: set[str]) -> int:
    """Compare with one device, without overlap; aborted answers are beginnings. How many differ
    where the reference's two best tokens are as good as equal."""
    alone = fixture_engine(decode_buckets=(24,), extend_buckets=(512,), max_total_tokens=8192)
    expected: dict[str, list] = {rid: [] for rid in requests}
    for rid, one in requests.items():
        alone.add(request(rid, one.prompt, max_tokens=one.sampling.max_tokens, logprobs=2))
    while alone.has_work:
        for outcome in alone.step():
            expected[outcome.rid].append(outcome)
    ties = 0
    for rid, tokens in answers.items():
        assert len(tokens) == len(expected[rid]) or rid in aborted
        for token, outcome in zip(tokens, expected[rid], strict=False):
            if token != outcome.token_id:
                (_, best), (_, second) = outcome.top_logprobs
                assert best - second < MARGIN, rid
                ties += 1
                break  # what follows has another context
    assert ties <= 1 + len(requests) // 50
    return ties


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for layout, exchange in LAYOUTS:
        started = time.monotonic()
        happened = play(layout, exchange, steps=args.steps, seed=args.seed)
        print(
            f"{layout} {exchange}: {time.monotonic() - started:.0f} s, {dict(happened)}", flush=True
        )


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
