"""How many requests run at once and start in a second; who waits, in which order, and how long."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable


class RateLimited(Exception):
    """A request that may not run: 429, there is no place to wait; 408, it waited too long.

    Attributes:
        retry_after: seconds after which it makes sense to ask again.
    """

    def __init__(self, status: int, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


class Permit:
    """The right to run; `release` gives it back, once."""

    __slots__ = ("_limiter",)

    def __init__(self, limiter: Limiter | None) -> None:
        self._limiter = limiter

    def release(self) -> None:
        limiter, self._limiter = self._limiter, None
        if limiter is not None:
            limiter._release()


class Limiter:
    """Lets `max_running` requests run at once, and `per_second` of them start in a second.

    Whoever finds no place waits in a queue, first come, first served.

    Args:
        max_running: None for any number.
        per_second: None for any number; `max_running` (or one second's worth) may start together.
        queue_size: most requests that wait.
        queue_timeout_s: longest time that one waits.
        on_decision: told "allowed" or "rejected" of each.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        max_running: int | None = None,
        per_second: float | None = None,
        queue_size: int = 0,
        queue_timeout_s: float = 60.0,
        clock: Callable[[], float],
        on_decision: Callable[[str], None] = lambda result: None,
    ) -> None:
        self._max_running = max_running
        self._per_second = per_second
        self._burst = float(max_running or max(1, math.ceil(per_second or 1)))
        self._queue_size = queue_size
        self._timeout_s = queue_timeout_s
        self._clock = clock
        self._on_decision = on_decision
        self._tokens = self._burst
        self._refilled = clock()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def acquire(self) -> Permit:
        """Wait for the right to run.

        Raises:
            RateLimited: the queue is full, or the wait too long.
        """
        if self._max_running is None and self._per_second is None:
            self._on_decision("allowed")
            return Permit(None)
        if not self._waiting and self._take():
            self._on_decision("allowed")
            return Permit(self)
        if len(self._waiting) >= self._queue_size:
            self._on_decision("rejected")
            raise RateLimited(
                429,
                f"Too many requests: {self.num_running} run and {self.num_waiting} wait already.",
                self._expected_wait(),
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._wake_later()
        try:
            async with asyncio.timeout(self._timeout_s):
                await place
        except TimeoutError:
            if not self._granted(place):
                self._leave(place)
                self._on_decision("rejected")
                raise RateLimited(
                    408,
                    f"The request waited {self._timeout_s:g} s for others to end, and none did.",
                    self._expected_wait(),
                ) from None
        except asyncio.CancelledError:
            if self._granted(place):
                self._release()
            else:
                self._leave(place)
            raise
        self._on_decision("allowed")
        return Permit(self)

    def _granted(self, place: asyncio.Future[None]) -> bool:
        return place.done() and not place.cancelled()

    def _leave(self, place: asyncio.Future[None]) -> None:
        if place in self._waiting:
            self._waiting.remove(place)

    def _take(self) -> bool:
        """Take a place to run, if there is one."""
        if self._max_running is not None and self.num_running >= self._max_running:
            return False
        if self._per_second is not None:
            now = self._clock()
            gained = (now - self._refilled) * self._per_second
            self._tokens = min(self._burst, self._tokens + gained)
            self._refilled = now
            if self._tokens < 1 - 1e-9:
                return False
            self._tokens -= 1
        self.num_running += 1
        return True

    def _release(self) -> None:
        self.num_running -= 1
        self._serve()

    def _serve(self) -> None:
        """Give the places that are free to those who waited longest."""
        while self._waiting:
            if self._waiting[0].done():  # it was cancelled
                self._waiting.popleft()
            elif self._take():
                self._waiting.popleft().set_result(None)
            else:
                break
        self._wake_later()

    def _wake_later(self) -> None:
        """Look again when the next start is allowed: no request's end may tell."""
        if self._per_second is None or not self._waiting or self._timer is not None:
            return
        if self._max_running is not None and self.num_running >= self._max_running:
            return  # a release will look
        seconds = max(0.0, (1 - self._tokens) / self._per_second)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._serve()

    def _expected_wait(self) -> float:
        if self._per_second is None:
            return 1.0
        return max(1.0, (1 + self.num_waiting) / self._per_second)
