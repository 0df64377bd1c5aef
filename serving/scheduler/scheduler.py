"""What every dp slice computes in each step: one central queue in order of arrival, bound late.

`plan` decides a step, the engine runs it, `apply` takes its tokens in; the two alternate. Decisions
depend on nothing but the calls made so far. An abort frees pages and slot at once, even between
`plan` and `apply`: they go only to steps launched later, and the device runs steps in the order of
launch, so a step in flight cannot write over its successor. That holds for any number of steps in
flight; results of a request that is gone are dropped.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from router.policies import Load, least_loaded
from serving.request import FinishReason, Request
from serving.scheduler.cache_manager import IntegrityError
from serving.scheduler.plan import SampledToken, StepPlan
from serving.scheduler.rank import ARRIVAL, LiveRequest, RankScheduler, StepDraft


class RequestTooLong(ValueError):
    """The request can never run, however empty the server; the message says what is possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutcome:
    """One new token of one request; `finish_reason` ("stop", "length") is set on its last."""

    rid: str
    token_id: int
    finish_reason: FinishReason | None
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceLoad:
    """The load of one slice: running requests, KV tokens in owned pages, KV tokens in all."""

    dp_rank: int
    running: int
    used_tokens: int
    total_tokens: int


class Scheduler:
    """All live requests of one engine: the waiting ones here, the running ones by slice."""

    def __init__(
        self,
        *,
        num_slices: int,
        slots_per_slice: int,
        pages_per_slice: int,
        page_size: int,
        prefill_tokens_per_step: int,
        prefill_rows_per_step: int,
        max_context_tokens: int,
    ) -> None:
        """All sizes are per slice.

        Args:
            num_slices: number of dp slices, at least 1.
            slots_per_slice: most requests running at once.
            pages_per_slice: KV pages, the sink (page 0) included.
            page_size: KV tokens in a page.
            prefill_tokens_per_step: most prompt tokens in a step.
            prefill_rows_per_step: most prefill chunks in a step.
            max_context_tokens: most tokens of prompt and answer in one request.

        Raises:
            ValueError: with these sizes nothing could run.
        """
        for name, value in (("num_slices", num_slices), ("max_context_tokens", max_context_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self._ranks = [
            RankScheduler(
                num_slots=slots_per_slice,
                num_pages=pages_per_slice,
                page_size=page_size,
                prefill_tokens_per_step=prefill_tokens_per_step,
                prefill_rows_per_step=prefill_rows_per_step,
            )
            for _ in range(num_slices)
        ]
        self._max_context_tokens = max_context_tokens
        self._live: dict[str, LiveRequest] = {}
        self._waiting: deque[LiveRequest] = deque()  # in order of arrival
        self._in_flight: tuple[StepPlan, list[list[LiveRequest | None]]] | None = None
        self._num_arrived = 0
        self._num_started = 0
        self._num_retracted = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is live. If so, and no step is in flight, `plan` returns one."""
        return bool(self._live)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_retracted(self) -> int:
        """Retractions since the start; a request retracted twice counts twice."""
        return self._num_retracted

    def status(self) -> tuple[SliceLoad, ...]:
        """The load of every slice, in rank order."""
        return tuple(
            SliceLoad(
                dp_rank=index,
                running=rank.num_running,
                used_tokens=rank.cache.used_tokens,
                total_tokens=rank.cache.total_tokens,
            )
            for index, rank in enumerate(self._ranks)
        )

    def add(self, request: Request) -> None:
        """Queue a request behind all others.

        Raises:
            RequestTooLong: prompt and max_tokens exceed the context or the pool of a slice.
            ValueError: the prompt is empty, max_tokens is below 1, or the rid is live already.
        """
        rid, prompt, max_tokens = request.rid, len(request.prompt), request.sampling.max_tokens
        if rid in self._live:
            raise ValueError(f"Request id {rid!r} is in use by a request that has not finished.")
        if not prompt:
            raise ValueError("The prompt is empty: at least one token is needed.")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        pool = self._ranks[0].cache.total_tokens
        for limit, what in ((self._max_context_tokens, "the context"), (pool, "the KV pool")):
            if prompt + max_tokens > limit:
                raise RequestTooLong(
                    f"The prompt has {prompt} tokens and max_tokens is {max_tokens}, together "
                    f"{prompt + max_tokens}, but {what} holds at most {limit} tokens per request."
                )
        live = self._live[rid] = LiveRequest(request, self._num_arrived)
        self._num_arrived += 1
        self._waiting.append(live)

    def abort(self, rid: str) -> bool:
        """Forget a request and free what it holds; no outcome for it follows.

        Allowed at any time, between `plan` and `apply` too; the rid may be used again at once.
        Returns whether the request was live.
        """
        live = self._live.get(rid)
        if live is None:
            return False
        if live.rank is None:
            self._waiting.remove(live)
        self._forget(live)
        return True

    def plan(self) -> StepPlan | None:
        """Decide the next step; None when no request is live.

        Requests that run go first: a decode row for each, then the prompt left unfinished by the
        step before. Waiting requests then start in order of arrival as long as the first of them
        finds a slice. The plan counts as launched: give its tokens to `apply`, which must come
        before the next `plan`.

        Raises:
            RuntimeError: the step planned before has not been applied.
        """
        if self._in_flight is not None:
            raise RuntimeError("plan() was called before the tokens of the last plan were applied.")
        drafts = []
        for rank in self._ranks:
            draft, retracted = rank.draft_running()
            drafts.append(draft)
            self._num_retracted += len(retracted)
            for live in retracted:
                # It arrived before all that wait, except others that were retracted.
                insort(self._waiting, live, key=ARRIVAL)
        while self._waiting:
            index = self._choose_slice(self._waiting[0], drafts)
            if index is None:
                break
            self._ranks[index].start(self._waiting.popleft(), drafts[index])
            self._num_started += 1
        if not any(draft.decode or draft.prefill for draft in drafts):
            return None
        plan = StepPlan(slices=tuple(draft.slice_plan() for draft in drafts))
        self._in_flight = plan, [draft.samplers() for draft in drafts]
        return plan

    def apply(
        self, plan: StepPlan, sampled: Sequence[Sequence[SampledToken | None]]
    ) -> list[TokenOutcome]:
        """Take in the tokens of a step; finished requests free their slots and pages.

        `sampled[i]` has one entry per row of `plan.slices[i]`, decode rows first, then prefill
        chunks: the row's token, or None where a chunk samples nothing. The outcomes come in that
        order, without those of requests aborted since.

        Raises:
            ValueError: the plan is not the one in flight, or the tokens do not match its rows.
        """
        if self._in_flight is None or self._in_flight[0] is not plan:
            raise ValueError("apply() was called with a plan that is not in flight.")
        samplers = self._in_flight[1]
        if [len(tokens) for tokens in sampled] != [len(rows) for rows in samplers]:
            raise ValueError(
                f"The plan has {[len(rows) for rows in samplers]} rows by slice, but "
                f"{[len(tokens) for tokens in sampled]} sampled tokens were given."
            )
        self._in_flight = None
        outcomes = []
        for rows, tokens in zip(samplers, sampled, strict=True):
            for live, token in zip(rows, tokens, strict=True):
                if (live is None) != (token is None):
                    raise ValueError("The token of a row is missing, or one came unasked for.")
                if live is not None and token is not None and live.live:
                    outcomes.append(self._take(live, token))
        return outcomes

    def check_integrity(self) -> None:
        """Prove that every request waits or runs, once, and that no slot or page is lost.

        Cheap enough for tests and idle moments: linear in pages and requests.

        Raises:
            IntegrityError: it is not so; the text names what is wrong.
        """
        for rank in self._ranks:
            rank.check_integrity()
        waiting = list(self._waiting)
        if waiting != sorted(waiting, key=ARRIVAL):
            raise IntegrityError("The waiting requests are not in order of arrival.")
        num_running = sum(rank.num_running for rank in self._ranks)
        if len(self._live) != num_running + len(waiting) or not all(
            self._live.get(live.request.rid) is live and live.rank is None for live in waiting
        ):
            raise IntegrityError(
                f"{len(self._live)} requests are live, but {num_running} run and "
                f"{len(waiting)} wait."
            )

    def _choose_slice(self, live: LiveRequest, drafts: list[StepDraft]) -> int | None:
        """The slice that starts a waiting request in this step; None when none can.

        All slices wait for the one with the most prompt tokens. So the first question is where
        least of the prompt is left for later steps, the second where the step gets least longer
        by it, and only then which slice has the least load.
        """
        longest = max(draft.prefill_tokens for draft in drafts)
        least_cost = None
        best: list[int] = []
        for index, (rank, draft) in enumerate(zip(self._ranks, drafts, strict=True)):
            if not rank.can_start(live, draft):
                continue
            chunk = min(len(live.context), draft.tokens)
            cost = (len(live.context) - chunk, max(longest, draft.prefill_tokens + chunk))
            if least_cost is None or cost < least_cost:
                least_cost, best = cost, []
            if cost == least_cost:
                best.append(index)
        if not best:
            return None
        ranks = [self._ranks[index] for index in best]
        loads = [Load(tokens=r.cache.used_tokens, requests=r.num_running) for r in ranks]
        return best[least_loaded(loads, turn=self._num_started)]

    def _take(self, live: LiveRequest, token: SampledToken) -> TokenOutcome:
        live.generated.append(token.token_id)
        sampling = live.request.sampling
        reason: FinishReason | None = None
        if token.token_id in sampling.stop_token_ids:
            reason = "stop"
        elif len(live.generated) == sampling.max_tokens:
            reason = "length"
        if reason is not None:
            self._forget(live)
        return TokenOutcome(
            rid=live.request.rid,
            token_id=token.token_id,
            finish_reason=reason,
            logprob=token.logprob,
            top_logprobs=token.top_logprobs,
        )

    def _forget(self, live: LiveRequest) -> None:
        if live.rank is not None:
            live.rank.remove(live)
        live.live = False
        del self._live[live.request.rid]
