"""Checking a small body stays in the event loop; a large one must not hold others up."""

import asyncio
import threading

import pytest
from starlette.requests import Request

from serving.http.offload import LARGE_BODY_BYTES, SMALL_BODY_BYTES, off_loop, slow_lane
from tests.serving.http.support import run


@pytest.mark.parametrize(
    ("length", "where"),
    [
        (b"2", "loop"),
        (b"%d" % SMALL_BODY_BYTES, "loop"),
        (b"%d" % (SMALL_BODY_BYTES + 1), "thread"),
        (b"%d" % LARGE_BODY_BYTES, "thread"),
        (b"%d" % (LARGE_BODY_BYTES + 1), "lane"),
        (None, "thread"),  # a chunked body
        (b"-1", "thread"),
        ("²".encode("latin-1"), "thread"),  # a digit to str.isdigit
        (b"9" * 6000, "thread"),
    ],
)
def test_where_work_runs(length, where):
    async def main():
        headers = [] if length is None else [(b"content-length", length)]
        request = Request({"type": "http", "headers": headers})
        with slow_lane() as lane:
            ran_in = await off_loop(lane, request, threading.current_thread)
        names = {"loop": threading.current_thread().name, "lane": "large-body_0"}
        assert (ran_in.name in names.values()) == (where != "thread")
        assert where == "thread" or ran_in.name == names[where]

    run(main)


def test_large_bodies_take_turns_and_hold_nobody_else_up():
    gate, seen = threading.Event(), []

    def large(name):
        seen.append(name)
        gate.wait(10)

    async def main():
        def request(size):
            return Request({"type": "http", "headers": [(b"content-length", b"%d" % size)]})

        with slow_lane() as lane:
            slow = [
                asyncio.create_task(off_loop(lane, request(LARGE_BODY_BYTES * 4), large, name))
                for name in range(20)
            ]
            for _ in range(50):
                assert await off_loop(lane, request(5000), lambda: "done") == "done"
            assert seen == [0]
            gate.set()
            await asyncio.gather(*slow)
        assert seen == list(range(20))

    run(main)
