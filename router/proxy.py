"""The way of one generation request: checked, given to a worker, answered, whatever happens to it.

It promises that a request is repeated as long as the client has seen nothing of an answer, on
another worker if there is one; that a stream that breaks goes on elsewhere where workers can do
that, and otherwise ends with an error event; that a worker that hangs and is found unhealthy keeps
no request that another one could answer; that a client that leaves takes its request with it; and
that the router's books (`Ticket`, `Permit`) are closed once for each request, on every path.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from router.config import RouterConfig
from router.failover import (
    DONE,
    ContinuedStream,
    PassedStream,
    Usage,
    error_event,
    usage_and_text_of,
    usage_of,
)
from router.front import Call, HeaderList
from router.limits import Limiter, RateLimited
from router.metrics import RouterMetrics
from router.request import BadRequest, RoutedRequest, with_fields
from router.retry import backoff_s, retry_after_s
from router.routing import Outcome, Router, Ticket
from router.upstream import ConnectFailed, TimedOut, Upstream, UpstreamError, UpstreamResponse
from router.workers import Worker, WorkerRegistry

PATIENCE_S = 15.0
"""How long a stream that broke waits for a worker that can go on with it."""
MAX_PAUSE_S = 1.0
SEED_BITS = 31
CLIENT_LEFT = 499
"""What is counted for a client that hung up; nobody receives it."""
STALLED_S = 5.0
"""A request of which an unhealthy worker has said nothing for so long is taken elsewhere."""
MAX_REMEMBERED = 1_024
"""Workers of which it is known when an exchange broke there."""
TAIL_S = 1.0
"""How long the end of an exchange may take after its last event, for the connection's sake."""

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
BUSY = frozenset({408, 429, 503})
"""Statuses by which a worker says that it is full, not that it is broken."""

NOT_FORWARDED = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"trailers",
        b"transfer-encoding",
        b"upgrade",
        b"host",
        b"content-length",
        b"x-request-id",
    }
)
"""Headers of an answer that concern one connection only, or are set here."""
FORWARDED = frozenset({b"x-correlation-id", b"traceparent", b"tracestate", b"x-smg-routing-key"})
JSON = (b"content-type", b"application/json")

logger = logging.getLogger("meshserve.router")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A path that is given to a worker.

    Attributes:
        endpoint: its name in metrics.
        id_prefix: how request ids made here begin.
        can_continue: its streams can go on on another worker.
        says_done: the last event of its streams is [DONE].
    """

    endpoint: str
    id_prefix: str = "req-"
    can_continue: bool = False
    says_done: bool = False


ROUTES = {
    "/v1/completions": Route(
        endpoint="completions", id_prefix="cmpl-", can_continue=True, says_done=True
    ),
    "/v1/chat/completions": Route(
        endpoint="chat", id_prefix="chatcmpl-", can_continue=True, says_done=True
    ),
    "/generate": Route(endpoint="generate", id_prefix="gnt-", says_done=True),
    "/v1/responses": Route(endpoint="responses", id_prefix="resp-"),
    "/v1/embeddings": Route(endpoint="embeddings"),
    "/v1/rerank": Route(endpoint="rerank"),
    "/rerank": Route(endpoint="rerank"),
    "/v1/classify": Route(endpoint="classify"),
}


class Refused(Exception):
    """The request ends here, with this status and error code; the message is for the client."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: HeaderList | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or []


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An attempt that gave the client nothing: what it would be told if there were no other.

    Attributes:
        answer: the worker's own answer (headers and body), where there is one.
        reached: the worker may have seen the request.
        final: another attempt would not help.
        retry_after_s: how long the worker asks to be left alone.
    """

    status: int
    code: str
    message: str
    answer: tuple[HeaderList, bytes] | None = None
    reached: bool = True
    final: bool = False
    retry_after_s: float = 0.0


NO_WORKER = Failure(
    status=503,
    code="no_available_workers",
    message="No available workers (all circuits open or unhealthy)",
)


def error_body(status: int, code: str, message: str) -> bytes:
    """The JSON of an error that the router made itself."""
    kind = HTTPStatus(status).phrase
    return msgspec.json.encode({"error": {"type": kind, "code": code, "message": message}})


def failure_of(error: UpstreamError, *, answering: bool) -> Failure:
    """What an exchange with a worker that went wrong means for the client."""
    if isinstance(error, TimedOut):
        return Failure(
            status=504, code="call_upstream_timeout", message=f"Worker {error.url}: {error}"
        )
    code = "read_response_body_failed" if answering else "call_upstream_request_error"
    reached = not isinstance(error, ConnectFailed) or error.sent
    return Failure(status=500, code=code, message=f"Worker {error.url}: {error}", reached=reached)


UNAUTHORIZED = error_body(
    401, "unauthorized", "The key in `Authorization: Bearer <key>` is missing or wrong."
)


class Proxy:
    """Gives generation requests, those to the paths of `ROUTES`, to workers.

    Args:
        answer_headers: (headers of the request) -> headers that every answer gets, CORS for one.
    """

    def __init__(
        self,
        *,
        config: RouterConfig,
        router: Router,
        registry: WorkerRegistry,
        upstream: Upstream,
        limiter: Limiter,
        metrics: RouterMetrics,
        answer_headers: Callable[[HeaderList], HeaderList],
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.router = router
        self.registry = registry
        self.upstream = upstream
        self.limiter = limiter
        self.metrics = metrics
        self.answer_headers = answer_headers
        self.rng = rng
        self.clock = clock
        self._exchanges: set[_Exchange] = set()
        self._broke_at: dict[str, float] = {}
        self.max_attempts = 1 if config.disable_retries else max(1, config.retry_max_retries)
        self.id_headers = {
            name.lower().encode(): i for i, name in enumerate(config.request_id_headers)
        }

    async def handle(self, call: Call) -> None:
        """Answer one call to a path of `ROUTES`."""
        exchange = _Exchange(self, call)
        self._exchanges.add(exchange)
        try:
            await exchange.run()
        except Exception:
            logger.exception("Request %s", exchange.request_id.decode("latin-1"))
            exchange.give_up()
        finally:
            self._exchanges.discard(exchange)
            exchange.close()

    def worker_unhealthy(self, worker: Worker) -> None:
        """A worker stopped answering health checks: its connections may stay open for ever.

        What stands still there and can go on elsewhere does, now or later, as long as the worker is
        unhealthy.
        """
        theirs = [each for each in self._exchanges if each.worker is worker]
        if not theirs:
            return
        model = worker.model_id if self.config.enable_igw else None
        others = [w for w in self.registry.available(model) if w.base_url != worker.base_url]
        before = self.clock() - STALLED_S
        for exchange in theirs:
            exchange.leave_if_stalled(before, others)
        asyncio.get_running_loop().call_later(STALLED_S, self._look_again, worker)

    def _look_again(self, worker: Worker) -> None:
        if not worker.health.healthy:
            self.worker_unhealthy(worker)

    def blame(self, worker: Worker, asked_at: float) -> Outcome:
        """What an exchange that broke means for its worker.

        A crash breaks all exchanges at once. That is one failure, not so many in a row: one that
        ran already when another one broke says nothing new.
        """
        if asked_at <= self._broke_at.get(worker.url, -1.0):
            return Outcome.NEUTRAL
        if len(self._broke_at) >= MAX_REMEMBERED:
            self._broke_at.clear()
        self._broke_at[worker.url] = self.clock()
        return Outcome.FAILED


class _Exchange:
    """One client's request, from its headers to the last byte of its answer."""

    __slots__ = (
        "_asked_at",
        "_began",
        "_call",
        "_code",
        "_first_at",
        "_forwarded",
        "_heard_at",
        "_leaving",
        "_number",
        "_proxy",
        "_response",
        "_route",
        "_stream",
        "_waiting",
        "request_id",
        "worker",
    )

    def __init__(self, proxy: Proxy, call: Call) -> None:
        self._proxy = proxy
        self._call = call
        self._route = ROUTES[call.path]
        self._began = proxy.clock()
        self._stream: PassedStream | ContinuedStream | None = None
        self._response: UpstreamResponse | None = None
        self._waiting = self._leaving = False
        self._asked_at = self._heard_at = self._first_at = self._began
        self._number = proxy.metrics.http_request(call.method, call.path)
        self._code = ""
        self.worker: Worker | None = None
        self.request_id, self._forwarded = self._read_headers()

    async def run(self) -> None:
        """Answer the request."""
        proxy, call = self._proxy, self._call
        try:
            self._check_type()
            request = RoutedRequest.parse(call.path, call.body, call.headers)
            permit = await proxy.limiter.acquire()
        except BadRequest as error:
            proxy.metrics.router_error("unknown", self._route.endpoint, "validation_error")
            self._refuse(Refused(error.status, "invalid_request", error.message))
            return
        except Refused as refused:
            self._refuse(refused)
            return
        except RateLimited as limited:
            self._refuse(_rate_limited(limited))
            return
        try:
            await self._forward(request)
        finally:
            permit.release()
            seconds = proxy.clock() - self._began
            proxy.metrics.router_done(request.model, request.endpoint, seconds)

    def close(self) -> None:
        """Whatever happened, it is counted."""
        call = self._call
        status = CLIENT_LEFT if call.client_left else call.status
        metrics = self._proxy.metrics
        metrics.http_response(self._number, call.method, call.path, status, self._code)

    def give_up(self) -> None:
        """The router itself failed: the client is told."""
        call = self._call
        self._proxy.metrics.router_error("unknown", self._route.endpoint, "internal_error")
        message = "The router failed; its log says how."
        if call.ended or call.client_left:
            return
        if self._response is not None:
            call.end(error_event("internal_error", 500, message))
        elif not call.status:
            self._code = "internal_error"
            call.answer(500, [JSON], error_body(500, "internal_error", message))

    def leave_if_stalled(self, before: float, others: Sequence[Worker]) -> None:
        """Leave the worker if it has said nothing since then and one of the others can do it."""
        if self._waiting:
            if others and self._asked_at < before and not self._leaving:
                self._leaving = True
                self._call.cancel()  # `_ask` makes a failed attempt of it
        elif (
            self._response is not None
            and self._heard_at < before
            and isinstance(self._stream, ContinuedStream)
            and any(worker.supports_continuation for worker in others)
        ):
            self._response.interrupt("the worker is unhealthy and the stream stands still")

    # the request

    def _read_headers(self) -> tuple[bytes, HeaderList]:
        """The request's id, and the headers that go to the worker."""
        ids = self._proxy.id_headers
        request_id, rank = b"", len(ids)
        forwarded: HeaderList = [JSON]
        for pair in self._call.headers:
            name, value = pair
            place = ids.get(name)
            if place is not None and place < rank and value:
                request_id, rank = value, place
            if name in FORWARDED or name == b"authorization" or name.startswith(b"x-request-id-"):
                forwarded.append(pair)
        if not request_id:
            noise = self._proxy.rng.getrandbits(96)
            request_id = f"{self._route.id_prefix}{noise:024x}".encode()
        forwarded.append((b"x-request-id", request_id))
        return request_id, forwarded

    def _check_type(self) -> None:
        """Raises Refused if the body is not JSON by its header."""
        kind = self._call.header(b"content-type")
        if kind != b"application/json":
            kind = kind.partition(b";")[0].strip().lower()
            if kind != b"application/json" and not kind.endswith(b"+json"):
                raise Refused(
                    415,
                    "unsupported_media_type",
                    "Expected request with `Content-Type: application/json`",
                )

    # attempts

    async def _forward(self, request: RoutedRequest) -> None:
        """Ask workers until one answers, or the attempts are used up."""
        proxy = self._proxy
        proxy.metrics.router_request(request.model, request.endpoint, request.stream)
        failed: list[Worker] = []
        failure = NO_WORKER
        for attempt in range(proxy.max_attempts):
            if attempt:
                await self._back_off(request, attempt, failed, failure)
            ticket = self._begin(request, failed)
            if ticket is None:
                failure = NO_WORKER
                continue
            try:
                result = await self._attempt(request, ticket)
            finally:
                ticket.end(Outcome.NEUTRAL)  # if nobody did
            if result is None:
                return
            failure = result
            failed.append(ticket.worker)
        if proxy.max_attempts > 1:
            proxy.metrics.retries_exhausted(request.endpoint)
        self._fail(request, failure)

    async def _back_off(
        self, request: RoutedRequest, attempt: int, failed: Sequence[Worker], failure: Failure
    ) -> None:
        proxy = self._proxy
        wait = failure.retry_after_s
        if wait and proxy.router.candidates(request, failed):
            wait = 0.0  # others were not asked yet
        seconds = backoff_s(proxy.config, attempt - 1, proxy.rng, wait)
        proxy.metrics.retry(self._route.endpoint)
        proxy.metrics.backoff(attempt, seconds)
        await asyncio.sleep(seconds)

    def _begin(
        self, request: RoutedRequest, failed: Sequence[Worker], unable: Collection[Worker] = ()
    ) -> Ticket | None:
        """A worker that did not fail this request if there is one, else any but the last that did,
        else that; never one `unable`."""
        router = self._proxy.router
        if not failed:
            return router.begin(request, unable)
        # Entries of one server share its fate.
        urls = {worker.base_url for worker in failed}
        kin = [w for w in self._proxy.registry.list() if w.base_url in urls]
        for shunned in (kin, failed, failed[-1:]):
            ticket = router.begin(request, [*unable, *shunned])
            if ticket is not None:
                return ticket
        return router.begin(request, unable)

    async def _attempt(self, request: RoutedRequest, ticket: Ticket) -> Failure | None:
        """Ask one worker; None if the client has its answer."""
        worker = ticket.worker
        fields: dict[str, Any] = {}
        self._stream = None
        if request.stream:
            self._stream = self._new_stream(worker)
            if isinstance(self._stream, ContinuedStream):
                fields = self._stream.fields
        asked = await self._ask(ticket, fields)
        if isinstance(asked, Failure):
            return asked
        response, content = asked
        if self._stream is None or not _is_stream(response):
            return self._pass_answer(request, ticket, response, content)
        if not content:
            return self._lost(ticket, "Its stream ended before it began.")
        await self._pass_stream(request, ticket, response, content)
        return None

    def _new_stream(self, worker: Worker) -> PassedStream | ContinuedStream:
        proxy = self._proxy
        if (
            proxy.config.stream_failover
            and self._route.can_continue
            and worker.supports_continuation
        ):
            stream = ContinuedStream.of(self._call.body, proxy.rng.getrandbits(SEED_BITS))
            if stream is not None:
                return stream
        return PassedStream()

    async def _ask(
        self, ticket: Ticket, fields: dict[str, Any]
    ) -> tuple[UpstreamResponse, bytes] | Failure:
        """One exchange with a worker: all of a plain answer, the first bytes of a stream."""
        worker, body = ticket.worker, self._call.body
        if worker.rank is not None:
            fields = {**fields, "data_parallel_rank": worker.rank}
        if fields:
            body = with_fields(body, fields)
        response: UpstreamResponse | None = None
        self.worker, self._asked_at = worker, self._proxy.clock()
        self._waiting = True
        try:
            response = await self._proxy.upstream.request(
                worker.base_url,
                "POST",
                self._call.path,
                self._headers_for(worker),
                body,
                self._proxy.config.request_timeout_secs,
            )
            if self._stream is not None and _is_stream(response):
                return response, await response.chunk()
            return response, await response.read()
        except UpstreamError as error:
            failure = failure_of(error, answering=response is not None)
            outcome = self._outcome_of(error, worker, reached=failure.reached)
        except BaseException as error:
            if response is not None:
                response.close()
            if not self._is_leaving(error):
                raise
            failure = self._broken(worker.base_url, "it is unhealthy and does not answer")
            outcome = Outcome.FAILED
        finally:
            self._waiting = False
        self._note(ticket, failure, outcome)
        return failure

    def _outcome_of(self, error: UpstreamError, worker: Worker, *, reached: bool) -> Outcome:
        """What an exchange without an answer says of its worker."""
        if isinstance(error, ConnectFailed) and error.own:
            return Outcome.NEUTRAL
        if not reached:
            return Outcome.ABSENT
        if isinstance(error, TimedOut):
            return Outcome.FAILED
        return self._proxy.blame(worker, self._asked_at)

    def _is_leaving(self, error: BaseException) -> bool:
        """Whether a cancellation is that of `leave_if_stalled`, which ends here."""
        leaving, self._leaving = self._leaving, False
        if not leaving or self._call.client_left or not isinstance(error, asyncio.CancelledError):
            return False
        task = asyncio.current_task()
        return task is not None and task.uncancel() == 0

    def _headers_for(self, worker: Worker) -> HeaderList:
        if worker.api_key is None:
            return self._forwarded
        own = [pair for pair in self._forwarded if pair[0] != b"authorization"]
        return [*own, (b"authorization", b"Bearer " + worker.api_key.encode())]

    def _lost(self, ticket: Ticket, message: str) -> Failure:
        failure = self._broken(ticket.worker.base_url, message)
        self._note(ticket, failure)
        return failure

    def _note(self, ticket: Ticket, failure: Failure, outcome: Outcome = Outcome.FAILED) -> None:
        """A worker failed to answer, or to go on."""
        ticket.end(outcome)
        self._proxy.metrics.upstream_response(failure.status, failure.code)
        self._proxy.metrics.worker_error(failure.code)
        logger.info("Request %s: %s", self.request_id.decode("latin-1"), failure.message)

    # answers

    def _pass_answer(
        self, request: RoutedRequest, ticket: Ticket, response: UpstreamResponse, content: bytes
    ) -> Failure | None:
        """A plain answer: to the client, or back as a reason to ask again."""
        status, metrics = response.status, self._proxy.metrics
        metrics.upstream_response(status, "")
        if status in RETRIED:
            ticket.end(Outcome.BUSY if status in BUSY else Outcome.FAILED)
            phrase = HTTPStatus(status).phrase
            return Failure(
                status=status,
                code="worker_error",
                message=phrase,
                answer=(response.headers, content),
                retry_after_s=retry_after_s(response.header(b"retry-after")),
            )
        if status < 400:
            ticket.first_token()
            usage, text = self._read_answer(request, content)
            self._count(request, ticket, usage, 0)
            ticket.answered(text)
            ticket.end(Outcome.OK)
        else:
            ticket.end(Outcome.NEUTRAL)
        self._answer(status, response.headers, content)
        return None

    async def _pass_stream(
        self, request: RoutedRequest, ticket: Ticket, response: UpstreamResponse, first: bytes
    ) -> None:
        """A stream, over as many workers as it takes."""
        stream, proxy = self._stream, self._proxy
        assert stream is not None
        proxy.metrics.upstream_response(response.status, "")
        self._call.begin(response.status, self._answer_headers(response.headers))
        self._first_at = proxy.clock()
        ticket.first_token()
        proxy.metrics.ttft(request.model, request.endpoint, self._first_at - self._began)
        recovery = _Recovery(self, request, stream)
        try:
            while True:
                failure = await self._pump(ticket, response, first)
                if failure is None:
                    self._count_stream(request, ticket, stream)
                    ticket.end(Outcome.OK)
                    recovery.succeeded()
                    return
                response.close()
                self._note(ticket, failure, proxy.blame(ticket.worker, self._asked_at))
                again = await recovery.next(ticket.worker, failure)
                if again is None:
                    self._count_stream(request, ticket, stream)
                    self._call.end(DONE)
                    recovery.succeeded()
                    return
                if isinstance(again, Failure):
                    kind = _error_type(again)
                    proxy.metrics.router_error(request.model, request.endpoint, kind)
                    self._call.end(error_event(again.code, again.status, again.message))
                    return
                ticket, response, first = again
                ticket.first_token()
        finally:
            response.close()
            ticket.end(Outcome.NEUTRAL)

    async def _pump(
        self, ticket: Ticket, response: UpstreamResponse, first: bytes
    ) -> Failure | None:
        """Hand one worker's stream to the client; None if that was the end of it."""
        stream, data = self._stream, first
        assert stream is not None
        continued = isinstance(stream, ContinuedStream)
        clock = self._proxy.clock
        self.worker, self._response = ticket.worker, response
        try:
            while data:
                self._heard_at = clock()
                out = stream.feed(data)
                if continued and stream.complete:
                    self._call.end(out)
                    await _drain(response)
                    return None
                if out:
                    await self._call.send(out)
                if stream.failure is not None:
                    return self._broken(response.url, stream.failure)
                data = await response.chunk()
        except UpstreamError as error:
            if stream.complete:
                self._call.end(b"")  # only the connection's end was missing
                return None
            return failure_of(error, answering=True)
        if continued or (self._route.says_done and not response.framed and not stream.complete):
            return self._broken(response.url, "the stream ended without [DONE]")
        self._call.end(stream.rest())
        return None

    def _broken(self, url: str, reason: str) -> Failure:
        return Failure(
            status=500, code="read_response_body_failed", message=f"Worker {url}: {reason}"
        )

    def _read_answer(self, request: RoutedRequest, content: bytes) -> tuple[Usage | None, str]:
        """The usage of a plain answer, and its text if that is of use to the policy."""
        if self._proxy.router.remembers and not request.by_ids:
            return usage_and_text_of(content)
        return usage_of(content), ""

    def _count_stream(
        self,
        request: RoutedRequest,
        ticket: Ticket,
        stream: PassedStream | ContinuedStream,
    ) -> None:
        """A stream came to its end."""
        num = self._count(request, ticket, stream.usage, stream.num_events)
        # Reading the text of a stream that only passes would cost each event as much as passing it.
        if isinstance(stream, ContinuedStream) and self._proxy.router.remembers:
            ticket.answered(stream.first_ids if request.by_ids else stream.first_text)
        seconds = self._proxy.clock() - self._first_at
        self._proxy.metrics.generation(request.model, request.endpoint, seconds, num)

    def _count(
        self, request: RoutedRequest, ticket: Ticket, usage: Usage | None, num_events: int
    ) -> int:
        """What the answer cost, by what it says, else by its events; its number of tokens."""
        prompt, completion = 0, num_events
        if usage is not None:
            prompt = usage.prompt_tokens
            if usage.completion_tokens is not None:
                completion = usage.completion_tokens
            ticket.usage(prompt, usage.cached, completion)
        self._proxy.metrics.tokens(request.model, request.endpoint, prompt, completion)
        return completion

    def _fail(self, request: RoutedRequest, failure: Failure) -> None:
        metrics = self._proxy.metrics
        metrics.router_error(request.model, request.endpoint, _error_type(failure))
        if failure.answer is not None:
            headers, content = failure.answer
            self._answer(failure.status, headers, content)
        else:
            self._refuse(Refused(failure.status, failure.code, failure.message))

    def _refuse(self, refused: Refused) -> None:
        self._code = refused.code
        body = error_body(refused.status, refused.code, str(refused))
        self._answer(refused.status, [JSON, *refused.headers], body)

    def _answer(self, status: int, headers: HeaderList, content: bytes) -> None:
        self._call.answer(status, self._answer_headers(headers), content)

    def _answer_headers(self, headers: HeaderList) -> HeaderList:
        """A worker's headers, or ours, as the client gets them; framing is the front's."""
        kept = [pair for pair in headers if pair[0] not in NOT_FORWARDED]
        kept.append((b"x-request-id", self.request_id))
        kept.extend(self._proxy.answer_headers(self._call.headers))
        return kept


class _Recovery:
    """Finds the next worker for a stream that broke, as long as that makes sense.

    A stream that gets on may break as often as it likes. One that does not, costs as many attempts
    as a request may have: a request that kills whoever computes it must not go round.
    """

    def __init__(
        self,
        exchange: _Exchange,
        request: RoutedRequest,
        stream: PassedStream | ContinuedStream,
    ) -> None:
        self._exchange = exchange
        self._request = request
        self._stream = stream
        self._attempts = 0
        self._progress = 0
        self._failed: list[Worker] = []
        self._num = 0

    async def next(
        self, worker: Worker, failure: Failure
    ) -> tuple[Ticket, UpstreamResponse, bytes] | Failure | None:
        """Where the stream goes on after `worker` failed; the failure to tell if nowhere; None if
        the client has everything but the end."""
        exchange, stream = self._exchange, self._stream
        if not isinstance(stream, ContinuedStream):
            return failure
        if stream.only_done_missing:
            return None
        if failure.status == HTTPStatus.GATEWAY_TIMEOUT or not stream.can_go_on:
            return failure
        if stream.num_events > self._progress:
            self._progress, self._attempts = stream.num_events, 0
            self._failed.clear()
        self._failed.append(worker)
        proxy = exchange._proxy
        patience = proxy.clock() + PATIENCE_S
        tries = 0
        while self._attempts < proxy.max_attempts and proxy.clock() < patience:
            if tries:
                delay = backoff_s(proxy.config, tries - 1, proxy.rng)
                await asyncio.sleep(min(delay, MAX_PAUSE_S))
            tries += 1
            unable = [w for w in proxy.registry.list() if not w.supports_continuation]
            ticket = exchange._begin(self._request, self._failed, unable)
            if ticket is None:
                continue
            try:
                result = await self._ask(stream, ticket)
            except BaseException:
                ticket.end(Outcome.NEUTRAL)
                raise
            if not isinstance(result, Failure):
                self._attempts += 1
                self._num += 1
                logger.info(
                    "Request %s goes on on %s",
                    exchange.request_id.decode("latin-1"),
                    ticket.worker.base_url,
                )
                return ticket, *result
            failure = result
            if failure.final:
                break
            self._attempts += failure.reached
            self._failed.append(ticket.worker)
        proxy.metrics.failover("failed")
        return failure

    def succeeded(self) -> None:
        """The stream came to its end."""
        for _ in range(self._num):
            self._exchange._proxy.metrics.failover("success")

    async def _ask(
        self, stream: ContinuedStream, ticket: Ticket
    ) -> tuple[UpstreamResponse, bytes] | Failure:
        asked = await self._exchange._ask(ticket, stream.fields_to_continue())
        if isinstance(asked, Failure):
            return asked
        response, content = asked
        if _is_stream(response):
            if content:
                return asked
            return self._exchange._lost(ticket, "Its stream ended before it began.")
        status = response.status
        retried = status in RETRIED
        if retried:
            ticket.end(Outcome.BUSY if status in BUSY else Outcome.FAILED)
        else:
            ticket.end(Outcome.NEUTRAL)
        return Failure(
            status=status if status >= 400 else 502,
            code="cannot_continue",
            message=f"Worker {ticket.worker.base_url} could not go on with the stream: "
            f"{content[:500].decode(errors='replace')}",
            final=not retried,
        )


async def _drain(response: UpstreamResponse) -> None:
    """Let an exchange that said everything come to its end, so that its connection can be kept."""
    with contextlib.suppress(UpstreamError, TimeoutError):
        async with asyncio.timeout(TAIL_S):
            while await response.chunk():
                pass


def _is_stream(response: UpstreamResponse) -> bool:
    kind = response.header(b"content-type")
    return response.status < 300 and kind is not None and kind.startswith(b"text/event-stream")


def _rate_limited(limited: RateLimited) -> Refused:
    code = "queue_timeout" if limited.status == 408 else "rate_limited"
    seconds = str(max(1, round(limited.retry_after))).encode()
    return Refused(limited.status, code, limited.message, headers=[(b"retry-after", seconds)])


def _error_type(failure: Failure) -> str:
    """The name of a failure in `smg_router_request_errors_total`."""
    if failure.code == NO_WORKER.code:
        return "no_workers"
    return "timeout" if failure.code == "call_upstream_timeout" else "backend_error"
