"""Everything the router answers by itself: is it well, who its workers are, what they say together.

`make_app` is a Starlette application for all paths that are no generation. Bodies and statuses are
those of `sglang-router` 0.3.2, with what it leaves out: readiness says why not, a removal can wait
for the requests that run, and the older `/add_worker`, `/remove_worker` and `/list_workers` work.
It promises that one worker that does not answer never spoils an answer about all of them.
"""

from __future__ import annotations

import asyncio
import functools
import re
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.config import RouterConfig
from router.metrics import RouterMetrics
from router.monitor import Monitor
from router.proxy import ROUTES, error_body
from router.registration import (
    Changes,
    Job,
    NewWorker,
    QueueFull,
    Registration,
    RegistrationError,
    bearer,
    normal_url,
)
from router.routing import Router
from router.security import Security
from router.upstream import Upstream, UpstreamError
from router.worker_metrics import merge
from router.workers import Worker, WorkerRegistry

FLUSH_TIMEOUT_S = 30.0
ASK_TIMEOUT_S = 10.0
SCRAPE_TIMEOUT_S = 5.0
SHOWN_CHARS = 200
"""Of a worker's error."""
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NO_WORKERS = "No available workers (all circuits open or unhealthy)"
WORKER_PATH = re.compile(r"/workers/[^/]+")

Body = TypeVar("Body", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the handlers work on."""

    config: RouterConfig
    registry: WorkerRegistry
    router: Router
    registration: Registration
    monitor: Monitor
    upstream: Upstream
    metrics: RouterMetrics
    security: Security


Handler = Callable[[Parts, Request], Awaitable[Response]]


class BadBody(Exception):
    """A body that is not what the route takes; status and text of the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def make_app(
    *,
    config: RouterConfig,
    registry: WorkerRegistry,
    router: Router,
    registration: Registration,
    monitor: Monitor,
    upstream: Upstream,
    metrics: RouterMetrics,
    security: Security,
) -> ASGIApp:
    """The ASGI application over the parts of one router."""
    parts = Parts(
        config=config,
        registry=registry,
        router=router,
        registration=registration,
        monitor=monitor,
        upstream=upstream,
        metrics=metrics,
        security=security,
    )
    routes = [
        Route(path, _endpoint(parts, handler), methods=[method])
        for routes, guarded in ((PUBLIC, False), (ADMIN, True))
        for method, path, handler in routes
        for handler in [_guarded(handler) if guarded else handler]
    ]
    handlers: dict[Any, Any] = {HTTPException: _bare, BadBody: _bad_body}
    return _Edge(parts, Starlette(routes=_merged(routes), exception_handlers=handlers))


# ---- public ------------------------------------------------------------------------------------


async def health(parts: Parts, request: Request) -> Response:
    """200 while the process lives."""
    return PlainTextResponse("OK")


async def readiness(parts: Parts, request: Request) -> Response:
    """200 if a worker is healthy, else 503 with the reason of every worker."""
    workers = parts.registry.list()
    num = sum(worker.health.healthy and not worker.draining for worker in workers)
    if num:
        told = {"status": "ready", "healthy_workers": num, "total_workers": len(workers)}
        return _json(told)
    reasons = dict(parts.registration.expected)
    reasons |= {worker.url: _why_not(worker) for worker in workers}
    reasons |= {job.url: _job_reason(job) for job in parts.registration.jobs}
    return _json(
        {
            "status": "not ready",
            "reason": "insufficient healthy workers",
            "healthy_workers": 0,
            "total_workers": len(workers),
            "workers": reasons,
        },
        503,
    )


async def health_generate(parts: Parts, request: Request) -> Response:
    """200 if a worker could take a request now."""
    if parts.registry.available():
        return PlainTextResponse("At least one router has healthy workers")
    return PlainTextResponse("No router has healthy workers", 503)


async def engine_metrics(parts: Parts, request: Request) -> Response:
    """The metrics of all healthy workers in one page; those that do not answer are left out."""
    servers = [worker for worker in _servers(parts) if worker.health.healthy]
    if not servers:
        return PlainTextResponse("No available workers", 503)
    answers = await asyncio.gather(
        *(_ask(parts, worker, "GET", "/metrics", SCRAPE_TIMEOUT_S) for worker in servers)
    )
    pages = {
        worker.base_url: answer.content.decode("utf-8", "replace")
        for worker, answer in zip(servers, answers, strict=True)
        if answer.ok
    }
    if not pages:
        reasons = "; ".join(
            f"{worker.base_url}: {answer.problem}"
            for worker, answer in zip(servers, answers, strict=True)
        )
        return PlainTextResponse(f"No worker told its metrics. {reasons}", 503)
    return Response(merge(pages), media_type=METRICS_TYPE)


async def models(parts: Parts, request: Request) -> Response:
    """The models of all workers, each once."""
    names = dict.fromkeys(worker.model_id for worker in parts.registry.list())
    data = [{"id": name, "object": "model", "owned_by": "local"} for name in names]
    return _json({"object": "list", "data": data})


async def proxied(path: str, parts: Parts, request: Request) -> Response:
    """What the first worker that answers says under this path."""
    answer = None
    for worker in _servers(parts):
        if worker.available:
            answer = await _ask(parts, worker, "GET", path, ASK_TIMEOUT_S)
            if answer.status:
                kind = answer.content_type or "application/json"
                return Response(answer.content, answer.status, media_type=kind)
    if answer is not None:
        body = error_body(500, "call_upstream_request_error", answer.problem)
        return Response(body, 500, media_type="application/json")
    body = error_body(503, "no_available_workers", NO_WORKERS)
    return Response(body, 503, media_type="application/json")


async def server_info(parts: Parts, request: Request) -> Response:
    """What the router says of itself."""
    return _json(
        {
            "router_manager": True,
            "routers_count": 1,
            "workers_count": len(parts.registry.list()),
            "policy": parts.config.policy,
        }
    )


# ---- admin -------------------------------------------------------------------------------------


async def flush_cache(parts: Parts, request: Request) -> Response:
    """Every worker forgets its cached prefixes, and the router what it knows of them."""
    servers = _servers(parts)
    answers = await asyncio.gather(
        *(_ask(parts, worker, "POST", "/flush_cache", FLUSH_TIMEOUT_S) for worker in servers)
    )
    good, bad = [], []
    for worker, answer in zip(servers, answers, strict=True):
        if answer.ok:
            good.append(worker.base_url)
            for rank in parts.registry.of_server(worker.base_url):
                parts.router.flushed(rank)
        else:
            bad.append({"worker": worker.base_url, "error": answer.problem})
    counts = {
        "workers_flushed": len(good),
        "total_http_workers": len(servers),
        "total_workers": len(servers),
    }
    if not bad:
        message = f"Successfully flushed cache on all {len(good)} HTTP workers"
        return _json({"status": "success", "message": message, **counts})
    message = f"Cache flush: {len(good)} succeeded, {len(bad)} failed"
    told = {"status": "partial_success", "message": message, **counts}
    return _json({**told, "successful": good, "failed": bad}, 206)


async def abort_request(parts: Parts, request: Request) -> Response:
    """Every worker ends the request of an id, or all: the router does not know who has it."""
    body = await request.body()
    answers = await asyncio.gather(
        *(
            _ask(parts, worker, "POST", "/abort_request", ASK_TIMEOUT_S, body)
            for worker in _servers(parts)
        )
    )
    if not answers:
        content = error_body(503, "no_available_workers", NO_WORKERS)
        return Response(content, 503, media_type="application/json")
    worst = next((answer for answer in answers if not answer.ok), answers[0])
    kind = worst.content_type or "text/plain"
    return Response(worst.content or worst.problem, worst.status or 500, media_type=kind)


async def loads(parts: Parts, request: Request) -> Response:
    """The tokens that each worker says it has to do with; -1 for one that does not answer."""
    told = await parts.monitor.read_loads()
    workers = [
        {"worker": url, "load": -1 if tokens is None else tokens} for url, tokens in told.items()
    ]
    return _json({"workers": workers})


async def add_worker(parts: Parts, request: Request) -> Response:
    """POST /workers: 202, the rest happens in the background."""
    new = await _read(request, NewWorker)
    try:
        job = parts.registration.add(new)
    except QueueFull as error:
        return _problem(503, "QUEUE_FULL", str(error))
    except RegistrationError as error:
        return _problem(400, "BAD_REQUEST", str(error))
    location = f"/workers/{job.id}"
    told = {
        "status": "accepted",
        "worker_id": job.id,
        "url": job.url,
        "location": location,
        "message": "Worker addition queued for background processing",
    }
    response = _json(told, 202)
    response.headers["location"] = location
    return response


async def list_workers(parts: Parts, request: Request) -> Response:
    """GET /workers: those that are registered."""
    infos = [_info(parts, worker) for worker in parts.registry.list()]
    stats = {"prefill_count": 0, "decode_count": 0, "regular_count": len(infos)}
    return _json({"workers": infos, "total": len(infos), "stats": stats})


async def show_worker(parts: Parts, request: Request) -> Response:
    """GET /workers/{id}: one worker, also one that is coming or could not come."""
    worker_id = _worker_id(request)
    if isinstance(worker_id, Response):
        return worker_id
    worker = parts.registry.get(worker_id)
    if worker is not None:
        return _json(_info(parts, worker))
    job = parts.registration.job(worker_id)
    return _not_found(worker_id) if job is None else _json(_pending(job))


async def update_worker(parts: Parts, request: Request) -> Response:
    """PUT /workers/{id}: priority, cost, labels, key, health checks."""
    worker_id = _worker_id(request)
    if isinstance(worker_id, Response):
        return worker_id
    worker = parts.registry.get(worker_id)
    if worker is None:
        return _not_found(worker_id)
    changes = await _read(request, Changes)
    try:
        parts.registration.update(worker, changes)
    except RegistrationError as error:
        return _problem(400, "BAD_REQUEST", str(error))
    return _accepted(worker_id, "Worker update queued for background processing")


async def remove_worker(parts: Parts, request: Request) -> Response:
    """DELETE /workers/{id}?drain=SECONDS: no new requests; those that run go on undisturbed.

    With `drain` the worker stays listed until they have ended, or so long.
    """
    worker_id = _worker_id(request)
    if isinstance(worker_id, Response):
        return worker_id
    drain_s = _seconds(request.query_params.get("drain"))
    if drain_s is None:
        return _problem(400, "BAD_REQUEST", "drain must be a number of seconds, at least 0.")
    worker, job = parts.registry.get(worker_id), parts.registration.job(worker_id)
    if worker is None and job is None:
        return _not_found(worker_id)
    url = job.url if worker is None and job is not None else ""
    parts.registration.remove(worker.base_url if worker is not None else url, drain_s=drain_s)
    return _accepted(worker_id, "Worker removal queued for background processing")


async def old_add_worker(parts: Parts, request: Request) -> Response:
    """POST /add_worker?url=: answers when the worker is there."""
    url = request.query_params.get("url")
    if not url:
        return PlainTextResponse("Worker URL required. Provide 'url' query parameter", 400)
    try:
        new = NewWorker(url=url, api_key=request.query_params.get("api_key"))
        job = parts.registration.add(new)
    except RegistrationError as error:
        return PlainTextResponse(str(error), 400)
    await job.done.wait()
    if job.state == "failed":
        return PlainTextResponse(job.message or "The worker could not be added.", 400)
    return PlainTextResponse(f"Successfully added worker: {job.url}")


async def old_remove_worker(parts: Parts, request: Request) -> Response:
    """POST /remove_worker?url=&drain=."""
    url = request.query_params.get("url")
    drain_s = _seconds(request.query_params.get("drain"))
    if not url or drain_s is None:
        return PlainTextResponse("Worker URL required. Provide 'url' query parameter", 400)
    try:
        url = normal_url(url)
        job = parts.registration.remove(url, drain_s=drain_s)
    except RegistrationError as error:
        return PlainTextResponse(str(error), 400)
    if job is None:
        return PlainTextResponse(f"Worker {url} not found", 404)
    return PlainTextResponse(f"Successfully removed worker: {url}")


async def old_list_workers(parts: Parts, request: Request) -> Response:
    """GET /list_workers."""
    return _json({"urls": [worker.url for worker in parts.registry.list()]})


PUBLIC: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/health", health),
    ("GET", "/liveness", health),
    ("GET", "/readiness", readiness),
    ("GET", "/health_generate", health_generate),
    ("GET", "/engine_metrics", engine_metrics),
    ("GET", "/v1/models", models),
    ("GET", "/get_model_info", functools.partial(proxied, "/get_model_info")),
    ("GET", "/model_info", functools.partial(proxied, "/model_info")),
    ("GET", "/get_server_info", server_info),
    ("GET", "/server_info", functools.partial(proxied, "/server_info")),
)

ADMIN: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/flush_cache", flush_cache),
    ("POST", "/abort_request", abort_request),
    ("GET", "/get_loads", loads),
    ("GET", "/v1/loads", loads),
    ("POST", "/workers", add_worker),
    ("GET", "/workers", list_workers),
    ("GET", "/workers/{worker_id}", show_worker),
    ("PUT", "/workers/{worker_id}", update_worker),
    ("DELETE", "/workers/{worker_id}", remove_worker),
    ("POST", "/add_worker", old_add_worker),
    ("POST", "/remove_worker", old_remove_worker),
    ("GET", "/list_workers", old_list_workers),
)


# ---- asking workers ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a worker answered; status 0 if it did not."""

    status: int = 0
    content: bytes = b""
    content_type: str = ""
    problem: str = ""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


async def _ask(
    parts: Parts, worker: Worker, method: str, path: str, timeout: float, body: bytes = b""
) -> _Answer:
    headers = [*bearer(worker.api_key)]
    if body:
        headers.append((b"content-type", b"application/json"))
    try:
        response = await parts.upstream.request(
            worker.base_url, method, path, headers, body, timeout
        )
        content = await response.read()
    except UpstreamError as error:
        return _Answer(problem=f"Worker {worker.base_url}: {error}")
    kind = (response.header(b"content-type") or b"").decode("latin-1")
    shown = content[:SHOWN_CHARS].decode(errors="replace").strip()
    phrase = HTTPStatus(response.status).phrase if response.status in _STATUSES else ""
    return _Answer(
        status=response.status,
        content=content,
        content_type=kind,
        problem=f"HTTP {response.status} {phrase}: {shown}",
    )


_STATUSES = frozenset(HTTPStatus)


def _servers(parts: Parts) -> list[Worker]:
    """One worker of each server."""
    return list({worker.base_url: worker for worker in reversed(parts.registry.list())}.values())[
        ::-1
    ]


# ---- forms -------------------------------------------------------------------------------------


def _info(parts: Parts, worker: Worker) -> dict[str, Any]:
    """A registered worker."""
    told: dict[str, Any] = {
        "id": worker.id,
        "url": worker.url,
        "model_id": worker.model_id,
        "priority": worker.priority,
        "cost": worker.cost,
        "worker_type": worker.worker_type,
        "is_healthy": worker.health.healthy,
        "load": worker.in_flight,
        "connection_mode": "HTTP",
        "metadata": {
            **worker.labels,
            "priority": str(worker.priority),
            "cost": str(worker.cost),
        },
        "disable_health_check": worker.disable_health_check,
        "circuit": worker.breaker.state,
        "draining": worker.draining,
    }
    job = parts.registration.job(worker.id)
    if job is not None:
        told["job_status"] = job.status()
    return told


def _pending(job: Job) -> dict[str, Any]:
    """A worker that is not registered, but was to be."""
    return {
        "id": job.id,
        "url": job.url,
        "model_id": "unknown",
        "priority": 0,
        "cost": 1.0,
        "worker_type": "unknown",
        "is_healthy": False,
        "load": 0,
        "connection_mode": "unknown",
        "metadata": {},
        "disable_health_check": False,
        "job_status": job.status(),
    }


def _why_not(worker: Worker) -> str:
    """Why a worker does not make the router ready."""
    return "it is being removed" if worker.draining else "it does not answer its health checks"


def _job_reason(job: Job) -> str:
    if job.state == "failed":
        return job.message or "it could not be added"
    return "it is not up yet" if job.kind == "AddWorker" else "it is being removed"


def _worker_id(request: Request) -> str | Response:
    """The id in the path, or the answer to one that is none."""
    given = request.path_params["worker_id"]
    try:
        return str(uuid.UUID(given))
    except ValueError as error:
        return _problem(
            400,
            "BAD_REQUEST",
            f"Invalid worker_id '{given}' (expected UUID). Error: {error}",
        )


def _seconds(text: str | None) -> float | None:
    """A duration in a query, 0 if there is none; None if it is no duration."""
    try:
        value = float(text or 0)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


async def _read(request: Request, kind: type[Body]) -> Body:
    """A JSON body.

    Raises:
        BadBody: it is no JSON, or not of this form.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise BadBody(415, "Expected request with `Content-Type: application/json`")
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.ValidationError as error:
        text = f"Failed to deserialize the JSON body into the target type: {error}"
        raise BadBody(422, text) from None
    except msgspec.DecodeError as error:
        raise BadBody(400, f"Failed to parse the request body as JSON: {error}") from None


def _json(told: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(told), status, media_type="application/json")


def _problem(status: int, code: str, text: str) -> Response:
    return _json({"error": text, "code": code}, status)


def _not_found(worker_id: str) -> Response:
    return _problem(404, "WORKER_NOT_FOUND", f"Worker {worker_id} not found")


def _accepted(worker_id: str, message: str) -> Response:
    return _json({"status": "accepted", "worker_id": worker_id, "message": message}, 202)


# ---- around the handlers -----------------------------------------------------------------------


def _endpoint(parts: Parts, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(parts, request)

    return endpoint


def _guarded(handler: Handler) -> Handler:
    """The handler, for those who have the router's key."""

    async def guarded(parts: Parts, request: Request) -> Response:
        if parts.security.authorized(list(request.scope["headers"])):
            return await handler(parts, request)
        message = "The key in `Authorization: Bearer <key>` is missing or wrong."
        return Response(
            error_body(401, "unauthorized", message),
            401,
            headers={"www-authenticate": "Bearer"},
            media_type="application/json",
        )

    return guarded


def _merged(routes: list[Route]) -> list[Route]:
    """Routes of one path behind each other; Starlette answers 405 with the first one's methods."""
    allowed: dict[str, set[str]] = {}
    for route in routes:
        allowed.setdefault(route.path, set()).update(route.methods or ())
    for path, methods in allowed.items():
        others = Route(path, _not_allowed(methods), methods=sorted(ALL_METHODS - methods))
        routes.append(others)
    return routes


ALL_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"}


def _not_allowed(methods: set[str]) -> Callable[[Request], Awaitable[Response]]:
    allow = ",".join(sorted(methods))

    async def endpoint(request: Request) -> Response:
        return Response(status_code=405, headers={"allow": allow})

    return endpoint


async def _bare(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Response(status_code=error.status_code, headers=error.headers)


async def _bad_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadBody)
    return PlainTextResponse(str(error), error.status)


class _Edge:
    """What every answer has in common: counted, with an id, and usable from web pages.

    A path that is none gets a bare 404.
    """

    def __init__(self, parts: Parts, app: Starlette) -> None:
        self._parts = parts
        self._app = app
        self._paths = {path for _, path, _ in (*PUBLIC, *ADMIN)}
        self._id_headers = [name.lower().encode() for name in parts.config.request_id_headers]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = WORKER_PATH.sub("/workers/{id}", scope["path"])
        known = path in ROUTES or path in self._paths or path == "/workers/{id}"
        if not known:
            await _start(send, 404, [])
            return
        metrics, security = self._parts.metrics, self._parts.security
        method, status = scope["method"], 499
        headers = list(scope["headers"])
        extra = [*security.answer_headers(headers), (b"x-request-id", self._id(headers))]

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        number = metrics.http_request(method, path)
        try:
            preflight = security.preflight(headers) if method == "OPTIONS" else None
            if preflight is not None:
                status = 200
                await _start(send, 200, [*preflight, extra[-1]])
            elif path in ROUTES:
                await _start(tell, 405, [(b"allow", b"POST")])
            else:
                await self._app(scope, receive, tell)
        finally:
            metrics.http_response(number, method, path, status)

    def _id(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The request's id: the client's own, else a new one."""
        given = dict(reversed(headers))
        for name in self._id_headers:
            if given.get(name):
                return given[name]
        return f"req-{uuid.uuid4().hex[:24]}".encode()


async def _start(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    """A whole answer without a body."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
