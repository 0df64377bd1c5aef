"""The router's own Prometheus metrics, under the names of `sglang-router`.

One method for each event; what a label value stands for is bound once, so that an event costs about
a microsecond. Names begin with `smg_`, or with `sgl_router_` where the newer router has lost the
metric; `sglang_cache_hit_rate{source}` is each worker's hit rate as its answers tell it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from router.config import DURATION_BUCKETS

WORKER = {"worker_type": "regular", "connection_mode": "http"}
ROUTER = {"router_type": "http", "backend_type": "regular", "connection_mode": "http"}
AGES = (30, 60, 180, 300, 600, 1200, 3600, 7200, 14400, 28800, 86400)
"""Upper bounds, in seconds, of the classes of requests by age."""
CB_STATES = {"closed": 0, "open": 1, "half_open": 2}
REMOVED = -1
MAX_MODELS = 256
"""Names of models that are told apart: clients choose them, and must not fill memory."""


class RouterMetrics:
    """Every metric of one router, in a registry of its own.

    Args:
        buckets: bounds of the duration histograms, in seconds.
    """

    def __init__(
        self,
        buckets: Sequence[float] = DURATION_BUCKETS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = CollectorRegistry()
        self._buckets = tuple(buckets)
        self._clock = clock
        self._bound: dict[tuple[Any, ...], Any] = {}
        self._models: dict[str, str] = {}
        self._numbers = itertools.count()
        self._in_flight: dict[int, float] = {}
        self._cached: dict[str, list[int]] = {}
        self._make_http()
        self._make_router()
        self._make_workers()
        self._make_cache()
        self._make_policies()
        self.registry.register(_Computed(self))
        # Memory, processor time and open files of this process.
        ProcessCollector(registry=self.registry)

    def page(self) -> bytes:
        """All metrics in Prometheus' text form."""
        return generate_latest(self.registry)

    # HTTP

    def _make_http(self) -> None:
        self._http_requests = self._counter(
            "smg_http_requests", "Requests by method and path.", "method", "path"
        )
        self._http_seconds = self._histogram(
            "smg_http_request_duration_seconds", "Whole requests.", "method", "path"
        )
        self._http_responses = self._counter(
            "smg_http_responses", "Answers by status and error.", "status_code", "error_code"
        )
        self._rate_limit = self._counter(
            "smg_http_rate_limit", "Decisions of the rate limit.", "result"
        )

    def http_request(self, method: str, path: str) -> int:
        """A request came; the number to hand to `http_response`."""
        self._get(self._http_requests, method, path).inc()
        number = next(self._numbers)
        self._in_flight[number] = self._clock()
        return number

    def http_response(
        self, number: int, method: str, path: str, status: int, code: str = ""
    ) -> None:
        """It was answered, or its client left (status 499)."""
        seconds = self._clock() - self._in_flight.pop(number)
        self._get(self._http_responses, str(status), code).inc()
        self._get(self._http_seconds, method, path).observe(seconds)

    def rate_limit(self, result: str) -> None:
        """ "allowed" or "rejected"."""
        self._get(self._rate_limit, result).inc()

    # routing

    def _make_router(self) -> None:
        names = (*ROUTER, "model", "endpoint")
        self._requests = self._counter(
            "smg_router_requests", "Requests that go to workers.", *names, "streaming"
        )
        self._seconds = self._histogram(
            "smg_router_request_duration_seconds", "Their whole time.", *names
        )
        self._errors = self._counter(
            "smg_router_request_errors", "Those that failed.", *names, "error_type"
        )
        self._upstream = self._counter(
            "smg_router_upstream_responses",
            "Answers of workers, one for each attempt.",
            *("router_type", "status_code", "error_code"),
        )
        self._ttft = self._histogram(
            "smg_router_ttft_seconds", "Until the first bytes of an answer.", "model", "endpoint"
        )
        self._generation = self._histogram(
            "smg_router_generation_duration_seconds",
            "From the first bytes of a stream to its last.",
            *("model", "endpoint"),
        )
        self._tpot = self._histogram(
            "smg_router_tpot_seconds", "Time for each token after the first.", "model", "endpoint"
        )
        self._tokens = self._counter(
            "smg_router_tokens", "Tokens by kind.", "model", "endpoint", "token_type"
        )
        self._failovers = self._counter(
            "smg_router_stream_failovers",
            "Streams that broke, and whether they went on on another worker.",
            "result",
        )

    def router_request(self, model: str, endpoint: str, stream: bool) -> None:
        """A request is about to be given to a worker."""
        labels = (*ROUTER.values(), self._model(model), endpoint, "true" if stream else "false")
        self._get(self._requests, *labels).inc()

    def router_done(self, model: str, endpoint: str, seconds: float) -> None:
        """It was answered."""
        self._get(self._seconds, *ROUTER.values(), self._model(model), endpoint).observe(seconds)

    def router_error(self, model: str, endpoint: str, error_type: str) -> None:
        """It failed: no_workers, timeout, backend_error, validation_error or internal_error."""
        self._get(self._errors, *ROUTER.values(), self._model(model), endpoint, error_type).inc()

    def upstream_response(self, status: int, code: str) -> None:
        """A worker answered, or failed to (then `code` says how)."""
        self._get(self._upstream, "http", str(status), code).inc()

    def ttft(self, model: str, endpoint: str, seconds: float) -> None:
        """The first bytes of an answer came."""
        self._get(self._ttft, self._model(model), endpoint).observe(seconds)

    def tokens(self, model: str, endpoint: str, prompt: int, completion: int) -> None:
        """What an answer says it cost."""
        if prompt:
            self._get(self._tokens, self._model(model), endpoint, "input").inc(prompt)
        if completion:
            self._get(self._tokens, self._model(model), endpoint, "output").inc(completion)

    def generation(self, model: str, endpoint: str, seconds: float, num_tokens: int) -> None:
        """A stream ended, so long after its first bytes."""
        self._get(self._generation, self._model(model), endpoint).observe(seconds)
        if num_tokens > 1:
            self._get(self._tpot, self._model(model), endpoint).observe(seconds / (num_tokens - 1))

    def failover(self, result: str) -> None:
        """A broken stream went on ("success") or could not ("failed")."""
        self._get(self._failovers, result).inc()

    # workers

    def _make_workers(self) -> None:
        worker = tuple(WORKER)
        self._pool = self._gauge("smg_worker_pool_size", "Registered workers.", *worker, "model")
        self._connections = self._gauge(
            "smg_worker_connections_active", "Connections to workers that are in use.", *worker
        )
        self._max_load = self._gauge(
            "sgl_router_max_load", "Requests that run on the worker that has most of them."
        )
        self._min_load = self._gauge(
            "sgl_router_min_load", "Requests that run on the worker that has fewest of them."
        )
        self._active = self._gauge(
            "smg_worker_requests_active", "Requests that run on a worker.", "worker"
        )
        self._keys_active = self._gauge(
            "smg_worker_routing_keys_active",
            "Different routing keys of the requests that run on a worker.",
            "worker",
        )
        self._health = self._gauge("smg_worker_health", "1 healthy, 0 not, -1 removed.", "worker")
        self._checks = self._counter(
            "smg_worker_health_checks", "Health checks.", "worker_type", "result"
        )
        self._selections = self._counter(
            "smg_worker_selection", "Choices of a worker.", *worker, "model", "policy"
        )
        self._decisions = self._counter(
            "sgl_router_policy_decisions", "Choices, by worker.", "policy", "worker"
        )
        self._worker_errors = self._counter(
            "smg_worker_errors", "Failed exchanges with workers.", *worker, "error_type"
        )
        self._cb_state = self._gauge(
            "smg_worker_cb_state", "0 closed, 1 open, 2 half open, -1 removed.", "worker"
        )
        self._cb_failures = self._gauge(
            "smg_worker_cb_consecutive_failures", "Failures in a row.", "worker"
        )
        self._cb_successes = self._gauge(
            "smg_worker_cb_consecutive_successes", "Successes in a row.", "worker"
        )
        self._cb_transitions = self._counter(
            "smg_worker_cb_transitions", "Changes of circuits.", "worker", "from", "to"
        )
        self._cb_outcomes = self._counter(
            "smg_worker_cb_outcomes", "What circuits were told.", "worker", "outcome"
        )
        self._retries = self._counter(
            "smg_worker_retries", "Attempts after the first.", "worker_type", "endpoint"
        )
        self._exhausted = self._counter(
            "smg_worker_retries_exhausted",
            "Requests whose attempts were used up.",
            *("worker_type", "endpoint"),
        )
        self._backoff = self._histogram(
            "smg_worker_retry_backoff_seconds", "Pauses before attempts.", "attempt"
        )
        self._registrations = self._counter(
            "smg_discovery_registrations", "Workers that were added.", "source", "result"
        )
        self._deregistrations = self._counter(
            "smg_discovery_deregistrations", "Workers that were removed.", "source", "reason"
        )
        self._discovered = self._gauge(
            "smg_discovery_workers_discovered", "Workers that a source knows.", "source"
        )
        self._sync = self._histogram(
            "smg_discovery_sync_duration_seconds", "Readings of a source.", "source"
        )

    def pool_size(self, model: str, num: int) -> None:
        """So many workers of a model are registered."""
        self._get(self._pool, *WORKER.values(), self._model(model)).set(num)

    def requests_active(self, worker: str, num: int) -> None:
        """So many requests run on a worker now."""
        self._get(self._active, worker).set(num)

    def routing_keys_active(self, worker: str, num: int) -> None:
        """The requests that run on a worker have so many routing keys."""
        self._get(self._keys_active, worker).set(num)

    def in_flight(self, loads: Sequence[int]) -> None:
        """So many requests run now, worker by worker; each has a connection of its own."""
        self._get(self._connections, *WORKER.values()).set(sum(loads))
        self._get(self._max_load).set(max(loads, default=0))
        self._get(self._min_load).set(min(loads, default=0))

    def worker_health(self, worker: str, healthy: bool) -> None:
        """A worker is registered, or changed sides."""
        self._get(self._health, worker).set(int(healthy))

    def worker_removed(self, worker: str) -> None:
        """Its gauges say so; its series stay, as scrapers expect."""
        self._get(self._health, worker).set(REMOVED)
        self._get(self._cb_state, worker).set(REMOVED)
        for gauge in (
            *(self._active, self._keys_active),
            *(self._cb_failures, self._cb_successes, self._tree),
        ):
            self._get(gauge, worker).set(0)
        self._cached.pop(worker, None)

    def health_check(self, success: bool) -> None:
        """A worker was asked how it is."""
        self._get(self._checks, "regular", "success" if success else "failure").inc()

    def selection(self, worker: str, policy: str, model: str) -> None:
        """A worker was chosen."""
        self._get(self._selections, *WORKER.values(), self._model(model), policy).inc()
        self._get(self._decisions, policy, worker).inc()

    def worker_error(self, error_type: str) -> None:
        """An exchange with a worker failed."""
        self._get(self._worker_errors, *WORKER.values(), error_type).inc()

    def breaker(self, worker: str, state: str, failures: int, successes: int) -> None:
        """Where a worker's circuit stands."""
        self._get(self._cb_state, worker).set(CB_STATES[state])
        self._get(self._cb_failures, worker).set(failures)
        self._get(self._cb_successes, worker).set(successes)

    def breaker_transition(self, worker: str, before: str, after: str) -> None:
        """A worker's circuit changed."""
        self._get(self._cb_transitions, worker, before, after).inc()
        self._get(self._cb_state, worker).set(CB_STATES[after])

    def breaker_outcome(self, worker: str, outcome: str) -> None:
        """A worker's circuit was told of an attempt: "success" or "failure"."""
        self._get(self._cb_outcomes, worker, outcome).inc()

    def retry(self, endpoint: str) -> None:
        """A request is tried again."""
        self._get(self._retries, "regular", endpoint).inc()

    def retries_exhausted(self, endpoint: str) -> None:
        """A request failed as often as it may."""
        self._get(self._exhausted, "regular", endpoint).inc()

    def backoff(self, attempt: int, seconds: float) -> None:
        """The pause before an attempt (1: the second one)."""
        self._get(self._backoff, str(attempt)).observe(seconds)

    def registration(self, source: str, result: str) -> None:
        """A worker was to be added: "success" or "failed"."""
        self._get(self._registrations, source, result).inc()

    def deregistration(self, source: str, reason: str) -> None:
        """A worker was removed."""
        self._get(self._deregistrations, source, reason).inc()

    def discovered(self, source: str, num: int, seconds: float) -> None:
        """A source of workers was read."""
        self._get(self._discovered, source).set(num)
        self._get(self._sync, source).observe(seconds)

    # what the cache-aware policy knows and achieves

    def _make_cache(self) -> None:
        self._hits = self._counter(
            "sgl_router_cache_hits", "Requests sent where some of their prompt was cached."
        )
        self._misses = self._counter(
            "sgl_router_cache_misses", "Requests sent where none of it was."
        )
        self._tree = self._gauge(
            "sgl_router_tree_size", "Blocks of prompts that a worker is known to hold.", "worker"
        )
        self._rebalanced = self._counter(
            "sgl_router_load_balancing_events", "Choices that load decided against the cache."
        )
        self._matched = self._counter(
            "sgl_router_expected_tokens",
            "Prompt tokens by what was expected of them when their worker was chosen.",
            *("worker", "expected"),
        )

    def expected(self, worker: str, hit_tokens: int, prompt_tokens: int) -> None:
        """What the policy expects of the worker it chose, of a prompt's tokens."""
        self._get(self._hits if hit_tokens else self._misses).inc()
        self._get(self._matched, worker, "cached").inc(hit_tokens)
        self._get(self._matched, worker, "uncached").inc(max(0, prompt_tokens - hit_tokens))

    def rebalanced(self) -> None:
        """Load decided, against the cache."""
        self._get(self._rebalanced).inc()

    def cache(self, worker: str, hit_tokens: int, prompt_tokens: int) -> None:
        """What a worker's answer says: so many of the prompt's tokens were cached."""
        sums = self._cached.setdefault(worker, [0, 0])
        sums[0] += hit_tokens
        sums[1] += prompt_tokens

    def tree(self, worker: str, blocks: int) -> None:
        """So many blocks are known of a worker."""
        self._get(self._tree, worker).set(blocks)

    # how the policies that go by keys choose

    def _make_policies(self) -> None:
        self._keys = self._gauge(
            "smg_manual_policy_cache_entries", "Routing keys that the policy manual remembers."
        )
        self._branches = {
            policy: self._counter(
                f"smg_{policy}_policy_branch", f"Choices of the policy {policy}, by way.", "branch"
            )
            for policy in ("manual", "consistent_hashing", "prefix_hash")
        }

    def routing_keys(self, num: int) -> None:
        """The policy manual remembers so many keys."""
        self._get(self._keys).set(num)

    def branch(self, policy: str, branch: str) -> None:
        """A choice went this way."""
        self._get(self._branches[policy], branch).inc()

    # making and binding

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=self._buckets)

    def _get(self, metric: Any, *labels: str) -> Any:
        """The series of these label values."""
        key = (metric, *labels)
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = metric.labels(*labels) if labels else metric
        return bound

    def _model(self, name: str) -> str:
        """A model's name as a label."""
        label = self._models.get(name)
        if label is None:
            if len(self._models) >= MAX_MODELS:
                return "other"
            label = self._models[name] = name
        return label

    def _ages(self) -> Iterator[tuple[str, str, int]]:
        """(above, up to, number) of the requests that run, by age."""
        now = self._clock()
        ages = [now - began for began in self._in_flight.values()]
        for low, high in itertools.pairwise((0, *AGES, float("inf"))):
            last = high == float("inf")
            num = sum(low < age <= high or (low == 0 and age <= 0) for age in ages)
            yield str(low), "+Inf" if last else str(high), num


class _Computed:
    """Metrics that are computed when they are asked for."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield GaugeMetricFamily(
            "smg_http_connections_active",
            "Requests that are being answered.",
            value=len(metrics._in_flight),
        )
        ages = GaugeMetricFamily(
            "smg_http_inflight_request_age_count",
            "Requests that run, by age in seconds.",
            labels=("gt", "le"),
        )
        for low, high, num in metrics._ages():
            ages.add_metric((low, high), num)
        yield ages
        rates = GaugeMetricFamily(
            "sglang_cache_hit_rate",
            "Cached tokens of a worker's prompts, as its answers tell.",
            labels=("source",),
        )
        for worker, (hit, prompt) in metrics._cached.items():
            rates.add_metric((worker,), hit / prompt if prompt else 0.0)
        yield rates
