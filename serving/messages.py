"""The messages between the front process and the engine process, and their framing.

A frame is a 4-byte big-endian length and a msgpack body. The front writes `ToEngine` messages, the
engine writes `ToFront` messages; each side decodes only its own union, so that a malformed message
fails where it is read.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from serving.request import FinishReason, Request

HEADER = struct.Struct(">I")


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Queue a request. The engine answers with `StepOutput`s until one has a finish reason."""

    request: Request


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Forget a request and free its pages. No further output for it follows."""

    rid: str


class GetStatus(msgspec.Struct, tag=True, frozen=True):
    """Ask for one `EngineStatus`, returned with the same `token`."""

    token: int


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop the step loop and exit 0. Running requests are dropped."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine is compiled, warm and waiting. Sent once."""

    max_context_tokens: int
    """Most tokens of prompt + answer in one request (model, flag and pool considered)."""
    max_total_tokens: int
    """KV tokens of one dp slice's pool."""
    num_slices: int
    topology: str
    """One human line: devices, dp/tp/ep, roles, pool."""
    details: dict[str, Any]
    """What /get_server_info shows of the engine."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start or go on; one sentence for the user. It exits after sending this."""

    message: str


class TokenEvent(msgspec.Struct, frozen=True, array_like=True):
    """One new token of one request, or its end, or both.

    `token_id` is None only where a request ends without a new token ("abort", "error").
    `top_logprobs` lists (token id, log probability), best first, as many as were asked for.
    """

    rid: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    message: str | None = None


class StepOutput(msgspec.Struct, tag=True, frozen=True):
    """All token events of one engine step, in one message: one wake-up of the front per step."""

    events: list[TokenEvent]


class SliceStatus(msgspec.Struct, frozen=True):
    """The load of one dp slice (pages and tokens of its own pool)."""

    dp_rank: int
    running: int
    used_tokens: int
    total_tokens: int


class EngineStatus(msgspec.Struct, tag=True, frozen=True):
    """Answer to `GetStatus`."""

    token: int
    waiting: int
    steps: int
    recompilations: int
    """Compilations since the engine was ready; anything but 0 is a bug."""
    slices: list[SliceStatus]


ToEngine = Submit | Abort | GetStatus | Shutdown
ToFront = Ready | Failed | StepOutput | EngineStatus

_encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode


def frame(message: ToEngine | ToFront) -> bytes:
    """The bytes to write for one message: header and body."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body
