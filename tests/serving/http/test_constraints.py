"""The fields that constrain an answer: what reaches the engine, and what is refused by name."""

import json

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
