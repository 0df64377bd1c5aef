"""Who may ask what: API keys, as an ASGI middleware in front of every route.

Keys are compared in constant time and appear in no answer, log or error. Health checks, metrics
and OPTIONS (browsers ask without a key) are open to all.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.http.errors import json_response

OPEN_PATHS = frozenset({"/health", "/health_generate", "/metrics", "/ping"})
"""For probes and scrapers, which often cannot send a key."""
ADMIN_PATHS = frozenset({"/flush_cache", "/abort_request"})
"""What disturbs other people's requests: with an admin key the ordinary one is not enough."""


Key = TypeVar("Key")


def opened_by(path: str, *, api_key: Key | None, admin_key: Key | None) -> list[Key]:
    """The keys of which one is needed for a path; none where it is open to all.

    Without `api_key` the ordinary routes are open, without `admin_key` the admin routes are
    ordinary ones. The admin key opens everything.
    """
    if path in OPEN_PATHS:
        return []
    admin = [] if admin_key is None else [admin_key]
    if path in ADMIN_PATHS and admin:
        return admin
    return [] if api_key is None else [api_key, *admin]


class RequireKey:
    """Answers 401 unless the request brings `Authorization: Bearer KEY` with a right key."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, admin_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else _digest(api_key.encode())
        self._admin = None if admin_key is None else _digest(admin_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._allowed(scope):
            challenge = {"www-authenticate": "Bearer"}
            response = json_response({"error": "Unauthorized"}, 401, challenge)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        needed = opened_by(scope["path"], api_key=self._key, admin_key=self._admin)
        if not needed or scope["method"] == "OPTIONS":
            return True
        given = _digest(_bearer(scope))
        # All are compared, so that the time tells nothing.
        return any([hmac.compare_digest(given, key) for key in needed])


def _bearer(scope: Scope) -> bytes:
    """The key that a request brings, b"" without one or with several."""
    values = Headers(scope=scope).getlist("authorization")
    if len(values) != 1:
        return b""
    scheme, _, key = values[0].partition(" ")
    return key.strip(" ").encode("latin-1") if scheme.lower() == "bearer" else b""


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key's."""
    return sha256(key).digest()
