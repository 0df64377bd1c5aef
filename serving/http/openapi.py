"""GET /openapi.json: every route, with what it takes and answers, from the structs themselves.

The document is made when it is asked for, so that ranges that depend on the model (vocabulary,
context, slices) are those of the model that is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from serving.http.control import AbortBody
from serving.http.errors import ErrorBody
from serving.http.field_docs import ONE_OF, REQUIRED, WHOLE, Limits, Schema, field_docs, given
from serving.http.info import ModelCard, ModelInfo, ModelList, WeightVersion
from serving.http.loads import SECTIONS
from serving.http.native_protocol import (
    NATIVE_NOT_SERVED_YET,
    SAMPLING_NOT_SERVED_YET,
    DetokenizeBody,
    Detokenized,
    GenerateBody,
    Generated,
    SamplingBody,
    TokenizeBody,
    Tokenized,
)
from serving.http.protocol import (
    NOT_SERVED_YET,
    ChatBody,
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionBody,
    ErrorEvent,
    GenerationBody,
)
from serving.http.responses_protocol import (
    RESPONSES_NOT_SERVED,
    ResponseEvent,
    ResponseObject,
    ResponsesBody,
)

REF = "#/components/schemas/{name}"
OBJECT: Schema = {"type": "object"}
TEXT = "text/plain"
STATUS_TEXTS = {
    400: "The request is wrong, or can never run; the message names the field.",
    401: "The key is missing or wrong.",
    404: "There is no such thing.",
    413: "The body is too large.",
    500: "A bug of the server.",
    503: "The queue is full, or the engine is gone.",
}
GENERATING = (400, 413, 500, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One path of the document.

    Attributes:
        body: the struct of the request's body.
        answer: the struct or schema of the answer, or a media type where it is no JSON; None for
            an empty one.
        texts: media types that the answer may also have, where the query asks for them.
        events: the struct of each event (or the union), where the answer can be a stream.
        query: the query's parameters: name to schema.
        path: the same of the path.
        errors: statuses of errors, but for 401.
        error: the struct of an error's body.
        text_errors: statuses whose body is plain text.
    """

    summary: str
    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | Schema | str | None = TEXT
    texts: tuple[str, ...] = ()
    events: Any = None
    query: Mapping[str, Schema] = field(default_factory=dict)
    path: Mapping[str, Schema] = field(default_factory=dict)
    errors: tuple[int, ...] = (500,)
    error: type[msgspec.Struct] = ErrorBody
    text_errors: tuple[int, ...] = ()


HEALTH: Schema = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"type": "string"}, "message": {"type": "string"}},
}
_LOADS_QUERY: dict[str, Schema] = {
    "dp_rank": {
        "type": "integer",
        "description": "One slice only.",
        "minimum": 1 - 10**10,
        "maximum": 10**11 - 1,
    },
    "include": {
        "type": "string",
        "description": f"Of {', '.join(SECTIONS)}, separated by commas.",
        "pattern": rf"^\s*({'|'.join(SECTIONS)})?\s*(,\s*({'|'.join(SECTIONS)})?\s*)*$",
    },
    "format": {"enum": ["json", "prometheus"], "default": "json"},
}
_HEALTH = Operation(
    summary="Whether the engine answers and its step loop moves.",
    answer=HEALTH,
    errors=(503,),
)
_LOADS = Operation(
    summary="How loaded each slice is.",
    answer=OBJECT,
    texts=(TEXT,),
    query=_LOADS_QUERY,
    errors=(400, 503),
)
_MODEL_INFO = Operation(summary="What the model is.", answer=ModelInfo)
_SERVER_INFO = Operation(
    summary="Flags, topology, engine, and a state for each slice.", answer=OBJECT, errors=(503,)
)
_TOKENIZE = Operation(
    summary="Token ids of a text, of several, or of a conversation.",
    body=TokenizeBody,
    answer=Tokenized,
    errors=(400, 413, 500),
)
_DETOKENIZE = Operation(
    summary="The text of token ids, or of several lists of them.",
    body=DetokenizeBody,
    answer=Detokenized,
    errors=(400, 413, 500),
)
_REFUSED = Operation(summary="Always 400: no model of this kind is served.", errors=(400,))

OPERATIONS: dict[str, Operation] = {
    "/v1/completions": Operation(
        summary="Text or token ids in, text out.",
        body=CompletionBody,
        answer=Completion,
        events=Completion,
        errors=GENERATING,
    ),
    "/v1/chat/completions": Operation(
        summary="A conversation in, its next message out.",
        body=ChatBody,
        answer=ChatCompletion,
        events=ChatChunk,
        errors=GENERATING,
    ),
    "/v1/responses": Operation(
        summary="A conversation in, its next message out, in OpenAI's newer form.",
        body=ResponsesBody,
        answer=ResponseObject,
        events=ResponseEvent,
        errors=GENERATING,
    ),
    "/generate": Operation(
        summary="SGLang's own way to generate. A list for a batch, or for n > 1.",
        body=GenerateBody,
        answer=Generated,
        events=Generated,
        errors=GENERATING,
        error=ErrorEvent,
    ),
    "/tokenize": _TOKENIZE,
    "/v1/tokenize": _TOKENIZE,
    "/detokenize": _DETOKENIZE,
    "/v1/detokenize": _DETOKENIZE,
    "/v1/embeddings": _REFUSED,
    "/v1/score": _REFUSED,
    "/v1/rerank": _REFUSED,
    "/v1/models": Operation(summary="The model.", answer=ModelList),
    "/v1/models/{model}": Operation(
        summary="The model, by its name.",
        answer=ModelCard,
        path={"model": {"type": "string"}},
        errors=(404,),
        error=ErrorEvent,
    ),
    "/health": _HEALTH,
    "/ping": _HEALTH,
    "/health_generate": Operation(
        summary="Whether a token came a moment ago, or one can be generated now.",
        answer=HEALTH,
        errors=(503,),
    ),
    "/metrics": Operation(summary="Prometheus metrics.", errors=(503,)),
    "/v1/loads": _LOADS,
    "/get_loads": _LOADS,
    "/get_load": Operation(
        summary="How loaded each slice is, the older form.",
        answer={"type": "array", "items": OBJECT},
        errors=(503,),
    ),
    "/get_model_info": _MODEL_INFO,
    "/model_info": _MODEL_INFO,
    "/get_weight_version": Operation(summary="Which weights.", answer=WeightVersion),
    "/get_server_info": _SERVER_INFO,
    "/server_info": _SERVER_INFO,
    "/flush_cache": Operation(
        summary="Forget all cached prefixes; 400 while requests run or wait.",
        errors=(400, 503),
        text_errors=(400,),
    ),
    "/abort_request": Operation(
        summary="End an answer by its id, or all of them.",
        body=AbortBody,
        answer=None,
        errors=(400, 413),
    ),
    "/openapi.json": Operation(summary="This document.", answer=OBJECT),
    "/docs": Operation(summary="This document as a page.", answer="text/html"),
}
"""What each path takes and answers, in the document's order."""

PARTS_OF_BODIES = (
    "SamplingBody",
    "Message",
    "ContentPart",
    "CalledFunction",
    "Function",
    "InputItem",
    "InputPart",
    "Reasoning",
    "TextConfig",
    "Begun",
)
_REFUSED_FIELDS: dict[type[msgspec.Struct], Mapping[str, tuple[Any, ...]]] = {
    GenerationBody: NOT_SERVED_YET,
    GenerateBody: NATIVE_NOT_SERVED_YET,
    SamplingBody: SAMPLING_NOT_SERVED_YET,
    ResponsesBody: {name: neutral for name, (neutral, _) in RESPONSES_NOT_SERVED.items()},
}
_STREAM = (
    "One event of the stream. The last is [DONE], but for /v1/responses, which names its events."
)


def document(
    methods: Iterable[tuple[str, str]],
    *,
    version: str,
    limits: Limits,
    protected: Callable[[str], bool],
) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        methods: (methods, path) of every route, as in `app.ROUTES`.
        protected: whether a path needs a key.
    """
    structs = _structs()
    refs, schemas = msgspec.json.schema_components(structs, ref_template=REF)
    ref_of = dict(zip(structs, refs, strict=True))
    _describe(schemas, limits)
    paths: dict[str, Any] = {}
    for names, route in methods:
        path = route.replace(":path}", "}")
        operation = OPERATIONS[path]
        paths[path] = {
            method.lower(): {
                "operationId": _operation_id(method, path),
                **_operation(operation, ref_of, protected=protected(path)),
            }
            for method in names.split()
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "meshserve",
            "version": version,
            "description": "OpenAI's routes with SGLang's additions. null means the default, "
            "unknown fields are ignored (but for those of sampling_params).",
        },
        "paths": {path: paths[path] for path in OPERATIONS if path in paths},
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _structs() -> list[Any]:
    """All types of bodies and answers, unions of structs among them."""
    found: dict[Any, None] = {}
    for operation in OPERATIONS.values():
        for kind in (operation.body, operation.answer, operation.events, operation.error):
            if kind is not None and not isinstance(kind, str | dict):
                found[kind] = None
    return list(found)


def _operation_id(method: str, path: str) -> str:
    words = path.strip("/").replace("{", "").replace("}", "")
    return f"{method.lower()}_{words.replace('/', '_').replace('.', '_')}"


def _operation(
    operation: Operation, ref_of: Mapping[Any, Schema], *, protected: bool
) -> dict[str, Any]:
    told: dict[str, Any] = {"summary": operation.summary}
    parameters = [
        {"name": name, "in": place, "required": place == "path", "schema": schema}
        for place, fields in (("path", operation.path), ("query", operation.query))
        for name, schema in fields.items()
    ]
    if parameters:
        told["parameters"] = parameters
    if operation.body is not None:
        content = {"application/json": {"schema": ref_of[operation.body]}}
        told["requestBody"] = {"required": True, "content": content}
    told["responses"] = _responses(operation, ref_of)
    if protected:
        told["security"] = [{"key": []}]
        error: Schema = {"type": "object", "properties": {"error": {"type": "string"}}}
        told["responses"]["401"] = {
            "description": STATUS_TEXTS[401],
            "content": {"application/json": {"schema": error}},
        }
    return told


def _responses(operation: Operation, ref_of: Mapping[Any, Schema]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    match operation.answer:
        case None:
            pass
        case str(media_type):
            answers[media_type] = {"schema": {"type": "string"}}
        case dict(schema):
            answers["application/json"] = {"schema": schema}
        case struct if struct is Generated:
            one = ref_of[struct]
            answers["application/json"] = {"schema": {"anyOf": [one, _list_of(one)]}}
        case struct:
            answers["application/json"] = {"schema": ref_of[struct]}
    for media_type in operation.texts:
        answers[media_type] = {"schema": {"type": "string"}}
    if operation.events is not None:
        answers["text/event-stream"] = {"schema": _event(operation, ref_of)}
    responses: dict[str, Any] = {"200": {"description": "The answer."}}
    if answers:
        responses["200"]["content"] = answers
    if operation is _REFUSED:
        del responses["200"]
    for status in operation.errors:
        body = HEALTH if operation.answer is HEALTH else ref_of[operation.error]
        content = {"application/json": {"schema": body}}
        if status in operation.text_errors:
            content = {TEXT: {"schema": {"type": "string"}}}
        responses[str(status)] = {"description": STATUS_TEXTS[status], "content": content}
    return responses


def _event(operation: Operation, ref_of: Mapping[Any, Schema]) -> Schema:
    """Each event of a stream."""
    told = [ref_of[operation.events], ref_of[ErrorEvent]]
    data = {
        "type": "string",
        "anyOf": [
            {"const": "[DONE]"},
            {"contentMediaType": "application/json", "contentSchema": {"anyOf": told}},
        ],
    }
    return {
        "type": "object",
        "description": _STREAM,
        "required": ["data"],
        "properties": {"data": data, "event": {"type": "string"}},
    }


def _list_of(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _describe(schemas: dict[str, Any], limits: Limits) -> None:
    """Add to the structs' schemas what their types do not say."""
    docs = field_docs(limits)
    refused = {
        kind.__name__: fields
        for base, fields in _REFUSED_FIELDS.items()
        for kind in (base, *base.__subclasses__())
    }
    bodies = {op.body.__name__ for op in OPERATIONS.values() if op.body} | {*PARTS_OF_BODIES}
    for struct in bodies & schemas.keys():
        schema = schemas[struct]
        properties = schema["properties"]
        for name, old in properties.items():
            if name in refused.get(struct, ()):
                values = [None, *refused[struct][name]]
                properties[name] = {"enum": values, "description": "Known, but not served."}
                continue
            properties[name] = _described(old, docs.get(f"{struct}.{name}", docs.get(name, {})))
        if struct in REQUIRED:
            schema["required"] = list(REQUIRED[struct])
        for name in REQUIRED.get(struct, ()):
            properties[name] = _not_null(properties[name])
        if struct in ONE_OF:
            schema["oneOf"] = [given(name) for name in ONE_OF[struct]]
        schema.update(WHOLE.get(struct, {}))


def _described(schema: Schema, more: Schema) -> Schema:
    if not more.keys() & {"type", "anyOf", "oneOf", "enum"}:
        return {**schema, **more}
    kept = {key: schema[key] for key in ("default",) if key in schema}
    return {**kept, **more}


def _not_null(schema: Schema) -> Schema:
    kept = {key: value for key, value in schema.items() if key != "default"}
    if "anyOf" in kept:
        kept["anyOf"] = [one for one in kept["anyOf"] if one != {"type": "null"}]
    return kept
