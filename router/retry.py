"""How long to wait before a request is tried again."""

from __future__ import annotations

import random
import time
from email.utils import parsedate_to_datetime

from router.config import RouterConfig


def backoff_s(
    config: RouterConfig, k: int, rng: random.Random, retry_after_s: float = 0.0
) -> float:
    """Seconds before attempt k + 2: exponential, with jitter, at least what the worker asked for.

    Args:
        k: 0 before the second attempt.
        retry_after_s: the worker's Retry-After; it is heeded up to --retry-max-backoff-ms.
    """
    most = config.retry_max_backoff_ms
    # A large power would overflow long before it matters.
    factor = config.retry_backoff_multiplier ** min(k, 64)
    pause = min(config.retry_initial_backoff_ms * factor, most)
    jitter = config.retry_jitter_factor
    pause *= 1 + rng.uniform(-jitter, jitter)
    return max(pause, min(retry_after_s * 1000, most)) / 1000


def retry_after_s(value: bytes | None) -> float:
    """Seconds that a Retry-After header names, as a number or a date; 0 if it names none."""
    if value is None:
        return 0.0
    text = value.decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
