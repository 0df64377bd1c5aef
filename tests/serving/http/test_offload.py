"""Checking a small body stays in the event loop; a large one must not hold others up."""

import threading

import pytest
from starlette.requests import Request

from serving.http.offload import SMALL_BODY_BYTES, off_loop
from tests.serving.http.support import run


@pytest.mark.parametrize(
    ("length", "stays"),
    [
        (b"2", True),
        (b"%d" % SMALL_BODY_BYTES, True),
        (b"%d" % (SMALL_BODY_BYTES + 1), False),
        (None, False),  # a chunked body
        (b"-1", False),
        ("²".encode("latin-1"), False),  # a digit to str.isdigit
        (b"9" * 6000, False),
    ],
)
def test_where_work_runs(length, stays):
    async def main():
        headers = [] if length is None else [(b"content-length", length)]
        request = Request({"type": "http", "headers": headers})
        ran_in = await off_loop(request, threading.get_ident)
        assert (ran_in == threading.get_ident()) == stays

    run(main)
