"""`echo`: the prompt in front of the answer, and the log probabilities of its tokens."""

import json
import math

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.http.echo import echo_of
from tests.fakes import FakeEngine, answer, prompt_scores, scripted
from tests.serving.http.support import TOKENIZER, events_of, run, serving

pytestmark = pytest.mark.timeout(30)

URL = "/v1/completions"
TEXT = "The old 猫 said"
BOS_NAME = "<｜begin▁of▁sentence｜>"


async def post(http, stream=False, **body):
    """The choices of an answer, those of a stream put together."""
    response = await http.post(URL, json=body | {"stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        return response.json()["choices"]
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    merged = {}
    for chunk in chunks:
        (choice,) = json.loads(chunk)["choices"]
        known = merged.setdefault(choice["index"], choice)
        if known is choice:
            continue
        known["text"] += choice["text"]
        known["finish_reason"] = choice["finish_reason"]
        known["matched_stop"] = choice["matched_stop"]
        if choice["logprobs"]:
            for key, values in choice["logprobs"].items():
                if values is not None:
                    known["logprobs"][key] += values
    return [merged[index] for index in sorted(merged)]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_logprobs(stream):
    async def main():
        async with serving() as (http, _, engine):
            prompt = TOKENIZER.encode(TEXT)
            said = TOKENIZER.decode(answer(prompt, 5))
            (choice,) = await post(http, stream, prompt=TEXT, echo=True, max_tokens=5)
            assert choice["text"] == TEXT + said
            assert choice["logprobs"] is None
            choices = await post(http, stream, prompt=[prompt, [5, 6]], echo=True, max_tokens=5)
            # Token ids are decoded, without the begin-of-sequence token.
            assert choices[0]["text"] == TEXT + said
            assert choices[1]["text"] == TOKENIZER.decode([5, 6, *answer([5, 6], 5)])
            assert {request.prompt_logprobs for request in engine.seen} == {None}

    run(main)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_echo_with_logprobs(stream, as_text):
    async def main():
        async with serving() as (http, _, engine):
            prompt = TOKENIZER.encode(TEXT)
            body = {"prompt": TEXT if as_text else prompt, "max_tokens": 4, "logprobs": 2}
            (choice,) = await post(http, stream, **body, echo=True)
            assert engine.seen[0].prompt_logprobs == 2
            got = choice["logprobs"]
            assert choice["text"].startswith(TEXT)
            num = len(prompt)
            assert got["tokens"][0] == BOS_NAME
            assert got["token_logprobs"][0] is None
            assert got["top_logprobs"][0] is None
            assert got["token_logprobs"][1:num] == [-float(i) for i in range(1, num)]
            assert got["token_logprobs"][num:] == [-0.5] * 4
            assert [len(values) for values in got.values()] == [num + 4] * 4
            # The token itself is always among the alternatives; here it is the best.
            assert all(
                max(top.values()) == -float(i)
                for i, top in enumerate(got["top_logprobs"])
                if 0 < i < num
            )
            assert got["text_offset"][:3] == [0, 0, len("The")]
            assert got["text_offset"][num] == len(TEXT)
            (bare,) = await post(http, stream, **body)
            shifted = [len(TEXT) + offset for offset in bare["logprobs"]["text_offset"]]
            assert got["text_offset"][num:] == shifted
            assert choice["text"] == TEXT + bare["text"]

    run(main)


def test_text_offsets_point_at_the_tokens_of_the_text():
    """Half characters aside, a token's name stands where its offset says."""

    async def main():
        script = TOKENIZER._fast.encode(" and 猫 smiled", add_special_tokens=False).ids
        async with serving(FakeEngine(next_token=scripted(script))) as (http, _, _engine):
            for prompt in (TEXT, TOKENIZER.encode("By the old man.")):
                body = {"prompt": prompt, "max_tokens": len(script), "logprobs": 1, "echo": True}
                (choice,) = await post(http, **body, skip_special_tokens=True)
                got = choice["logprobs"]
                for name, offset in zip(got["tokens"], got["text_offset"], strict=True):
                    if not name.startswith(("bytes:", "<｜")):
                        assert choice["text"].startswith(name, offset), (name, offset)

    run(main)


@settings(max_examples=80, deadline=None)
@given(st.text(st.sampled_from("abe thT .é猫\n😀"), min_size=1, max_size=30))
def test_offsets_of_a_text_are_those_of_its_decoded_tokens(text):
    prompt = TOKENIZER.encode(text)
    options = {"skip_special_tokens": True, "with_offsets": True}
    from_text = echo_of(prompt, text, TOKENIZER, **options)
    assert from_text == echo_of(prompt, None, TOKENIZER, **options)
    assert from_text.text == text
    assert list(from_text.offsets) == sorted(from_text.offsets)


def test_a_text_that_the_tokeniser_changes_is_echoed_as_it_was():
    text = f"{BOS_NAME}old"
    prompt = TOKENIZER.encode(text)
    echo = echo_of(prompt, text, TOKENIZER, skip_special_tokens=True, with_offsets=True)
    assert echo.text == text
    assert echo.offsets[:2] == (0, len(BOS_NAME))
    strange = echo_of(
        [9, 10, 11], "no such text", TOKENIZER, skip_special_tokens=True, with_offsets=True
    )
    assert strange.text == "no such text"
    assert all(0 <= offset <= len(strange.text) for offset in strange.offsets)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 1])
def test_max_tokens_0_scores_the_prompt_only(stream, logprobs):
    async def main():
        # The token that the engine generates, and we drop, ends the answer: nobody must see it.
        async with serving(FakeEngine(next_token=scripted([1], 1))) as (http, _, engine):
            body = {"prompt": [[5, 6, 7], [8]], "max_tokens": 0, "echo": True}
            body |= {"logprobs": logprobs, "temperature": 0.7, "stop": "x", "min_tokens": 0}
            choices = await post(http, stream, **body)
            assert [choice["text"] for choice in choices] == [
                TOKENIZER.decode([5, 6, 7]),
                TOKENIZER.decode([8]),
            ]
            assert {choice["finish_reason"] for choice in choices} == {"length"}
            assert {choice["matched_stop"] for choice in choices} == {None}
            if logprobs is None:
                assert choices[0]["logprobs"] is None
            else:
                assert choices[0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
                assert choices[1]["logprobs"]["token_logprobs"] == [None]
                assert (choices[0]["logprobs"]["top_logprobs"] is None) == (logprobs == 0)
            assert {request.sampling.max_tokens for request in engine.seen} == {1}
            assert engine.seen[0].prompt_logprobs == logprobs
            usage = (await http.post(URL, json=body)).json()["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 0)

    run(main)


def test_log_likelihoods_as_an_evaluation_harness_asks_for_them():
    """A batch of token ids, context and continuation; scores of the continuation are added up."""

    async def main():
        async with serving() as (http, _, _engine):
            client = openai.AsyncOpenAI(
                api_key="none", base_url="http://test/v1", http_client=http, max_retries=0
            )
            prompts = [[5, 6, 7, 8], [9, 10, 11]]
            got = await client.completions.create(
                model="tiny",
                prompt=prompts,
                max_tokens=1,
                logprobs=1,
                echo=True,
                temperature=0,
                seed=1234,
            )
            for prompt, choice, context in zip(prompts, got.choices, (2, 1), strict=True):
                scores = choice.logprobs.token_logprobs[context:-1]
                tops = choice.logprobs.top_logprobs[context:-1]
                assert len(scores) == len(prompt) - context
                wanted = [score.logprob for score in prompt_scores(prompt, 1)][context - 1 :]
                assert math.isclose(sum(scores), sum(wanted))
                assert all(s == max(t.values()) for s, t in zip(scores, tops, strict=True))

    run(main)


def test_every_sample_echoes():
    async def main():
        async with serving() as (http, _, _engine):
            body = {"prompt": [5, 6], "n": 2, "echo": True, "logprobs": 0, "max_tokens": 2}
            for stream in (False, True):
                choices = await post(http, stream, **body)
                assert len(choices) == 2
                for choice in choices:
                    assert choice["text"].startswith(TOKENIZER.decode([5, 6]))
                    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -0.5, -0.5]

    run(main)


def test_an_engine_that_does_not_score_is_an_error():
    async def main():
        engine = FakeEngine()
        engine._first = lambda request: None  # no first-token report at all
        async with serving(engine) as (http, _, _engine):
            body = {"prompt": [5, 6], "echo": True, "logprobs": 1, "max_tokens": 2}
            response = await http.post(URL, json=body)
            assert response.status_code == 500
            assert response.json()["message"] == "The engine did not score the prompt."

    run(main)


def test_scoring_needs_room_for_one_token():
    async def main():
        async with serving(FakeEngine(max_context_tokens=8)) as (http, _, _engine):
            body = {"echo": True, "logprobs": 0, "max_tokens": 0}
            (choice,) = await post(http, prompt=[5] * 7, **body)
            assert len(choice["logprobs"]["tokens"]) == 7
            response = await http.post(URL, json=body | {"prompt": [5] * 8})
            assert response.status_code == 400
            assert response.json()["param"] == "prompt"
            assert "at most 7 prompt tokens are possible" in response.json()["message"]
            response = await http.post(URL, json=body | {"prompt": [5] * 9})
            assert "is longer than the model's context length" in response.json()["message"]

    run(main)
