"""The engine's order of things, without a model: launch, read, apply, with and without overlap."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from serving.engine.engine import Engine, RequestFailure
from serving.request import Grammar, Request, SamplingParams
from serving.scheduler.plan import StepPlan
from serving.scheduler.scheduler import QueueFull, Scheduler, SchedulerConfig
from tests.serving.scheduler.fake_runner import FakeRunner, tokens_alone

GRAMMAR = Grammar(kind="regex", text="a")


class FakeStep:
    def __init__(self, runner: RecordingRunner, plan: StepPlan, number: int) -> None:
        self.runner, self.plan, self.number = runner, plan, number
        self.masks = None
        self._result = runner.fake.run(plan)

    def sample(self, masks=None):
        self.runner.log.append(("sample", self.number))
        self.masks = masks

    def open_masks(self):
        return np.full((len(self.plan.slices), 8, 1), -1, np.int32)

    def mask_row(self, dp_rank, index):
        return index

    def result(self):
        self.runner.log.append(("read", self.number))
        return self._result


class RecordingRunner:
    """The fake runner behind the interface of `ModelRunner`, and the order of calls."""

    buckets = None

    def __init__(self, **sizes: int) -> None:
        self.fake = FakeRunner(**sizes)
        self.log: list[tuple[str, int]] = []
        self.steps: list[FakeStep] = []

    def launch(self, plan):
        step = FakeStep(self, plan, len(self.steps))
        self.steps.append(step)
        self.log.append(("launch", step.number))
        return step


class FakeGrammars:
    """Grammars that end an answer after some tokens, or fail."""

    def __init__(self, *, length: int = 99, fails_at: int = 99, slow: int = 0) -> None:
        self.length, self.fails_at, self.slow, self.asked = length, fails_at, slow, 0
        self.tokens: dict[str, list[int]] = {}
        self.failures: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self.tokens)

    def __contains__(self, rid: str) -> bool:
        return rid in self.tokens

    def start(self, rid, grammar, answer=()):
        if grammar.text == "(":
            self.failures[rid] = "The regular expression is wrong."
        self.tokens[rid] = []

    def advance(self, rid, token_id):
        self.tokens[rid].append(token_id)
        if len(self.tokens[rid]) == self.fails_at:
            raise ValueError("The grammar is too complex.")

    def fill(self, rid, row):
        row[:] = 1000 + len(self.tokens[rid])

    def is_finished(self, rid):
        return len(self.tokens[rid]) == self.length

    def failure(self, rid):
        return self.failures.get(rid)

    def is_ready(self, rid):
        self.asked += 1
        return self.asked > self.slow

    def drop(self, rid):
        self.tokens.pop(rid, None)


def make_engine(*, overlap: bool, grammars=None, slots=4, pages=40, **policies) -> Engine:
    scheduler = Scheduler(
        SchedulerConfig(
            num_slices=2,
            slots_per_slice=slots,
            pages_per_slice=pages,
            page_size=2,
            prefill_tokens_per_step=8,
            prefill_rows_per_step=2,
            max_context_tokens=1000,
            **policies,
        )
    )
    runner = RecordingRunner(num_slices=2, slots=slots, pages=pages, page_size=2)
    return Engine(runner, scheduler, grammars, overlap=overlap)


def make_request(rid: str, num_prompt: int = 5, max_tokens: int = 6, **sampling) -> Request:
    return Request(
        rid=rid,
        prompt=tuple(3 + (ord(rid[-1]) + 5 * i) % 20 for i in range(num_prompt)),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
    )


def drain(engine: Engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for _ in range(500):
        if not engine.has_work:
            break
        for outcome in engine.step():
            assert not isinstance(outcome, RequestFailure)
            tokens.setdefault(outcome.rid, []).append(outcome.token_id)
        engine.scheduler.check_integrity()
    assert not engine.has_work
    return tokens


def test_a_step_is_launched_before_the_one_before_is_read():
    engine = make_engine(overlap=True)
    engine.add(make_request("a", max_tokens=3))
    drain(engine)
    assert engine.runner.log == [
        ("launch", 0),
        ("sample", 0),
        ("launch", 1),
        ("sample", 1),
        ("read", 0),
        ("launch", 2),
        ("sample", 2),
        ("read", 1),
        ("read", 2),
    ]


def test_without_overlap_every_step_is_read_at_once():
    engine = make_engine(overlap=False)
    engine.add(make_request("a", max_tokens=2))
    drain(engine)
    calls = ("launch", "sample", "read")
    assert engine.runner.log == [(call, step) for step in (0, 1) for call in calls]


@pytest.mark.parametrize("pages", [12, 40])
def test_overlap_changes_no_token(pages):
    requests = [
        make_request(f"r{c}", 3 + i % 7, 2 + i % 9, stop_token_ids=(7, 21) if i % 3 else ())
        for i, c in enumerate("abcdefghijklmnop")
    ]
    answers = []
    for overlap in (False, True):
        engine = make_engine(overlap=overlap, pages=pages)
        for request in requests:
            engine.add(request)
        answers.append(drain(engine))
    assert answers[0] == answers[1]
    assert answers[0] == {request.rid: tokens_alone(request) for request in requests}


@pytest.mark.parametrize("overlap", [False, True])
def test_an_abort_of_everything_leaves_only_steps_to_read(overlap):
    engine = make_engine(overlap=overlap)
    engine.add(make_request("a"))
    engine.step()
    assert engine.abort("a")
    assert engine.has_work == overlap
    assert drain(engine) == {}


@pytest.mark.parametrize("overlap", [False, True])
def test_masks_are_built_when_all_earlier_tokens_are_known(overlap):
    grammars = FakeGrammars()
    engine = make_engine(overlap=overlap, grammars=grammars)
    engine.add(make_request("a", max_tokens=4, grammar=GRAMMAR))
    engine.add(make_request("b", max_tokens=2))
    drain(engine)
    seen = [
        None if step.masks is None else step.masks[step.masks != -1].tolist()
        for step in engine.runner.steps
    ]
    assert seen == [[1000], [1001], [1002], [1003]]
    assert not grammars
    if overlap:
        log = engine.runner.log
        assert log.index(("launch", 1)) < log.index(("read", 0)) < log.index(("sample", 1))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_complete_grammar_ends_the_answer(overlap):
    engine = make_engine(overlap=overlap, grammars=FakeGrammars(length=3))
    engine.add(make_request("a", max_tokens=9, grammar=GRAMMAR))
    outcomes = []
    while engine.has_work:
        outcomes += engine.step()
    assert [o.finish_reason for o in outcomes] == [None, None, "stop"]
    engine.scheduler.check_integrity()
    assert engine.status()[0].used_tokens == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_grammar_that_fails_ends_its_request_alone(overlap):
    engine = make_engine(overlap=overlap, grammars=FakeGrammars(fails_at=2))
    engine.add(make_request("a", max_tokens=9, grammar=GRAMMAR))
    engine.add(make_request("b", max_tokens=5))
    outcomes = []
    while engine.has_work:
        outcomes += engine.step()
    failed = [o for o in outcomes if isinstance(o, RequestFailure)]
    assert [(f.rid, f.message) for f in failed] == [("a", "The grammar is too complex.")]
    assert [o.token_id for o in outcomes if o.rid == "b"] == tokens_alone(make_request("b", 5, 5))
    engine.scheduler.check_integrity()


def test_requests_that_cannot_be_taken_leave_nothing_behind():
    grammars = FakeGrammars()
    engine = make_engine(overlap=True, grammars=grammars, max_queued=1)
    engine.add(make_request("a", grammar=Grammar(kind="regex", text="(")))
    with pytest.raises(QueueFull, match="The request queue is full: 1 requests wait already"):
        engine.add(make_request("b"))
    (failure,) = engine.step()
    assert (failure.message, failure.status) == ("The regular expression is wrong.", 400)
    engine.add(make_request("b"))
    with pytest.raises(QueueFull):
        engine.add(make_request("c", grammar=GRAMMAR))
    engine.step()
    engine.add(make_request("d", max_tokens=2000, grammar=GRAMMAR))
    for rid in ("b", "d"):
        with pytest.raises(ValueError, match=f"'{rid}' is in use"):
            engine.add(make_request(rid, grammar=GRAMMAR))
    outcomes = [o for o in engine.step() if isinstance(o, RequestFailure)]
    assert [(f.rid, f.status) for f in outcomes] == [("d", 400)]
    assert not grammars
    assert set(drain(engine)) == {"b"}
    with pytest.raises(ValueError, match="--grammar-backend none"):
        make_engine(overlap=True).add(make_request("a", grammar=GRAMMAR))


def test_others_run_while_a_grammar_is_read():
    engine = make_engine(overlap=True, grammars=FakeGrammars(slow=4))
    engine.add(make_request("a", max_tokens=2, grammar=GRAMMAR))
    engine.add(make_request("b", max_tokens=2))
    engine.add(make_request("c", max_tokens=2, grammar=GRAMMAR))
    engine.step()
    assert engine.abort("c")
    tokens = drain(engine)
    assert list(tokens) == ["b", "a"]


def test_totals_count_steps_and_their_time():
    times = itertools.count()
    engine = make_engine(overlap=True)
    engine._clock = lambda: float(next(times))
    engine.add(make_request("a", max_tokens=3))
    drain(engine)
    assert engine.totals.count == 3
    assert engine.totals.prefilling_slices == [2, 1, 0]
    assert engine.totals.seconds["extend"] > 0
    assert engine.totals.seconds["decode"] > 0
