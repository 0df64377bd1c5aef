"""Fields that shape how tokens are drawn: they reach the engine as they were meant."""

import asyncio
import json

import openai
import pytest

from serving.http import calls
from serving.http.sampling import SamplingDefaults
from tests.fakes import FakeEngine, answer, scripted
from tests.serving.http.support import TOKENIZER, events_of, run, serving

pytestmark = pytest.mark.timeout(30)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
BODIES = [(COMPLETIONS, {"prompt": [5, 6]}), (CHAT, {"messages": HELLO})]
EOS = 1


def tokens(text):
    return TOKENIZER._fast.encode(text, add_special_tokens=False).ids


async def post(http, url, **body):
    response = await http.post(url, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def post_stream(http, url, **body):
    response = await http.post(url, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


@pytest.mark.parametrize(("url", "body"), BODIES)
def test_penalties_biases_and_limits_reach_the_engine(url, body):
    async def main():
        async with serving() as (http, _, engine):
            await post(
                http,
                url,
                **body,
                max_tokens=9,
                min_p=0.25,
                presence_penalty=-2,
                frequency_penalty=1.5,
                repetition_penalty=1.25,
                logit_bias={"7": -100, "300": 2.5, "8": 0},
                min_tokens=9,
                stop_token_ids=[40],
            )
            sampling = engine.seen[0].sampling
            assert sampling.min_p == 0.25
            assert sampling.presence_penalty == -2
            assert sampling.frequency_penalty == 1.5
            assert sampling.repetition_penalty == 1.25
            assert sampling.logit_bias == ((7, -100.0), (300, 2.5))
            assert sampling.min_tokens == 9
            assert sampling.stop_token_ids == (EOS, 40)

    run(main)


def test_as_many_stops_and_biases_as_the_engine_has_room_for():
    async def main():
        async with serving() as (http, _, engine):
            biases = {str(i): 1 for i in range(512)}
            await post(
                http, COMPLETIONS, prompt=[5], logit_bias=biases, stop_token_ids=[*range(128)] * 2
            )
            sampling = engine.seen[0].sampling
            assert sampling.stop_token_ids == tuple(range(128))
            assert len(sampling.logit_bias) == 512

    run(main)


def test_defaults_of_the_model_are_min_p_and_repetition_penalty_too(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text('{"repetition_penalty": 1.05, "min_p": 0.1, "presence_penalty": 1.0}')
    defaults = SamplingDefaults.from_folder(tmp_path)
    assert defaults == SamplingDefaults(repetition_penalty=1.05, min_p=0.1)
    path.write_text('{"repetition_penalty": 3}')
    with pytest.raises(ValueError, match="repetition_penalty must be in"):
        SamplingDefaults.from_folder(tmp_path)

    async def main():
        async with serving(defaults=defaults) as (http, _, engine):
            await post(http, COMPLETIONS, prompt=[5])
            await post(http, COMPLETIONS, prompt=[5], min_p=0, repetition_penalty=1)
            seen = [(r.sampling.min_p, r.sampling.repetition_penalty) for r in engine.seen]
            assert seen == [(0.1, 1.05), (0, 1)]
            assert engine.seen[0].sampling.presence_penalty == 0

    run(main)


def test_samples_differ_in_their_seeds_and_the_first_keeps_it():
    async def main():
        async with serving() as (http, _, engine):
            await post(http, COMPLETIONS, prompt=[5], seed=7, n=4)
            await post(http, COMPLETIONS, prompt=[5], seed=7, n=2)
            await post(http, COMPLETIONS, prompt=[5], seed=7)
            await post(http, COMPLETIONS, prompt=[5], seed=8, n=2)
            four, two, one, other = (
                [r.sampling.seed for r in engine.seen[slice(*ends)]]
                for ends in ((0, 4), (4, 6), (6, 7), (7, 9))
            )
            assert one == [7]
            assert four[:2] == two
            assert len(set(four + other)) == 6
            assert all(0 <= seed < 1 << 31 for seed in four)
            assert len({r.prompt for r in engine.seen}) == 1

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_to_each_of_several_prompts(stream):
    """Choices are numbered prompt * n + sample; every prompt counts once in the usage."""

    async def main():
        async with serving() as (http, state, engine):
            prompts = [[5, 6], [7, 8, 9]]
            body = {"prompt": prompts, "n": 3, "best_of": 3, "max_tokens": 4}
            if stream:
                options = {"include_usage": True}
                *chunks, last = await post_stream(http, COMPLETIONS, **body, stream_options=options)
                texts = [""] * 6
                for chunk in chunks:
                    texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
                usage = last["usage"]
            else:
                got = await post(http, COMPLETIONS, **body)
                assert [choice["index"] for choice in got["choices"]] == list(range(6))
                texts, usage = [choice["text"] for choice in got["choices"]], got["usage"]
            expected = [TOKENIZER.decode(answer(prompt, 4)) for prompt in prompts]
            assert texts == [expected[0]] * 3 + [expected[1]] * 3
            assert usage["prompt_tokens"] == 5
            assert usage["completion_tokens"] == 24
            assert usage["total_tokens"] == 29
            assert len(engine.seen) == 6
            assert len({request.rid for request in engine.seen}) == 6
            assert state.engine.num_open == 0

    run(main)


def test_n_with_the_openai_client():
    async def main():
        async with serving() as (http, _, _engine):
            client = openai.AsyncOpenAI(
                api_key="none", base_url="http://test/v1", http_client=http, max_retries=0
            )
            got = await client.chat.completions.create(
                model="tiny", messages=HELLO, n=2, max_tokens=5, logprobs=True
            )
            text = TOKENIZER.decode(answer(TOKENIZER.encode_chat(HELLO), 5))
            assert [choice.message.content for choice in got.choices] == [text, text]
            assert [choice.index for choice in got.choices] == [0, 1]
            assert got.usage.completion_tokens == 10
            assert got.usage.prompt_tokens_details.cached_tokens == 0
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO, n=2, max_tokens=5, stream=True
            )
            texts = ["", ""]
            async for chunk in stream:
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            assert texts == [text, text]

    run(main)


def test_cached_tokens_are_those_of_the_first_sample_of_each_prompt():
    async def main():
        async with serving() as (http, _, _engine):
            body = {"prompt": [[5, 6, 7], [8, 9]], "n": 2, "max_tokens": 2}
            options = {"include_usage": True}
            # The fake finds a prompt in its cache once it has run: second samples of a prompt do.
            for cached in (0, 2 + 1):
                got = await post(http, COMPLETIONS, **body)
                assert got["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
            *_, last = await post_stream(http, COMPLETIONS, **body, stream_options=options)
            assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
            num = len(TOKENIZER.encode_chat(HELLO)) - 1
            for cached in (0, num):
                got = await post(http, CHAT, messages=HELLO)
                assert got["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
            *_, last = await post_stream(http, CHAT, messages=HELLO, stream_options=options)
            assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": num}

    run(main)


@pytest.mark.parametrize(("url", "body"), BODIES)
def test_continuous_usage_stats(url, body):
    """Every chunk tells what its own answer has taken so far."""

    async def main():
        async with serving() as (http, _, _engine):
            options = {"continuous_usage_stats": True}
            chunks = await post_stream(http, url, **body, n=2, max_tokens=6, stream_options=options)
            num_prompt = 2 if url == COMPLETIONS else len(TOKENIZER.encode_chat(HELLO))
            for index in (0, 1):
                usages = [c["usage"] for c in chunks if c["choices"][0]["index"] == index]
                counts = [usage["completion_tokens"] for usage in usages]
                assert counts == sorted(counts)
                assert counts[-1] == 6
                assert counts[0] == 1
                assert {usage["prompt_tokens"] for usage in usages} == {num_prompt}
                assert [u["total_tokens"] - num_prompt for u in usages] == counts
                assert {"cached_tokens"} == set(usages[0]["prompt_tokens_details"])
            chunks = await post_stream(http, url, **body, max_tokens=6)
            assert {json.dumps(chunk["usage"]) for chunk in chunks} == {"null"}

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_no_stop_trim_keeps_what_ended_the_answer(stream):
    async def main():
        text = "Once upon a time there was"
        fake = FakeEngine(next_token=scripted(tokens(text), 1))
        async with serving(fake) as (http, _, _engine):
            body = {"prompt": [5], "max_tokens": 60, "no_stop_trim": True}
            for change, expected, matched in (
                ({"stop": "me the"}, "Once upon a time the", "me the"),
                ({"stop_token_ids": tokens(" a")}, "Once upon a", tokens(" a")[0]),
            ):
                if stream:
                    chunks = await post_stream(http, COMPLETIONS, **body, **change)
                    choices = [chunk["choices"][0] for chunk in chunks]
                else:
                    choices = (await post(http, COMPLETIONS, **body, **change))["choices"]
                assert "".join(choice["text"] for choice in choices) == expected
                assert choices[-1]["finish_reason"] == "stop"
                assert choices[-1]["matched_stop"] == matched
        fake = FakeEngine(next_token=scripted([*tokens(" old"), EOS], 1))
        async with serving(fake) as (http, _, _engine):
            for skip, expected in ((True, " old"), (False, " old<｜end▁of▁sentence｜>")):
                got = await post(http, COMPLETIONS, **body, skip_special_tokens=skip)
                assert got["choices"][0]["text"] == expected

    run(main)


def test_a_client_that_leaves_ends_all_samples():
    async def main():
        async with serving(FakeEngine(hold=True)) as (http, state, engine):
            body = {"prompt": [[5], [6]], "n": 3}
            posting = asyncio.create_task(http.post(COMPLETIONS, json=body))
            while len(engine.running) < 6:
                await asyncio.sleep(0.005)
            posting.cancel()
            await asyncio.gather(posting, return_exceptions=True)
            while engine.running:
                await asyncio.sleep(0.005)
            assert len(engine.aborted) == 6
            assert state.engine.num_open == 0

    run(main)


def test_prompt_tokens_over_all_answers_are_bounded(monkeypatch):
    monkeypatch.setattr(calls, "MAX_PROMPT_TOKENS", 100)

    async def main():
        async with serving() as (http, _, engine):
            for fields, param, told in (
                ({"prompt": [5] * 51, "n": 2}, "n", "prompt has 51 tokens, with n = 2 that makes"),
                ({"prompt": [[5] * 51] * 2}, "prompt", "102 prompt tokens over all answers"),
            ):
                response = await http.post("/v1/completions", json=fields)
                assert (response.status_code, response.json()["param"]) == (400, param)
                assert told in response.json()["message"]
                assert "one request may bring 100." in response.json()["message"]
            messages = [{"role": "user", "content": "the old man " * 20}]
            body = {"messages": messages, "n": 4, "max_tokens": 1}
            response = await http.post("/v1/chat/completions", json=body)
            assert (response.status_code, response.json()["param"]) == (400, "n")
            assert "messages has" in response.json()["message"]
            assert engine.seen == []
            for fields in ({"prompt": [5] * 50, "n": 2}, {"prompt": [5] * 101}):
                assert (await http.post("/v1/completions", json=fields)).status_code == 200

    run(main)
