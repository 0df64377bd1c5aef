"""The step loop over a stub engine: what messages do, what the front is told, the watchdog."""

from __future__ import annotations

import logging
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from serving.config import ServerConfig
from serving.engine.loop import EngineLoop
from serving.messages import (
    Abort,
    EngineStatus,
    FlushCache,
    Flushed,
    GetStatus,
    Shutdown,
    StepOutput,
    Submit,
    decode_to_front,
    frame,
)
from serving.request import Request, SamplingParams
from tests.serving.engine.test_overlap import FakeGrammars, make_engine, make_request
from tests.serving.scheduler.fake_runner import tokens_alone

ROOT = Path(__file__).resolve().parents[3]


class FakeConnection:
    """Takes what the loop sends, after a trip through the encoding."""

    def __init__(self, *messages) -> None:
        self.inbox = queue.SimpleQueue()
        self.pulse = lambda: 0.0
        self.sent = []
        for message in messages:
            self.inbox.put(message)

    def send(self, message) -> None:
        self.sent.append(decode_to_front(frame(message)[4:]))


class Counter:
    count = 0


def run(engine, *messages, config=None, until=None):
    """Give the loop its messages, then Shutdown once `until` is true; what it sent."""
    connection = FakeConnection(*messages)
    loop = EngineLoop(engine, connection, Counter())
    thread = threading.Thread(target=loop.run, args=(config or ServerConfig(),), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while until is not None and not until(connection.sent):
        assert time.monotonic() < deadline, connection.sent
        time.sleep(0.002)
    connection.inbox.put(Shutdown())
    thread.join(10)
    assert not thread.is_alive()
    return connection.sent


def events(sent):
    return [
        event for message in sent if isinstance(message, StepOutput) for event in message.events
    ]


def finished(count):
    return lambda sent: sum(e.finish_reason is not None for e in events(sent)) == count


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_is_answered_token_by_token(overlap):
    request = make_request("a", max_tokens=4)
    sent = run(make_engine(overlap=overlap), Submit(request), until=finished(1))
    got = events(sent)
    assert [e.token_id for e in got] == tokens_alone(request)
    assert [e.finish_reason for e in got] == [None, None, None, "length"]
    assert (got[0].first.dp_rank, got[0].first.cached_tokens) == (0, 0)
    assert got[0].first.queue_s >= 0
    assert got[0].first.prompt_scores is None
    assert all(e.first is None for e in got[1:])


def test_prompt_scores_come_with_the_first_token():
    request = Request(
        rid="a", prompt=(3, 4, 5), sampling=SamplingParams(max_tokens=1), prompt_logprobs=1
    )
    (event,) = events(run(make_engine(overlap=True), Submit(request), until=finished(1)))
    scores = event.first.prompt_scores
    assert [(s.token_id, s.logprob, s.top_logprobs) for s in scores] == [
        (4, -4.0, [(0, -1.0)]),
        (5, -5.0, [(0, -1.0)]),
    ]


def test_refused_requests_say_why_and_whose_fault_it_is():
    engine = make_engine(overlap=True, max_queued=1, grammars=FakeGrammars())
    sent = run(
        engine,
        Submit(make_request("long", num_prompt=100)),
        Submit(make_request("a", max_tokens=1)),
        Submit(make_request("b", max_tokens=1)),
        until=finished(3),
    )
    errors = {e.rid: (e.status, e.message) for e in events(sent) if e.finish_reason == "error"}
    assert errors["long"][0] == 400
    assert "the KV pool holds at most" in errors["long"][1]
    assert errors["b"] == (503, "The request queue is full: 1 requests wait already.")


def test_an_aborted_request_says_no_more():
    sent = run(
        make_engine(overlap=True),
        Submit(make_request("a")),
        Submit(make_request("b", max_tokens=1)),
        Abort("a"),
        until=finished(1),
    )
    assert {e.rid for e in events(sent)} == {"b"}


def test_an_answer_that_its_client_has_whole_counts_as_finished():
    engine = make_engine(overlap=True)
    until = finished(1)
    run(
        engine,
        Submit(make_request("a", max_tokens=60)),
        Submit(make_request("b", max_tokens=1)),
        Abort("a", finished=True),
        until=until,
    )
    counters = [load.counters for load in engine.status()]
    assert sum(c.finished for c in counters) == 2
    assert sum(c.aborted for c in counters) == 0


def test_the_status_counts_what_was_done():
    engine = make_engine(overlap=False)
    run(engine, Submit(make_request("a", max_tokens=3)), until=finished(1))
    sent = run(engine, GetStatus(7), until=bool)
    (status,) = sent
    assert isinstance(status, EngineStatus)
    assert (status.token, status.waiting, status.steps, status.recompilations) == (7, 0, 3, 0)
    first, second = status.slices
    assert (first.counters.started, first.counters.finished) == (1, 1)
    assert (first.counters.prompt_tokens, first.counters.generated_tokens) == (5, 3)
    assert (first.running, first.used_tokens, first.max_running) == (0, 0, 4)
    assert second.counters.started == 0
    assert sum(status.prefilling_slices) == 3
    assert status.prefilling_slices[1] == 1


def test_the_cache_is_flushed_when_idle_only():
    engine = make_engine(overlap=True)
    sent = run(engine, Submit(make_request("a")), FlushCache(1), until=finished(1))
    assert Flushed(token=1, done=False) in sent
    assert engine.status()[0].cached_tokens > 0
    assert run(engine, FlushCache(2), until=bool) == [Flushed(token=2, done=True)]
    assert engine.status()[0].cached_tokens == 0


def test_a_line_of_the_log_every_so_many_steps(caplog):
    caplog.set_level(logging.INFO, "meshserve.engine")
    run(
        make_engine(overlap=True),
        Submit(make_request("a", max_tokens=6)),
        config=ServerConfig(decode_log_interval=3),
        until=finished(1),
    )
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) >= 2
    assert "0 waiting" in lines[0]
    assert "[0 decode: 1 running, KV" in lines[0]
    assert lines[0].endswith("1 idle")


def test_the_pulse_tells_how_long_a_step_takes():
    engine = make_engine(overlap=True)
    connection = FakeConnection(Submit(make_request("a", max_tokens=1)))
    loop = EngineLoop(engine, connection, Counter())
    assert connection.pulse() == 0
    release, launch = threading.Event(), engine.runner.launch
    engine.runner.launch = lambda plan: release.wait(10) and launch(plan)
    thread = threading.Thread(target=loop.run, args=(ServerConfig(),), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while connection.pulse() < 0.02:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    release.set()
    connection.inbox.put(Shutdown())
    thread.join(10)
    assert not thread.is_alive()


def test_the_watchdog_ends_with_the_loop():
    """Else it would end the process long after, for a step that nobody waits for."""
    engine = make_engine(overlap=True)
    engine.runner.launch = lambda plan: 1 / 0
    loop = EngineLoop(engine, FakeConnection(Submit(make_request("a"))), Counter())
    with pytest.raises(ZeroDivisionError):
        loop.run(ServerConfig(watchdog_timeout=0.5))
    assert loop.busy_seconds() >= 0
    time.sleep(0.9)  # past the timeout: this process is still there
    assert not [t for t in threading.enumerate() if t.name == "watchdog" and t.is_alive()]


HANGING = """
import sys, threading, time
from serving.config import ServerConfig
from serving.engine.loop import EngineLoop
from serving.messages import Submit
from tests.serving.engine.test_loop import Counter, FakeConnection
from tests.serving.engine.test_overlap import make_engine, make_request

engine = make_engine(overlap=True)
engine.runner.launch = lambda plan: time.sleep(60)
connection = FakeConnection(Submit(make_request("a")))
connection.send = lambda message: print(message.message, flush=True)
EngineLoop(engine, connection, Counter()).run(ServerConfig(watchdog_timeout=0.2))
"""


def test_a_step_that_hangs_ends_the_process_with_a_sentence():
    result = subprocess.run(
        [sys.executable, "-c", HANGING], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1, result.stderr
    assert "The engine made no progress for 0.2 s (--watchdog-timeout)." in result.stdout
