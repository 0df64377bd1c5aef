"""An answer that goes on in another engine: the same tokens as if it had never stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serving.request import Grammar
from tests.fixtures import load_fixture
from tests.serving.engine.engines import finish, fixture_engine, request

SAMPLED = {"temperature": 1.0, "seed": 11}
PENALISED = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.7,
    "logit_bias": ((40, 4.0),),
}
CASES = {
    "greedy": {},
    "seeded": {**SAMPLED, "top_p": 0.9},
    "penalised": {**SAMPLED, **PENALISED},
    "greedy penalised": PENALISED,
    "min_tokens": {
        **SAMPLED,
        "min_tokens": 12,
        "stop_token_ids": tuple(range(40, 90)),
        "logit_bias": tuple((token, 6.0) for token in range(40, 90)),
    },
    "grammar": {**SAMPLED, "grammar": Grammar(kind="regex", text="[a-z]{3,5}(-[0-9]{2}){4}")},
}


@pytest.fixture(scope="module")
def engine():
    return fixture_engine()


@pytest.fixture(scope="module")
def other():
    """Another replica: its slices, batches and pages differ."""
    return fixture_engine(page_size=8, decode_buckets=(2, 6), extend_buckets=(32,))


@pytest.fixture(scope="module")
def prompt():
    return load_fixture("deepseek_v3").prompts[0]["prompt"]


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_exactly_where_it_stopped(engine, other, prompt, case):
    whole = request("whole", prompt, max_tokens=20, **CASES[case])
    tokens = finish(engine, [whole])["whole"]
    assert len(tokens) > 10
    cuts = range(1, len(tokens))
    rest = finish(
        other,
        [replace(whole, rid=f"{cut}", answer=tuple(tokens[:cut])) for cut in cuts],
    )
    for cut in cuts:
        assert rest[str(cut)] == tokens[cut:], cut


def test_it_survives_a_retraction(prompt):
    tiny = fixture_engine(max_total_tokens=96, page_size=4)
    whole = [
        request(f"{i}", prompt[: 6 + i], max_tokens=40, **CASES["penalised"]) for i in range(4)
    ]
    tokens = finish(fixture_engine(), whole)
    begun = [replace(r, answer=tuple(tokens[r.rid][:9])) for r in whole]
    rest = finish(tiny, begun)
    assert tiny.scheduler.num_retracted > 0
    assert all(rest[r.rid] == tokens[r.rid][9:] for r in whole)


def test_the_first_outcome_comes_with_the_first_new_token(engine, prompt):
    engine.add(replace(request("a", prompt, max_tokens=6), answer=(40, 41)))
    outcomes = []
    while engine.has_work:
        outcomes += engine.step()
    assert [o.first is not None for o in outcomes] == [True, False, False, False]
    assert [o.finish_reason for o in outcomes] == [None, None, None, "length"]


def test_what_cannot_go_on_is_refused(engine, prompt):
    begun = replace(request("a", prompt, max_tokens=3), answer=(40, 41, 42))
    with pytest.raises(ValueError, match="An answer of 3 tokens cannot go on: max_tokens is 3"):
        engine.add(begun)
    with pytest.raises(ValueError, match="cannot be scored"):
        engine.add(replace(begun, answer=(40,), prompt_logprobs=0))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("answer", "message"),
    [("ab", "complete under its grammar"), ("ba", "cannot be continued")],
)
def test_an_answer_that_its_grammar_ends_or_forbids_is_refused(engine, prompt, answer, message):
    from serving.tokenizer import Tokenizer
    from tests.fixtures import DATA

    tokenizer = Tokenizer.from_folder(DATA / "deepseek_v3")
    ids = tokenizer._fast.encode(answer, add_special_tokens=False).ids
    grammar = Grammar(kind="regex", text="ab")
    engine.add(replace(request("a", prompt, grammar=grammar), answer=tuple(ids)))
    failures = []
    while engine.has_work:
        failures += engine.step()
    assert len(failures) == 1
    assert failures[0].status == 400
    assert message in failures[0].message
