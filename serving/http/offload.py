"""Where the checking of a body runs: short work in the event loop, long work in threads.

Tokenising a long text takes seconds, and other streams must not wait for it. A body of a page of
text takes less than a millisecond, and handing it to a thread and back would cost more. Very large
bodies have one thread for all of them: they take turns, so that no other request waits for them and
no more than one is in pieces in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from starlette.requests import Request

P = ParamSpec("P")
T = TypeVar("T")

SMALL_BODY_BYTES = 2048
"""Tokenised in about 1 ms on a slow core."""
LARGE_BODY_BYTES = 1 << 18
"""More text than most contexts hold."""


def slow_lane() -> ThreadPoolExecutor:
    """The thread for large bodies; a server has one."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="large-body")


async def off_loop(
    lane: ThreadPoolExecutor,
    request: Request,
    work: Callable[P, T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """The result of `work`, which takes time in proportion to the request's body.

    Args:
        lane: where it runs if the body is large.
    """
    length = request.headers.get("content-length", "")
    size = int(length) if length.isdecimal() and len(length) < 12 else LARGE_BODY_BYTES
    if size <= SMALL_BODY_BYTES:
        return work(*args, **kwargs)
    pool = lane if size > LARGE_BODY_BYTES else None
    call = partial(work, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(pool, call)
