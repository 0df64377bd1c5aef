"""Worker processes under supervision: order, patience, and what is passed on of their words."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from router.supervisor import Supervisor, WorkerProcess
from router.upstream import Upstream
from scripts.launch_server import first_alone, parse
from tests.router.support import run

pytestmark = pytest.mark.timeout(60)

FAKE = str(Path(__file__).with_name("fake_serve.py"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fake(index):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, FAKE, "--host", "127.0.0.1", "--port", str(port)]
    return WorkerProcess(
        name=f"worker {index}",
        command=lambda: (url, command),
        env={"SGLANG_DP_RANK": str(index)},
    )


def saying(program):
    """A worker that is no server, but a line of Python."""
    return WorkerProcess(
        name="worker 0",
        command=lambda: ("http://127.0.0.1:1", [sys.executable, "-c", program]),
        env={},
    )


class Heard:
    """What a supervisor tells, in order."""

    def __init__(self):
        self.events = []
        self.hopeless = 0

    def start(self, url):
        self.events.append(("start", url))

    async def up(self, url):
        self.events.append(("up", url))

    async def down(self, url):
        self.events.append(("down", url))

    def give_up(self):
        self.hopeless += 1

    def kinds(self):
        return [kind for kind, _ in self.events]


@contextlib.asynccontextmanager
async def supervised(*specs, **options):
    heard, upstream = Heard(), Upstream()
    fields = {"startup_timeout_s": 20.0, "pause_s": 0.05, **options}
    supervisor = Supervisor(
        specs,
        upstream=upstream,
        on_start=heard.start,
        on_up=heard.up,
        on_down=heard.down,
        on_hopeless=heard.give_up,
        **fields,
    )
    await supervisor.start()
    try:
        yield supervisor, heard
    finally:
        await supervisor.stop()
        await upstream.close()
        assert supervisor.pids == []


async def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("alone", [True, False])
def test_the_first_worker_may_start_alone(alone):
    async def main():
        async with supervised(fake(0), fake(1), first_alone=alone) as (supervisor, heard):
            await until(lambda: supervisor.num_up == 2)
            order = ["start", "up", "start", "up"] if alone else ["start", "start", "up", "up"]
            await until(lambda: heard.kinds() == order)

    run(main, 50)


def test_a_worker_that_dies_before_it_is_registered_is_started_again():
    """Whoever registers it would wait for it for half an hour."""

    async def main():
        async with supervised(fake(0)) as (supervisor, heard):
            waiting = []

            async def never(url):
                waiting.append(url)
                await asyncio.Event().wait()

            supervisor._on_up = never
            await until(lambda: waiting)
            os.kill(supervisor.pids[0], signal.SIGKILL)
            await until(lambda: heard.kinds() == ["start", "down", "start"])
            supervisor._on_up = heard.up

    run(main, 50)


def test_the_others_do_not_wait_for_a_first_one_that_fails():
    async def main():
        async with supervised(saying("exit(1)"), fake(1), first_alone=True) as (_, heard):
            await until(lambda: "up" in heard.kinds())
            assert not heard.hopeless

    run(main, 50)


def test_a_worker_that_never_answers_is_ended_and_given_up(caplog):
    async def main():
        program = "import time; print('waiting', flush=True); time.sleep(600)"
        async with supervised(saying(program), startup_timeout_s=0.5) as (_, heard):
            await until(lambda: heard.hopeless)
            assert heard.kinds()[:3] == ["start"] * 3
            assert "it did not answer within 0.5 s" in caplog.text
            assert "could not start 3 times in a row (waiting)" in caplog.text
            # It goes on trying, and says that there is no hope once.
            await until(lambda: len(heard.events) >= 4)
            assert heard.hopeless == 1

    run(main, 50)


def test_words_of_workers_have_its_name_before_every_line(capsys):
    async def main():
        program = "import time; print('a'); print('b' * 200000); print('c', end='', flush=True)"
        async with supervised(saying(program)) as (_, heard):
            await until(lambda: heard.kinds().count("start") >= 2)

    run(main, 50)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[worker 0] a"
    assert all(line.startswith("[worker 0] ") for line in lines)
    assert "[worker 0] c" in lines
    assert sum(line.count("b") for line in lines[:6]) >= 200_000


def test_a_program_that_is_not_there(caplog):
    async def main():
        spec = WorkerProcess(
            name="worker 0", command=lambda: ("http://127.0.0.1:1", ["/nowhere/python"]), env={}
        )
        async with supervised(spec) as (_, heard):
            await until(lambda: heard.hopeless)

    run(main, 50)
    assert "did not start" in caplog.text


def test_a_cold_cache_and_few_cores_mean_one_worker_first(tmp_path, monkeypatch):
    launch = replace(parse(["--device", "cpu", "--dp-size", "2"], {}), cache_dir=tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert first_alone(launch)
    (tmp_path / "program").touch()
    assert not first_alone(launch)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert not first_alone(replace(launch, cache_dir=tmp_path / "nothing"))
