"""The flags of the router: the one place where they are read.

`RouterConfig` is what the command line said, under the flags' names; every default stands there
once. `add_router_flags` also serves the co-launch, where every name has a prefix.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

POLICIES = (
    "cache_aware",
    "round_robin",
    "random",
    "power_of_two",
    "prefix_hash",
    "consistent_hashing",
    "manual",
)
CACHE_AWARE_MODES = ("cost", "thresholds")
ASSIGNMENT_MODES = ("random", "min_load", "min_group")
LOG_LEVELS = ("debug", "info", "warn", "warning", "error")
REQUEST_ID_HEADERS = ("x-request-id", "x-correlation-id", "x-trace-id", "request-id")
DURATION_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
    *(5.0, 10.0, 15.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 240.0),
)


NOT_SERVED = (
    (
        "pd-disaggregation|prefill|decode|(prefill|decode)-(policy|selector)|mini-lb"
        "|bucket-adjust-interval-secs",
        "each worker does prefill and decode, and the router gives it whole requests",
    ),
    (
        "backend|history-backend|(oracle|postgres|redis|mcp)-.*",
        "the router keeps no conversations and calls no tools; /v1/responses goes to the workers",
    ),
    (
        "reasoning-parser|tool-call-parser|chat-template|tokenizer-cache-.*",
        "templates and parsers belong to the workers, answers pass unchanged",
    ),
    ("enable-trace|otlp-.*", "there is no tracing; requests carry their id and traceparent on"),
    (
        "control-plane-.*|jwt-.*",
        "there are no roles; --api-key protects the admin routes as it does the others",
    ),
)
"""Flags of SGLang's router that this one has not, as regular expressions, and why."""


class ConfigError(ValueError):
    """A flag, or a combination of flags, cannot be served; the message is one sentence."""


def _flag(default: Any, text: str, **options: Any) -> Any:
    """A field that is a flag: its default, its help, and what argparse must know besides."""
    return field(default=default, metadata={"help": text, "options": options})


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """What the command line said. Times are in the units of the flags' names."""

    host: str = _flag("0.0.0.0", "address to listen on", shared=True)
    port: int = _flag(30000, "port to listen on", shared=True)
    worker_urls: tuple[str, ...] = _flag(
        (), "workers, as http://HOST:PORT; more can be added at run time", nargs="*"
    )
    policy: str = _flag("cache_aware", "how a worker is chosen", choices=POLICIES)
    cache_aware_mode: str = _flag(
        "cost",
        "cost weighs what a worker has cached against its load; thresholds is SGLang's rule with "
        "the three flags below",
        choices=CACHE_AWARE_MODES,
    )
    cache_threshold: float = _flag(
        0.3, "mode thresholds: share of a prompt that must be cached for its worker to get it"
    )
    balance_abs_threshold: int = _flag(
        64, "mode thresholds: difference of loads above which the least loaded worker is taken"
    )
    balance_rel_threshold: float = _flag(
        1.5, "mode thresholds: ratio of loads that is needed for it as well"
    )
    eviction_interval_secs: float = _flag(
        60.0,
        "how often prefixes that were not asked for during --max-prefix-age-secs are forgotten; 0: "
        "never",
        also=("--eviction-interval",),
    )
    max_prefix_age_secs: float = _flag(3600.0, "see --eviction-interval-secs")
    max_tree_size: int = _flag(
        1 << 26, "characters of prefixes that are remembered for one worker, at most"
    )
    max_payload_size: int = _flag(536870912, "bytes of a request's body; beyond, 413")
    dp_aware: bool = _flag(False, "address each DP rank of a worker by itself")
    enable_igw: bool = _flag(False, "several models: workers are chosen by the request's model")
    worker_startup_timeout_secs: float = _flag(
        1800.0, "how long a worker may take to come up before its registration fails"
    )
    worker_startup_check_interval: float = _flag(
        30.0,
        "policy power_of_two: seconds between two readings of the workers' reported loads, each of "
        "which is believed for 5 s",
    )
    log_dir: str | None = _flag(None, "also log to a file there")
    log_level: str = _flag("info", "log level", choices=LOG_LEVELS)
    prometheus_port: int = _flag(29000, "port of the Prometheus metrics")
    prometheus_host: str = _flag("0.0.0.0", "address of the Prometheus metrics")
    prometheus_duration_buckets: tuple[float, ...] = _flag(
        DURATION_BUCKETS, "bounds of the duration histograms, in seconds", nargs="+"
    )
    request_id_headers: tuple[str, ...] = _flag(
        REQUEST_ID_HEADERS, "headers that may hold a request's id, the first wins", nargs="+"
    )
    request_timeout_secs: float = _flag(1800.0, "of one attempt, a stream's whole time included")
    shutdown_grace_period_secs: float = _flag(
        180.0, "how long running requests may go on after SIGTERM"
    )
    cors_allowed_origins: tuple[str, ...] = _flag(
        (), "origins whose pages may use the router; default: every one", nargs="*"
    )
    max_concurrent_requests: int = _flag(-1, "requests that run at once; -1: any number")
    queue_size: int = _flag(100, "requests that wait for one of those places; beyond, 429")
    queue_timeout_secs: float = _flag(60.0, "how long one may wait; then 408")
    rate_limit_tokens_per_second: float | None = _flag(
        None,
        "requests that may start in a second, --max-concurrent-requests of them at once; default: "
        "any number",
    )
    retry_max_retries: int = _flag(5, "attempts in all")
    retry_initial_backoff_ms: float = _flag(50.0, "pause before the second attempt")
    retry_max_backoff_ms: float = _flag(30000.0, "longest pause")
    retry_backoff_multiplier: float = _flag(1.5, "each pause to the one before")
    retry_jitter_factor: float = _flag(0.2, "share by which a pause is longer or shorter")
    disable_retries: bool = _flag(False, "one attempt")
    stream_failover: bool = _flag(
        True, "a stream whose worker dies goes on on another worker", action="boolean"
    )
    cb_failure_threshold: int = _flag(10, "failures in a row that take a worker out of service")
    cb_success_threshold: int = _flag(3, "successes in a row that bring it back")
    cb_timeout_duration_secs: float = _flag(60.0, "how long it is out before it is tried again")
    cb_window_duration_secs: float = _flag(120.0, "accepted; failures in a row have no window")
    disable_circuit_breaker: bool = _flag(False, "failures take no worker out of service")
    health_failure_threshold: int = _flag(3, "failed checks in a row that make a worker unhealthy")
    health_success_threshold: int = _flag(2, "good checks in a row that make it healthy again")
    health_check_timeout_secs: float = _flag(5.0, "of one check")
    health_check_interval_secs: float = _flag(60.0, "seconds between two checks")
    health_check_endpoint: str = _flag("/health", "what is asked")
    disable_health_check: bool = _flag(False, "no checks after the registration")
    api_key: str | None = _flag(
        None, "required of clients, and sent to the workers that are named at start"
    )
    max_idle_secs: float = _flag(14400.0, "policy manual: when an unused routing key is forgotten")
    assignment_mode: str = _flag(
        "random", "policy manual: who gets a new routing key", choices=ASSIGNMENT_MODES
    )
    service_discovery: bool = _flag(False, "take Kubernetes pods as workers")
    selector: tuple[str, ...] = _flag((), "labels of those pods, as key=value", nargs="+")
    service_discovery_port: int = _flag(80, "port of a pod's worker")
    service_discovery_namespace: str | None = _flag(None, "of the pods; default: all")
    service_discovery_api: str | None = _flag(
        None, "URL of the Kubernetes API; default: that of the cluster the router runs in"
    )
    tls_cert_path: str | None = _flag(None, "certificate: clients must use HTTPS")
    tls_key_path: str | None = _flag(None, "its key")
    ca_cert_paths: tuple[str, ...] = _flag(
        (), "certificates that workers' HTTPS may be signed with", nargs="+"
    )
    client_cert_path: str | None = _flag(None, "certificate that workers ask the router for")
    client_key_path: str | None = _flag(None, "its key")
    model_path: str | None = _flag(None, "accepted; the router needs no tokenizer")
    tokenizer_path: str | None = _flag(None, "accepted; the router needs no tokenizer")

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of range."""
        for name in ("port", "prometheus_port", "service_discovery_port"):
            _check(self, name, 0, 65535)
        _check(self, "cache_threshold", 0, 1)
        _check(self, "retry_jitter_factor", 0, 1)
        for name in (
            *("retry_max_retries", "cb_failure_threshold", "cb_success_threshold"),
            *("health_failure_threshold", "health_success_threshold", "max_payload_size"),
            *("max_tree_size", "retry_backoff_multiplier"),
        ):
            _check(self, name, 1)
        for name in (
            *("balance_abs_threshold", "balance_rel_threshold", "eviction_interval_secs"),
            *("max_prefix_age_secs", "queue_size", "queue_timeout_secs"),
            *("shutdown_grace_period_secs", "retry_initial_backoff_ms", "retry_max_backoff_ms"),
            *("cb_timeout_duration_secs", "cb_window_duration_secs", "max_idle_secs"),
            *("worker_startup_timeout_secs",),
        ):
            _check(self, name, 0)
        for name in (
            *("request_timeout_secs", "health_check_timeout_secs", "health_check_interval_secs"),
            *("worker_startup_check_interval", "rate_limit_tokens_per_second"),
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{_name(name)} must be positive, got {value}.")
        if self.max_concurrent_requests < 1 and self.max_concurrent_requests != -1:
            raise ConfigError(
                "--max-concurrent-requests must be at least 1, or -1 for any number, got "
                f"{self.max_concurrent_requests}."
            )
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise ConfigError("--tls-cert-path and --tls-key-path go together.")
        if (self.client_cert_path is None) != (self.client_key_path is None):
            raise ConfigError("--client-cert-path and --client-key-path go together.")
        for url in self.worker_urls:
            if not re.fullmatch(r"(https?://)?[^/\s]+/?", url):
                raise ConfigError(f"--worker-urls: '{url}' is no http://HOST:PORT.")
        for label in self.selector:
            if "=" not in label:
                raise ConfigError(f"--selector: '{label}' is no key=value.")
        if self.service_discovery and not self.selector:
            raise ConfigError("--service-discovery needs a --selector: which pods are workers?")


def add_router_flags(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Add every flag, its name behind `prefix`; those of the address not, if there is a prefix."""
    group = parser.add_argument_group("router")
    for flag in fields(RouterConfig):
        options = dict(flag.metadata["options"])
        shared, also = options.pop("shared", False), options.pop("also", ())
        if shared and prefix:
            continue
        names = [_name(flag.name, prefix), *(_name(a[2:], prefix) for a in also)]
        text = flag.metadata["help"].replace("%", "%%")
        default = flag.default
        if options.get("action") == "boolean":
            options["action"] = argparse.BooleanOptionalAction
        elif default is False:
            options["action"] = "store_true"
        else:
            options["type"] = _TYPES[str(flag.type).removesuffix(" | None")]
            if default not in (None, ()):
                shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
                text += f" (default: {shown})"
        group.add_argument(
            *names, dest=f"{_dest(prefix)}{flag.name}", default=None, help=text, **options
        )


def router_config(args: dict[str, Any], prefix: str = "", **shared: Any) -> RouterConfig:
    """The configuration that parsed arguments say, those of `add_router_flags` with this prefix.

    Args:
        shared: fields that do not come from flags with the prefix.

    Raises:
        ConfigError: a value is out of range.
    """
    given = {}
    for flag in fields(RouterConfig):
        value = args.get(f"{_dest(prefix)}{flag.name}")
        if value is not None:
            given[flag.name] = tuple(value) if isinstance(value, list) else value
    return RouterConfig(**{**given, **shared})


def make_parser() -> argparse.ArgumentParser:
    """The parser of `scripts/launch_router.py`. Flag names are those of SGLang's router."""
    parser = Parser(
        prog="launch_router.py",
        description="Route OpenAI-compatible requests to workers: cache-aware, with health checks, "
        "circuit breakers, retries, and streams that survive their worker.",
        allow_abbrev=False,
    )
    add_router_flags(parser)
    return parser


def parse_args(argv: Sequence[str]) -> RouterConfig:
    """Read the flags of `scripts/launch_router.py`.

    Raises:
        ConfigError: a flag is unknown, out of range, or not served.
        SystemExit: --help was asked for.
    """
    return router_config(vars(make_parser().parse_args(list(argv))))


class Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: --(router-)?([a-z-]+)", message)
        for names, why in NOT_SERVED:
            if unknown and re.fullmatch(names, unknown[2]):
                raise ConfigError(f"--{unknown[1] or ''}{unknown[2]} is not served: {why}.")
        raise ConfigError(message.removesuffix(".") + ".")


_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "tuple[str, ...]": str,
    "tuple[float, ...]": float,
}


def _dest(prefix: str) -> str:
    return prefix.replace("-", "_")


def _name(field_name: str, prefix: str = "") -> str:
    return f"--{prefix}{field_name.replace('_', '-')}"


def _check(config: RouterConfig, name: str, least: float, most: float | None = None) -> None:
    value = getattr(config, name)
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ConfigError(f"{_name(name)} must be {wanted}, got {value}.")
