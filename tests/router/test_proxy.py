"""A generation request on its way through the router, with simulated workers behind it."""

import asyncio
import contextlib
import errno
import json
import re

import pytest

from tests.router.support import CHAT, COMPLETIONS, routed, run, workers

pytestmark = pytest.mark.timeout(60)

BODY = {"model": "m", "prompt": "hello there", "max_tokens": 3, "temperature": 0}


def urls(fleet):
    return [worker.url for worker in fleet]


async def until(condition, seconds=5):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "path", [COMPLETIONS, CHAT, "/generate", "/v1/responses", "/v1/embeddings"]
)
def test_body_not_rewritten(path):
    """Spaces, order, unknown fields, big numbers: the worker gets what the client sent."""
    raw = (
        b'{ "messages":[{"role":"user","content":"\\u00fc"}], "unknown": {"a":1.50E+2},\n'
        b' "prompt":"x","max_tokens":2 ,"input":"y","seed":123456789012345678901}  \n'
    )

    async def main():
        async with workers(1) as fleet, routed(urls(fleet)) as server:
            reply = await server.client.post(path, raw)
            assert reply.status == 200, reply.body
            assert fleet[0].last.raw == raw
            assert fleet[0].last.path == path

    run(main)


def test_completion_token_id_prompt():
    async def main():
        async with workers(1) as fleet, routed(urls(fleet)) as server:
            reply = await server.client.post(COMPLETIONS, BODY | {"prompt": [5, 6, 7]})
            assert reply.status == 200
            assert fleet[0].last.body["prompt"] == [5, 6, 7]

    run(main)


def test_headers_of_request_and_answer():
    given = [
        (b"authorization", b"Bearer of-the-client"),
        (b"x-correlation-id", b"c"),
        (b"traceparent", b"t"),
        (b"tracestate", b"s"),
        (b"x-smg-routing-key", b"k"),
        (b"x-request-id-parent", b"p"),
        (b"cookie", b"secret"),
        (b"user-agent", b"me"),
        (b"x-forwarded-for", b"1.2.3.4"),
    ]

    async def main():
        async with workers(1) as fleet, routed(urls(fleet)) as server:
            reply = await server.client.post(COMPLETIONS, BODY, *given)
            seen = fleet[0].last.headers
            assert set(seen) == {
                "host",
                "content-type",
                "content-length",
                "x-request-id",
                *(name.decode() for name, _ in given[:6]),
            }
            assert seen["authorization"] == "Bearer of-the-client"
            assert reply.headers["x-sim-worker"] == str(fleet[0].port)
            assert reply.headers["content-type"] == "application/json"
            assert int(reply.headers["content-length"]) == len(reply.body)
            assert reply.headers["vary"] == "origin"

    run(main)


def test_the_key_of_a_worker_replaces_the_clients():
    async def main():
        async with workers(1, api_key="worker-key") as fleet, routed(urls(fleet)) as server:
            server.registry.list()[0].api_key = "worker-key"
            reply = await server.client.post(COMPLETIONS, BODY, (b"authorization", b"Bearer x"))
            assert reply.status == 200
            assert fleet[0].last.headers["authorization"] == "Bearer worker-key"

    run(main)


@pytest.mark.parametrize(
    ("path", "prefix"),
    [(COMPLETIONS, "cmpl-"), (CHAT, "chatcmpl-"), ("/generate", "gnt-"), ("/v1/rerank", "req-")],
)
def test_generated_request_id_reaches_worker(path, prefix):
    async def main():
        async with workers(1) as fleet, routed(urls(fleet)) as server:
            body = {"messages": [], "prompt": "x", "query": "q", "documents": ["a"], "model": "m"}
            body["messages"] = [{"role": "user", "content": "x"}]
            ids = set()
            for _ in range(3):
                reply = await server.client.post(path, body)
                ids.add(reply.headers["x-request-id"])
                assert fleet[0].last.headers["x-request-id"] in ids
            assert len(ids) == 3
            assert all(re.fullmatch(prefix + "[A-Za-z0-9]{24}", i) for i in ids)

    run(main)


def test_the_first_present_id_header_of_the_list_counts():
    async def main():
        async with workers(1) as fleet, routed(urls(fleet)) as server:
            reply = await server.client.post(
                COMPLETIONS, BODY, (b"x-trace-id", b"third"), (b"x-correlation-id", b"second")
            )
            assert reply.headers["x-request-id"] == "second"
            assert fleet[0].last.headers["x-request-id"] == "second"
        async with (
            workers(1) as fleet,
            routed(urls(fleet), request_id_headers=("my-id",)) as server,
        ):
            reply = await server.client.post(
                COMPLETIONS, BODY, (b"x-request-id", b"no"), (b"my-id", b"mine")
            )
            assert reply.headers["x-request-id"] == "mine"

    run(main)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_workers_4xx_goes_to_the_client_unchanged_once(status):
    async def main():
        async with workers(2) as fleet, routed(urls(fleet)) as server:
            for worker in fleet:
                worker.faults.status = status
            reply = await server.client.post(COMPLETIONS, BODY)
            assert reply.status == status
            assert reply.json() == {"error": {"message": f"simulated {status}", "code": status}}
            assert sum(len(worker.seen) for worker in fleet) == 1

    run(main)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_failing_worker_costs_nothing_while_another_is_there(status, stream):
    """Also: retry_excludes_failed_worker."""

    async def main():
        async with workers(2) as fleet, routed(urls(fleet)) as server:
            fleet[0].faults.status = status
            for _ in range(6):
                reply = await server.client.post(COMPLETIONS, BODY | {"stream": stream})
                assert reply.status == 200
                assert len(reply.text()) == 12
            assert len(fleet[0].seen) <= 6

    run(main)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_when_attempts_are_used_up_the_last_answer_is_passed(status):
    async def main():
        async with (
            workers(1) as fleet,
            routed(urls(fleet), retry_max_retries=3, retry_max_backoff_ms=5) as server,
        ):
            fleet[0].faults.update({"status": status, "retry_after": 7})
            # It is waited no longer than the flag says.
            reply = await server.client.post(COMPLETIONS, BODY)
            assert reply.status == status
            assert reply.json()["error"]["message"] == f"simulated {status}"
            assert reply.headers["retry-after"] == "7"
            assert len(fleet[0].seen) == 3

    run(main)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for_when_nobody_else_is_there(status):
    async def main():
        async with workers(1) as fleet, routed(urls(fleet), retry_jitter_factor=0) as server:
            fleet[0].faults.update({"status": status, "status_count": 1, "retry_after": 1})
            assert (await server.client.post(COMPLETIONS, BODY)).status == 200
            first, second = (seen.time for seen in fleet[0].seen)
            assert 1.0 <= second - first < 1.5

    run(main)


def test_another_worker_is_asked_without_waiting_for_retry_after():
    async def main():
        async with workers(2) as fleet, routed(urls(fleet)) as server:
            fleet[0].faults.update({"status": 503, "retry_after": 20})
            async with asyncio.timeout(5):
                for _ in range(2):
                    assert (await server.client.post(COMPLETIONS, BODY)).status == 200
            assert fleet[0].seen

    run(main)


def test_disable_retries():
    async def main():
        async with workers(1) as fleet, routed(urls(fleet), disable_retries=True) as server:
            fleet[0].faults.status = 500
            assert (await server.client.post(COMPLETIONS, BODY)).status == 500
            assert len(fleet[0].seen) == 1

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_affinity_to_dead_worker_does_not_fail(stream):
    async def main():
        async with workers(2) as fleet, routed(urls(fleet)) as server:
            await fleet[1].kill()
            for _ in range(6):
                reply = await server.client.post(COMPLETIONS, BODY | {"stream": stream})
                assert reply.status == 200

    run(main)


def test_all_workers_dead():
    async def main():
        async with workers(1) as fleet, routed(urls(fleet), retry_max_retries=2) as server:
            await fleet[0].kill()
            reply = await server.client.post(COMPLETIONS, BODY)
            assert reply.status == 500
            assert reply.code == "call_upstream_request_error"
            assert reply.json()["error"]["type"] == "Internal Server Error"
            assert fleet[0].url in reply.json()["error"]["message"]
            assert reply.headers["x-request-id"]

    run(main)


def test_no_worker_at_all():
    async def main():
        async with routed([], retry_max_retries=2) as server:
            reply = await server.client.post(COMPLETIONS, BODY)
            assert reply.status == 503
            assert reply.json() == {
                "error": {
                    "type": "Service Unavailable",
                    "code": "no_available_workers",
                    "message": "No available workers (all circuits open or unhealthy)",
                }
            }

    run(main)


def test_a_body_that_breaks_off_is_asked_for_again():
    async def main():
        async with workers(2) as fleet, routed(urls(fleet)) as server:
            fleet[0].faults.truncate_body = True
            for _ in range(4):
                assert (await server.client.post(COMPLETIONS, BODY)).status == 200
            fleet[1].faults.truncate_body = True
            reply = await server.client.post(COMPLETIONS, BODY)
            assert (reply.status, reply.code) == (500, "read_response_body_failed")

    run(main)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
EVENT = b'data: {"choices":[{"index":0,"text":"a"}]}\n\n'
DONE = b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def answering(data):
    """The URL of a server that answers every request with these bytes, and hangs up."""

    async def connected(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
        writer.write(data)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("continues", [False, True])
def test_a_stream_that_ends_before_it_begins_is_asked_for_again(continues):
    """It may look as if it were whole."""

    async def main():
        async with (
            answering(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n") as empty,
            workers(1) as fleet,
            routed([empty, *urls(fleet)], continues=continues) as server,
        ):
            for _ in range(2):
                assert len((await server.client.stream()).text()) == 48

    run(main)


@pytest.mark.parametrize(
    ("path", "rest", "whole"),
    [(COMPLETIONS, b"", False), (COMPLETIONS, DONE, True), ("/v1/responses", b"", True)],
)
def test_the_end_of_a_connection_is_no_end_of_a_stream(path, rest, whole):
    """Without framing, a worker that dies looks like one that has said everything."""

    async def main():
        async with (
            answering(STREAM_HEAD + b"\r\n" + EVENT + rest) as url,
            routed([url], continues=False) as server,
        ):
            reply = await server.client.stream(path)
            if whole:
                assert reply.body == EVENT + rest
            else:
                assert b"without [DONE]" in reply.body
                assert reply.events[-1] == "[DONE]"

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_that_hangs_and_is_unhealthy_loses_its_requests(stream, monkeypatch):
    """What has no answer yet is asked for elsewhere."""
    monkeypatch.setattr("router.proxy.STALLED_S", 0.2)

    async def main():
        async with workers(2) as fleet, routed(urls(fleet)) as server:
            fleet[0].faults.hang = True
            asked = [
                asyncio.create_task(server.client.post(COMPLETIONS, BODY | {"stream": stream}))
                for _ in range(2)
            ]
            await until(lambda: fleet[0].seen)
            hung, other = server.registry.list()
            hung.health.healthy = other.health.healthy = False
            server.proxy.worker_unhealthy(hung)
            await asyncio.sleep(0.5)
            # Nobody else is there: it may still answer.
            assert sum(task.done() for task in asked) == 1
            other.health.healthy = True
            for task in asked:
                assert len((await task).text()) == 12
            assert hung.in_flight == 0

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_a_crash_under_many_that_wait_is_one_failure(stream):
    """Else their worker, which is back soon, is left alone for a minute."""

    async def main():
        async with workers(2) as fleet, routed(urls(fleet), cb_failure_threshold=3) as server:
            crashed, _ = server.registry.list()
            fleet[0].faults.hang = True
            asked = [
                asyncio.create_task(server.client.post(COMPLETIONS, BODY | {"stream": stream}))
                for _ in range(20)
            ]
            await until(lambda: crashed.in_flight == len(fleet[0].seen) == 10)
            await fleet[0].kill()
            for task in asked:
                assert len((await task).text()) == 12
            assert crashed.breaker.state == "closed"
            assert crashed.breaker.consecutive_failures == 1
            # Who asks it afterwards and fails is counted.
            for _ in range(4):
                await server.client.post(COMPLETIONS, BODY)
            assert crashed.breaker.state == "open"

    run(main)


def test_a_router_out_of_files_blames_no_worker(monkeypatch):
    async def full(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    async def main():
        async with workers(1) as fleet, routed(urls(fleet), cb_failure_threshold=2) as server:
            assert (await server.client.post(COMPLETIONS, BODY)).status == 200
            (worker,) = server.registry.list()
            server.upstream.forget(worker.url)
            monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", full)
            reply = await server.client.post(COMPLETIONS, BODY)
            assert (reply.status, reply.code) == (500, "call_upstream_request_error")
            assert worker.breaker.consecutive_failures == 0
            assert (worker.breaker.state, worker.in_flight) == ("closed", 0)
            monkeypatch.undo()
            assert (await server.client.post(COMPLETIONS, BODY)).status == 200

    run(main)


def test_a_client_that_leaves_a_worker_that_hangs_leaves_nothing_behind(monkeypatch):
    """In the moment in which its request is to be taken elsewhere."""
    monkeypatch.setattr("router.proxy.STALLED_S", 0.0)

    async def main():
        async with workers(2) as fleet, routed(urls(fleet), max_concurrent_requests=4) as server:
            fleet[0].faults.hang = True
            task = asyncio.create_task(server.client.post(COMPLETIONS, BODY))
            await until(lambda: fleet[0].seen)
            hung = server.registry.list()[0]
            hung.health.healthy = False
            server.proxy.worker_unhealthy(hung)
            for connection in server.front.connections:
                connection.abort()
            with contextlib.suppress(Exception):
                await task
            await until(lambda: not server.front.num_running)
            await until(lambda: server.limiter.num_running == 0)
            assert [worker.in_flight for worker in server.registry.list()] == [0, 0]
            await until(lambda: fleet[0].counts.in_flight == 0)

    run(main)


def test_an_error_of_the_router_itself_is_told(monkeypatch):
    async def main():
        async with workers(1) as fleet, routed(urls(fleet)) as server:

            def fails(*args):
                raise RuntimeError("a bug")

            monkeypatch.setattr(server.proxy, "answer_headers", fails)
            monkeypatch.setattr(server.router, "tokens", fails)
            reply = await server.client.post(COMPLETIONS, BODY)
            assert (reply.status, reply.code) == (500, "internal_error")
            monkeypatch.undo()
            monkeypatch.setattr("router.failover.ContinuedStream.feed", fails)
            last, done = (await server.client.stream()).events
            assert json.loads(last)["error"]["type"] == "internal_error"
            assert done == "[DONE]"
            page = server.metrics.page().decode()
            errors = r'smg_router_request_errors_total{\S*error_type="internal_error"\S*} (\S+)'
            assert re.search(errors, page)[1] == "2.0"
            assert server.registry.list()[0].in_flight == 0

    run(main)


@pytest.mark.parametrize(
    "field",
    [
        b'"continue_from":[{"token_ids":["a"]}]',
        b'"continue_from":[{"token_ids":[99999999999999999999]}]',
        b'"stream_options":{"a":"\xff"}',
    ],
)
def test_odd_fields_are_the_workers_business(field):
    async def main():
        async with workers(1) as fleet, routed(urls(fleet)) as server:
            fleet[0].faults.status = 400
            body = b'{"prompt":"x","stream":true,%b}' % field
            assert (await server.client.post(COMPLETIONS, body)).status == 400
            assert fleet[0].last.raw == body

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_request_timeout_is_504(stream):
    async def main():
        async with (
            workers(1) as fleet,
            routed(urls(fleet), request_timeout_secs=0.1, retry_max_retries=2) as server,
        ):
            fleet[0].faults.hang = True
            reply = await server.client.post(COMPLETIONS, BODY | {"stream": stream})
            assert (reply.status, reply.code) == (504, "call_upstream_timeout")
            assert len(fleet[0].seen) == 2

    run(main)


def test_a_stream_that_takes_too_long_ends_with_an_error_event():
    async def main():
        async with (
            workers(1, tpot=0.05) as fleet,
            routed(urls(fleet), request_timeout_secs=0.3) as server,
        ):
            reply = await server.client.stream(max_tokens=100)
            *_, error, done = reply.events
            assert json.loads(error)["error"]["code"] == 504
            assert done == "[DONE]"
            await until(lambda: fleet[0].counts.aborted == 1)

    run(main)


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        (b"text/plain", b"{}", 415),
        (b"", b"{}", 415),
        (b"application/json", b"{", 400),
        (b"application/json; charset=utf-8", b'{"prompt":"x","model":"m"}', 200),
    ],
)
def test_what_is_no_json(kind, body, status):
    async def main():
        async with workers(1) as fleet, routed(urls(fleet)) as server:
            headers = ((b"content-type", kind),) if kind else ()
            reply = await server.client.request("POST", COMPLETIONS, body, headers)
            assert reply.status == status
            assert reply.headers["x-request-id"]
            assert len(fleet[0].seen) == (status == 200)

    run(main)


def test_a_stream_passes_event_by_event():
    async def main():
        async with (
            workers(1, tpot=0.03, continues=False) as fleet,
            routed(urls(fleet), continues=False) as server,
        ):
            http, times = server.client._http, []
            loop = asyncio.get_running_loop()
            body = json.dumps(BODY | {"stream": True, "max_tokens": 5}).encode()
            response = await http.request(
                server.base, "POST", COMPLETIONS, [(b"content-type", b"application/json")], body
            )
            assert response.header(b"content-type").startswith(b"text/event-stream")
            got = b""
            while data := await response.chunk():
                times.append(loop.time())
                got += data
            assert len(times) >= 5
            assert times[-1] - times[0] > 0.1
            assert got.count(b"data: ") == 6
            assert fleet[0].last.raw == body

    run(main)


def test_stream_burst_not_delayed():
    """64 events at once through the router: the peer takes 44 ms (Nagle against delayed ACK)."""

    async def main():
        async with (
            workers(1, canned=True, tpot=0, default_max_tokens=64) as fleet,
            routed(urls(fleet)) as server,
        ):
            loop, times = asyncio.get_running_loop(), []
            for _ in range(20):
                begin = loop.time()
                reply = await server.client.stream()
                assert len(reply.events) == 65
                times.append(loop.time() - begin)
            assert sorted(times)[5] < 0.03

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_request_with_it(stream):
    async def main():
        async with workers(1, tpot=0.05) as fleet, routed(urls(fleet)) as server:
            reader, writer = await asyncio.open_connection(*server.base[7:].split(":"))
            body = json.dumps(BODY | {"stream": stream, "max_tokens": 500}).encode()
            writer.write(
                b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (COMPLETIONS.encode(), len(body), body)
            )
            if stream:
                await reader.readuntil(b"data: ")
            await until(lambda: fleet[0].counts.running == 1)
            writer.transport.abort()
            await until(lambda: fleet[0].counts.aborted == 1)
            await until(lambda: server.front.num_running == 0)
            assert [w.in_flight for w in server.registry.list()] == [0]

    run(main)


def test_slow_reader_does_not_grow_memory():
    async def main():
        async with (
            workers(1, tpot=0, default_max_tokens=200_000, prefill_base=0) as fleet,
            routed(urls(fleet)) as server,
        ):
            reader, writer = await asyncio.open_connection(*server.base[7:].split(":"), limit=4096)
            body = json.dumps(
                {"prompt": "x", "model": "m", "stream": True, "max_tokens": 200_000}
            ).encode()
            writer.write(
                b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (COMPLETIONS.encode(), len(body), body)
            )
            await reader.readuntil(b"data: ")
            before, steady = -1, 0
            async with asyncio.timeout(15):
                while steady < 5:  # the worker stands still
                    await asyncio.sleep(0.05)
                    now = fleet[0].counts.output_tokens
                    steady = steady + 1 if now == before else 0
                    before = now
            assert before < 100_000
            writer.transport.abort()
            await until(lambda: fleet[0].counts.aborted == 1)

    run(main)


def test_connections_to_workers_are_used_again():
    async def main():
        async with workers(1) as fleet, routed(urls(fleet)) as server:
            for stream in (False, True) * 5:
                await server.client.post(COMPLETIONS, BODY | {"stream": stream})
            assert len(fleet[0].connections) == 1

    run(main)


def test_many_at_once():
    async def main():
        async with workers(3, slots=64) as fleet, routed(urls(fleet)) as server:

            async def one(i):
                body = BODY | {
                    "prompt": f"prompt {i}",
                    "max_tokens": 1 + i % 7,
                    "stream": i % 2 == 0,
                }
                reply = await server.client.post(COMPLETIONS, body)
                assert reply.status == 200
                assert len(reply.text()) == 4 * (1 + i % 7)

            await asyncio.gather(*(one(i) for i in range(200)))
            assert sum(worker.counts.completed for worker in fleet) == 200
            assert [w.in_flight for w in server.registry.list()] == [0, 0, 0]

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_headers_of_one_connection_stay_on_it(stream):
    kind = b"text/event-stream" if stream else b"application/json"
    body = b"data: [DONE]\n\n" if stream else b"{}"
    raw = (
        b"HTTP/1.1 200 OK\r\nconnection: keep-alive\r\nkeep-alive: timeout=5\r\nte: x\r\n"
        b"proxy-authenticate: Basic\r\nupgrade: h2c\r\ntrailer: x\r\nx-request-id: theirs\r\n"
        b"x-other: kept\r\nset-cookie: a=1\r\nset-cookie: b=2\r\ncontent-type: %b\r\n"
        b"content-length: %d\r\n\r\n%b" % (kind, len(body), body)
    )

    async def answer(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                await reader.readexactly(int(length[1]))
                writer.write(raw)

    async def main():
        worker = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{worker.sockets[0].getsockname()[1]}"
        async with routed([url], continues=False) as server:
            response = await server.client._http.request(
                server.base,
                "POST",
                COMPLETIONS,
                [(b"content-type", b"application/json"), (b"x-request-id", b"mine")],
                json.dumps(BODY | {"stream": stream}).encode(),
            )
            names = {name for name, _ in response.headers}
            framing = b"transfer-encoding" if stream else b"content-length"
            assert names == {
                framing,
                *(b"x-request-id", b"x-other", b"set-cookie", b"content-type", b"vary"),
            }
            assert response.header(b"x-request-id") == b"mine"
            cookies = [value for name, value in response.headers if name == b"set-cookie"]
            assert cookies == [b"a=1", b"b=2"]
            assert await response.read() == body
        worker.close()

    run(main)
