"""A runner without a model: it does what a plan says with a real paged KV store, in Python.

The next token is a hash of everything the row can read through its own page table, so a wrong
page, slot, position or token anywhere in the context changes it, as it would in a model.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from serving.request import Request, SamplingParams
from serving.scheduler.plan import SampledToken, SlicePlan, StepPlan, StepResult, TokenScore
from serving.scheduler.scheduler import FirstOutcome, Scheduler, SchedulerConfig, TokenOutcome

VOCABULARY = 29


def next_token(context: list[int], seed: int) -> int:
    """The token after `context`: a polynomial hash, so that order and length matter."""
    value = seed + 1
    for token in context:
        value = (value * 1_000_003 + token + 17) % (2**61 - 1)
    return value % VOCABULARY


def tokens_alone(request: Request) -> list[int]:
    """What a request gets when nothing else runs."""
    tokens = list(request.prompt)
    sampling = request.sampling
    for _ in range(sampling.max_tokens):
        tokens.append(next_token(tokens, sampling.seed))
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(request.prompt) :]


def score(target: int, num_alternatives: int) -> TokenScore:
    """The score of a prompt token: any function of what the chunk says."""
    top = tuple((token, -1.0 - token) for token in range(num_alternatives))
    return TokenScore(target, -float(target), top)


class FakeRunner:
    """Runs plans. `kv[slice][page][offset]` is (position, token); page 0 is never touched."""

    def __init__(self, *, num_slices: int, slots: int, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.slots = slots
        self.kv = [[[(-1, -1)] * page_size for _ in range(pages)] for _ in range(num_slices)]
        self.last_token = [[-1] * slots for _ in range(num_slices)]

    def run(self, plan: StepPlan) -> StepResult:
        tokens = [self._run_slice(rank, rows) for rank, rows in enumerate(plan.slices)]
        scores = {
            chunk.rid: [score(target, chunk.num_alternatives) for target in chunk.targets]
            for rows in plan.slices
            for chunk in rows.prefill
            if chunk.targets is not None
        }
        return StepResult(tokens=tokens, scores=scores)

    def _run_slice(self, rank: int, rows: SlicePlan) -> list[SampledToken | None]:
        # All rows write before any reads: two rows that share a page spoil each other's context.
        slots = [row.slot for row in (*rows.decode, *rows.prefill)]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.slots for slot in slots)
        last_token = self.last_token[rank]
        for row in rows.decode:
            self._write(rank, row.pages, row.position, last_token[row.slot])
        for chunk in rows.prefill:
            assert chunk.tokens
            for position, token in enumerate(chunk.tokens, chunk.start):
                self._write(rank, chunk.pages, position, token)
        sampled: list[SampledToken | None] = []
        for row in rows.decode:
            sampled.append(self._sample(rank, row.pages, row.position + 1, row.slot, row.sampling))
        for chunk in rows.prefill:
            end = chunk.start + len(chunk.tokens)
            token = self._sample(rank, chunk.pages, end, chunk.slot, chunk.sampling)
            sampled.append(token if chunk.samples else None)
        return sampled

    def _write(self, rank: int, pages: tuple[int, ...], position: int, token: int) -> None:
        page = pages[position // self.page_size]
        assert page != 0, "page 0 is the sink"
        self.kv[rank][page][position % self.page_size] = (position, token)

    def _sample(
        self, rank: int, pages: tuple[int, ...], length: int, slot: int, sampling: SamplingParams
    ) -> SampledToken:
        entries = [entry for page in pages for entry in self.kv[rank][page]][:length]
        assert [position for position, _ in entries] == list(range(length))
        token = next_token([token for _, token in entries], sampling.seed)
        self.last_token[rank][slot] = token
        return SampledToken(token_id=token, logprob=-1.0)


class Harness:
    """A scheduler and a fake runner of the same sizes, and what every request got so far.

    With `overlap` a step is planned and run before the tokens of the step before are applied.
    """

    def __init__(
        self,
        *,
        num_slices: int = 1,
        slots: int = 4,
        pages: int = 64,
        page_size: int = 4,
        prefill_tokens: int = 16,
        prefill_rows: int = 4,
        max_context_tokens: int = 1 << 20,
        overlap: bool = False,
        **policies: object,
    ) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_slices=num_slices,
                slots_per_slice=slots,
                pages_per_slice=pages,
                page_size=page_size,
                prefill_tokens_per_step=prefill_tokens,
                prefill_rows_per_step=prefill_rows,
                max_context_tokens=max_context_tokens,
                **policies,
            ),
            clock=lambda: self.now,
        )
        self.runner = FakeRunner(
            num_slices=num_slices, slots=slots, pages=pages, page_size=page_size
        )
        self.overlap = overlap
        self.launched: deque[tuple[StepPlan, StepResult]] = deque()
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.first: dict[str, FirstOutcome] = {}
        self.finished: dict[str, str] = {}
        self.aborted: set[str] = set()

    def add(
        self,
        rid: str,
        prompt_tokens: int,
        max_tokens: int = 4,
        *,
        shared: int = 0,
        **fields: object,
    ) -> None:
        """Queue a request; its prompt is told by its rid and length, but for `shared` first tokens.

        `fields` are those of the request or of its sampling parameters.
        """
        offset = sum(map(ord, rid))
        own = {f.name for f in dataclasses.fields(Request)}
        request = Request(
            rid=rid,
            prompt=tuple(
                i % 11 if i < shared else (offset + 7 * i) % VOCABULARY
                for i in range(prompt_tokens)
            ),
            sampling=SamplingParams(
                max_tokens=max_tokens, **{k: v for k, v in fields.items() if k not in own}
            ),
            **{k: v for k, v in fields.items() if k in own},
        )
        self.scheduler.add(request)
        self.requests[rid] = request
        self.tokens[rid] = []

    def abort(self, rid: str) -> bool:
        aborted = self.scheduler.abort(rid)
        if aborted:
            self.aborted.add(rid)
        self.scheduler.check_integrity()
        return aborted

    def plan(self) -> StepPlan:
        plan = self._launch()
        assert plan is not None, "nothing was planned although requests are live"
        return plan

    def _launch(self) -> StepPlan | None:
        """Plan a step and run it; its result waits to be applied."""
        plan = self.scheduler.plan()
        self.scheduler.check_integrity()
        if plan is None:
            return None
        assert any(rows.decode or rows.prefill for rows in plan.slices)
        self.launched.append((plan, self.runner.run(plan)))
        return plan

    def finish(self, plan: StepPlan) -> list[TokenOutcome]:
        """Apply the result of the oldest plan, which is this one."""
        oldest, result = self.launched.popleft()
        assert oldest is plan
        outcomes = self.scheduler.apply(plan, result)
        self.scheduler.check_integrity()
        for outcome in outcomes:
            assert outcome.rid not in self.finished
            assert outcome.rid not in self.aborted
            if not self.tokens[outcome.rid]:
                assert outcome.first is not None
                self.first[outcome.rid] = outcome.first
            else:
                assert outcome.first is None
            self.tokens[outcome.rid].append(outcome.token_id)
            if outcome.finish_reason is not None:
                self.finished[outcome.rid] = outcome.finish_reason
        return outcomes

    def step(self) -> StepPlan:
        """One turn of the engine's loop; the plan made, or applied where none could be made."""
        if not self.overlap:
            plan = self.plan()
            self.finish(plan)
            return plan
        plan = self._launch()
        assert plan is not None or self.launched, "requests are live, but nothing happens"
        if plan is None or len(self.launched) > 1:
            oldest = self.launched[0][0]
            self.finish(oldest)
            return plan or oldest
        return plan

    def drain(self, max_steps: int = 2000) -> list[StepPlan]:
        """Step until nothing is live; then every page must be free and every answer right."""
        plans = []
        while self.scheduler.has_work or self.launched:
            assert len(plans) < max_steps, "no end in sight: a livelock"
            plans.append(self.step())
        assert self.scheduler.plan() is None
        self.check_answers()
        for load in self.scheduler.status():
            assert load.running == 0
            assert load.used_tokens == 0
        return plans

    def check_answers(self) -> None:
        assert self.finished.keys() | self.aborted == self.requests.keys()
        for rid, request in self.requests.items():
            alone = tokens_alone(request)
            if rid in self.aborted:
                assert self.tokens[rid] == alone[: len(self.tokens[rid])]
            else:
                assert self.tokens[rid] == alone
                stopped = alone[-1] in request.sampling.stop_token_ids
                assert self.finished[rid] == ("stop" if stopped else "length")
        for rid, first in self.first.items():
            request = self.requests[rid]
            assert 0 <= first.cached_tokens < len(request.prompt)
            assert first.dp_rank == request.dp_rank or request.dp_rank is None
            if request.prompt_logprobs is None:
                assert first.scores is None
            else:
                assert first.cached_tokens == 0
                wanted = [score(token, request.prompt_logprobs) for token in request.prompt[1:]]
                assert list(first.scores or ()) == wanted


def rids(plan: StepPlan) -> list[tuple[list[str], list[str]]]:
    """By slice: who decodes, who prefills."""
    return [
        ([row.rid for row in rows.decode], [chunk.rid for chunk in rows.prefill])
        for rows in plan.slices
    ]
