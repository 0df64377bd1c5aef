"""`--dry-run`: what a launch would be, said without devices, weights or a port.

GPUs are not initialised: their number and memory come from the driver's own tool, where it is.
"""

from __future__ import annotations

import subprocess

from serving.config import ServerConfig
from serving.engine.engine import EMULATED_DEVICES, widest_layout
from serving.engine.estimate import GIB, describe, estimate
from sharding.layout import make_layout
from sharding.sources import open_source

QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


def gpu_memories() -> list[int]:
    """Bytes of memory of every NVIDIA GPU here; empty where there is none or no tool to ask."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=30, check=True)
        return [int(line) << 20 for line in done.stdout.split("\n") if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def dry_run(config: ServerConfig) -> list[str]:
    """The lines to print.

    Raises:
        ConfigError, LayoutError, UnsupportedModelError, CheckpointError: the user's sentence.
    """
    gpus = [] if config.device in ("cpu", "tpu") else gpu_memories()
    given = config.device_memory_gib
    on_cpu = config.device == "cpu" or (config.device == "auto" and not gpus and given is None)
    memory = min(gpus, default=None) if given is None else int(given * GIB)
    if memory is not None:
        memory = int(memory * config.mem_fraction_static)
    if config.all_devices:
        layout = widest_layout(config, len(gpus) or EMULATED_DEVICES)
    else:
        layout = make_layout(config.tp_size, config.dp_size, config.ep_size)
    # A dummy source reads no weights: FP8 is told by the configuration.
    source = open_source(config.model_path, "dummy", keep_fp8=config.fp8_weights == "keep")
    found = estimate(
        config,
        source,
        layout,
        platform="cpu" if on_cpu else "accelerator",
        memory=None if on_cpu else memory,
    )
    return describe(found, config.model_name)
