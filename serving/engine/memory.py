"""The arithmetic of a device's memory: KV pages out of bytes. No device is asked here.

The runner and the estimate before it both count with this, so that they can differ in one number
only: what programs need for temporaries, which is known once they are compiled.
"""

from __future__ import annotations

CPU_POOL_BYTES = 256 << 20
"""KV pool of an emulated device, which has no memory of its own to measure."""
MAX_POOL_BYTES = 1 << 40
"""No device holds more; a larger --max-total-tokens is a slip of the finger."""
ACCELERATOR_SLACK_BYTES = 256 << 20
"""Left free beside weights, programs and pool: batches in flight, fragmentation."""


def pages_for(tokens: int, page_size: int) -> int:
    """Pages of a pool that holds so many tokens, and the sink."""
    return -(-tokens // page_size) + 1


def tokens_in(pages: int, page_size: int) -> int:
    """Tokens that a pool of so many pages holds; the sink holds none."""
    return max(0, pages - 1) * page_size


def pages_in(pool_bytes: int, page_bytes: int) -> int:
    """Pages, the sink among them, that fit into a device's bytes; 0 if none do."""
    return max(0, pool_bytes // page_bytes)


def pool_bytes(limit: int, *, weights: int, working: int) -> int:
    """Bytes left for the pool of an accelerator that may use `limit`; negative if none are.

    Args:
        weights: bytes of weights on it.
        working: temporaries of the largest program, and what lives between steps.
    """
    return limit - weights - working - ACCELERATOR_SLACK_BYTES
