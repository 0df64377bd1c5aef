"""Hundreds of wrong requests to every route, drawn by `scripts/fuzz_http.py`, do no harm."""

import asyncio

import httpx
import pytest

from scripts.fuzz_http import Case, Fuzzer, fuzz, is_idle, problem
from serving.grammar import GrammarCompiler
from serving.http.app import ROUTES
from tests.fakes import FakeEngine
from tests.serving.http.support import TOKENIZER, listening, run

pytestmark = pytest.mark.timeout(120)
NUM_CASES = 600


@pytest.mark.parametrize("seed", [1, 2])
def test_wrong_requests_do_no_harm(seed):
    async def main():
        grammars = GrammarCompiler(lambda: TOKENIZER)
        async with (
            listening(FakeEngine(), grammars=grammars) as (url, state, engine),
            httpx.AsyncClient(base_url=url, timeout=30) as http,
        ):
            fuzzer = Fuzzer((await http.get("/openapi.json")).json(), seed)
            cases = [fuzzer.case() for _ in range(NUM_CASES)]
            drawn = {case.path for case in cases}
            assert {p for m, p, _ in ROUTES if "POST" in m} <= drawn
            statuses, problems = await fuzz(http, cases, 8)
            assert problems == []
            assert statuses[200] > NUM_CASES / 20  # some are right
            assert statuses[400] > NUM_CASES / 3
            assert await is_idle(http) is None
            assert state._live == {}
            while engine.running:  # the last words to the engine are on their way
                await asyncio.sleep(0.01)
            after = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert after.status_code == 200

    run(main, 100)


def test_the_judge_says_no():
    case = Case(method="POST", path="/", content=b"", media_type="")
    good = (400, {}, b'{"message": "x"}')
    assert problem(*good, case) is None
    assert problem(200, {}, b"anything", case) is None
    for status, content in (
        (500, b"{}"),
        (400, b"no json"),
        (400, b"{}"),
        (400, b'{"message": "Traceback (most"}'),
    ):
        assert problem(status, {}, content, case) is not None
