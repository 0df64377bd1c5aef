"""The arithmetic of a device's memory: KV pages out of bytes. No device is asked here.

The runner and the estimate before it both count with this, so that they can differ in one number
only: what programs need for temporaries, which is known once they are compiled.
"""

from __future__ import annotations

import math

import jax

from serving.config import ConfigError
from serving.engine.buckets import Buckets
from serving.engine.sampling_state import abstract_state

CPU_POOL_BYTES = 256 << 20
"""KV pool of an emulated device, which has no memory of its own to measure."""
MANY_PAGES, PAGES_STEP = 4096, 64
"""See `pages_in`."""
MAX_POOL_BYTES = 1 << 40
"""No device holds more; a larger --max-total-tokens is a slip of the finger."""
ACCELERATOR_SLACK_BYTES = 256 << 20
"""Left free beside weights, programs and pool: batches in flight, fragmentation."""


def pages_for(tokens: int, page_size: int, page_bytes: int) -> int:
    """Pages of a pool that holds the --max-total-tokens asked for, and the sink.

    Raises:
        ConfigError: no device holds such a pool.
    """
    pages = -(-tokens // page_size) + 1
    if pages * page_bytes > MAX_POOL_BYTES or pages >= 1 << 31:
        raise ConfigError(
            f"--max-total-tokens {tokens} would take {pages * page_bytes >> 30} GiB on each device."
        )
    return pages


def tokens_in(pages: int, page_size: int) -> int:
    """Tokens that a pool of so many pages holds; the sink holds none."""
    return max(0, pages - 1) * page_size


def pages_in(pool_bytes: int, page_bytes: int) -> int:
    """Pages, the sink among them, that fit into a device's bytes; 0 if none do.

    Of many, a multiple of PAGES_STEP: programs are compiled for a number of pages, and the next
    start, with some bytes more or less that are free, is to find them.
    """
    pages = max(0, pool_bytes // page_bytes)
    return pages - pages % PAGES_STEP if pages >= MANY_PAGES else pages


def mask_words(vocab: int) -> int:
    """int32 numbers that hold a bit for every token of a vocabulary."""
    return -(-vocab // 32)


def step_bytes(buckets: Buckets, *, vocab: int, width: int, itemsize: int) -> int:
    """Bytes that live on a device beside weights, pool and temporaries.

    These are the sampling state, what one step hands from program to program, twice since two
    steps are in flight, a mask of each size, and one more that is uploaded.

    Args:
        vocab: tokens of the vocabulary; width: D, the model's.
        itemsize: bytes of a number of the hidden rows.
    """
    state = sum(_nbytes(part) for part in abstract_state(buckets.slots, vocab))
    sampled = buckets.sampled_rows
    logits, hidden = 4 * sampled[0] * vocab, buckets.prefill_tokens * width * itemsize
    masks = 4 * (sum(sampled) + sampled[0]) * mask_words(vocab)
    return state + 2 * (logits + hidden) + masks


def _nbytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def pool_bytes(limit: int, *, weights: int, working: int) -> int:
    """Bytes left for the pool of an accelerator that may use `limit`; negative if none are.

    Args:
        weights: bytes of weights on it.
        working: temporaries of the largest program, and what lives between steps.
    """
    return limit - weights - working - ACCELERATOR_SLACK_BYTES
