"""A runner without a model: it does what a plan says with a real paged KV store, in Python.

The next token is a hash of everything the row can read through its own page table, so a wrong
page, slot, position or token anywhere in the context changes it, as it would in a model.
"""

from __future__ import annotations

from serving.request import Request, SamplingParams
from serving.scheduler.plan import SampledToken, SlicePlan, StepPlan
from serving.scheduler.scheduler import Scheduler, TokenOutcome

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


class FakeRunner:
    """Runs plans. `kv[slice][page][offset]` is (position, token); page 0 is never touched."""

    def __init__(self, *, num_slices: int, slots: int, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.slots = slots
        self.kv = [[[(-1, -1)] * page_size for _ in range(pages)] for _ in range(num_slices)]
        self.last_token = [[-1] * slots for _ in range(num_slices)]

    def run(self, plan: StepPlan) -> list[list[SampledToken | None]]:
        return [self._run_slice(rank, rows) for rank, rows in enumerate(plan.slices)]

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
    """A scheduler and a fake runner of the same sizes, and what every request got so far."""

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
    ) -> None:
        self.scheduler = Scheduler(
            num_slices=num_slices,
            slots_per_slice=slots,
            pages_per_slice=pages,
            page_size=page_size,
            prefill_tokens_per_step=prefill_tokens,
            prefill_rows_per_step=prefill_rows,
            max_context_tokens=max_context_tokens,
        )
        self.runner = FakeRunner(
            num_slices=num_slices, slots=slots, pages=pages, page_size=page_size
        )
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.aborted: set[str] = set()

    def add(self, rid: str, prompt_tokens: int, max_tokens: int = 4, **sampling: object) -> None:
        """Queue a request whose prompt is told by its rid and length."""
        offset = sum(map(ord, rid))
        request = Request(
            rid=rid,
            prompt=tuple((offset + 7 * i) % VOCABULARY for i in range(prompt_tokens)),
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),
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
        plan = self.scheduler.plan()
        assert plan is not None, "nothing was planned although requests are live"
        assert any(rows.decode or rows.prefill for rows in plan.slices)
        self.scheduler.check_integrity()
        return plan

    def finish(self, plan: StepPlan) -> list[TokenOutcome]:
        """Run a plan and apply its tokens."""
        outcomes = self.scheduler.apply(plan, self.runner.run(plan))
        self.scheduler.check_integrity()
        for outcome in outcomes:
            assert outcome.rid not in self.finished
            assert outcome.rid not in self.aborted
            self.tokens[outcome.rid].append(outcome.token_id)
            if outcome.finish_reason is not None:
                self.finished[outcome.rid] = outcome.finish_reason
        return outcomes

    def step(self) -> StepPlan:
        plan = self.plan()
        self.finish(plan)
        return plan

    def drain(self, max_steps: int = 2000) -> list[StepPlan]:
        """Step until nothing is live; then every page must be free and every answer right."""
        plans = []
        while self.scheduler.has_work:
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


def rids(plan: StepPlan) -> list[tuple[list[str], list[str]]]:
    """By slice: who decodes, who prefills."""
    return [
        ([row.rid for row in rows.decode], [chunk.rid for chunk in rows.prefill])
        for rows in plan.slices
    ]
