"""A real `scripts/serve.py` in a process of its own, for as long as a test module needs it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from serving.config import default_compilation_cache_dir
from tests.harness import OPTIMISED

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "serve.py"), *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def running_server(*flags: str, optimised: bool = False) -> Iterator[str]:
    """Start a server on a free port, yield its URL, stop it with SIGTERM: it must exit 0.

    Optimised programs take longer to compile than those that conftest.py asks for, and run three
    times as fast: for the demo model, which is not tiny.
    """
    port = free_port()
    env = environment()
    if optimised:
        for name, value in OPTIMISED.items():  # of a flag given twice the last one counts
            env["XLA_FLAGS"] += f" --{name}={str(value).lower()}"
    process = subprocess.Popen(
        command(
            *("--device", "cpu", "--port", str(port)),
            *("--compilation-cache-dir", default_compilation_cache_dir() + "-tests"),
            *flags,
        ),
        env=env,
        cwd="/",
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert process.poll() is None, "the server ended while starting"
            assert time.monotonic() < deadline, "the server did not start in time"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
