"""`return_token_ids` and `continue_from`: a stream that broke goes on on another worker."""

import asyncio
import json

import pytest

from serving.http.calls import Job
from serving.http.generation import REPLAY_TOKENS, _replay
from serving.request import SamplingParams
from tests.fakes import FakeEngine, answer, scripted
from tests.serving.http.support import TOKENIZER, events_of, run, serving

pytestmark = pytest.mark.timeout(60)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
BODIES = [(COMPLETIONS, {"prompt": [5, 6]}), (CHAT, {"messages": HELLO})]
STOP_AT_EOS = 1


def ids_of(text):
    return TOKENIZER._fast.encode(text, add_special_tokens=False).ids


async def chunks_of(http, url, body):
    response = await http.post(url, json=body | {"stream": True, "return_token_ids": True})
    assert response.status_code == 200, response.text
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def text_of(choice):
    return choice["text"] if "text" in choice else choice["delta"].get("content", "")


def joined(chunks, index=0):
    """Text, token ids and finish reason of one answer."""
    choices = [c["choices"][0] for c in chunks if c["choices"]]
    mine = [c for c in choices if c["index"] == index]
    ids = [i for c in mine for i in c["token_ids"]]
    return "".join(map(text_of, mine)), ids, mine[-1]["finish_reason"] if mine else None


@pytest.mark.parametrize(("url", "body"), BODIES)
def test_every_chunk_tells_its_tokens(url, body):
    async def main():
        async with serving() as (http, _, engine):
            chunks = await chunks_of(http, url, body | {"max_tokens": 12})
            prompt = engine.seen[0].prompt
            assert joined(chunks)[1] == answer(prompt, 12)
            if url == CHAT:
                assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
                assert all("role" not in c["choices"][0]["delta"] for c in chunks[1:])
            whole = await http.post(url, json=body | {"max_tokens": 12, "return_token_ids": True})
            assert whole.json()["choices"][0]["token_ids"] == answer(prompt, 12)
            plain = await http.post(url, json=body | {"max_tokens": 12})
            assert "token_ids" not in plain.json()["choices"][0]

    run(main)


@pytest.mark.parametrize(("url", "body"), BODIES)
@pytest.mark.parametrize("stop", [None, "ü!"])
def test_broken_anywhere_and_continued_the_text_is_the_same(url, body, stop):
    """Multi-byte characters and stop strings lie across the breaks."""
    script = [*ids_of("Grüße, 世界 ü? ü!"), *ids_of("never")] if stop else ids_of("Grüße, 世界 ü")
    script = script if stop else [*script, STOP_AT_EOS]
    body = body | {"max_tokens": 60} | ({"stop": stop} if stop else {})

    async def main():
        async with serving(FakeEngine(next_token=scripted(script))) as (http, _, _):
            chunks = await chunks_of(http, url, body)
            text, ids, reason = joined(chunks)
            assert text == "Grüße, 世界 ü? " if stop else text == "Grüße, 世界 ü"
            assert reason == "stop"
        for cut in range(len(chunks)):
            seen, begun, _ = joined(chunks[:cut])
            rest = ids[len(begun) :]
            fake = FakeEngine(next_token=scripted(rest + script))
            async with serving(fake) as (http, _, engine):
                again = body | {"continue_from": [{"token_ids": begun}]}
                more = await chunks_of(http, url, again)
                assert engine.seen[0].answer == tuple(begun)
                assert joined(more) == (text[len(seen) :], rest, "stop")
                assert all("role" not in c["choices"][0].get("delta", {}) for c in more[1:])
                async with asyncio.timeout(5):  # the word of the stop string is on its way
                    while fake.running:
                        await asyncio.sleep(0.001)

    run(main)


def test_several_answers_go_on_each_from_its_place():
    async def main():
        async with serving() as (http, state, engine):
            body = {"prompt": [[5, 6], [7, 8, 9]], "max_tokens": 8, "seed": 4, "n": 2}
            whole = await chunks_of(http, COMPLETIONS, body)
            answers = [joined(whole, i) for i in range(4)]
            begun = [answers[0][1], answers[1][1][:5], [], answers[3][1][:1]]
            resume = [{"token_ids": ids} for ids in begun]
            resume[0]["finished"] = True
            engine.seen.clear()
            options = {"stream_options": {"include_usage": True}}
            *more, last = await chunks_of(
                http, COMPLETIONS, body | {"continue_from": resume} | options
            )
            assert [r.answer for r in engine.seen] == [tuple(ids) for ids in begun[1:]]
            assert joined(more, 0) == ("", [], None)
            for i in range(1, 4):
                assert begun[i] + joined(more, i)[1] == answers[i][1]
            assert last["usage"] == {
                "prompt_tokens": 5,
                "completion_tokens": 32,
                "total_tokens": 37,
                "prompt_tokens_details": {
                    "cached_tokens": last["usage"]["prompt_tokens_details"]["cached_tokens"]
                },
            }
            assert last["usage"]["prompt_tokens_details"]["cached_tokens"] <= 5
            assert state._live == {}

    run(main)


def test_text_offsets_go_on():
    async def main():
        async with serving() as (http, _, _):
            body = {"prompt": [5, 6], "max_tokens": 9, "logprobs": 0}
            whole = await chunks_of(http, COMPLETIONS, body)
            offsets = [o for c in whole for o in c["choices"][0]["logprobs"]["text_offset"]]
            ids = joined(whole)[1]
            more = await chunks_of(
                http, COMPLETIONS, body | {"continue_from": [{"token_ids": ids[:4]}]}
            )
            rest = [o for c in more for o in c["choices"][0]["logprobs"]["text_offset"]]
            assert rest == offsets[4:]

    run(main)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"continue_from": [{"token_ids": [40]}], "stream": False}, "needs stream to be true"),
        ({"continue_from": []}, "an entry for each of the 1 answers, got 0"),
        ({"continue_from": [{"token_ids": [40]}] * 2}, "an entry for each of the 1 answers, got 2"),
        ({"continue_from": [{"token_ids": [512]}]}, r"token_ids must be in [0, 511], got 512"),
        ({"continue_from": [{"token_ids": [-1]}]}, r"token_ids must be in [0, 511], got -1"),
        ({"continue_from": [{"token_ids": [40, 1]}]}, "holds 1, which ends an answer"),
        ({"continue_from": [{"token_ids": [40] * 8}]}, "the answer may have 8 in all"),
        ({"continue_from": [{"token_ids": ids_of("ab.c")}], "stop": "b."}, "the stop string 'b.'"),
        ({"continue_from": [{"token_ids": [40]}], "echo": True}, "echo cannot be used together"),
        ({"continue_from": [{"token_ids": ["a"]}]}, "expected `int`"),
        ({"continue_from": [{}]}, "missing required field `token_ids`"),
    ],
)
def test_what_cannot_go_on_is_a_400(changes, text):
    async def main():
        async with serving() as (http, state, engine):
            body = {"prompt": [5, 6], "max_tokens": 8, "stream": True} | changes
            response = await http.post(COMPLETIONS, json=body)
            assert response.status_code == 400
            error = response.json()
            assert text in error["message"]
            assert error["param"] == "continue_from"
            assert engine.seen == []
            assert state._live == {}

    run(main)


class _Letters:
    """A decoder whose every token is one letter."""

    num_chars = 0

    def push(self, event):
        return "a", event.finish_reason, None


def test_others_run_while_a_long_answer_is_read_again():
    async def main():
        turns = 0

        async def others():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        sampling = SamplingParams(max_tokens=10 * REPLAY_TOKENS)
        job = Job(prompt=(1,), sampling=sampling, begun=(5,) * (8 * REPLAY_TOKENS))
        task = asyncio.create_task(others())
        delta = await _replay(0, job, "r", _Letters())
        task.cancel()
        assert len(delta.text) == len(delta.tokens) == 8 * REPLAY_TOKENS
        assert turns >= 7

    run(main)
