"""The fields that constrain an answer: what reaches the engine, and what is refused by name."""

import asyncio
import json
import threading

import msgspec
import pytest

from serving.grammar import GrammarCompiler
from serving.http.constraints import constraint
from serving.http.errors import ApiError
from serving.http.protocol import ChatBody
from serving.request import Grammar
from tests.fakes import FakeEngine
from tests.serving.http.support import TOKENIZER, run, serving

pytestmark = pytest.mark.timeout(30)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GBNF = 'root ::= "a" | "b"'
URLS = (
    ("/v1/completions", {"prompt": [5, 6, 7]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
)


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(lambda: TOKENIZER)


def of(**fields):
    return constraint(msgspec.convert(fields, ChatBody))


def test_every_field_asks_for_its_grammar():
    assert of() is None
    assert of(regex=None, response_format=None) is None
    assert of(response_format={"type": "text"}) is None
    assert of(regex="a+") == Grammar(kind="regex", text="a+")
    assert of(regex="") == Grammar(kind="regex", text="")
    assert of(ebnf=GBNF) == Grammar(kind="ebnf", text=GBNF)
    text = json.dumps(SCHEMA)
    assert of(json_schema=text) == Grammar(kind="json_schema", text=text)
    given = of(json_schema=SCHEMA)
    assert given is not None
    assert (given.kind, json.loads(given.text)) == ("json_schema", SCHEMA)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    assert of(response_format=form) == given
    anything = of(response_format={"type": "json_object"})
    assert json.loads(anything.text) == {"type": "object"}
    assert of(regex="a", response_format={"type": "text"}) == Grammar(kind="regex", text="a")


REFUSED = [
    ({"regex": "a", "ebnf": GBNF}, "Only one of regex, json_schema, or ebnf can be set."),
    ({"regex": "a", "json_schema": {}}, "Only one of regex, json_schema, or ebnf can be set."),
    ({"ebnf": GBNF, "json_schema": {}}, "Only one of regex, json_schema, or ebnf can be set."),
    (
        {"regex": "a", "response_format": {"type": "json_object"}},
        "regex and response_format cannot be set together.",
    ),
    ({"json_schema": [1]}, "json_schema must be a JSON schema"),
    ({"response_format": "json_object"}, "response_format must be an object with a type."),
    ({"response_format": {}}, "response_format must be an object with a type."),
    ({"response_format": {"type": "xml"}}, "one of text, json_object, json_schema, got 'xml'."),
    ({"response_format": {"type": "structural_tag"}}, "structural tags are not supported"),
    ({"response_format": {"type": "json_schema"}}, "schema_ is required for json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "schema_ is required for json_schema response format request.",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
        "response_format.json_schema.schema must be a JSON schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": 5}},
        "response_format.json_schema must be an object.",
    ),
]


@pytest.mark.parametrize(("fields", "text"), REFUSED)
def test_a_wrong_form_is_refused(fields, text):
    with pytest.raises(ApiError) as caught:
        of(**fields)
    assert text in str(caught.value)
    assert caught.value.body.param in fields


UNUSABLE = [
    ({"regex": "("}, "The regular expression cannot be used: unclosed group."),
    ({"regex": "a" * 40_000}, "at most 32768 are possible."),
    ({"ebnf": "hello"}, "neither GBNF"),
    ({"json_schema": "{"}, "The JSON schema is not valid JSON"),
    ({"json_schema": {"not": {}}}, 'Unimplemented keys: ["not"]'),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "The JSON schema cannot be used: Invalid type: x.",
    ),
]


def test_what_cannot_be_used_is_a_400_that_names_the_field(compiler):
    async def main():
        async with serving(FakeEngine(), grammars=compiler) as (http, _, engine):
            for url, base in URLS:
                for fields, text in UNUSABLE:
                    response = await http.post(url, json=base | fields)
                    assert response.status_code == 400, response.text
                    assert text in response.json()["message"]
                    assert response.json()["param"] in fields
            assert engine.seen == []

    run(main)


def test_the_engine_gets_the_grammar(compiler):
    async def main():
        async with serving(FakeEngine(), grammars=compiler) as (http, _, engine):
            for url, base in URLS:
                response = await http.post(url, json=base | {"regex": "[ab]+", "max_tokens": 2})
                assert response.status_code == 200, response.text
            grammars = [request.sampling.grammar for request in engine.seen]
            assert grammars == [Grammar(kind="regex", text="[ab]+")] * 2

    run(main)


def test_without_a_backend_the_field_is_refused():
    async def main():
        async with serving(FakeEngine()) as (http, _, engine):
            for url, base in URLS:
                response = await http.post(url, json=base | {"ebnf": GBNF})
                assert response.status_code == 400
                assert "ebnf needs constrained decoding" in response.json()["message"]
                assert response.json()["param"] == "ebnf"
            assert engine.seen == []

    run(main)


def test_a_slow_grammar_holds_no_thread_and_leaves_with_its_client(monkeypatch):
    """More slow grammars than the executor has threads: an ordinary request passes them."""
    gate, read = threading.Event(), []

    def load():
        assert gate.wait(20)
        return TOKENIZER

    monkeypatch.setattr("serving.grammar._to_llguidance", lambda grammar: read.append(grammar))
    compiler = GrammarCompiler(load)

    async def main():
        async with serving(FakeEngine(), grammars=compiler) as (http, _, engine):
            url, base = URLS[0]
            slow = [
                asyncio.create_task(http.post(url, json=base | {"regex": str(i)}))
                for i in range(100)
            ]
            await asyncio.sleep(0.2)
            for url, base in URLS:
                response = await asyncio.wait_for(http.post(url, json=base), 5)
                assert response.status_code == 200, response.text
            assert len(engine.seen) == 2
            assert not any(task.done() for task in slow)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)

    run(main)
    gate.set()
    compiler.compile(Grammar(kind="regex", text="last")).exception(20)
    assert read == [Grammar(kind="regex", text="last")]


def test_a_grammar_that_takes_too_long_is_a_400(monkeypatch):
    monkeypatch.setattr("serving.grammar.MAX_WAIT_S", 0.05)
    gate = threading.Event()
    compiler = GrammarCompiler(lambda: gate.wait(20) and TOKENIZER)

    async def main():
        async with serving(FakeEngine(), grammars=compiler) as (http, _, engine):
            response = await http.post(URLS[0][0], json=URLS[0][1] | {"regex": "a"})
            assert response.status_code == 400
            assert "takes more than 0.05 s to prepare" in response.json()["message"]
            assert response.json()["param"] == "regex"
            assert engine.seen == []

    run(main)
    gate.set()


def test_a_slow_grammar_for_many_answers_is_refused(compiler, monkeypatch):
    async def takes_a_second(grammar):
        return 1.0

    monkeypatch.setattr(compiler, "prepare", takes_a_second)

    async def main():
        async with serving(FakeEngine(), grammars=compiler) as (http, _, engine):
            for url, base in URLS:
                response = await http.post(url, json=base | {"regex": "a", "n": 10})
                assert response.status_code == 200, response.text
                response = await http.post(url, json=base | {"regex": "a", "n": 11})
                assert response.status_code == 400
                assert response.json()["param"] == "n"
                assert response.json()["message"] == (
                    "regex takes 1 s to prepare, for each of the 11 answers; ask for at most 10 "
                    "in one request, or make it simpler."
                )
            prompts = {"prompt": [[5]] * 11, "regex": "a"}
            response = await http.post("/v1/completions", json=prompts)
            assert response.json()["param"] == "regex"
            assert len(engine.seen) == 20

    run(main)
