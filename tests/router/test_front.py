"""The HTTP front by raw sockets: what is parsed, what is written, and when connections end."""

import asyncio
import contextlib
import socket

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from router.front import Front, as_asgi
from tests.router.support import run

pytestmark = pytest.mark.timeout(60)

HOST = b"host: x\r\n"


@contextlib.asynccontextmanager
async def fronted(handler, **options):
    """(front, function that opens a connection)."""
    front = Front(handler, **{"max_body": 1000, "too_large": b"too large"} | options)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    await front.listen(listener)
    writers = []

    async def connect():
        reader, writer = await asyncio.open_connection(*address)
        writers.append(writer)
        return reader, writer

    try:
        yield front, connect
    finally:
        for writer in writers:
            writer.transport.abort()
        await front.shut_down(0)


async def echo(call):
    text = f"{call.method} {call.path} {call.query.decode()} {len(call.body)}"
    call.answer(200, [(b"x-a", b"b")], text.encode())


async def answer(reader):
    """(status, headers, body) of the next answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    if headers.get("transfer-encoding") == "chunked":
        parts = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readexactly(2)
        body = b"".join(parts)
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = await reader.read()
    return int(head[0].split()[1]), headers, body


async def ask(connect, request):
    reader, writer = await connect()
    writer.write(request)
    return await answer(reader)


def test_a_connection_is_kept_and_bodies_of_both_framings_are_read():
    async def main():
        async with fronted(echo) as (front, connect):
            reader, writer = await connect()
            for request, text in [
                (b"GET /a%20b?c=d%20 HTTP/1.1\r\n" + HOST + b"\r\n", b"GET /a b c=d%20 0"),
                (b"POST /p HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc", b"POST /p  3"),
                (
                    b"POST /p HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n3\r\ncde\r\n"
                    b"0\r\n\r\n",
                    b"POST /p  5",
                ),
            ]:
                for byte in request:  # as slowly as it gets
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0)
                status, headers, body = await answer(reader)
                assert (status, body) == (200, text)
                assert headers == {"x-a": "b", "content-length": str(len(text))}
            assert len(front.connections) == 1
            assert front.num_running == 0

    run(main)


def test_requests_sent_ahead_are_answered_in_order():
    async def slow(call):
        await asyncio.sleep(0.02 if call.path == "/0" else 0)
        await echo(call)

    async def main():
        async with fronted(slow) as (_, connect):
            reader, writer = await connect()
            writer.write(b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % i for i in range(40)))
            for i in range(40):
                assert (await answer(reader))[2] == f"GET /{i}  0".encode()

    run(main)


@pytest.mark.parametrize(
    "request_head",
    [b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n"],
)
def test_connections_that_are_not_to_be_kept(request_head):
    async def main():
        async with fronted(echo) as (_, connect):
            reader, writer = await connect()
            writer.write(request_head)
            _, headers, _ = await answer(reader)
            assert headers["connection"] == "close"
            assert await reader.read() == b""

    run(main)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 70_000, 431),
        (b"POST / HTTP/1.1\r\ncontent-length: 1001\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\ncontent-length: 1001\r\n\r\n" + b"a" * 1001, 413),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n" + b"a" * 1001, 413),
        (b"POST / HTTP/1.1\r\ncontent-length: 1000\r\n\r\n" + b"a" * 1000, 200),
    ],
)
def test_what_is_refused(request_bytes, status):
    async def main():
        calls = []

        async def handler(call):
            calls.append(call)
            await echo(call)

        async with fronted(handler) as (_, connect):
            got, _, body = await ask(connect, request_bytes)
            assert got == status
            assert len(calls) == (status == 200)
            if status == 413:
                assert body == b"too large"

    run(main)


def test_a_refused_connection_ends_though_the_client_keeps_sending():
    async def main():
        async with fronted(echo) as (front, connect):
            reader, writer = await connect()
            writer.write(b"POST / HTTP/1.1\r\ncontent-length: 100000\r\n\r\n")
            assert (await answer(reader))[0] == 413
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionError):
                    while front.connections:
                        writer.write(b"a" * 100)
                        await asyncio.sleep(0.05)

    run(main)


def test_a_client_that_waits_to_send_is_told_to():
    async def main():
        async with fronted(echo) as (_, connect):
            reader, writer = await connect()
            writer.write(b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"ab")
            assert (await answer(reader))[2] == b"POST /  2"

    run(main)


def test_an_upgrade_is_not_taken():
    async def main():
        async with fronted(echo) as (_, connect):
            request = b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
            status, _, body = await ask(connect, request)
            assert (status, body) == (200, b"GET /  0")

    run(main)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_an_answer_in_pieces(version):
    async def handler(call):
        call.begin(200, [])
        await call.send(b"")
        await call.send(b"one ")
        await call.send(b"two ")
        call.end(b"three")

    async def main():
        async with fronted(handler) as (_, connect):
            request = b"GET / HTTP/%b\r\n\r\n" % version
            status, headers, body = await ask(connect, request)
            assert (status, body) == (200, b"one two three")
            assert ("transfer-encoding" in headers) == (version == b"1.1")

    run(main)


def test_a_client_that_leaves_cancels_the_call():
    async def main():
        left = asyncio.Event()

        async def handler(call):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                assert call.client_left
                left.set()
                raise

        async with fronted(handler) as (front, connect):
            _, writer = await connect()
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0.05)
            assert front.num_running == 1
            writer.transport.abort()
            await asyncio.wait_for(left.wait(), 5)
            assert front.num_running == 0

    run(main)


def test_what_follows_the_answer_is_not_cancelled():
    async def main():
        done = asyncio.Event()

        async def handler(call):
            call.answer(200, [], b"ok")
            await asyncio.sleep(0.05)
            done.set()

        async with fronted(handler) as (_, connect):
            reader, writer = await connect()
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await answer(reader)
            writer.transport.abort()
            await asyncio.wait_for(done.wait(), 5)

    run(main)


@pytest.mark.parametrize("begun", [False, True])
def test_a_handler_that_fails(begun):
    async def handler(call):
        if begun:
            call.begin(200, [])
            await call.send(b"half")
        raise RuntimeError("a bug")

    async def main():
        async with fronted(handler) as (front, connect):
            if begun:
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await ask(connect, b"GET / HTTP/1.1\r\n\r\n")
            else:
                assert (await ask(connect, b"GET / HTTP/1.1\r\n\r\n"))[0] == 500
            assert front.num_running == 0

    run(main)


def test_a_client_that_does_not_read_is_waited_for():
    async def main():
        sent = 0

        async def handler(call):
            nonlocal sent
            call.begin(200, [])
            for _ in range(300):
                await call.send(b"a" * 100_000)
                sent += 100_000
            call.end()

        async with fronted(handler) as (_, connect):
            reader, writer = await connect()
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0.5)
            before = sent
            await asyncio.sleep(0.1)
            assert sent == before < 20_000_000
            _, _, body = await answer(reader)
            assert len(body) == 30_000_000

    run(main)


def test_shutting_down_lets_calls_end():
    async def main():
        async def handler(call):
            await asyncio.sleep(0.2)
            await echo(call)

        async with fronted(handler) as (front, connect):
            idle_reader, _ = await connect()
            reader, writer = await connect()
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0.05)
            ending = asyncio.create_task(front.shut_down(5))
            assert await idle_reader.read() == b""
            assert (await answer(reader))[0] == 200
            assert await reader.read() == b""
            assert await ending is True
            with pytest.raises(OSError):  # noqa: PT011
                await connect()

    run(main)


def test_shutting_down_cuts_what_takes_too_long():
    async def main():
        async def handler(call):
            await asyncio.sleep(60)

        async with fronted(handler) as (front, connect):
            reader, writer = await connect()
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0.05)
            assert await front.shut_down(0.1) is False
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""

    run(main)


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", b"POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\na"]
)
def test_nobody_holds_a_connection_by_sending_nothing(monkeypatch, sent):
    for name in ("SWEEP_S", "KEEP_ALIVE_S", "HEAD_S"):
        monkeypatch.setattr(f"router.front.{name}", 0.05)

    async def main():
        async with fronted(echo) as (front, connect):
            reader, writer = await connect()
            writer.write(sent)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            assert not front.connections

    run(main)


@pytest.mark.parametrize("gap", [b"T / HTTP/1.1\r\n", b"bcde"])
def test_a_request_that_gets_on_is_not_cut(monkeypatch, gap):
    """However long its connection was idle before, or its body takes."""
    monkeypatch.setattr("router.front.SWEEP_S", 0.02)
    for name in ("KEEP_ALIVE_S", "HEAD_S"):
        monkeypatch.setattr(f"router.front.{name}", 0.5)
    request = b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nabcdefghi"

    async def main():
        async with fronted(echo) as (_, connect):
            reader, writer = await connect()
            await asyncio.sleep(0.35)
            before, _, after = request.partition(gap)
            for piece in (before, gap, after):
                writer.write(piece)
                await asyncio.sleep(0.2)
            assert (await answer(reader))[2] == b"POST /  9"

    run(main)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_stops_reading_does_not_hold_a_call_for_ever(monkeypatch, streamed):
    monkeypatch.setattr("router.front.SWEEP_S", 0.02)
    monkeypatch.setattr("router.front.STUCK_S", 0.3)
    ended = []

    async def main():
        async def handler(call):
            try:
                if not streamed:
                    call.answer(200, [], b"a" * 30_000_000)
                    return
                call.begin(200, [])
                while True:
                    await call.send(b"a" * 100_000)
            finally:
                ended.append(call.client_left)

        async with fronted(handler) as (front, connect):
            reader, writer = await connect()
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            # As long as it reads, however slowly, it is served.
            for _ in range(8):
                await asyncio.sleep(0.1)
                await reader.readexactly(2_000_000)
            assert front.connections
            async with asyncio.timeout(5):
                while front.connections or not ended:
                    await asyncio.sleep(0.02)
            assert ended == [streamed]

    run(main)


def test_shutting_down_lets_answers_go_out():
    async def main():
        async def handler(call):
            call.answer(200, [], b"a" * 30_000_000)

        async with fronted(handler) as (front, connect):
            reader, writer = await connect()
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0.1)
            ending = asyncio.create_task(front.shut_down(10))
            await asyncio.sleep(0.1)
            assert not ending.done()
            assert len((await answer(reader))[2]) == 30_000_000
            assert await ending is True

    run(main)


async def about(request: Request):
    return JSONResponse(
        {
            "id": request.path_params["id"],
            "query": dict(request.query_params),
            "body": (await request.body()).decode(),
            "header": request.headers.get("x-mine"),
            "client": request.client.host,
        },
        status_code=202,
        headers={"location": "/here"},
    )


async def pieces(request: Request):
    async def parts():
        yield "a"
        yield "b"

    return StreamingResponse(parts())


async def fails(request: Request):
    raise RuntimeError("a bug")


APP = Starlette(
    routes=[
        Route("/about/{id}", about, methods=["POST"]),
        Route("/pieces", pieces),
        Route("/fails", fails),
        Route("/text", lambda request: PlainTextResponse("hello")),
    ]
)


def test_an_asgi_application_behind_it():
    async def main():
        async with fronted(as_asgi(APP)) as (_, connect):
            reader, writer = await connect()
            writer.write(
                b"POST /about/%C3%BC?a=1 HTTP/1.1\r\nx-mine: y\r\ncontent-length: 2\r\n\r\nhi"
            )
            status, headers, body = await answer(reader)
            assert status == 202
            assert headers["location"] == "/here"
            assert headers["date"].endswith("gmt")
            text = body.decode()
            assert '"id":"ü"' in text
            assert '"query":{"a":"1"},"body":"hi","header":"y","client":"127.0.0.1"' in text
            writer.write(b"GET /pieces HTTP/1.1\r\n\r\n")
            assert (await answer(reader))[2] == b"ab"
            writer.write(b"HEAD /text HTTP/1.1\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"content-length: 5\r\n" in head
            writer.write(b"GET /nowhere HTTP/1.1\r\n\r\n")
            assert (await answer(reader))[0] == 404
            writer.write(b"GET /fails HTTP/1.1\r\n\r\n")
            assert (await answer(reader))[0] == 500

    run(main)
