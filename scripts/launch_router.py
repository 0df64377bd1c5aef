"""The router in front of LLM servers: `launch_router.py --help` lists the flags."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from router.app import RouterService  # noqa: E402
from router.config import ConfigError, RouterConfig, parse_args  # noqa: E402
from router.server import run  # noqa: E402

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main(argv: Sequence[str]) -> int:
    """Read the flags, refuse what cannot be done (exit code 2), route."""
    try:
        config = parse_args(argv)
    except ConfigError as error:
        print(f"launch_router.py: error: {error}", file=sys.stderr)
        return 2
    set_up_logging(config)
    return run(config, RouterService)


def set_up_logging(config: RouterConfig) -> None:
    """To the terminal, and to a file in --log-dir if there is one."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if config.log_dir is not None:
        folder = Path(config.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / "router.log"))
    level = {"warn": "WARNING"}.get(config.log_level, config.log_level.upper())
    logging.basicConfig(level=level, format=FORMAT, handlers=handlers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
