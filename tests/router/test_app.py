"""The whole router over simulated workers: keys, CORS, limits, ranks, models, and its metrics."""

import asyncio
import contextlib
import json
import re
import socket

import pytest

from router.app import RouterService
from router.config import RouterConfig
from router.front import Front
from router.request import RoutedRequest
from tests.router.support import CHAT, COMPLETIONS, JSON, Client, run, workers

pytestmark = pytest.mark.timeout(60)

BODY = {"model": "mock-model", "prompt": "hello there", "max_tokens": 3, "temperature": 0}


@contextlib.asynccontextmanager
async def service(fleet, *, num=None, **changes):
    """(service, client) with all workers registered."""
    fields = {
        "worker_urls": tuple(worker.url for worker in fleet),
        "retry_initial_backoff_ms": 1,
        "policy": "round_robin",
    } | changes
    config = RouterConfig(**fields)
    router = RouterService(config)
    front = Front(router.handler, max_body=config.max_payload_size)
    listener = socket.create_server(("127.0.0.1", 0))
    await front.listen(listener)
    client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
    await router.start()
    try:
        async with asyncio.timeout(10):
            while len(router.registry.list()) < (len(fleet) if num is None else num):
                await asyncio.sleep(0.01)
        yield router, client
    finally:
        await client.close()
        await front.shut_down(0)
        await router.stop()


def bearer(key):
    return (b"authorization", b"Bearer " + key)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/generate", "/v1/embeddings", "/workers"])
def test_the_key_is_required_and_sent_to_workers(path):
    async def main():
        async with (
            workers(1, api_key="secret") as fleet,
            service(fleet, api_key="secret") as (_, client),
        ):
            for headers in ((), (bearer(b"wrong"),)):
                reply = await client.post(path, BODY, *headers)
                assert reply.status == 401
                assert not fleet[0].seen
            if path == COMPLETIONS:
                assert (await client.post(path, BODY, bearer(b"secret"))).status == 200
                assert fleet[0].last.headers["authorization"] == "Bearer secret"
            assert (await client.get("/health")).status == 200

    run(main)


def test_every_answer_has_an_id_and_cors_headers():
    async def main():
        async with workers(1) as fleet, service(fleet) as (_, client):
            for path, body in [(COMPLETIONS, BODY), (COMPLETIONS, BODY | {"stream": True})]:
                reply = await client.post(path, body)
                assert reply.status == 200
                assert reply.headers["access-control-allow-origin"] == "*"
                assert reply.headers["access-control-expose-headers"] == "*"
                assert reply.headers["x-request-id"].startswith("cmpl-")
            reply = await client.post(COMPLETIONS, b"no JSON")
            assert reply.status == 400
            assert reply.headers["x-request-id"]
            assert reply.headers["access-control-allow-origin"] == "*"
            asked = (
                (b"origin", b"http://page"),
                (b"access-control-request-method", b"POST"),
                (b"access-control-request-headers", b"authorization"),
            )
            reply = await client.request("OPTIONS", COMPLETIONS, b"", asked)
            assert reply.status == 200
            assert reply.headers["access-control-allow-headers"] == "authorization"

    run(main)


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/rerank"])
def test_a_wrong_method(path):
    async def main():
        async with workers(0) as fleet, service(fleet) as (_, client):
            reply = await client.get(path)
            assert (reply.status, reply.headers["allow"], reply.body) == (405, "POST", b"")

    run(main)


def test_a_body_that_is_too_large():
    async def main():
        async with workers(1) as fleet, service(fleet, max_payload_size=200) as (_, client):
            assert (await client.post(COMPLETIONS, BODY)).status == 200
            assert (await client.post(COMPLETIONS, BODY | {"x": "a" * 200})).status == 413
            assert len(fleet[0].seen) == 1

    run(main)


def test_max_concurrent_is_a_concurrency_limit():
    """Also: rate_limit_bounds_concurrency; those that wait are served in turn."""

    async def main():
        async with (
            workers(1, tpot=0.02, slots=64) as fleet,
            service(fleet, max_concurrent_requests=2, queue_size=10) as (router, client),
        ):
            replies = await asyncio.gather(
                *(client.post(COMPLETIONS, BODY | {"stream": i % 2 == 0}) for i in range(8))
            )
            assert [reply.status for reply in replies] == [200] * 8
            assert fleet[0].counts.max_in_flight == 2
            assert b'smg_http_rate_limit_total{result="allowed"} 8.0' in router.metrics_page()

    run(main)


def test_rate_limit_queue_full_429_and_queue_timeout_408():
    """Also: rate_limit_rejection_is_informative."""

    async def main():
        async with (
            workers(1, tpot=0.1) as fleet,
            service(fleet, max_concurrent_requests=1, queue_size=1, queue_timeout_secs=0.15) as (
                router,
                client,
            ),
        ):
            tasks = []
            for _ in range(3):
                tasks.append(
                    asyncio.create_task(client.post(COMPLETIONS, BODY | {"max_tokens": 9}))
                )
                await asyncio.sleep(0.03)
            first, waited, refused = await asyncio.gather(*tasks)
            assert [first.status, waited.status, refused.status] == [200, 408, 429]
            for reply, code in ((waited, "queue_timeout"), (refused, "rate_limited")):
                assert reply.code == code
                assert int(reply.headers["retry-after"]) >= 1
                assert reply.json()["error"]["message"]
            page = router.metrics_page()
            assert b'smg_http_rate_limit_total{result="rejected"} 2.0' in page
            assert b'smg_http_responses_total{error_code="rate_limited",status_code="429"}' in page

    run(main)


def test_a_client_that_leaves_the_queue_makes_room():
    async def main():
        async with (
            workers(1, tpot=0.05) as fleet,
            service(fleet, max_concurrent_requests=1, queue_size=1) as (router, client),
        ):
            first = asyncio.create_task(client.post(COMPLETIONS, BODY | {"max_tokens": 8}))
            await asyncio.sleep(0.05)
            leaves = asyncio.create_task(client.post(COMPLETIONS, BODY))
            await asyncio.sleep(0.05)
            leaves.cancel()
            await asyncio.sleep(0.05)
            third = await client.post(COMPLETIONS, BODY)
            assert third.status == 200
            assert (await first).status == 200
            assert len(fleet[0].seen) == 2
            assert router.proxy.limiter.num_running == 0

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_dp_aware_requests_name_their_rank(stream):
    async def main():
        async with (
            workers(1, dp_size=3) as fleet,
            service(fleet, dp_aware=True, num=3) as (router, client),
        ):
            names = {worker.url for worker in router.registry.list()}
            assert names == {f"{fleet[0].url}@{rank}" for rank in range(3)}
            raw = json.dumps(BODY | {"stream": stream}).encode()
            for _ in range(6):
                assert (await client.post(COMPLETIONS, raw)).status == 200
            ranks = [seen.body["data_parallel_rank"] for seen in fleet[0].seen]
            assert sorted(ranks) == [0, 0, 1, 1, 2, 2]
            assert all(seen.raw.startswith(raw[:-1] + b",") for seen in fleet[0].seen)

    run(main)


def test_a_dead_server_takes_all_its_ranks_with_it():
    """A retry goes to another server, not to the dead one's next rank."""

    async def main():
        async with (
            workers(2, dp_size=4) as fleet,
            service(fleet, dp_aware=True, num=8, retry_max_retries=2) as (_, client),
        ):
            await fleet[0].kill()
            for _ in range(8):
                assert (await client.post(COMPLETIONS, BODY)).status == 200

    run(main)


def test_several_models_behind_one_router():
    async def main():
        async with (
            workers(1, model="one") as first,
            workers(1, model="two") as second,
            service([*first, *second], enable_igw=True, retry_max_retries=1) as (_, client),
        ):
            for _ in range(3):
                assert (await client.post(COMPLETIONS, BODY | {"model": "two"})).status == 200
            assert (len(first[0].seen), len(second[0].seen)) == (0, 3)
            assert (await client.post(COMPLETIONS, BODY | {"model": "three"})).status == 503

    run(main)


def test_an_unknown_model_is_routed_like_any_other():
    async def main():
        async with workers(1) as fleet, service(fleet) as (_, client):
            assert (await client.post(COMPLETIONS, BODY | {"model": "any"})).status == 200

    run(main)


def test_circuits_ignore_client_errors_and_busy_workers_but_not_broken_streams():
    """circuit_ignores_client_errors, circuit_counts_broken_streams."""

    async def main():
        async with (
            workers(1, continues=False) as fleet,
            service(fleet, cb_failure_threshold=3, disable_retries=True) as (router, client),
        ):
            (worker,) = router.registry.list()
            for status in (400, 422, 429, 503):
                fleet[0].faults.status = status
                for _ in range(4):
                    assert (await client.post(COMPLETIONS, BODY)).status == status
                assert worker.breaker.state == "closed"
            fleet[0].faults.update({"status": 0, "die_after_chunks": 1})
            for _ in range(3):
                assert "error" in (await client.stream()).events[-2]
            assert worker.breaker.state == "open"
            assert (await client.post(COMPLETIONS, BODY)).code == "no_available_workers"

    run(main)


def test_what_the_metrics_say_of_it():
    async def main():
        async with workers(2) as fleet, service(fleet, policy="cache_aware") as (router, client):
            for _ in range(3):
                await client.post(COMPLETIONS, BODY | {"prompt": "x" * 640})
            await client.stream(stream_options={"include_usage": True})
            page = router.metrics_page().decode()
            lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
            find = lambda *parts: [  # noqa: E731
                float(v) for k, v in lines.items() if all(part in k for part in parts)
            ]
            requests = find("smg_router_requests_total", 'model="mock-model"', 'streaming="false"')
            assert requests == [3.0]
            assert sum(find("smg_worker_requests_active{")) == 0.0
            assert len(find("smg_worker_requests_active{")) == 2
            assert max(find("sglang_cache_hit_rate{source=")) > 0.3
            assert find("smg_router_ttft_seconds_count") == [1.0]
            assert find("smg_router_tokens_total", "output") == [21.0]
            assert find("smg_http_responses_total", 'status_code="200"') == [4.0]
            assert find("smg_http_connections_active") == [0.0]
            assert find("sgl_router_cache_hits_total") == [2.0]

    run(main)


def test_large_bodies_pass():
    async def main():
        async with workers(1) as fleet, service(fleet) as (_, client):
            raw = json.dumps(BODY | {"prompt": "many words " * 500_000}).encode()
            reply = await client.post(COMPLETIONS, raw)
            assert reply.status == 200
            assert fleet[0].last.raw == raw

    run(main)


def test_a_crash_that_breaks_many_streams_is_one_failure():
    async def main():
        async with (
            workers(2, tpot=0.02) as fleet,
            service(fleet, cb_failure_threshold=3) as (router, client),
        ):
            tasks = [asyncio.create_task(client.stream(max_tokens=20)) for _ in range(20)]
            await asyncio.sleep(0.15)
            await fleet[0].kill()
            await fleet[0].start()
            assert [len((await task).text()) for task in tasks] == [80] * 20
            assert {worker.breaker.state for worker in router.registry.list()} == {"closed"}

    run(main)


def test_a_worker_that_is_back_gets_streams_at_once():
    """In half open, a stream's first token is what a probe asks for, not its end."""

    async def main():
        async with (
            workers(1, tpot=0.05, slots=64) as fleet,
            service(
                fleet, cb_failure_threshold=2, cb_timeout_duration_secs=0.1, disable_retries=True
            ) as (router, client),
        ):
            (worker,) = router.registry.list()
            fleet[0].faults.status = 500
            for _ in range(2):
                await client.stream()
            assert worker.breaker.state == "open"
            fleet[0].faults.status = 0
            await asyncio.sleep(0.15)
            tasks = []
            for _ in range(8):
                tasks.append(asyncio.create_task(client.stream(max_tokens=20)))
                await asyncio.sleep(0.03)
            assert worker.breaker.state == "closed"
            assert [(await task).status for task in tasks] == [200] * 8

    run(main)


PUBLIC = """
GET /health | GET /liveness | GET /readiness | GET /health_generate | GET /engine_metrics
GET /v1/models | GET /get_model_info | GET /model_info | GET /get_server_info | GET /server_info
"""
GUARDED = """
POST /v1/completions | POST /v1/chat/completions | POST /generate | POST /v1/responses
POST /v1/embeddings | POST /v1/rerank | POST /rerank | POST /v1/classify
POST /flush_cache | GET /get_loads | GET /v1/loads | POST /abort_request
POST /workers | GET /workers | GET /workers/x | PUT /workers/x | DELETE /workers/x
POST /add_worker | POST /remove_worker | GET /list_workers
"""


def listed(table):
    return [entry.split() for entry in re.split(r"[|\n]", table) if entry.strip()]


def test_every_path_of_the_peer_is_there_and_those_that_matter_want_the_key():
    """Section 3, and the older routes."""

    async def main():
        async with (
            workers(1, api_key="k") as fleet,
            service(fleet, api_key="k", worker_startup_timeout_secs=0.1) as (_, client),
        ):
            for method, path in listed(PUBLIC):
                reply = await client.request(method, path, headers=())
                assert reply.status == 200, path
            for method, path in listed(GUARDED):
                reply = await client.request(method, path, BODY)
                assert (reply.status, reply.code) == (401, "unauthorized"), path
                reply = await client.request(method, path, BODY, (JSON, bearer(b"k")))
                assert reply.status not in (401, 404, 405), (path, reply)
                assert reply.headers["x-request-id"]
                wrong = "GET" if method == "POST" else "POST"
                if [wrong, path] not in listed(GUARDED) + listed(PUBLIC):
                    reply = await client.request(wrong, path, BODY, (JSON, bearer(b"k")))
                    assert (reply.status, reply.body) == (405, b""), path
                    assert method in reply.headers["allow"]

    run(main)


def test_all_endpoints_count_as_load_and_are_spread():
    """Complaint 15: those that the peer does not type go to one worker, uncounted."""

    async def main():
        async with workers(2) as fleet, service(fleet, policy="power_of_two") as (router, client):
            one, other = router.registry.list()
            one.in_flight += 1
            paths = [path for _, path in listed(GUARDED)[:8]]
            for path in paths:
                assert (await client.post(path, BODY | {"input": "x"})).status == 200, path
            assert len(fleet[0].seen) == 0
            assert [seen.path for seen in fleet[1].seen] == paths
            assert (one.in_flight, other.in_flight) == (1, 0)
            page = router.metrics_page().decode()
            for name in ("chat", "embeddings", "rerank", "classify", "responses", "generate"):
                assert re.search(f'smg_router_requests_total{{\\S*endpoint="{name}"', page), name

    run(main)


def test_what_the_metrics_say_of_retries():
    async def main():
        async with workers(2) as fleet, service(fleet, retry_max_retries=3) as (router, client):
            for worker in fleet:
                worker.faults.update({"status": 500, "status_count": 1})
            assert (await client.post(COMPLETIONS, BODY)).status == 200
            fleet[0].faults.update({"status": 500, "status_count": -1})
            fleet[1].faults.update({"status": 500, "status_count": -1})
            assert (await client.post(COMPLETIONS, BODY)).status == 500
            page = router.metrics_page().decode()
            labels = '{endpoint="completions",worker_type="regular"}'
            assert f"smg_worker_retries_total{labels} 4.0" in page
            assert f"smg_worker_retries_exhausted_total{labels} 1.0" in page
            assert 'smg_worker_retry_backoff_seconds_count{attempt="1"} 2.0' in page
            assert re.search(r'request_errors_total{\S*error_type="backend_error"\S*} 1.0', page)
            upstream = 'smg_router_upstream_responses_total{error_code="",router_type="http",'
            assert f'{upstream}status_code="500"}} 5.0' in page

    run(main)


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_answers_count_as_cached_where_they_were_computed(path, stream, continues):
    """Not those of streams that only pass: to read them would cost more than it is worth."""

    async def main():
        async with (
            workers(1, continues=continues) as fleet,
            service(fleet, policy="cache_aware") as (router, client),
        ):
            prompt = "q" * 640
            body = {"model": "m", "max_tokens": 100, "temperature": 0, "stream": stream}
            talk = [{"role": "user", "content": prompt}]
            body |= {"messages": talk} if path == CHAT else {"prompt": prompt}
            answer = (await client.post(path, body)).text()
            assert len(answer) == 400
            (worker,) = router.registry.list()
            known = router.router.index.num_blocks(worker.bit)
            assert known == (640 + 400) // 64 if continues or not stream else 640 // 64
            # It is what the next turn begins with.
            if path == CHAT:
                talk += [{"role": "assistant", "content": answer}, talk[0]]
                body |= {"messages": talk}
            else:
                body |= {"prompt": prompt + answer + "?" * 64}
            request = RoutedRequest.parse(path, json.dumps(body).encode())
            depth = router.router.index.match(request.blocks, 1 << worker.bit)[worker.bit]
            assert depth == known

    run(main)


def test_answers_in_token_ids_count_as_cached_too():
    async def main():
        async with workers(1) as fleet, service(fleet, policy="cache_aware") as (router, client):
            await client.stream(prompt=list(range(160)), max_tokens=100)
            (worker,) = router.registry.list()
            assert router.router.index.num_blocks(worker.bit) == 260 // 16

    run(main)
