"""Which slice takes which waiting request in one step: made for one step, then thrown away.

A request goes to the slice where it costs least (`router.policies.Offer`): tokens to compute, work
that is ahead of it, requests beside it. If that slice cannot take it in this step, because its
budget, slots or pages are used up, the request is *held* for it: computing a long prefix again
elsewhere would cost more than the wait. Nobody behind it may overtake it on that slice, others may
go elsewhere. Under the other methods the first request that finds no slice stops the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.policies import Load, Offer, cheapest
from serving.scheduler.radix_cache import Node
from serving.scheduler.rank import LiveRequest, RankScheduler, StepDraft

MISS_WEIGHT = 16
"""`router.policies.MISS_WEIGHT` for slices: one slice's prefill makes the step longer for all of
them. Chosen with scripts/simulate_scheduler.py over 2, 4 and 8 slices."""
MAX_HELD = 16
"""How many requests for each slice may be held before the rest of the queue is left for the next
step: each takes a walk through every slice's tree."""
DECODE_STEP_TOKENS = 512
"""A decode step, in the prompt tokens that could be prefilled instead: what waiting for a slot
costs. About 13 ms against 80,000 tokens/s for DeepSeek-V2-Lite on an H100 would be 1,000, 20 ms
against 20,000 tokens/s 400; the choice is not sensitive to it."""


class Dispatch:
    """The choices of one step. `closed` is True once no slice can take any more."""

    def __init__(
        self,
        ranks: Sequence[RankScheduler],
        drafts: Sequence[StepDraft],
        choose: Callable[[Sequence[Load], int], int] | None,
    ) -> None:
        """Args: choose: among slices that can start a request now; None weighs expected cost."""
        self._ranks, self._drafts, self._choose = ranks, drafts, choose
        self._held_tokens = [0] * len(ranks)
        self._held_requests = [0] * len(ranks)
        self._num_weighed = 0
        self._free_in: list[list[int] | None] = [None] * len(ranks)
        self._stopped = False

    @property
    def closed(self) -> bool:
        if self._stopped or self._num_weighed >= MAX_HELD * len(self._ranks):
            return True
        return not any(map(self.takes, range(len(self._ranks))))

    def takes(self, index: int) -> bool:
        """Whether a slice can take another request: it has room, and nobody waits for it."""
        return (
            self._drafts[index].open
            and self._ranks[index].has_slot
            and not self._held_requests[index]
        )

    def hold_back(self, live: LiveRequest) -> None:
        """Let nobody overtake a request that cannot start in this step, wherever it may run."""
        if live.bound is None:
            self._stopped = True
        else:
            self._held_requests[live.bound] += 1

    def place(self, live: LiveRequest, turn: int) -> tuple[int, Node] | None:
        """The slice that starts `live` now and the prefix it has there; None: nobody does yet."""
        if live.bound is None:
            indices: Sequence[int] = range(len(self._ranks))
        elif self.takes(live.bound):
            indices = (live.bound,)
        else:
            self.hold_back(live)
            return None
        nodes = {index: self._ranks[index].find_prefix(live, index) for index in indices}
        if self._choose is not None and live.bound is None:
            return self._place_by_load(live, nodes, turn)
        ahead = {i: self._ranks[i].tokens_ahead(live, node) for i, node in nodes.items()}
        fits = {i: self._ranks[i].fits(live, node) for i, node in nodes.items()}
        offers = [self._offer(live, i, nodes[i], ahead[i], fits[i]) for i in indices]
        index = indices[cheapest(offers, turn, miss_weight=MISS_WEIGHT)]
        if self.takes(index) and fits[index] and not ahead[index]:
            return index, nodes[index]
        # Its whole context counts, as if nothing were cached: it will also take a slot and room
        # for its answer there, and a hot prefix spreads the sooner.
        self._held_tokens[index] += len(live.context)
        self._held_requests[index] += 1
        self._num_weighed += 1
        return None

    def _place_by_load(
        self, live: LiveRequest, nodes: dict[int, Node], turn: int
    ) -> tuple[int, Node] | None:
        able = [i for i, node in nodes.items() if self.takes(i) and self._ranks[i].fits(live, node)]
        if not able:
            self._stopped = True
            return None
        assert self._choose is not None
        loads = [
            Load(
                tokens=self._ranks[i].cache.used_tokens + self._ranks[i].pending_prefill_tokens,
                requests=self._ranks[i].num_running,
            )
            for i in able
        ]
        index = able[self._choose(loads, turn)]
        return index, nodes[index]

    def _offer(self, live: LiveRequest, index: int, node: Node, ahead: int, fits: bool) -> Offer:
        rank, draft = self._ranks[index], self._drafts[index]
        wait = draft.prefill_tokens + rank.pending_prefill_tokens + self._held_tokens[index]
        if not fits:
            wait += DECODE_STEP_TOKENS * self._steps_until_free(index)
        return Offer(
            miss=len(live.context) - node.depth * rank.cache.page_size - ahead,
            wait=wait,
            requests=rank.num_running + self._held_requests[index],
            tokens=rank.cache.used_tokens,
        )

    def _steps_until_free(self, index: int) -> int:
        """Decode steps until a slot is free here, those that are promised already left out."""
        steps = self._free_in[index]
        if steps is None:
            steps = self._free_in[index] = self._ranks[index].steps_until_free()
        held = self._held_requests[index]
        return steps[min(held, len(steps) - 1)] if steps else 0
