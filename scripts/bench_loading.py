"""Measure loading: seconds, rate, and memory beside the parameters' own, by format.

Writes a dummy DeepSeek-V3-like checkpoint (about --gib large) into a temporary folder, loads it
over emulated CPU devices in a fresh process for each format, and removes it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ml_dtypes
import numpy as np

from scripts.benchmarking import emit

LAYERS = 8
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 4096,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def write(folder: Path, gib: float) -> int:
    """A safetensors checkpoint, one file a layer; its bytes."""
    from safetensors.numpy import save_file

    from model.checkpoint import hf_shapes
    from model.config import ModelConfig

    per_width = 2 * 3 * CONFIG["hidden_size"] * CONFIG["n_routed_experts"] * (LAYERS - 1)
    width = max(64, int(gib * 2**30 / per_width) // 64 * 64)
    config = {**CONFIG, "moe_intermediate_size": width}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    groups: dict[str, dict[str, np.ndarray]] = {}
    total, names = 0, {}
    # Long enough not to repeat inside what a compressor looks at.
    noise = rng.standard_normal(1 << 26, np.float32).astype(ml_dtypes.bfloat16)
    for name, shape in hf_shapes(ModelConfig.from_hf(config)).items():
        parts = name.split(".")
        file = f"model-{parts[2] if parts[1] == 'layers' else 'rest'}.safetensors"
        size, start = math.prod(shape), rng.integers(1 << 24)
        values = noise[start : start + size].reshape(shape)
        if name.endswith("correction_bias"):
            values = values.astype(np.float32)
        groups.setdefault(file, {})[name] = values
        names[name], total = file, total + values.nbytes
    for file, tensors in groups.items():
        save_file(tensors, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return total


def anonymous_bytes() -> int:
    """Memory of this process that is no file: mapped files are the page cache's."""
    with open("/proc/self/status") as status:
        return next(int(x.split()[1]) << 10 for x in status if x.startswith("RssAnon"))


def measure(
    folder: str, devices: int, dtype: str, cache: str, result: multiprocessing.Queue
) -> None:
    """Load once; puts seconds, peak and own bytes. Runs in its own process."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)  # as the server does
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from sharding.layout import make_layout
    from sharding.mesh import make_mesh
    from sharding.sources import open_source
    from sharding.step import ModelSpec

    layout = make_layout(devices, devices, devices)
    mesh = make_mesh(layout)
    began = time.perf_counter()
    source = open_source(folder)
    spec = ModelSpec(source.config, jnp.dtype(dtype), layout, source.fp8)
    jax.block_until_ready(jax.jit(lambda: jnp.zeros(8) + 1)())  # the compiler's own memory
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    weights = jax.block_until_ready(source.load(spec, mesh))
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    own = sum(s.data.nbytes for w in weights for s in w.addressable_shards)
    layers = max(layers for _, layers in source.config.segments)
    layer = sum(
        w.addressable_shards[0].data.nbytes // layers
        for p, w in zip(spec.params, weights, strict=True)
        if p.path.startswith(f"segments.{len(source.config.segments) - 1}")
    )
    result.put({"seconds": seconds, "beside": peak[0] - before - own, "own": own, "layer": layer})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--orbax", action="store_true", help="convert, and measure that too")
    args = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        size = write(folder, args.gib)
        formats = {"safetensors": folder}
        if args.orbax:
            formats["orbax"] = Path(temporary) / "orbax"
            command = [sys.executable, "-m", "scripts.convert_checkpoint", folder]
            subprocess.run([*map(str, command), str(formats["orbax"])], check=True)
        for name, path in formats.items():
            for run in ("first", "second"):
                queue = context.Queue()
                process = context.Process(
                    target=measure,
                    args=(str(path), args.devices, args.dtype, f"{temporary}/cache", queue),
                )
                process.start()
                row = {"format": name, "run": run, **queue.get()}
                process.join()
                rows.append(row)
                print(
                    f"{name:12} {run:7} {row['seconds']:6.1f} s  {size / row['seconds'] / 1e9:5.2f}"
                    f" GB/s  beside the parameters {row['beside'] >> 20} MiB; one layer's shard on "
                    f"one device {row['layer'] >> 20} MiB",
                    flush=True,
                )
    emit("loading", bytes=size, devices=args.devices, dtype=args.dtype, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
