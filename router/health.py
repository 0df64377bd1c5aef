"""Whether a worker is healthy, by the outcomes of its checks alone."""

from __future__ import annotations


class HealthState:
    """One worker: it changes sides after so many equal outcomes in a row."""

    def __init__(self, *, failure_threshold: int, success_threshold: int) -> None:
        self.healthy = True
        self.failure_threshold = failure_threshold
        self.success_threshold = success_threshold
        self._in_a_row = 0

    def record(self, success: bool) -> bool:
        """Take in the outcome of a check; whether the worker changed sides by it."""
        if success == self.healthy:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        needed = self.success_threshold if success else self.failure_threshold
        if self._in_a_row < needed:
            return False
        self.healthy = success
        self._in_a_row = 0
        return True
