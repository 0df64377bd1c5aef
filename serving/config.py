"""Flags and the environment: the one place where they are read.

`ServerConfig` is what the command line said; every default stands there once. `parse_args` turns
an argument list into it and refuses, in one sentence, what cannot be served.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from serving.parsers.reasoning import REASONING_FORMATS
from serving.parsers.tool_calls import TOOL_FORMATS

DEMO_MODEL_PATH = Path(__file__).resolve().parent.parent / "model" / "demo"
MOE_A2A_BACKENDS = ("auto", "none", "all_to_all", "deepep")
MOE_DISPATCH_DTYPES = ("auto", "fp8_e4m3", "fp8")
LOAD_BALANCE_METHODS = ("auto", "round_robin", "total_requests", "total_tokens", "cache_aware")
SCHEDULE_POLICIES = ("fcfs", "lpm")
TOOL_CALL_PARSERS = ("auto", *TOOL_FORMATS, "none")
KERNEL_BACKENDS = ("auto", "xla", "pallas")
MOE_RUNNER_ALIASES = ("deep_gemm", "triton")
"""Other engines' grouped matmuls that stand for ours."""
ATTENTION_ALIASES = ("triton", "flashmla", "cutlass_mla", "fa3", "flashinfer")
"""Other engines' attention kernels that stand for ours."""
GRAMMAR_BACKENDS = ("llguidance", "none")

MAX_GRACE_S = 86400
MAX_MEMORY_GIB = 1 << 20
"""No device has more; a larger --device-memory-gib is a slip of the finger."""
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@,\s]+")
SECRETS = ("api_key", "admin_api_key")
"""Fields that no answer, log or error text shows."""


class ConfigError(ValueError):
    """A flag, or a combination of flags, cannot be served; the message is one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything one engine and its HTTP front need to know.

    Sizes are tokens unless the name says otherwise; None means "decide from the model or device".
    """

    model_path: str = str(DEMO_MODEL_PATH)
    tokenizer_path: str | None = None
    served_model_name: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    fp8_weights: str = "keep"
    device: str = "auto"
    tp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    all_devices: bool = False
    """Use every device there is (8 emulated ones on CPU), with DPA and EP as wide as they go."""
    moe_a2a_backend: str = "auto"
    moe_dispatch_dtype: str = "auto"
    enable_two_batch_overlap: bool = False
    tbo_token_distribution_threshold: float = 0.48
    tbo_min_prefill_tokens: int | None = None
    tbo_min_decode_rows: int | None = None
    moe_runner_backend: str = "auto"
    attention_backend: str = "auto"
    layer_unroll: int | None = None
    mem_fraction_static: float = 0.9
    max_total_tokens: int | None = None
    page_size: int = 16
    context_length: int | None = None
    max_running_requests: int | None = None
    max_queued_requests: int | None = None
    chunked_prefill_size: int | None = None
    schedule_policy: str = "fcfs"
    load_balance_method: str = "auto"
    prefill_decode_interval: int = 0
    enable_prefill_delayer: bool = False
    prefill_delayer_max_delay_passes: int = 30
    disable_radix_cache: bool = False
    disable_overlap_schedule: bool = False
    enable_deterministic_inference: bool = False
    grammar_backend: str = "llguidance"
    watchdog_timeout: float = 300.0
    decode_log_interval: int = 40
    decode_buckets: tuple[int, ...] | None = None
    extend_buckets: tuple[int, ...] | None = None
    random_seed: int | None = None
    chat_template: str | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str | None = None
    host: str = "127.0.0.1"
    port: int = 30000
    log_level: str = "info"
    incremental_streaming_output: bool = False
    api_key: str | None = field(default=None, repr=False)
    admin_api_key: str | None = field(default=None, repr=False)
    cors_allow_origins: tuple[str, ...] = ()
    shutdown_grace_period_secs: float = 10.0
    compilation_cache_dir: str | None = None
    dry_run: bool = False
    device_memory_gib: float | None = None
    warnings: tuple[str, ...] = ()
    """What the user should know about how the flags were understood; logged at start."""

    @property
    def model_name(self) -> str:
        """The name clients see: --served-model-name, else the last part of the model path."""
        return self.served_model_name or Path(self.model_path).resolve().name

    def told(self) -> dict[str, Any]:
        """All of it that clients may know: everything but the keys."""
        return {name: value for name, value in asdict(self).items() if name not in SECRETS}

    def without_secrets(self) -> ServerConfig:
        """The same for a process that needs no keys."""
        return replace(self, **dict.fromkeys(SECRETS))

    def __post_init__(self) -> None:
        """Raises ConfigError for a single value out of range."""
        if not 0 < self.mem_fraction_static < 1:
            raise ConfigError(
                f"--mem-fraction-static must be between 0 and 1, got {self.mem_fraction_static}."
            )
        if self.page_size < 1:
            raise ConfigError(f"--page-size must be at least 1, got {self.page_size}.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, got {self.port}.")
        for name in (
            "max_total_tokens",
            "context_length",
            "max_running_requests",
            "max_queued_requests",
            "decode_log_interval",
            "layer_unroll",
            "tbo_min_prefill_tokens",
            "tbo_min_decode_rows",
            "prefill_delayer_max_delay_passes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.chunked_prefill_size is not None and self.chunked_prefill_size < 1:
            raise ConfigError(
                "--chunked-prefill-size must be at least 1: meshserve always prefills in chunks "
                f"(its programs have fixed sizes), got {self.chunked_prefill_size}."
            )
        if self.prefill_decode_interval < 0:
            raise ConfigError(
                f"--prefill-decode-interval must be at least 0, got {self.prefill_decode_interval}."
            )
        if not self.watchdog_timeout > 0:
            raise ConfigError(
                f"--watchdog-timeout must be positive seconds, got {self.watchdog_timeout}."
            )
        if self.enable_deterministic_inference and (
            self.prefill_decode_interval or self.enable_prefill_delayer
        ):
            raise ConfigError(
                "--enable-deterministic-inference runs prefill and decode in steps of their own; "
                "it does not go with --prefill-decode-interval or --enable-prefill-delayer."
            )
        if not 0 <= self.shutdown_grace_period_secs <= MAX_GRACE_S:
            raise ConfigError(
                f"--shutdown-grace-period-secs must be between 0 and {MAX_GRACE_S}, got "
                f"{self.shutdown_grace_period_secs}."
            )
        if self.device_memory_gib is not None and not 0 < self.device_memory_gib <= MAX_MEMORY_GIB:
            raise ConfigError(
                f"--device-memory-gib must be positive and at most {MAX_MEMORY_GIB}, got "
                f"{self.device_memory_gib}."
            )
        self._check_overlap()
        self._check_access()
        for name in ("decode_buckets", "extend_buckets"):
            value = getattr(self, name)
            if value is not None and (not value or min(value) < 1):
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be positive sizes separated by commas."
                )
        if ":" in self.model_name:
            raise ConfigError(
                "--served-model-name cannot contain a colon (':') character, got "
                f"'{self.model_name}'."
            )

    def _check_overlap(self) -> None:
        if not 0 <= self.tbo_token_distribution_threshold <= 0.5:
            raise ConfigError(
                "--tbo-token-distribution-threshold must be between 0 and 0.5, got "
                f"{self.tbo_token_distribution_threshold}."
            )
        if not self.enable_two_batch_overlap:
            return
        if self.enable_deterministic_inference:
            raise ConfigError(
                "--enable-two-batch-overlap does not go with --enable-deterministic-inference: "
                "where a request's rows are cut depends on what else runs."
            )
        if not self.all_devices and self.dp_size == 1 and self.moe_a2a_backend != "all_to_all":
            raise ConfigError(
                "--enable-two-batch-overlap has nothing to overlap here: it hides the exchange of "
                "tokens with the experts, so it needs DP attention (--dp-size > 1 with "
                "--enable-dp-attention) or --moe-a2a-backend all_to_all with --ep > 1."
            )

    def _check_access(self) -> None:
        for name in SECRETS:
            key = getattr(self, name)
            if key is not None and not (key and all("!" <= char <= "~" for char in key)):
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be visible ASCII characters without spaces, "
                    "at least one."
                )
        if self.api_key is not None and self.api_key == self.admin_api_key:
            raise ConfigError("--api-key and --admin-api-key must differ.")
        for origin in self.cors_allow_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "--cors-allow-origins must be * or origins like https://example.org (no path) "
                    f"separated by commas, got '{origin}'."
                )


def default_compilation_cache_dir() -> str:
    """Where compiled programs are kept between starts (XDG_CACHE_HOME is honoured)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "meshserve", "xla")


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag raises ConfigError: the caller prints one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See --help for every flag.")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(part) for part in text.split(",")}))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


_Group = argparse._ArgumentGroup


def make_parser() -> argparse.ArgumentParser:
    """The parser of `scripts/serve.py`. Flag names are SGLang's where it has one."""
    parser = _Parser(
        prog="serve.py",
        description="Serve an MLA + MoE model over HTTP from a (dp, ep, tp) mesh of devices.",
        epilog=(
            "Examples: serve.py (the bundled demo model on whatever is there); "
            "serve.py --model-path DIR --tp 8 --dp-size 8 --ep 8 --enable-dp-attention; "
            "serve.py --model-path DIR --tp 8 --ep 8 (experts spread, attention tensor-parallel)."
        ),
        allow_abbrev=False,
    )

    _add_model_flags(parser.add_argument_group("model"))
    _add_layout_flags(parser.add_argument_group("layout"))
    _add_batching_flags(parser.add_argument_group("memory and batching"))
    _add_scheduling_flags(parser.add_argument_group("scheduling"))
    _add_http_flags(parser.add_argument_group("HTTP"))
    _add_hosts_flags(parser.add_argument_group("several hosts"))
    return parser


def _add(group: _Group, *names: str, **options: Any) -> None:
    """Add a flag; one of `ServerConfig` defaults to None ("not given") and shows its default."""
    dest = options.get("dest") or names[0].lstrip("-").replace("-", "_")
    known = {f.name for f in fields(ServerConfig)}
    if dest in known and "action" not in options:
        options.setdefault("default", None)
        default = getattr(ServerConfig(), dest)
        if default not in (None, ()):
            options["help"] += f" (default: {default})"
    group.add_argument(*names, **options)


def _add_model_flags(group: _Group) -> None:
    _add(
        group,
        "--model-path",
        "--model",
        help="folder with config.json and *.safetensors (or converted by "
        "scripts/convert_checkpoint.py), or a GGUF file; "
        "without it the bundled demo model is served on every device there is",
    )
    _add(group, "--tokenizer-path", help="folder with tokenizer.json, if not the model's")
    _add(group, "--served-model-name", help="model name in the API")
    _add(
        group,
        "--load-format",
        choices=("auto", "safetensors", "gguf", "orbax", "dummy"),
        help="auto: by what --model-path is; dummy draws random weights that route evenly (for "
        "benchmarks)",
    )
    _add(
        group,
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="weights, activations and KV cache; auto: float32 on CPU, else bfloat16",
    )
    _add(
        group,
        "--fp8-weights",
        choices=("keep", "dequantize"),
        help="weights of a block-FP8 checkpoint: stay in FP8 on the devices (half the memory, and "
        "half the reading on GPUs), or become --dtype while loading",
    )
    _add(
        group,
        "--kv-cache-dtype",
        choices=("auto", "bfloat16", "fp8_e4m3"),
        help="auto: that of --dtype; fp8_e4m3 holds twice the tokens of bfloat16, less exactly",
    )
    _add(
        group,
        "--context-length",
        type=int,
        help="most tokens of prompt and answer together; default: the model's",
    )
    _add(group, "--chat-template", help="file with a Jinja template, instead of the model's")
    _add(
        group,
        "--tool-call-parser",
        choices=TOOL_CALL_PARSERS,
        help="how the model writes tool calls; auto: as its chat template does; none leaves them "
        "in the text",
    )
    _add(
        group,
        "--reasoning-parser",
        choices=tuple(REASONING_FORMATS),
        help="how the model marks its thinking, which then comes as reasoning_content; without it, "
        "thinking stays in the text",
    )


def _add_layout_flags(group: _Group) -> None:
    _add(
        group,
        "--tp-size",
        "--tp",
        "--tensor-parallel-size",
        type=int,
        dest="tp_size",
        help="the whole group of devices",
    )
    _add(
        group,
        "--dp-size",
        "--dp",
        "--data-parallel-size",
        type=int,
        dest="dp_size",
        help="with --enable-dp-attention: attention groups inside the tp devices, each with its "
        "own KV cache and batch",
    )
    _add(
        group,
        "--attn-dp-size",
        "--attention-data-parallel-size",
        type=int,
        default=None,
        help="the newer spelling of --dp-size N --enable-dp-attention",
    )
    group.add_argument(
        "--enable-dp-attention",
        action="store_true",
        help="data-parallel attention: cut requests, not heads, over --dp-size",
    )
    _add(
        group,
        "--ep-size",
        "--ep",
        "--expert-parallel-size",
        type=int,
        dest="ep_size",
        help="spread the experts over this many groups of the same devices",
    )
    _add(
        group,
        "--moe-a2a-backend",
        choices=MOE_A2A_BACKENDS,
        help="how tokens reach their experts: none = all-gather and reduce-scatter, all_to_all = "
        "each token once to every device that holds one of its experts, auto = the faster one for "
        "each program, by measured times; deepep means all_to_all",
    )
    _add(
        group,
        "--moe-dispatch-dtype",
        "--deepep-dispatcher-output-dtype",
        choices=MOE_DISPATCH_DTYPES,
        help="tokens on their way to experts: auto = the model's dtype, fp8_e4m3 (or fp8) = half "
        "the bytes of bfloat16, less exactly; what comes back keeps the model's dtype",
    )
    group.add_argument(
        "--moe-dense-tp-size",
        type=int,
        help="over how many devices dense MLPs are cut; only those of an attention group (--tp / "
        "--dp-size), which is what happens without the flag",
    )
    group.add_argument(
        "--enable-dp-lm-head",
        action="store_true",
        help="accepted and always on with DP attention: the vocabulary is cut inside an attention "
        "group only",
    )
    _add(
        group,
        "--enable-two-batch-overlap",
        action="store_true",
        help="compute the rows of a slice as two micro-batches, so that one's exchange with the "
        "experts runs beside the other's computing; in which programs, the two flags below say",
    )
    _add(
        group,
        "--tbo-token-distribution-threshold",
        type=float,
        help="two-batch overlap cuts between two prompts if the smaller side then has at least "
        "this share of the slice's tokens, else inside a prompt, in the middle; 0: inside a prompt "
        "only where a micro-batch has no room for it",
    )
    _add(
        group,
        "--tbo-min-prefill-tokens",
        type=int,
        help="two-batch overlap is for prefill programs of at least so many tokens a slice; "
        "default: for none, since it lost wherever it was measured (docs/performance.md)",
    )
    _add(
        group,
        "--tbo-min-decode-rows",
        type=int,
        help="and for decode programs of at least so many rows a slice; default: for none",
    )
    _add(
        group,
        "--moe-runner-backend",
        choices=KERNEL_BACKENDS + MOE_RUNNER_ALIASES,
        help="the experts' grouped matmul: xla = loops that run anywhere, pallas = kernels for "
        "NVIDIA GPUs of all kinds, auto = kernels where they can run, on Hopper GPUs others "
        "for many rows (also of dense MLPs) and for FP8; deep_gemm and triton mean pallas",
    )
    _add(
        group,
        "--attention-backend",
        choices=KERNEL_BACKENDS + ATTENTION_ALIASES,
        help="attention: xla, pallas or auto, as above; the names of other engines' kernels "
        f"({', '.join(ATTENTION_ALIASES)}) mean pallas",
    )
    _add(
        group,
        "--layer-unroll",
        type=int,
        help="layers of straight code in a decode program; more compile longer (default: 2 with "
        "kernels, else 1)",
    )
    _add(
        group,
        "--device",
        choices=("auto", "cpu", "cuda", "tpu"),
        help="cpu emulates the devices of the mesh",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the mesh, weights, KV tokens and largest batch of this launch, and whether DP "
        "attention pays, from config.json alone; for layouts larger than this machine too",
    )
    _add(
        group,
        "--device-memory-gib",
        type=float,
        help="with --dry-run: memory of each device; default: that of the GPUs here",
    )


def _add_batching_flags(group: _Group) -> None:
    _add(
        group,
        "--mem-fraction-static",
        type=float,
        help="share of a device's memory for weights, programs and KV pool",
    )
    _add(
        group,
        "--max-total-tokens",
        type=int,
        help="KV tokens of one slice's pool, instead of "
        "what memory allows (on CPU without this flag: 256 MiB a device)",
    )
    _add(group, "--page-size", type=int, help="KV tokens in one page")
    _add(
        group,
        "--max-running-requests",
        type=int,
        help="most requests running at once, over all "
        "slices; default: the largest decode bucket for every slice",
    )
    _add(
        group,
        "--chunked-prefill-size",
        type=int,
        help="most prompt tokens in one step, divided "
        "by --dp-size under DPA; default: the largest extend bucket for every slice",
    )
    _add(
        group,
        "--max-queued-requests",
        type=int,
        help="most requests waiting; beyond, 503. Default: no limit",
    )
    _add(
        group,
        "--disable-radix-cache",
        action="store_true",
        help="forget a request's KV cache when it ends: no prefix is ever reused",
    )
    _add(
        group,
        "--decode-buckets",
        type=_sizes,
        help="batch sizes (per slice) that decode "
        "programs are compiled for, as 1,8,32; default by device",
    )
    _add(
        group,
        "--extend-buckets",
        type=_sizes,
        help="prompt tokens (per slice) that prefill "
        "programs are compiled for, as 128,512; default by device",
    )
    _add(
        group,
        "--random-seed",
        type=int,
        help="seed for requests that bring none (and for dummy weights); default: a fresh one",
    )
    _add(
        group,
        "--compilation-cache-dir",
        help="where compiled programs are kept between starts (as pickles, which can run code: "
        "name a folder that only you can write to); "
        f"default: {default_compilation_cache_dir()}".replace(os.path.expanduser("~"), "~"),
    )


def _add_scheduling_flags(group: _Group) -> None:
    _add(
        group,
        "--schedule-policy",
        choices=SCHEDULE_POLICIES,
        help="who starts first among requests of equal priority: fcfs = first come, lpm = longest "
        "prefix in the cache",
    )
    _add(
        group,
        "--load-balance-method",
        choices=LOAD_BALANCE_METHODS,
        help="which slice runs a request: cache_aware (which auto means) weighs the prefix that a "
        "slice holds against its load; total_requests, total_tokens = least of them; round_robin",
    )
    _add(
        group,
        "--prefill-decode-interval",
        type=int,
        help="decode steps that must follow a step with prefill, while anything decodes",
    )
    _add(
        group,
        "--enable-prefill-delayer",
        action="store_true",
        help="hold prefill back until every slice has some, so that they do it in the same step",
    )
    _add(
        group,
        "--prefill-delayer-max-delay-passes",
        type=int,
        help="steps that --enable-prefill-delayer may hold prefill back",
    )
    _add(
        group,
        "--disable-overlap-schedule",
        action="store_true",
        help="plan a step only when the tokens of the step before are known",
    )
    _add(
        group,
        "--enable-deterministic-inference",
        action="store_true",
        help="a request gets the same bits whatever else runs, on whichever slice; slower",
    )
    _add(
        group,
        "--grammar-backend",
        choices=GRAMMAR_BACKENDS,
        help="what enforces JSON schemas, regular expressions and grammars; none refuses them",
    )
    _add(
        group,
        "--watchdog-timeout",
        type=float,
        help="seconds that one step may take before the server gives up",
    )
    _add(
        group,
        "--decode-log-interval",
        type=int,
        help="steps between two lines of the log that say what each slice does",
    )


def _add_http_flags(group: _Group) -> None:
    _add(group, "--host", help="address to listen on")
    _add(group, "--port", type=int, help="port to listen on")
    _add(group, "--log-level", choices=("debug", "info", "warning", "error"), help="log level")
    _add(
        group,
        "--incremental-streaming-output",
        "--stream-output",
        action="store_true",
        help="events of a /generate stream tell the new text and tokens only, not the whole answer",
    )
    _add(
        group,
        "--api-key",
        help="clients must send it as 'Authorization: Bearer KEY', except to /health*, /metrics "
        "and /ping; better in the environment as MESHSERVE_API_KEY, where ps does not show it",
    )
    _add(
        group,
        "--admin-api-key",
        help="needed for /flush_cache and /abort_request instead of --api-key; opens the rest "
        "too; or MESHSERVE_ADMIN_API_KEY",
    )
    _add(
        group,
        "--cors-allow-origins",
        type=_names,
        help="origins whose pages may ask from a browser, separated by commas, or *; default: none",
    )
    _add(
        group,
        "--shutdown-grace-period-secs",
        type=float,
        help="how long running answers may go on after SIGTERM or SIGINT; what is left then ends "
        "with an error event",
    )
    group.add_argument(
        "--enable-metrics",
        action="store_true",
        help="accepted and always on: Prometheus metrics are at /metrics",
    )
    group.add_argument(
        "--enable-cache-report",
        action="store_true",
        help="accepted and always on: usage.prompt_tokens_details tells the cached tokens",
    )


def _add_hosts_flags(group: _Group) -> None:
    group.add_argument("--nnodes", type=int, default=1, help="only 1 works so far")
    group.add_argument("--node-rank", type=int, default=0, help="only 0 works so far")


def parse_args(argv: list[str]) -> ServerConfig:
    """Read the flags of `scripts/serve.py`.

    Raises:
        ConfigError: a flag is unknown, out of range, or not served yet.
        SystemExit: --help was asked for.
    """
    args = vars(make_parser().parse_args(argv))
    for name in SECRETS:
        if args[name] is None:
            args[name] = os.environ.get(f"MESHSERVE_{name.upper()}") or None
    if args.pop("nnodes") != 1 or args.pop("node_rank") != 0:
        raise ConfigError("--nnodes > 1 is not supported yet: meshserve runs on one host.")
    for always_on in ("enable_metrics", "enable_cache_report"):
        args.pop(always_on)
    enable_dpa: bool = args.pop("enable_dp_attention")
    attn_dp: int | None = args.pop("attn_dp_size")
    warnings: list[str] = []
    if attn_dp is not None:
        if args["dp_size"] not in (None, 1, attn_dp) or (args["dp_size"] == 1 and enable_dpa):
            raise ConfigError(
                f"--dp-size {args['dp_size']} with --attn-dp-size {attn_dp}: replicas combined "
                "with attention data parallelism are not supported; give one of the two."
            )
        if attn_dp < 1:
            raise ConfigError(f"--attn-dp-size must be positive, got {attn_dp}.")
        args["dp_size"], enable_dpa = attn_dp, attn_dp > 1
    if args["device_memory_gib"] is not None and not args["dry_run"]:
        raise ConfigError("--device-memory-gib goes with --dry-run: a launch asks the device.")
    dp_size = args["dp_size"] or 1
    layout_flags = ("model_path", "tp_size", "dp_size", "ep_size")
    all_devices = all(args[name] is None for name in layout_flags)
    dense_tp, dp_lm_head = args.pop("moe_dense_tp_size"), args.pop("enable_dp_lm_head")
    attn_tp = 1 if all_devices else (args["tp_size"] or 1) // max(1, dp_size)
    if dp_lm_head and not (enable_dpa or all_devices):
        raise ConfigError("Please enable dp attention when setting --enable-dp-lm-head.")
    if dense_tp not in (None, attn_tp):
        raise ConfigError(
            f"--moe-dense-tp-size {dense_tp} is not supported: dense MLPs are cut as attention is, "
            f"over an attention group (--tp / --dp-size, here {attn_tp}); leave the flag out."
        )
    if enable_dpa and dp_size == 1 and not all_devices:
        warnings.append(
            "--enable-dp-attention has no effect: DP attention is off because --dp-size is 1."
        )
    if dp_size > 1 and not enable_dpa:
        raise ConfigError(
            f"--dp-size {dp_size} without --enable-dp-attention means {dp_size} full replicas, "
            "which scripts/launch_server.py starts behind the router; add --enable-dp-attention "
            "for DP attention in one engine."
        )
    given = {name: value for name, value in args.items() if value is not None}
    if given.get("moe_a2a_backend") == "deepep":
        warnings.append(
            "--moe-a2a-backend deepep: this engine has no DeepEP; all_to_all does the same job."
        )
        given["moe_a2a_backend"] = "all_to_all"
    for name, aliases in (
        ("moe_runner_backend", MOE_RUNNER_ALIASES),
        ("attention_backend", ATTENTION_ALIASES),
    ):
        if given.get(name) in aliases:
            flag = f"--{name.replace('_', '-')}"
            warnings.append(
                f"{flag} {given[name]}: this engine has kernels of its own in Pallas, which it "
                f"takes instead ({flag} pallas)."
            )
            given[name] = "pallas"
    if given.get("moe_dispatch_dtype") in ("fp8_e4m3", "fp8"):
        given["moe_dispatch_dtype"] = "fp8_e4m3"
        if dp_size == 1 and given.get("moe_a2a_backend") != "all_to_all" and not all_devices:
            raise ConfigError(
                f"--moe-dispatch-dtype {args['moe_dispatch_dtype']} needs --dp-size > 1 or "
                "--moe-a2a-backend all_to_all: no token is sent to an expert otherwise."
            )
    if not args["enable_two_batch_overlap"]:
        warnings += [
            f"--{name.replace('_', '-')} has no effect without --enable-two-batch-overlap."
            for name in given
            if name.startswith("tbo_")
        ]
    one_group = given.get("ep_size", 1) == 1 and not all_devices
    if given.get("moe_a2a_backend") == "all_to_all" and one_group:
        raise ConfigError(
            f"--moe-a2a-backend {args['moe_a2a_backend']} needs --ep > 1: with one expert "
            "group there is nothing to exchange; use --moe-a2a-backend none."
        )
    return ServerConfig(**given, all_devices=all_devices, warnings=tuple(warnings))
