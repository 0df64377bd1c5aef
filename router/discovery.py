"""Workers from Kubernetes: pods with certain labels, as its HTTP API lists and announces them.

A pod is a worker while it is ready and not about to end; it promises that the registry follows
within the time of one event, that a broken watch is taken up where it broke, and that after any
doubt the pods are listed anew. No client library: two requests are all it takes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec

from router.config import RouterConfig
from router.metrics import RouterMetrics
from router.registration import NewWorker, Registration, RegistrationError
from router.upstream import Upstream, UpstreamError

SOURCE = "kubernetes"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a pod finds its token and the certificate of the API."""
LIST_TIMEOUT_S = 30.0
WATCH_S = 300
"""How long the API keeps one watch open."""
WATCH_SLACK_S = 30.0
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 30.0
JITTER = 0.2
GONE = 410
"""The API has forgotten what happened since a version."""

logger = logging.getLogger("meshserve.router")


class DiscoveryError(RuntimeError):
    """The API did not do what was asked, or cannot be found; one sentence."""


class _Expired(Exception):
    """The pods must be listed anew."""


class Discovery:
    """Keeps the workers as the pods are.

    Args:
        account: folder with `token` and `ca.crt`.
        environ: where the API's address stands, inside a cluster.
        pause_s: the first pause after a failure; it doubles up to half a minute.

    Raises:
        DiscoveryError: there is no API to ask.
    """

    def __init__(
        self,
        *,
        config: RouterConfig,
        registration: Registration,
        metrics: RouterMetrics,
        account: Path = ACCOUNT,
        environ: Mapping[str, str] = os.environ,
        pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._config = config
        self._registration = registration
        self._metrics = metrics
        self._account = account
        self._pause_s = pause_s
        self._url = config.service_discovery_api or _cluster_url(environ)
        self._upstream = Upstream(tls=self._tls())
        self._pods: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None
        namespace = config.service_discovery_namespace
        self._path = f"/api/v1/namespaces/{namespace}/pods" if namespace else "/api/v1/pods"
        self._selector = ",".join(config.selector)

    async def start(self) -> None:
        """Begin to follow the pods."""
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """End it; the workers stay."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._upstream.close()

    async def _follow(self) -> None:
        """List, then watch from there; again after every trouble."""
        pause = self._pause_s
        while True:
            try:
                version = await self._list()
                pause = self._pause_s
                while True:
                    version = await self._watch(version)
            except _Expired:
                logger.info("Kubernetes at %s: the pods are listed anew.", self._url)
            except (UpstreamError, DiscoveryError, msgspec.DecodeError) as error:
                logger.warning("Kubernetes at %s: %s", self._url, error)
            except Exception:  # whatever it said: without this task no pod would be found any more
                logger.exception("Kubernetes at %s", self._url)
            await asyncio.sleep(pause * random.uniform(1 - JITTER, 1 + JITTER))
            pause = min(2 * pause, MAX_PAUSE_S)

    async def _list(self) -> str:
        """Make the workers what the pods are now; the version to watch from."""
        began = time.monotonic()
        response = await self._upstream.request(
            self._url, "GET", self._query(), self._headers(), timeout=LIST_TIMEOUT_S
        )
        content = await response.read()
        if response.status != 200:
            raise DiscoveryError(_refusal(response.status, content, self._path))
        told = msgspec.json.decode(content)
        pods = {_uid(pod): pod for pod in told.get("items") or ()}
        for uid in self._pods.keys() - pods.keys():
            self._leave(uid)
        for pod in pods.values():
            self._take(pod)
        self._metrics.discovered(SOURCE, len(self._pods), time.monotonic() - began)
        return str(told.get("metadata", {}).get("resourceVersion", ""))

    async def _watch(self, version: str) -> str:
        """Follow the events until the API ends the watch; the version reached.

        Raises:
            _Expired: events were lost.
        """
        query = self._query(
            watch="1",
            resourceVersion=version,
            allowWatchBookmarks="true",
            timeoutSeconds=str(WATCH_S),
        )
        response = await self._upstream.request(
            self._url, "GET", query, self._headers(), timeout=WATCH_S + WATCH_SLACK_S
        )
        try:
            if response.status == GONE:
                raise _Expired
            if response.status != 200:
                raise DiscoveryError(_refusal(response.status, await response.read(), self._path))
            async for line in _lines(aiter(response)):
                event = msgspec.json.decode(line)
                pod = event.get("object") or {}
                if event.get("type") == "ERROR":
                    if pod.get("code") == GONE:
                        raise _Expired
                    raise DiscoveryError(f"the watch failed: {pod.get('message', pod)}")
                version = str(pod.get("metadata", {}).get("resourceVersion", version))
                self._hear(str(event.get("type")), pod)
            return version
        finally:
            response.close()

    def _hear(self, kind: str, pod: dict[str, Any]) -> None:
        began = time.monotonic()
        if kind == "DELETED":
            self._leave(_uid(pod))
        elif kind in ("ADDED", "MODIFIED"):
            self._take(pod)
        else:
            return  # a bookmark: nothing but a version
        self._metrics.discovered(SOURCE, len(self._pods), time.monotonic() - began)

    def _take(self, pod: dict[str, Any]) -> None:
        """A pod as it is now."""
        uid, url = _uid(pod), self._worker_url(pod)
        if url == self._pods.get(uid):
            return
        self._leave(uid)
        if url is None:
            return
        known = url in self._pods.values()
        self._pods[uid] = url
        if known:
            return  # the address of a pod that is going, given to another one
        meta = pod.get("metadata", {})
        labels = {"pod": str(meta.get("name")), "namespace": str(meta.get("namespace"))}
        try:
            self._registration.add(
                NewWorker(url=url, api_key=self._config.api_key, labels=labels), source=SOURCE
            )
        except RegistrationError as error:
            logger.error("Pod %s: %s", meta.get("name"), error)

    def _leave(self, uid: str) -> None:
        """A pod is no worker, or no longer."""
        url = self._pods.pop(uid, None)
        if url is not None and url not in self._pods.values():
            self._registration.remove(url, source=SOURCE, reason="pod_not_ready")

    def _worker_url(self, pod: dict[str, Any]) -> str | None:
        """Where the pod's worker is; None if it cannot take requests."""
        meta, status = pod.get("metadata", {}), pod.get("status", {})
        address = status.get("podIP")
        if not address or meta.get("deletionTimestamp") or status.get("phase") != "Running":
            return None
        ready = any(
            condition.get("type") == "Ready" and condition.get("status") == "True"
            for condition in status.get("conditions") or ()
        )
        host = f"[{address}]" if ":" in address else address
        return f"http://{host}:{self._config.service_discovery_port}" if ready else None

    def _query(self, **fields: str) -> str:
        return f"{self._path}?{urlencode({'labelSelector': self._selector, **fields})}"

    def _headers(self) -> list[tuple[bytes, bytes]]:
        """The token is read each time: it is replaced every hour or so."""
        headers = [(b"accept", b"application/json")]
        try:
            token = (self._account / "token").read_text().strip()
        except FileNotFoundError:
            return headers
        return [*headers, (b"authorization", f"Bearer {token}".encode())]

    def _tls(self) -> ssl.SSLContext | None:
        """The certificate authority of the cluster, if there is one."""
        authority = self._account / "ca.crt"
        if not authority.is_file():
            return None
        return ssl.create_default_context(cafile=str(authority))


def _cluster_url(environ: Mapping[str, str]) -> str:
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
    if not host:
        raise DiscoveryError(
            "--service-discovery: this is no Kubernetes pod (KUBERNETES_SERVICE_HOST is not set); "
            "name the API with --service-discovery-api http://HOST:PORT."
        )
    return f"https://{f'[{host}]' if ':' in host else host}:{port or 443}"


def _refusal(status: int, content: bytes, path: str) -> str:
    try:
        message = msgspec.json.decode(content).get("message", "")
    except (msgspec.DecodeError, AttributeError):
        message = content[:200].decode(errors="replace")
    hint = ""
    if status in (401, 403):
        hint = " (the service account needs the verbs list and watch on pods)"
    return f"GET {path} answered {status}{hint}: {message}"


def _uid(pod: dict[str, Any]) -> str:
    meta = pod.get("metadata", {})
    return str(meta.get("uid") or f"{meta.get('namespace')}/{meta.get('name')}")


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a body, as they come."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
    if rest.strip():
        yield rest
