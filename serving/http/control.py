"""Routes for whoever runs the server: is it well, end these requests, forget the cache."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from serving.engine_client import EngineFailed
from serving.http.errors import ApiError, json_response
from serving.http.protocol import read_body
from serving.http.routing import MAX_PRIORITY
from serving.http.sse import unless_disconnected
from serving.http.state import ServerState
from serving.request import Request as EngineRequest
from serving.request import SamplingParams

PULSE_TIMEOUT_S = 5.0
STUCK_S = 30.0
"""A step loop without progress for so long counts as stuck. The longest legal step (a full prefill
on a CPU) takes a few seconds; after --watchdog-timeout the process ends anyway."""
HEALTH_GENERATE_TIMEOUT_S = 20.0
RECENT_S = 1.0
"""A token that came within so many seconds proves that the engine generates."""

FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. (When there are running or "
    "waiting requests, the operation will not be performed.)\n"
)
NOT_FLUSHED = "Cache not flushed: requests are running or waiting.\n"


class AbortBody(msgspec.Struct, kw_only=True):
    """POST /abort_request."""

    rid: str | None = None
    abort_all: bool | None = None


async def health(state: ServerState, request: Request) -> Response:
    """200 while the engine answers and its step loop moves, else 503 with the reason.

    A step loop that has made no progress for STUCK_S (--watchdog-timeout if that is less) counts
    as stuck.
    """
    if not state.healthy:
        return _unhealthy(_why(state))
    problem = await _stuck(state)
    if problem is not None:
        return _unhealthy(problem)
    return json_response({"status": "ok"})


async def health_generate(state: ServerState, request: Request) -> Response:
    """200 if a token came a moment ago or one comes now, else 503 with the reason.

    A full queue takes no probe; then it is enough that the step loop moves.
    """
    if not state.healthy:
        return _unhealthy(_why(state))
    if state.engine.silence_s > RECENT_S:
        problem = await unless_disconnected(request.receive, _try_to_generate(state))
        if problem is not None:
            return _unhealthy(problem)
    return json_response({"status": "ok"})


async def flush_cache(state: ServerState, request: Request) -> Response:
    """Forget all cached prefixes; 400 while requests run or wait, because they hold some."""
    if await state.engine.flush_cache():
        return PlainTextResponse(FLUSHED)
    return PlainTextResponse(NOT_FLUSHED, 400)


async def abort_request(state: ServerState, request: Request) -> Response:
    """End one answer by its id, or all: they finish with "abort" and the text so far.

    An id that nothing bears is no error: its request may just have ended.
    """
    body = await read_body(request, AbortBody)
    if body.abort_all:
        state.abort_all()
    elif body.rid:
        state.abort(body.rid)
    else:
        raise ApiError("rid is missing (or set abort_all to true).", param="rid")
    return Response()


async def _try_to_generate(state: ServerState) -> str | None:
    """One token, timed by no metric; what went wrong, None if nothing did."""
    bos = state.tokenizer.bos_token_id
    probe = EngineRequest(
        rid=f"HEALTH_CHECK_{state.new_id()}",
        prompt=(0 if bos is None else bos,),
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
        priority=MAX_PRIORITY,
    )
    try:
        async with (
            asyncio.timeout(HEALTH_GENERATE_TIMEOUT_S),
            aclosing(state.engine.generate(probe)) as events,
        ):
            async for event in events:
                if event.finish_reason == "error" and event.status == 503:
                    return await _stuck(state)
                if event.finish_reason == "error":
                    return event.message or "The engine could not generate."
    except TimeoutError:
        return f"The engine generated nothing within {HEALTH_GENERATE_TIMEOUT_S:g} s."
    except EngineFailed as error:
        return str(error)
    return None


async def _stuck(state: ServerState) -> str | None:
    """What is wrong with the engine's step loop, None if it moves."""
    try:
        pulse = await state.engine.pulse(PULSE_TIMEOUT_S)
    except EngineFailed as error:
        return str(error)
    if pulse.busy_s > min(STUCK_S, state.config.watchdog_timeout):
        return f"The engine has made no progress for {pulse.busy_s:.0f} s."
    return None


def _why(state: ServerState) -> str:
    return state.engine.failure or "The server is shutting down."


def _unhealthy(reason: str) -> Response:
    return json_response({"status": "unhealthy", "message": reason}, 503)
