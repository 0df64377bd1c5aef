"""/tokenize and /detokenize, and the routes of models that this server has none of."""

import pytest

from serving.config import ServerConfig
from tests.fakes import FakeEngine
from tests.serving.http.support import TOKENIZER, run, serving

pytestmark = pytest.mark.timeout(30)

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_there_and_back(prefix):
    async def main():
        async with serving() as (http, _, _engine):
            ids = TOKENIZER.encode("once upon")
            told = (await http.post(f"{prefix}/tokenize", json={"prompt": "once upon"})).json()
            assert told == {"tokens": ids, "count": len(ids), "max_model_len": 256}
            body = {"prompt": ["once upon", ""], "add_special_tokens": False}
            told = (await http.post(f"{prefix}/tokenize", json=body)).json()
            plain = TOKENIZER.encode("once upon", add_special_tokens=False)
            assert told["tokens"] == [plain, []]
            assert told["count"] == [len(plain), 0]
            assert ids == [TOKENIZER.bos_token_id, *plain]
            told = (await http.post(f"{prefix}/detokenize", json={"tokens": ids})).json()
            assert told == {"text": "once upon"}
            body = {"tokens": [ids, plain], "skip_special_tokens": False}
            first, second = (await http.post(f"{prefix}/detokenize", json=body)).json()["text"]
            assert first.endswith("once upon")
            assert len(first) > len(second) == len("once upon")
            assert (await http.post(f"{prefix}/detokenize", json={"tokens": []})).json() == {
                "text": ""
            }

    run(main)


def test_conversation_is_what_chat_would_send():
    async def main():
        async with serving() as (http, _, engine):
            told = (await http.post("/tokenize", json={"messages": MESSAGES})).json()
            body = {"messages": MESSAGES, "max_tokens": 1}
            await http.post("/v1/chat/completions", json=body)
            assert tuple(told["tokens"]) == engine.seen[0].prompt
            assert told["count"] == len(told["tokens"])

    run(main)


def test_functions_are_in_the_conversation():
    config = ServerConfig(served_model_name="tiny", tool_call_parser="deepseekv3")
    tools = [{"type": "function", "function": {"name": "weather", "description": "Rain?"}}]

    async def main():
        engine = FakeEngine(max_context_tokens=1024)
        async with serving(engine, config=config) as (http, _, _engine):
            body = {"messages": MESSAGES, "tools": tools}
            told = (await http.post("/tokenize", json=body)).json()
            await http.post("/v1/chat/completions", json=body | {"max_tokens": 1})
            assert tuple(told["tokens"]) == engine.seen[0].prompt
            plain = (await http.post("/tokenize", json={"messages": MESSAGES})).json()
            assert plain["count"] < told["count"]

    run(main)


WRONG = [
    ("/tokenize", {}, "Exactly one of 'prompt' or 'messages' must be provided."),
    ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "Exactly one of"),
    ("/tokenize", {"prompt": 5}, "prompt: expected"),
    ("/tokenize", {"prompt": ["a"] * 1025}, "prompt may hold 1024 entries, got 1025"),
    ("/tokenize", {"messages": MESSAGES, "tools": [None]}, "tools[0]: expected"),
    ("/tokenize", {"messages": MESSAGES, "tools": [{"function": {"name": ""}}]}, "name is empty"),
    ("/tokenize", {"messages": []}, "Messages cannot be empty."),
    ("/tokenize", {"messages": [{"role": "king", "content": ""}]}, "messages[0].role must be"),
    ("/detokenize", {}, "tokens is missing"),
    ("/detokenize", {"tokens": "a"}, "tokens: expected"),
    ("/detokenize", {"tokens": [512]}, "tokens must be in [0, 511], got 512"),
    ("/detokenize", {"tokens": [-1]}, "tokens must be in [0, 511], got -1"),
    ("/detokenize", {"tokens": [[10**30]]}, "tokens must be in"),
    ("/detokenize", {"tokens": [5, [5]]}, "not a mixture"),
    ("/detokenize", {"tokens": [[5]] * 1025}, "tokens may hold 1024 entries, got 1025"),
    ("/v1/embeddings", {"input": "a"}, "does not appear to be an embedding model by default"),
    ("/v1/score", {}, "/v1/completions with echo and logprobs"),
    ("/v1/rerank", {}, "does not appear to be a reranker model"),
]


def test_wrong_bodies_are_400_with_a_sentence():
    async def main():
        async with serving() as (http, _, _engine):
            for path, body, sentence in WRONG:
                response = await http.post(path, json=body)
                assert response.status_code == 400, (body, response.text)
                assert sentence in response.json()["message"], body

    run(main)
