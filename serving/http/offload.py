"""Where the checking of a body runs: short work in the event loop, long work in a thread.

Tokenising a long text takes seconds, and other streams must not wait for it. A body of a page of
text takes less than a millisecond, and handing it to a thread and back would cost more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from starlette.requests import Request

P = ParamSpec("P")
T = TypeVar("T")

SMALL_BODY_BYTES = 2048
"""Tokenised in about 1 ms on a slow core."""


async def off_loop(request: Request, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `work`, which takes time in proportion to the request's body.

    It runs in a thread unless the body says that it is small.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 8 and int(length) <= SMALL_BODY_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
