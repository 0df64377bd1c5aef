"""Random paged pools of latents, for tests of attention kernels."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

LAYERS, PAGES = 2, 120


def pool_and_tables(rng, lengths, page_size, width, dtype, numbers):
    """A pool [LAYERS, PAGES, page_size, numbers] in which only the sequences' own tokens are
    numbers, on scattered pages, and page tables [sequences, width]."""
    kv = np.full((LAYERS, PAGES, page_size, numbers), np.nan, np.float32)
    free = list(rng.permutation(np.arange(1, PAGES)))
    tables = np.zeros((len(lengths), width), np.int32)
    for row, length in zip(tables, lengths, strict=True):
        for i in range(-(-length // page_size)):
            row[i] = free.pop()
            n = min(page_size, length - i * page_size)
            kv[:, row[i], :n] = rng.standard_normal((LAYERS, n, numbers))
    return jnp.asarray(kv).astype(dtype), jnp.asarray(tables)


def no_nan(kv):
    """The pool for the XLA twin, which multiplies what it does not see by zero."""
    return jnp.where(jnp.isnan(kv.astype(jnp.float32)), 0, kv.astype(jnp.float32)).astype(kv.dtype)
