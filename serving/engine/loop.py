"""The step loop of the engine process: messages in, steps, token events out.

Beside it run a watchdog, which ends the process when a step hangs, and a line of the log every so
many steps that says what each slice does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from queue import SimpleQueue
from typing import Protocol

from serving.config import ServerConfig
from serving.engine.engine import CompileCounter, Engine, RequestFailure
from serving.messages import (
    Abort,
    EngineStatus,
    Failed,
    FirstToken,
    FlushCache,
    Flushed,
    GetStatus,
    PromptScore,
    Shutdown,
    SliceCounters,
    SliceStatus,
    StepOutput,
    Submit,
    ToEngine,
    ToFront,
    TokenEvent,
)
from serving.request import Request
from serving.scheduler.scheduler import SliceLoad, TokenOutcome

log = logging.getLogger("meshserve.engine")

LAST_WORDS_S = 1.0
"""How long the watchdog tries to tell the front why before it ends the process."""


class Connection(Protocol):
    """What the loop needs of the connection to the front."""

    inbox: SimpleQueue[ToEngine]
    pulse: Callable[[], float]

    def send(self, message: ToFront) -> None: ...


class EngineLoop:
    """Messages in, steps, token events out; a line of the log now and then; a watchdog."""

    def __init__(self, engine: Engine, connection: Connection, compiles: CompileCounter) -> None:
        self.engine, self.connection, self.compiles = engine, connection, compiles
        self._busy_since: float | None = None
        self._ended = threading.Event()
        connection.pulse = self.busy_seconds

    def run(self, config: ServerConfig) -> None:
        """Until Shutdown arrives. Waits without spinning while there is no work."""
        threading.Thread(
            target=self._watch, args=(config.watchdog_timeout,), daemon=True, name="watchdog"
        ).start()
        try:
            self._run(StepReport(self.engine, interval=config.decode_log_interval))
        finally:
            self._ended.set()  # the watchdog watches steps, not what comes after them

    def _run(self, report: StepReport) -> None:
        while True:
            while not (self.connection.inbox.empty() and self.engine.has_work):
                if not self.engine.has_work:
                    self._busy_since = None
                message = self.connection.inbox.get()
                if isinstance(message, Shutdown):
                    return
                self._handle(message)
            self._busy_since = time.monotonic()
            outcomes = self.engine.step()
            if outcomes:
                self.connection.send(StepOutput([_event(o) for o in outcomes]))
            report.after_step()

    def busy_seconds(self) -> float:
        """Since the step loop last made progress; 0 while it waits for work."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _watch(self, timeout_s: float) -> None:
        """End the process when a step hangs: the front tells everybody why."""
        while self.busy_seconds() <= timeout_s:
            if self._ended.wait(min(timeout_s / 4, 5.0)):
                return
        log.error("no progress for %.0f s: giving up", timeout_s)
        reason = f"The engine made no progress for {timeout_s:g} s (--watchdog-timeout)."
        # It may be the sending that hangs.
        last_words = threading.Thread(target=self._say_failed, args=(reason,), daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_S)
        os._exit(1)

    def _say_failed(self, reason: str) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(Failed(reason))

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit(request):
                self._submit(request)
            case Abort(rid, finished):
                (self.engine.finish if finished else self.engine.abort)(rid)
            case GetStatus(token):
                self.connection.send(self._status(token))
            case FlushCache(token):
                done = not self.engine.has_work and self.engine.scheduler.flush_cache()
                self.connection.send(Flushed(token=token, done=done))

    def _submit(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except ValueError as error:
            failure = RequestFailure.of(request.rid, error)
            self.connection.send(StepOutput([_event(failure)]))

    def _status(self, token: int) -> EngineStatus:
        scheduler, totals = self.engine.scheduler, self.engine.totals
        return EngineStatus(
            token=token,
            waiting=scheduler.num_waiting,
            waiting_tokens=scheduler.waiting_tokens,
            steps=totals.count,
            recompilations=self.compiles.count,
            slices=[
                _slice_status(load, scheduler.config.slots_per_slice)
                for load in self.engine.status()
            ],
            step_seconds=dict(totals.seconds),
            prefilling_slices=list(totals.prefilling_slices),
            prefilling_seconds=list(totals.prefilling_seconds),
            grammar_queue=self.engine.num_preparing,
        )


class StepReport:
    """A line of the log every `interval` steps: what each slice does, and how fast."""

    def __init__(self, engine: Engine, *, interval: int) -> None:
        self._engine, self._interval = engine, interval
        self._since = time.monotonic()
        self._last = engine.status()
        self._next = engine.totals.count + interval

    def after_step(self) -> None:
        if self._engine.totals.count < self._next:
            return
        self._next += self._interval
        now, status = time.monotonic(), self._engine.status()
        seconds = max(now - self._since, 1e-9)
        parts = []
        for before, after in zip(self._last, status, strict=True):
            if not (after.running or after.waiting) and after.counters == before.counters:
                continue  # idle all the time
            prompt = after.counters.prompt_tokens - before.counters.prompt_tokens
            cached = after.counters.cached_tokens - before.counters.cached_tokens
            tokens = after.counters.generated_tokens - before.counters.generated_tokens
            hits = f", hits {cached / prompt:.0%}" if prompt else ""
            waiting = f", {after.waiting} waiting" if after.waiting else ""
            parts.append(
                f"[{after.dp_rank} {after.mode}: {after.running} running{waiting}, KV "
                f"{after.used_tokens / after.total_tokens:.0%}{hits}, {tokens / seconds:.0f} tok/s]"
            )
        log.info(
            "%d waiting, %.1f steps/s %s",
            self._engine.scheduler.num_waiting,
            self._interval / seconds,
            " ".join(parts) + (f" {idle} idle" if (idle := len(status) - len(parts)) else ""),
        )
        self._since, self._last = now, status


def _slice_status(load: SliceLoad, slots: int) -> SliceStatus:
    counters = load.counters
    return SliceStatus(
        dp_rank=load.dp_rank,
        mode=load.mode,
        running=load.running,
        waiting=load.waiting,
        used_tokens=load.used_tokens,
        cached_tokens=load.cached_tokens,
        total_tokens=load.total_tokens,
        pending_prefill_tokens=load.pending_prefill_tokens,
        decode_context_tokens=load.decode_context_tokens,
        max_running=slots,
        counters=SliceCounters(**asdict(counters), evicted_tokens=load.evicted_tokens),
    )


def _event(outcome: TokenOutcome | RequestFailure) -> TokenEvent:
    if isinstance(outcome, RequestFailure):
        return TokenEvent(
            outcome.rid, None, "error", message=outcome.message, status=outcome.status
        )
    top, first = outcome.top_logprobs, None
    if outcome.first is not None:
        scores = outcome.first.scores
        first = FirstToken(
            dp_rank=outcome.first.dp_rank,
            cached_tokens=outcome.first.cached_tokens,
            queue_s=outcome.first.queue_s,
            prompt_scores=None
            if scores is None
            else [PromptScore(s.token_id, s.logprob, list(s.top_logprobs)) for s in scores],
        )
    return TokenEvent(
        rid=outcome.rid,
        token_id=outcome.token_id,
        finish_reason=outcome.finish_reason,
        logprob=outcome.logprob,
        top_logprobs=None if top is None else list(top),
        first=first,
    )
