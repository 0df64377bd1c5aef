"""The engine as a child process: started with its configuration, watched, stopped in bounded time.

The child is `python -m serving.engine SOCKET`. It reads the `ServerConfig` as JSON from its
standard input, connects to the socket and says Ready or Failed there; its output is ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Sequence

import msgspec

from serving.config import ServerConfig
from serving.engine_client import CONNECTION_LOST, EngineClient, EngineFailed, engine_listener

ENGINE_COMMAND = (sys.executable, "-m", "serving.engine")
LAST_WORDS_S = 1.0
"""How long the other half of an ending (exit code, last message) may take after the first."""


class EngineProcess:
    """A running engine: its process and the client to talk to it. Made by `launch`."""

    def __init__(self, *, process: asyncio.subprocess.Process, client: EngineClient) -> None:
        self.client = client
        self._process = process

    @classmethod
    async def launch(
        cls, config: ServerConfig, command: Sequence[str] = ENGINE_COMMAND
    ) -> EngineProcess:
        """Start an engine and wait until it is ready. Cancelling this ends the child.

        Raises:
            EngineFailed: it said why it cannot start, or ended without a word.
        """
        with engine_listener() as (listener, path):
            process = await _spawn(*command, path)
            try:
                await _write_config(process, config)
                return cls(process=process, client=await _until_ready(process, listener))
            except BaseException:
                await _end(process)
                raise

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_failed(self) -> str:
        """Wait until the engine is gone; one sentence why. Its streams have failed by then."""
        closed = asyncio.create_task(self.client.wait_closed())
        exited = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({closed, exited}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({closed, exited}, timeout=LAST_WORDS_S)
            if exited.done():
                self.client.fail(_obituary(exited.result()))
                if self.client.failure == CONNECTION_LOST:
                    return _obituary(exited.result())
            return self.client.failure or CONNECTION_LOST
        finally:
            closed.cancel()
            exited.cancel()

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Ask the engine to exit, wait that long, then end it."""
        await self.client.shutdown()
        try:
            await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            await _end(self._process)


async def _spawn(*command: str) -> asyncio.subprocess.Process:
    """The child, in a session of its own: Ctrl-C in a terminal then reaches the front only, which
    ends the child in order. Cancelling this midway leaves no child behind."""
    spawning = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
    )
    try:
        return await asyncio.shield(spawning)
    except asyncio.CancelledError:
        await _end(await spawning)
        raise


async def _write_config(process: asyncio.subprocess.Process, config: ServerConfig) -> None:
    assert process.stdin is not None
    # A child that is gone already says so by its exit code.
    with contextlib.suppress(ConnectionError):
        process.stdin.write(msgspec.json.encode(config.without_secrets()))
        await process.stdin.drain()
        process.stdin.close()


async def _until_ready(
    process: asyncio.subprocess.Process, listener: socket.socket
) -> EngineClient:
    """The client of the child that is starting, or EngineFailed as soon as it ends."""
    connected = asyncio.create_task(EngineClient.connect(listener))
    exited = asyncio.create_task(process.wait())
    try:
        await asyncio.wait({connected, exited}, return_when=asyncio.FIRST_COMPLETED)
        if not connected.done():
            await asyncio.wait({connected}, timeout=LAST_WORDS_S)
        elif connected.exception() is not None:
            await asyncio.wait({exited}, timeout=LAST_WORDS_S)
        if connected.done():
            error = connected.exception()
            if error is None or str(error) != CONNECTION_LOST or not exited.done():
                return connected.result()
        raise EngineFailed(_obituary(exited.result(), " before it was ready"))
    finally:
        connected.cancel()
        exited.cancel()
        await asyncio.gather(connected, exited, return_exceptions=True)


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and SIGKILL where that is not enough."""
    for send in (process.terminate, process.kill):
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                send()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), LAST_WORDS_S)


def _obituary(code: int, when: str = "") -> str:
    if code >= 0:
        return f"The engine process ended with exit code {code}{when}."
    hint = " (the system may have run out of memory)" if code == -signal.SIGKILL else ""
    return f"The engine process was ended by {signal.Signals(-code).name}{when}{hint}."
