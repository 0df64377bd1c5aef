"""Worker processes: started, watched, restarted when they die, and ended to the last one.

A worker counts as up when its health endpoint answers. It promises that whoever is told of that is
told when the worker dies, too; that a worker that dies comes back, after a pause that doubles as
long as it does not stay; that workers that cannot start are given up with the reason they gave;
and that `stop` leaves none behind: SIGTERM first, after a while SIGKILL to the process and all it
started. What a worker prints goes on, each line behind the worker's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from router.upstream import Upstream, probe

CHECK_S = 0.2
"""Seconds between two looks at a worker that is starting."""
CHECK_TIMEOUT_S = 5.0
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
STAYED_S = 60.0
"""A worker that was up for so long starts again with the shortest pause."""
MAX_FAILED_STARTS = 3
STOP_S = 20.0
"""How long a worker may take to end: it lets its running answers finish for 10 s."""
KILL_AFTER_S = 5.0
"""The same for one that took too long to start."""
LAST_WORDS = 5
LINE_BYTES = 65_536

PARENT_DEATH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Linux: asks for SIGTERM when the parent dies (SIGKILL leaves it no other way to say so)."""

logger = logging.getLogger("meshserve.router")

Command = Callable[[], "tuple[str, Sequence[str]]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProcess:
    """How one worker is started.

    Attributes:
        name: what stands before its lines.
        command: called for every start: (URL, arguments), as its port may be taken meanwhile.
        env: added to the environment.
    """

    name: str
    command: Command
    env: Mapping[str, str]


class Supervisor:
    """Runs workers until `stop`.

    Args:
        on_start: told the URL of a worker whose process has begun.
        on_up: told the URL of a worker that answers; again after every restart.
        on_down: told the URL of one that was up and died.
        on_hopeless: called once, when no worker is up and none could start three times in a row.
        first_alone: the first worker starts alone, and the others when it is up or has failed.
        pause_s: the shortest pause before a restart.
    """

    def __init__(
        self,
        workers: Sequence[WorkerProcess],
        *,
        upstream: Upstream,
        on_start: Callable[[str], None],
        on_up: Callable[[str], Awaitable[None]],
        on_down: Callable[[str], Awaitable[None]],
        on_hopeless: Callable[[], None],
        startup_timeout_s: float,
        health_path: str = "/health",
        first_alone: bool = False,
        pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._upstream = upstream
        self.on_start = on_start
        self._on_up = on_up
        self._on_down = on_down
        self._on_hopeless = on_hopeless
        self._startup_timeout_s = startup_timeout_s
        self._health_path = health_path
        self._first_alone = first_alone
        self._pause_s = pause_s
        self._workers = [_Supervised(spec, self) for spec in workers]
        self._tasks: list[asyncio.Task[None]] = []
        self._hopeless = False

    @property
    def num_up(self) -> int:
        """Workers that are up now."""
        return sum(worker.up for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [w.process.pid for w in self._workers if w.process is not None]

    async def start(self) -> None:
        """Begin to start the workers; returns at once."""
        gate = asyncio.Event()
        for i, worker in enumerate(self._workers):
            wait = gate if self._first_alone and i else None
            worker.started = gate if self._first_alone and not i else None
            self._tasks.append(asyncio.create_task(worker.run(wait)))

    async def stop(self) -> None:
        """End every worker; returns when none is left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.end(STOP_S) for worker in self._workers))

    # what follows is for the workers

    async def healthy(self, url: str) -> bool:
        """Whether a worker answers that it is well."""
        problem = await probe(self._upstream, url, self._health_path, timeout=CHECK_TIMEOUT_S)
        return problem is None

    async def came_up(self, url: str) -> None:
        """A worker answers."""
        await self._on_up(url)
        logger.info("%d of %d workers are up.", self.num_up, len(self._workers))

    async def died(self, url: str) -> None:
        """A worker that was up is gone."""
        self._upstream.forget(url)
        await self._on_down(url)

    def look_for_hope(self) -> None:
        """A worker failed to start once more."""
        if not self._hopeless and all(
            not w.up and w.failed_starts >= MAX_FAILED_STARTS for w in self._workers
        ):
            self._hopeless = True
            self._on_hopeless()

    @property
    def pause_s(self) -> float:
        return self._pause_s

    @property
    def startup_timeout_s(self) -> float:
        return self._startup_timeout_s


class _Supervised:
    """One worker over all its lives."""

    def __init__(self, spec: WorkerProcess, supervisor: Supervisor) -> None:
        self._spec = spec
        self._supervisor = supervisor
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._kin: set[tuple[int, str]] = set()
        self._reader: asyncio.Task[None] | None = None
        self.process: asyncio.subprocess.Process | None = None
        self.started: asyncio.Event | None = None
        self.up = False
        self.failed_starts = 0

    async def run(self, wait: asyncio.Event | None) -> None:
        """Keep the worker running until this is cancelled."""
        if wait is not None:
            await wait.wait()
        pause = self._supervisor.pause_s
        while True:
            began = time.monotonic()
            try:
                was_up = await self._live()
            except OSError as error:
                was_up = False
                self._complain(f"it cannot be started: {error}")
            if self.started is not None:
                self.started.set()
            if was_up and time.monotonic() - began >= STAYED_S:
                pause = self._supervisor.pause_s
            await self.end(KILL_AFTER_S)
            logger.warning("%s starts again in %.1f s.", self._spec.name, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_S)

    async def end(self, patience_s: float) -> None:
        """End the process, if there is one, and everything it started."""
        process = self.process
        if process is None:
            return
        self._note_kin()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience_s)
        if process.returncode is None:
            logger.warning("%s did not end within %g s: SIGKILL.", self._spec.name, patience_s)
        # The group has the leader's id, and outlives it as long as it has members.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid, born in self._kin:
            if _born(pid) == born:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        self._kin.clear()
        await process.wait()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self.process = self._reader = None

    async def _live(self) -> bool:
        """One life of the worker, to its end; whether it came up."""
        url, command = self._spec.command()
        self._supervisor.on_start(url)
        self._last_words.clear()
        process = await _spawn(command, self._spec.env)
        self.process = process
        self._reader = asyncio.create_task(self._read(process))
        exited = asyncio.create_task(process.wait())
        try:
            if not await self._until_up(url, exited):
                return False
            self.failed_starts = 0
            self.up = True
            self._note_kin()
            telling = asyncio.create_task(self._supervisor.came_up(url))
            if self.started is not None:
                self.started.set()
            try:
                # Whoever is told may wait for a worker that is dead already.
                await asyncio.wait({telling, exited}, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.shield(exited)
            finally:
                self.up = False
                telling.cancel()
                (told,) = await asyncio.gather(telling, return_exceptions=True)
                if isinstance(told, Exception):
                    logger.error("%s could not be announced.", self._spec.name, exc_info=told)
                if exited.done():
                    await self._supervisor.died(url)
            await self._hear_out()
            self._complain(_ending(process.returncode), starting=False)
            return True
        finally:
            exited.cancel()

    async def _until_up(self, url: str, exited: asyncio.Task[int]) -> bool:
        """Wait until the worker answers; False if it ended, or took too long."""
        deadline = time.monotonic() + self._supervisor.startup_timeout_s
        while not exited.done():
            self._note_kin()
            if await self._supervisor.healthy(url) and not exited.done():
                return True
            if time.monotonic() > deadline:
                self._complain(f"it did not answer within {self._supervisor.startup_timeout_s:g} s")
                return False
            await asyncio.wait({exited}, timeout=CHECK_S)
        await self._hear_out()
        self._complain(_ending(exited.result()))
        return False

    def _complain(self, reason: str, *, starting: bool = True) -> None:
        """Say why a life ended."""
        words = "".join(f"\n    {line}" for line in self._last_words)
        name = self._spec.name
        if not starting:
            logger.error("%s died: %s. Its last words:%s", name, reason, words or " none")
            return
        self.failed_starts += 1
        logger.error("%s did not start: %s. Its last words:%s", name, reason, words or " none")
        if self.failed_starts == MAX_FAILED_STARTS:
            logger.error(
                "%s could not start %d times in a row (%s); %s",
                name,
                MAX_FAILED_STARTS,
                self._last_words[-1] if self._last_words else reason,
                "it is tried again, ever more rarely.",
            )
        self._supervisor.look_for_hope()

    async def _hear_out(self) -> None:
        """The last lines of a process that ended may still be under way."""
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=1.0)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Pass on what the worker prints, line by line."""
        assert process.stdout is not None
        rest = b""
        while data := await process.stdout.read(LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > LINE_BYTES:
                lines.append(rest)
                rest = b""
            self._print(lines)
        if rest:
            self._print([rest])

    def _print(self, lines: Sequence[bytes]) -> None:
        name = self._spec.name
        texts = [line.decode(errors="replace").rstrip("\r") for line in lines]
        self._last_words.extend(text for text in texts if text.strip())
        # Whole lines in one write: those of several workers must not mix.
        sys.stdout.write("".join(f"[{name}] {text}\n" for text in texts))
        sys.stdout.flush()

    def _note_kin(self) -> None:
        """Remember what the process started, to end that too: it may be in a group of its own."""
        if self.process is not None and self.process.returncode is None:
            self._kin.update((pid, _born(pid)) for pid in _descendants(self.process.pid))


async def _spawn(command: Sequence[str], env: Mapping[str, str]) -> asyncio.subprocess.Process:
    """A process in a session of its own: Ctrl-C in a terminal must not reach it before its clients
    had their answers. Cancelling this midway leaves none behind."""
    if sys.platform == "linux":
        command = [sys.executable, "-c", PARENT_DEATH, str(os.getpid()), *command]
    spawning = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,
        )
    )
    try:
        return await asyncio.shield(spawning)
    except asyncio.CancelledError:
        process = await spawning
        process.kill()
        await process.wait()
        raise


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (the system may have run out of memory)" if code == -signal.SIGKILL else ""
        return f"it was ended by {signal.Signals(-code).name}{hint}"
    return f"it ended with exit code {code}"


def _descendants(pid: int) -> list[int]:
    """The processes that this one started, and those started by them (none without /proc)."""
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        children: list[int] = []
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children += map(int, task.read_text().split())
        found += children
        waiting += children
    return found


def _born(pid: int) -> str:
    """When a process started, as the system counts it: ids are used again. Empty if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]
