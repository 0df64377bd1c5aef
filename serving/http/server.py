"""The front process from start to end: tokenizer, port, engine, uvicorn, and an orderly exit.

`run` does what fails fast first, prints what a person at a terminal wants to know, and returns the
process's exit code: 0 after SIGINT or SIGTERM, 1 with one sentence when it cannot go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import random
import shlex
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import uvicorn
import uvloop

from serving.config import ServerConfig
from serving.engine_client import EngineFailed
from serving.engine_process import ENGINE_COMMAND, EngineProcess
from serving.grammar import GrammarCompiler
from serving.http.app import make_app
from serving.http.bounded import BoundedHttp
from serving.http.sampling import SamplingDefaults
from serving.http.state import ServerState
from serving.tokenizer import Tokenizer, TokenizerError

T = TypeVar("T")

LAST_WORDS_S = 5.0
"""How long the error events of cut answers may take to leave, after the grace period."""
BACKLOG = 2048
KEEP_ALIVE_S = 75
"""How long an idle connection stays, as at the router: clearly longer than clients keep theirs
(httpx, so the openai package too: 5 s). Where both close at the same moment, a request is lost."""
GRAMMARS_AFTER_S = 1.0
"""When to build what checks grammars, counted from the engine's launch."""


class StartError(RuntimeError):
    """The server cannot start; one sentence."""


def run(config: ServerConfig, *, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serve until a signal or a failure; the process's exit code."""
    # Its life-cycle messages repeat what is printed here.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        tokenizer = Tokenizer.load(
            config.model_path,
            tokenizer_path=config.tokenizer_path,
            chat_template=config.chat_template,
        )
        defaults = SamplingDefaults.from_folder(config.model_path)
        with _bind(config.host, config.port) as listener:
            server = _Front(config, tokenizer, defaults, listener)
            return uvloop.run(server.serve(engine_command))
    except (TokenizerError, StartError, EngineFailed) as error:
        print(f"serve.py: error: {error}", file=sys.stderr, flush=True)
        return 1


class _Front:
    """One run of the server: everything between having a port and giving it back."""

    def __init__(
        self,
        config: ServerConfig,
        tokenizer: Tokenizer,
        defaults: SamplingDefaults,
        listener: socket.socket,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._listener = listener
        self._grammars: GrammarCompiler | None = None
        self._stop = asyncio.Event()
        self._signals = 0

    async def serve(self, engine_command: Sequence[str]) -> int:
        """Start the engine and serve; exit code 0.

        Raises:
            EngineFailed: the engine did not start, or ended.
            StartError: the port was taken meanwhile.
        """
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._on_signal)
        _say(f"Starting the engine for {self._config.model_name} ({self._config.model_path}) ...")
        began = time.monotonic()
        # Its tables hold the interpreter lock for a second: the engine must be on its way by then.
        loop.call_later(GRAMMARS_AFTER_S, self._start_grammars)
        engine = await _unless_set(self._stop, EngineProcess.launch(self._config, engine_command))
        if engine is None:
            return 0
        try:
            _say(f"The engine is ready after {time.monotonic() - began:.1f} s.")
            await self._serve_http(engine)
        finally:
            await engine.stop()
        return 0

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()

    def _start_grammars(self) -> None:
        if self._grammars is None and self._config.grammar_backend != "none":
            self._grammars = GrammarCompiler(lambda: self._tokenizer)

    async def _serve_http(self, engine: EngineProcess) -> None:
        config = self._config
        self._start_grammars()
        try:
            self._listener.listen(BACKLOG)
        except OSError:
            raise StartError(_port_taken(config.host, config.port)) from None
        state = ServerState(
            config=config,
            tokenizer=self._tokenizer,
            engine=engine.client,
            grammars=self._grammars,
            defaults=self._defaults,
            seeds=random.Random(config.random_seed),
            started=time.time(),
        )
        longest_stop_s = config.shutdown_grace_period_secs + LAST_WORDS_S
        server = _Uvicorn(
            uvicorn.Config(
                make_app(state),
                http=BoundedHttp,
                ws="none",
                lifespan="off",
                access_log=False,
                server_header=False,
                log_config=None,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(longest_stop_s),
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        stopped = asyncio.create_task(self._stop.wait())
        failed = asyncio.create_task(engine.wait_failed())
        watching = asyncio.create_task(state.loads.watch())
        try:
            self._announce(engine)
            await asyncio.wait({serving, stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
            state.stopping = True
            server.should_exit = True
            if not failed.done():
                _say("Stopping: running answers may finish.")
                await self._drain(server, serving, failed)
                engine.client.fail("The server is shutting down.")
            await serving
            if failed.done() and not stopped.done():
                raise EngineFailed(failed.result())
        finally:
            tasks = (serving, stopped, failed, watching)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(
        self, server: _Uvicorn, serving: asyncio.Task[None], failed: asyncio.Task[str]
    ) -> None:
        """Wait for running answers: until they end, the grace is over, or a second signal."""
        deadline = time.monotonic() + self._config.shutdown_grace_period_secs
        while time.monotonic() < deadline and self._signals < 2:
            done, _ = await asyncio.wait({serving, failed}, timeout=0.1)
            if done:
                return

    def _announce(self, engine: EngineProcess) -> None:
        ready = engine.client.ready
        host, port = self._listener.getsockname()[:2]
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1" if host == "0.0.0.0" else "::1"
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        body: dict[str, object] = {"model": self._config.model_name}
        if self._tokenizer.has_chat_template:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": "Tell me a story about a kite."}]
        else:
            path = "/v1/completions"
            body["prompt"] = "Once upon a time"
        body["max_tokens"] = min(200, max(1, ready.max_context_tokens // 2))
        _say(ready.topology)
        _say(f"Serving {self._config.model_name} at {url}. Stop with Ctrl-C. Try:\n")
        _say(
            f"  curl {url}{path} -H 'Content-Type: application/json' "
            f"-d {shlex.quote(json.dumps(body))}\n"
        )


class _Uvicorn(uvicorn.Server):
    """uvicorn, but signals are ours: its own handlers raise them again once it has stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to the port, not listening yet: clients are refused until the engine is ready.

    Raises:
        StartError: the port is in use, or the address is not ours.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartError(f"--host {host} is no address of this machine: {error}.") from None
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartError(_port_taken(host, port)) from None
        raise StartError(f"Cannot listen on {host}:{port}: {error.strerror}.") from None
    return listener


def _port_taken(host: str, port: int) -> str:
    return f"Port {port} on {host} is already in use: choose another with --port."


async def _unless_set(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None (and `work` cancelled) once the event is set."""
    task = asyncio.create_task(work)
    waiter = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        waiter.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)


def _say(line: str) -> None:
    print(line, flush=True)
