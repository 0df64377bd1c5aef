"""Workers from Kubernetes, against an API server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from urllib.parse import parse_qs, urlsplit

import pytest

from router.config import RouterConfig
from router.discovery import Discovery, DiscoveryError
from router.metrics import RouterMetrics
from tests.router.support import run

pytestmark = pytest.mark.timeout(60)


class FakeApi:
    """Lists and watches pods, and breaks when told to."""

    def __init__(self):
        self.pods = {}
        self.version = 100
        self.log = []  # (version, event)
        self.oldest = 0
        self.asked = []  # (path, query, headers)
        self.refuse = 0
        self.odd = b""
        self.watchers = set()
        self._server = None

    async def start(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def stop(self):
        self._server.close()
        self.cut()

    def cut(self):
        """Every watch ends in the middle of whatever it is."""
        for writer in list(self.watchers):
            writer.transport.abort()
        self.watchers.clear()

    def set(self, name, *, ip="10.0.0.1", ready=True, phase="Running", going=False):
        kind = "MODIFIED" if name in self.pods else "ADDED"
        self.version += 1
        pod = {
            "metadata": {
                "name": name,
                "namespace": "prod",
                "uid": f"uid-{name}",
                "resourceVersion": str(self.version),
            },
            "status": {
                "phase": phase,
                "podIP": ip,
                "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            },
        }
        if going:
            pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        self.pods[name] = pod
        self._tell(kind, pod)

    def delete(self, name):
        self.version += 1
        pod = self.pods.pop(name)
        pod["metadata"]["resourceVersion"] = str(self.version)
        self._tell("DELETED", pod)

    def send(self, event):
        for writer in self.watchers:
            self._write(writer, event)

    def forget(self):
        """Versions up to now cannot be watched from any more."""
        self.oldest = self.version

    def _tell(self, kind, pod):
        event = {"type": kind, "object": pod}
        self.log.append((self.version, event))
        self.send(event)

    def _write(self, writer, event):
        # In two pieces: lines need not come whole.
        line = json.dumps(event).encode() + b"\n"
        for part in (line[:20], line[20:]):
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))

    async def _serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                target, *rest = head.split("\r\n")
                headers = dict(line.split(": ", 1) for line in rest if line)
                url = urlsplit(target.split(" ")[1])
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                self.asked.append((url.path, query, headers))
                if self.refuse:
                    body = b'{"message": "pods is forbidden"}'
                    self._answer(writer, self.refuse, body)
                elif self.odd:
                    self._answer(writer, 200, self.odd)
                elif "watch" in query:
                    self._watch(writer, int(query["resourceVersion"]))
                else:
                    told = {
                        "kind": "PodList",
                        "metadata": {"resourceVersion": str(self.version)},
                        "items": list(self.pods.values()),
                    }
                    self._answer(writer, 200, json.dumps(told).encode())

    def _answer(self, writer, status, body):
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))

    def _watch(self, writer, since):
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        if since < self.oldest:
            status = {"kind": "Status", "code": 410, "message": "too old resource version"}
            self._write(writer, {"type": "ERROR", "object": status})
            writer.write(b"0\r\n\r\n")
            return
        for version, event in self.log:
            if version > since:
                self._write(writer, event)
        self.watchers.add(writer)


class Recorded:
    """What discovery asks of `Registration`."""

    def __init__(self):
        self.workers = {}
        self.calls = []

    def add(self, new, *, source):
        assert source == "kubernetes"
        assert new.url not in self.workers
        self.workers[new.url] = new
        self.calls.append(("add", new.url))

    def remove(self, url, *, source, reason):
        del self.workers[url]
        self.calls.append(("remove", url))


@contextlib.asynccontextmanager
async def discovering(api, account=None, **changes):
    fields = {
        "service_discovery": True,
        "selector": ("app=llm", "tier=gpu"),
        "service_discovery_port": 8000,
        "service_discovery_api": api.url,
    }
    config = RouterConfig(**{**fields, **changes})
    recorded = Recorded()
    options = {} if account is None else {"account": account}
    discovery = Discovery(
        config=config,
        registration=recorded,
        metrics=RouterMetrics(),
        pause_s=0.02,
        **options,
    )
    await discovery.start()
    try:
        yield recorded
    finally:
        await discovery.stop()


@contextlib.asynccontextmanager
async def fake_api():
    api = await FakeApi().start()
    try:
        yield api
    finally:
        await api.stop()


async def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_ready_pods_are_workers_and_others_are_not():
    async def main():
        async with fake_api() as api:
            api.set("a", ip="10.0.0.1")
            api.set("six", ip="fd00::1")
            api.set("starting", ip="10.0.0.2", ready=False)
            api.set("pending", ip="10.0.0.3", phase="Pending")
            api.set("going", ip="10.0.0.4", going=True)
            api.set("homeless", ip=None)
            async with discovering(api, api_key="k") as found:
                await until(lambda: len(found.workers) == 2)
                assert set(found.workers) == {"http://10.0.0.1:8000", "http://[fd00::1]:8000"}
                worker = found.workers["http://10.0.0.1:8000"]
                assert worker.labels == {"pod": "a", "namespace": "prod"}
                assert worker.api_key == "k"
                path, query, _ = api.asked[0]
                assert path == "/api/v1/pods"
                assert query == {"labelSelector": "app=llm,tier=gpu"}
                await until(lambda: api.watchers)
                _, query, _ = api.asked[1]
                assert query["resourceVersion"] == str(api.version)

    run(main)


def test_events_are_followed():
    async def main():
        async with fake_api() as api, discovering(api) as found:
            await until(lambda: api.watchers)
            api.set("a", ready=False)
            api.set("b", ip="10.0.0.2")
            await until(lambda: set(found.workers) == {"http://10.0.0.2:8000"})
            api.set("a")
            await until(lambda: len(found.workers) == 2)
            api.set("a", ready=False)  # it does not answer its probe
            await until(lambda: set(found.workers) == {"http://10.0.0.2:8000"})
            api.set("b", ip="10.0.0.2", going=True)  # terminating, and still ready
            await until(lambda: not found.workers)
            api.delete("b")
            api.set("a", ip="10.0.0.9")
            await until(lambda: set(found.workers) == {"http://10.0.0.9:8000"})
            api.delete("a")
            await until(lambda: not found.workers)
            assert len([call for call in found.calls if call[0] == "add"]) == 3

    run(main)


def test_a_watch_that_breaks_is_taken_up_and_nothing_is_lost():
    async def main():
        async with fake_api() as api, discovering(api) as found:
            await until(lambda: api.watchers)
            api.set("a")
            await until(lambda: found.workers)
            api.cut()
            api.set("b", ip="10.0.0.2")
            api.delete("a")
            await until(lambda: set(found.workers) == {"http://10.0.0.2:8000"})

    run(main)


def test_a_watch_that_ends_goes_on_from_the_last_version():
    async def main():
        async with fake_api() as api, discovering(api) as found:
            await until(lambda: api.watchers)
            api.set("a")
            api.send({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "500"}}})
            await until(lambda: found.workers)
            num = len(api.asked)
            for writer in list(api.watchers):
                writer.write(b"0\r\n\r\n")
            api.watchers.clear()
            await until(lambda: len(api.asked) > num)
            _, query, _ = api.asked[num]
            assert (query["watch"], query["resourceVersion"]) == ("1", "500")
            assert found.calls == [("add", "http://10.0.0.1:8000")]

    run(main)


@pytest.mark.parametrize("during", [True, False])
def test_versions_that_are_gone_mean_listing_anew(during):
    """Told in the middle of a watch, or when the next one is asked for."""

    async def main():
        async with fake_api() as api:
            api.set("a")
            async with discovering(api) as found:
                await until(lambda: api.watchers)
                watchers = list(api.watchers)
                api.watchers.clear()  # what happens now is never announced
                api.delete("a")
                api.set("b", ip="10.0.0.2")
                api.log.clear()
                api.forget()
                for writer in watchers:
                    if during:
                        gone = {"code": 410, "message": "too old resource version"}
                        api._write(writer, {"type": "ERROR", "object": gone})
                    else:
                        writer.write(b"0\r\n\r\n")
                await until(lambda: set(found.workers) == {"http://10.0.0.2:8000"})

    run(main)


def test_an_api_that_refuses_is_asked_again():
    async def main():
        async with fake_api() as api:
            api.set("a")
            api.refuse = 403
            async with discovering(api) as found:
                await until(lambda: len(api.asked) >= 3)
                assert not found.workers
                api.refuse = 0
                await until(lambda: found.workers)
                # Workers stay while the API is away.
                api.refuse = 500
                api.cut()
                await until(lambda: len(api.asked) >= 8)
                assert found.workers

    run(main)


@pytest.mark.parametrize("odd", [b"[]", b'{"items": ["x"]}', b'{"items": "\xff"}', b"{", b"7"])
def test_an_odd_answer_does_not_end_it(odd):
    async def main():
        async with fake_api() as api:
            api.set("a")
            api.odd = odd
            async with discovering(api) as found:
                await until(lambda: len(api.asked) >= 3)
                assert not found.workers
                api.odd = b""
                await until(lambda: found.workers)

    run(main)


def test_an_api_that_forgets_at_once_is_not_asked_without_pause():
    async def main():
        async with fake_api() as api:
            api.set("a")
            api.oldest = 1 << 60
            async with discovering(api) as found:
                await until(lambda: len(api.asked) >= 6)
                began, before = time.monotonic(), len(api.asked)
                await asyncio.sleep(0.3)
                # A list and a watch for each pause of at least 0.016 s.
                assert len(api.asked) - before <= 2 * (time.monotonic() - began) / 0.016 + 2
                assert found.workers

    run(main)


def test_a_namespace_and_a_token(tmp_path):
    async def main():
        (tmp_path / "token").write_text("t1\n")
        async with (
            fake_api() as api,
            discovering(api, tmp_path, service_discovery_namespace="prod"),
        ):
            await until(lambda: api.watchers)
            (tmp_path / "token").write_text("t2\n")
            api.cut()
            await until(lambda: len(api.asked) >= 4)
            assert {path for path, _, _ in api.asked} == {"/api/v1/namespaces/prod/pods"}
            tokens = [headers["authorization"] for _, _, headers in api.asked]
            assert tokens[0] == "Bearer t1"
            assert tokens[-1] == "Bearer t2"

    run(main)


def test_an_address_that_went_to_another_pod_stays_a_worker():
    async def main():
        async with fake_api() as api, discovering(api) as found:
            await until(lambda: api.watchers)
            api.set("old")
            api.set("new")  # has the address of the old one, whose end is announced later
            api.delete("old")
            api.set("last", ip="10.0.0.2")
            await until(lambda: len(found.workers) == 2)
            assert found.calls == [("add", "http://10.0.0.1:8000"), ("add", "http://10.0.0.2:8000")]

    run(main)


def test_outside_a_cluster_it_says_what_to_do(tmp_path):
    config = RouterConfig(service_discovery=True, selector=("a=b",))
    with pytest.raises(DiscoveryError, match="--service-discovery-api"):
        Discovery(config=config, registration=Recorded(), metrics=RouterMetrics(), environ={})
