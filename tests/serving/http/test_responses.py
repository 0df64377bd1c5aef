"""POST /v1/responses: by the openai client, by its events, and what it refuses."""

import asyncio
import json
import time

import httpx
import msgspec
import openai
import pydantic
import pytest

from serving.config import ServerConfig
from serving.grammar import GrammarCompiler
from serving.http.app import make_app
from serving.http.responses import MAX_METADATA, to_chat_body
from serving.http.responses_protocol import RESPONSES_NOT_SERVED, InputItem, ResponsesBody
from serving.tokenizer import Tokenizer
from tests.fakes import FakeEngine, answer, scripted
from tests.serving.http.support import DATA, TOKENIZER, run, serving

pytestmark = pytest.mark.timeout(30)


def client_of(state):
    transport = httpx.ASGITransport(app=make_app(state), raise_app_exceptions=False)
    return openai.AsyncOpenAI(
        base_url="http://test/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx.AsyncClient(transport=transport),
    )


def text_of(prompt, num):
    return TOKENIZER.decode(answer(prompt, num))


def events_of(text):
    """(name, event) of each event of a named stream."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_by_the_client():
    async def main():
        async with serving() as (_, state, engine):
            async with client_of(state) as client:
                response = await client.responses.create(
                    model="tiny",
                    instructions="Be brief.",
                    input="hi",
                    max_output_tokens=5,
                    temperature=0.5,
                    metadata={"a": "b"},
                )
            (seen,) = engine.seen
            assert seen.prompt == tuple(
                TOKENIZER.encode_chat(
                    [
                        {"role": "system", "content": "Be brief."},
                        {"role": "user", "content": "hi"},
                    ]
                )
            )
            assert seen.sampling.temperature == 0.5
            assert response.output_text == text_of(seen.prompt, 5)
            assert response.status == "incomplete"
            assert response.incomplete_details.reason == "max_output_tokens"
            assert response.id.startswith("resp-")
            assert response.metadata == {"a": "b"}
            assert (response.temperature, response.top_p) == (0.5, 1.0)
            assert response.usage.input_tokens == len(seen.prompt)
            assert response.usage.output_tokens == 5
            assert response.usage.total_tokens == len(seen.prompt) + 5
            (item,) = response.output
            assert (item.type, item.role, item.status) == ("message", "assistant", "incomplete")

    run(main)


def test_a_conversation_and_a_stop():
    async def main():
        engine = FakeEngine(next_token=scripted([20, 21, 22]))
        async with serving(engine) as (http, _, _engine):
            items = [
                {"role": "developer", "content": "D"},
                {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "U"}],
                },
                {
                    "type": "message",
                    "role": "assistant",
                    "id": "msg_1",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "A", "annotations": []}],
                },
                {"role": "user", "content": "V"},
            ]
            stop = TOKENIZER.decode([22])
            body = {"input": items, "stop": stop, "max_output_tokens": 50}
            told = (await http.post("/v1/responses", json=body)).json()
            said = [("system", "D"), ("user", "U"), ("assistant", "A"), ("user", "V")]
            messages = [{"role": role, "content": content} for role, content in said]
            assert engine.seen[0].prompt == tuple(TOKENIZER.encode_chat(messages))
            assert told["status"] == "completed"
            assert told["output"][0]["content"][0]["text"] == TOKENIZER.decode([20, 21])
            assert told["incomplete_details"] is None

    run(main)


def test_the_client_streams():
    async def main():
        async with serving() as (_, state, engine):
            async with client_of(state) as client:
                events = await client.responses.create(
                    model="tiny", input="hi", max_output_tokens=6, stream=True
                )
                told = [event async for event in events]
            names = [event.type for event in told]
            assert names[:4] == [
                "response.created",
                "response.in_progress",
                "response.output_item.added",
                "response.content_part.added",
            ]
            deltas = names[4:-4]
            assert deltas
            assert set(deltas) == {"response.output_text.delta"}
            assert names[-4:] == [
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
                "response.incomplete",
            ]
            assert [event.sequence_number for event in told] == list(range(len(told)))
            text = "".join(event.delta for event in told[4:-4])
            assert text == text_of(engine.seen[0].prompt, 6) == told[-1].response.output_text
            assert told[0].response.status == "in_progress"
            assert told[0].response.output == []
            assert told[-1].response.id == told[0].response.id
            assert {e.item_id for e in told[4:-3]} == {told[2].item.id, told[-2].item.id}

    run(main)


def test_the_wire_names_events_and_says_no_done():
    async def main():
        async with serving() as (http, _, _engine):
            body = {"input": "hi", "max_output_tokens": 2, "stream": True, "rid": "mine"}
            response = await http.post("/v1/responses", json=body)
            events = events_of(response.text)
            assert all(name == event["type"] for name, event in events)
            assert events[0][1]["response"]["id"] == "mine"
            assert "[DONE]" not in response.text

    run(main)


class Kite(pydantic.BaseModel):
    name: str


def test_the_client_parses():
    """The fake engine says what a constrained one would have to."""
    text = '{"name":"red"}'
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    engine = FakeEngine(next_token=scripted([*tokens, TOKENIZER.eos_token_ids[0]]))

    async def main():
        grammars = GrammarCompiler(lambda: TOKENIZER)
        async with serving(engine, grammars=grammars) as (_, state, _engine):
            async with client_of(state) as client:
                response = await client.responses.parse(model="tiny", input="x", text_format=Kite)
            assert response.output_parsed == Kite(name="red")
            grammar = engine.seen[0].sampling.grammar
            assert grammar.kind == "json_schema"
            assert json.loads(grammar.text)["properties"].keys() == {"name"}
            async with (
                client_of(state) as client,
                client.responses.stream(model="tiny", input="x", text_format=Kite) as events,
            ):
                async for _ in events:
                    pass
                final = await events.get_final_response()
            assert final.output_parsed == Kite(name="red")

    run(main)


WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


def saying(text, **config):
    """A server whose model says a text."""
    ids = [*TOKENIZER.encode(text, add_special_tokens=False), TOKENIZER.eos_token_ids[0]]
    config = ServerConfig(served_model_name="tiny", **config)
    return serving(
        FakeEngine(next_token=scripted(ids)),
        config=config,
        grammars=GrammarCompiler(lambda: TOKENIZER),
    )


def test_a_call_of_a_function_by_the_client():
    calls = '[{"name": "weather", "parameters": {"city": "Bonn"}}]'

    async def main():
        async with saying(calls) as (_, state, engine), client_of(state) as client:
            body = {"model": "tiny", "input": "hi", "tools": [WEATHER], "tool_choice": "required"}
            response = await client.responses.create(**body)
            (item,) = response.output
            assert (item.type, item.name, item.status) == ("function_call", "weather", "completed")
            assert json.loads(item.arguments) == {"city": "Bonn"}
            assert item.call_id
            assert response.status == "completed"
            assert response.tools[0].name == "weather"
            assert response.tool_choice == "required"
            assert engine.seen[0].sampling.grammar.kind == "json_schema"

        async with saying(calls) as (_, state, _engine), client_of(state) as client:
            told = [e async for e in await client.responses.create(**body, stream=True)]
            names = [event.type for event in told]
            assert names[:3] == [
                "response.created",
                "response.in_progress",
                "response.output_item.added",
            ]
            assert set(names[3:-3]) == {"response.function_call_arguments.delta"}
            assert names[-3:] == [
                "response.function_call_arguments.done",
                "response.output_item.done",
                "response.completed",
            ]
            assert "".join(event.delta for event in told[3:-3]) == told[-3].arguments
            assert json.loads(told[-3].arguments) == {"city": "Bonn"}
            assert told[2].item.call_id == told[-2].item.call_id != ""

    run(main)


def test_the_turn_after_a_call():
    async def main():
        template = DATA / "templates" / "deepseek_v3.jinja"
        tokenizer = Tokenizer.from_folder(DATA / "deepseek_v3", chat_template=template)
        config = ServerConfig(served_model_name="tiny", tool_call_parser="deepseekv3")
        engine = FakeEngine(max_context_tokens=1024)
        async with serving(engine, config=config, tokenizer=tokenizer) as (http, _, _engine):
            call = {"type": "function_call", "call_id": "c1", "name": "weather"}
            items = [
                {"role": "user", "content": "U"},
                {
                    "type": "reasoning",
                    "id": "rs",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "T"}],
                },
                {**call, "id": "fc", "arguments": '{"city": "Bonn"}', "status": "completed"},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            ]
            body = {"input": items, "max_output_tokens": 1, "tools": [WEATHER]}
            response = await http.post("/v1/responses", json=body)
            assert response.status_code == 200, response.text
            function = {"name": "weather", "arguments": '{"city": "Bonn"}'}
            chat = {
                "max_tokens": 1,
                "tools": [
                    {
                        "type": "function",
                        "function": {k: v for k, v in WEATHER.items() if k != "type"},
                    }
                ],
                "messages": [
                    {"role": "user", "content": "U"},
                    {
                        "role": "assistant",
                        "reasoning_content": "T",
                        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
                ],
            }
            response = await http.post("/v1/chat/completions", json=chat)
            assert response.status_code == 200, response.text
            assert engine.seen[0].prompt == engine.seen[1].prompt
            assert "rain" in TOKENIZER.decode(engine.seen[0].prompt)

    run(main)


def test_thinking_is_an_item_of_its_own():
    text = "<think>hm, hm</think>Yes."

    async def main():
        async with saying(text, reasoning_parser="qwen3") as (_, state, _engine):
            async with client_of(state) as client:
                response = await client.responses.create(model="tiny", input="hi")
            thought, message = response.output
            assert (thought.type, thought.content[0].text) == ("reasoning", "hm, hm")
            assert response.output_text == "Yes."
            assert message.content[0].text == "Yes."
        async with saying(text, reasoning_parser="qwen3") as (http, _, _engine):
            body = {"input": "hi", "stream": True}
            events = events_of((await http.post("/v1/responses", json=body)).text)
            names = [name for name, _ in events]
            thought = [e["delta"] for n, e in events if n == "response.reasoning_text.delta"]
            assert "".join(thought) == "hm, hm"
            assert names.index("response.reasoning_text.done") < names.index(
                "response.output_text.delta"
            )
            assert names.count("response.output_item.done") == 2
            assert [e["output_index"] for n, e in events if n == "response.output_item.done"] == [
                0,
                1,
            ]
            assert [e["sequence_number"] for _, e in events] == list(range(len(events)))

    run(main)


def test_failures():
    async def main():
        async with serving(FakeEngine(error_at=3, error_status=503, error_message="Full.")) as (
            http,
            _,
            _engine,
        ):
            body = {"input": "hi", "stream": True}
            *_, (name, event) = events_of((await http.post("/v1/responses", json=body)).text)
            assert name == "response.failed"
            assert event["response"]["status"] == "failed"
            assert event["response"]["error"] == {"code": "server_error", "message": "Full."}
        async with serving(FakeEngine(error_at=0, error_status=503, error_message="Full.")) as (
            http,
            _,
            _engine,
        ):
            response = await http.post("/v1/responses", json=body)
            assert response.status_code == 503

    run(main)


def test_abort():
    async def main():
        engine = FakeEngine(delay_s=0.02)
        async with serving(engine) as (http, _, _engine):
            body = {"input": "hi", "rid": "z", "ignore_eos": True}
            task = asyncio.create_task(http.post("/v1/responses", json=body))
            while not engine.running:
                await asyncio.sleep(0.005)
            await http.post("/abort_request", json={"rid": "z"})
            assert (await task).json()["status"] == "cancelled"

    run(main)


WRONG = [
    (
        {"input": "x", "metadata": {str(i): "" for i in range(MAX_METADATA + 1)}},
        "metadata may hold 16 pairs, got 17.",
    ),
    ({}, "input is missing."),
    ({"input": ""}, "input cannot be empty."),
    ({"input": []}, "input cannot be empty."),
    ({"input": 5}, "input: expected"),
    ({"input": [{"role": "king", "content": "x"}]}, "input[0].role must be one of"),
    ({"input": [{"role": "user"}]}, "input[0].content is missing."),
    ({"input": [{"type": "item_reference"}]}, "input[0].type 'item_reference' is not supported"),
    ({"input": [{"type": "reasoning"}]}, "input[0].content is missing."),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0] needs name and call_id."),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0] needs call_id."),
    (
        {"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "["}]},
        "input[0].arguments must be a JSON object, as text.",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input[0].content[0] must be a part of type input_text",
    ),
    ({"input": "x", "max_output_tokens": 0}, "max_output_tokens must be positive, got 0."),
    ({"input": "x", "max_output_tokens": 10**9}, "max_output_tokens is too large"),
    ({"input": "x" * 5000}, "longer than the model's context length"),
    ({"input": "x", "temperature": -1}, "temperature must be"),
    ({"input": "x", "text": {"format": {"type": "no"}}}, "text.format.type must be one of"),
    ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "schema_ is required"),
    ({"input": "x", "text": {"format": {"type": "json_object"}}}, "--grammar-backend none"),
    ({"input": "x", "previous_response_id": "r"}, "Send the whole conversation as input"),
    ({"input": "x", "store": True}, "responses are not stored here"),
    ({"input": "x", "background": True}, "Use stream"),
    ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].function.name is empty"),
    ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type must be 'function'"),
    ({"input": "x", "tool_choice": "required"}, "Tools cannot be empty"),
    ({"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice must be auto, none, required"),
    ({"input": "x", "tool_choice": "maybe"}, "tool_choice must be one of"),
    ({"input": "x", "reasoning": {"summary": "detailed"}}, "thinking is not summarised"),
    ({"input": "x", "max_tool_calls": 3}, "max_tool_calls is not supported"),
]


def test_thousands_of_calls_in_one_turn_take_no_quadratic_time():
    calls = [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}] * 40_000
    body = ResponsesBody(input=msgspec.convert(calls, list[InputItem]))
    began = time.perf_counter()
    (message,) = to_chat_body(body).messages
    assert time.perf_counter() - began < 2.0  # copying the list for each call takes ten
    assert len(message.tool_calls) == 40_000


def test_wrong_bodies_are_400_with_a_sentence():
    async def main():
        async with serving() as (http, _, engine):
            for body, sentence in WRONG:
                response = await http.post("/v1/responses", json=body)
                assert response.status_code == 400, (body, response.text)
                assert sentence in response.json()["message"], (body, response.text)
            assert engine.seen == []
            for name, (neutral, _) in RESPONSES_NOT_SERVED.items():
                assert name in ResponsesBody.__struct_fields__
                for value in (None, *neutral):
                    body = {"input": "x", "max_output_tokens": 1, name: value}
                    assert (await http.post("/v1/responses", json=body)).status_code == 200, body

    run(main)
