"""One dp slice as a little server of its own: its running set, slots, pages and prefill budget.

Running requests stand in arrival order, which is also the order of their rows, of their claims to
free pages, and, from the other end, of retraction: so the oldest request of a slice always gets on.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from serving.request import Request
from serving.scheduler.cache_manager import CacheManager, IntegrityError
from serving.scheduler.plan import DecodeRow, PrefillChunk, SlicePlan

ARRIVAL = attrgetter("arrival")


class LiveRequest:
    """A request from `Scheduler.add` to its end, and how far it has come.

    Attributes:
        arrival: number of the request in order of arrival; a retracted request keeps it.
        generated: the tokens sampled so far, all of them reported already.
        context: the tokens to prefill: the prompt, after a retraction also what was generated.
        num_cached: KV entries written by the steps planned so far.
        rank: the slice it runs on; None while it waits.
        slot: its place in the slice, below slots_per_slice; meaningless while it waits.
        live: False once it is finished or aborted; a step's result for it is then dropped.
    """

    __slots__ = ("arrival", "context", "generated", "live", "num_cached", "rank", "request", "slot")

    def __init__(self, request: Request, arrival: int) -> None:
        self.request = request
        self.arrival = arrival
        self.generated: list[int] = []
        self.context = request.prompt
        self.num_cached = 0
        self.rank: RankScheduler | None = None
        self.slot = -1
        self.live = True

    @property
    def max_total_tokens(self) -> int:
        """Tokens of prompt and answer if it runs to max_tokens."""
        return len(self.request.prompt) + self.request.sampling.max_tokens


class StepDraft:
    """One slice's rows while a step is being planned, and the prefill budget that is left."""

    __slots__ = ("_slice_tokens", "decode", "decoding", "prefill", "prefilling", "rows", "tokens")

    def __init__(self, *, tokens: int, rows: int) -> None:
        self.tokens = tokens
        self.rows = rows
        self._slice_tokens = tokens
        self.decode: list[DecodeRow] = []
        self.prefill: list[PrefillChunk] = []
        self.decoding: list[LiveRequest | None] = []
        self.prefilling: list[LiveRequest | None] = []

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens drafted so far."""
        return self._slice_tokens - self.tokens

    def add_decode(self, live: LiveRequest, pages: tuple[int, ...]) -> None:
        """One row for the request's next token; `pages` have room for the token fed."""
        self.decode.append(
            DecodeRow(
                rid=live.request.rid,
                slot=live.slot,
                position=live.num_cached,
                pages=pages,
                sampling=live.request.sampling,
            )
        )
        self.decoding.append(live)
        live.num_cached += 1

    def add_chunk(self, live: LiveRequest, pages: tuple[int, ...]) -> None:
        """As much of the request's context as the budget allows."""
        start = live.num_cached
        tokens = live.context[start : start + self.tokens]
        live.num_cached += len(tokens)
        samples = live.num_cached == len(live.context)
        self.prefill.append(
            PrefillChunk(
                rid=live.request.rid,
                slot=live.slot,
                tokens=tokens,
                start=start,
                pages=pages,
                samples=samples,
                sampling=live.request.sampling,
            )
        )
        self.prefilling.append(live if samples else None)
        self.tokens -= len(tokens)
        self.rows -= 1

    def slice_plan(self) -> SlicePlan:
        return SlicePlan(decode=tuple(self.decode), prefill=tuple(self.prefill))

    def samplers(self) -> list[LiveRequest | None]:
        """Who gets the token of each row, in row order; None for rows that sample nothing."""
        return self.decoding + self.prefilling


class RankScheduler:
    """The running requests of one slice. Owns their slots and pages."""

    def __init__(
        self,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        prefill_tokens_per_step: int,
        prefill_rows_per_step: int,
    ) -> None:
        """Raises ValueError for a size that lets no request run. `num_pages` counts page 0."""
        for name, value in (
            ("num_slots", num_slots),
            ("prefill_tokens_per_step", prefill_tokens_per_step),
            ("prefill_rows_per_step", prefill_rows_per_step),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.cache = CacheManager(num_pages=num_pages, page_size=page_size)
        self._running: list[LiveRequest] = []
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._prefill_tokens = prefill_tokens_per_step
        self._prefill_rows = prefill_rows_per_step

    @property
    def num_running(self) -> int:
        return len(self._running)

    def draft_running(self) -> tuple[StepDraft, list[LiveRequest]]:
        """Draft the next step of the requests that run already: all decode rows, then prefill.

        Where a decode row needs a page and none is free, the newest running request is retracted.
        Since the rows are served oldest first, that is one without a row yet, at last the row's
        own request. The second result lists the retracted requests; the caller queues them.
        """
        draft = StepDraft(tokens=self._prefill_tokens, rows=self._prefill_rows)
        retracted = []
        prefilling = []
        index = 0
        while index < len(self._running):
            live = self._running[index]
            if live.num_cached < len(live.context):
                prefilling.append(live)
            else:
                pages = self.cache.extend(live.request.rid, live.num_cached + 1)
                if pages is None:
                    retracted.append(self._retract_newest())
                    continue
                draft.add_decode(live, pages)
            index += 1
        # A prompt stays unfinished only where it used up the budget, and nothing starts without
        # budget: so at most one request of a slice is in the middle of its prompt. None of these
        # was retracted since, because each retraction was for a row that stood before its victim.
        for live in prefilling:
            draft.add_chunk(live, self.cache.pages(live.request.rid))
        return draft, retracted

    def can_start(self, live: LiveRequest, draft: StepDraft) -> bool:
        """Whether a waiting request can start in the step being drafted.

        It takes a slot, prefill budget, and pages for its context and one token more. One page
        is kept back for each running request that may still need one: else a prompt would be
        prefilled on the last free pages only to be retracted in one of the next steps.
        """
        if not (self._free_slots and draft.tokens and draft.rows):
            return False
        spare = self.cache.num_free_pages - self.cache.pages_for(len(live.context) + 1)
        if spare < 0 or spare >= len(self._running):
            return spare >= 0
        return spare >= sum(map(self._may_grow, self._running))

    def start(self, live: LiveRequest, draft: StepDraft) -> None:
        """Take in a waiting request and draft its first chunk. `can_start` must have said yes."""
        pages = self.cache.allocate(live.request.rid, len(live.context) + 1)
        assert pages is not None, "start() without can_start()"
        live.rank = self
        live.slot = self._free_slots.pop()
        insort(self._running, live, key=ARRIVAL)
        draft.add_chunk(live, pages)

    def remove(self, live: LiveRequest) -> None:
        """Free the slot and the pages of a running request, whatever becomes of it."""
        self._running.remove(live)
        self._free_slots.append(live.slot)
        self.cache.release(live.request.rid)
        live.rank = None

    def check_integrity(self) -> None:
        """Prove that slots and pages are free or owned once and that pages hold what was cached.

        Raises:
            IntegrityError: they do not; the text names the slot, page or request.
        """
        slots = sorted(self._free_slots + [live.slot for live in self._running])
        if slots != list(range(self._num_slots)):
            raise IntegrityError(f"Slots 0 to {self._num_slots - 1} are held as {slots}.")
        if self._running != sorted(self._running, key=ARRIVAL):
            raise IntegrityError("The running requests are not in order of arrival.")
        self.cache.check_integrity([live.request.rid for live in self._running])
        for live in self._running:
            held = len(self.cache.pages(live.request.rid)) * self.cache.page_size
            if live.rank is not self or not live.live or live.num_cached > held:
                raise IntegrityError(
                    f"Request {live.request.rid} runs here with {live.num_cached} KV tokens in "
                    f"pages for {held} (live: {live.live}, bound here: {live.rank is self})."
                )

    def _may_grow(self, live: LiveRequest) -> bool:
        return self.cache.pages_for(live.max_total_tokens) > len(self.cache.pages(live.request.rid))

    def _retract_newest(self) -> LiveRequest:
        live = self._running[-1]
        self.remove(live)
        # All its generated tokens are known, since no step is in flight while one is planned.
        live.context = live.request.prompt + tuple(live.generated)
        live.num_cached = 0
        return live
