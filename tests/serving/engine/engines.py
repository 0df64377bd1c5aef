"""Engines on fixture checkpoints, in process, and how to run requests through them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from serving.config import ServerConfig
from serving.engine.engine import Engine, make_engine
from serving.engine.programs import ProgramFactory
from serving.engine.runner import ModelRunner
from serving.request import Request, SamplingParams
from tests.fixtures import DATA
from tests.harness import OPTIMISED


def fixture_engine(name="deepseek_v3", *, tp=1, dp=1, ep=1, exchange="none", **flags) -> Engine:
    settings = {
        "max_total_tokens": 1024,
        "page_size": 4,
        "decode_buckets": (4,),
        "extend_buckets": (64,),
        "dtype": "float32",
        **flags,
    }
    return make_engine(
        ServerConfig(
            model_path=str(DATA / name),
            tp_size=tp,
            dp_size=dp,
            ep_size=ep,
            moe_a2a_backend=exchange,
            **settings,
        )
    )


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Engines made here load their weights and make their state, and cannot run: for tests of
    sizes and logs, since programs take most of the time that an engine needs to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgramFactory, "compile_all", lambda *_, **__: None)
        patch.setattr(ModelRunner, "_warm_up", lambda _: None)
        yield


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """Forward programs of engines made here run three times as fast as conftest.py lets XLA make
    them, and take longer to compile: for tests that run many steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgramFactory, "options", lambda *_: OPTIMISED)
        yield


def request(rid, prompt, max_tokens=32, **sampling):
    sampling.setdefault("temperature", 0.0)
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return Request(rid=rid, prompt=tuple(prompt), sampling=params)


def finish(engine: Engine, requests=()) -> dict[str, list[int]]:
    """Add requests and run until nothing is left; checks the accounting after every step."""
    tokens: dict[str, list[int]] = {r.rid: [] for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work:
        for outcome in engine.step():
            tokens.setdefault(outcome.rid, []).append(outcome.token_id)
        engine.scheduler.check_integrity()
    assert all(load.used_tokens == 0 and load.running == 0 for load in engine.status())
    return tokens
