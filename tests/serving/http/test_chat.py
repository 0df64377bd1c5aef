"""/v1/chat/completions: template, roles, content parts, lengths, chunks."""

import asyncio
import json

import openai
import pytest

from tests.fakes import FakeEngine, answer, scripted
from tests.serving.http.support import DATA, TOKENIZER, events_of, run, serving

pytestmark = pytest.mark.timeout(30)

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Who painted the door?"}]


def test_reference_chats_reach_the_engine_as_their_ids():
    async def main():
        expected = json.loads((DATA / "deepseek_v3" / "expected.json").read_text())
        async with serving() as (http, _, engine):
            for chat in expected["chats"]:
                body = {"messages": chat["messages"], "max_tokens": 4}
                response = await http.post(URL, json=body)
                assert response.status_code == 200
                assert list(engine.seen[-1].prompt) == chat["prompt"]
                message = response.json()["choices"][0]["message"]
                assert message["role"] == "assistant"
                assert message["content"] == TOKENIZER.decode(answer(chat["prompt"], 4))

    run(main)


@pytest.mark.parametrize(
    ("message", "same_as"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "user", "content": "a"},
        ),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "user", "content": "a b"},
        ),
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "user", "content": "a", "name": "Al"}, {"role": "user", "content": "a"}),
    ],
)
def test_messages_in_every_form(message, same_as):
    async def main():
        async with serving() as (http, _, engine):
            response = await http.post(URL, json={"messages": [message], "max_tokens": 1})
            assert response.status_code == 200, response.text
            assert list(engine.seen[0].prompt) == TOKENIZER.encode_chat([same_as])

    run(main)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 64 - 11),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 100000, "max_completion_tokens": 8}, 8),
    ],
)
def test_how_long_the_answer_may_be(given, expected):
    async def main():
        async with serving(FakeEngine(max_context_tokens=64)) as (http, _, engine):
            response = await http.post(URL, json={"messages": HELLO} | given)
            assert response.status_code == 200, response.text
            assert len(engine.seen[0].prompt) == 11
            assert engine.seen[0].sampling.max_tokens == expected
            assert response.json()["usage"]["completion_tokens"] == expected

    run(main)


def test_stream_is_role_then_deltas_then_finish_then_usage():
    async def main():
        async with serving() as (http, _, _engine):
            body = {"messages": HELLO, "max_tokens": 6, "stream": True}
            body["stream_options"] = {"include_usage": True}
            response = await http.post(URL, json=body)
            *chunks, done = events_of(response.text)
            assert done == "[DONE]"
            chunks = [json.loads(chunk) for chunk in chunks]
            assert len({chunk["id"] for chunk in chunks}) == 1
            assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
            *parts, usage = chunks
            deltas = [part["choices"][0]["delta"] for part in parts]
            assert deltas[0] == {"role": "assistant", "content": ""}
            assert all(list(delta) == ["content"] for delta in deltas[1:-1])
            assert deltas[-1] == {}
            expected = TOKENIZER.decode(answer(TOKENIZER.encode_chat(HELLO), 6))
            assert "".join(delta["content"] for delta in deltas[:-1]) == expected
            ends = [part["choices"][0]["finish_reason"] for part in parts]
            assert ends == [None] * (len(ends) - 1) + ["length"]
            assert usage["choices"] == []
            assert usage["usage"]["completion_tokens"] == 6

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream):
    async def main():
        script = TOKENIZER._fast.encode("old 猫", add_special_tokens=False).ids
        async with serving(FakeEngine(next_token=scripted([*script, 1]))) as (http, _, _engine):
            body = {"messages": HELLO, "logprobs": True, "top_logprobs": 3, "stream": stream}
            response = await http.post(URL, json=body)
            if stream:
                parts = [json.loads(event) for event in events_of(response.text)[:-1]]
            else:
                parts = [response.json()]
            content = [
                entry
                for part in parts
                if part["choices"][0]["logprobs"]
                for entry in part["choices"][0]["logprobs"]["content"]
            ]
            assert len(content) == len(script) + 1
            told = b"".join(bytes(entry["bytes"]) for entry in content[:-1])
            assert told.decode() == "old 猫"
            assert content[-1]["token"] == "<｜end▁of▁sentence｜>"
            assert [len(entry["top_logprobs"]) for entry in content] == [3] * len(content)

    run(main)


def test_template_variables():
    async def main():
        async with serving() as (http, _, engine):
            body = {
                "messages": HELLO,
                "max_tokens": 1,
                "chat_template_kwargs": {"add_generation_prompt": False},
            }
            assert (await http.post(URL, json=body)).is_success
            expected = TOKENIZER.encode_chat(HELLO, {"add_generation_prompt": False})
            assert list(engine.seen[0].prompt) == expected
            assert expected[-1] != TOKENIZER.encode_chat(HELLO)[-1]

    run(main)


def test_openai_client():
    async def main():
        async with serving() as (http, _, _engine):
            client = openai.AsyncOpenAI(
                api_key="none", base_url="http://test/v1", http_client=http, max_retries=0
            )
            text = TOKENIZER.decode(answer(TOKENIZER.encode_chat(HELLO), 8))
            got = await client.chat.completions.create(
                model="tiny", messages=HELLO, max_completion_tokens=8, logprobs=True, top_logprobs=2
            )
            assert got.choices[0].message.content == text
            assert got.choices[0].message.tool_calls is None
            assert len(got.choices[0].logprobs.content) == 8
            stream = await client.chat.completions.create(
                model="tiny",
                messages=HELLO,
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
            assert "".join(pieces) == text
            assert chunks[-1].usage.total_tokens == 11 + 8
            models = await client.models.list()
            assert [model.id for model in models.data] == ["tiny"]
            with pytest.raises(openai.BadRequestError, match="Messages cannot be empty"):
                await client.chat.completions.create(model="tiny", messages=[])

    run(main)


def test_openai_stream_helper():
    async def main():
        script = [*TOKENIZER._fast.encode("By the old man.", add_special_tokens=False).ids, 1]
        async with serving(FakeEngine(next_token=scripted(script))) as (http, _, _engine):
            client = openai.AsyncOpenAI(
                api_key="none", base_url="http://test/v1", http_client=http, max_retries=0
            )
            async with client.chat.completions.stream(model="tiny", messages=HELLO) as helper:
                final = await helper.get_final_completion()
            assert final.choices[0].message.content == "By the old man."
            assert final.choices[0].finish_reason == "stop"

    run(main)


def test_many_concurrent_streams_keep_their_order():
    async def main():
        async with serving(FakeEngine(delay_s=0.001)) as (http, state, _engine):

            async def one(i):
                messages = [{"role": "user", "content": f"Question {i}?"}]
                num = 5 + i % 20
                body = {"messages": messages, "max_tokens": num, "stream": True}
                *chunks, _ = events_of((await http.post(URL, json=body)).text)
                deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
                text = "".join(delta.get("content", "") for delta in deltas)
                assert text == TOKENIZER.decode(answer(TOKENIZER.encode_chat(messages), num))

            await asyncio.gather(*(one(i) for i in range(64)))
            assert state.engine.num_open == 0

    run(main)
