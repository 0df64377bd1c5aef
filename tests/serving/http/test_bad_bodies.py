"""Wrong requests: always 400 with a sentence that names the field, never a 5xx."""

import asyncio
import json

import pytest

from serving.http import protocol
from serving.http.protocol import NOT_SERVED_YET, ChatBody, CompletionBody
from tests.fakes import FakeEngine
from tests.serving.http.support import run, serving

pytestmark = pytest.mark.timeout(30)

COMPLETIONS = [
    ({"temperature": -1}, "temperature must be a non-negative finite number, got -1"),
    ({"temperature": "hot"}, "temperature: expected"),
    ({"temperature": [1]}, "temperature: expected"),
    ({"top_p": 0}, "top_p must be in (0, 1], got 0"),
    ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5"),
    ({"top_k": 0}, "top_k must be -1 (disable) or at least 1, got 0"),
    ({"top_k": -2}, "top_k must be"),
    ({"top_k": 1.5}, "top_k: expected"),
    ({"min_p": 2}, "min_p must be in [0, 1], got 2"),
    ({"min_p": "x"}, "min_p: expected"),
    ({"presence_penalty": 3}, "presence_penalty must be in [-2, 2], got 3"),
    ({"frequency_penalty": -2.5}, "frequency_penalty must be in [-2, 2]"),
    ({"repetition_penalty": 0}, "repetition_penalty must be in (0, 2]"),
    ({"repetition_penalty": 2.1}, "repetition_penalty must be in (0, 2] (1.0 = no penalty)"),
    ({"max_tokens": 0}, "max_tokens must be positive, got 0"),
    ({"max_tokens": -5}, "max_tokens must be positive, got -5"),
    ({"max_tokens": "16"}, "max_tokens: expected"),
    ({"max_tokens": True}, "max_tokens: expected"),
    ({"max_tokens": 62}, "maximum context length of 64 tokens. You requested a total of 65"),
    ({"max_tokens": 10**30}, "maximum context length"),
    ({"logprobs": 6}, "logprobs must be in [0, 5], got 6"),
    ({"logprobs": -1}, "logprobs must be in [0, 5]"),
    ({"logprobs": True}, "logprobs: expected"),
    ({"n": 0}, "n must be in [1, 128], got 0"),
    ({"n": -1}, "n must be in [1, 128], got -1"),
    ({"n": 129}, "n must be in [1, 128], got 129"),
    ({"n": "2"}, "n: expected"),
    ({"best_of": 3}, "best_of must be equal to n (1), got 3"),
    ({"n": 2, "best_of": 1}, "best_of must be equal to n (2), got 1"),
    ({"prompt": [[5]] * 33, "n": 128}, "33 prompts with n = 128 make 4224 answers"),
    ({"echo": 1}, "echo: expected"),
    ({"echo": True, "max_tokens": -1}, "max_tokens must be positive, got -1"),
    ({"max_tokens": 0, "echo": False}, "max_tokens must be positive, got 0"),
    ({"suffix": "end"}, "suffix is not supported yet"),
    ({"logit_bias": {"512": 1.0}}, "logit_bias must has keys in [0, 511], got 512."),
    ({"logit_bias": {"-1": 1.0}}, "logit_bias must has keys in [0, 511], got -1."),
    ({"logit_bias": {"the": 1.0}}, "logit_bias must has keys in [0, 511], got the."),
    ({"logit_bias": {"05": 1.0}}, "logit_bias must has keys in [0, 511], got 05."),
    ({"logit_bias": {"": 1.0}}, "logit_bias must has keys in [0, 511], got ."),
    ({"logit_bias": {"\u0665": 1.0}}, "logit_bias must has keys in [0, 511]"),
    ({"logit_bias": {"9" * 5000: 1.0}}, "logit_bias must has keys in [0, 511]"),
    ({"logit_bias": {"5": 101}}, "values in [-100, 100], got 101.0 for token 5"),
    ({"logit_bias": {"5": -100.5}}, "values in [-100, 100], got -100.5 for token 5"),
    ({"logit_bias": {"5": None}}, "logit_bias[...]: expected"),
    ({"logit_bias": {str(i): 1 for i in range(513)}}, "logit_bias may hold 512 tokens, got 513"),
    ({"logit_bias": [5]}, "logit_bias: expected"),
    ({"min_tokens": 17}, "min_new_tokens must be in [0, max_new_tokens(16)], got 17."),
    ({"min_tokens": -1}, "min_new_tokens must be in [0, max_new_tokens(16)], got -1."),
    ({"min_tokens": 4, "max_tokens": 3}, "min_new_tokens must be in [0, max_new_tokens(3)]"),
    ({"stop_regex": "a+"}, "stop_regex is not supported yet"),
    ({"no_stop_trim": "yes"}, "no_stop_trim: expected"),
    ({"lora_path": "x"}, "lora_path is not supported yet"),
    (
        {"routed_dp_rank": 2},
        "DP rank 2 is not active. routed_dp_rank must be in [0, 1].",
    ),
    ({"routed_dp_rank": -1}, "DP rank -1 is not active."),
    ({"routed_dp_rank": "0"}, "routed_dp_rank: expected"),
    (
        {"data_parallel_rank": 10**30},
        "is not active. data_parallel_rank must be in [0, 1].",
    ),
    ({"priority": 2**31}, "priority must be in [-2147483647, 2147483647], got 2147483648"),
    ({"priority": -(10**30)}, "priority must be in"),
    ({"cache_salt": 5}, "cache_salt: expected"),
    ({"extra_key": ["a"]}, "extra_key: expected"),
    ({"extra_key": "x" * 1025}, "extra_key may have 1024 characters, got 1025"),
    ({"return_cached_tokens_details": True}, "return_cached_tokens_details is not supported yet"),
    ({"return_hidden_states": True}, "return_hidden_states is not supported yet"),
    ({"stop": 5}, "stop: expected"),
    ({"stop": ["a", 5]}, "stop[1]: expected"),
    ({"stop": ""}, "stop strings must have 1 to 1024 characters"),
    ({"stop": ["x" * 2000]}, "stop strings must have"),
    ({"stop": ["x"] * 65}, "stop may hold 64 strings, got 65"),
    ({"stop_token_ids": [512]}, "stop_token_ids must be in [0, 511], got 512"),
    ({"stop_token_ids": [-1]}, "stop_token_ids must be in"),
    ({"stop_token_ids": "1"}, "stop_token_ids: expected"),
    ({"stop_token_ids": list(range(2, 130))}, "stop_token_ids may hold 128 ids, end-of-seq"),
    ({"seed": "one"}, "seed: expected"),
    ({"seed": 1.5}, "seed: expected"),
    ({"stream": "yes"}, "stream: expected"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage: expected"),
    ({"stream_options": {"continuous_usage_stats": 1}}, "continuous_usage_stats: expected"),
    ({"model": 5}, "model: expected"),
    ({"rid": ""}, "rid must have"),
    ({"rid": ["a"]}, "rid: expected"),
    ({"prompt": None}, "prompt is missing"),
    ({"prompt": ""}, "Prompt cannot be empty"),
    ({"prompt": []}, "Prompt cannot be empty"),
    ({"prompt": [[]]}, "Prompt cannot be empty"),
    ({"prompt": ["a", ""]}, "Prompt cannot be empty"),
    ({"prompt": {"a": 1}}, "prompt: expected"),
    ({"prompt": [1.5]}, "prompt[0]: expected"),
    ({"prompt": [True]}, "prompt[0]: expected"),
    ({"prompt": [1, "a"]}, "prompt must be a string, a list of strings"),
    ({"prompt": [[1], 2]}, "prompt must be a string, a list of strings"),
    ({"prompt": [[1], ["a"]]}, "prompt[1][0]: expected"),
    ({"prompt": [512]}, "[512] contains values greater than the vocab size (512)"),
    ({"prompt": [10**40]}, "greater than the vocab size (512)"),
    ({"prompt": [-1]}, "prompt: token ids must be at least 0, got -1"),
    ({"prompt": [5] * 64}, "The input (64 tokens) is longer than the model's context length (64"),
    ({"prompt": [5] * 60, "max_tokens": 16}, "60 tokens from the input messages and 16 tokens"),
]

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT = [
    ({"messages": None}, "messages is missing"),
    ({"messages": []}, "Messages cannot be empty."),
    ({"messages": "hi"}, "messages: expected"),
    ({"messages": ["hi"]}, "messages[0]: expected"),
    ({"messages": [{"content": "hi"}]}, "messages[0]: object missing required field `role`"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: expected"),
    ({"messages": [USER, {"role": "wizard", "content": "x"}]}, "messages[1].role must be one of"),
    ({"messages": [{"role": "tool"}]}, "messages[0].content is missing"),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0]: object missing required field `function`",
    ),
    (
        {"messages": [USER | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        "messages[0].tool_calls is the assistant's alone",
    ),
    (
        {
            "messages": [
                ASSISTANT | {"tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}
            ]
        },
        "messages[0].tool_calls[0].function.arguments must be a JSON object",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]: only parts of type 'text' are supported, got 'image_url'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text is missing",
    ),
    ({"messages": [{"role": "user", "content": "x " * 200}]}, "is longer than the model's context"),
    ({"max_completion_tokens": 65}, "max_completion_tokens is too large: 65.This model supports"),
    ({"max_completion_tokens": 63}, "Requested token count exceeds"),
    ({"max_completion_tokens": 0}, "max_completion_tokens must be positive"),
    ({"max_tokens": 0}, "max_tokens must be positive"),
    ({"logprobs": 3}, "logprobs: expected"),
    ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be in [0, 20], got 21"),
    ({"tools": [{"type": "function"}]}, "tools[0]: object missing required field `function`"),
    ({"tools": [TOOL]}, "The chat template of this model does not show how it writes tool calls"),
    ({"tools": [TOOL | {"type": "x"}]}, "tools[0].type must be 'function', got 'x'"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name is used twice"),
    ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name is empty"),
    (
        {"tools": [{"function": {"name": "f", "parameters": 1}}]},
        "Tool 0 function has invalid 'parameters' schema: it must be an object",
    ),
    ({"tool_choice": "required"}, "Tools cannot be empty if tool choice is set to required."),
    (
        {"tool_choice": {"function": {"name": "f"}}},
        "Tools cannot be empty if tool choice is set to a specific tool.",
    ),
    ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice must be one of auto, none"),
    (
        {"tool_choice": {"function": {"name": "g"}}, "tools": [TOOL]},
        "Tool 'g' not found in tools list.",
    ),
    ({"continue_final_message": True}, "continue_final_message needs a last message of the"),
    ({"chat_template": "x"}, "chat_template is not supported yet"),
    ({"input_ids": []}, "Prompt cannot be empty"),
    ({"input_ids": [512]}, "[512] contains values greater than the vocab size (512)"),
    ({"input_ids": ["a"]}, "input_ids[0]: expected"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs: expected"),
    ({"n": 129}, "n must be in [1, 128]"),
    ({"min_tokens": 65}, "min_new_tokens must be in [0, max_new_tokens("),
    ({"routed_dp_rank": 7}, "DP rank 7 is not active."),
    ({"logit_bias": {"x": 1}}, "logit_bias must has keys"),
    ({"temperature": -0.1}, "temperature must be"),
]

RAW = [
    (b"", "The body is not valid JSON"),
    (b"{", "The body is not valid JSON"),
    (b"[]", "The body: expected `object`"),
    (b"null", "The body: expected `object`"),
    (b'{"prompt": NaN}', "The body is not valid JSON"),
    (b'{"temperature": 1e999, "prompt": "a"}', "temperature: number out of range"),
    (b'{"model": "\xff"}', "The body is not valid JSON"),
    (b'{"model": "\\ud800"}', "The body is not valid JSON"),
    (b'{"x": ' + b"[" * 100_000, "The body is not valid JSON"),
    (b'{"prompt": "a"} {}', "The body is not valid JSON"),
]


async def check(http, url, content, text, media_type="application/json"):
    response = await http.post(url, content=content, headers={"content-type": media_type})
    assert response.status_code == 400, (content[:100], response.text)
    body = response.json()
    assert body["object"] == "error"
    assert body["code"] == 400
    assert body["type"] in ("BadRequestError", "Bad Request")
    assert text in body["message"], (content[:100], body["message"])
    assert "\n" not in body["message"]
    return body


@pytest.mark.parametrize("stream", [False, True])
def test_wrong_values_are_named(stream):
    async def main():
        async with serving(FakeEngine(max_context_tokens=64)) as (http, _, engine):
            for url, base, table in (
                ("/v1/completions", {"prompt": [5, 6, 7]}, COMPLETIONS),
                ("/v1/chat/completions", {"messages": [USER]}, CHAT),
            ):
                for change, text in table:
                    body = base | {"stream": stream} | change
                    answer = await check(http, url, json.dumps(body).encode(), text)
                    (*_, field) = change
                    if len(change) == 1:
                        assert answer["param"] == field, answer
            assert engine.seen == []

    run(main)


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
def test_bodies_that_are_no_requests(url):
    async def main():
        async with serving() as (http, _, engine):
            for content, text in RAW:
                await check(http, url, content, text)
            for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
                text = "Only 'application/json' is allowed"
                await check(http, url, b'{"prompt": "a"}', text, media_type)
            response = await http.post(url, content=b'{"prompt": "a"}')
            assert response.status_code == 400
            assert engine.seen == []

    run(main)


def test_media_type_parameters_are_fine():
    async def main():
        async with serving() as (http, _, _engine):
            headers = {"content-type": "Application/JSON; charset=utf-8"}
            response = await http.post(
                "/v1/completions", content=b'{"prompt":"a"}', headers=headers
            )
            assert response.status_code == 200

    run(main)


@pytest.mark.parametrize("written", ["3.0", "3e0", "30.0e-1"])
def test_an_integer_may_be_written_with_a_point(written):
    """Other servers take it, and so does JSON Schema."""

    async def main():
        async with serving() as (http, _, engine):
            body = f"""{{"prompt": [[5.0, 6], [7e0]], "max_tokens": {written}, "seed": 1.0,
                "temperature": 0.5, "priority": -0.0, "logit_bias": {{"9": 1.5}}}}"""
            headers = {"content-type": "application/json"}
            answer = await http.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 6
            assert {request.prompt for request in engine.seen} == {(5, 6), (7,)}
            for request in engine.seen:
                assert isinstance(request.prompt[0], int)
                assert (request.sampling.temperature, request.sampling.seed) == (0.5, 1)
            for wrong in ("3.5", "1e300", "9.1e15", "-Infinity"):
                body = f'{{"prompt": [5], "max_tokens": {wrong}}}'
                answer = await http.post("/v1/completions", content=body, headers=headers)
                assert answer.status_code == 400
            long = f'{{"prompt": [{"1.0, " * 100_000}1], "max_tokens": 1}}'
            answer = await http.post("/v1/completions", content=long, headers=headers)
            assert answer.json()["message"].startswith("prompt[0]: expected `")

    run(main)


def test_every_field_that_is_refused_is_declared():
    declared = {*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__}
    assert set(NOT_SERVED_YET) <= declared


def test_unknown_paths_and_methods_are_json():
    async def main():
        async with serving() as (http, _, _engine):
            response = await http.get("/v2/nothing")
            assert response.status_code == 404
            assert "/v2/nothing" in response.json()["message"]
            response = await http.get("/v1/completions")
            assert response.status_code == 405
            assert response.headers["allow"] == "POST"
            assert response.json()["object"] == "error"

    run(main)


def test_a_body_too_large_is_refused_unread(monkeypatch):
    monkeypatch.setattr(protocol, "MAX_BODY_BYTES", 1 << 20)

    async def main():
        async with serving() as (http, _, _engine):
            body = {"prompt": "a" * (2 << 20)}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 413
            assert "larger than 1 MiB" in answer.json()["message"]
            many = {"prompt": [[5, 6]] * 1025, "max_tokens": 1}
            answer = await http.post("/v1/completions", json=many)
            assert answer.status_code == 400
            assert "at most 1024 prompts" in answer.json()["message"]
            ids = {"prompt": [5] * 1025, "max_tokens": 1}  # one prompt, if too long a one
            answer = await http.post("/v1/completions", json=ids)
            assert "longer than the model's context" in answer.json()["message"]

    run(main)


def test_tokenising_a_long_prompt_holds_up_nobody():
    """While a text far beyond the context is tokenised, another request is answered."""

    async def main():
        async with serving() as (http, _, _engine):
            slow = asyncio.create_task(
                http.post("/v1/completions", json={"prompt": "one two three " * 200_000})
            )
            while not slow.done():
                answer = await asyncio.wait_for(http.get("/health"), timeout=2)
                assert answer.status_code == 200
                if slow.done():
                    break
                await asyncio.sleep(0.05)
            assert (await slow).status_code == 400

    run(main)
