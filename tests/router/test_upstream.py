"""The client to the workers, against servers that say exactly these bytes."""

import asyncio
import contextlib

import pytest

from router.upstream import BUFFER_BYTES, Broken, ConnectFailed, TimedOut, Upstream, parse_target

pytestmark = pytest.mark.timeout(60)

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def run(main):
    async def bounded():
        await asyncio.wait_for(main(), 20)

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def server(handler):
    """(url, list of the connections' writers) of a raw server; `handler(reader, writer)`."""
    writers = []

    async def connected(reader, writer):
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await handler(reader, writer)

    listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    upstream = Upstream()
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", writers, upstream
    finally:
        listener.close()
        for writer in writers:
            writer.close()
        await upstream.close()


async def request_of(reader):
    """Head and body of the next request on a connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return head, await reader.readexactly(int(line.split(b":")[1]))
    return head, b""


def always(*parts, pause=0.0):
    """A handler that answers every request with these bytes."""

    async def handler(reader, writer):
        while True:
            await request_of(reader)
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)

    return handler


def test_request_and_answer_pass_unchanged():
    seen = []

    async def handler(reader, writer):
        seen.append(await request_of(reader))
        writer.write(b"HTTP/1.1 201 Created\r\nX-Some: A b\r\nContent-Length: 3\r\n\r\n\x00\xffz")

    async def main():
        async with server(handler) as (url, _, upstream):
            response = await upstream.request(
                url, "POST", "/a?b=c", [(b"x-request-id", b"7")], b"{\xff}", timeout=5
            )
            assert response.status == 201
            assert response.headers == [(b"x-some", b"A b"), (b"content-length", b"3")]
            assert response.header(b"x-some") == b"A b"
            assert response.header(b"none") is None
            assert await response.read() == b"\x00\xffz"
            assert await response.chunk() == b""
        head, body = seen[0]
        assert head.startswith(b"POST /a?b=c HTTP/1.1\r\nhost: 127.0.0.1:")
        assert b"\r\nx-request-id: 7\r\n" in head
        assert body == b"{\xff}"

    run(main)


def test_connections_are_kept_and_used_again():
    async def main():
        async with server(always(OK)) as (url, writers, upstream):
            for _ in range(5):
                response = await upstream.request(url, "GET", "/health")
                assert await response.read() == b"ok"
            assert len(writers) == 1
            assert upstream.num_idle == 1
            both = [await upstream.request(url, "GET", "/") for _ in range(1)]
            both += await asyncio.gather(*(upstream.request(url, "GET", "/") for _ in range(3)))
            assert [await r.read() for r in both] == [b"ok"] * 4
            assert len(writers) <= 4
            upstream.forget(url)
            assert upstream.num_idle == 0

    run(main)


def test_a_kept_connection_that_the_worker_closed_costs_nothing():
    async def handler(reader, writer):
        await request_of(reader)
        writer.write(OK)
        await request_of(reader)  # the second one is not answered
        writer.close()

    async def main():
        async with server(handler) as (url, writers, upstream):
            for _ in range(4):
                response = await upstream.request(url, "POST", "/", body=b"{}")
                assert await response.read() == b"ok"
            assert len(writers) == 4

    run(main)


def test_a_request_that_the_worker_had_for_long_is_not_sent_again(monkeypatch):
    """It may be what the worker died of; whoever asked decides who gets it next."""
    monkeypatch.setattr("router.upstream.STALE_S", 0.1)
    num_seen = 0

    async def handler(reader, writer):
        nonlocal num_seen
        await request_of(reader)
        writer.write(OK)
        await request_of(reader)
        num_seen += 1
        await asyncio.sleep(0.2)
        writer.close()

    async def main():
        async with server(handler) as (url, writers, upstream):
            await (await upstream.request(url, "POST", "/", body=b"{}")).read()
            with pytest.raises(ConnectFailed) as failed:
                await upstream.request(url, "POST", "/", body=b"{}")
            assert failed.value.sent
            assert (num_seen, len(writers)) == (1, 1)

    run(main)


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n"]
)
def test_chunks_come_as_they_are_sent(head):
    chunked = b"chunked" in head

    def piece(data):
        return b"%x\r\n%b\r\n" % (len(data), data) if chunked else data

    async def handler(reader, writer):
        await request_of(reader)
        writer.write(head)
        for i in range(3):
            await asyncio.sleep(0.03)
            writer.write(piece(b"piece%d" % i))
        writer.write(piece(b"") if chunked else b"")
        writer.close()

    async def main():
        async with server(handler) as (url, _, upstream):
            response = await upstream.request(url, "GET", "/")
            got = [chunk async for chunk in response]
            assert got == [b"piece0", b"piece1", b"piece2"]

    run(main)


def test_an_informational_answer_is_not_the_answer():
    async def main():
        early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
        async with server(always(early, OK, pause=0.01)) as (url, _, upstream):
            for _ in range(2):
                response = await upstream.request(url, "POST", "/", body=b"x")
                assert response.status == 200
                assert await response.read() == b"ok"

    run(main)


def test_refused_and_unknown_hosts_are_connection_failures():
    async def main():
        async with server(always(OK)) as (url, _, _):
            pass
        upstream = Upstream()
        with pytest.raises(ConnectFailed, match="cannot connect"):
            await upstream.request(url, "GET", "/")
        with pytest.raises(ConnectFailed) as caught:
            await upstream.request("http://nowhere.invalid:1", "GET", "/")
        assert caught.value.url == "http://nowhere.invalid:1"

    run(main)


def test_closing_without_a_word_is_a_connection_failure():
    async def handler(reader, writer):
        await request_of(reader)
        writer.close()

    async def main():
        async with server(handler) as (url, writers, upstream):
            with pytest.raises(ConnectFailed, match="before the answer"):
                await upstream.request(url, "GET", "/")
            assert len(writers) == 1  # a fresh connection is not tried twice

    run(main)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n",
    ],
)
def test_a_body_that_breaks_off_is_told_after_what_came(answer):
    async def handler(reader, writer):
        await request_of(reader)
        writer.write(answer)
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.close()

    async def main():
        async with server(handler) as (url, _, upstream):
            response = await upstream.request(url, "GET", "/")
            assert await response.chunk() == b"half"
            with pytest.raises(Broken):
                await response.chunk()
            with pytest.raises(Broken):
                await response.read()

    run(main)


def test_what_is_not_http_is_a_failure():
    async def main():
        async with server(always(b"SSH-2.0-OpenSSH\r\n")) as (url, _, upstream):
            with pytest.raises(Broken, match="not HTTP"):
                await upstream.request(url, "GET", "/")

    run(main)


@pytest.mark.parametrize(
    "parts", [(), (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",)], ids=["head", "body"]
)
def test_the_timeout_is_for_the_whole_exchange(parts):
    async def main():
        async with server(always(*parts)) as (url, _, upstream):
            with pytest.raises(TimedOut):
                await (await upstream.request(url, "GET", "/", timeout=0.1)).read()
            assert upstream.num_idle == 0

    run(main)


def test_a_timeout_leaves_the_next_exchange_alone():
    """The timer of an exchange that ended must not hit the next one on the connection."""

    async def main():
        async with server(always(OK, pause=0.0)) as (url, writers, upstream):
            await (await upstream.request(url, "GET", "/", timeout=0.05)).read()
            response = await upstream.request(url, "GET", "/", timeout=5)
            await asyncio.sleep(0.1)
            assert await response.read() == b"ok"
            assert len(writers) == 1

    run(main)


@pytest.mark.parametrize("answered", [False, True])
def test_giving_up_hangs_up(answered):
    gone = asyncio.Event

    async def main():
        hung_up = gone()

        async def handler(reader, writer):
            await request_of(reader)
            if answered:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            hung_up.set()

        async with server(handler) as (url, _, upstream):
            task = asyncio.create_task(upstream.request(url, "GET", "/"))
            await asyncio.sleep(0.05)
            if answered:
                (await task).close()
            else:
                task.cancel()
            await asyncio.wait_for(hung_up.wait(), 5)
            assert upstream.num_idle == 0

    run(main)


def test_a_slow_reader_stops_the_worker():
    sent = 0

    async def handler(reader, writer):
        nonlocal sent
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        block = b"4000\r\n" + bytes(0x4000) + b"\r\n"
        for _ in range(4000):
            writer.write(block)
            sent += 0x4000
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def main():
        async with server(handler) as (url, _, upstream):
            response = await upstream.request(url, "GET", "/")
            await asyncio.sleep(0.5)
            before = sent
            await asyncio.sleep(0.2)
            assert sent == before < 4000 * 0x4000 / 2
            # One read of the socket may come on top.
            assert response.buffered <= BUFFER_BYTES + 300_000
            got = 0
            async for chunk in response:
                got += len(chunk)
            assert got == 4000 * 0x4000
            assert upstream.num_idle == 1

    run(main)


def test_more_than_the_answer_closes_the_connection():
    async def main():
        async with server(always(OK + OK)) as (url, writers, upstream):
            for _ in range(3):
                assert await (await upstream.request(url, "GET", "/")).read() == b"ok"
            assert len(writers) == 3

    run(main)


@pytest.mark.parametrize(
    ("url", "host", "port", "header", "prefix"),
    [
        ("http://a", "a", 80, b"a", b""),
        ("https://a", "a", 443, b"a", b""),
        ("http://a:8000/", "a", 8000, b"a:8000", b""),
        ("http://[::1]:8000/base/", "::1", 8000, b"[::1]:8000", b"/base"),
    ],
)
def test_targets(url, host, port, header, prefix):
    target = parse_target(url)
    assert (target.host, target.port) == (host, port)
    assert (target.host_header, target.prefix) == (header, prefix)


@pytest.mark.parametrize("url", ["a:8000", "grpc://a:1", "http://", ""])
def test_what_is_no_target(url):
    with pytest.raises(ValueError, match="http://host:port"):
        parse_target(url)
