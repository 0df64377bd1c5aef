"""KV capacity of DP attention against tensor parallelism, shown by filling the pools.

Both engines get the same pool bytes on every device. Live requests are added until no page is left;
the table gives the tokens they hold at that moment, beside the bytes of the allocated arrays.
MLA has one KV head, so tp devices hold tp copies of one pool, dp slices hold dp different ones.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.benchmarking import emit, table
from serving.config import ServerConfig, default_compilation_cache_dir
from serving.engine.engine import Engine, configure_jax, make_engine
from serving.request import Request, SamplingParams


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=ServerConfig().model_path)
    parser.add_argument("--tp", type=int, default=8, help="devices (default: 8)")
    parser.add_argument(
        "--pool-tokens", type=int, default=4096, help="KV tokens of each device (default: 4096)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "tpu"))
    return parser.parse_args()


def fill(engine: Engine, prompt_tokens: int) -> dict[str, int]:
    """Add requests that never end until the pools are full; the fullest moment."""
    runner = engine.runner
    capacity = (runner.num_pages - 1) * runner.page_size * runner.layout.num_slices
    # Answers as long as fit: requests stay alive, grow, and the last ones wait for pages.
    answer = min(runner.max_context, runner.num_pages * runner.page_size // 2) - prompt_tokens
    for i in range(2 * capacity // prompt_tokens):
        prompt = tuple(3 + (i * 31 + j * 7) % 200 for j in range(prompt_tokens))
        params = SamplingParams(max_tokens=answer, temperature=0.0)
        engine.add(Request(rid=str(i), prompt=prompt, sampling=params))
    fullest, steps_without_growth = {"tokens": 0, "requests": 0}, 0
    # A page lasts a request page_size steps: only after as many is nothing growing any more.
    while steps_without_growth <= runner.page_size:
        engine.step()
        engine.scheduler.check_integrity()
        loads = engine.status()
        used = sum(load.used_tokens for load in loads)
        steps_without_growth += 1
        if used > fullest["tokens"]:
            fullest = {"tokens": used, "requests": sum(load.running for load in loads)}
            steps_without_growth = 0
    return fullest


def measure(config: ServerConfig, prompt_tokens: int) -> dict[str, Any]:
    engine = make_engine(config)
    runner = engine.runner
    return {
        "layout": f"tp {config.tp_size}, dp {config.dp_size}, ep {config.ep_size}",
        "slices": runner.layout.num_slices,
        "kv_bytes_per_device": runner.kv_bytes_per_device(),
        "weight_bytes_per_device": runner.spec.device_bytes(),
        **fill(engine, prompt_tokens),
    }


def main() -> None:
    args = parse_args()
    config = ServerConfig(
        model_path=args.model_path,
        device=args.device,
        tp_size=args.tp,
        ep_size=args.tp,
        max_total_tokens=args.pool_tokens,
        decode_buckets=(max(8, -(-args.pool_tokens // args.prompt_tokens)),),
        extend_buckets=(512,),
        disable_radix_cache=True,  # requests that share a page would fill a pool twice
        compilation_cache_dir=default_compilation_cache_dir(),
    )
    configure_jax(config)
    rows = [measure(replace(config, dp_size=dp), args.prompt_tokens) for dp in (1, args.tp)]
    print(table(rows))
    ratio = rows[1]["tokens"] / rows[0]["tokens"]
    print(f"DP attention holds {ratio:.2f} times the tokens in the same bytes per device.")
    emit("kv_capacity", model=args.model_path, rows=rows, ratio=ratio)


if __name__ == "__main__":
    main()
