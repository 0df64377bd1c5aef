"""What the OpenAPI document says of fields beyond their types: meaning, range, exact form.

The checks themselves are in `sampling`, `routing` and the routes; their ranges stand here a second
time because a range in the type would replace their error texts. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.http.calls import MAX_ANSWERS
from serving.http.completions import MAX_LOGPROBS, MAX_PROMPTS
from serving.http.conversation import ROLES as CHAT_ROLES
from serving.http.responses import ROLES as RESPONSES_ROLES
from serving.http.responses import SUMMARIES, TEXT_PARTS, THOUGHT_PARTS
from serving.http.routing import MAX_CACHE_KEY_LENGTH, MAX_PRIORITY
from serving.http.sampling import (
    MAX_LOGIT_BIAS_VALUE,
    MAX_SAMPLES,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
)
from serving.http.state import MAX_RID_LENGTH
from serving.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, MAX_TOP_LOGPROBS

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of the model that is served.

    Attributes:
        context: most tokens of prompt and answer together.
    """

    vocab_size: int
    context: int
    num_slices: int


REQUIRED: dict[str, tuple[str, ...]] = {
    "CompletionBody": ("prompt",),
    "DetokenizeBody": ("tokens",),
    "ResponsesBody": ("input",),
    "ContentPart": ("type", "text"),
    "InputPart": ("type", "text"),
}
"""Fields without a default, which are declared with one so that their absence gets a sentence."""

ONE_OF: dict[str, tuple[str, ...]] = {
    "GenerateBody": ("text", "input_ids"),
    "TokenizeBody": ("prompt", "messages"),
}
"""Of these fields exactly one must be given."""


def given(name: str) -> Schema:
    """A field is there and not null."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


def _item(kind: str, *fields: str) -> Schema:
    """An item of /v1/responses with all that it needs."""
    named = {"required": ["type"], "properties": {"type": {"const": kind}}}
    return {"allOf": [named, *(given(name) for name in fields)]}


WHOLE: dict[str, Schema] = {
    "Message": {
        "required": ["role"],
        "if": {"properties": {"role": {"const": "assistant"}}},
        "else": {
            "required": ["content"],
            "properties": {"content": {"not": {"type": "null"}}, "tool_calls": {"maxItems": 0}},
        },
    },
    "ChatBody": {
        "anyOf": [given("messages"), given("input_ids")],
        "if": {
            "required": ["top_logprobs"],
            "properties": {"top_logprobs": {"type": "integer", "minimum": 1}},
        },
        "then": {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}},
    },
    "InputItem": {
        "anyOf": [
            {
                "properties": {
                    "type": {"enum": [None, "message"]},
                    "role": {"enum": [*RESPONSES_ROLES]},
                },
                "required": ["role"],
                "allOf": [given("content")],
            },
            _item("reasoning", "content"),
            _item("function_call", "call_id", "name"),
            _item("function_call_output", "call_id", "output"),
        ]
    },
    "AbortBody": {
        "anyOf": [
            {"required": ["rid"], "properties": {"rid": {"type": "string", "minLength": 1}}},
            {"required": ["abort_all"], "properties": {"abort_all": {"const": True}}},
        ]
    },
}
"""What else is true of a whole struct."""


def field_docs(limits: Limits) -> Mapping[str, Schema]:
    """Schema keywords by "field" or, where it means something else there, "Struct.field".

    `type`, `anyOf`, `oneOf` or `enum` stand for the whole type that the struct declares.
    """
    return {
        **_answer_length(limits),
        **_sampling(limits),
        **_form(limits),
        **_messages(limits),
        **_prompts(limits),
    }


def _answer_length(limits: Limits) -> dict[str, Schema]:
    most = {"minimum": 1, "maximum": limits.context - 1}
    return {
        "max_tokens": {"description": "Most tokens of an answer.", **most},
        "CompletionBody.max_tokens": {
            "description": "Most tokens of an answer; 16 without it. 0 is possible with echo: "
            "nothing but scores of the prompt.",
            "minimum": 0,
            "maximum": limits.context - 1,
        },
        "max_completion_tokens": {
            "description": "Most tokens of an answer, wins over max_tokens; without both, what "
            "the context has room for.",
            **most,
        },
        "max_output_tokens": {
            "description": "Most tokens of the answer; without it, what the context has room for.",
            **most,
        },
        "max_new_tokens": {
            "description": "Most tokens of an answer; without it 128, or what the context has "
            "room for. 0 generates nothing (log probabilities of the prompt only).",
            "minimum": 0,
            "maximum": limits.context - 1,
        },
        "min_tokens": {
            "description": "No end-of-sequence or stop token before so many tokens.",
            "minimum": 0,
            "maximum": limits.context - 1,
        },
        "min_new_tokens": {
            "description": "No end-of-sequence or stop token before so many tokens.",
            "minimum": 0,
            "maximum": limits.context - 1,
        },
    }


def _sampling(limits: Limits) -> dict[str, Schema]:
    return {
        "temperature": {"description": "0 is greedy.", "minimum": 0},
        "top_p": {
            "description": "Smallest set of tokens whose probability reaches it.",
            "exclusiveMinimum": 0,
            "maximum": 1,
        },
        "top_k": {
            "description": "The k likeliest tokens; -1 for all.",
            "anyOf": [{"const": -1}, {"type": "integer", "minimum": 1}, {"type": "null"}],
        },
        "min_p": {
            "description": "Tokens at least so many times as likely as the likeliest.",
            "minimum": 0,
            "maximum": 1,
        },
        "presence_penalty": {"minimum": -2, "maximum": 2},
        "frequency_penalty": {"minimum": -2, "maximum": 2},
        "repetition_penalty": {
            "description": "Of tokens in prompt or answer; 1 changes nothing.",
            "exclusiveMinimum": 0,
            "maximum": 2,
        },
        "logit_bias": {
            "description": "Token ids, as strings, to what is added to their logit.",
            "anyOf": [
                {
                    "type": "object",
                    "maxProperties": MAX_LOGIT_BIAS,
                    "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
                    "additionalProperties": {
                        "type": "number",
                        "minimum": -MAX_LOGIT_BIAS_VALUE,
                        "maximum": MAX_LOGIT_BIAS_VALUE,
                    },
                },
                {"type": "null"},
            ],
        },
        "seed": {"description": "An answer depends on its seed, not on what else runs."},
        "sampling_seed": {"description": "The same as seed, and wins over it."},
        "n": {
            "description": f"Answers to each prompt; {MAX_ANSWERS} in one request.",
            "minimum": 1,
            "maximum": MAX_SAMPLES,
        },
        "best_of": {"description": "Must be equal to n.", "minimum": 1, "maximum": MAX_SAMPLES},
        "stop": {
            "description": "Texts that end the answer.",
            "anyOf": [
                _text(1, MAX_STOP_LENGTH),
                {
                    "type": "array",
                    "maxItems": MAX_STOP_STRINGS,
                    "items": _text(1, MAX_STOP_LENGTH),
                },
                {"type": "null"},
            ],
        },
        "stop_token_ids": {
            "description": "Token ids that end the answer, beside the end-of-sequence ids (which "
            f"count for the limit of {MAX_STOP_TOKEN_IDS}).",
            "anyOf": [
                {
                    "type": "array",
                    "maxItems": MAX_STOP_TOKEN_IDS,
                    "items": _token(limits),
                },
                {"type": "null"},
            ],
        },
        "no_stop_trim": {"description": "The stop text or token stays in the answer."},
        "ignore_eos": {"description": "End-of-sequence tokens do not end the answer."},
    }


def _form(limits: Limits) -> dict[str, Schema]:
    """How to answer, and where to run."""
    schema = {"anyOf": [{"type": ["object", "boolean"]}, {"type": "string"}, {"type": "null"}]}
    key = {"maxLength": MAX_CACHE_KEY_LENGTH}
    rank = {"minimum": 0, "maximum": limits.num_slices - 1}
    return {
        "json_schema": {"description": "The answer is JSON of this schema.", **schema},
        "regex": {"description": "The answer matches this regular expression."},
        "ebnf": {"description": "The answer follows this grammar (GBNF or Lark)."},
        "response_format": {
            "description": "The answer's form, as in the OpenAI API.",
            "anyOf": [
                _response_format("text"),
                _response_format("json_object"),
                {
                    "type": "object",
                    "required": ["type", "json_schema"],
                    "properties": {
                        "type": {"const": "json_schema"},
                        "json_schema": {
                            "type": "object",
                            "required": ["schema"],
                            "properties": {"schema": {"type": ["object", "boolean"]}},
                        },
                    },
                },
                {"type": "null"},
            ],
        },
        "AbortBody.rid": {"description": "The id of a running answer."},
        "model": {"description": "Echoed; the server has one model."},
        "user": {"description": "Ignored."},
        "rid": {
            "description": "Id of the answer, for /abort_request. One for a batch is numbered.",
            "minLength": 1,
            "maxLength": MAX_RID_LENGTH,
        },
        "stream": {"description": "Answer with server-sent events."},
        "routed_dp_rank": {"description": "The slice that must run the request.", **rank},
        "data_parallel_rank": {"description": "Old name of routed_dp_rank.", **rank},
        "priority": {
            "description": "Higher starts first and is retracted last.",
            "minimum": -MAX_PRIORITY,
            "maximum": MAX_PRIORITY,
        },
        "extra_key": {"description": "Prefixes are shared under the same key only.", **key},
        "cache_salt": {"description": "Prefixes are shared under the same salt only.", **key},
        "top_logprobs": {
            "description": "Alternatives to report for each token; needs logprobs.",
            "minimum": 0,
            "maximum": MAX_TOP_LOGPROBS,
        },
        "top_logprobs_num": {
            "description": "Alternatives to report for each token.",
            "minimum": 0,
            "maximum": MAX_TOP_LOGPROBS,
        },
        "logprob_start_len": {
            "description": "First prompt token whose log probability is reported; -1 for those "
            "of the answer only.",
            "minimum": -1,
        },
        "CompletionBody.logprobs": {
            "description": "Report log probabilities, with so many alternatives.",
            "minimum": 0,
            "maximum": MAX_LOGPROBS,
        },
    }


def _messages(limits: Limits) -> dict[str, Schema]:
    ids = _ids(limits)
    return {
        "messages": {"description": "The conversation, oldest message first.", "minItems": 1},
        "Message.role": {"enum": [*CHAT_ROLES]},
        "ContentPart.type": {"const": "text", "type": "string"},
        "input": {"description": "A text, or the conversation so far.", **_not_empty()},
        "instructions": {"description": "The system message, in front of the input."},
        "Reasoning.summary": {
            "description": "There are none: thinking comes as it is.",
            "enum": [*SUMMARIES],
        },
        "CalledFunction.arguments": {
            "description": "An object, or its text.",
            "anyOf": [
                {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "contentSchema": {"type": "object"},
                },
                {"type": "object"},
                {"type": "null"},
            ],
        },
        "InputItem.arguments": {"description": "A JSON object, as text."},
        "Function.name": {"description": "What the model calls it by.", "minLength": 1},
        "InputPart.type": {"enum": [*TEXT_PARTS, *THOUGHT_PARTS]},
        "ChatBody.input_ids": {
            "description": "Token ids of the whole prompt, instead of messages.",
            "anyOf": [ids, {"type": "null"}],
        },
        "TextConfig.format": {
            "description": "The answer's form.",
            "anyOf": [
                _response_format("text"),
                _response_format("json_object"),
                {
                    "type": "object",
                    "required": ["type", "schema"],
                    "properties": {
                        "type": {"const": "json_schema"},
                        "schema": {"type": ["object", "boolean"]},
                    },
                },
                {"type": "null"},
            ],
        },
        "continue_from": {
            "description": "Of a stream that broke: how far each answer had come.",
            "minItems": 1,
        },
        "Begun.token_ids": {"type": "array", "items": _token(limits)},
    }


def _not_empty() -> Schema:
    return {"minLength": 1, "minItems": 1}


def _prompts(limits: Limits) -> dict[str, Schema]:
    text = _text(1)
    texts = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": text}
    ids = _ids(limits)
    batch = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": ids}
    null = {"type": "null"}
    any_ids = {"type": "array", "items": _token(limits)}
    return {
        "prompt": {
            "description": "A text, token ids, or a list of either.",
            "anyOf": [text, texts, ids, batch],
        },
        "TokenizeBody.prompt": {
            "description": "A text, or several.",
            "anyOf": [
                {"type": "string"},
                {"type": "array", "maxItems": MAX_PROMPTS, "items": {"type": "string"}},
                null,
            ],
        },
        "GenerateBody.text": {
            "description": "One prompt or a batch.",
            "anyOf": [text, texts, null],
        },
        "GenerateBody.input_ids": {
            "description": "Token ids of one prompt or of a batch.",
            "anyOf": [ids, batch, null],
        },
        "tokens": {
            "description": "Token ids, or several lists of them.",
            "anyOf": [any_ids, {"type": "array", "maxItems": MAX_PROMPTS, "items": any_ids}],
        },
    }


def _text(minimum: int, maximum: int | None = None) -> Schema:
    most = {} if maximum is None else {"maxLength": maximum}
    return {"type": "string", "minLength": minimum, **most}


def _ids(limits: Limits) -> Schema:
    """A prompt."""
    most = limits.context - 1
    return {"type": "array", "minItems": 1, "maxItems": most, "items": _token(limits)}


def _token(limits: Limits) -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}


def _response_format(kind: str) -> Schema:
    return {"type": "object", "required": ["type"], "properties": {"type": {"const": kind}}}
