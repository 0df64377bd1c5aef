"""The OpenAPI document: valid, complete, and true of the checks and answers it describes."""

import json
from dataclasses import replace

import jsonschema
import openapi_spec_validator
import pytest

from serving.config import ServerConfig
from serving.http import app, protocol
from serving.http.field_docs import ONE_OF, REQUIRED, Limits, field_docs
from serving.http.native_protocol import GenerateBody, SamplingBody
from serving.http.openapi import OPERATIONS, document
from serving.http.security import ADMIN_PATHS, OPEN_PATHS
from tests.fakes import FakeEngine
from tests.serving.http.support import run, serving

pytestmark = pytest.mark.timeout(60)

LIMITS = Limits(vocab_size=512, context=64, num_slices=2)
MESSAGES = [{"role": "user", "content": "hi"}]


def never(_path):
    return False


def made():
    routes = [(methods, path) for methods, path, _ in app.ROUTES]
    return json.loads(json.dumps(document(routes, version="1", limits=LIMITS, protected=never)))


def schema_of(told, name):
    """One schema as a document of its own."""
    return {"$ref": f"#/components/schemas/{name}", "components": told["components"]}


def test_it_is_valid():
    told = made()
    openapi_spec_validator.validate(told)
    told["paths"]["/health"]["get"]["responses"] = 5
    with pytest.raises(openapi_spec_validator.validation.exceptions.OpenAPIValidationError):
        openapi_spec_validator.validate(told)


def test_every_route_is_in_it_and_no_other():
    told = made()
    routes = {
        (method.lower(), path.replace(":path}", "}"))
        for methods, path, _ in app.ROUTES
        for method in methods.split()
    }
    assert {(m, path) for path, operations in told["paths"].items() for m in operations} == routes
    assert {path for _, path in routes} == set(OPERATIONS)
    ids = [op["operationId"] for ops in told["paths"].values() for op in ops.values()]
    assert len(set(ids)) == len(ids)


def test_what_needs_a_key():
    async def main():
        plain = ServerConfig(served_model_name="tiny")
        for config, needing in (
            (plain, set()),
            (replace(plain, admin_api_key="boss"), ADMIN_PATHS),
            (replace(plain, api_key="key", admin_api_key="boss"), set(OPERATIONS) - OPEN_PATHS),
        ):
            async with serving(config=config) as (http, _, _engine):
                headers = {"authorization": "Bearer boss"}
                told = (await http.get("/openapi.json", headers=headers)).json()
                openapi_spec_validator.validate(told)
                for path, operations in told["paths"].items():
                    for operation in operations.values():
                        assert ("security" in operation) == (path in needing)
                        assert ("401" in operation["responses"]) == (path in needing)

    run(main, 60)


def test_every_documented_field_exists():
    schemas = made()["components"]["schemas"]
    fields = {f"{name}.{f}" for name, s in schemas.items() for f in s.get("properties", ())}
    bare = {field.split(".")[1] for field in fields}
    for name in field_docs(LIMITS):
        assert name in fields or name in bare, name
    for table in (REQUIRED, ONE_OF):
        for struct, names in table.items():
            assert {f"{struct}.{name}" for name in names} <= fields


def test_refused_fields_take_neutral_values_only():
    schemas = made()["components"]["schemas"]
    assert schemas["CompletionBody"]["properties"]["suffix"]["enum"] == [None, ""]
    for name in protocol.NOT_SERVED_YET:
        for struct in ("CompletionBody", "ChatBody"):
            known = schemas[struct]["properties"].get(name)
            assert known is None or None in known["enum"]
    assert schemas["SamplingBody"]["properties"]["stop_regex"]["enum"] == [None, []]


EDGES = [
    ("temperature", [0, 0.5, 1e9], [-0.1]),
    ("top_p", [0.01, 1], [0, 1.01]),
    ("top_k", [-1, 1, 9999], [0, -2]),
    ("min_p", [0, 1], [-0.1, 1.1]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("repetition_penalty", [0.1, 2], [0, 2.1]),
    ("n", [1, 128], [0, 129]),
    ("seed", [0, -5, 2**40], [1.5]),
    ("logit_bias", [{}, {"0": 100, "511": -100}], [{"a": 1}, {"01": 1}, {"1": 101}]),
    ("stop", ["a", ["a"] * 64, "x" * 1024], ["", [""], ["a"] * 65, "x" * 1025]),
    ("stop_token_ids", [[0, 511]], [[512], [-1]]),
    ("priority", [2**31 - 1], [2**31, -(2**31)]),
    ("extra_key", ["", "x" * 1024], ["x" * 1025]),
    ("cache_salt", ["x" * 1024], ["x" * 1025]),
    ("rid", ["a", "x" * 256], ["", "x" * 257]),
    ("routed_dp_rank", [0, 1], [-1, 2]),
    ("logprobs", [0, 5], [-1, 6]),
    ("max_tokens", [1, 62], [-1, 64]),
    ("min_tokens", [0, 1], [-1]),
    ("response_format", [{"type": "text"}], [{"type": "no"}, 5, {"type": "json_schema"}]),
    ("prompt", ["a", ["a", "b"], [5], [[5], [6]]], ["", [], [[]], [""], [5, "a"], [512], 5]),
]


def test_ranges_are_those_of_the_checks():
    """Of /v1/completions: what the schema takes is served, what it refuses is a 400."""

    async def main():
        async with serving(FakeEngine(max_context_tokens=64)) as (http, _, _engine):
            told = (await http.get("/openapi.json")).json()
            check = jsonschema.Draft202012Validator(schema_of(told, "CompletionBody"))
            for field, good, bad in EDGES:
                for value in good + bad:
                    body = {"prompt": [5], "max_tokens": 1, field: value}
                    status = (await http.post("/v1/completions", json=body)).status_code
                    assert status == (200 if value in good else 400), (field, value)
                    assert check.is_valid(body) == (value in good), (field, value)
            assert not check.is_valid({})

    run(main)


CONVERSATIONS = [
    ([{"role": "user", "content": "hi"}], True),
    ([{"role": "system", "content": [{"type": "text", "text": "hi"}]}], True),
    ([], False),
    ([{"role": "user"}], False),
    ([{"role": "king", "content": "hi"}], False),
    ([{"role": "user", "content": [{"type": "text"}]}], False),
    ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], False),
    ([5], False),
]


def test_conversations_are_those_of_the_checks():
    async def main():
        async with serving() as (http, _, _engine):
            told = (await http.get("/openapi.json")).json()
            for path, field, struct in (
                ("/v1/chat/completions", "messages", "ChatBody"),
                ("/v1/responses", "input", "ResponsesBody"),
                ("/tokenize", "messages", "TokenizeBody"),
            ):
                check = jsonschema.Draft202012Validator(schema_of(told, struct))
                for messages, good in CONVERSATIONS:
                    body = {field: messages}
                    status = (await http.post(path, json=body)).status_code
                    assert status == (200 if good else 400), (path, messages)
                    assert check.is_valid(body) == good, (path, messages)

    run(main)


TOGETHER = [
    ("/v1/chat/completions", "ChatBody", {"messages": MESSAGES, "top_logprobs": 2}, False),
    ("/v1/chat/completions", "ChatBody", {"messages": MESSAGES, "top_logprobs": 0}, True),
    ("/v1/chat/completions", "ChatBody", {"messages": MESSAGES, "top_logprobs": None}, True),
    (
        "/v1/chat/completions",
        "ChatBody",
        {"messages": MESSAGES, "top_logprobs": 2, "logprobs": True},
        True,
    ),
    ("/v1/responses", "ResponsesBody", {"input": "a", "text": {"format": {}}}, False),
    ("/v1/responses", "ResponsesBody", {"input": "a", "text": {"format": {"type": "text"}}}, True),
    ("/v1/responses", "ResponsesBody", {"input": "a", "text": {}}, True),
    ("/v1/responses", "ResponsesBody", {"input": [{"type": "function_call"}]}, False),
    ("/v1/responses", "ResponsesBody", {"input": [{"type": "reasoning", "content": "T"}]}, True),
    (
        "/v1/responses",
        "ResponsesBody",
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "f"}]},
        True,
    ),
    ("/v1/chat/completions", "ChatBody", {"input_ids": [5]}, True),
    ("/v1/chat/completions", "ChatBody", {}, False),
    ("/v1/responses", "ResponsesBody", {"input": "a", "store": True}, False),
]


def test_what_goes_together():
    async def main():
        async with serving() as (http, _, _engine):
            told = (await http.get("/openapi.json")).json()
            for path, struct, body, good in TOGETHER:
                check = jsonschema.Draft202012Validator(schema_of(told, struct))
                status = (await http.post(path, json=body)).status_code
                assert status == (200 if good else 400), body
                assert check.is_valid(body) == good, body

    run(main)


def test_answers_are_as_described():
    async def main():
        async with serving() as (http, _, _engine):
            told = (await http.get("/openapi.json")).json()
            params = {"max_new_tokens": 3}
            logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
            requests = [
                ("/v1/completions", {"prompt": [5, 6], "logprobs": 1, "echo": True}),
                ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True}),
                ("/generate", {"input_ids": [5, 6], "sampling_params": params, **logprobs}),
                ("/v1/responses", {"input": "a", "max_output_tokens": 3}),
                ("/generate", {"text": ["a"], "sampling_params": {**params, "n": 2}}),
                ("/tokenize", {"prompt": ["a"]}),
                ("/detokenize", {"tokens": [[5]]}),
            ]
            wrong = [(path, {}) for path, _ in requests]
            for path, body in requests + wrong:
                response = await http.post(path, json=body)
                described = told["paths"][path]["post"]["responses"][str(response.status_code)]
                schema = described["content"]["application/json"]["schema"]
                schema["components"] = told["components"]
                jsonschema.Draft202012Validator(schema).validate(response.json())
                assert response.status_code == (200 if body else 400)
            for path, body in requests[:4]:
                response = await http.post(path, json=body | {"stream": True})
                content = told["paths"][path]["post"]["responses"]["200"]["content"]
                data = content["text/event-stream"]["schema"]["properties"]["data"]
                schema = data["anyOf"][1]["contentSchema"]
                schema["components"] = told["components"]
                check = jsonschema.Draft202012Validator(schema)
                data = [line for line in response.text.split("\n") if line.startswith("data: {")]
                assert len(data) > 2
                for line in data:
                    check.validate(json.loads(line.removeprefix("data: ")))
            for path, operations in told["paths"].items():
                if "get" in operations and "{" not in path:
                    response = await http.get(path)
                    described = operations["get"]["responses"]["200"]["content"]
                    media_type = response.headers["content-type"].split(";")[0]
                    assert media_type in described, path
                    if media_type == "application/json":
                        schema = described[media_type]["schema"]
                        schema["components"] = told["components"]
                        jsonschema.Draft202012Validator(schema).validate(response.json())

    run(main)


def test_a_body_by_its_schema():
    told = made()
    check = jsonschema.Draft202012Validator(schema_of(told, "GenerateBody"))
    assert check.is_valid({"text": "a", "sampling_params": {"top_k": 5}})
    assert check.is_valid({"text": None, "input_ids": [5]})
    assert not check.is_valid({"text": "a", "input_ids": [5]})
    assert not check.is_valid({"text": None})
    check = jsonschema.Draft202012Validator(schema_of(told, "AbortBody"))
    for body, good in (
        ({}, False),
        ({"rid": "x" * 999}, True),
        ({"abort_all": True}, True),
        ({"abort_all": False}, False),
    ):
        assert check.is_valid(body) == good
    check = jsonschema.Draft202012Validator(schema_of(told, "GenerateBody"))
    assert not check.is_valid({"text": "a", "sampling_params": {"max_tokens": 5}})
    assert set(told["components"]["schemas"]["SamplingBody"]["properties"]) == set(
        SamplingBody.__struct_fields__
    )
    assert set(told["components"]["schemas"]["GenerateBody"]["properties"]) == set(
        GenerateBody.__struct_fields__
    )


def test_the_page_needs_nothing_from_elsewhere():
    async def main():
        async with serving() as (http, _, _engine):
            response = await http.get("/docs")
            assert response.headers["content-type"].startswith("text/html")
            assert "http://" not in response.text
            assert "https://" not in response.text
            assert "<script" not in response.text
            assert len(response.text) < 100_000
            for path in OPERATIONS:
                assert path in response.text
            for text in ("temperature", "&ge; 0", 'href="#CompletionBody"', 'id="CompletionBody"'):
                assert text in response.text

    run(main)
