"""/metrics: names, labels and values, with the engine and without it."""

import asyncio
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.http import engine_metrics, loads
from serving.http.metrics import FrontMetrics, RequestTimer
from serving.messages import FirstToken, TokenEvent
from tests.fakes import FakeEngine, scripted
from tests.serving.http.support import TOKENIZER, run, serving
from tests.serving.http.test_control import DETAILS

pytestmark = pytest.mark.timeout(30)

URL = "/v1/completions"
ENGINE = {"model_name": "tiny", "engine_type": "unified", "tp_rank": "0", "pp_rank": "0"}
ENGINE |= {"moe_ep_rank": "0"}


async def scrape(http):
    """{(name, slice, other labels but the constant ones): value}; the text must be well formed."""
    response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {}
    families = list(text_string_to_metric_families(response.text))
    assert "_created" not in response.text
    assert len({family.name for family in families}) == len(families)
    for family in families:
        for sample in family.samples:
            labels = dict(sample.labels)
            if "engine_type" in labels:
                assert {name: labels.pop(name) for name in ENGINE} == ENGINE
            elif "model_name" in labels:
                assert labels.pop("model_name") == "tiny"
            rank = [labels.pop("dp_rank")] if "dp_rank" in labels else []
            key = (sample.name.removeprefix("sglang:"), *rank, *labels.values())
            assert sample.name.startswith("sglang:")
            assert key not in samples
            samples[key] = sample.value
    return samples


def test_engine_metrics():
    async def main():
        async with serving(FakeEngine(details=DETAILS)) as (http, _, engine):
            for _ in range(2):
                body = {"prompt": [5, 6, 7], "max_tokens": 4, "routed_dp_rank": 1}
                assert (await http.post(URL, json=body)).is_success
            engine.hold, engine.grammar_queue = True, 2
            engine.counters[1] |= {"retracted_input_tokens": 30, "retracted_output_tokens": 12}
            waiting = asyncio.create_task(http.post(URL, json={"prompt": [5, 6]}))
            while not engine.running:
                await asyncio.sleep(0.005)
            got = await scrape(http)
            wanted = {
                ("num_running_reqs", "0"): 0,
                ("num_queue_reqs", "0"): 0,
                ("num_queue_reqs", "1"): 0,
                ("num_queue_reqs", "any"): 1,
                ("num_grammar_queue_reqs", "any"): 2,
                ("num_used_tokens", "0"): 0,
                ("token_usage", "1"): 0,
                ("kv_available_tokens", "0"): 4096 - 64,
                ("kv_evictable_tokens", "0"): 64,
                ("kv_used_tokens", "0"): 0,
                ("gen_throughput", "1"): 0,
                ("cache_hit_rate", "0"): 0,
                ("decode_sum_seq_lens", "0"): 0,
                ("max_total_num_tokens", "1"): 4096,
                ("page_size", "all"): 16,
                ("num_pages", "1"): 256,
                ("context_len", "all"): 256,
                ("utilization", "0"): 0,
                ("num_retracted_reqs", "0"): 0,
                ("prompt_tokens_total", "1"): 6,
                ("generation_tokens_total", "1"): 8,
                ("cached_tokens_total", "1", "device"): 2,
                ("num_requests_total", "1"): 2,
                ("num_requests_total", "0"): 0,
                ("num_aborted_requests_total", "1"): 0,
                ("num_retracted_requests_total", "1"): 0,
                ("num_retracted_input_tokens_total", "1"): 30,
                ("num_retracted_output_tokens_total", "1"): 12,
                ("num_retracted_output_tokens_total", "0"): 0,
                ("realtime_tokens_total", "1", "prefill_compute"): 4,
                ("realtime_tokens_total", "1", "prefill_cache"): 2,
                ("realtime_tokens_total", "1", "decode"): 8,
                ("forward_execution_seconds_total", "all", "decode"): 1.5,
                ("forward_execution_seconds_total", "all", "extend"): 0.5,
                ("dp_cooperation_forward_passes_total", "all", "0"): 3,
                ("dp_cooperation_forward_passes_total", "all", "2"): 0,
                ("dp_cooperation_forward_execution_seconds_total", "all", "decode", "0"): 1.5,
                ("dp_cooperation_forward_execution_seconds_total", "all", "extend", "1"): 0.5,
                ("engine_startup_time", "all"): 3.75,
                ("engine_load_weights_time", "all"): 1.5,
            }
            assert {key: got.get(key) for key in wanted} == wanted
            assert got["cache_hit_rate", "1"] == pytest.approx(2 / 6)
            await http.post("/abort_request", json={"abort_all": True})
            await waiting

    run(main)


def test_running_requests_and_their_tokens():
    async def main():
        async with serving(FakeEngine(delay_s=0.005)) as (http, _, engine):
            body = {"prompt": [5] * 100, "max_tokens": 100, "routed_dp_rank": 1}
            asking = asyncio.create_task(http.post(URL, json=body))
            while engine.steps < 2:
                await asyncio.sleep(0.001)
            got = await scrape(http)
            assert got["num_running_reqs", "1"] == 1
            assert got["num_running_reqs", "0"] == 0
            used = got["num_used_tokens", "1"]
            assert 100 < used < 200
            assert got["token_usage", "1"] == pytest.approx(used / 4096)
            assert got["utilization", "1"] == pytest.approx(max(1 / 16, used / 4096))
            await http.post("/abort_request", json={"abort_all": True})
            await asking
            got = await scrape(http)
            assert got["num_aborted_requests_total", "1"] == 1
            assert ("engine_startup_time", "all") not in got  # this engine did not say

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_front_metrics_of_answers(stream):
    async def main():
        stop = TOKENIZER._fast.encode("Once upon a time", add_special_tokens=False).ids
        engine = FakeEngine(next_token=scripted(stop, 2), delay_s=0.002)
        async with serving(engine) as (http, _, _):
            body = {"prompt": [5, 6], "stream": stream, "n": 2, "max_tokens": 3}
            assert (await http.post(URL, json=body)).is_success
            body = {"prompt": [5, 6], "stream": stream, "stop": "on a", "max_tokens": 90}
            assert (await http.post(URL, json=body | {"routed_dp_rank": 1})).is_success
            got = await scrape(http)
            for name in (
                "time_to_first_token_seconds",
                "e2e_request_latency_seconds",
                "queue_time_seconds",
                "prompt_tokens_histogram",
                "generation_tokens_histogram",
                "uncached_prompt_tokens_histogram",
            ):
                assert (got[f"{name}_count", "0"], got[f"{name}_count", "1"]) == (1, 2), name
            assert got["queue_time_seconds_sum", "0"] == 0.25
            assert got["inter_token_latency_seconds_count", "0"] == 2
            assert got["inter_token_latency_seconds_sum", "0"] > 0
            assert got["prompt_tokens_histogram_sum", "0"] == 2
            assert got["generation_tokens_histogram_sum", "0"] == 3
            assert got["uncached_prompt_tokens_histogram_sum", "0"] == 2
            assert got["uncached_prompt_tokens_histogram_sum", "1"] == 1 + 1
            first, whole = (
                got[f"{name}_seconds_sum", "0"]
                for name in ("time_to_first_token", "e2e_request_latency")
            )
            assert 0.002 <= first < whole

    run(main)


def test_answers_left_or_refused_are_in_no_histogram():
    async def main():
        async with serving(FakeEngine(hold=True)) as (http, _, engine):
            asking = asyncio.create_task(http.post(URL, json={"prompt": [5]}))
            while not engine.running:
                await asyncio.sleep(0.005)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert (await http.post(URL, json={"prompt": []})).status_code == 400
            got = await scrape(http)
            assert not [key for key in got if "latency" in key[0] or "first_token" in key[0]]
            assert got["http_requests_total", URL, "POST"] == 2
            assert got["http_responses_total", URL, "400"] == 1

    run(main)


def test_http_requests_are_counted_by_our_paths_only():
    async def main():
        async with serving() as (http, state, _engine):
            await http.get("/v1/models")
            await http.get("/v1/models")
            await http.get("/no/such/path")
            await http.get("/nor/this")
            await http.request("BREW", "/v1/models")
            await http.get("/health")

            async def broken(*_):
                raise RuntimeError("a bug")

            state.loads.sample = broken
            assert (await http.get("/get_load")).status_code == 500
            del state.loads.sample
            got = await scrape(http)
            assert got["http_requests_total", "/v1/models", "GET"] == 2
            assert got["http_requests_total", "/v1/models", "other"] == 1
            assert got["http_responses_total", "/v1/models", "200"] == 2
            assert got["http_responses_total", "/v1/models", "405"] == 1
            assert got["http_responses_total", "other", "404"] == 2
            assert got["http_responses_total", "/get_load", "500"] == 1
            endpoints = {key[1] for key in got if key[0] == "http_requests_total"}
            assert endpoints == {"/v1/models", "other", "/get_load"}

    run(main)


def test_metrics_without_the_engine_are_the_fronts(monkeypatch):
    monkeypatch.setattr(engine_metrics, "SCRAPE_TIMEOUT_S", 0.05)

    async def main():
        async with serving(FakeEngine(mute=True)) as (http, state, engine):
            await http.post(URL, json={"prompt": [5]})
            for _ in range(2):
                got = await scrape(http)
                assert got["http_responses_total", URL, "200"] == 1
                assert ("num_running_reqs", "0") not in got
                engine.die()
                while state.engine.alive:
                    await asyncio.sleep(0.005)

    run(main)


def test_the_watch_samples_by_itself_and_outlives_a_silent_engine(monkeypatch):
    monkeypatch.setattr(loads, "WATCH_INTERVAL_S", 0.005)
    now = [0.0]

    async def main():
        async with serving(timer=lambda: now[0]) as (http, state, engine):
            watching = asyncio.create_task(state.loads.watch())
            answer, state.engine.status = state.engine.status, None  # every sample fails
            state.engine.status = lambda timeout_s: answer(0.001)
            engine.mute = True
            await asyncio.sleep(0.02)
            engine.mute = False
            await http.post(URL, json={"prompt": [5], "max_tokens": 9, "routed_dp_rank": 1})
            now[0] = 3.0
            while not state.loads.rates(1).generated_per_s:
                await asyncio.sleep(0.005)
            assert state.loads.rates(1).generated_per_s == 3.0
            state.engine.fail("Gone.")
            await watching

    run(main)


def test_two_servers_share_no_metric():
    async def main():
        async with serving() as (one, _, _), serving() as (other, _, _):
            await one.get("/v1/models")
            assert ("http_requests_total", "/v1/models", "GET") in await scrape(one)
            assert ("http_requests_total", "/v1/models", "GET") not in await scrape(other)

    run(main)


def test_timing_a_token_is_cheap():
    """A step of 64 streams must not notice; the bound is ten times what it takes on a slow core."""
    metrics = FrontMetrics("tiny")
    timer = RequestTimer(metrics, began=0.0, num_prompt=3)
    timer.token(TokenEvent("r", 5, first=FirstToken(0, 0, 0.0)), 0.1)
    event, num = TokenEvent("r", 5), 20_000
    began = time.perf_counter()
    for i in range(num):
        timer.token(event, 0.1 + i * 0.01)
    assert (time.perf_counter() - began) / num < 50e-6
