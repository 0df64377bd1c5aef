"""Tools over more than one turn and answer: histories, ids, several answers, ends in mid-call,
prefilled thinking."""

import asyncio
import json

import pydantic
import pytest

from serving.config import ServerConfig
from serving.tokenizer import Tokenizer, _compile_template
from tests.fakes import FakeEngine, scripted
from tests.serving.http.support import DATA, TOKENIZER, events_of, run, serving
from tests.serving.http.test_tools import CALL, CHAT, QWEN, TIME, USER, WEATHER, chatting, restart

pytestmark = pytest.mark.timeout(60)

QWEN3 = (DATA / "templates" / "qwen3.jinja").read_text()
PLAIN = (
    "{% for m in messages if m.role in ('system', 'user', 'assistant') %}"
    "<{{ m.role }}>{{ m.content + '' }}{% endfor %}<assistant>"
)
KIMI = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}"
    "<|tool_calls_section_begin|><|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>"
    "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}{{ tools | tojson }}"
)
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
TURN = [USER, CALLED, RESULT]
REQUIRED = '[{"name": "time", "parameters": {}}, {"name": "time", "parameters": {}}]'


async def chunks_of(chat, **body):
    body = {"messages": [USER], "max_tokens": 400, "stream": True} | body
    response = await chat.http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


@pytest.mark.parametrize("more", [{"tools": [WEATHER]}, {}])
def test_a_turn_with_calls_through_the_published_template_of_qwen3(more):
    """It fails on a content of null."""

    async def check(chat):
        await chat.post(messages=TURN, **more)
        assert (
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
            in chat.prompt
        )
        assert "<tool_response>\nsunny\n</tool_response>" in chat.prompt
        assert ("# Tools" in chat.prompt) == bool(more)
        assert "None" not in chat.prompt

    chatting("ok", QWEN3, check=check)


@pytest.mark.parametrize(
    ("choice", "written"),
    [("auto", CALL), ("required", '[{"name": "get_weather", "parameters": {"city": "Köln"}}]')],
)
def test_a_turn_with_calls_through_a_template_that_knows_none(choice, written):
    async def check(chat):
        await chat.post(messages=TURN, tools=[WEATHER], tool_choice=choice)
        assert f"<user>Hi<assistant>{written}<user>Result of get_weather:\nsunny" in chat.prompt
        await chat.post(messages=TURN)  # no tools any more
        assert f"<assistant>{CALL}<user>Result of get_weather:\nsunny" in chat.prompt

    chatting("ok", PLAIN, check=check, tool_call_parser="qwen")


def test_without_a_parser_a_template_that_knows_no_tools_describes_them():
    async def check(chat):
        choice = await chat.post(messages=TURN, tools=[WEATHER])
        assert "described as JSON:\n" in chat.prompt
        assert "To call one" not in chat.prompt
        assert choice["message"]["content"] == CALL

    chatting(CALL, PLAIN, check=check, tool_call_parser="none")


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_ids_that_the_template_of_kimi_shows_count_on(choice):
    """A demanded call is not written in Kimi's way, but the next prompt shows it in that way."""
    says = {
        "auto": "<|tool_calls_section_begin|><|tool_call_begin|>functions.time:1"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_call_begin|>functions.time:2"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "required": REQUIRED,
    }[choice]

    async def check(chat):
        for ask in (chat.post, chat.stream):
            restart(chat, says)
            calls = (await ask(messages=TURN, tools=[TIME], tool_choice=choice))["message"][
                "tool_calls"
            ]
            assert [call["id"] for call in calls] == ["functions.time:1", "functions.time:2"]

    chatting(says, KIMI, check=check)


def test_ids_are_what_the_template_of_mistral_takes():
    template = (
        "[TOOL_CALLS]{{ tools | tojson }}{% for m in messages %}{% for c in m.tool_calls %}"
        "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
        "{{ c.function | tojson }}{% else %}{{ m.content }}{% endfor %}{% endfor %}"
    )
    says = '[TOOL_CALLS][{"name": "time", "arguments": {}}]'

    async def check(chat):
        message = (await chat.post(tools=[TIME]))["message"]
        (call,) = message["tool_calls"]
        assert len(call["id"]) == 9
        assert call["id"].isalnum()
        await chat.post(messages=[USER, message, {**RESULT, "tool_call_id": call["id"]}])
        body = {"messages": TURN, "max_tokens": 5}
        response = await chat.http.post(CHAT, json=body)
        assert response.status_code == 400
        assert "nine" in response.json()["message"]

    chatting(says, template, check=check)


def test_answers_of_the_openai_package_are_messages_of_the_next_turn():
    class Where(pydantic.BaseModel):
        city: str

    async def check(chat):
        options = {"model": "tiny", "max_tokens": 300, "tools": [WEATHER, TIME]}
        async with chat.client.chat.completions.stream(messages=[USER], **options) as stream:
            async for _ in stream:
                pass
            message = (await stream.get_final_completion()).choices[0].message
        assert [call.function.name for call in message.tool_calls] == ["get_weather"] * 2
        assert message.content == "I look."
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": f"sunny{i}"}
            for i, call in enumerate(message.tool_calls)
        ]
        for history in (message, message.model_dump()):
            restart(chat, "Fine.")
            answer = await chat.client.chat.completions.create(
                messages=[USER, history, *results], **options
            )
            assert answer.choices[0].message.content == "Fine."
            assert chat.prompt.count('"city": "Köln"') == 2
            assert "sunny1" in chat.prompt
            assert answer.choices[0].finish_reason == "stop"

    chatting(f"I look.\n{CALL}\n{CALL}", QWEN3, check=check)


def test_several_answers_call_each_for_itself():
    async def check(chat):
        whole = await chat.http.post(
            CHAT, json={"messages": [USER], "max_tokens": 400, "tools": [WEATHER], "n": 3}
        )
        choices = whole.json()["choices"]
        ids = {choice["message"]["tool_calls"][0]["id"] for choice in choices}
        assert len(ids) == 3
        assert {choice["finish_reason"] for choice in choices} == {"tool_calls"}
        restart(chat, CALL)
        arguments, ids = ["", "", ""], [[], [], []]
        for chunk in await chunks_of(chat, tools=[WEATHER], n=3):
            (choice,) = chunk["choices"]
            for call in choice["delta"].get("tool_calls", ()):
                assert call["index"] == 0
                arguments[choice["index"]] += call["function"]["arguments"]
                ids[choice["index"]] += [call["id"]] if "id" in call else []
        assert arguments == ['{"city": "Köln"}'] * 3
        assert len({i for (i,) in ids}) == 3

    chatting(CALL, check=check)


def test_log_probabilities_come_once_for_each_token_also_inside_calls():
    says = f"<think>Hm.</think>\n\nLook:\n{CALL}"

    async def check(chat):
        whole = await chat.post(tools=[WEATHER], logprobs=True, top_logprobs=1)
        expected = [entry["bytes"] for entry in whole["logprobs"]["content"]]
        assert bytes(b for entry in expected[:-1] for b in entry).decode() == says
        restart(chat, says)
        streamed = []
        for chunk in await chunks_of(chat, tools=[WEATHER], logprobs=True):
            logprobs = chunk["choices"][0]["logprobs"]
            streamed += [entry["bytes"] for entry in (logprobs or {"content": []})["content"]]
        assert streamed == expected

    chatting(says, check=check, reasoning_parser="qwen3")


@pytest.mark.parametrize(
    ("body", "reason", "content", "arguments"),
    [
        ({"stop": "Köln"}, "tool_calls", None, '{"city": "'),
        ({"stop": "\n</tool_call>"}, "tool_calls", None, '{"city": "Köln"}'),
        ({"stop": "<tool_call>"}, "stop", "", None),
        ({"stop": "name"}, "stop", '<tool_call>\n{"', None),
        ({"max_tokens": 45}, "length", None, "{"),
    ],
)
def test_answers_that_end_inside_a_call(body, reason, content, arguments):
    async def check(chat):
        for ask in (chat.post, chat.stream):
            restart(chat, CALL)
            choice = await ask(tools=[WEATHER], **body)
            assert choice["finish_reason"] == reason
            message = choice["message"]
            if arguments is None:
                assert message["tool_calls"] is None
                assert message["content"] == content
            else:
                (call,) = message["tool_calls"]
                assert call["function"]["name"] == "get_weather"
                assert call["function"]["arguments"].startswith(arguments)
                assert message["content"] == content

    chatting(CALL, check=check)


def test_an_abort_inside_a_call_ends_it_there():
    async def main():
        tokenizer = Tokenizer.from_folder(DATA / "deepseek_v3")
        tokenizer.chat_template, tokenizer._template = QWEN, _compile_template(QWEN)
        says = CALL.replace("Köln", "K" * 500)
        ids = TOKENIZER._fast.encode(says, add_special_tokens=False).ids
        engine = FakeEngine(next_token=scripted([*ids, 1]), max_context_tokens=2048, delay_s=0.005)
        async with serving(engine, tokenizer=tokenizer) as (http, _, fake):
            body = {"messages": [USER], "tools": [WEATHER], "rid": "a", "max_tokens": 1000}
            for stream in (False, True):
                engine.next_token = scripted([*ids, 1])
                asked = asyncio.create_task(http.post(CHAT, json=body | {"stream": stream}))
                while not any(len(c) > len(r.prompt) + 80 for r, c in fake.running.values()):
                    await asyncio.sleep(0.01)
                await http.post("/abort_request", json={"rid": "a"})
                response = await asked
                if stream:
                    chunks = [json.loads(event) for event in events_of(response.text)[:-1]]
                    assert chunks[-1]["choices"][0]["finish_reason"] == "abort"
                    assert any("tool_calls" in c["choices"][0]["delta"] for c in chunks)
                else:
                    (choice,) = response.json()["choices"]
                    assert choice["finish_reason"] == "abort"
                    (call,) = choice["message"]["tool_calls"]
                    assert call["function"]["arguments"].startswith('{"city": "KK')
                    assert not call["function"]["arguments"].endswith("}")

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_whose_text_cannot_be_sent_is_no_failure(stream):
    says = '<tool_call>{"name": "time", "arguments": "\\ud800"}</tool_call>'

    async def check(chat):
        ask = chat.stream if stream else chat.post
        (call,) = (await ask(tools=[TIME]))["message"]["tool_calls"]
        assert call["function"]["arguments"] == "\\ud800"

    chatting(says, check=check)


@pytest.mark.parametrize("ids", [[-1], [10**12], [5, -(10**12)], []])
def test_token_ids_that_do_not_exist_are_refused(ids):
    async def check(chat):
        response = await chat.http.post(CHAT, json={"input_ids": ids, "max_tokens": 5})
        assert response.status_code == 400, response.text
        assert response.json()["param"] == "input_ids"

    chatting("x", check=check, reasoning_parser="qwen3")


@pytest.mark.parametrize("parser", ["qwen3", "deepseek-r1"])
@pytest.mark.parametrize(
    ("begun", "says", "reasoning", "content"),
    [
        ("<think>So</think>Once upon", " a time", None, " a time"),
        ("Once upon", " a time", None, " a time"),
        ("<think>I", " see.</think>\nYes", " see.", "Yes"),
        ("<think>", "\nI see.</think>\nYes", "I see.", "Yes"),
    ],
)
def test_prefilled_answers_go_on_where_they_are(parser, begun, says, reasoning, content):
    async def check(chat):
        messages = [USER, {"role": "assistant", "content": begun}]
        for ask in (chat.post, chat.stream):
            restart(chat, says)
            message = (await ask(messages=messages, continue_final_message=True))["message"]
            assert chat.prompt.endswith("<assistant>" + begun)
            assert (message["reasoning_content"], message["content"]) == (reasoning, content)

    chatting(says, check=check, reasoning_parser=parser)


@pytest.mark.parametrize(
    ("begun", "opened"),
    [("<think>I", True), ("<think>", True), ("Once", None), ("<think></think>", None)],
)
def test_grammars_know_where_prefilled_answers_are(begun, opened):
    async def check(chat):
        messages = [USER, {"role": "assistant", "content": begun}]
        await chat.post(messages=messages, continue_final_message=True, regex="x")
        thinking = chat.engine.seen[-1].sampling.grammar.thinking
        assert (None if thinking is None else thinking.opened) == opened

    chatting("x", check=check, reasoning_parser="deepseek-r1")


def test_thinking_that_is_not_separated_keeps_its_marks():
    """They are special tokens in this vocabulary."""
    says = "<think>Hm.</think>\n\nYes"

    async def check(chat):
        message = (await chat.post(separate_reasoning=False))["message"]
        assert (message["content"], message["reasoning_content"]) == (says, None)

    chatting(says, check=check, reasoning_parser="qwen3")


def test_schemas_nested_beyond_reason_are_refused():
    schema = {"type": "object"}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}}
    tool = {"function": {"name": "f", "parameters": schema}}

    async def check(chat):
        body = {"messages": [USER], "tools": [tool], "tool_choice": "required", "max_tokens": 3}
        response = await chat.http.post(CHAT, json=body)
        assert response.status_code in (200, 400), response.text

    chatting("[]", check=check)


def test_a_server_without_grammars_says_that_it_cannot_demand_calls():

    async def main():
        config = ServerConfig(served_model_name="tiny")
        async with serving(config=config, grammars=None) as (http, _, _engine):
            body = {"messages": [USER], "tools": [TIME], "tool_choice": "required"}
            response = await http.post(CHAT, json=body)
            assert response.status_code == 400
            assert "--grammar-backend" in response.json()["message"]
            assert response.json()["param"] == "tool_choice"

    run(main)
