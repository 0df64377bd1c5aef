"""What an answer must look like, from a body's fields: at most one grammar, checked.

`regex`, `ebnf`, `json_schema` and `response_format` are four ways to ask for the same thing. A
`tool_choice` that demands a call is a fifth, and has its grammar from `dialogue`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from serving.grammar import GrammarCompiler, GrammarError
from serving.http.calls import Call
from serving.http.errors import ApiError
from serving.http.protocol import GenerationBody
from serving.http.sse import unless_disconnected
from serving.request import Grammar

ANY_OBJECT = Grammar(kind="json_schema", text='{"type": "object"}')
FORMATS = ("text", "json_object", "json_schema")
MAX_PREPARE_S = 10.0
"""Of all answers of one request: the grammar is prepared for each, and others wait meanwhile."""


def constraint(body: GenerationBody) -> Grammar | None:
    """The grammar that a body asks for, None for any text.

    Raises:
        ApiError: a field has the wrong form, or several ask for something.
    """
    found = _requested(body)
    return None if found is None else found[1]


async def check_constraint(
    request: Request, body: GenerationBody, compiler: GrammarCompiler | None, calls: Sequence[Call]
) -> None:
    """Check that decoding can begin with the grammar of the calls of a body, if they have one.

    That takes milliseconds and more. It holds no thread but the compiler's, and ends when the
    client hangs up.

    Args:
        compiler: None where the server was started without constrained decoding.
        calls: all with the same grammar.

    Raises:
        ApiError: the grammar is wrong, not supported, or too slow for so many answers.
        ClientDisconnect: nobody is waiting any more.
    """
    grammar = calls[0].jobs[0].sampling.grammar
    if grammar is None:
        return
    asked = _requested(body)
    field = "tool_choice" if asked is None else asked[0]
    num_answers = sum(call.num_constrained for call in calls)
    if compiler is None:
        raise ApiError(
            f"{field} needs constrained decoding, which this server was started without "
            "(--grammar-backend none).",
            param=field,
        )
    try:
        seconds = await unless_disconnected(request.receive, compiler.prepare(grammar))
    except GrammarError as error:
        raise ApiError(str(error), param=field) from None
    if num_answers > 1 and seconds * num_answers > MAX_PREPARE_S:
        possible = max(1, int(MAX_PREPARE_S / seconds))
        raise ApiError(
            f"{field} takes {seconds:.2g} s to prepare, for each of the {num_answers} answers; "
            f"ask for at most {possible} in one request, or make it simpler.",
            param="n" if body.n not in (None, 1) else field,
        )


def _requested(body: GenerationBody) -> tuple[str, Grammar] | None:
    """The field that asks for a grammar, and the grammar."""
    found = []
    if body.regex is not None:
        found.append(("regex", Grammar(kind="regex", text=body.regex)))
    if body.json_schema is not None:
        found.append(("json_schema", _schema(body.json_schema, "json_schema")))
    if body.ebnf is not None:
        found.append(("ebnf", Grammar(kind="ebnf", text=body.ebnf)))
    if body.response_format is not None:
        grammar = _response_format(body.response_format)
        if grammar is not None:
            found.append(("response_format", grammar))
    if len(found) > 1:
        raise ApiError(
            "Only one of regex, json_schema, or ebnf can be set."
            if all(field != "response_format" for field, _ in found)
            else f"{found[0][0]} and response_format cannot be set together.",
            param=found[-1][0],
        )
    return found[0] if found else None


def _schema(schema: Any, field: str) -> Grammar:
    """A JSON schema that came as JSON, or as its text."""
    if isinstance(schema, str):
        return Grammar(kind="json_schema", text=schema)
    if isinstance(schema, dict | bool):
        return Grammar(kind="json_schema", text=msgspec.json.encode(schema).decode())
    raise ApiError(
        f"{field} must be a JSON schema: an object, or its text.", param=field.split(".")[0]
    )


def _response_format(value: Any) -> Grammar | None:
    """What response_format asks for."""
    field = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise ApiError("response_format must be an object with a type.", param=field)
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind == "json_schema":
        inner = value.get("json_schema")
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ApiError("response_format.json_schema must be an object.", param=field)
        if inner.get("schema") is None:
            raise ApiError(
                "schema_ is required for json_schema response format request.", param=field
            )
        return _schema(inner["schema"], "response_format.json_schema.schema")
    raise ApiError(
        f"response_format.type must be one of {', '.join(FORMATS)}, got '{kind}'"
        + (": structural tags are not supported." if kind == "structural_tag" else "."),
        param=field,
    )
