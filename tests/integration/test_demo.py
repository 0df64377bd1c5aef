"""The bundled demo model: the same answers as transformers, on one device and as it is served."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from serving.config import DEMO_MODEL_PATH
from tests.fixtures import DATA
from tests.integration.server import running_server

pytestmark = pytest.mark.timeout(300)

CHATS = json.loads((DATA / "demo_expected.json").read_text(encoding="utf-8"))["chats"]


@pytest.fixture(scope="module")
def url():
    """No flags about model or layout: what `make serve` runs, on eight emulated devices."""
    with running_server("--max-total-tokens", "4096", optimised=True) as url:
        yield url


def test_no_flags_means_dp_attention_on_every_device(url):
    info = httpx.get(f"{url}/get_server_info").json()
    assert info["engine"]["roles"] == {"attn_dp": 8, "attn_tp": 1, "moe_ep": 8, "moe_tp": 1}
    assert info["engine"]["dtype"] == "float32"


def at_the_same_time(check, chats):
    """All chats at once, one a slice: that is how eight devices are meant to be used."""
    with ThreadPoolExecutor(len(chats)) as pool:
        list(pool.map(check, chats))


def test_chats_answer_as_transformers_does(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    name = client.models.list().data[0].id

    def check(chat):
        answer = client.chat.completions.create(
            model=name, messages=chat["messages"], temperature=0, max_tokens=48
        )
        assert answer.choices[0].message.content == chat["answer"]
        ended = chat["tokens"][-1] == 1
        assert answer.choices[0].finish_reason == ("stop" if ended else "length")
        assert answer.usage.prompt_tokens == len(chat["prompt"])
        assert answer.usage.completion_tokens == len(chat["tokens"])

    at_the_same_time(check, CHATS)


def test_a_stream_is_the_same_answer_in_pieces(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

    def check(chat):
        stream = client.chat.completions.create(
            model="demo",
            messages=chat["messages"],
            temperature=0,
            max_tokens=48,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(pieces) == chat["answer"]
        assert len(pieces) > 3
        assert chunks[-1].usage.completion_tokens == len(chat["tokens"])

    at_the_same_time(check, [chat for chat in CHATS if len(chat["tokens"]) < 48])


def test_the_shipped_weights_are_small():
    assert (DEMO_MODEL_PATH / "model.safetensors").stat().st_size <= 30e6
