"""Routing fields and the X-Data-Parallel-Rank header: slice, priority, cache namespace."""

import pytest

from tests.serving.http.support import run, serving

pytestmark = pytest.mark.timeout(30)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES = [
    (COMPLETIONS, {"prompt": [5, 6]}),
    (CHAT, {"messages": [{"role": "user", "content": "Hello"}]}),
]


@pytest.mark.parametrize(("url", "body"), BODIES)
@pytest.mark.parametrize(
    ("fields", "header", "rank"),
    [
        ({}, None, None),
        ({"routed_dp_rank": 1}, None, 1),
        ({"data_parallel_rank": 1}, None, 1),
        ({"routed_dp_rank": 0, "data_parallel_rank": 1}, None, 0),
        ({"routed_dp_rank": None}, "1", 1),
        ({"routed_dp_rank": 1}, "0", 0),
        ({"routed_dp_rank": 99}, "0", 0),
        ({}, " 1 ", 1),
    ],
)
def test_the_slice_is_the_one_named(url, body, fields, header, rank):
    async def main():
        async with serving() as (http, _, engine):
            headers = {} if header is None else {"X-Data-Parallel-Rank": header}
            response = await http.post(url, json=body | fields | {"n": 2}, headers=headers)
            assert response.status_code == 200, response.text
            assert [request.dp_rank for request in engine.seen] == [rank, rank]

    run(main)


@pytest.mark.parametrize(("url", "body"), BODIES)
def test_wrong_ranks_in_the_header(url, body):
    async def main():
        async with serving() as (http, _, engine):
            for header, message in (
                ("one", "X-Data-Parallel-Rank must be an integer, got 'one'."),
                ("", "X-Data-Parallel-Rank must be an integer, got ''."),
                ("1.0", "X-Data-Parallel-Rank must be an integer, got '1.0'."),
                ("--1", "X-Data-Parallel-Rank must be an integer, got '--1'."),
                (
                    "2",
                    "DP rank 2 is not active. X-Data-Parallel-Rank must be in [0, 1].",
                ),
                (
                    "-1",
                    "DP rank -1 is not active. X-Data-Parallel-Rank must be in [0, 1].",
                ),
            ):
                for stream in (False, True):
                    response = await http.post(
                        url,
                        json=body | {"routed_dp_rank": 0, "stream": stream},
                        headers={"X-Data-Parallel-Rank": header},
                    )
                    assert response.status_code == 400
                    assert response.json()["message"] == message
            assert engine.seen == []

    run(main)


@pytest.mark.parametrize(("url", "body"), BODIES)
def test_priority_and_cache_key(url, body):
    async def main():
        async with serving() as (http, _, engine):
            cases = [
                {},
                {"cache_salt": "", "extra_key": "", "priority": 0},
                {"cache_salt": "a"},
                {"extra_key": "a"},
                {"cache_salt": "a", "extra_key": "b"},
                {"cache_salt": "ab"},
                {"cache_salt": 'a","b'},
                {"cache_salt": "a", "extra_key": "b", "priority": -7},
            ]
            for fields in cases:
                response = await http.post(url, json=body | fields)
                assert response.status_code == 200, response.text
            keys = [request.cache_key for request in engine.seen]
            assert keys[0] == keys[1] == ""
            assert len(set(keys[1:7])) == 6
            assert keys[4] == keys[7]
            assert [request.priority for request in engine.seen] == [0] * 7 + [-7]

    run(main)


def test_namespaces_do_not_share_cached_tokens():
    async def main():
        async with serving() as (http, _, _engine):

            async def cached(**fields):
                response = await http.post(COMPLETIONS, json={"prompt": [5, 6, 7]} | fields)
                return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

            assert await cached(cache_salt="mine") == 0
            assert await cached(cache_salt="yours") == 0
            assert await cached() == 0
            assert await cached(cache_salt="mine") == 2

    run(main)
