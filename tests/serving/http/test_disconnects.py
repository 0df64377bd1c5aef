"""Clients that hang up on a real uvicorn: the engine forgets them, the others notice nothing."""

import asyncio
import contextlib
import json
import time

import httpx
import pytest

from tests.fakes import FakeEngine, answer
from tests.serving.http.support import TOKENIZER, listening, run

pytestmark = pytest.mark.timeout(30)


async def until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def read_stream(http, url, body, limit=None):
    """The text of a stream, or of its first `limit` events."""
    text = ""
    async with http.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as got:
        num = 0
        async for line in got.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            num += 1
            if num == limit:
                break
    return text


def test_some_of_many_streams_disconnect_midway():
    async def main():
        async with (
            listening(FakeEngine(delay_s=0.004)) as (url, state, engine),
            httpx.AsyncClient(timeout=20) as http,
        ):

            async def one(i):
                body = {"prompt": [9 + i], "max_tokens": 30 + i}
                if i % 4 == 0:
                    await read_stream(http, url, body, limit=5)
                    return
                expected = TOKENIZER.decode(answer(body["prompt"], 30 + i))
                assert await read_stream(http, url, body) == expected

            await asyncio.gather(*(one(i) for i in range(40)))
            await until(lambda: not engine.running)
            assert len(engine.aborted) == 10
            assert state.engine.num_open == 0
            assert state._live == {}

    run(main)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [[5], [[5], [6], [7]]])
def test_hanging_up_while_waiting(stream, prompt):
    """Queued in the engine, no byte sent yet: nothing but the connection tells."""

    async def main():
        async with listening(FakeEngine(hold=True)) as (url, state, engine):
            async with httpx.AsyncClient() as http:
                body = {"prompt": prompt, "stream": stream}
                posting = asyncio.create_task(http.post(f"{url}/v1/completions", json=body))
                num = len(prompt)
                await until(lambda: len(engine.running) == num)
                posting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await posting
            await until(lambda: len(engine.aborted) == num)
            await until(lambda: state._live == {})
            assert state.engine.num_open == 0

    run(main)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_hanging_up_on_pipelined_requests_ends_the_one_that_runs(stream, num, caplog):
    async def main():
        async with listening(FakeEngine(delay_s=0.02)) as (url, state, engine):
            host, port = url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            body = json.dumps({"prompt": [5], "max_tokens": 200, "stream": stream}).encode()
            head = (
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n"
            )
            writer.write((head % len(body) + body) * num)
            await until(lambda: engine.running)
            await asyncio.sleep(0.05)
            writer.transport.abort()
            await until(lambda: len(engine.aborted) == 1)
            await until(lambda: state._live == {})
            assert len(engine.seen) == 1  # the others were never begun

    run(main)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold", [False, True])
def test_hanging_up_ends_every_sample(stream, hold):
    async def main():
        fake = FakeEngine(hold=hold, delay_s=0.004)
        async with listening(fake) as (url, state, engine):
            async with httpx.AsyncClient() as http:
                body = {"prompt": [[5], [6]], "n": 3, "echo": True, "logprobs": 1}
                body |= {"max_tokens": 200, "stream": stream}
                posting = asyncio.create_task(http.post(f"{url}/v1/completions", json=body))
                await until(lambda: len(engine.running) == 6 and (hold or engine.steps > 3))
                posting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await posting
            await until(lambda: len(engine.aborted) == 6)
            await until(lambda: state._live == {})
            assert not engine.running
            assert state.engine.num_open == 0

    run(main)


def test_hanging_up_on_a_health_check_ends_its_request():
    async def main():
        async with listening(FakeEngine(hold=True)) as (url, state, engine):
            async with httpx.AsyncClient() as http:
                asking = asyncio.create_task(http.get(f"{url}/health_generate"))
                await until(lambda: engine.running)
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
            await until(lambda: not engine.running)
            assert state.engine.num_open == 0

    run(main)


def test_a_client_that_stops_reading_is_dropped_when_it_leaves():
    async def main():
        async with listening(FakeEngine(delay_s=0.001)) as (url, state, engine):
            host, port = url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port), limit=1)
            body = json.dumps({"prompt": [5], "max_tokens": 200, "stream": True}).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            await until(lambda: engine.running)
            writer.transport.abort()
            await until(lambda: engine.aborted)
            await until(lambda: state.engine.num_open == 0)

    run(main)


def test_hanging_up_in_the_middle_of_a_body():
    async def main():
        async with listening() as (url, state, engine):
            host, port = url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b'content-length: 100\r\n\r\n{"prompt":'
            )
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()
            async with httpx.AsyncClient() as http:
                response = await http.post(f"{url}/v1/completions", json={"prompt": [5]})
                assert response.status_code == 200
            assert len(engine.seen) == 1
            assert state._live == {}

    run(main)
