"""The engine process: `python -m serving.engine SOCKET`, configuration as JSON on stdin.

It connects to the front's socket, says Ready or Failed, then alternates between reading messages
and running steps. It exits when told to, or when the front is gone.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import msgspec

from serving.config import ConfigError, ServerConfig, default_compilation_cache_dir
from serving.messages import (
    HEADER,
    Failed,
    GetPulse,
    Pulse,
    Ready,
    Shutdown,
    ToEngine,
    ToFront,
    decode_to_engine,
    frame,
)

log = logging.getLogger("meshserve.engine")


class Connection:
    """The socket to the front: a thread reads whole messages into a queue, others write.

    Attributes:
        starting: while set, a front that goes away ends this process at once (loading and
            compiling cannot be interrupted otherwise).
        pulse: how long the step loop has been busy without progress, in seconds; set by the loop.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._writing = threading.Lock()
        self.starting = True
        self.pulse: Callable[[], float] = lambda: 0.0
        self.inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="front-reader").start()

    def send(self, message: ToFront) -> None:
        data = frame(message)
        with self._writing:
            self._socket.sendall(data)

    def _read(self) -> None:
        """Messages until the front closes (or breaks) the connection; then Shutdown.

        A question for the pulse is answered here, where a step that hangs cannot hinder it.
        """
        try:
            with self._socket.makefile("rb") as stream:
                while header := stream.read(HEADER.size):
                    (length,) = HEADER.unpack(header)
                    message = decode_to_engine(stream.read(length))
                    if isinstance(message, GetPulse):
                        self.send(Pulse(token=message.token, busy_s=self.pulse()))
                    else:
                        self.inbox.put(message)
        except (OSError, msgspec.DecodeError) as error:
            log.error("connection to the front broke: %s", error)
        if self.starting:
            os._exit(1)
        self.inbox.put(Shutdown())


def main() -> int:
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=ServerConfig)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    logging.getLogger("meshserve").setLevel(config.log_level.upper())
    if config.compilation_cache_dir is None:
        config = replace(config, compilation_cache_dir=default_compilation_cache_dir())
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    connection = Connection(sock)
    # Imported after the environment is set: these load JAX.
    from model.checkpoint import CheckpointError
    from model.config import UnsupportedModelError
    from serving.engine.engine import CompileCounter, configure_jax, describe, make_engine
    from serving.engine.loop import EngineLoop
    from sharding.layout import LayoutError

    try:
        configure_jax(config)
        engine = make_engine(config)
    except (CheckpointError, UnsupportedModelError, LayoutError, ConfigError) as error:
        connection.send(Failed(str(error)))
        return 1
    except Exception as error:
        log.exception("the engine could not start")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        connection.send(Failed(f"The engine could not start: {reason}"))
        return 1
    topology, details = describe(engine.runner)
    # What is here now stays: the collector need not walk it again and again between steps.
    gc.collect()
    gc.freeze()
    compiles = CompileCounter()
    connection.starting = False
    try:
        connection.send(
            Ready(
                max_context_tokens=engine.runner.max_context,
                max_total_tokens=(engine.runner.num_pages - 1) * engine.runner.page_size,
                num_slices=engine.runner.layout.num_slices,
                topology=topology,
                details=details,
            )
        )
        EngineLoop(engine, connection, compiles).run(config)
    except ConnectionError:
        return 1  # the front is gone; nobody is left to tell
    except Exception as error:
        log.exception("the step loop failed")
        with contextlib.suppress(ConnectionError):
            connection.send(Failed(f"The engine failed: {type(error).__name__}: {error}"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
