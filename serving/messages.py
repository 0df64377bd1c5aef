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
    finished: bool = False
    """The answer is complete (a stop string ended it): count it as finished, not as aborted."""


class GetStatus(msgspec.Struct, tag=True, frozen=True):
    """Ask for one `EngineStatus`, returned with the same `token`."""

    token: int


class GetPulse(msgspec.Struct, tag=True, frozen=True):
    """Ask whether the step loop moves; answered by `Pulse` with the same `token`."""

    token: int


class FlushCache(msgspec.Struct, tag=True, frozen=True):
    """Forget all cached prefixes; answered by `Flushed` with the same `token`."""

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
    """With "error": one sentence for the user."""
    status: int = 500
    """With "error": the HTTP status; 503 where the queue is full, 400 where it can never run."""
    first: FirstToken | None = None
    """With the first token of a request."""


class PromptScore(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of a prompt token, and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top_logprobs: list[tuple[int, float]]


class FirstToken(msgspec.Struct, frozen=True, array_like=True):
    """What is told once, with a request's first token."""

    dp_rank: int
    cached_tokens: int
    """Prompt tokens whose KV entries came from the prefix cache."""
    queue_s: float
    """Seconds between arrival in the engine and the step that began the prompt."""
    prompt_scores: list[PromptScore] | None = None
    """Of every prompt token but the first, where prompt log probabilities were asked for."""


class StepOutput(msgspec.Struct, tag=True, frozen=True):
    """All token events of one engine step, in one message: one wake-up of the front per step."""

    events: list[TokenEvent]


class SliceStatus(msgspec.Struct, frozen=True):
    """One dp slice: its load now, and what it has done since the start.

    Tokens are KV tokens of its own pool; a page counts whole.
    """

    dp_rank: int
    mode: str
    """What the last step did here: prefill, decode, both or idle."""
    running: int
    waiting: int
    """Waiting requests that only this slice may run."""
    used_tokens: int
    """Held by running requests, shared ones once."""
    cached_tokens: int
    """In the prefix cache and held by no request: free for whoever needs them."""
    total_tokens: int
    pending_prefill_tokens: int
    """Prompt tokens of running requests that no step has computed yet."""
    decode_context_tokens: int
    """Sum of the lengths of running requests."""
    max_running: int
    counters: SliceCounters


class SliceCounters(msgspec.Struct, frozen=True):
    """Totals of one slice since the start; they only grow."""

    started: int = 0
    finished: int = 0
    aborted: int = 0
    retracted: int = 0
    retracted_input_tokens: int = 0
    """Prompt tokens of the retracted requests."""
    retracted_output_tokens: int = 0
    """Tokens that they had generated."""
    prompt_tokens: int = 0
    """Tokens of the contexts of started requests, cached ones included."""
    cached_tokens: int = 0
    """Of these, found in the prefix cache."""
    generated_tokens: int = 0
    evicted_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    """Steps with decode rows and no prefill here."""


class EngineStatus(msgspec.Struct, tag=True, frozen=True):
    """Answer to `GetStatus`."""

    token: int
    waiting: int
    """Requests in the central queue, those for one slice included."""
    waiting_tokens: int
    """Tokens of their contexts."""
    steps: int
    recompilations: int
    """Compilations since the engine was ready; anything but 0 is a bug."""
    slices: list[SliceStatus]
    step_seconds: dict[str, float]
    """Wall time of steps by kind ("decode", "extend") since the start."""
    prefilling_slices: list[int]
    """Entry n counts the steps in which n slices prefilled."""
    prefilling_seconds: list[float] = []
    """Entry n is the wall time of those steps; empty where it is not measured."""
    grammar_queue: int = 0
    """Requests whose grammar is being read, which are in no other queue yet."""


class Pulse(msgspec.Struct, tag=True, frozen=True):
    """Answer to `GetPulse`, sent even while a step runs or hangs."""

    token: int
    busy_s: float
    """Seconds since the step loop last made progress while it had work; 0 if it has none."""


class Flushed(msgspec.Struct, tag=True, frozen=True):
    """Answer to `FlushCache`."""

    token: int
    done: bool
    """False where requests run or wait: nothing was flushed."""


ToEngine = Submit | Abort | GetStatus | GetPulse | FlushCache | Shutdown
ToFront = Ready | Failed | StepOutput | EngineStatus | Pulse | Flushed

_encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode


def frame(message: ToEngine | ToFront) -> bytes:
    """The bytes to write for one message: header and body."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body
