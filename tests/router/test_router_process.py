"""The router's process: how it starts, what it says when it cannot, and how it ends."""

import asyncio
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from router.upstream import UpstreamError
from scripts.simulated_worker import SimulatedWorker
from tests.router.support import Client, run, workers

pytestmark = pytest.mark.timeout(90)

ROOT = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.asynccontextmanager
async def process(*flags):
    """(process, its port, the Prometheus port) of a router that may not start."""
    port, metrics = free_port(), free_port()
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "scripts" / "launch_router.py"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)),
        *flags,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        yield child, port, metrics
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def ready(client, num):
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(UpstreamError, ValueError):
                reply = await client.get("/readiness")
                if reply.status == 200 and reply.json()["healthy_workers"] == num:
                    return
            await asyncio.sleep(0.05)


def test_it_routes_shows_metrics_and_lets_streams_end():
    async def main():
        async with (
            workers(2, tpot=0.02) as fleet,
            process("--worker-urls", *(worker.url for worker in fleet)) as (
                child,
                port,
                metrics_port,
            ),
        ):
            first = (await child.stdout.readline()).decode()
            assert f"http://127.0.0.1:{port}" in first
            client = Client(f"http://127.0.0.1:{port}")
            await ready(client, 2)
            assert len((await client.stream()).text()) == 48
            for path in ("/metrics", "/", "/any/thing"):
                page = await client.get(path, base=f"http://127.0.0.1:{metrics_port}")
                assert page.status == 200
                assert b"smg_router_requests_total" in page.body
            task = asyncio.create_task(client.stream(max_tokens=50))
            await asyncio.sleep(0.3)
            child.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
            with pytest.raises(OSError):  # noqa: PT011
                await asyncio.open_connection("127.0.0.1", port)
            assert len((await task).text()) == 200
            await client.close()
            assert await asyncio.wait_for(child.wait(), 10) == 0
            assert b"Traceback" not in await child.stderr.read()

    run(main, 60)


@pytest.mark.parametrize("second_signal", [False, True])
def test_what_takes_too_long_is_cut(second_signal):
    grace = "60" if second_signal else "0.3"

    async def main():
        async with (
            workers(1, tpot=0.05) as fleet,
            process("--worker-urls", fleet[0].url, "--shutdown-grace-period-secs", grace) as (
                child,
                port,
                _,
            ),
        ):
            client = Client(f"http://127.0.0.1:{port}")
            await ready(client, 1)
            task = asyncio.create_task(client.stream(max_tokens=1000))
            await asyncio.sleep(0.3)
            child.send_signal(signal.SIGINT)
            if second_signal:
                await asyncio.sleep(0.2)
                assert child.returncode is None
                child.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(child.wait(), 10) == 0
            assert (await task).error
            await client.close()

    run(main, 60)


@pytest.mark.parametrize("flag", ["--port", "--prometheus-port"])
def test_a_port_in_use_is_one_sentence(flag):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            async with process(flag, port) as (child, _, _):
                out, err = await asyncio.wait_for(child.communicate(), 30)
                assert child.returncode == 1
                assert out == b""
                assert err.decode() == (
                    f"launch_router.py: error: Port {port} on 127.0.0.1 is already in use: choose "
                    f"another with {flag}.\n"
                )

    run(main, 60)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux only")
def test_it_may_open_as_many_files_as_the_system_allows():
    """The usual 1,024 are 500 streams."""

    async def main():
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        try:
            async with process() as (child, _, _):
                await child.stdout.readline()
                assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE)[0] == min(hard, 1 << 20)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    run(main)


def test_a_wrong_flag_is_one_sentence():
    async def main():
        async with process("--policy", "best") as (child, _, _):
            out, err = await asyncio.wait_for(child.communicate(), 30)
            assert child.returncode == 2
            assert out == b""
            assert err.startswith(b"launch_router.py: error: ")
            assert err.count(b"\n") == 1

    run(main, 60)


@pytest.mark.parametrize(
    "flags",
    [
        ("--tls-cert-path", "none.pem", "--tls-key-path", "none.pem"),
        ("--ca-cert-paths", "none.pem"),
    ],
)
def test_certificates_that_are_not_there_are_one_sentence(flags):
    async def main():
        async with process(*flags) as (child, _, _):
            _, err = await asyncio.wait_for(child.communicate(), 30)
            assert child.returncode == 1
            assert err.startswith(b"launch_router.py: error: ")
            assert flags[0].encode() in err
            assert err.count(b"\n") == 1

    run(main, 60)


def test_workers_that_are_not_there_yet():
    """The listener is up at once; 503 with a reason until a worker is."""

    async def main():
        async with process("--worker-urls", f"http://127.0.0.1:{free_port()}") as (child, port, _):
            await child.stdout.readline()
            client = Client(f"http://127.0.0.1:{port}")
            assert (await client.get("/health")).status == 200
            assert (await client.get("/readiness")).status == 503
            reply = await client.stream()
            assert reply.status == 503
            assert json.loads(reply.body)["error"]["code"] == "no_available_workers"
            await client.close()

    run(main, 60)


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6_on_both_sides():
    async def main():
        worker = await SimulatedWorker(host="::1").start()
        flags = ("--host", "::1", "--worker-urls", f"http://[::1]:{worker.port}")
        async with process(*flags) as (child, port, _):
            assert f"http://[::1]:{port}" in (await child.stdout.readline()).decode()
            client = Client(f"http://[::1]:{port}")
            await ready(client, 1)
            assert len((await client.stream()).text()) == 48
            await client.close()
        await worker.kill()

    run(main, 60)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_https_on_both_sides_and_a_log_file(tmp_path):
    """--tls-*, --ca-cert-paths, --client-*, --log-dir."""
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", cert),
        ],
        check=True,
        capture_output=True,
    )
    demanding = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=cert)
    demanding.load_cert_chain(cert, key)
    demanding.verify_mode = ssl.CERT_REQUIRED

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(size[1]) if size else 0)
        body = b'{"served_model_name": "m"}'
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        writer.close()

    async def main():
        worker = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=demanding)
        url = f"https://127.0.0.1:{worker.sockets[0].getsockname()[1]}"
        logs = tmp_path / "logs"
        flags = [
            *("--worker-urls", url, "--ca-cert-paths", cert, "--log-dir", str(logs)),
            *("--tls-cert-path", cert, "--tls-key-path", key),
        ]
        trusting = ssl.create_default_context(cafile=cert)
        mutual = ("--client-cert-path", cert, "--client-key-path", key)
        async with worker, process(*flags, *mutual) as (child, port, _):
            assert f"https://127.0.0.1:{port}" in (await child.stdout.readline()).decode()
            async with httpx.AsyncClient(
                base_url=f"https://127.0.0.1:{port}", verify=trusting
            ) as client:
                async with asyncio.timeout(20):
                    while (await client.get("/readiness")).status_code != 200:
                        await asyncio.sleep(0.05)
                reply = await client.post("/v1/completions", json={"prompt": "x"})
                assert (reply.status_code, reply.json()) == (200, {"served_model_name": "m"})
        assert f"Worker {url} is registered (model m)." in (logs / "router.log").read_text()
        worker = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=demanding)
        flags[1] = f"https://127.0.0.1:{worker.sockets[0].getsockname()[1]}"
        async with (
            worker,
            process(*flags) as (_, port, _),
            httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=trusting) as client,
        ):
            await asyncio.sleep(2)
            # Without the certificate that the worker asks for there is no worker.
            assert (await client.get("/readiness")).status_code == 503

    run(main, 60)
