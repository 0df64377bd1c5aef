"""The engine without HTTP: decode steps, prefill, throughput, shared prefixes.

Random prompts, greedy, nothing ends before its last token. The workloads are those of the peers'
numbers in docs/performance.md; --scale small makes them finish on a CPU in a minute. Every flag of
scripts/serve.py that concerns the engine may be added. For example:

  python scripts/bench_offline.py --scale small --device cpu
  python scripts/bench_offline.py --shape deepseek-v2-lite --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.benchmarking import emit, own_parser, percentile, say, table
from scripts.workloads import Session, Tokens, Vocabulary, independent, shared_prefix
from serving.config import ConfigError, ServerConfig, default_compilation_cache_dir, parse_args
from serving.engine.engine import CompileCounter, Engine, configure_jax, describe, make_engine
from serving.request import Request, SamplingParams

WORKLOADS = ("decode", "prefill", "throughput", "shared")
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "torch_dtype": "bfloat16",
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    },
}
"""Published configurations, for dummy weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The sizes of every workload. Batches are per slice, requests in all."""

    decode_batches: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    decode_steps: int
    prefills: tuple[tuple[int, int], ...]
    """Prompts, and tokens of each."""
    throughput: tuple[int, int, int]
    """Requests, tokens in, tokens out."""
    shared: tuple[int, int, int, int, int]
    """Requests, prefixes, tokens of a prefix, own tokens, tokens out."""


SCALES = {
    "full": Scale(
        decode_batches=(1, 8, 32, 64, 128, 256),
        decode_contexts=(1024, 4096),
        decode_steps=100,
        prefills=((16, 2048), (4, 8000), (1, 2048)),
        throughput=(512, 512, 128),
        shared=(256, 16, 1024, 128, 64),
    ),
    "small": Scale(
        decode_batches=(1, 8),
        decode_contexts=(128,),
        decode_steps=20,
        prefills=((8, 128), (2, 500), (1, 128)),
        throughput=(32, 64, 16),
        shared=(32, 4, 128, 16, 8),
    ),
}


class Bench:
    """One engine under measurement."""

    def __init__(self, engine: Engine, vocab_size: int, seed: int) -> None:
        self.engine = engine
        self.vocabulary = Vocabulary(vocab_size, seed)
        self.compiles = CompileCounter()
        self.slices = engine.runner.layout.num_slices
        self._serial = 0

    def add(self, prompt: Tokens, max_tokens: int, dp_rank: int | None = None) -> str:
        """Queue a greedy request that ends only at max_tokens."""
        self._serial += 1
        rid = str(self._serial)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.engine.add(Request(rid=rid, prompt=prompt, sampling=params, dp_rank=dp_rank))
        return rid

    def drain(self) -> int:
        """Step until nothing is left; how many tokens came."""
        tokens = 0
        while self.engine.has_work:
            tokens += len(self.engine.step())
        return tokens

    def totals(self) -> tuple[int, int]:
        """Context tokens started so far, and those among them that were cached."""
        counters = [load.counters for load in self.engine.status()]
        return sum(c.prompt_tokens for c in counters), sum(c.cached_tokens for c in counters)

    def run(self, name: str, sessions: Sequence[Session]) -> dict[str, Any]:
        """All sessions at once, to the end: seconds and rates."""
        steps, compiles, before = self.engine.totals.count, self.compiles.count, self.totals()
        num_in = 0
        began = time.perf_counter()
        for session in sessions:
            prompt = session.prefix + session.turns[0]
            num_in += len(prompt)
            self.add(prompt, session.max_tokens)
        num_out = self.drain()
        seconds = time.perf_counter() - began
        started, cached = (b - a for a, b in zip(before, self.totals(), strict=True))
        return {
            "workload": name,
            "requests": len(sessions),
            "tokens in": num_in,
            "tokens out": num_out,
            "seconds": seconds,
            "in/s": num_in / seconds,
            "out/s": num_out / seconds,
            "total/s": (num_in + num_out) / seconds,
            "hit rate": cached / started,
            "steps": self.engine.totals.count - steps,
            "recompilations": self.compiles.count - compiles,
        }

    # ---- the workloads -----------------------------------------------------------------------

    def decode(self, batch: int, context: int, num_steps: int) -> dict[str, Any]:
        """Steady decode steps of `batch` requests on every slice at about `context` tokens each."""
        row: dict[str, Any] = {"workload": "decode", "batch": batch, "context": context}
        runner = self.engine.runner
        budget = runner.buckets.prefill_tokens
        # Those that are filled first decode while the others are.
        fill = -(-batch * context // budget) + batch // runner.buckets.prefill_chunks + 4
        answer = fill + num_steps + 16
        prompt = max(1, context - num_steps // 2)
        pages = -(-(prompt + answer) // runner.page_size)
        if batch > runner.buckets.slots:
            return row | {"note": f"more than the {runner.buckets.slots} slots of a slice"}
        if prompt + answer > runner.max_context or batch * pages > runner.num_pages - 1:
            return row | {"note": "does not fit the context or the KV pool"}
        compiles = self.compiles.count
        rids = [
            self.add(self.vocabulary.draw(prompt), answer, dp_rank=s)
            for _ in range(batch)
            for s in range(self.slices)
        ]
        began, silent = time.perf_counter(), set(rids)
        while silent:
            silent -= {outcome.rid for outcome in self.engine.step()}
        filled = time.perf_counter() - began
        for _ in range(4):
            self.engine.step()
        times, tokens = [], 0
        for _ in range(num_steps):
            began = time.perf_counter()
            tokens += len(self.engine.step())
            times.append(time.perf_counter() - began)
        if tokens != num_steps * len(rids):
            raise RuntimeError(f"{tokens} tokens in {num_steps} steps of {len(rids)} requests.")
        for rid in rids:
            self.engine.abort(rid)
        self.drain()
        return row | {
            "ms/step": 1e3 * statistics.median(times),
            "mean": 1e3 * statistics.mean(times),
            "p99": 1e3 * percentile(times, 99),
            "out/s": tokens / sum(times),
            "fill s": filled,
            "steps": num_steps,
            "recompilations": self.compiles.count - compiles,
        }

    def prefill(self, prompts: int, tokens: int, repeats: int) -> dict[str, Any]:
        """Prompts of one length, one token out; the median run."""
        row = {"workload": f"prefill {prompts}x{tokens}"}
        if tokens + 1 > self.engine.runner.max_context:
            return row | {"note": "does not fit the context or the KV pool"}
        runs = [
            self.run(
                f"prefill {prompts}x{tokens}",
                independent(
                    self.vocabulary, requests=prompts, input_tokens=tokens, output_tokens=1
                ),
            )
            for _ in range(repeats)
        ]
        return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]

    def throughput(self, requests: int, tokens_in: int, tokens_out: int) -> dict[str, Any]:
        sessions = independent(
            self.vocabulary, requests=requests, input_tokens=tokens_in, output_tokens=tokens_out
        )
        return self.run(f"{tokens_in} in / {tokens_out} out", sessions)

    def shared(
        self, requests: int, groups: int, prefix: int, own: int, tokens_out: int
    ) -> dict[str, Any]:
        sessions = shared_prefix(
            self.vocabulary,
            groups=groups,
            requests=requests,
            prefix_tokens=prefix,
            question_tokens=own,
            output_tokens=tokens_out,
        )
        return self.run(f"{groups} shared {prefix} + {own} in / {tokens_out} out", sessions)


def measure(bench: Bench, scale: Scale, workloads: Sequence[str], repeats: int) -> Iterator[Any]:
    """The rows of the chosen workloads, as they come."""
    for _ in range(2):  # what a first request sets up is not measured
        bench.run(
            "warm-up", independent(bench.vocabulary, requests=2, input_tokens=8, output_tokens=4)
        )
    if "decode" in workloads:
        for context in scale.decode_contexts:
            for batch in scale.decode_batches:
                yield bench.decode(batch, context, scale.decode_steps)
    if "prefill" in workloads:
        for prompts, tokens in scale.prefills:
            yield bench.prefill(prompts, tokens, repeats)
    if "throughput" in workloads:
        yield bench.throughput(*scale.throughput)
    if "shared" in workloads:
        yield bench.shared(*scale.shared)


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def make_parser() -> argparse.ArgumentParser:
    parser = own_parser(__doc__)
    parser.add_argument(
        "--workloads",
        type=lambda text: tuple(text.split(",")),
        default=WORKLOADS,
        help=f"some of {','.join(WORKLOADS)} (default: all)",
    )
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="default: full")
    parser.add_argument(
        "--shape",
        choices=tuple(SHAPES),
        help="dummy weights of this published configuration, instead of --model-path",
    )
    parser.add_argument("--decode-batches", type=sizes, help="per slice, as 1,8,32")
    parser.add_argument("--decode-contexts", type=sizes, help="as 1024,4096")
    parser.add_argument("--decode-steps", type=int, help="measured steps of each")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a prefill (default: 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default: 1)")
    return parser


def configured(
    engine_flags: list[str], shape: str | None, folder: Path, layers: int | None = None
) -> ServerConfig:
    """The engine's configuration; a published `shape` is written into `folder`, for dummy weights.

    Args: layers: how many of the shape's, from the first; None for all.

    Raises:
        ConfigError: a flag cannot be served.
    """
    if shape is not None:
        cut = {} if layers is None else {"num_hidden_layers": layers}
        (folder / "config.json").write_text(json.dumps(SHAPES[shape] | cut), encoding="utf-8")
        engine_flags = [*engine_flags, "--model-path", str(folder), "--load-format", "dummy"]
    config = parse_args(engine_flags)
    if config.compilation_cache_dir is None:
        config = replace(config, compilation_cache_dir=default_compilation_cache_dir())
    return config


def read_flags(argv: list[str], folder: Path) -> tuple[argparse.Namespace, ServerConfig, Scale]:
    """Own flags, the engine's configuration, and the sizes; a --shape is written into `folder`.

    Raises:
        ConfigError: a flag of the engine cannot be served, or a workload is unknown.
    """
    args, engine_flags = make_parser().parse_known_args(argv)
    unknown = set(args.workloads) - set(WORKLOADS)
    if unknown:
        raise ConfigError(f"--workloads: {', '.join(unknown)} is none of {', '.join(WORKLOADS)}.")
    config = configured(engine_flags, args.shape, folder)
    given = {
        name: getattr(args, name)
        for name in ("decode_batches", "decode_contexts", "decode_steps")
        if getattr(args, name) is not None
    }
    return args, config, replace(SCALES[args.scale], **given)


def main(argv: list[str]) -> int:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            args, config, scale = read_flags(argv, Path(temporary))
            configure_jax(config)
            engine = make_engine(config)
        except ValueError as error:  # ConfigError, LayoutError, CheckpointError: one sentence
            print(f"bench_offline: error: {error}", file=sys.stderr)
            return 2
    ready = time.perf_counter() - began
    topology, details = describe(engine.runner)
    say(f"{topology}\nready after {ready:.1f} s")
    bench = Bench(engine, engine.runner.model.vocab_size, args.seed)
    rows = []
    for row in measure(bench, scale, args.workloads, args.repeats):
        rows.append(row)
        say(f"  {row}")
    for part in ([r for r in rows if "batch" in r], [r for r in rows if "batch" not in r]):
        if part:
            print(table(part) + "\n")
    emit(
        "offline",
        model=args.shape or config.model_path,
        engine=details,
        ready_seconds=ready,
        schedule_policy=config.schedule_policy,
        load_balance_method=config.load_balance_method,
        radix_cache=not config.disable_radix_cache,
        overlap=not config.disable_overlap_schedule,
        rows=rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
