"""The names, labels and values of the router's own metrics."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.metrics import RouterMetrics

ROUTER = {"router_type": "http", "backend_type": "regular", "connection_mode": "http"}
WORKER = {"worker_type": "regular", "connection_mode": "http"}
URL = "http://w:1"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def value(metrics, name, **labels):
    """The value of one series, None if there is none."""
    for family in text_string_to_metric_families(metrics.page().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def test_http():
    clock = Clock()
    metrics = RouterMetrics(clock=clock)
    first = metrics.http_request("POST", "/v1/completions")
    metrics.http_request("POST", "/v1/completions")
    labels = {"method": "POST", "path": "/v1/completions"}
    assert value(metrics, "smg_http_requests_total", **labels) == 2
    assert value(metrics, "smg_http_connections_active") == 2
    clock.now = 45.0
    metrics.http_response(first, "POST", "/v1/completions", 503, "no_available_workers")
    assert value(metrics, "smg_http_connections_active") == 1
    assert (
        value(
            metrics,
            "smg_http_responses_total",
            status_code="503",
            error_code="no_available_workers",
        )
        == 1
    )
    assert value(metrics, "smg_http_request_duration_seconds_sum", **labels) == 45.0
    age = "smg_http_inflight_request_age_count"
    assert value(metrics, age, gt="30", le="60") == 1
    assert value(metrics, age, gt="0", le="30") == 0
    assert value(metrics, age, gt="86400", le="+Inf") == 0
    metrics.rate_limit("rejected")
    assert value(metrics, "smg_http_rate_limit_total", result="rejected") == 1


def test_routing():
    metrics = RouterMetrics()
    metrics.router_request("m", "chat", True)
    metrics.router_done("m", "chat", 2.0)
    metrics.router_error("m", "chat", "timeout")
    metrics.upstream_response(200, "")
    metrics.ttft("m", "chat", 0.2)
    metrics.tokens("m", "chat", 5, 7)
    metrics.generation("m", "chat", 1.0, 11)
    metrics.failover("success")
    labels = {**ROUTER, "model": "m", "endpoint": "chat"}
    assert value(metrics, "smg_router_requests_total", **labels, streaming="true") == 1
    assert value(metrics, "smg_router_request_duration_seconds_count", **labels) == 1
    assert value(metrics, "smg_router_request_errors_total", **labels, error_type="timeout") == 1
    upstream = {"router_type": "http", "status_code": "200", "error_code": ""}
    assert value(metrics, "smg_router_upstream_responses_total", **upstream) == 1
    own = {"model": "m", "endpoint": "chat"}
    assert value(metrics, "smg_router_ttft_seconds_sum", **own) == 0.2
    assert value(metrics, "smg_router_tokens_total", **own, token_type="input") == 5
    assert value(metrics, "smg_router_tokens_total", **own, token_type="output") == 7
    assert value(metrics, "smg_router_tpot_seconds_sum", **own) == pytest.approx(0.1)
    assert value(metrics, "smg_router_stream_failovers_total", result="success") == 1


def test_workers():
    metrics = RouterMetrics()
    metrics.pool_size("m", 2)
    metrics.requests_active(URL, 3)
    metrics.worker_health(URL, True)
    metrics.health_check(False)
    metrics.selection(URL, "cache_aware", "m")
    metrics.worker_error("timeout")
    metrics.breaker(URL, "half_open", 4, 1)
    metrics.breaker_transition(URL, "half_open", "open")
    metrics.breaker_outcome(URL, "failure")
    metrics.retry("chat")
    metrics.retries_exhausted("chat")
    metrics.backoff(1, 0.05)
    metrics.registration("manual", "success")
    metrics.deregistration("manual", "removed")
    metrics.discovered("kubernetes", 3, 0.1)
    for name, number, labels in [
        ("smg_worker_pool_size", 2, {**WORKER, "model": "m"}),
        ("smg_worker_requests_active", 3, {"worker": URL}),
        ("smg_worker_health", 1, {"worker": URL}),
        ("smg_worker_health_checks_total", 1, {"worker_type": "regular", "result": "failure"}),
        ("smg_worker_selection_total", 1, {**WORKER, "model": "m", "policy": "cache_aware"}),
        ("sgl_router_policy_decisions_total", 1, {"policy": "cache_aware", "worker": URL}),
        ("smg_worker_errors_total", 1, {**WORKER, "error_type": "timeout"}),
        ("smg_worker_cb_state", 1, {"worker": URL}),
        ("smg_worker_cb_consecutive_failures", 4, {"worker": URL}),
        ("smg_worker_cb_transitions_total", 1, {"worker": URL, "from": "half_open", "to": "open"}),
        ("smg_worker_cb_outcomes_total", 1, {"worker": URL, "outcome": "failure"}),
        ("smg_worker_retries_total", 1, {"worker_type": "regular", "endpoint": "chat"}),
        ("smg_worker_retries_exhausted_total", 1, {"worker_type": "regular", "endpoint": "chat"}),
        ("smg_worker_retry_backoff_seconds_count", 1, {"attempt": "1"}),
        ("smg_discovery_registrations_total", 1, {"source": "manual", "result": "success"}),
        ("smg_discovery_deregistrations_total", 1, {"source": "manual", "reason": "removed"}),
        ("smg_discovery_workers_discovered", 3, {"source": "kubernetes"}),
        ("smg_discovery_sync_duration_seconds_count", 1, {"source": "kubernetes"}),
    ]:
        assert value(metrics, name, **labels) == number, name
    metrics.worker_removed(URL)
    assert value(metrics, "smg_worker_health", worker=URL) == -1
    assert value(metrics, "smg_worker_cb_state", worker=URL) == -1
    assert value(metrics, "smg_worker_requests_active", worker=URL) == 0


def test_cache_hit_rate_by_source():
    metrics = RouterMetrics()
    metrics.cache(URL, 30, 40)
    metrics.cache(URL, 0, 20)
    metrics.cache("http://w:2", 5, 5)
    assert value(metrics, "sglang_cache_hit_rate", source=URL) == 0.5
    assert value(metrics, "sglang_cache_hit_rate", source="http://w:2") == 1.0
    metrics.expected(URL, 10, 30)
    metrics.expected(URL, 0, 5)
    metrics.tree(URL, 12)
    metrics.rebalanced()
    assert value(metrics, "sgl_router_cache_hits_total") == 1
    assert value(metrics, "sgl_router_cache_misses_total") == 1
    assert value(metrics, "sgl_router_expected_tokens_total", worker=URL, expected="cached") == 10
    assert value(metrics, "sgl_router_tree_size", worker=URL) == 12
    assert value(metrics, "sgl_router_load_balancing_events_total") == 1
    metrics.worker_removed(URL)
    assert value(metrics, "sglang_cache_hit_rate", source=URL) is None


def test_buckets_can_be_chosen():
    metrics = RouterMetrics(buckets=(1.0, 2.0))
    metrics.router_done("m", "chat", 1.5)
    bounds = re.findall(r'duration_seconds_bucket\{.*le="([^"]+)"', metrics.page().decode())
    assert bounds == ["1.0", "2.0", "+Inf"]


def test_a_client_cannot_fill_memory_with_model_names(monkeypatch):
    monkeypatch.setattr("router.metrics.MAX_MODELS", 50)
    metrics = RouterMetrics()
    for i in range(500):
        metrics.router_request(f"model-{i}", "chat", False)
    page = metrics.page().decode()
    assert page.count("smg_router_requests_total{") <= 51
    assert 'model="other"' in page


PEER = """
counter smg_http_requests_total method path
histogram smg_http_request_duration_seconds method path
counter smg_http_responses_total status_code error_code
gauge smg_http_connections_active
gauge smg_http_inflight_request_age_count gt le
counter smg_http_rate_limit_total result
counter smg_router_requests_total router_type backend_type connection_mode model endpoint streaming
histogram smg_router_request_duration_seconds \
    router_type backend_type connection_mode model endpoint
counter smg_router_request_errors_total \
    router_type backend_type connection_mode model endpoint error_type
counter smg_router_upstream_responses_total router_type status_code error_code
histogram smg_router_ttft_seconds model endpoint
histogram smg_router_tpot_seconds model endpoint
histogram smg_router_generation_duration_seconds model endpoint
counter smg_router_tokens_total model endpoint token_type
gauge smg_worker_pool_size worker_type connection_mode model
gauge smg_worker_connections_active worker_type connection_mode
gauge smg_worker_requests_active worker
gauge smg_worker_routing_keys_active worker
gauge smg_worker_health worker
counter smg_worker_health_checks_total worker_type result
counter smg_worker_selection_total worker_type connection_mode model policy
counter smg_worker_errors_total worker_type connection_mode error_type
gauge smg_worker_cb_state worker
gauge smg_worker_cb_consecutive_failures worker
gauge smg_worker_cb_consecutive_successes worker
counter smg_worker_cb_transitions_total worker from to
counter smg_worker_cb_outcomes_total worker outcome
counter smg_worker_retries_total worker_type endpoint
counter smg_worker_retries_exhausted_total worker_type endpoint
histogram smg_worker_retry_backoff_seconds attempt
counter smg_discovery_registrations_total source result
counter smg_discovery_deregistrations_total source reason
histogram smg_discovery_sync_duration_seconds source
gauge smg_discovery_workers_discovered source
gauge smg_manual_policy_cache_entries
counter smg_manual_policy_branch_total branch
counter smg_consistent_hashing_policy_branch_total branch
counter smg_prefix_hash_policy_branch_total branch
gauge sglang_cache_hit_rate source
counter sgl_router_cache_hits_total
counter sgl_router_cache_misses_total
gauge sgl_router_tree_size worker
counter sgl_router_load_balancing_events_total
gauge sgl_router_max_load
gauge sgl_router_min_load
counter sgl_router_policy_decisions_total policy worker
"""


def test_every_name_of_the_peer_is_there_with_its_labels():
    """Section 9: all but those of gRPC, MCP and databases."""
    metrics = RouterMetrics()
    metrics.http_request("POST", "/generate")
    metrics.cache(URL, 1, 2)
    labels = {
        c._name: set(c._labelnames)
        for c in set(metrics.registry._names_to_collectors.values())
        if hasattr(c, "_labelnames")
    }
    kinds = {
        family.name: family for family in text_string_to_metric_families(metrics.page().decode())
    }
    for line in PEER.strip().splitlines():
        kind, name, *wanted = line.split()
        family = kinds[name.removesuffix("_total")]
        assert family.type == kind, name
        if family.name in labels:
            assert labels[family.name] == set(wanted), name
        else:
            assert set(family.samples[0].labels) == set(wanted), name
