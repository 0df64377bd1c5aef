"""Which part of the router answers a call: the proxy what workers compute, Starlette the rest."""

from __future__ import annotations

import time
from collections.abc import Callable

from router.config import RouterConfig
from router.front import Call, Handler, HeaderList
from router.limits import Limiter
from router.metrics import RouterMetrics
from router.proxy import JSON, ROUTES, Proxy, error_body

Authorized = Callable[[HeaderList], bool]


class App:
    """The handler of the router's front.

    Args:
        proxy: for the paths of `ROUTES`.
        other: for all other paths, and for what browsers ask before they use those.
        authorized: whether the headers hold the router's key.
    """

    def __init__(self, *, proxy: Proxy, other: Handler, authorized: Authorized) -> None:
        self._proxy = proxy
        self._other = other
        self._authorized = authorized

    async def __call__(self, call: Call) -> None:
        if call.path not in ROUTES or call.method == "OPTIONS":
            await self._other(call)
        elif call.method != "POST":
            call.answer(405, [(b"allow", b"POST")], b"")
        elif not self._authorized(call.headers):
            message = "The key in `Authorization: Bearer <key>` is missing or wrong."
            headers = [JSON, (b"www-authenticate", b"Bearer")]
            headers += self._proxy.answer_headers(call.headers)
            call.answer(401, headers, error_body(401, "unauthorized", message))
        else:
            await self._proxy.handle(call)


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
