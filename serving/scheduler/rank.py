"""One dp slice as a little server of its own: its running set, slots, pages and prefill budget.

Running requests stand in order of rank (priority, then arrival), which is also the order of their
rows, of their claims to pages, and, from the other end, of retraction: so the first request of a
slice always gets on. A step counts as done once it is planned, because the device runs steps in the
order of planning: only the tokens it samples are not known before they are applied.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter

from serving.request import Request
from serving.scheduler.cache_manager import CacheManager, IntegrityError
from serving.scheduler.phases import Phase, SliceWork
from serving.scheduler.plan import DecodeRow, PrefillChunk, SlicePlan, TokenScore
from serving.scheduler.radix_cache import Node, PrefixKey

ORDER = attrgetter("order")


class LiveRequest:
    """A request from `Scheduler.add` to its end, and how far it has come.

    Attributes:
        order: (-priority, number of arrival); a retracted request keeps it.
        arrived: time of arrival, in seconds of the scheduler's clock.
        bound: the only slice that may run it; None while every slice may.
        generated: the answer so far, all of it reported already.
        context: the tokens to prefill: the prompt and, of an answer begun elsewhere or before a
            retraction, what was generated.
        key: `context` for the prefix tree; matches: by slice, the last node found for it.
        num_cached: KV entries written by the steps planned so far.
        pages: what the cache manager gave it, in position order; meaningless while it waits.
        rows_in_flight: rows of planned steps whose results are not known yet.
        steps_left: tokens that no step planned so far samples, if it runs to max_tokens.
        first_cached: prompt tokens found in the prefix cache at the first start; None before.
        queue_s: seconds from arrival to the first start.
        scores: log probabilities of prompt tokens so far.
        passed_over: how often the queue served others first although they arrived later.
        rank: the slice it runs on; None while it waits.
        slot: its place in the slice, below slots_per_slice; meaningless while it waits.
        live: False once it is finished or aborted; a step's result for it is then dropped.
    """

    __slots__ = (
        "arrived",
        "bound",
        "context",
        "first_cached",
        "generated",
        "key",
        "live",
        "matches",
        "num_cached",
        "order",
        "pages",
        "passed_over",
        "queue_s",
        "rank",
        "request",
        "rows_in_flight",
        "scores",
        "slot",
        "steps_left",
    )

    def __init__(self, request: Request, *, number: int, arrived: float, bound: int | None) -> None:
        self.request = request
        self.order = (-request.priority, number)
        self.arrived = arrived
        self.bound = bound
        self.generated = list(request.answer)
        self.context = request.prompt + request.answer
        self.key = PrefixKey.of(self.context, request.cache_key)
        self.matches: dict[int, Node] = {}
        self.num_cached = 0
        self.pages: tuple[int, ...] = ()
        self.rows_in_flight = 0
        self.steps_left = request.sampling.max_tokens - len(request.answer)
        self.first_cached: int | None = None
        self.queue_s = 0.0
        self.scores: list[TokenScore] = []
        self.passed_over = 0
        self.rank: RankScheduler | None = None
        self.slot = -1
        self.live = True

    @property
    def max_total_tokens(self) -> int:
        """Tokens of prompt and answer if it runs to max_tokens."""
        return len(self.request.prompt) + self.request.sampling.max_tokens

    @property
    def prefilling(self) -> bool:
        """Whether a part of the context has not been planned."""
        return self.num_cached < len(self.context)

    @property
    def scoring(self) -> bool:
        """Whether log probabilities of the prompt are still wanted."""
        return self.request.prompt_logprobs is not None and not self.generated

    @property
    def max_prefix(self) -> int:
        """Most context tokens that may come from the cache: the last one must be computed."""
        return 0 if self.scoring else len(self.context) - 1

    def known_key(self) -> PrefixKey:
        """The key of all tokens known: prompt and answer so far."""
        done = len(self.context) - len(self.request.prompt)
        return self.key.extended(self.generated[done:])


@dataclass(slots=True, kw_only=True)
class Counters:
    """Totals of one slice since the start; see `serving.messages.SliceCounters`."""

    started: int = 0
    finished: int = 0
    aborted: int = 0
    retracted: int = 0
    retracted_input_tokens: int = 0
    retracted_output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0


class StepDraft:
    """One slice's rows while a step is being planned, and the prefill budget that is left."""

    __slots__ = ("decode", "prefill", "prefill_tokens", "rows", "samplers", "tokens")

    def __init__(self, *, tokens: int, rows: int) -> None:
        self.tokens = tokens
        self.rows = rows
        self.prefill_tokens = 0
        self.decode: list[DecodeRow] = []
        self.prefill: list[PrefillChunk] = []
        self.samplers: list[tuple[LiveRequest, bool]] = []
        """By row: whose it is, and whether it samples a token."""

    @property
    def open(self) -> bool:
        """Whether another chunk fits."""
        return self.tokens > 0 and self.rows > 0

    def add_decode(self, live: LiveRequest) -> None:
        """One row for the request's next token; its pages have room for the token fed."""
        request = live.request
        self.decode.append(
            DecodeRow(request.rid, live.slot, live.num_cached, live.pages, request.sampling)
        )
        self.samplers.append((live, True))
        live.num_cached += 1
        live.rows_in_flight += 1
        live.steps_left -= 1

    def add_chunk(self, live: LiveRequest) -> None:
        """As much of the request's context as the budget allows."""
        request, start = live.request, live.num_cached
        tokens = live.context[start : start + self.tokens]
        live.num_cached = end = start + len(tokens)
        samples = end == len(live.context)
        setup = samples and request.sampling.needs_setup
        num_prompt = len(request.prompt)
        self.prefill.append(
            PrefillChunk(
                request.rid,
                live.slot,
                tokens,
                start,
                live.pages,
                samples,
                request.sampling,
                prompt=request.prompt if setup else None,
                answer=live.context[num_prompt:] if setup else (),
                targets=live.context[start + 1 : end + 1] if live.scoring else None,
                num_alternatives=request.prompt_logprobs or 0,
            )
        )
        self.samplers.append((live, samples))
        live.rows_in_flight += 1
        live.steps_left -= samples
        self.tokens -= len(tokens)
        self.prefill_tokens += len(tokens)
        self.rows -= 1

    def slice_plan(self) -> SlicePlan:
        return SlicePlan(decode=tuple(self.decode), prefill=tuple(self.prefill))


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
        radix_cache: bool,
        reproducible: bool,
    ) -> None:
        """`num_pages` counts page 0. With `reproducible`, no KV entry's bits depend on what else
        runs: entries of answers are not shared (decode steps wrote them, a prompt's come from
        prefill), and every page of an answer is set aside at its start, so that nothing is
        retracted and computed again.

        Raises ValueError for a size that lets no request run.
        """
        for name, value in (
            ("num_slots", num_slots),
            ("prefill_tokens_per_step", prefill_tokens_per_step),
            ("prefill_rows_per_step", prefill_rows_per_step),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.cache = CacheManager(num_pages=num_pages, page_size=page_size, radix_cache=radix_cache)
        self.counters = Counters()
        self.unfinished: LiveRequest | None = None
        """The running request whose context is planned in part; there is one at most, because a
        context stays unfinished only where it used up a step's budget, and nothing starts without
        budget."""
        self._running: list[LiveRequest] = []
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._prefill_tokens = prefill_tokens_per_step
        self._prefill_rows = prefill_rows_per_step
        self._reproducible = reproducible

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_slot(self) -> bool:
        return bool(self._free_slots)

    @property
    def context_tokens(self) -> int:
        """KV entries of all running requests; shared ones count for each."""
        return sum(live.num_cached for live in self._running)

    @property
    def pending_prefill_tokens(self) -> int:
        """Context tokens of running requests that no step planned so far computes."""
        live = self.unfinished
        return 0 if live is None else len(live.context) - live.num_cached

    def work(self) -> SliceWork:
        """What the next step could do here."""
        prefilling = self.unfinished is not None
        closing = sum(live.steps_left <= 0 for live in self._running)
        return SliceWork(
            decoding=len(self._running) - prefilling - closing,
            prefilling=prefilling,
            can_start=bool(self._free_slots),
        )

    def steps_until_free(self) -> list[int]:
        """Steps until each running request frees its slot at the latest, soonest first."""
        return sorted(live.steps_left for live in self._running)

    def draft_running(self, phase: Phase) -> tuple[StepDraft, list[LiveRequest]]:
        """Draft the next step of the requests that run already: decode rows, then prefill.

        Where a decode row needs a page and none is left, the last running request is retracted.
        Since the rows are served in order, that is one without a row yet, at last the row's own
        request. The second result lists the retracted requests; the caller queues them.
        """
        tokens = self._prefill_tokens if phase.prefill else 0
        draft = StepDraft(tokens=tokens, rows=self._prefill_rows)
        retracted = []
        if phase.decode:
            index, page_size = 0, self.cache.page_size
            while index < len(self._running):
                live = self._running[index]
                index += 1
                if live is self.unfinished or live.steps_left <= 0:
                    continue
                # Only the first entry of a page can lack its page.
                if live.num_cached % page_size or self._grow(live):
                    draft.add_decode(live)
                elif (victim := self._victim(live)) is not None:
                    self._retract(victim)
                    retracted.append(victim)
                    index -= victim is not live
                # Else somebody's last token is in flight: its pages are free in a moment.
        if self.unfinished is not None and draft.open:
            self._add_chunk(self.unfinished, draft)
        return draft, retracted

    def find_prefix(self, live: LiveRequest, index: int) -> Node:
        """The longest prefix of a waiting request cached here; this is slice `index`."""
        node = live.matches.get(index)
        node = live.matches[index] = self.cache.match(live.key, live.max_prefix, node)
        return node

    def tokens_ahead(self, live: LiveRequest, node: Node) -> int:
        """How many tokens beyond prefix `node` the unfinished prompt here will yet cache for it.

        Waiting for them is cheaper than computing them again beside it.
        """
        leader = self.unfinished
        size = self.cache.page_size
        if leader is None or not self.cache.shares or node.depth != leader.num_cached // size:
            return 0
        if leader.key.namespace != live.key.namespace:
            return 0
        limit = min(live.max_prefix, len(leader.context)) // size
        index = node.depth
        while index < limit and live.key.page(index, size) == leader.key.page(index, size):
            index += 1
        return (index - node.depth) * size

    def fits(self, live: LiveRequest, node: Node) -> bool:
        """Whether there are a slot and pages for a waiting request, on prefix `node`.

        It takes pages for its context and one token more. One page is kept back for each running
        request that may still need one: else a prompt would be prefilled on the last pages only
        to be retracted in one of the next steps.
        """
        if not self._free_slots:
            return False
        spare = self.cache.spare_pages(node, self._first_tokens(live))
        if spare < 0 or spare >= len(self._running):
            return spare >= 0
        return spare >= sum(map(self._may_grow, self._running))

    def start(self, live: LiveRequest, node: Node, draft: StepDraft, now: float) -> None:
        """Take in a waiting request on prefix `node` and draft its first chunk. It must fit."""
        started = self.cache.start(live.request.rid, node, self._first_tokens(live))
        assert started is not None, "start() of a request that does not fit"
        live.rank = self
        live.pages = started
        live.slot = self._free_slots.pop()
        live.num_cached = node.depth * self.cache.page_size
        live.matches.clear()
        live.scores.clear()
        if live.first_cached is None:
            live.first_cached = live.num_cached
            live.queue_s = now - live.arrived
            self.counters.started += 1
            self.counters.prompt_tokens += len(live.context)
            self.counters.cached_tokens += live.num_cached
        insort(self._running, live, key=ORDER)
        self._add_chunk(live, draft)

    def remove(self, live: LiveRequest) -> None:
        """Free the slot and the pages of a running request, whatever becomes of it."""
        self._running.remove(live)
        self._free_slots.append(live.slot)
        if live is self.unfinished:
            self.unfinished = None
        key = live.known_key()
        known = len(live.request.prompt) + len(live.generated)
        self.cache.release(live.request.rid, key, min(self._shareable(live), known))
        live.rank = None

    def check_integrity(self) -> None:
        """Prove that slots and pages are free or held once and that pages hold what was cached.

        Raises:
            IntegrityError: they do not; the text names the slot, page or request.
        """
        slots = sorted(self._free_slots + [live.slot for live in self._running])
        if slots != list(range(self._num_slots)):
            raise IntegrityError(f"Slots 0 to {self._num_slots - 1} are held as {slots}.")
        if self._running != sorted(self._running, key=ORDER):
            raise IntegrityError("The running requests are not in their order.")
        unfinished = [live for live in self._running if live.prefilling]
        if unfinished != ([] if self.unfinished is None else [self.unfinished]):
            raise IntegrityError(
                f"{len(unfinished)} requests of one slice are in the middle of their prompts."
            )
        self.cache.check_integrity([live.request.rid for live in self._running])
        for live in self._running:
            held = len(self.cache.pages(live.request.rid)) * self.cache.page_size
            if live.pages != self.cache.pages(live.request.rid):
                raise IntegrityError(f"Request {live.request.rid} has an old list of its pages.")
            if live.rank is not self or not live.live or live.num_cached > held:
                raise IntegrityError(
                    f"Request {live.request.rid} runs here with {live.num_cached} KV tokens in "
                    f"pages for {held} (live: {live.live}, bound here: {live.rank is self})."
                )

    def _first_tokens(self, live: LiveRequest) -> int:
        """KV entries that a request gets room for when it starts."""
        # The last token of an answer is never fed, so its entry is never written.
        return live.max_total_tokens - 1 if self._reproducible else len(live.context) + 1

    def _grow(self, live: LiveRequest) -> bool:
        """Get a page for the next entry if it needs one; False if none is left."""
        pages = self.cache.extend(live.request.rid, live.num_cached + 1)
        if pages is not None:
            live.pages = pages
        return pages is not None

    def _add_chunk(self, live: LiveRequest, draft: StepDraft) -> None:
        """Draft a chunk and share what it writes: rows of the same step may read it already."""
        draft.add_chunk(live)
        self.unfinished = live if live.prefilling else None
        self.cache.publish(live.request.rid, live.key, self._shareable(live))

    def _shareable(self, live: LiveRequest) -> int:
        """How many of a request's written entries others may have; see `reproducible`."""
        if self._reproducible:
            return min(live.num_cached, len(live.request.prompt))
        return live.num_cached

    def _may_grow(self, live: LiveRequest) -> bool:
        return self.cache.pages_for(live.max_total_tokens) > len(self.cache.pages(live.request.rid))

    def _victim(self, needy: LiveRequest) -> LiveRequest | None:
        """Who gives up its pages for `needy`: the last request that has tokens to go.

        None where that is `needy` itself and a request's end is only waiting to be applied.
        """
        last = next(live for live in reversed(self._running) if live.steps_left > 0)
        if last is needy and any(live.steps_left <= 0 for live in self._running):
            return None
        return last

    def _retract(self, live: LiveRequest) -> None:
        """Back to the queue; what it had cached stays in the tree as long as there is room."""
        self.remove(live)
        live.num_cached = 0
        self.counters.retracted += 1
        self.counters.retracted_input_tokens += len(live.request.prompt)
        self.counters.retracted_output_tokens += len(live.generated)
