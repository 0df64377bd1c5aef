"""The front's side of the socket: streams, aborts, status, and every way an engine can end."""

import asyncio
import os
import stat
import struct
import sys
import time
from contextlib import aclosing

import pytest

from serving.config import ServerConfig
from serving.engine_client import EngineClient, EngineFailed, engine_listener
from serving.engine_process import EngineProcess
from serving.messages import StepOutput, TokenEvent
from serving.request import Request, SamplingParams
from tests.fakes import FakeEngine, answer, connected

pytestmark = pytest.mark.timeout(30)

FAKE = (sys.executable, "-m", "tests.fakes")


def make_request(rid="r", prompt=(1, 2, 3), max_tokens=8):
    return Request(rid=rid, prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens))


async def tokens_of(client, request):
    async with aclosing(client.generate(request)) as events:
        return [event.token_id async for event in events]


async def until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_many_streams_each_get_their_own_tokens():
    async def main():
        async with connected(FakeEngine()) as client:
            assert client.ready.max_context_tokens == 256
            requests = [make_request(f"r{i}", (i, 2), 1 + i % 13) for i in range(100)]
            got = await asyncio.gather(*(tokens_of(client, request) for request in requests))
            for request, tokens in zip(requests, got, strict=True):
                assert tokens == answer(request.prompt, request.sampling.max_tokens)
            assert client.num_open == 0

    asyncio.run(main())


def test_finished_requests_are_not_aborted_and_left_ones_are():
    async def main():
        engine = FakeEngine(delay_s=0.005)
        async with connected(engine) as client:
            await tokens_of(client, make_request("whole", max_tokens=2))
            async with aclosing(client.generate(make_request("left"))) as events:
                await anext(events)
            task = asyncio.create_task(tokens_of(client, make_request("cancelled", (1,), 200)))
            await until(lambda: "cancelled" in engine.running)
            task.cancel()
            await until(lambda: not engine.running)
            assert engine.aborted == ["left", "cancelled"]
            async with aclosing(client.generate(make_request("enough", (1,), 200))) as events:
                await anext(events)
                client.finish("enough")
            await until(lambda: not engine.running)
            assert engine.finished == ["enough"]
            assert engine.aborted == ["left", "cancelled"]
            client.finish("enough")  # harmless
            assert client.num_open == 0

    asyncio.run(main())


def test_two_live_requests_cannot_share_a_rid():
    async def main():
        async with connected(FakeEngine(hold=True)) as client:
            first = asyncio.create_task(tokens_of(client, make_request()))
            await until(lambda: client.num_open == 1)
            with pytest.raises(ValueError, match="already running"):
                await tokens_of(client, make_request())
            assert client.num_open == 1
            first.cancel()

    asyncio.run(main())


def test_events_of_forgotten_requests_are_dropped():
    async def main():
        engine = FakeEngine()
        async with connected(engine) as client:
            engine.send(StepOutput([TokenEvent("nobody", 5)]))
            assert await tokens_of(client, make_request()) == answer((1, 2, 3), 8)

    asyncio.run(main())


def test_status():
    async def main():
        engine = FakeEngine(hold=True)
        async with connected(engine) as client:
            task = asyncio.create_task(tokens_of(client, make_request()))
            await until(lambda: engine.running)
            answers = await asyncio.gather(client.status(), client.status())
            assert [len(a.slices) for a in answers] == [2, 2]
            assert (answers[0].waiting, answers[0].waiting_tokens) == (1, 3)
            task.cancel()

    asyncio.run(main())


def test_pulse_and_flush_are_answered_and_silence_is_noticed():
    async def main():
        engine = FakeEngine(busy_s=1.5)
        async with connected(engine) as client:
            assert client.silence_s == float("inf")
            assert (await client.pulse()).busy_s == 1.5
            await tokens_of(client, make_request())
            assert 0 <= client.silence_s < 5
            assert engine.cache
            assert await client.flush_cache() is True
            assert not engine.cache
            engine.hold = True
            task = asyncio.create_task(tokens_of(client, make_request()))
            await until(lambda: engine.running)
            assert await client.flush_cache() is False
            client.cancel("r")
            await task

    asyncio.run(main())


@pytest.mark.parametrize("question", ["status", "pulse", "flush_cache"])
def test_questions_without_an_answer_end(question):
    async def main():
        async with connected(FakeEngine(mute=True)) as client:
            with pytest.raises(EngineFailed, match=r"did not answer within 0\.05 s"):
                await getattr(client, question)(timeout_s=0.05)
            waiting = asyncio.create_task(getattr(client, question)())
            await asyncio.sleep(0.01)
            client.fail("Gone.")
            with pytest.raises(EngineFailed, match="Gone"):
                await waiting

    asyncio.run(main())


def test_cancelled_requests_end_with_abort_and_are_told_to_the_engine_once():
    async def main():
        engine = FakeEngine(delay_s=0.002)
        async with connected(engine) as client:

            async def events_of(rid):
                async with aclosing(client.generate(make_request(rid, max_tokens=200))) as events:
                    return [event async for event in events]

            tasks = [asyncio.create_task(events_of(rid)) for rid in ("a.0", "a.1", "b.0")]
            await until(lambda: len(engine.running) == 3)
            assert client.cancel("a.") == 2
            for task in tasks[:2]:
                last = (await task)[-1]
                assert (last.token_id, last.finish_reason) == (None, "abort")
            assert (await tasks[2])[-1].finish_reason == "length"
            assert sorted(engine.aborted) == ["a.0", "a.1"]
            assert client.cancel("a.") == 0

    asyncio.run(main())


def test_death_ends_every_stream_and_is_final():
    async def main():
        engine = FakeEngine(delay_s=0.005, die_after_steps=3)
        async with connected(engine) as client:
            streams = [tokens_of(client, make_request(f"r{i}")) for i in range(3)]
            results = await asyncio.gather(*streams, return_exceptions=True)
            assert [type(result) for result in results] == [EngineFailed] * 3
            assert await client.wait_closed() == "The engine process closed its connection."
            assert not client.alive
            with pytest.raises(EngineFailed):
                await tokens_of(client, make_request())
            with pytest.raises(EngineFailed):
                await client.status()
            client.abort("r0")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (struct.pack(">I", 3) + b"abc", "malformed"),
        (struct.pack(">I", 300) + b"abc", "closed its connection"),
        (b"", "closed its connection"),
    ],
)
def test_a_peer_that_talks_nonsense_before_it_is_ready(sent, reason):
    async def main():
        with engine_listener() as (listener, path):
            connecting = asyncio.create_task(EngineClient.connect(listener))
            _, writer = await asyncio.open_unix_connection(path)
            writer.write(sent)
            writer.close()
            with pytest.raises(EngineFailed, match=reason):
                await connecting

    asyncio.run(main())


def test_an_engine_that_cannot_start_says_why():
    async def main():
        with pytest.raises(EngineFailed, match="no such weights"):
            async with connected(FakeEngine(failure="There are no such weights.")):
                pass

    asyncio.run(main())


def test_only_this_user_may_enter_the_socket_folder():
    with engine_listener() as (_, path):
        folder = os.path.dirname(path)
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert not os.path.exists(folder)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_process_serves_and_stops():
    async def main():
        engine = await EngineProcess.launch(ServerConfig(), FAKE)
        assert await tokens_of(engine.client, make_request(max_tokens=3)) == answer((1, 2, 3), 3)
        await engine.stop()
        assert gone(engine.pid)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("exit", "ended with exit code 3 before it was ready"),
        ("fail", "The fake engine cannot start: no reason."),
    ],
)
def test_process_that_does_not_start(monkeypatch, mode, reason):
    monkeypatch.setenv("FAKE_ENGINE", mode)
    with pytest.raises(EngineFailed, match=reason):
        asyncio.run(EngineProcess.launch(ServerConfig(), FAKE))


def test_process_that_dies_later(monkeypatch):
    monkeypatch.setenv("FAKE_ENGINE", "die")

    async def main():
        engine = await EngineProcess.launch(ServerConfig(), FAKE)
        with pytest.raises(EngineFailed):
            await tokens_of(engine.client, make_request())
        assert await engine.wait_failed() == "The engine process ended with exit code 7."
        await engine.stop()

    asyncio.run(main())


def test_process_that_is_killed_is_noticed_without_traffic():
    async def main():
        engine = await EngineProcess.launch(ServerConfig(), FAKE)
        os.kill(engine.pid, 9)
        assert "SIGKILL" in await asyncio.wait_for(engine.wait_failed(), 10)
        assert not engine.client.alive
        await engine.stop()

    asyncio.run(main())


def test_cancelled_launch_leaves_no_child(monkeypatch):
    monkeypatch.setenv("FAKE_ENGINE", "slow-start")
    pids = []

    async def main():
        spawn = asyncio.create_subprocess_exec

        async def recording(*args, **kwargs):
            process = await spawn(*args, **kwargs)
            pids.append(process.pid)
            return process

        monkeypatch.setattr(asyncio, "create_subprocess_exec", recording)
        launching = asyncio.create_task(EngineProcess.launch(ServerConfig(), FAKE))
        await until(lambda: pids)
        await asyncio.sleep(0.1)
        launching.cancel()
        await asyncio.gather(launching, return_exceptions=True)

    asyncio.run(main())
    assert gone(pids[0])
