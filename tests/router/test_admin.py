"""What the router answers by itself: health, workers, loads, metrics, with exact bodies."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time

import pytest

from router.app import RouterService
from router.config import RouterConfig
from router.front import Front
from router.worker_metrics import merge
from tests.router.support import COMPLETIONS, Client, run, workers

pytestmark = pytest.mark.timeout(60)

NOBODY = "00000000-0000-4000-8000-000000000000"


@contextlib.asynccontextmanager
async def service(*urls, **changes):
    """A whole router in this loop, its workers registered: (service, client)."""
    fields = {
        "policy": "round_robin",
        "retry_initial_backoff_ms": 1,
        "health_check_interval_secs": 0.1,
        "health_check_timeout_secs": 0.5,
        "worker_urls": tuple(urls),
    }
    config = RouterConfig(**{**fields, **changes})
    router = RouterService(config)
    front = Front(router.handler, max_body=config.max_payload_size)
    listener = socket.create_server(("127.0.0.1", 0))
    await front.listen(listener)
    await router.start()
    client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        await until(lambda: len({w.base_url for w in router.registry.list()}) == len(urls))
        yield router, client
    finally:
        await client.close()
        await front.shut_down(0)
        await router.stop()


async def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def add(client, url, **fields):
    """The reply to POST /workers, when its job is over."""
    reply = await client.post("/workers", {"url": url, **fields})
    if reply.status == 202:
        path = reply.headers["location"]
        while "job_status" in (told := (await client.get(path)).json()):
            if told["job_status"]["status"] == "failed":
                break
            await asyncio.sleep(0.01)
    return reply


def gone_url():
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# ---- public ------------------------------------------------------------------------------------


def test_health_and_readiness_with_a_worker():
    async def main():
        async with workers(2) as (a, b), service(a.url, b.url) as (_, client):
            for path in ("/health", "/liveness"):
                reply = await client.get(path)
                assert (reply.status, reply.body) == (200, b"OK")
                assert reply.headers["content-type"].startswith("text/plain")
            reply = await client.get("/readiness")
            assert reply.status == 200
            assert reply.json() == {"status": "ready", "healthy_workers": 2, "total_workers": 2}
            reply = await client.get("/health_generate")
            assert (reply.status, reply.body) == (200, b"At least one router has healthy workers")

    run(main)


def test_readiness_tells_why_not():
    async def main():
        down = gone_url()
        async with workers(1) as (sick,), service(sick.url) as (router, client):
            sick.faults.health = 500
            await until(lambda: not router.registry.list()[0].health.healthy)
            await client.post("/workers", {"url": down})
            reply = await client.get("/readiness")
            assert reply.status == 503
            told = reply.json()
            assert told["status"] == "not ready"
            assert told["reason"] == "insufficient healthy workers"
            assert (told["healthy_workers"], told["total_workers"]) == (0, 1)
            assert told["workers"] == {
                sick.url: "it does not answer its health checks",
                down: "it is not up yet",
            }
            assert (await client.get("/health_generate")).status == 503
            assert (await client.get("/health")).status == 200

    run(main)


def test_without_workers():
    async def main():
        async with service() as (_, client):
            reply = await client.get("/engine_metrics")
            assert (reply.status, reply.body) == (503, b"No available workers")
            assert (await client.get("/v1/models")).json() == {"object": "list", "data": []}
            for path in ("/get_model_info", "/model_info", "/server_info"):
                reply = await client.get(path)
                assert (reply.status, reply.code) == (503, "no_available_workers")
            assert (await client.get("/workers")).json() == {
                "workers": [],
                "total": 0,
                "stats": {"prefill_count": 0, "decode_count": 0, "regular_count": 0},
            }
            assert (await client.get("/get_loads")).json() == {"workers": []}

    run(main)


def test_models_and_infos():
    async def main():
        async with (
            workers(2) as (a, b),
            workers(1, model="other") as (c,),
            service(a.url, b.url, c.url, enable_igw=True) as (_, client),
        ):
            reply = await client.get("/v1/models")
            assert sorted(reply.json()["data"], key=lambda model: model["id"]) == [
                {"id": "mock-model", "object": "model", "owned_by": "local"},
                {"id": "other", "object": "model", "owned_by": "local"},
            ]
            for path in ("/get_model_info", "/model_info"):
                told = (await client.get(path)).json()
                assert told["is_generation"] is True
            told = (await client.get("/get_server_info")).json()
            assert told == {
                "router_manager": True,
                "routers_count": 1,
                "workers_count": 3,
                "policy": "round_robin",
            }
            assert (await client.get("/server_info")).json()["version"] == "simulated"
            # Several models behind one router: each request goes to a worker of its own.
            for _ in range(3):
                body = {"model": "other", "prompt": "x", "max_tokens": 1}
                assert (await client.post(COMPLETIONS, body)).status == 200
            assert len(c.seen) == 3
            body["model"] = "nobody's"
            assert (await client.post(COMPLETIONS, body)).status == 503

    run(main)


def test_unknown_paths_are_bare_and_wrong_methods_say_which():
    async def main():
        async with service() as (_, client):
            reply = await client.get("/nothing")
            assert (reply.status, reply.body) == (404, b"")
            assert "x-request-id" not in reply.headers
            assert "access-control-allow-origin" not in reply.headers
            for method, path, allow in [
                ("POST", "/health", "GET,HEAD"),
                ("GET", "/flush_cache", "POST"),
                ("PATCH", "/workers", "GET,HEAD,POST"),
                ("POST", f"/workers/{NOBODY}", "DELETE,GET,HEAD,PUT"),
                ("GET", COMPLETIONS, "POST"),
            ]:
                reply = await client.request(method, path, headers=())
                assert (reply.status, reply.body, reply.headers["allow"]) == (405, b"", allow)
            assert (await client.get("/health/")).status == 404

    run(main)


def test_every_answer_has_an_id_and_cors():
    async def main():
        async with service() as (_, client):
            reply = await client.get("/health")
            assert re.fullmatch(r"req-[0-9a-f]{24}", reply.headers["x-request-id"])
            assert reply.headers["access-control-allow-origin"] == "*"
            reply = await client.request(
                "GET", "/workers", headers=((b"x-trace-id", b"t"), (b"request-id", b"r"))
            )
            assert reply.headers["x-request-id"] == "t"

    run(main)


def test_the_key_opens_admin_routes_and_not_the_public_ones():
    async def main():
        async with (
            workers(1, api_key="secret") as (a,),
            service(a.url, api_key="secret") as (_, client),
        ):
            for path in ("/health", "/readiness", "/v1/models", "/get_server_info"):
                assert (await client.get(path)).status == 200
            for method, path in [
                ("GET", "/workers"),
                ("POST", "/workers"),
                ("GET", f"/workers/{NOBODY}"),
                ("DELETE", f"/workers/{NOBODY}"),
                ("PUT", f"/workers/{NOBODY}"),
                ("POST", "/flush_cache"),
                ("GET", "/get_loads"),
                ("POST", "/add_worker"),
                ("POST", "/remove_worker"),
                ("GET", "/list_workers"),
                ("POST", COMPLETIONS),
            ]:
                reply = await client.request(method, path)
                assert reply.status == 401, (method, path)
            key = (b"authorization", b"Bearer secret")
            assert (await client.request("GET", "/workers", headers=(key,))).status == 200
            # Workers that are named at start get the router's key.
            body = {"model": "x", "prompt": "x", "max_tokens": 1}
            reply = await client.post(COMPLETIONS, body, key)
            assert reply.status == 200

    run(main)


# ---- workers -----------------------------------------------------------------------------------


def test_a_worker_is_added_shown_changed_and_removed():
    async def main():
        async with workers(1) as (a,), service() as (router, client):
            reply = await client.post("/workers", {"url": a.url, "labels": {"zone": "b"}})
            told = reply.json()
            worker_id = told["worker_id"]
            assert reply.status == 202
            assert reply.headers["location"] == f"/workers/{worker_id}"
            assert told == {
                "status": "accepted",
                "worker_id": worker_id,
                "url": a.url,
                "location": f"/workers/{worker_id}",
                "message": "Worker addition queued for background processing",
            }
            await until(lambda: router.registry.get(worker_id))
            told = (await client.get(f"/workers/{worker_id}")).json()
            labels = told.pop("metadata")
            assert labels["zone"] == "b"
            assert labels["max_total_num_tokens"] == "40000"
            assert told == {
                "id": worker_id,
                "url": a.url,
                "model_id": "mock-model",
                "priority": 50,
                "cost": 1.0,
                "worker_type": "regular",
                "is_healthy": True,
                "load": 0,
                "connection_mode": "HTTP",
                "disable_health_check": False,
                "circuit": "closed",
                "draining": False,
            }
            listed = (await client.get("/workers")).json()
            assert listed["total"] == listed["stats"]["regular_count"] == 1
            assert listed["workers"][0]["id"] == worker_id

            changes = {"priority": 7, "cost": 2.5, "labels": {"rack": "1"}}
            reply = await client.request("PUT", f"/workers/{worker_id}", changes)
            assert reply.status == 202
            assert reply.json() == {
                "status": "accepted",
                "worker_id": worker_id,
                "message": "Worker update queued for background processing",
            }
            told = (await client.get(f"/workers/{worker_id}")).json()
            assert (told["priority"], told["cost"]) == (7, 2.5)
            assert told["metadata"]["priority"] == "7"
            assert told["metadata"]["cost"] == "2.5"
            assert (told["metadata"]["zone"], told["metadata"]["rack"]) == ("b", "1")

            reply = await client.request("DELETE", f"/workers/{worker_id}")
            assert reply.status == 202
            assert reply.json() == {
                "status": "accepted",
                "worker_id": worker_id,
                "message": "Worker removal queued for background processing",
            }
            assert (await client.get("/workers")).json()["total"] == 0
            # Added again it is another one.
            again = await add(client, a.url)
            assert again.json()["worker_id"] != worker_id

    run(main)


def test_a_worker_without_a_scheme_is_the_one_that_was_announced():
    async def main():
        async with workers(1) as (a,), service() as (_, client):
            told = (await add(client, a.url.removeprefix("http://"))).json()
            assert told["url"] == a.url
            worker = (await client.get(told["location"])).json()
            assert (worker["id"], worker["model_id"]) == (told["worker_id"], "mock-model")

    run(main)


def test_a_worker_that_is_not_up_is_pending_and_comes():
    async def main():
        async with workers(1) as (a,), service() as (router, client):
            await a.kill()
            told = (await client.post("/workers", {"url": a.url})).json()
            await asyncio.sleep(0.1)
            pending = (await client.get(told["location"])).json()
            status = pending.pop("job_status")
            assert pending == {
                "id": told["worker_id"],
                "url": a.url,
                "model_id": "unknown",
                "priority": 0,
                "cost": 1.0,
                "worker_type": "unknown",
                "is_healthy": False,
                "load": 0,
                "connection_mode": "unknown",
                "metadata": {},
                "disable_health_check": False,
            }
            assert abs(status.pop("timestamp") - time.time()) < 5
            assert status == {
                "job_type": "AddWorker",
                "worker_url": a.url,
                "status": "processing",
                "message": None,
            }
            assert (await client.get("/workers")).json()["total"] == 0
            await a.start()
            await until(lambda: router.registry.get(told["worker_id"]))

    run(main)


def test_a_registration_that_fails_says_why():
    async def main():
        async with (
            workers(1) as (a,),
            service(a.url, worker_startup_timeout_secs=0.3) as (_, client),
        ):
            path = (await add(client, gone_url())).headers["location"]
            status = (await client.get(path)).json()["job_status"]
            assert status["status"] == "failed"
            assert "was not healthy within 0.3 s" in status["message"]
            assert "cannot connect" in status["message"]
            path = (await add(client, a.url)).headers["location"]
            status = (await client.get(path)).json()["job_status"]
            assert status["message"] == f"Worker {a.url} already exists."
            assert (await client.get("/workers")).json()["total"] == 1

    run(main)


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{}", 422, "missing required field `url`"),
        (b'{"url": 3}', 422, "Failed to deserialize the JSON body into the target type"),
        (b"{", 400, "Failed to parse the request body as JSON"),
        (b'{"url": "ftp://x"}', 400, "must look like http://host:port"),
        (b'{"url": "grpc://x:1"}', 400, "gRPC workers are not served"),
        (b'{"url": "http://x:1", "worker_type": "prefill"}', 400, "no separate"),
        (b'{"url": "http://x:1", "health_failure_threshold": 0}', 400, "at least 1"),
    ],
)
def test_a_worker_that_cannot_be_added(body, status, text):
    async def main():
        async with service() as (_, client):
            reply = await client.post("/workers", body)
            assert reply.status == status
            assert text in reply.body.decode()

    run(main)


def test_too_many_jobs_at_once(monkeypatch):
    monkeypatch.setattr("router.registration.MAX_JOBS", 1)

    async def main():
        async with service() as (_, client):
            assert (await client.post("/workers", {"url": gone_url()})).status == 202
            reply = await client.post("/workers", {"url": gone_url()})
            assert (reply.status, reply.json()["code"]) == (503, "QUEUE_FULL")

    run(main)


def test_a_worker_that_is_added_again_has_a_new_id():
    async def main():
        async with workers(1) as (a,), service(a.url) as (router, client):
            (before,) = router.registry.list()
            await client.request("DELETE", f"/workers/{before.id}")
            assert (await client.get(f"/workers/{before.id}")).status == 404
            reply = await add(client, a.url)
            assert reply.json()["worker_id"] != before.id

    run(main)


def test_the_body_must_be_json_by_its_header():
    async def main():
        async with service() as (_, client):
            reply = await client.request("POST", "/workers", b"{}", headers=())
            assert reply.status == 415
            assert reply.body == b"Expected request with `Content-Type: application/json`"

    run(main)


def test_ids_that_are_none():
    async def main():
        async with service() as (_, client):
            for method in ("GET", "DELETE", "PUT"):
                reply = await client.request(method, "/workers/abc", b"{}")
                assert reply.status == 400
                told = reply.json()
                assert told["code"] == "BAD_REQUEST"
                assert told["error"].startswith("Invalid worker_id 'abc' (expected UUID). Error: ")
                reply = await client.request(method, f"/workers/{NOBODY}", b"{}")
                assert reply.status == 404
                assert reply.json() == {
                    "error": f"Worker {NOBODY} not found",
                    "code": "WORKER_NOT_FOUND",
                }

    run(main)


def test_the_older_routes():
    async def main():
        async with workers(1) as (a,), service(worker_startup_timeout_secs=0.2) as (_, client):
            reply = await client.post(f"/add_worker?url={a.url}", b"")
            assert (reply.status, reply.body.decode()) == (
                200,
                f"Successfully added worker: {a.url}",
            )
            assert (await client.get("/list_workers")).json() == {"urls": [a.url]}
            reply = await client.post(f"/add_worker?url={gone_url()}", b"")
            assert reply.status == 400
            assert b"was not healthy" in reply.body
            reply = await client.post(f"/remove_worker?url={a.url}", b"")
            assert (reply.status, reply.body.decode()) == (
                200,
                f"Successfully removed worker: {a.url}",
            )
            assert (await client.get("/list_workers")).json() == {"urls": []}
            assert (await client.post(f"/remove_worker?url={a.url}", b"")).status == 404
            assert (await client.post("/add_worker", b"")).status == 400

    run(main)


@pytest.mark.parametrize("drain", [False, True])
def test_a_removed_worker_finishes_its_streams_and_gets_no_new_request(drain):
    async def main():
        async with (
            workers(1, tpot=0.03) as (a,),
            workers(1) as (b,),
            service(a.url, b.url) as (router, client),
        ):
            worker = router.registry.by_url(a.url)
            streams = [asyncio.create_task(client.stream(max_tokens=20)) for _ in range(2)]
            await until(lambda: worker.in_flight == 1 and a.counts.running == 1)
            query = "?drain=20" if drain else ""
            reply = await client.request("DELETE", f"/workers/{worker.id}{query}")
            assert reply.status == 202
            shown = await client.get(f"/workers/{worker.id}")
            if drain:
                told = shown.json()
                assert told["draining"] is True
                assert told["load"] == 1
                assert told["job_status"]["job_type"] == "RemoveWorker"
            else:
                assert shown.status == 404
            for _ in range(4):
                assert (await client.stream(max_tokens=1)).status == 200
            assert len(a.seen) == 1
            for stream in await asyncio.gather(*streams):
                assert len(stream.chunks) >= 20
            await until(lambda: router.registry.get(worker.id) is None)

    run(main)


def test_a_drain_does_not_last_for_ever():
    async def main():
        async with workers(1, tpot=0.1) as (a,), service(a.url) as (router, client):
            worker = router.registry.list()[0]
            stream = asyncio.create_task(client.stream(max_tokens=20))
            await until(lambda: worker.in_flight)
            await client.request("DELETE", f"/workers/{worker.id}?drain=0.1")
            await until(lambda: not router.registry.list(), 1.5)
            assert not stream.done()
            assert (await stream).chunks
            reply = await client.request("DELETE", f"/workers/{NOBODY}?drain=soon")
            assert reply.status == 400

    run(main)


def test_a_worker_that_is_still_coming_can_be_removed():
    async def main():
        async with service() as (router, client):
            told = (await client.post("/workers", {"url": gone_url()})).json()
            reply = await client.request("DELETE", told["location"])
            assert reply.status == 202
            assert (await client.get(told["location"])).status == 404
            assert not router.registration.jobs

    run(main)


def test_dp_aware_registers_every_rank():
    async def main():
        async with (
            workers(1, dp_size=3) as (a,),
            service(a.url, dp_aware=True, health_failure_threshold=1) as (router, client),
        ):
            listed = (await client.get("/workers")).json()["workers"]
            assert [worker["url"] for worker in listed] == [f"{a.url}@{i}" for i in range(3)]
            assert len({worker["id"] for worker in listed}) == 3
            for _ in range(3):
                await client.post(COMPLETIONS, {"model": "x", "prompt": "x", "max_tokens": 1})
            assert [seen.body["data_parallel_rank"] for seen in a.seen] == [0, 1, 2]
            # One server is asked once, whatever its ranks are.
            before = a.counts.requests["/health"]
            await asyncio.sleep(0.45)
            assert 2 <= a.counts.requests["/health"] - before <= 6
            assert (await client.post("/flush_cache", b"")).json()["workers_flushed"] == 1
            assert len((await client.get("/get_loads")).json()["workers"]) == 3
            a.faults.health = 500
            await until(lambda: not any(w.health.healthy for w in router.registry.list()))
            await client.request("DELETE", f"/workers/{listed[1]['id']}")
            assert (await client.get("/workers")).json()["total"] == 0

    run(main)


# ---- fan-out -----------------------------------------------------------------------------------


def test_flush_cache_tells_who_failed():
    async def main():
        async with workers(2) as (a, b), service(a.url, b.url) as (_, client):
            reply = await client.post("/flush_cache", b"")
            assert reply.status == 200
            assert reply.json() == {
                "status": "success",
                "message": "Successfully flushed cache on all 2 HTTP workers",
                "workers_flushed": 2,
                "total_http_workers": 2,
                "total_workers": 2,
            }
            await b.kill()
            reply = await client.post("/flush_cache", b"")
            assert reply.status == 206
            told = reply.json()
            assert told["status"] == "partial_success"
            assert told["message"] == "Cache flush: 1 succeeded, 1 failed"
            assert told["successful"] == [a.url]
            assert [failed["worker"] for failed in told["failed"]] == [b.url]
            assert "cannot connect" in told["failed"][0]["error"]

    run(main)


def test_a_flush_makes_the_router_forget_what_it_knew():
    async def main():
        async with workers(1) as (a,), service(a.url, policy="cache_aware") as (router, client):
            await client.post(COMPLETIONS, {"model": "x", "prompt": "x" * 2000, "max_tokens": 1})
            worker = router.registry.list()[0]
            assert router.router.index.num_blocks(worker.bit) > 10
            page = router.metrics_page().decode()
            assert re.search(rf'sgl_router_tree_size{{worker="{a.url}"}} [1-9]', page)
            await client.post("/flush_cache", b"")
            assert router.router.index.num_blocks(worker.bit) == 0

    run(main)


def test_loads_are_asked_for_and_a_worker_without_one_has_minus_one():
    async def main():
        async with workers(2) as (a, b), service(a.url, b.url) as (_, client):
            a.faults.load_tokens = 77
            b.faults.load_status = 500
            for path in ("/get_loads", "/v1/loads"):
                told = (await client.get(path)).json()
                loads = {each["worker"]: each["load"] for each in told["workers"]}
                assert loads == {a.url: 77, b.url: -1}

    run(main)


@pytest.mark.parametrize(
    "odd", [b'{"a":"\xff"}', b"[7]", b"{", b'[{"num_tokens": "many"}]', b'{"loads": 5}']
)
def test_a_worker_that_answers_nonsense_spoils_nothing(odd):
    async def main():
        async with workers(2) as (a, b):
            told = a._told
            paths = ("/get_load", "/v1/loads", "/get_server_info", "/server_info", "/v1/models")

            def odd_told(path, headers, body):
                if path in paths:
                    return 200, odd, b"application/json"
                return told(path, headers, body)

            a._told = odd_told
            fields = {"policy": "power_of_two", "worker_startup_check_interval": 0.02}
            async with service(a.url, b.url, **fields) as (router, client):
                told_loads = (await client.get("/get_loads")).json()["workers"]
                loads = {each["worker"]: each["load"] for each in told_loads}
                assert loads == {a.url: -1, b.url: 0}
                one, other = (router.registry.by_url(w.url) for w in (a, b))
                assert one.capacity_tokens is None
                b.faults.load_tokens = 7
                await until(lambda: other.reported and other.reported.tokens == 7)

    run(main)


def test_engine_metrics_of_all_workers_in_one_page():
    async def main():
        async with workers(2) as (a, b), service(a.url, b.url) as (_, client):
            page = (await client.get("/engine_metrics")).body.decode()
            for worker in (a, b):
                assert (
                    f'sglang_cache_hit_rate{{model_name="mock-model",worker_addr="{worker.url}",'
                    f'source="{worker.url}"}} 0.0'
                ) in page
            assert page.count("# TYPE sglang_cache_hit_rate gauge") == 1
            assert "sglang:" not in page
            await b.kill()
            reply = await client.get("/engine_metrics")
            assert reply.status == 200
            assert a.url in reply.body.decode()
            assert b.url not in reply.body.decode()
            await a.kill()
            reply = await client.get("/engine_metrics")
            assert reply.status == 503
            assert a.url in reply.body.decode()

    run(main)


def test_pages_with_other_labels_merge():
    page = merge(
        {
            "http://a": '# HELP x:y text\n# TYPE x:y counter\nx:y{m="a:b",} 1\nx:y 2 1700\n',
            "http://b": (
                "# TYPE x:y gauge\n"
                'x:y{source="s",other="}"} +Inf\n'
                "nonsense line here\n# EOF\n"
                "# TYPE h histogram\n"
                'h_bucket{le="+Inf"} 1\nh_sum 2\nh_count 1\n'
            ),
        }
    )
    assert page.splitlines() == [
        "# HELP x_y text",
        "# TYPE x_y counter",
        'x_y{m="a:b",worker_addr="http://a",source="http://a"} 1',
        'x_y{worker_addr="http://a",source="http://a"} 2 1700',
        'x_y{exported_source="s",other="}",worker_addr="http://b",source="http://b"} +Inf',
        "# TYPE h histogram",
        'h_bucket{le="+Inf",worker_addr="http://b",source="http://b"} 1',
        'h_sum{worker_addr="http://b",source="http://b"} 2',
        'h_count{worker_addr="http://b",source="http://b"} 1',
    ]


# ---- health ------------------------------------------------------------------------------------


def test_thresholds_of_health():
    async def main():
        async with (
            workers(1) as (a,),
            service(a.url, health_failure_threshold=3, health_success_threshold=2) as (
                router,
                client,
            ),
        ):
            worker = router.registry.list()[0]
            checks = a.counts.requests
            a.faults.health = 503
            before = checks["/health"]
            await until(lambda: not worker.health.healthy)
            assert checks["/health"] - before >= 3
            # Unhealthy workers stay, and get nothing.
            assert (await client.get("/workers")).json()["workers"][0]["is_healthy"] is False
            body = {"model": "x", "prompt": "x", "max_tokens": 1}
            reply = await client.post(COMPLETIONS, body)
            assert (reply.status, reply.code) == (503, "no_available_workers")
            a.faults.health = 200
            before = checks["/health"]
            await until(lambda: worker.health.healthy)
            assert checks["/health"] - before >= 2
            assert (await client.post(COMPLETIONS, body)).status == 200
            page = router.metrics_page().decode()
            for result in ("success", "failure"):
                labels = f'{{result="{result}",worker_type="regular"}}'
                assert re.search(f"smg_worker_health_checks_total{labels} [1-9]", page)
            assert f'smg_worker_health{{worker="{a.url}"}} 1.0' in page

    run(main)


def test_a_check_that_hangs_is_a_failure_and_disabled_checks_are_none():
    async def main():
        async with (
            workers(2) as (a, b),
            service(health_failure_threshold=1, health_check_timeout_secs=0.1) as (router, client),
        ):
            await add(client, a.url)
            await add(client, b.url, disable_health_check=True)
            for worker in (a, b):
                worker.faults.health_delay = 5.0
            await until(lambda: not router.registry.by_url(a.url).health.healthy)
            await asyncio.sleep(0.2)
            assert router.registry.by_url(b.url).health.healthy
            told = (await client.get("/workers")).json()["workers"][1]
            assert told["disable_health_check"] is True

    run(main)


def test_where_health_is_asked_and_with_which_key():
    async def main():
        async with workers(1) as (a,):
            heard, handle = [], a.handle

            def listening(connection, path, headers, body):
                heard.append((path, headers.get("authorization")))
                handle(connection, path, headers, body)

            a.handle = listening
            fields = {"health_check_endpoint": "/health_generate", "api_key": "secret"}
            async with service(a.url, **fields):
                await until(lambda: len(heard) > 8)
            checks = [each for each in heard if each[0].startswith("/health")]
            assert len(checks) > 2
            assert set(checks) == {("/health_generate", "Bearer secret")}

    run(main)


def test_without_health_checks_a_worker_is_asked_once():
    async def main():
        async with workers(1) as (a,), service(a.url, disable_health_check=True) as (router, _):
            a.faults.health = 500
            await asyncio.sleep(0.4)
            assert a.counts.requests["/health"] == 1
            assert router.registry.list()[0].health.healthy

    run(main)


def test_health_fields_can_be_changed_for_one_worker():
    async def main():
        async with (
            workers(1) as (a,),
            service(a.url, health_check_interval_secs=100) as (router, client),
        ):
            worker = router.registry.list()[0]
            changes = {"health_failure_threshold": 1, "health_check_interval_secs": 0.1}
            await client.request("PUT", f"/workers/{worker.id}", changes)
            a.faults.health = 500
            await until(lambda: not worker.health.healthy)
            reply = await client.request(
                "PUT", f"/workers/{worker.id}", {"health_check_interval_secs": 0}
            )
            assert reply.status == 400

    run(main)


def test_a_worker_that_was_away_is_asked_anew_and_its_cache_counts_as_lost():
    async def main():
        async with (
            workers(1) as (a,),
            service(
                a.url,
                policy="cache_aware",
                health_failure_threshold=1,
                cb_failure_threshold=1,
                disable_retries=True,
            ) as (router, client),
        ):
            worker = router.registry.list()[0]
            assert worker.capacity_tokens == 40_000
            await client.post(COMPLETIONS, {"model": "x", "prompt": "x" * 2000, "max_tokens": 1})
            assert router.router.index.num_blocks(worker.bit)
            a.faults.status = 500
            await client.post(COMPLETIONS, {"model": "x", "prompt": "x", "max_tokens": 1})
            assert worker.breaker.state == "open"
            await a.kill()
            await until(lambda: not worker.health.healthy)
            assert router.router.index.num_blocks(worker.bit) == 0
            a.settings.cache_tokens = 10_000
            await a.start()
            await until(lambda: worker.health.healthy and worker.capacity_tokens == 10_000)
            # Its circuit was that of the server that went away.
            assert worker.breaker.state == "closed"

    run(main)


def test_a_worker_that_was_restarted_is_tried_as_soon_as_it_answers(monkeypatch):
    """Though its circuit is open, and health checks are rare."""
    monkeypatch.setattr("router.monitor.RETURN_CHECK_S", 0.05)

    async def main():
        async with (
            workers(1) as (a,),
            service(
                a.url,
                policy="cache_aware",
                health_check_interval_secs=60,
                cb_failure_threshold=2,
                disable_retries=True,
            ) as (router, client),
        ):
            (worker,) = router.registry.list()
            body = {"model": "x", "prompt": "x" * 2000, "max_tokens": 1}
            assert (await client.post(COMPLETIONS, body)).status == 200
            await a.kill()
            for _ in range(2):
                assert (await client.post(COMPLETIONS, body)).status == 500
            assert worker.breaker.state == "open"
            await asyncio.sleep(0.2)
            assert (await client.post(COMPLETIONS, body)).code == "no_available_workers"
            assert worker.health.healthy  # looking for it is no health check
            a.settings.cache_tokens = 10_000
            await a.start()
            await until(lambda: worker.breaker.state == "half_open")
            assert router.router.index.num_blocks(worker.bit) == 0
            await until(lambda: worker.capacity_tokens == 10_000)
            assert (await client.post(COMPLETIONS, body)).status == 200
            # What fails though it is there is not tried again so soon.
            a.faults.status = 500
            await client.post(COMPLETIONS, body)
            await asyncio.sleep(0.2)
            assert worker.breaker.state == "open"

    run(main)


def test_reported_loads_have_a_time_and_go_when_a_worker_tells_none():
    """power_of_two of the peer kept what a worker once said for ever."""

    async def main():
        async with (
            workers(1) as (a,),
            service(a.url, policy="power_of_two", worker_startup_check_interval=0.05) as (
                router,
                _,
            ),
        ):
            worker = router.registry.list()[0]
            a.faults.load_tokens = 5
            await until(lambda: worker.reported is not None and worker.reported.tokens == 5)
            at = worker.reported.at
            await until(lambda: worker.reported.at > at)
            a.faults.load_status = 500
            await until(lambda: worker.reported is None)

    run(main)


def test_requests_in_flight_are_in_the_metrics_under_every_policy():
    async def main():
        async with (
            workers(1, tpot=0.02) as (a,),
            service(a.url, policy="random") as (router, client),
        ):
            stream = asyncio.create_task(client.stream(max_tokens=20))
            await until(lambda: router.registry.list()[0].in_flight)
            line = f'smg_worker_requests_active{{worker="{a.url}"}}'
            page = router.metrics_page().decode()
            assert f"{line} 1.0" in page
            assert "sgl_router_max_load 1.0" in page
            assert re.search(r"smg_worker_connections_active{\S+} 1.0", page)
            await stream
            page = router.metrics_page().decode()
            assert f"{line} 0.0" in page
            # What came to admin routes is counted as well, ids left out.
            await client.get(f"/workers/{NOBODY}")
            page = router.metrics_page().decode()
            assert 'smg_http_requests_total{method="GET",path="/workers/{id}"} 1.0' in page
            assert 'smg_http_responses_total{error_code="",status_code="404"} 1.0' in page
            await client.request("DELETE", f"/workers/{router.registry.list()[0].id}")
            page = router.metrics_page().decode()
            assert f'smg_worker_health{{worker="{a.url}"}} -1.0' in page
            assert f'smg_worker_cb_state{{worker="{a.url}"}} -1.0' in page
            assert "smg_discovery_registrations_total" in page
            resident = re.search(r"process_resident_memory_bytes (\d\S+)", page)
            assert float(resident[1]) > 1e6

    run(main)
