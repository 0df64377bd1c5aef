"""The router's process from start to end: ports, the service behind them, signals, an orderly exit.

`run` takes its two ports before anything else, says where it listens, and returns the process's
exit code: 0 after SIGINT or SIGTERM, when what ran was answered or its time was over; 1 with one
sentence when it cannot start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol

import uvloop

from router.config import RouterConfig
from router.front import BACKLOG, Call, Front, Handler
from router.proxy import error_body

METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
METRICS_BODY_BYTES = 65_536
MAX_FILES = 1 << 20
"""Open files that are asked for: every request needs two, and the usual limit is 1,024."""


class StartError(RuntimeError):
    """The router cannot start; one sentence."""


class Service(Protocol):
    """What is behind the ports.

    Attributes:
        handler: answers every call.
    """

    handler: Handler

    def metrics_page(self) -> bytes:
        """What the Prometheus listener answers."""

    async def start(self) -> None:
        """Begin what goes on in the background: registrations, health checks, discovery."""

    async def stop(self) -> None:
        """End it."""


def run(config: RouterConfig, make_service: Callable[[RouterConfig], Service]) -> int:
    """Route until a signal; the process's exit code."""
    _allow_files()
    try:
        tls = _tls(config)
        with (
            _bind(config.host, config.port, "--port") as listener,
            _bind(config.prometheus_host, config.prometheus_port, "--prometheus-port") as metrics,
        ):
            return uvloop.run(_Process(config, make_service, tls).serve(listener, metrics))
    except StartError as error:
        print(f"launch_router.py: error: {error}", file=sys.stderr, flush=True)
        return 1


class _Process:
    """One run of the router: everything between having ports and giving them back."""

    def __init__(
        self,
        config: RouterConfig,
        make_service: Callable[[RouterConfig], Service],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._config = config
        self._make_service = make_service
        self._tls = tls
        self._signals: asyncio.Queue[int] = asyncio.Queue()

    async def serve(self, listener: socket.socket, metrics_listener: socket.socket) -> int:
        """Serve on both sockets until a signal; exit code 0."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._signals.put_nowait, signum)
        config, service = self._config, self._make_service(self._config)
        too_large = error_body(
            413,
            "payload_too_large",
            f"The request's body is larger than {config.max_payload_size} bytes "
            "(--max-payload-size).",
        )
        front = Front(service.handler, max_body=config.max_payload_size, too_large=too_large)
        metrics = Front(_metrics_handler(service), max_body=METRICS_BODY_BYTES)
        await metrics.listen(metrics_listener)
        await front.listen(listener, self._tls)
        await service.start()
        try:
            _say(
                f"The router listens at {self._url(listener)}, metrics at port "
                f"{metrics_listener.getsockname()[1]}. Stop with Ctrl-C."
            )
            await self._signals.get()
            await self._drain(front)
        finally:
            await service.stop()
            await metrics.shut_down(0)
        return 0

    async def _drain(self, front: Front) -> None:
        """Answer what runs, unless that takes too long or another signal comes."""
        seconds = self._config.shutdown_grace_period_secs
        if front.num_running:
            _say(f"Stopping: {front.num_running} requests may finish within {seconds:g} s.")
        draining = asyncio.create_task(front.shut_down(seconds))
        impatient = asyncio.create_task(self._signals.get())
        await asyncio.wait({draining, impatient}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
            await front.shut_down(0)
        impatient.cancel()

    def _url(self, listener: socket.socket) -> str:
        host, port = listener.getsockname()[:2]
        scheme = "https" if self._tls is not None else "http"
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1" if host == "0.0.0.0" else "::1"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _metrics_handler(service: Service) -> Callable[[Call], Awaitable[None]]:
    async def handle(call: Call) -> None:
        call.answer(200, [(b"content-type", METRICS_TYPE)], service.metrics_page())

    return handle


def _allow_files() -> None:
    """As many open files as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _tls(config: RouterConfig) -> ssl.SSLContext | None:
    """What clients' connections are encrypted with, if they are.

    Raises:
        StartError: certificate and key cannot be used.
    """
    if config.tls_cert_path is None or config.tls_key_path is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.tls_cert_path, config.tls_key_path)
    except (OSError, ssl.SSLError) as error:
        raise StartError(
            f"--tls-cert-path {config.tls_cert_path} and --tls-key-path {config.tls_key_path} "
            f"cannot be used: {error}."
        ) from None
    return context


def _bind(host: str, port: int, flag: str) -> socket.socket:
    """A socket bound to the port.

    Raises:
        StartError: the port is in use, or the address is not ours.
    """
    host = host.strip("[]")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartError(f"{host} is no address of this machine: {error}.") from None
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # Two that bound at the same time: the second one fails here.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"Port {port} on {host} is already in use: choose another with {flag}."
            ) from None
        raise StartError(f"Cannot listen on {host}:{port}: {error.strerror}.") from None
    return listener


def _say(line: str) -> None:
    print(line, flush=True)
