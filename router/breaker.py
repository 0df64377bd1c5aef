"""A circuit breaker: takes a worker out of service that fails again and again.

Closed, it lets everything through. After so many failures in a row it opens and lets nothing
through; after a while it is half open and lets a few requests through, to see. What began before
the last change says nothing about the worker of now. Only the worker's own faults are failures: the
caller decides what those are. A circuit that opened because nobody was there is half open as soon
as somebody is; one whose worker was there and failed waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]
PROBES = 2
"""Requests that may run at once while the circuit is half open."""


class CircuitBreaker:
    """The circuit of one worker.

    Args:
        failure_threshold: failures in a row that open it; None never opens it.
        success_threshold: successes in a row that close it when it is half open.
        timeout_s: how long it stays open.
        clock: seconds.
        on_transition: told (from, to) of every change.
    """

    def __init__(
        self,
        *,
        failure_threshold: int | None,
        success_threshold: int,
        timeout_s: float,
        clock: Callable[[], float],
        on_transition: Callable[[State, State], None] = lambda before, after: None,
    ) -> None:
        self._failure_threshold = failure_threshold
        self._success_threshold = success_threshold
        self._timeout_s = timeout_s
        self._clock = clock
        self._on_transition = on_transition
        self._state: State = "closed"
        self._since = clock()
        self._era = 0
        self._running = 0
        self._last_absent = False
        self.consecutive_failures = 0
        self.consecutive_successes = 0

    @property
    def state(self) -> State:
        """As of now: time alone takes it from open to half open."""
        if self._state == "open" and self._clock() - self._since >= self._timeout_s:
            self._change("half_open")
        return self._state

    @property
    def allows(self) -> bool:
        """Whether a request may go through now."""
        if self._state == "closed":
            return True
        return self.state == "half_open" and self._running < PROBES

    @property
    def absent(self) -> bool:
        """Whether it is open, and the last thing known of the worker is that nobody was there."""
        return self.state == "open" and self._last_absent

    def present(self) -> None:
        """Somebody answers health checks there: who, after an absence, is not who failed before."""
        if self.absent:
            self._change("half_open")

    def begin(self) -> int:
        """A request goes through; `end` must follow, with what is returned."""
        self._running += 1
        return self._era

    def prove(self, era: int) -> bool:
        """The answer to a request has begun; whether that counted, as a probe's success.

        A stream may last for minutes: its first token says what a probe is to find out.
        """
        if era != self._era or self.state != "half_open":
            return False
        self._running -= 1
        self._succeed()
        return True

    def end(
        self, era: int, success: bool | None, *, proved: bool = False, absent: bool = False
    ) -> None:
        """It is over; a success of None says nothing about the worker.

        Args:
            proved: what `prove` said of it.
            absent: it failed because nobody was there.
        """
        if era != self._era:
            return  # It is counted neither as a probe nor as an outcome any more.
        if not proved:
            self._running -= 1
        if success is None:
            return
        if success:
            if not proved:
                self._succeed()
            return
        self.consecutive_successes = 0
        self.consecutive_failures += 1
        self._last_absent = absent
        threshold = self._failure_threshold
        if threshold is None:
            return
        if self.state == "half_open" or (
            self._state == "closed" and self.consecutive_failures >= threshold
        ):
            self._change("open")

    def _succeed(self) -> None:
        self.consecutive_failures = 0
        self.consecutive_successes += 1
        if self.state == "half_open" and self.consecutive_successes >= self._success_threshold:
            self._change("closed")

    def reset(self) -> None:
        """The worker is another one now, under the same address."""
        self.consecutive_failures = self.consecutive_successes = 0
        if self._state != "closed":
            self._change("closed")

    def _change(self, state: State) -> None:
        before, self._state = self._state, state
        self._since = self._clock()
        self._era += 1
        self._running = 0
        self.consecutive_failures = self.consecutive_successes = 0
        self._on_transition(before, state)
