"""Pure choices among candidates by their load and by what they have cached.

The router makes them over workers, the scheduler over the dp slices of one engine: one policy, two
levels. Nothing here holds state or reads a clock; what must vary between calls is an argument.
Work is counted in prompt tokens: what it takes to prefill one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MISS_WEIGHT = 6
"""How much worse it is to compute a token than to wait while another one is computed: waiting
costs one request time, computing costs everybody the device, and the cache the room. Candidates
that compute in lockstep all pay for one's miss: for them it is worse still."""
REQUEST_CHARGE = 80
"""What a request that runs on a candidate already adds to the cost of another one there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one candidate is busy with: KV tokens it holds and requests it runs."""

    tokens: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What it would take to run one certain request on one candidate.

    Attributes:
        miss: prompt tokens that the candidate has not cached and must compute.
        wait: work that goes first there, in prompt tokens.
        requests: requests that it runs.
        tokens: KV tokens that it holds for them.
    """

    miss: int
    wait: int
    requests: int
    tokens: int

    def cost(self, miss_weight: int) -> int:
        """Expected cost, in prompt tokens."""
        return expected_cost(self.miss, self.wait, self.requests, miss_weight)


def expected_cost(miss: float, wait: float, requests: int, miss_weight: int = MISS_WEIGHT) -> int:
    """Expected cost in prompt tokens, of what `Offer` has; for callers to whom objects cost."""
    return int(miss_weight * miss + wait + REQUEST_CHARGE * requests)


def least_loaded(candidates: Sequence[Load], turn: int = 0) -> int:
    """The index of the candidate with the fewest tokens, then the fewest requests.

    Candidates that are equal in both take turns: a caller that counts `turn` up by one per choice
    spreads requests even when each finishes before the next one comes.

    Raises:
        ValueError: there is no candidate.
    """
    return least([(load.tokens, load.requests) for load in candidates], turn)


def fewest_requests(candidates: Sequence[Load], turn: int = 0) -> int:
    """The index of the candidate with the fewest requests, then the fewest tokens; ties in turn.

    Raises:
        ValueError: there is no candidate.
    """
    return least([(load.requests, load.tokens) for load in candidates], turn)


def cheapest(candidates: Sequence[Offer], turn: int = 0, *, miss_weight: int = MISS_WEIGHT) -> int:
    """The index of the candidate with the least expected cost, then the fewest tokens.

    A long cached prefix wins as long as the queue behind it is shorter than what it saves: so hot
    prefixes spread over candidates by themselves, and no threshold says when affinity must yield.
    Ties are taken in turn, as in `least_loaded`.

    Raises:
        ValueError: there is no candidate.
    """
    return least([(offer.cost(miss_weight), offer.tokens) for offer in candidates], turn)


def least(keys: Sequence[tuple[int, int]], turn: int = 0) -> int:
    """The index of the least key; equals take turns.

    Raises:
        ValueError: there is no key.
    """
    if not keys:
        raise ValueError("A choice needs at least one candidate, got none.")
    best = min(keys)
    tied = [index for index, key in enumerate(keys) if key == best]
    return tied[turn % len(tied)]
