"""What the front measures itself: latencies and sizes of requests, HTTP requests and answers.

Every metric of a request bears the dp slice that ran it, which the first token tells; requests that
never got a token, and those that their client left, are in no histogram. Names are SGLang's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.messages import TokenEvent

PREFIX = "sglang:"
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
"""The media type that every Prometheus understands; newer ones say the same of these names."""

_SHORT = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06)
_MIDDLE = (0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8)
_LONG = (10, 20, 40, 60, 80, 100, 200, 400, 600, 1200, 1800, 2400)
ITL_BUCKETS = _SHORT + _MIDDLE
TTFT_BUCKETS = (*_SHORT[::2], *_MIDDLE, *_LONG[:8])
E2E_BUCKETS = (0.01, 0.02, 0.04, *_MIDDLE, *_LONG)
QUEUE_BUCKETS = (*_SHORT[::2], *_MIDDLE, *_LONG[:8])
TOKEN_BUCKETS = tuple(float(m * 10**e) for e in range(7) for m in (1, 2, 5))

METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
OTHER = "other"
"""The label of paths and methods that are not ours: clients must not make labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceMetrics:
    """The histograms of one dp slice, looked up once and not for every token."""

    ttft: Histogram
    itl: Histogram
    e2e: Histogram
    queue: Histogram
    prompt_tokens: Histogram
    generation_tokens: Histogram
    uncached_prompt_tokens: Histogram


class FrontMetrics(Collector):
    """The front's metrics."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._slices: dict[int, SliceMetrics] = {}
        labels = ("model_name", "dp_rank")

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self._registry)

        self._ttft = histogram(
            "time_to_first_token_seconds", "From the request to its first token.", TTFT_BUCKETS
        )
        self._itl = histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer.", ITL_BUCKETS
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "From the request to its last token.", E2E_BUCKETS
        )
        self._queue = histogram(
            "queue_time_seconds", "In the engine's queue, before the first step.", QUEUE_BUCKETS
        )
        self._prompt_tokens = histogram(
            "prompt_tokens_histogram", "Prompt tokens of a request.", TOKEN_BUCKETS
        )
        self._generation_tokens = histogram(
            "generation_tokens_histogram", "Generated tokens of a request.", TOKEN_BUCKETS
        )
        self._uncached = histogram(
            "uncached_prompt_tokens_histogram",
            "Prompt tokens of a request that were not in the prefix cache.",
            TOKEN_BUCKETS,
        )
        self._requests = Counter(
            PREFIX + "http_requests",
            "HTTP requests (health checks and scrapes are not counted).",
            ("endpoint", "method"),
            registry=self._registry,
        )
        self._responses = Counter(
            PREFIX + "http_responses",
            "HTTP answers; 499 for a client that hung up before.",
            ("endpoint", "status"),
            registry=self._registry,
        )

    def collect(self) -> Iterator[Metric]:
        """All of it, without the times at which each series was made: nobody asks for them."""
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric

    def of_slice(self, dp_rank: int) -> SliceMetrics:
        """The histograms of one slice; the same object every time."""
        known = self._slices.get(dp_rank)
        if known is None:
            labels = (self._model_name, str(dp_rank))
            known = self._slices[dp_rank] = SliceMetrics(
                ttft=self._ttft.labels(*labels),
                itl=self._itl.labels(*labels),
                e2e=self._e2e.labels(*labels),
                queue=self._queue.labels(*labels),
                prompt_tokens=self._prompt_tokens.labels(*labels),
                generation_tokens=self._generation_tokens.labels(*labels),
                uncached_prompt_tokens=self._uncached.labels(*labels),
            )
        return known

    def count_request(self, endpoint: str, method: str) -> None:
        self._requests.labels(endpoint, method if method in METHODS else OTHER).inc()

    def count_response(self, endpoint: str, status: int) -> None:
        self._responses.labels(endpoint, str(status)).inc()


class RequestTimer:
    """Times one request of the engine; cheap enough for every token of every stream.

    Times are seconds of any clock that does not jump, the same for all of them.
    """

    __slots__ = ("_began", "_last", "_metrics", "_num_prompt", "_num_tokens", "_slice")

    def __init__(self, metrics: FrontMetrics, *, began: float, num_prompt: int) -> None:
        self._metrics = metrics
        self._began = self._last = began
        self._num_prompt = num_prompt
        self._num_tokens = 0
        self._slice: SliceMetrics | None = None

    def token(self, event: TokenEvent, now: float) -> None:
        """A token came."""
        self._num_tokens += 1
        if self._slice is not None:
            self._slice.itl.observe(now - self._last)
        elif event.first is not None:
            self._slice = self._metrics.of_slice(event.first.dp_rank)
            self._slice.ttft.observe(now - self._began)
            self._slice.queue.observe(event.first.queue_s)
            self._slice.uncached_prompt_tokens.observe(self._num_prompt - event.first.cached_tokens)
        self._last = now

    def end(self, now: float) -> None:
        """The answer is complete."""
        if self._slice is not None:
            self._slice.e2e.observe(now - self._began)
            self._slice.prompt_tokens.observe(self._num_prompt)
            self._slice.generation_tokens.observe(self._num_tokens)


class CountRequests:
    """ASGI middleware that counts requests and answers by path.

    `paths` are the exact paths to tell apart; those in `quiet` are not counted at all.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: FrontMetrics, paths: frozenset[str], quiet: frozenset[str]
    ) -> None:
        self._app, self._metrics, self._paths, self._quiet = app, metrics, paths, quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._quiet:
            await self._app(scope, receive, send)
            return
        endpoint = scope["path"] if scope["path"] in self._paths else OTHER
        self._metrics.count_request(endpoint, scope["method"])

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_response(endpoint, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counting_send)
        except Exception:  # the handler of unforeseen errors stands outside
            self._metrics.count_response(endpoint, 500)
            raise
