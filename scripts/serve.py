"""Serve a model over HTTP: `serve.py --help` lists the flags, no flags serve the demo model."""

from __future__ import annotations

import logging
import sys

from serving.config import ConfigError, ServerConfig, parse_args
from serving.http.server import run
from sharding.layout import LayoutError, make_layout


def main() -> int:
    """Read the flags, refuse what cannot be served (exit code 2), serve."""
    try:
        config = parse_args(sys.argv[1:])
        if not config.all_devices:
            make_layout(config.tp_size, config.dp_size, config.ep_size)
    except (ConfigError, LayoutError) as error:
        print(f"serve.py: error: {error}", file=sys.stderr)
        return 2
    if config.dry_run:
        return dry_run(config)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for warning in config.warnings:
        logging.getLogger("meshserve").warning(warning)
    return run(config)


def dry_run(config: ServerConfig) -> int:
    """Print what this launch would be; exit code 0, or 2 for what could not be launched."""
    # These import JAX, which the front does without; it touches no device.
    from model.checkpoint import CheckpointError
    from model.config import UnsupportedModelError
    from serving.engine import dry_run

    try:
        lines = dry_run.dry_run(config)
    except (CheckpointError, ConfigError, LayoutError, UnsupportedModelError) as error:
        print(f"serve.py: error: {error}", file=sys.stderr)
        return 2
    for text in (*config.warnings, *lines):
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
