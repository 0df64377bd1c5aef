"""Clients that send too much, too slowly or nothing, over raw sockets behind a real uvicorn."""

import asyncio
import json
from urllib.parse import urlsplit

import pytest

from serving.http.bounded import MAX_HEAD_BYTES, BoundedHttp
from tests.fakes import FakeEngine
from tests.serving.http.support import listening, run

pytestmark = pytest.mark.timeout(30)

GET = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


class Hasty(BoundedHttp):
    head_timeout_s = 0.3
    body_timeout_s = 0.6


async def dial(url):
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def pour(writer, content, times=1):
    """Send until done or hung up on; how many bytes went out."""
    sent = 0
    try:
        for _ in range(times):
            writer.write(content)
            await writer.drain()
            sent += len(content)
    except ConnectionError:
        pass
    return sent


async def answer_of(reader):
    """(status, body) of all that the server still says before it hangs up."""
    content = b""
    try:
        while part := await asyncio.wait_for(reader.read(65536), 10):
            content += part
    except ConnectionError:
        pass
    head, _, body = content.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else None, body


ENDLESS = [
    ("fields", GET, b"x-a: " + b"a" * 1000 + b"\r\n"),
    ("names", GET, b"x" * 1000),
    ("small fields", GET, b"a: b\r\n" * 200),
    ("a value", GET + b"x-a: ", b"a" * 1000),
    ("a path", b"GET /", b"a" * 1000),
    ("trailers", POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"a: b\r\n" * 200),
]


@pytest.mark.parametrize(("what", "start", "more"), ENDLESS, ids=[e[0] for e in ENDLESS])
def test_endless_heads_end(what, start, more):
    async def main():
        async with listening() as (url, _, _engine):
            reader, writer = await dial(url)
            await pour(writer, start)
            sent = await pour(writer, more, times=100_000)
            assert sent < 50 << 20  # hung up on, after what the sockets hold
            status, body = await answer_of(reader)
            assert status in ((431, 400, None) if what == "trailers" else (431, None))
            if status == 431:
                assert json.loads(body)["message"] == "The header fields are larger than 64 KiB."
            writer.close()

    run(main)


def test_a_head_that_is_too_large_is_431():
    async def main():
        async with listening() as (url, _, _engine):
            for size, wanted in ((MAX_HEAD_BYTES - 200, 200), (MAX_HEAD_BYTES + 200, 431)):
                reader, writer = await dial(url)
                end = b"\r\nconnection: close\r\n\r\n"
                await pour(writer, GET + b"x-a: " + b"a" * size + end)
                status, body = await answer_of(reader)
                assert status == wanted
                assert json.loads(body)
                writer.close()

    run(main)


def test_large_bodies_are_no_heads():
    async def main():
        async with listening() as (url, _, engine):
            reader, writer = await dial(url)
            body = json.dumps({"prompt": [5], "max_tokens": 1, "user": "x" * 1_000_000}).encode()
            head = POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            await pour(writer, head + body)
            assert (await answer_of(reader))[0] == 200
            assert len(engine.seen) == 1
            reader, writer = await dial(url)
            await pour(writer, POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n")
            for i in range(0, len(body), 7000):  # many small chunks
                part = body[i : i + 7000]
                await pour(writer, b"%x\r\n" % len(part) + part + b"\r\n")
            await pour(writer, b"0\r\n\r\n")
            assert (await answer_of(reader))[0] == 200
            writer.close()

    run(main)


def test_one_connection_many_requests():
    async def main():
        async with listening(http=Hasty) as (url, _, _engine):
            reader, writer = await dial(url)
            for _ in range(5):
                await pour(writer, GET + b"x-a: " + b"a" * 30_000 + b"\r\n\r\n")
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                assert b" 200 " in head
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                await asyncio.sleep(0.1)
            await pour(writer, (GET + b"\r\n") * 3)  # pipelined
            await pour(writer, GET + b"connection: close\r\n\r\n")
            content = await asyncio.wait_for(reader.read(), 5)
            assert content.count(b"HTTP/1.1 200") == 4
            writer.close()

    run(main)


SLOW = [
    ("nothing", b"", None),
    ("half a head", GET, 408),
    ("half a body", POST + b"content-length: 100\r\n\r\n{", 408),
    ("empty lines", b"\r\n\r\n", None),
]


@pytest.mark.parametrize(("what", "start", "status"), SLOW, ids=[s[0] for s in SLOW])
def test_slow_clients_are_hung_up_on(what, start, status):
    async def main():
        async with listening(http=Hasty) as (url, state, engine):
            reader, writer = await dial(url)
            await pour(writer, start)
            drip = asyncio.create_task(pour_slowly(writer))
            began = asyncio.get_running_loop().time()
            got, body = await answer_of(reader)
            assert asyncio.get_running_loop().time() - began < 3
            assert got == status
            if status:
                assert json.loads(body)["message"] == "The request did not arrive in time."
            drip.cancel()
            writer.close()
            assert engine.seen == []
            assert not state._live

    async def pour_slowly(writer):
        """Something every 50 ms, as a slow-loris does."""
        drop = {"nothing": b"", "empty lines": b"\r\n"}.get(what, b"x")
        while True:
            await pour(writer, drop)
            await asyncio.sleep(0.05)

    run(main)


def test_long_answers_are_not_slow_requests():
    async def main():
        async with listening(FakeEngine(delay_s=0.03), http=Hasty) as (url, _, _engine):
            reader, writer = await dial(url)
            body = b'{"prompt": [5], "max_tokens": 50, "stream": true, "ignore_eos": true}'
            await pour(writer, POST + b"content-length: %d\r\n\r\n" % len(body) + body)
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            await pour(writer, b"GET /hea")  # half a request behind it does no harm
            content = await asyncio.wait_for(reader.read(), 10)
            assert b"data: [DONE]" in content
            assert b'"finish_reason":"length"' in content
            writer.close()

    run(main)


def test_a_wish_for_another_protocol():
    async def main():
        async with listening() as (url, _, engine):
            upgrade = b"connection: upgrade\r\nupgrade: h2c\r\n"
            reader, writer = await dial(url)
            for _ in range(2):
                await pour(writer, GET + upgrade + b"\r\n")
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                assert b" 200 " in head
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
            body = b'{"prompt": [5], "max_tokens": 1}'
            await pour(writer, POST + upgrade + b"content-length: %d\r\n\r\n" % len(body) + body)
            status, told = await answer_of(reader)
            assert status == 400
            assert "leave out the Upgrade header" in json.loads(told)["message"]
            assert engine.seen == []
            writer.close()

    run(main)
