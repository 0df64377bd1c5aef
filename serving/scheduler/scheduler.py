"""What every dp slice computes in each step: one central queue, bound late.

`plan` decides a step, the engine runs it, `apply` takes its tokens in. A second step may be planned
before the first is applied: rows whose input is still being sampled take it on the device.
Decisions depend on nothing but the calls made so far. An abort frees pages and slot at once, even
between `plan` and `apply`: they go only to steps planned later, and the device runs steps in the
order of planning, so a step in flight cannot write over its successor. Results of a request that is
gone are dropped.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import NamedTuple

from router.policies import Load, fewest_requests, least_loaded
from serving.request import FinishReason, Request
from serving.scheduler.cache_manager import IntegrityError
from serving.scheduler.dispatch import Dispatch
from serving.scheduler.phases import BOTH, MIXED, Phase, PhasePolicy, choose_phase
from serving.scheduler.plan import SampledToken, StepPlan, StepResult, TokenScore, TopLogprobs
from serving.scheduler.rank import ORDER, Counters, LiveRequest, RankScheduler, StepDraft

MAX_IN_FLIGHT = 2
"""Steps that may be planned and not applied: one runs while the next is prepared."""
LPM_WINDOW = 128
"""How many waiting requests --schedule-policy lpm looks at."""
MAX_PASSED_OVER = 64
"""So often lpm may serve others first; then a request's turn has come."""


class RequestTooLong(ValueError):
    """The request can never run, however empty the server; the message says what is possible."""


class QueueFull(ValueError):
    """Too many requests wait already; the message is one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes and policies. All sizes are per slice.

    Attributes:
        num_slices: number of dp slices, at least 1.
        slots_per_slice: most requests running at once.
        pages_per_slice: KV pages, the sink (page 0) included.
        page_size: KV tokens in a page.
        prefill_tokens_per_step: most prompt tokens in a step.
        prefill_rows_per_step: most prefill chunks in a step.
        max_context_tokens: most tokens of prompt and answer in one request.
        max_queued: most requests waiting; None for any number.
        schedule_policy: who starts first among equal priorities: "fcfs" in order of arrival, "lpm"
            by the longest cached prefix.
        load_balance: which slice runs a request: "cache_aware", "total_requests", "total_tokens",
            or "round_robin".
        radix_cache: whether prefixes are kept and shared.
        phases: when slices prefill.
        reproducible: see `RankScheduler`.
    """

    num_slices: int
    slots_per_slice: int
    pages_per_slice: int
    page_size: int
    prefill_tokens_per_step: int
    prefill_rows_per_step: int
    max_context_tokens: int
    max_queued: int | None = None
    schedule_policy: str = "fcfs"
    load_balance: str = "cache_aware"
    radix_cache: bool = True
    phases: PhasePolicy = field(default_factory=PhasePolicy)
    reproducible: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstOutcome:
    """What is told once, with a request's first token; see `serving.messages.FirstToken`."""

    dp_rank: int
    cached_tokens: int
    queue_s: float
    scores: tuple[TokenScore, ...] | None


class TokenOutcome(NamedTuple):
    """One new token of one request; `finish_reason` ("stop", "length") is set on its last."""

    rid: str
    token_id: int
    finish_reason: FinishReason | None
    logprob: float
    top_logprobs: TopLogprobs | None
    first: FirstOutcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceLoad:
    """The load of one slice; see `serving.messages.SliceStatus`."""

    dp_rank: int
    mode: str
    running: int
    waiting: int
    used_tokens: int
    cached_tokens: int
    total_tokens: int
    pending_prefill_tokens: int
    decode_context_tokens: int
    evicted_tokens: int
    counters: Counters


class Scheduler:
    """All live requests of one engine: the waiting ones here, the running ones by slice."""

    def __init__(
        self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises ValueError when nothing could run with these sizes."""
        for name in ("num_slices", "max_context_tokens"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")
        self.config = config
        self._clock = clock
        self._ranks = [
            RankScheduler(
                num_slots=config.slots_per_slice,
                num_pages=config.pages_per_slice,
                page_size=config.page_size,
                prefill_tokens_per_step=config.prefill_tokens_per_step,
                prefill_rows_per_step=config.prefill_rows_per_step,
                radix_cache=config.radix_cache,
                reproducible=config.reproducible,
            )
            for _ in range(config.num_slices)
        ]
        self._live: dict[str, LiveRequest] = {}
        # Waiting requests, in order: by the only slice that may run them, last those of any slice.
        self._queues: list[list[LiveRequest]] = [[] for _ in range(config.num_slices + 1)]
        self._in_flight: deque[tuple[StepPlan, list[list[tuple[LiveRequest, bool]]]]] = deque()
        self._modes = ["idle"] * config.num_slices
        self._num_arrived = 0
        self._num_started = 0
        self._since_prefill = 0
        self._delayed = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is live. If so, `plan` returns a step unless one is in flight."""
        return bool(self._live)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._queues))

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the contexts of waiting requests."""
        return sum(len(live.context) for queue in self._queues for live in queue)

    @property
    def num_retracted(self) -> int:
        """Retractions since the start; a request retracted twice counts twice."""
        return sum(rank.counters.retracted for rank in self._ranks)

    def status(self) -> tuple[SliceLoad, ...]:
        """The load of every slice, in rank order."""
        return tuple(
            SliceLoad(
                dp_rank=index,
                mode=self._modes[index],
                running=rank.num_running,
                waiting=len(self._queues[index]),
                used_tokens=rank.cache.used_tokens,
                cached_tokens=rank.cache.cached_tokens,
                total_tokens=rank.cache.total_tokens,
                pending_prefill_tokens=rank.pending_prefill_tokens,
                decode_context_tokens=rank.context_tokens,
                evicted_tokens=rank.cache.num_evicted_pages * rank.cache.page_size,
                counters=replace(rank.counters),
            )
            for index, rank in enumerate(self._ranks)
        )

    def add(self, request: Request, *, admitted: bool = False) -> None:
        """Queue a request behind all others of its priority.

        Args:
            admitted: its place in the queue was counted before (`check_queue`).

        Raises:
            RequestTooLong: prompt and max_tokens exceed the context or the pool of a slice.
            QueueFull: max_queued requests wait already.
            ValueError: the prompt is empty, max_tokens is below 1, there is no such slice, the rid
                is live already, or the answer that it brings is complete or its prompt is to be
                scored.
        """
        rid, prompt, max_tokens = request.rid, len(request.prompt), request.sampling.max_tokens
        if rid in self._live:
            raise ValueError(f"Request id {rid!r} is in use by a request that has not finished.")
        if not prompt:
            raise ValueError("The prompt is empty: at least one token is needed.")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        if request.dp_rank is not None and not 0 <= request.dp_rank < len(self._ranks):
            raise ValueError(
                f"DP rank {request.dp_rank} is not active: ranks 0 to {len(self._ranks) - 1} are."
            )
        if request.answer and len(request.answer) >= max_tokens:
            raise ValueError(
                f"An answer of {len(request.answer)} tokens cannot go on: "
                f"max_tokens is {max_tokens}."
            )
        if request.answer and request.prompt_logprobs is not None:
            raise ValueError("The prompt of an answer that goes on cannot be scored.")
        pool = self._ranks[0].cache.total_tokens
        for limit, what in (
            (self.config.max_context_tokens, "the context"),
            (pool, "the KV pool"),
        ):
            if prompt + max_tokens > limit:
                raise RequestTooLong(
                    f"The prompt has {prompt} tokens and max_tokens is {max_tokens}, together "
                    f"{prompt + max_tokens}, but {what} holds at most {limit} tokens per request."
                )
        if not admitted:
            self.check_queue()
        bound = request.dp_rank
        if bound is None and self.config.load_balance == "round_robin":
            bound = self._num_arrived % len(self._ranks)
        live = LiveRequest(request, number=self._num_arrived, arrived=self._clock(), bound=bound)
        self._live[rid] = live
        self._num_arrived += 1
        insort(self._queue_of(live), live, key=ORDER)

    def check_queue(self, more: int = 0) -> None:
        """Raises QueueFull if, beside `more` requests elsewhere, max_queued wait already."""
        most = self.config.max_queued
        if most is not None and self.num_waiting + more >= most:
            raise QueueFull(f"The request queue is full: {most} requests wait already.")

    def is_live(self, rid: str) -> bool:
        """Whether a request of this id waits or runs."""
        return rid in self._live

    def abort(self, rid: str) -> bool:
        """Forget a request and free what it holds; no outcome for it follows.

        Allowed at any time, between `plan` and `apply` too; the rid may be used again at once.
        Returns whether the request was live.
        """
        return self._end(rid, "aborted")

    def finish(self, rid: str) -> bool:
        """End a request whose answer is complete for a reason that the scheduler cannot see.

        As `abort`, but it counts as finished.
        """
        return self._end(rid, "finished")

    def flush_cache(self) -> bool:
        """Forget all cached prefixes, unless requests are live. Returns whether it did."""
        if self._live or self._in_flight:
            return False
        for rank in self._ranks:
            rank.cache.flush()
        return True

    def plan(self) -> StepPlan | None:
        """Decide the next step; None when nothing can be done before a step in flight is applied.

        Requests that run go first: a decode row for each, then the prompt left unfinished by the
        step before. Waiting requests then start, in order, each on its slice. The plan counts as
        launched: give its result to `apply`, in the order of planning.

        Raises:
            RuntimeError: two steps have not been applied.
        """
        if len(self._in_flight) == MAX_IN_FLIGHT:
            raise RuntimeError("plan() was called with two steps that have not been applied.")
        phase = self._choose_phase()
        drafts = self._draft(phase)
        if not any(draft.samplers for draft in drafts) and phase.prefill != phase.decode:
            # Prefill was meant to have the step, but there is no room to start anything; or decode
            # was, but its rows gave up their pages to an unfinished prompt.
            phase = Phase(prefill=phase.decode, decode=phase.prefill)
            drafts = self._draft(phase)
        if not any(draft.samplers for draft in drafts):
            return None
        plan = StepPlan(slices=tuple(draft.slice_plan() for draft in drafts))
        self._in_flight.append((plan, [draft.samplers for draft in drafts]))
        self._count(plan, phase)
        return plan

    def apply(self, plan: StepPlan, result: StepResult) -> list[TokenOutcome]:
        """Take in the result of a step; finished requests free their slots and pages.

        The outcomes come in the order of rows, without those of requests aborted since.

        Raises:
            ValueError: the plan is not the oldest one in flight, or the tokens do not match its
                rows.
        """
        if not self._in_flight or self._in_flight[0][0] is not plan:
            raise ValueError("apply() was called with a plan that is not the oldest in flight.")
        samplers = self._in_flight[0][1]
        if [len(tokens) for tokens in result.tokens] != [len(rows) for rows in samplers]:
            raise ValueError(
                f"The plan has {[len(rows) for rows in samplers]} rows by slice, but "
                f"{[len(tokens) for tokens in result.tokens]} sampled tokens were given."
            )
        self._in_flight.popleft()
        outcomes: list[TokenOutcome] = []
        take, scores = self._take, result.scores
        for index, (rows, tokens) in enumerate(zip(samplers, result.tokens, strict=True)):
            known = len(outcomes)
            for (live, samples), token in zip(rows, tokens, strict=True):
                live.rows_in_flight -= 1
                if samples != (token is not None):
                    raise ValueError("The token of a row is missing, or one came unasked for.")
                if not live.live:
                    continue
                if scores and live.scoring:
                    live.scores += scores.get(live.request.rid, ())
                if token is not None:
                    outcomes.append(take(live, token, index))
            self._ranks[index].counters.generated_tokens += len(outcomes) - known
        return outcomes

    def check_integrity(self) -> None:
        """Prove that every request waits or runs, once, and that no slot or page is lost.

        Cheap enough for tests and idle moments: linear in pages and requests.

        Raises:
            IntegrityError: it is not so; the text names what is wrong.
        """
        for rank in self._ranks:
            rank.check_integrity()
        if any(queue != sorted(queue, key=ORDER) for queue in self._queues):
            raise IntegrityError("The waiting requests are not in their order.")
        waiting = [live for queue in self._queues for live in queue]
        num_running = sum(rank.num_running for rank in self._ranks)
        if len(self._live) != num_running + len(waiting) or not all(
            self._live.get(live.request.rid) is live and live.rank is None for live in waiting
        ):
            raise IntegrityError(
                f"{len(self._live)} requests are live, but {num_running} run and "
                f"{len(waiting)} wait."
            )

    def _choose_phase(self) -> Phase:
        if self.config.phases == MIXED:
            return BOTH  # without counting what everybody could do
        return choose_phase(
            self.config.phases,
            [rank.work() for rank in self._ranks],
            waiting=self.num_waiting,
            since_prefill=self._since_prefill,
            delayed=self._delayed,
        )

    def _draft(self, phase: Phase) -> list[StepDraft]:
        """The rows of every slice: running requests, then those that start now."""
        drafts = []
        for rank in self._ranks:
            draft, retracted = rank.draft_running(phase)
            drafts.append(draft)
            for live in retracted:
                insort(self._queue_of(live), live, key=ORDER)
        if phase.prefill and self.num_waiting:
            self._admit(drafts)
        return drafts

    def _admit(self, drafts: list[StepDraft]) -> None:
        """Start waiting requests, in order, as long as a slice has room for more prompt."""
        dispatch = Dispatch(self._ranks, drafts, choose=self._chooser())
        if dispatch.closed:
            return
        now = self._clock()
        started = []
        for live in self._in_order(dispatch):
            if live.rows_in_flight:
                dispatch.hold_back(live)  # retracted a moment ago: its last token is not known yet
            else:
                if live.generated:
                    self._renew(live)
                choice = dispatch.place(live, turn=self._num_started)
                if choice is not None:
                    index, node = choice
                    self._ranks[index].start(live, node, drafts[index], now)
                    started.append(live)
                    self._num_started += 1
            if dispatch.closed:
                break
        if started:
            self._leave_queues(started)

    def _leave_queues(self, started: list[LiveRequest]) -> None:
        gone = set(started)
        for index in {len(self._ranks) if live.bound is None else live.bound for live in gone}:
            self._queues[index] = [live for live in self._queues[index] if live not in gone]
        if self.config.schedule_policy == "lpm":
            newest = max(started, key=ORDER)
            for queue in self._queues:
                for live in queue:
                    live.passed_over += live.order < newest.order

    def _chooser(self) -> Callable[[Sequence[Load], int], int] | None:
        """How to choose among slices that can start a request now; None: by expected cost."""
        match self.config.load_balance:
            case "cache_aware":
                return None
            case "total_requests":
                return fewest_requests
            case _:
                return least_loaded

    def _queue_of(self, live: LiveRequest) -> list[LiveRequest]:
        return self._queues[-1 if live.bound is None else live.bound]

    def _in_order(self, dispatch: Dispatch) -> Iterator[LiveRequest]:
        """The waiting requests as they may start; of a slice's own ones as many as it takes."""

        def own(index: int) -> Iterator[LiveRequest]:
            for live in self._queues[index]:
                if not dispatch.takes(index):
                    return
                yield live

        merged = heapq.merge(
            *(own(index) for index, queue in enumerate(self._queues[:-1]) if queue),
            self._queues[-1],
            key=ORDER,
        )
        if self.config.schedule_policy != "lpm":
            return merged
        return chain(sorted(islice(merged, LPM_WINDOW), key=self._prefix_first), merged)

    def _prefix_first(self, live: LiveRequest) -> tuple[int, bool, int, int]:
        """Sorts by priority, then those whose turn has come, then by cached prefix."""
        priority, number = live.order
        if live.passed_over >= MAX_PASSED_OVER:
            return priority, False, 0, number
        depth = max(rank.find_prefix(live, index).depth for index, rank in enumerate(self._ranks))
        return priority, True, -depth, number

    def _renew(self, live: LiveRequest) -> None:
        """The context of a request that was retracted: all its tokens are known by now."""
        done = len(live.context) - len(live.request.prompt)
        if done < len(live.generated):
            live.key = live.known_key()
            live.context = live.request.prompt + tuple(live.generated)

    def _count(self, plan: StepPlan, phase: Phase) -> None:
        self._modes = [s.mode for s in plan.slices]
        for rank, slice_plan in zip(self._ranks, plan.slices, strict=True):
            rank.counters.prefill_steps += bool(slice_plan.prefill)
            rank.counters.decode_steps += slice_plan.mode == "decode"
        if plan.is_extend:
            self._since_prefill = self._delayed = 0
        else:
            in_time = self._since_prefill >= self.config.phases.interval
            self._delayed += in_time and not phase.prefill
            self._since_prefill += 1

    def _take(self, live: LiveRequest, token: SampledToken, index: int) -> TokenOutcome:
        generated, request = live.generated, live.request
        token_id, logprob, top_logprobs = token
        first = self._first(live, index) if len(generated) == len(request.answer) else None
        generated.append(token_id)
        reason: FinishReason | None = None
        if token_id in request.sampling.stop_token_ids:
            reason = "stop"
        elif len(generated) == request.sampling.max_tokens:
            reason = "length"
        if reason is not None:
            self._ranks[index].counters.finished += 1
            self._forget(live)
        return TokenOutcome(request.rid, token_id, reason, logprob, top_logprobs, first)

    def _first(self, live: LiveRequest, index: int) -> FirstOutcome:
        """What is told with a request's first token, which slice `index` computed."""
        return FirstOutcome(
            dp_rank=index,
            cached_tokens=live.first_cached or 0,
            queue_s=live.queue_s,
            scores=tuple(live.scores) if live.scoring else None,
        )

    def _end(self, rid: str, how: str) -> bool:
        live = self._live.get(rid)
        if live is None:
            return False
        rank = live.rank or self._ranks[live.bound or 0]
        setattr(rank.counters, how, getattr(rank.counters, how) + 1)
        self._forget(live)
        return True

    def _forget(self, live: LiveRequest) -> None:
        if live.rank is not None:
            live.rank.remove(live)
        else:
            self._queue_of(live).remove(live)
        live.live = False
        del self._live[live.request.rid]
