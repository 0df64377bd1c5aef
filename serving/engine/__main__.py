"""The engine process: `python -m serving.engine SOCKET`, configuration as JSON on stdin.

It connects to the front's socket, says Ready or Failed, then alternates between reading messages
and running steps. It exits when told to, or when the front is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from serving.config import ConfigError, ServerConfig, default_compilation_cache_dir
from serving.messages import (
    HEADER,
    Abort,
    EngineStatus,
    Failed,
    GetStatus,
    Ready,
    Shutdown,
    SliceStatus,
    StepOutput,
    Submit,
    ToEngine,
    ToFront,
    TokenEvent,
    decode_to_engine,
    frame,
)

if TYPE_CHECKING:
    from serving.engine.engine import CompileCounter, Engine
    from serving.scheduler.scheduler import TokenOutcome

log = logging.getLogger("meshserve.engine")


class Connection:
    """The socket to the front: a thread reads whole messages into a queue, the loop writes.

    Attributes:
        starting: while set, a front that goes away ends this process at once (loading and
            compiling cannot be interrupted otherwise).
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.starting = True
        self.inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="front-reader").start()

    def send(self, message: ToFront) -> None:
        self._socket.sendall(frame(message))

    def _read(self) -> None:
        """Messages until the front closes (or breaks) the connection; then Shutdown."""
        try:
            with self._socket.makefile("rb") as stream:
                while header := stream.read(HEADER.size):
                    (length,) = HEADER.unpack(header)
                    self.inbox.put(decode_to_engine(stream.read(length)))
        except (OSError, msgspec.DecodeError) as error:
            log.error("connection to the front broke: %s", error)
        if self.starting:
            os._exit(1)
        self.inbox.put(Shutdown())


class EngineLoop:
    """Messages in, steps, token events out."""

    def __init__(self, engine: Engine, connection: Connection, compiles: CompileCounter) -> None:
        self.engine, self.connection, self.compiles = engine, connection, compiles

    def run(self) -> None:
        """Until Shutdown arrives. Waits without spinning while there is no work."""
        while True:
            while not (self.connection.inbox.empty() and self.engine.has_work):
                message = self.connection.inbox.get()
                if isinstance(message, Shutdown):
                    return
                self._handle(message)
            outcomes = self.engine.step()
            if outcomes:
                self.connection.send(StepOutput([_event(o) for o in outcomes]))

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit(request):
                try:
                    self.engine.add(request)
                except ValueError as error:
                    event = TokenEvent(request.rid, None, "error", message=str(error))
                    self.connection.send(StepOutput([event]))
            case Abort(rid):
                self.engine.abort(rid)
            case GetStatus(token):
                self.connection.send(self._status(token))

    def _status(self, token: int) -> EngineStatus:
        return EngineStatus(
            token=token,
            waiting=self.engine.scheduler.num_waiting,
            steps=self.engine.steps,
            recompilations=self.compiles.count,
            slices=[
                SliceStatus(
                    dp_rank=load.dp_rank,
                    running=load.running,
                    used_tokens=load.used_tokens,
                    total_tokens=load.total_tokens,
                )
                for load in self.engine.status()
            ],
        )


def _event(outcome: TokenOutcome) -> TokenEvent:
    top = outcome.top_logprobs
    return TokenEvent(
        rid=outcome.rid,
        token_id=outcome.token_id,
        finish_reason=outcome.finish_reason,
        logprob=outcome.logprob,
        top_logprobs=None if top is None else list(top),
    )


def main() -> int:
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=ServerConfig)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    logging.getLogger("meshserve").setLevel(config.log_level.upper())
    # JAX reserves this share of a GPU when it starts; the pool is sized inside it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(config.mem_fraction_static))
    if config.compilation_cache_dir is None:
        config = replace(config, compilation_cache_dir=default_compilation_cache_dir())
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    connection = Connection(sock)
    # Imported after the environment is set: these load JAX.
    from model.checkpoint import CheckpointError
    from model.config import UnsupportedModelError
    from serving.engine.engine import CompileCounter, configure_jax, describe, make_engine
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
        EngineLoop(engine, connection, compiles).run()
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
