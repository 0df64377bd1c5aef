"""Convert a checkpoint to Orbax: `convert_checkpoint.py MODEL OUT`, then serve `--model-path OUT`.

Reads safetensors or GGUF as the server would (on the CPU, one device) and writes our parameters,
which restore onto any mesh without transposing. The whole model must fit into memory once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from model.checkpoint import CheckpointError
from model.config import UnsupportedModelError
from sharding.layout import make_layout
from sharding.mesh import make_mesh
from sharding.orbax_folder import save
from sharding.sources import open_source
from sharding.step import ModelSpec

DTYPES = ("bfloat16", "float16", "float32")


def main() -> int:
    """Read, write, say what it took; exit code 1 with one sentence where that is not possible."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of safetensors")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="what weights are stored in; auto: what config.json says, float32 if that is neither "
        "bfloat16 nor float16",
    )
    parser.add_argument(
        "--fp8-weights",
        choices=("keep", "dequantize"),
        default="keep",
        help="weights of a block-FP8 checkpoint",
    )
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    try:
        if args.model.is_file():
            raise CheckpointError(
                f"{args.model} is one file; only folders (with a tokenizer beside) are converted."
            )
        began = time.perf_counter()
        source = open_source(args.model, keep_fp8=args.fp8_weights == "keep")
        name = args.dtype if args.dtype != "auto" else source.config.dtype
        layout = make_layout(1)
        spec = ModelSpec(
            source.config, jnp.dtype(name if name in DTYPES else "float32"), layout, source.fp8
        )
        weights = source.load(spec, make_mesh(layout))
        read = time.perf_counter()
        save(args.model, args.out, spec, weights)
    except (CheckpointError, UnsupportedModelError) as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return 1
    size = spec.device_bytes() / 2**20
    print(
        f"{args.out}: {size:.0f} MiB, read in {read - began:.1f} s, written in "
        f"{time.perf_counter() - read:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
