"""Serve a model over HTTP: `serve.py --help` lists the flags, no flags serve the demo model."""

from __future__ import annotations

import logging
import sys

from serving.config import ConfigError, parse_args
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
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for warning in config.warnings:
        logging.getLogger("meshserve").warning(warning)
    return run(config)


if __name__ == "__main__":
    sys.exit(main())
