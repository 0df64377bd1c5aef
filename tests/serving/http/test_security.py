"""API keys, CORS, and that keys are told to nobody."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from serving.config import ConfigError, ServerConfig, parse_args
from serving.http.app import ROUTES
from serving.http.security import ADMIN_PATHS, OPEN_PATHS
from tests.serving.http.support import run, serving

pytestmark = pytest.mark.timeout(30)

ROOT = Path(__file__).resolve().parents[3]
KEY, ADMIN = "sk-one", "sk-boss"
PLAIN = ServerConfig(served_model_name="tiny")


def bearer(key):
    return {"authorization": f"Bearer {key}"}


async def statuses(http, headers):
    """The status of every route, one method each."""
    found = {}
    for methods, path, _ in ROUTES:
        method = methods.split()[0]
        url = path.replace("{model:path}", "tiny")
        body = {"json": {"rid": "x"}} if method == "POST" else {}
        found[path] = (await http.request(method, url, headers=headers, **body)).status_code
    return found


def refused(found):
    return {path for path, status in found.items() if status == 401}


def test_every_route_but_the_open_ones_needs_the_key():
    async def main():
        async with serving(config=replace(PLAIN, api_key=KEY)) as (http, _, engine):
            paths = {path for _, path, _ in ROUTES}
            assert paths >= OPEN_PATHS | ADMIN_PATHS
            wrong = [
                {},
                bearer("sk-two"),
                bearer(""),
                bearer(KEY + "x"),
                bearer(KEY[:-1]),
                bearer(KEY.upper()),
                {"authorization": KEY},
                {"authorization": f"Basic {KEY}"},
                {"authorization": "Bearer \u00e9".encode("latin-1")},
                {"x-api-key": KEY},
            ]
            for headers in wrong:
                assert refused(await statuses(http, headers)) == paths - OPEN_PATHS
            assert all(request.rid.startswith("HEALTH_CHECK") for request in engine.seen)
            assert not refused(await statuses(http, bearer(KEY)))
            assert not refused(await statuses(http, {"authorization": f"bearer  {KEY} "}))
            response = await http.get("/v1/models")
            assert response.json() == {"error": "Unauthorized"}
            assert response.headers["www-authenticate"] == "Bearer"
            twice = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer x")]
            assert (await http.get("/v1/models", headers=twice)).status_code == 401
            for path in ("/health/../v1/models", "//health", "/healthy", "/metrics/", "/nowhere"):
                assert (await http.get(path)).status_code == 401, path
            assert (await http.options("/v1/models")).status_code == 405

    run(main)


def test_the_admin_key_alone_opens_admin_routes():
    async def main():
        async with serving(config=replace(PLAIN, api_key=KEY, admin_api_key=ADMIN)) as (
            http,
            _,
            _engine,
        ):
            assert refused(await statuses(http, bearer(KEY))) == ADMIN_PATHS
            assert not refused(await statuses(http, bearer(ADMIN)))
            assert refused(await statuses(http, {})) > ADMIN_PATHS
        async with serving(config=replace(PLAIN, admin_api_key=ADMIN)) as (http, _, _engine):
            assert refused(await statuses(http, {})) == ADMIN_PATHS
            assert not refused(await statuses(http, bearer(ADMIN)))

    run(main)


def test_refusals_are_counted():
    async def main():
        async with serving(config=replace(PLAIN, api_key=KEY)) as (http, _, _engine):
            await http.get("/v1/models")
            text = (await http.get("/metrics")).text
            assert 'http_responses_total{endpoint="/v1/models",status="401"} 1.0' in text

    run(main)


def test_keys_are_told_to_nobody(caplog):
    config = replace(PLAIN, api_key=KEY, admin_api_key=ADMIN)

    async def main():
        async with serving(config=config) as (http, state, _engine):
            texts = [repr(state), repr(config), msgspec.json.encode(config.without_secrets())]
            for _, path, _ in ROUTES:
                for method in ("GET", "POST"):
                    url = path.replace("{model:path}", "x")
                    response = await http.request(method, url, headers=bearer(ADMIN), json={})
                    texts.append(response.text)
                texts.append((await http.post(path, headers=bearer(KEY + "x"))).text)
            for text in texts:
                assert KEY not in str(text)
                assert ADMIN not in str(text)
            told = (await http.get("/get_server_info", headers=bearer(KEY))).json()
            assert "served_model_name" in told
            assert not any("api_key" in name for name in told)

    with caplog.at_level(logging.DEBUG):
        run(main)
    assert KEY not in caplog.text
    assert ADMIN not in caplog.text


def test_keys_from_flags_and_environment(monkeypatch):
    assert parse_args(["--api-key", KEY]).api_key == KEY
    monkeypatch.setenv("MESHSERVE_API_KEY", "from-env")
    monkeypatch.setenv("MESHSERVE_ADMIN_API_KEY", "boss-env")
    config = parse_args([])
    assert (config.api_key, config.admin_api_key) == ("from-env", "boss-env")
    assert parse_args(["--api-key", KEY]).api_key == KEY
    monkeypatch.setenv("MESHSERVE_API_KEY", "")
    assert parse_args([]).api_key is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--api-key", "a b"], "--api-key must be visible ASCII"),
        (["--api-key", ""], "--api-key must be visible ASCII"),
        (["--admin-api-key", "caf\u00e9"], "--admin-api-key must be visible ASCII"),
        (["--api-key", "same", "--admin-api-key", "same"], "must differ"),
        (["--cors-allow-origins", "example.org"], "got 'example.org'"),
        (["--cors-allow-origins", "https://a.b/path"], "(no path)"),
        (["--shutdown-grace-period-secs", "-1"], "between 0 and 86400"),
        (["--shutdown-grace-period-secs", "nan"], "between 0 and 86400"),
    ],
)
def test_wrong_flags(flags, sentence):
    with pytest.raises(ConfigError) as caught:
        parse_args(flags)
    assert sentence in str(caught.value)
    for key in ("a b", "caf\u00e9", "same"):
        assert key not in str(caught.value)


def test_the_command_does_not_print_keys():
    script = [sys.executable, "scripts/serve.py", "--tp", "8", "--dp-size", "3"]
    done = subprocess.run(
        [*script, "--enable-dp-attention", "--api-key", KEY],
        cwd=ROOT,
        env=os.environ | {"MESHSERVE_ADMIN_API_KEY": ADMIN, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=25,
    )
    assert done.returncode == 2
    assert KEY not in done.stderr + done.stdout
    assert ADMIN not in done.stderr + done.stdout


def test_cors_is_off_unless_asked_for():
    asks = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }

    async def main():
        async with serving() as (http, _, _engine):
            response = await http.get("/v1/models", headers={"origin": "https://a.example"})
            assert not any(name.startswith("access-control") for name in response.headers)
            assert (await http.options("/generate", headers=asks)).status_code == 405
        config = replace(PLAIN, api_key=KEY, cors_allow_origins=("https://a.example",))
        async with serving(config=config) as (http, _, _engine):
            response = await http.options("/generate", headers=asks)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == "https://a.example"
            assert "authorization" in response.headers["access-control-allow-headers"].lower()
            response = await http.get("/v1/models", headers={"origin": "https://a.example"})
            assert response.status_code == 401  # readable for the page
            assert response.headers["access-control-allow-origin"] == "https://a.example"
            other = {"origin": "https://b.example"}
            response = await http.get("/v1/models", headers=other | bearer(KEY))
            assert response.status_code == 200
            assert "access-control-allow-origin" not in response.headers
            assert (await http.options("/generate", headers=asks | other)).status_code == 400
        config = replace(PLAIN, cors_allow_origins=("*",))
        async with serving(config=config) as (http, _, _engine):
            response = await http.get("/v1/models", headers=other)
            assert response.headers["access-control-allow-origin"] == "*"

    run(main)


def test_origins_from_the_flag():
    flags = ["--cors-allow-origins", "https://a.example, http://localhost:3000"]
    assert parse_args(flags).cors_allow_origins == ("https://a.example", "http://localhost:3000")
