"""One router in one process: its parts, and which of them answers a call.

The proxy answers what workers compute, Starlette the rest.
"""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable

from router.admin import make_app
from router.config import RouterConfig
from router.discovery import Discovery, DiscoveryError
from router.front import Call, Handler, HeaderList, as_asgi
from router.limits import Limiter
from router.metrics import RouterMetrics
from router.monitor import Monitor
from router.proxy import JSON, ROUTES, Proxy, error_body
from router.registration import Registration
from router.routing import Router
from router.security import Security
from router.server import StartError
from router.upstream import Upstream
from router.workers import WorkerRegistry


class App:
    """The handler of the router's front.

    Args:
        proxy: for the paths of `ROUTES`.
        other: for all other paths.
    """

    def __init__(self, *, proxy: Proxy, other: Handler, security: Security) -> None:
        self._proxy = proxy
        self._other = other
        self._security = security

    async def __call__(self, call: Call) -> None:
        if call.method == "OPTIONS":
            headers = self._security.preflight(call.headers)
            if headers is not None:
                call.answer(200, headers, b"")
                return
        if call.path not in ROUTES:
            await self._other(call)
        elif call.method != "POST":
            call.answer(405, [(b"allow", b"POST")], b"")
        elif not self._security.authorized(call.headers):
            self._refuse_key(call)
        else:
            await self._proxy.handle(call)

    def _refuse_key(self, call: Call) -> None:
        message = "The key in `Authorization: Bearer <key>` is missing or wrong."
        headers: HeaderList = [JSON, (b"www-authenticate", b"Bearer")]
        headers += self._security.answer_headers(call.headers)
        call.answer(401, headers, error_body(401, "unauthorized", message))


class RouterService:
    """All parts of a router, and what it does by itself: `router.server.Service`."""

    def __init__(
        self, config: RouterConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        rng = random.Random()
        self.config = config
        self.registry = WorkerRegistry()
        self.metrics = RouterMetrics(config.prometheus_duration_buckets, clock)
        self.upstream = Upstream(tls=worker_tls(config))
        security = Security(config)
        self.router = Router(
            config=config, registry=self.registry, metrics=self.metrics, clock=clock, rng=rng
        )
        self.proxy = Proxy(
            config=config,
            router=self.router,
            registry=self.registry,
            upstream=self.upstream,
            limiter=make_limiter(config, self.metrics),
            metrics=self.metrics,
            answer_headers=security.answer_headers,
            rng=rng,
            clock=clock,
        )
        self.registration = Registration(
            config=config,
            registry=self.registry,
            router=self.router,
            upstream=self.upstream,
            metrics=self.metrics,
        )
        self.monitor = Monitor(
            config=config,
            registry=self.registry,
            router=self.router,
            registration=self.registration,
            upstream=self.upstream,
            metrics=self.metrics,
            on_unhealthy=self.proxy.worker_unhealthy,
        )
        self.discovery: Discovery | None = None
        if config.service_discovery:
            try:
                self.discovery = Discovery(
                    config=config, registration=self.registration, metrics=self.metrics
                )
            except DiscoveryError as error:
                raise StartError(str(error)) from None
        admin = make_app(
            config=config,
            registry=self.registry,
            router=self.router,
            registration=self.registration,
            monitor=self.monitor,
            upstream=self.upstream,
            metrics=self.metrics,
            security=security,
        )
        self.handler = App(proxy=self.proxy, other=as_asgi(admin), security=security)

    def metrics_page(self) -> bytes:
        """All metrics, in Prometheus' text form."""
        self.monitor.update_gauges()
        return self.metrics.page()

    async def start(self) -> None:
        """Begin to watch, to register and to look for workers."""
        await self.monitor.start()
        await self.registration.start()
        if self.discovery is not None:
            await self.discovery.start()

    async def stop(self) -> None:
        """End that, and hang up on the workers."""
        if self.discovery is not None:
            await self.discovery.stop()
        await self.registration.stop()
        await self.monitor.stop()
        await self.upstream.close()


def make_limiter(config: RouterConfig, metrics: RouterMetrics) -> Limiter:
    """The limiter that the flags ask for."""
    most = config.max_concurrent_requests
    return Limiter(
        max_running=most if most > 0 else None,
        per_second=config.rate_limit_tokens_per_second,
        queue_size=config.queue_size,
        queue_timeout_s=config.queue_timeout_secs,
        clock=time.monotonic,
        on_decision=metrics.rate_limit,
    )


def worker_tls(config: RouterConfig) -> ssl.SSLContext:
    """How https workers are spoken to: the system's authorities, those of --ca-cert-paths, and
    the router's own certificate.

    Raises:
        StartError: a file cannot be used.
    """
    context = ssl.create_default_context()
    try:
        for path in config.ca_cert_paths:
            context.load_verify_locations(path)
        if config.client_cert_path is not None:
            context.load_cert_chain(config.client_cert_path, config.client_key_path)
    except OSError as error:
        raise StartError(
            "--ca-cert-paths, --client-cert-path and --client-key-path must name PEM files: "
            f"{error}."
        ) from None
    return context
