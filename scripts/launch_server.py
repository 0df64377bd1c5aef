"""Serve a model with replicas behind the router, in one command: `launch_server.py --help`.

Every flag of `serve.py` goes to the workers, every flag of `launch_router.py` works with the prefix
`--router-`; the router listens at --host and --port. `--dp-size N` means N workers of --tp devices
each, and with --enable-dp-attention one worker whose ranks the router addresses. Workers that die
are started again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from router.app import RouterService  # noqa: E402
from router.config import ConfigError as RouterConfigError  # noqa: E402
from router.config import RouterConfig, add_router_flags, router_config  # noqa: E402
from router.front import Handler  # noqa: E402
from router.registration import NewWorker  # noqa: E402
from router.server import StartError, run  # noqa: E402
from router.supervisor import Supervisor, WorkerProcess  # noqa: E402
from scripts.launch_router import set_up_logging  # noqa: E402
from serving.config import (  # noqa: E402
    ConfigError,
    default_compilation_cache_dir,
    make_parser,
)
from serving.config import parse_args as parse_engine_args  # noqa: E402
from sharding.layout import LayoutError, make_layout  # noqa: E402

PREFIX = "router-"
BASE_PORT = 31000
WORKER_HOST = "127.0.0.1"
"""Workers are for the router alone."""
PORTS_TRIED = 1000
SERVE = (sys.executable, str(ROOT / "scripts" / "serve.py"))
CORES_EACH = 4
"""With fewer cores for each worker, all of them compiling the same programs takes longer than
waiting for one of them to do it."""

logger = logging.getLogger("meshserve.router")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the command line asks for.

    Attributes:
        engine: the flags of every worker, without host and port.
        num_workers: processes.
        devices: what CUDA_VISIBLE_DEVICES is for each of them; empty to leave it.
        base_port: the first port that is tried for a worker.
        worker_key: what workers are to be asked with.
        cache_dir: where workers keep compiled programs.
    """

    router: RouterConfig
    engine: tuple[str, ...]
    num_workers: int
    devices: tuple[str, ...] = ()
    base_port: int = BASE_PORT
    worker_key: str | None = None
    cache_dir: Path


def main(argv: Sequence[str], *, command: Sequence[str] = SERVE) -> int:
    """Read the flags, refuse what cannot be served (exit code 2), serve until a signal."""
    try:
        launch = parse(argv, os.environ)
    except (ConfigError, RouterConfigError, LayoutError) as error:
        print(f"launch_server.py: error: {error}", file=sys.stderr)
        return 2
    set_up_logging(launch.router)
    services: list[Service] = []

    def make(config: RouterConfig) -> Service:
        services.append(Service(config, launch, command))
        return services[-1]

    code = run(launch.router, make)
    return 1 if any(service.hopeless for service in services) else code


class Service:
    """The router and, behind it, its workers: `router.server.Service`."""

    def __init__(self, config: RouterConfig, launch: Launch, command: Sequence[str]) -> None:
        self.hopeless = False
        self._router = RouterService(config)
        self._config = config
        self._api_key = launch.worker_key
        ports = free_ports(launch.base_port)
        workers = [
            worker_process(launch, i, next(ports), command) for i in range(launch.num_workers)
        ]
        self._supervisor = Supervisor(
            workers,
            upstream=self._router.upstream,
            on_start=self._began,
            on_up=self._came_up,
            on_down=self._died,
            on_hopeless=self._give_up,
            startup_timeout_s=config.worker_startup_timeout_secs,
            first_alone=first_alone(launch),
        )
        self.handler: Handler = self._router.handler

    def metrics_page(self) -> bytes:
        return self._router.metrics_page()

    async def start(self) -> None:
        await self._router.start()
        await self._supervisor.start()

    async def stop(self) -> None:
        await self._supervisor.stop()
        await self._router.stop()

    def _began(self, url: str) -> None:
        self._router.registration.expected[url] = "it is starting"

    async def _came_up(self, url: str) -> None:
        self._router.registration.expected.pop(url, None)
        new = NewWorker(url=url, api_key=self._api_key)
        await self._router.registration.add(new, source="launch").done.wait()

    async def _died(self, url: str) -> None:
        self._router.registration.remove(url, source="launch", reason="died")
        self._router.registration.expected[url] = "it died and will be started again"

    def _give_up(self) -> None:
        """No worker can start: end as if asked to, but with exit code 1."""
        self.hopeless = True
        logger.error("No worker can start: giving up.")
        os.kill(os.getpid(), signal.SIGTERM)


# ---- flags -------------------------------------------------------------------------------------


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Launch:
    """Read the command line.

    Raises:
        ConfigError, RouterConfigError, LayoutError: it cannot be served; one sentence.
    """
    parser = make_parser()
    parser.prog = "launch_server.py"
    parser.description = (
        "Serve a model with replicas behind the router: all flags of serve.py, and those of "
        "launch_router.py with the prefix --router-."
    )
    parser.epilog = (
        "Examples: launch_server.py --model-path DIR --tp 2 --dp-size 4 (four workers of two "
        "devices); launch_server.py --model-path DIR --tp 8 --dp-size 8 --enable-dp-attention (one "
        "worker, the router addresses its eight ranks)."
    )
    add_router_flags(parser, PREFIX)
    parser.add_argument(
        f"--{PREFIX}dp-worker-base-port",
        type=int,
        default=BASE_PORT,
        help=f"the first port that is tried for a worker (default: {BASE_PORT})",
    )
    args = vars(parser.parse_args(list(argv)))
    dp_size, tp_size = (1 if args[n] is None else args[n] for n in ("dp_size", "tp_size"))
    attention = args["enable_dp_attention"] or args["attn_dp_size"] is not None
    replicas = 1 if attention else dp_size
    if replicas < 1 or tp_size < 1:
        raise ConfigError(f"--dp-size and --tp must be positive, got {dp_size} and {tp_size}.")
    engine = engine_flags(argv, with_dp_size=attention)
    if replicas > 1 and args["tp_size"] is None:
        engine = [*engine, "--tp-size", "1"]
    config = parse_engine_args([*engine, *_address(args)])
    if config.dry_run:
        raise ConfigError("--dry-run belongs to serve.py: it tells of one worker.")
    if not config.all_devices:
        make_layout(config.tp_size, config.dp_size, config.ep_size)
    shared: dict[str, Any] = {"host": config.host, "port": config.port}
    if attention and config.dp_size > 1:
        shared["dp_aware"] = True
    # Where serve.py has keys, a client's is the router's as well, unless that has its own.
    client_key = getattr(config, "api_key", None)
    if client_key is not None and args["router_api_key"] is None:
        shared["api_key"] = client_key
    router = router_config(args, PREFIX, **shared)
    if router.worker_urls or router.service_discovery:
        raise ConfigError(
            "--router-worker-urls and --router-service-discovery name workers that run already: "
            "use launch_router.py for those; launch_server.py starts its own."
        )
    return Launch(
        router=router,
        engine=tuple(engine),
        num_workers=replicas,
        devices=_devices(replicas, tp_size, args["device"], environ),
        base_port=args["router_dp_worker_base_port"],
        worker_key=getattr(config, "admin_api_key", None) or client_key,
        cache_dir=Path(config.compilation_cache_dir or default_compilation_cache_dir()),
    )


def engine_flags(argv: Sequence[str], *, with_dp_size: bool) -> list[str]:
    """The arguments that are for the workers: what is left without the router's and the address."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_router_flags(parser, PREFIX)
    parser.add_argument(f"--{PREFIX}dp-worker-base-port")
    parser.add_argument("--host")
    parser.add_argument("--port")
    if not with_dp_size:
        parser.add_argument("--dp-size", "--dp", "--data-parallel-size")
    return parser.parse_known_args(list(argv))[1]


def _address(args: Mapping[str, Any]) -> list[str]:
    """The flags of the address, as given; serve.py's defaults and checks are ours."""
    given = [("--host", args["host"]), ("--port", args["port"])]
    return [part for name, value in given if value is not None for part in (name, str(value))]


def _devices(
    num_workers: int, tp_size: int, device: str | None, environ: Mapping[str, str]
) -> tuple[str, ...]:
    """CUDA_VISIBLE_DEVICES of each worker; nothing where there are no GPUs to share.

    Raises:
        ConfigError: there are not enough GPUs.
    """
    if num_workers == 1 or device == "cpu" or environ.get("JAX_PLATFORMS") == "cpu":
        return ()
    if device == "tpu":
        raise ConfigError(
            "--dp-size without --enable-dp-attention shares GPUs out to workers; on a TPU use "
            "--enable-dp-attention, or start one serve.py for each host and launch_router.py."
        )
    gpus = visible_gpus(environ)
    if not gpus:
        return ()
    needed = num_workers * tp_size
    if len(gpus) < needed:
        raise ConfigError(
            f"--dp-size {num_workers} workers of --tp {tp_size} devices need {needed} GPUs, and "
            f"there are {len(gpus)}."
        )
    return tuple(",".join(gpus[i : i + tp_size]) for i in range(0, needed, tp_size))


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip() and name.strip() != "-1"]
    # Without loading CUDA here: this process must not take memory of a GPU.
    found = list(Path("/dev").glob("nvidia[0-9]*"))
    return [str(i) for i in range(len(found))]


# ---- processes ---------------------------------------------------------------------------------


def worker_process(launch: Launch, index: int, port: int, command: Sequence[str]) -> WorkerProcess:
    """How one worker is started, on this port as long as nobody else takes it."""
    # The packages next to this script, whatever may be installed besides.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {"SGLANG_DP_RANK": str(index), "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    if launch.devices:
        env["CUDA_VISIBLE_DEVICES"] = launch.devices[index]
    ports = free_ports(port)

    def start() -> tuple[str, list[str]]:
        nonlocal port
        if not _is_free(port):
            port = next(ports)
        address = ["--host", WORKER_HOST, "--port", str(port)]
        return f"http://{WORKER_HOST}:{port}", [*command, *launch.engine, *address]

    return WorkerProcess(name=f"worker {index}", command=start, env=env)


def free_ports(first: int) -> Iterator[int]:
    """Ports that are free when they are asked for, from the first one up.

    Raises:
        StartError: there are none.
    """
    for port in range(first, min(first + PORTS_TRIED, 65536)):
        if _is_free(port):
            yield port
    raise StartError(
        f"No port from {first} to {first + PORTS_TRIED} is free: choose others with "
        "--router-dp-worker-base-port."
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((WORKER_HOST, port))
        except OSError:
            return False
    return True


def first_alone(launch: Launch) -> bool:
    """Whether the first worker should compile alone, and the others read what it has compiled.

    Only where nothing is compiled yet: with all there, two workers of the demo model on two cores
    took 29 s one after another and 18 s together.
    """
    if (os.cpu_count() or 1) >= CORES_EACH * launch.num_workers:
        return False
    return launch.num_workers > 1 and not any(launch.cache_dir.glob("*"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
