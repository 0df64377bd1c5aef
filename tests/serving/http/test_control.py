"""Health, flushing, aborting, loads, and the engine's refusals as statuses."""

import asyncio
import dataclasses
import json

import httpx
import openai
import pytest

from serving.config import ServerConfig
from serving.http import control
from tests.fakes import FakeEngine
from tests.serving.http.support import events_of, run, serving

pytestmark = pytest.mark.timeout(30)

URL = "/v1/completions"
DETAILS = {
    "device": "fake",
    "num_devices": 2,
    "page_size": 16,
    "weight_bytes_per_device": 2_500_000_000,
    "kv_bytes_per_device": 1_000_000_000,
    "load_seconds": 1.5,
    "compile_seconds": 2.25,
}


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def test_health_asks_the_engine(monkeypatch):
    monkeypatch.setattr(control, "PULSE_TIMEOUT_S", 0.05)
    config = ServerConfig(served_model_name="tiny", watchdog_timeout=10.0)

    async def main():
        engine = FakeEngine(busy_s=9.0)
        async with serving(engine, config=config) as (http, state, _):
            response = await http.get("/health")
            assert (response.status_code, response.json()) == (200, {"status": "ok"})
            engine.busy_s = 11.0
            response = await http.get("/health")
            assert response.status_code == 503
            assert response.json()["message"] == "The engine has made no progress for 11 s."
            # Far above what any legal step takes.
            state.config = dataclasses.replace(state.config, watchdog_timeout=300.0)
            for busy_s, status in ((29.0, 200), (31.0, 503)):
                engine.busy_s = busy_s
                assert (await http.get("/health")).status_code == status
            engine.busy_s = None
            response = await http.get("/health")
            assert response.status_code == 503
            assert response.json()["message"] == "The engine did not answer within 0.05 s."
            engine.busy_s = 0.0
            assert (await http.get("/health")).status_code == 200
            state.stopping = True
            for url in ("/health", "/health_generate"):
                response = await http.get(url)
                assert response.status_code == 503
                assert response.json()["message"] == "The server is shutting down."
            state.stopping = False
            engine.die()
            await until(lambda: not state.engine.alive)
            for url in ("/health", "/health_generate"):
                response = await http.get(url)
                assert response.status_code == 503
                assert "closed its connection" in response.json()["message"]

    run(main)


def test_health_generate_makes_one_token_unless_one_came_just_now():
    async def main():
        async with serving() as (http, _, engine):
            assert (await http.get("/health_generate")).status_code == 200
            (probe,) = engine.seen
            assert probe.rid.startswith("HEALTH_CHECK_")
            assert probe.sampling.max_tokens == 1
            assert (await http.get("/health_generate")).status_code == 200
            assert len(engine.seen) == 1
            text = (await http.get("/metrics")).text
            assert "time_to_first_token_seconds_count" not in text
            assert "/health" not in text

    run(main)


def test_health_generate_of_a_stuck_engine(monkeypatch):
    monkeypatch.setattr(control, "HEALTH_GENERATE_TIMEOUT_S", 0.05)

    async def main():
        async with serving(FakeEngine(hold=True)) as (http, state, engine):
            response = await http.get("/health_generate")
            assert response.status_code == 503
            message = response.json()["message"]
            assert message == "The engine generated nothing within 0.05 s."
            await until(lambda: not engine.running)
            assert state.engine.num_open == 0
        async with serving(FakeEngine(error_at=0)) as (http, _, _engine):
            response = await http.get("/health_generate")
            assert response.status_code == 503
            assert response.json()["message"] == "The fake engine has had it."

    run(main)


def test_health_generate_of_a_full_queue_asks_whether_the_steps_go_on():
    async def main():
        full = FakeEngine(error_at=0, error_status=503, error_message=None)
        async with serving(full) as (http, _, engine):
            engine.busy_s = 3.0
            assert (await http.get("/health_generate")).status_code == 200
            engine.busy_s = 31.0
            response = await http.get("/health_generate")
            assert response.status_code == 503
            assert response.json()["message"] == "The engine has made no progress for 31 s."

    run(main)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush_cache(method):
    async def main():
        async with serving() as (http, _, engine):
            await http.post(URL, json={"prompt": [5, 6]})
            assert engine.cache
            response = await http.request(method, "/flush_cache")
            assert response.status_code == 200
            assert response.text == (
                "Cache flushed.\nPlease check backend logs for more details. (When there are "
                "running or waiting requests, the operation will not be performed.)\n"
            )
            assert not engine.cache
            engine.hold = True
            waiting = asyncio.create_task(http.post(URL, json={"prompt": [5]}))
            await until(lambda: engine.running)
            response = await http.request(method, "/flush_cache")
            assert response.status_code == 400
            assert response.text == "Cache not flushed: requests are running or waiting.\n"
            await http.post("/abort_request", json={"abort_all": True})
            await waiting

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_abort_by_id_ends_that_answer_with_what_it_has(stream):
    async def main():
        engine = FakeEngine(delay_s=0.005)
        async with serving(engine) as (http, state, _):

            async def ask(rid, num):
                body = {"prompt": [[5], [6]], "max_tokens": num, "rid": rid, "stream": stream}
                return await http.post(URL, json=body)

            # The second id begins with the first one: it must not be mistaken for it.
            first, second = (
                asyncio.create_task(ask(rid, num)) for rid, num in (("a", 250), ("a.0", 30))
            )
            await until(lambda: engine.steps > 3 and len(engine.running) == 4)
            assert (await http.post("/abort_request", json={"rid": "a"})).status_code == 200
            response = await first
            assert response.status_code == 200
            if stream:
                ends = [
                    json.loads(e)["choices"][0]["finish_reason"]
                    for e in events_of(response.text)[:-1]
                ]
                assert [end for end in ends if end] == ["abort", "abort"]
            else:
                choices = response.json()["choices"]
                assert [choice["finish_reason"] for choice in choices] == ["abort", "abort"]
                assert all(choice["text"] for choice in choices)
            assert len(engine.aborted) == 2
            assert "length" in (await second).text
            assert len(engine.aborted) == 2
            assert state.engine.num_open == 0

    run(main)


def test_abort_all_and_bodies_that_name_nothing():
    async def main():
        async with serving(FakeEngine(hold=True)) as (http, state, engine):
            asking = [
                asyncio.create_task(http.post(URL, json={"prompt": [5 + i]})) for i in range(3)
            ]
            await until(lambda: len(engine.running) == 3)
            for body in ({}, {"rid": ""}, {"abort_all": False}):
                response = await http.post("/abort_request", json=body)
                assert response.status_code == 400
                assert "rid is missing" in response.json()["message"]
            assert (await http.post("/abort_request", json={"rid": "none"})).status_code == 200
            assert len(engine.running) == 3
            assert (await http.post("/abort_request", json={"abort_all": True})).is_success
            for response in await asyncio.gather(*asking):
                assert response.json()["choices"][0]["finish_reason"] == "abort"
            assert state._live == {}

    run(main)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "message", "told", "kind"),
    [
        (503, "The request queue is full.", "The request queue is full.", "ServiceUnavailable"),
        (503, None, "The request queue is full.", "ServiceUnavailableError"),
        (400, "It never fits.", "It never fits.", "BadRequestError"),
        (500, None, "The engine could not serve this request.", "InternalServerError"),
    ],
)
def test_refusals_of_the_engine_are_statuses(stream, status, message, told, kind):
    async def main():
        fake = FakeEngine(error_at=0, error_status=status, error_message=message)
        async with serving(fake) as (http, _, _engine):
            for url, body in (
                (URL, {"prompt": [[5], [6]], "echo": True}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ):
                response = await http.post(url, json=body | {"stream": stream, "n": 2})
                assert response.status_code == status
                error = response.json()
                assert error["message"] == told
                assert error["code"] == status
                assert error["type"].startswith(kind)
        fake = FakeEngine(error_at=2, error_status=status, error_message=message)
        async with serving(fake) as (http, _, _engine):
            response = await http.post(URL, json={"prompt": [5], "stream": True})
            error = json.loads(events_of(response.text)[-2])["error"]
            assert (error["code"], error["message"]) == (status, told)

    run(main)


def test_a_full_queue_with_the_openai_client():
    async def main():
        fake = FakeEngine(error_at=0, error_status=503, error_message=None)
        async with serving(fake) as (http, _, _engine):
            client = openai.AsyncOpenAI(
                api_key="none", base_url="http://test/v1", http_client=http, max_retries=0
            )
            with pytest.raises(openai.InternalServerError, match="queue is full") as raised:
                await client.completions.create(model="tiny", prompt="x")
            assert raised.value.status_code == 503

    run(main)


def test_loads():
    async def main():
        engine = FakeEngine(details=DETAILS)
        async with serving(engine, clock=lambda: 1_000.0) as (http, _, _):
            await http.post(URL, json={"prompt": [5, 6, 7], "max_tokens": 4, "routed_dp_rank": 1})
            await http.post(URL, json={"prompt": [5, 6, 7], "max_tokens": 4, "routed_dp_rank": 1})
            for url in ("/v1/loads", "/get_loads"):
                told = (await http.get(url)).json()
                assert set(told) == {
                    "timestamp",
                    "version",
                    "accelerator",
                    "num_accelerators",
                    "loads",
                }
                assert told["timestamp"] == "1970-01-01T00:16:40+00:00"
                assert (told["accelerator"], told["num_accelerators"]) == ("fake", 2)
            first, second = told["loads"]
            assert first == {
                "dp_rank": 0,
                "timestamp": 1000.0,
                "num_running_reqs": 0,
                "num_waiting_reqs": 0,
                "num_waiting_uncached_tokens": 0,
                "num_used_tokens": 0,
                "num_total_tokens": 0,
                "max_total_num_tokens": 4096,
                "token_usage": 0.0,
                "gen_throughput": 0.0,
                "cache_hit_rate": 0.0,
                "utilization": 0.0,
                "max_running_requests": 16,
                "memory": {"weight_gb": 2.5, "kv_cache_gb": 1.0, "token_capacity": 4096},
                "queues": {"waiting": 0, "grammar": 0, "paused": 0, "retracted": 0},
            }
            assert second["dp_rank"] == 1
            assert second["cache_hit_rate"] == pytest.approx(2 / 6)

            only = (await http.get("/v1/loads?dp_rank=1&include=core")).json()["loads"]
            assert [load["dp_rank"] for load in only] == [1]
            assert not {"memory", "queues"} & set(only[0])
            some = (await http.get("/v1/loads?include=core,%20memory,spec")).json()["loads"]
            assert "memory" in some[0]
            assert "queues" not in some[0]
            assert (await http.get("/v1/loads?dp_rank=9")).json()["loads"] == []

            text = (await http.get("/v1/loads?format=prometheus")).text
            assert 'sglang_max_running_requests{dp_rank="0"} 16.0' in text
            assert 'sglang_memory_weight_gb{dp_rank="1"} 2.5' in text

    run(main)


def test_loads_share_the_central_queue_out():
    async def main():
        async with serving(FakeEngine(hold=True)) as (http, _, engine):
            asking = [
                asyncio.create_task(http.post(URL, json={"prompt": [5 + i, 6]})) for i in range(3)
            ]
            await until(lambda: len(engine.running) == 3)
            loads = (await http.get("/v1/loads")).json()["loads"]
            assert [load["num_waiting_reqs"] for load in loads] == [2, 1]
            assert [load["queues"]["waiting"] for load in loads] == [2, 1]
            assert [load["num_waiting_uncached_tokens"] for load in loads] == [3, 3]
            engine.grammar_queue = 2  # they wait for their grammars, and then for their turn
            told = (await http.get("/v1/loads")).json()["loads"]
            assert [load["num_waiting_reqs"] for load in told] == [3, 2]
            assert [load["queues"]["grammar"] for load in told] == [1, 1]
            told = (await http.get("/get_load")).json()
            assert [load["num_waiting_reqs"] for load in told] == [3, 2]
            engine.grammar_queue = 0
            old = (await http.get("/get_load")).json()
            assert [
                (load["dp_rank"], load["num_reqs"], load["num_waiting_reqs"], load["num_tokens"])
                for load in old
            ] == [(0, 2, 2, 3), (1, 1, 1, 3)]
            assert all("ts_tic" in load for load in old)
            await http.post("/abort_request", json={"abort_all": True})
            await asyncio.gather(*asking)

    run(main)


def test_loads_refuse_what_is_not_there():
    async def main():
        async with serving() as (http, _, _engine):
            for query, message in (
                (
                    "include=foo,core,bar",
                    "Invalid include sections: {'bar', 'foo'}. Valid options: ['all', 'core', "
                    "'disagg', 'lora', 'memory', 'queues', 'spec']",
                ),
                ("dp_rank=x", "dp_rank must be an integer, got 'x'."),
                ("format=xml", "format must be json or prometheus, got 'xml'."),
            ):
                response = await http.get(f"/v1/loads?{query}")
                assert response.status_code == 400
                assert response.json()["message"] == message

    run(main)


def test_throughput_is_of_the_last_interval():
    async def main():
        now = [100.0]
        async with serving(timer=lambda: now[0]) as (http, _, _engine):

            async def throughputs():
                loads = (await http.get("/v1/loads?include=core")).json()["loads"]
                return [load["gen_throughput"] for load in loads]

            body = {"prompt": [5], "max_tokens": 10, "routed_dp_rank": 1}
            await http.post(URL, json=body)
            assert await throughputs() == [0.0, 0.0]  # no second has passed
            now[0] += 2.0
            assert await throughputs() == [0.0, 5.0]
            now[0] += 0.5
            await http.post(URL, json=body)
            assert await throughputs() == [0.0, 5.0]
            now[0] += 3.5
            assert await throughputs() == [0.0, 2.5]
            now[0] += 1.0
            assert await throughputs() == [0.0, 0.0]

    run(main)


def test_server_info_has_a_state_for_each_slice():
    async def main():
        async with serving(FakeEngine(details=DETAILS)) as (http, _, _engine):
            info = (await http.get("/server_info")).json()
            assert info == (await http.get("/get_server_info")).json()
            assert info["max_req_input_len"] == 255
            assert [part["dp_rank"] for part in info["internal_states"]] == [0, 1]
            part = info["internal_states"][0]
            assert part["last_gen_throughput"] == 0.0
            assert part["memory_usage"]["token_capacity"] == 4096
            assert part["effective_max_running_requests_per_dp"] == 16
            model = (await http.get("/model_info")).json()
            assert model == (await http.get("/get_model_info")).json()

    run(main)


def test_loads_of_a_dead_engine_are_503():
    async def main():
        async with serving() as (http, state, engine):
            engine.die()
            await until(lambda: not state.engine.alive)
            for url in ("/v1/loads", "/get_load", "/server_info", "/flush_cache"):
                response: httpx.Response = await http.get(url)
                assert response.status_code == 503

    run(main)
