"""Pure choices among candidates by their load.

The router makes them over workers, the scheduler over the dp slices of one engine: one policy, two
levels. Nothing here holds state or reads a clock; what must vary between calls is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one candidate is busy with: KV tokens it holds and requests it runs."""

    tokens: int
    requests: int


def least_loaded(candidates: Sequence[Load], turn: int = 0) -> int:
    """The index of the candidate with the fewest tokens, then the fewest requests.

    Candidates that are equal in both take turns: a caller that counts `turn` up by one per choice
    spreads requests even when each finishes before the next one comes.

    Raises:
        ValueError: there is no candidate.
    """
    if not candidates:
        raise ValueError("least_loaded needs at least one candidate, got none.")
    loads = [(load.tokens, load.requests) for load in candidates]
    least = min(loads)
    tied = [index for index, load in enumerate(loads) if load == least]
    return tied[turn % len(tied)]
