"""Who may use the router, and from which web pages: API keys and CORS, by headers alone."""

from __future__ import annotations

import hmac

from router.config import RouterConfig
from router.front import HeaderList

VARY = (b"vary", b"origin, access-control-request-method, access-control-request-headers")
EXPOSE = (b"access-control-expose-headers", b"*")
ALLOW_ORIGIN = b"access-control-allow-origin"
PREFLIGHT = [
    (b"access-control-allow-methods", b"*"),
    (b"access-control-max-age", b"3600"),
]


class Security:
    """The rules of one router.

    Args:
        config: `api_key`, and `cors_allowed_origins` (empty: every page may).
    """

    def __init__(self, config: RouterConfig) -> None:
        self._key = None if config.api_key is None else config.api_key.encode()
        self._origins = frozenset(origin.encode() for origin in config.cors_allowed_origins)
        self._everyone = [VARY, (ALLOW_ORIGIN, b"*"), EXPOSE]

    def authorized(self, headers: HeaderList) -> bool:
        """Whether a request has the router's key, or needs none."""
        if self._key is None:
            return True
        for name, value in headers:
            if name == b"authorization":
                scheme, _, key = value.partition(b" ")
                if scheme.lower() == b"bearer":
                    return hmac.compare_digest(key.strip(), self._key)
        return False

    def answer_headers(self, headers: HeaderList) -> HeaderList:
        """The CORS headers of the answer to a request."""
        if not self._origins or b"*" in self._origins:
            return self._everyone
        for name, value in headers:
            if name == b"origin" and value in self._origins:
                return [VARY, (ALLOW_ORIGIN, value), EXPOSE]
        return [VARY]

    def preflight(self, headers: HeaderList) -> HeaderList | None:
        """The headers of the answer to a browser that asks before it sends; None if it does not."""
        asked = b""
        for name, value in headers:
            if name == b"access-control-request-headers":
                asked = value
        if not any(name == b"access-control-request-method" for name, _ in headers):
            return None
        # A star does not cover Authorization: what was asked for is named.
        allowed = (b"access-control-allow-headers", asked or b"*")
        return [*self.answer_headers(headers), *PREFLIGHT, allowed]
