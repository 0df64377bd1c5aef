"""API keys and CORS."""

import pytest

from router.config import RouterConfig
from router.security import Security


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ([(b"authorization", b"Bearer secret")], True),
        ([(b"x", b"y"), (b"authorization", b"bearer  secret")], True),
        ([(b"authorization", b"Bearer secret2")], False),
        ([(b"authorization", b"Bearer secre")], False),
        ([(b"authorization", b"Basic secret")], False),
        ([(b"authorization", b"secret")], False),
        ([(b"authorization", b"Bearer")], False),
        ([(b"authorization", b"Bearer \xff")], False),
        ([], False),
    ],
)
def test_the_key_is_needed(headers, allowed):
    assert Security(RouterConfig(api_key="secret")).authorized(headers) == allowed
    assert Security(RouterConfig()).authorized(headers)


def test_every_page_may_by_default():
    headers = dict(Security(RouterConfig()).answer_headers([(b"origin", b"http://a")]))
    assert headers[b"access-control-allow-origin"] == b"*"
    assert headers[b"access-control-expose-headers"] == b"*"
    assert headers[b"vary"].startswith(b"origin")


@pytest.mark.parametrize(("origin", "allowed"), [(b"http://a", True), (b"http://b", False)])
def test_listed_pages_only(origin, allowed):
    security = Security(RouterConfig(cors_allowed_origins=("http://a", "https://c")))
    headers = dict(security.answer_headers([(b"origin", origin)]))
    assert headers.get(b"access-control-allow-origin") == (origin if allowed else None)
    assert b"vary" in headers


def test_browsers_that_ask_first():
    security = Security(RouterConfig())
    assert security.preflight([(b"origin", b"http://a")]) is None
    asked = [
        (b"origin", b"http://a"),
        (b"access-control-request-method", b"POST"),
        (b"access-control-request-headers", b"authorization, content-type"),
    ]
    headers = dict(security.preflight(asked))
    assert headers[b"access-control-allow-origin"] == b"*"
    assert headers[b"access-control-allow-methods"] == b"*"
    assert headers[b"access-control-allow-headers"] == b"authorization, content-type"
