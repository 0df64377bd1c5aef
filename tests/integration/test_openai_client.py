"""The openai package against a real server with the demo model: what people's programs do with it.

Afterwards nothing runs, nothing waits and no page is missing, whatever was cut off on the way.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.fixtures import DATA
from tests.integration.server import running_server

pytestmark = pytest.mark.timeout(120)

CHATS = json.loads((DATA / "demo_expected.json").read_text(encoding="utf-8"))["chats"]
STORY = [{"role": "user", "content": "Tell me a story about a kite."}]
TOTAL_TOKENS = 6144
NUM_STREAMS = 100
PATIENCE_S = 60
"""For small questions, on a machine that has other work."""


class Weather(BaseModel):
    """What an answer has to be."""

    sky: Literal["blue", "grey"]
    windy: bool


@pytest.fixture(scope="module")
def url():
    """One device, few programs: the client is what is tried here."""
    with running_server(
        *("--tp", "1", "--max-total-tokens", str(TOTAL_TOKENS)),
        *("--decode-buckets", "1,32", "--extend-buckets", "256"),
        optimised=True,
    ) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@asynccontextmanager
async def many(url: str, **changes: object) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client without the package's own limit on connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    http = httpx.AsyncClient(limits=limits, timeout=90)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http, **changes
    ) as client:
        yield client


def loads(url: str) -> list[dict[str, float]]:
    return httpx.get(f"{url}/v1/loads", timeout=PATIENCE_S).json()["loads"]


def until(condition, seconds=PATIENCE_S):
    """Wait for something that follows soon; whether it came."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def assert_nothing_is_left(url: str) -> None:
    """Nobody runs or waits, and after a flush every page is free and found nowhere twice."""

    def idle() -> bool:
        return not any(
            load["num_running_reqs"] + load["num_waiting_reqs"] + load["num_used_tokens"]
            for load in loads(url)
        )

    assert until(idle), loads(url)
    assert httpx.post(f"{url}/flush_cache", timeout=PATIENCE_S).status_code == 200
    metrics = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    values = {
        line.partition("{")[0].removeprefix("sglang:"): float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith(("sglang:kv_", "sglang:max_total_num_tokens"))
    }
    assert values["kv_used_tokens"] == 0
    assert values["kv_evictable_tokens"] == 0
    assert values["kv_available_tokens"] == values["max_total_num_tokens"] > 0


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


def test_completions_of_texts_and_tokens(client, url):
    prompt = "Once upon a time"
    one = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0)
    assert (one.choices[0].finish_reason, one.usage.completion_tokens) == ("length", 12)
    ids = httpx.post(f"{url}/tokenize", json={"prompt": prompt}).json()["tokens"]
    assert one.usage.prompt_tokens == len(ids)
    two = client.completions.create(
        model="demo", prompt=[ids, ids], max_tokens=12, temperature=0, n=2, logprobs=1
    )
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in two.choices} == {one.choices[0].text}
    scores = two.choices[3].logprobs
    assert "".join(scores.tokens) == one.choices[0].text
    assert all(score <= 0 for score in scores.token_logprobs)
    chunks = list(
        client.completions.create(
            model="demo", prompt=prompt, max_tokens=12, temperature=0, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == one.choices[0].text


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_chats_streamed_with_usage_are_the_references(client, chat):
    body = {"model": "demo", "messages": chat["messages"], "temperature": 0, "max_tokens": 48}
    whole = client.chat.completions.create(**body)
    assert whole.choices[0].message.content == chat["answer"]
    *chunks, last = client.chat.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat["answer"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == len(chat["tokens"])
    assert last.usage == whole.usage.model_copy(
        update={"prompt_tokens_details": last.usage.prompt_tokens_details}
    )


def test_content_in_parts_is_content(client):
    chat = CHATS[0]
    parts = [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        for message in chat["messages"]
    ]
    answer = client.chat.completions.create(
        model="demo", messages=parts, temperature=0, max_completion_tokens=48
    )
    assert answer.choices[0].message.content == chat["answer"]


def test_structured_answers_are_parsed(client):
    answer = client.chat.completions.parse(
        model="demo",
        messages=[{"role": "user", "content": "What is the weather?"}],
        response_format=Weather,
        max_tokens=400,  # there may be 64 blanks in every gap
        temperature=0,
    )
    message = answer.choices[0].message
    assert isinstance(message.parsed, Weather)
    with client.chat.completions.stream(
        model="demo",
        messages=STORY,
        response_format=Weather,
        max_tokens=400,  # there may be 64 blanks in every gap
        temperature=0,
    ) as stream:
        kinds = {event.type for event in stream}
        assert "content.delta" in kinds
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="demo", messages=STORY, response_format=Weather, max_tokens=2
        )


def test_errors_have_the_packages_types(client):
    wrong = [
        ({"temperature": -1}, "temperature must be"),
        ({"max_tokens": 10**9}, "context length|too large"),
        ({"messages": []}, "Messages cannot be empty"),
    ]
    for changes, text in wrong:
        with pytest.raises(openai.BadRequestError, match=text) as error:
            client.chat.completions.create(**{"model": "demo", "messages": STORY, **changes})
        assert error.value.body["code"] == 400
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="demo", input="a")


def test_100_streams_at_once(url):
    """Twelve contexts do not fit at once: they wait, and are retracted, and still say the same."""

    async def one(client, number):
        chat = CHATS[number % len(CHATS)]
        pieces = []
        stream = await client.chat.completions.create(
            model="demo", messages=chat["messages"], temperature=0, max_tokens=48, stream=True
        )
        async for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")
        assert "".join(pieces) == chat["answer"]

    async def main():
        async with many(url) as client:
            await asyncio.gather(*(one(client, i) for i in range(NUM_STREAMS)))

    asyncio.run(main())
    assert_nothing_is_left(url)


def test_a_timeout_ends_the_answer_in_the_engine(client, url):
    began = time.monotonic()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model="demo", messages=STORY, extra_body={"ignore_eos": True}
        )
    assert time.monotonic() - began < 5
    assert_nothing_is_left(url)


def test_streams_that_are_closed_or_cancelled_leave_nothing(client, url):
    endless = {"ignore_eos": True}
    with client.chat.completions.create(
        model="demo", messages=STORY, stream=True, extra_body=endless
    ) as stream:
        next(iter(stream))
        assert any(load["num_running_reqs"] for load in loads(url))

    async def main():
        async with many(url) as client:
            tasks = [
                asyncio.create_task(
                    client.chat.completions.create(
                        model="demo", messages=STORY, n=2, extra_body=endless
                    )
                )
                for _ in range(10)
            ]
            assert await asyncio.to_thread(
                until, lambda: sum(load["num_running_reqs"] for load in loads(url)) >= 4
            )
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ended)

    asyncio.run(main())
    assert_nothing_is_left(url)
    answer = client.chat.completions.create(
        model="demo", messages=CHATS[0]["messages"], temperature=0, max_tokens=48
    )
    assert answer.choices[0].message.content == CHATS[0]["answer"]
