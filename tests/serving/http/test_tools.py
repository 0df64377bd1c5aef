"""Tools, reasoning and prefilled answers: what templates get, and what clients get back."""

import asyncio
import json
from dataclasses import dataclass
from itertools import chain

import httpx
import openai
import pydantic
import pytest

from serving.config import ServerConfig
from serving.grammar import GrammarCompiler
from serving.tokenizer import Tokenizer, _compile_template
from tests.fakes import FakeEngine, scripted
from tests.serving.http.support import DATA, TOKENIZER, events_of, run, serving

pytestmark = pytest.mark.timeout(60)

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Now.", "parameters": PARAMETERS},
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
QWEN = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking %}<think>\n{% endif %}{% endif %}"
)


@dataclass
class Chat:
    """An app whose model says `says`, and the openai client of it."""

    http: httpx.AsyncClient
    engine: FakeEngine
    client: openai.AsyncOpenAI

    @property
    def prompt(self):
        return TOKENIZER.decode(self.engine.seen[-1].prompt, skip_special_tokens=False)

    async def post(self, **body):
        body = {"messages": [USER], "max_tokens": 400} | body
        response = await self.http.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    async def stream(self, **body):
        """The same choice, put together from a stream."""
        body = {"messages": [USER], "max_tokens": 400, "stream": True} | body
        response = await self.http.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        *chunks, done = events_of(response.text)
        assert done == "[DONE]"
        message = {"role": None, "content": "", "reasoning_content": None, "tool_calls": None}
        reason = None
        for choice in (json.loads(chunk)["choices"][0] for chunk in chunks):
            delta = choice["delta"]
            message["role"] = delta.get("role", message["role"])
            message["content"] += delta.get("content", "")
            if "reasoning_content" in delta:
                message["reasoning_content"] = (message["reasoning_content"] or "") + delta[
                    "reasoning_content"
                ]
            for call in delta.get("tool_calls", ()):
                calls = message["tool_calls"] = message["tool_calls"] or []
                if call["index"] == len(calls):
                    function = {"name": call["function"]["name"], "arguments": ""}
                    calls.append({"id": call["id"], "type": call["type"], "function": function})
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            reason = choice["finish_reason"]
        if message["tool_calls"] and not message["content"]:
            message["content"] = None
        return {"message": message, "finish_reason": reason}


def chatting(says, template=QWEN, *, check=None, max_context_tokens=2048, **flags):
    """Run a check against an app whose model says `says` and then ends."""

    async def main():
        tokenizer = Tokenizer.from_folder(DATA / "deepseek_v3")
        if template is not None:
            tokenizer.chat_template = template
            tokenizer._template = _compile_template(template)
        ids = TOKENIZER._fast.encode(says, add_special_tokens=False).ids
        engine = FakeEngine(next_token=scripted([*ids, 1]), max_context_tokens=max_context_tokens)
        config = ServerConfig(served_model_name="tiny", **flags)
        grammars = GrammarCompiler(lambda: TOKENIZER)
        async with serving(engine, tokenizer=tokenizer, config=config, grammars=grammars) as (
            http,
            _,
            fake,
        ):
            client = openai.AsyncOpenAI(
                base_url="http://test/v1", api_key="-", http_client=http, max_retries=0
            )
            await check(Chat(http, fake, client))

    run(main)


def restart(chat, says):
    """The next answer says the same from its beginning."""
    ids = TOKENIZER._fast.encode(says, add_special_tokens=False).ids
    chat.engine.next_token = scripted([*ids, 1])


@pytest.mark.parametrize("says", [CALL, f"I look.\n{CALL}\n{CALL}"])
def test_calls_come_as_tool_calls(says):
    async def check(chat):
        whole = await chat.post(tools=[WEATHER])
        calls = whole["message"]["tool_calls"]
        assert [call["function"] for call in calls] == [
            {"name": "get_weather", "arguments": '{"city": "Köln"}'}
        ] * says.count("<tool_call>")
        assert len({call["id"] for call in calls}) == len(calls)
        assert all(call["id"].startswith("call_") for call in calls)
        assert whole["message"]["content"] == ("I look." if says[0] == "I" else None)
        assert whole["finish_reason"] == "tool_calls"
        assert json.dumps(WEATHER, ensure_ascii=False) in chat.prompt
        restart(chat, says)
        streamed = await chat.stream(tools=[WEATHER])
        for call, other in zip(calls, streamed["message"]["tool_calls"], strict=True):
            assert call | {"id": ""} == other | {"id": ""}
        assert streamed["message"]["content"] == whole["message"]["content"]
        assert streamed["finish_reason"] == "tool_calls"

    chatting(says, check=check)


def test_without_tools_or_with_choice_none_text_stays_text():
    async def check(chat):
        for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}):
            restart(chat, CALL)
            choice = await chat.post(**body)
            assert choice["message"]["content"] == CALL
            assert choice["message"]["tool_calls"] is None
            assert choice["finish_reason"] == "stop"
            assert "get_weather" not in chat.prompt

    chatting(CALL, check=check)


def test_parser_none_leaves_calls_in_the_text():
    async def check(chat):
        choice = await chat.post(tools=[WEATHER])
        assert choice["message"]["content"] == CALL
        assert "get_weather" in chat.prompt

    chatting(CALL, check=check, tool_call_parser="none")


def test_text_that_only_looks_like_a_call_is_kept():
    says = "Use <tool_call> like this: <tool_call>oops</tool_call> and </tool_call>."

    async def check(chat):
        assert (await chat.post(tools=[WEATHER]))["message"]["content"] == says
        restart(chat, says)
        assert (await chat.stream(tools=[WEATHER]))["message"]["content"] == says

    chatting(says, check=check)


def test_special_tokens_that_mark_calls_are_seen_and_no_others():
    """In the fixtures' vocabulary the markers of a section are special tokens."""
    call = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"
    says = f"<｜User｜>x<｜tool▁calls▁begin｜>{call}<｜tool▁calls▁end｜>"

    async def check(chat):
        choice = await chat.post(tools=[TIME])
        assert choice["message"]["content"] == "x"
        (made,) = choice["message"]["tool_calls"]
        assert made["function"] == {"name": "f", "arguments": "{}"}

    chatting(says, check=check, tool_call_parser="deepseekv3")


def test_a_template_without_tools_gets_them_in_a_system_message():
    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"

    async def check(chat):
        await chat.post(tools=[WEATHER])
        assert chat.prompt.startswith("[system]You can call these functions")
        assert '"name": "get_weather"' in chat.prompt
        assert "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>" in chat.prompt
        await chat.post(tools=[WEATHER], messages=[{"role": "system", "content": "Be kind."}, USER])
        assert chat.prompt.startswith("[system]Be kind.\n\nYou can call")

    chatting("ok", plain, check=check, tool_call_parser="deepseekv31")


def test_the_published_template_of_deepseek_v3():
    """It wants arguments as text, and calls only where there is no content."""
    template = (DATA / "templates" / "deepseek_v3.jinja").read_text()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":  1}'}}

    async def check(chat):
        await chat.post(
            messages=[
                {"role": "developer", "content": "Be kind."},
                USER,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "42"},
                {"role": "function", "name": "g", "content": [{"type": "text", "text": "43"}]},
            ],
            tools=[WEATHER],
        )
        assert (
            '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a":  1}\n```' in chat.prompt
        )
        assert "<｜tool▁output▁begin｜>42<｜tool▁output▁end｜>" in chat.prompt
        assert "<｜tool▁output▁begin｜>43<｜tool▁output▁end｜>" in chat.prompt
        # It offers no tools by itself.
        assert "You can call these functions" in chat.prompt

    chatting("ok", template, check=check)


def test_a_template_that_wants_arguments_as_an_object():
    async def check(chat):
        call = {"id": "1", "function": {"name": "f", "arguments": '{"a":  1}'}}
        messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        await chat.post(messages=messages)
        assert '<tool_call>f {"a": 1}</tool_call>' in chat.prompt

    chatting("ok", check=check)


def test_demanded_calls_follow_a_grammar():
    says = '[{"name": "get_weather", "parameters": {"city": "Köln"}}]'

    async def check(chat):
        for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
            restart(chat, says)
            whole = await chat.post(tools=[WEATHER, TIME], tool_choice=choice)
            assert whole["finish_reason"] == "tool_calls"
            assert whole["message"]["content"] is None
            (call,) = whole["message"]["tool_calls"]
            assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Köln"}'}
            schema = json.loads(chat.engine.seen[-1].sampling.grammar.text)
            assert ("maxItems" in schema) == (choice != "required")
            assert ("anyOf" in schema["items"]) == (choice == "required")
        restart(chat, says)
        streamed = await chat.stream(tools=[WEATHER, TIME], tool_choice="required")
        assert streamed["message"]["tool_calls"][0]["function"] == call["function"]
        await chat.post(tools=[TIME], tool_choice="required", parallel_tool_calls=False)
        assert json.loads(chat.engine.seen[-1].sampling.grammar.text)["maxItems"] == 1

    chatting(says, check=check)


@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (
            {"$defs": {"C": {"enum": ["x"]}}, "properties": {"v": {"$ref": "#/$defs/C"}}},
            {"v": "x"},
            {"v": "y"},
        ),
        (  # of itself, not of the list of calls
            {"properties": {"v": {"$ref": "#"}, "w": {"const": {"$ref": "#"}}}},
            {"v": {"v": {}, "w": {"$ref": "#"}}},
            {"v": [{"name": "f", "parameters": {}}]},
        ),
    ],
)
def test_references_of_demanded_calls_hold(parameters, right, wrong):
    """Two functions may define different things under one name."""
    schema = {"type": "object", "additionalProperties": False, **parameters}
    other = {"$defs": {"C": {"enum": ["z"]}}, "properties": {"v": {"$ref": "#/$defs/C"}}}
    tools = [{"function": {"name": "f", "parameters": schema}}]
    tools.append({"function": {"name": "g", "parameters": other}})

    async def check(chat):
        await chat.post(tools=tools, tool_choice="required")
        compiler = GrammarCompiler(lambda: TOKENIZER)

        def fits(arguments):
            matcher = compiler.compile(chat.engine.seen[-1].sampling.grammar).result()
            text = json.dumps([{"name": "f", "parameters": arguments}])
            ids = TOKENIZER._fast.encode(text, add_special_tokens=False).ids
            return matcher.validate_tokens(ids) == len(ids)

        assert fits(right)
        assert not fits(wrong)

    chatting("[]", check=check)


def test_a_schema_that_cannot_be_used_names_the_field():
    bad = {"function": {"name": "f", "parameters": {"type": "object", "minProperties": "x"}}}

    async def check(chat):
        body = {"messages": [USER], "tools": [bad], "tool_choice": "required"}
        response = await chat.http.post(CHAT, json=body)
        assert response.status_code == 400, response.text
        assert response.json()["param"] == "tool_choice"
        response = await chat.http.post(CHAT, json=body | {"regex": "a", "tools": [TIME]})
        assert response.status_code == 400
        assert "cannot be combined with another constraint" in response.json()["message"]
        assert chat.engine.seen == []

    chatting("[]", check=check)


@pytest.mark.parametrize("parser", ["qwen", "glm45"])
@pytest.mark.parametrize("properties", [["city"], "city", None, 5])
def test_properties_that_are_no_object_are_an_error_of_the_client(parser, properties):
    """GLM's arguments are read by them, when it is too late for an error."""
    tool = {"function": {"name": "f", "parameters": {"properties": properties}}}

    async def check(chat):
        for choice in ("auto", "required"):
            body = {"messages": [USER], "tools": [tool], "tool_choice": choice}
            response = await chat.http.post(CHAT, json=body)
            assert response.status_code == 400, response.text
            assert "properties must be an object" in response.json()["message"]

    chatting("x", check=check, tool_call_parser=parser)


THOUGHT = "Let me see < 3.\n</think>\n\nIt is 3."


@pytest.mark.parametrize(
    ("parser", "says", "kwargs"),
    [
        ("deepseek-r1", THOUGHT, {}),
        ("deepseek-r1", "<think>\n" + THOUGHT, {}),
        ("qwen3", "<think>\n" + THOUGHT, {}),
        ("qwen3", THOUGHT, {"chat_template_kwargs": {"thinking": True}}),
        ("deepseek-v3", THOUGHT, {"chat_template_kwargs": {"thinking": True}}),
    ],
)
def test_reasoning_is_separated(parser, says, kwargs):
    async def check(chat):
        for ask in (chat.post, chat.stream):
            restart(chat, says)
            message = (await ask(**kwargs))["message"]
            assert message["reasoning_content"] == "Let me see < 3."
            assert message["content"] == "It is 3."
            restart(chat, says)
            message = (await ask(**kwargs, stream_reasoning=False))["message"]
            assert message["reasoning_content"] == "Let me see < 3."
            restart(chat, says)
            message = (await ask(**kwargs, separate_reasoning=False))["message"]
            assert message["reasoning_content"] is None
            assert message["content"].endswith("It is 3.")

    chatting(says, check=check, reasoning_parser=parser)


def test_an_answer_without_thinking_is_content():
    async def check(chat):
        message = (await chat.post())["message"]
        assert (message["content"], message["reasoning_content"]) == ("Just 3.", None)

    chatting("Just 3.", check=check, reasoning_parser="qwen3")


def test_thinking_then_a_call():
    says = f"<think>Which city?</think>\n\n{CALL}"

    async def check(chat):
        for ask in (chat.post, chat.stream):
            restart(chat, says)
            choice = await ask(tools=[WEATHER])
            assert choice["message"]["reasoning_content"] == "Which city?"
            assert choice["message"]["content"] is None
            assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
            assert choice["finish_reason"] == "tool_calls"

    chatting(says, check=check, reasoning_parser="qwen3")


def test_grammars_govern_what_comes_behind_the_thinking():
    async def check(chat):
        await chat.post(json_schema=PARAMETERS)
        thinking = chat.engine.seen[-1].sampling.grammar.thinking
        assert (thinking.start, thinking.end) == (5, 6)  # special tokens of the fixture
        assert (thinking.opened, thinking.always) == (False, True)
        await chat.post(regex="a", chat_template_kwargs={"thinking": True})
        assert chat.engine.seen[-1].sampling.grammar.thinking.opened
        await chat.post(tools=[WEATHER], tool_choice="required")
        assert chat.engine.seen[-1].sampling.grammar.thinking is not None
        await chat.post(ebnf='root ::= "a"')
        assert chat.engine.seen[-1].sampling.grammar.thinking is None

    chatting("x", check=check, reasoning_parser="deepseek-r1")


def test_a_final_message_is_continued():
    async def check(chat):
        begun = {"role": "assistant", "content": "Once upon"}
        choice = await chat.post(messages=[USER, begun], continue_final_message=True)
        assert chat.prompt == "<user>Hi<assistant>Once upon"
        assert choice["message"]["content"] == " a time"

    chatting(" a time", check=check)


def test_token_ids_stand_for_messages():
    async def check(chat):
        await chat.post(messages=None, input_ids=[5, 40, 41])
        assert chat.engine.seen[-1].prompt == (5, 40, 41)

    chatting("ok", check=check)


def test_reasoning_effort_reaches_the_template():
    template = "{{ reasoning_effort }}|{% for m in messages %}{{ m.content }}{% endfor %}"

    async def check(chat):
        await chat.post(reasoning_effort="high")
        assert chat.prompt == "high|Hi"
        await chat.post(reasoning_effort="high", chat_template_kwargs={"reasoning_effort": "low"})
        assert chat.prompt == "low|Hi"

    chatting("ok", template, check=check)


@pytest.mark.parametrize("says", [f"<think>Hm. ü</think>I look.\n{CALL}\n{CALL} ", THOUGHT])
@pytest.mark.parametrize("parser", ["qwen3", "deepseek-r1"])
def test_a_broken_stream_of_calls_and_thoughts_goes_on(says, parser):
    """Between any two chunks."""

    def told(chunks):
        reasoning = content = arguments = ""
        for delta in (c["choices"][0]["delta"] for c in chunks):
            reasoning += delta.get("reasoning_content", "")
            content += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                arguments += call["function"].get("name", "") + call["function"]["arguments"]
        return reasoning, content, arguments

    async def check(chat):
        body = {"messages": [USER], "stream": True, "return_token_ids": True, "tools": [WEATHER]}

        async def chunks(**more):
            response = await chat.http.post(CHAT, json=body | {"max_tokens": 400} | more)
            assert response.status_code == 200, response.text
            return [json.loads(event) for event in events_of(response.text)[:-1]]

        whole = await chunks()
        ids = [c["choices"][0]["token_ids"] for c in whole]
        for cut in range(1, len(whole)):
            begun = list(chain.from_iterable(ids[:cut]))
            chat.engine.next_token = scripted(list(chain.from_iterable(ids[cut:])))
            more = await chunks(continue_from=[{"token_ids": begun}])
            before, after = told(whole[:cut]), told(more)
            assert tuple(a + b for a, b in zip(before, after, strict=True)) == told(whole)
            assert (
                more[-1]["choices"][0]["finish_reason"]
                == (whole[-1]["choices"][0]["finish_reason"])
            )

    chatting(says, check=check, reasoning_parser=parser)


def test_openai_client_tools_and_parse():
    class Where(pydantic.BaseModel):
        city: str

    async def check(chat):
        tool = openai.pydantic_function_tool(Where, name="get_weather")
        options = {"model": "tiny", "messages": [USER], "max_tokens": 200}
        answer = await chat.client.chat.completions.create(**options, tools=[tool])
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Köln"}
        restart(chat, CALL)
        parsed = await chat.client.chat.completions.parse(**options, tools=[tool])
        assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == Where(
            city="Köln"
        )
        restart(chat, CALL)
        async with chat.client.chat.completions.stream(**options, tools=[tool]) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds
        assert final.choices[0].message.tool_calls[0].function.parsed_arguments.city == "Köln"
        restart(chat, '{"city": "Bonn"}')
        parsed = await chat.client.chat.completions.parse(**options, response_format=Where)
        assert parsed.choices[0].message.parsed == Where(city="Bonn")
        await asyncio.sleep(0)

    chatting(CALL, check=check)


def test_usage_tells_the_tokens_of_the_thinking():
    async def check(chat):
        def ids(text):
            return len(TOKENIZER._fast.encode(text, add_special_tokens=False).ids)

        for body in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
            restart(chat, THOUGHT)
            response = await chat.http.post(CHAT, json={"messages": [USER]} | body)
            if body:
                usage = json.loads(events_of(response.text)[-2])["usage"]
            else:
                usage = response.json()["usage"]
            thought = ids(THOUGHT[: THOUGHT.index("</think>") + len("</think>")])
            assert abs(usage["reasoning_tokens"] - thought) <= 3
            assert usage["reasoning_tokens"] < usage["completion_tokens"]

    chatting(THOUGHT, check=check, reasoning_parser="deepseek-r1")


def test_usage_has_no_word_on_thinking_that_nobody_looks_for():
    async def check(chat):
        whole = await chat.http.post(CHAT, json={"messages": [USER], "max_tokens": 3})
        assert "reasoning_tokens" not in whole.json()["usage"]

    chatting(THOUGHT, check=check)
