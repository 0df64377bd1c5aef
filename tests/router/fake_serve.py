"""A stand-in for scripts/serve.py: a simulated worker behind engine flags, started in no time.

`--served-model-name` tells how to misbehave: "fails" ends at once with a reason, "forks" starts a
child in a session of its own, as the engine is one, and prints its process id.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import uvloop  # noqa: E402

from scripts.simulated_worker import make_parser, serve  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--served-model-name", default="mock-model")
    parser.add_argument("--tp-size", type=int)
    args, _ = parser.parse_known_args()
    name = args.served_model_name
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "-")
    print(f"pid {os.getpid()} rank {os.environ['SGLANG_DP_RANK']} gpus {gpus}", flush=True)
    if name == "fails":
        print("serve.py: error: the weights are missing", file=sys.stderr)
        return 1
    if name == "forks":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        print(f"child {child.pid}", flush=True)
    flags = ["--ports", str(args.port), "--host", args.host, "--model", name, "--tpot", "0.02"]
    uvloop.run(serve(make_parser().parse_args(flags)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
