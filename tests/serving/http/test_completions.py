"""/v1/completions: prompts in every form, text and tokens out, streamed or not."""

import asyncio
import json

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.http.sampling import SamplingDefaults
from tests.fakes import FakeEngine, answer, scripted
from tests.serving.http.support import TOKENIZER, events_of, run, serving

pytestmark = pytest.mark.timeout(30)

URL = "/v1/completions"
EOS = 1


def tokens(text):
    return TOKENIZER._fast.encode(text, add_special_tokens=False).ids


async def post(http, **body):
    response = await http.post(URL, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def post_stream(http, **body):
    response = await http.post(URL, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def test_text_prompt_gets_its_bos_and_the_default_length():
    async def main():
        async with serving() as (http, _, engine):
            got = await post(http, model="any", prompt="The old man said")
            prompt = TOKENIZER.encode("The old man said")
            assert engine.seen[0].prompt == tuple(prompt)
            assert prompt[0] == 0
            expected = answer(prompt, 16)
            assert got["choices"] == [
                {
                    "index": 0,
                    "text": TOKENIZER.decode(expected),
                    "logprobs": None,
                    "finish_reason": "length",
                    "matched_stop": None,
                }
            ]
            assert got["object"] == "text_completion"
            assert got["model"] == "any"
            assert got["id"].startswith("cmpl-")
            assert got["usage"] == {
                "prompt_tokens": len(prompt),
                "completion_tokens": 16,
                "total_tokens": len(prompt) + 16,
                "prompt_tokens_details": {"cached_tokens": 0},
            }

    run(main)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7], [8, 9, 10]], [[5, 6], [7], [8, 9, 10]]),
        (["The", "old"], [TOKENIZER.encode("The"), TOKENIZER.encode("old")]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_in_every_form(prompt, ids, stream):
    async def main():
        async with serving() as (http, _, _engine):
            texts = [""] * len(ids)
            if stream:
                options = {"include_usage": True}
                *chunks, usage = await post_stream(
                    http, prompt=prompt, max_tokens=9, stream_options=options
                )
                for chunk in chunks:
                    assert chunk["usage"] is None
                    texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
                assert usage["choices"] == []
                ends = [c["choices"][0]["finish_reason"] for c in chunks]
                assert [end for end in ends if end] == ["length"] * len(ids)
            else:
                usage = await post(http, prompt=prompt, max_tokens=9)
                texts = [choice["text"] for choice in usage["choices"]]
            assert texts == [TOKENIZER.decode(answer(i, 9)) for i in ids]
            assert usage["usage"]["prompt_tokens"] == sum(map(len, ids))
            assert usage["usage"]["completion_tokens"] == 9 * len(ids)

    run(main)


def test_sampling_fields_reach_the_engine():
    async def main():
        async with serving() as (http, _, engine):
            await post(
                http,
                prompt=[5],
                max_tokens=3,
                temperature=0.5,
                top_p=0.25,
                top_k=7,
                seed=(1 << 31) + 5,
                stop_token_ids=[9, 9, 8],
                logprobs=2,
                user="me",
                n=1,
                unheard_of={"a": 1},
            )
            sampling = engine.seen[0].sampling
            assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
            assert (sampling.seed, sampling.logprobs, sampling.max_tokens) == (5, 2, 3)
            assert sampling.stop_token_ids == (1, 8, 9)
            await post(http, prompt=[5], ignore_eos=True, seed=-1, top_k=100000)
            sampling = engine.seen[1].sampling
            assert sampling.stop_token_ids == ()
            assert 0 <= sampling.seed < 1 << 31
            assert sampling.top_k == -1

    run(main)


def test_null_is_the_default_and_neutral_values_are_accepted():
    async def main():
        async with serving() as (http, _, engine):
            neutral = {
                "n": 1,
                "best_of": 1,
                "echo": False,
                "suffix": None,
                "presence_penalty": 0.0,
                "frequency_penalty": 0,
                "repetition_penalty": 1.0,
                "min_p": 0,
                "min_tokens": 0,
                "logit_bias": {},
                "skip_special_tokens": True,
                "response_format": {"type": "text"},
                "stop": None,
                "max_tokens": None,
                "temperature": None,
                "logprobs": None,
                "stream": None,
                "regex": None,
            }
            await post(http, prompt=[5], **neutral)
            assert engine.seen[0].sampling.max_tokens == 16
            assert engine.seen[0].sampling.temperature == 1.0

    run(main)


def test_defaults_come_from_the_model_where_it_gives_them():
    async def main():
        async with serving(defaults=SamplingDefaults(temperature=0.6, top_k=20)) as made:
            http, _, engine = made
            await post(http, prompt=[5])
            await post(http, prompt=[5], temperature=0, top_k=-1)
            sampled = [(r.sampling.temperature, r.sampling.top_k) for r in engine.seen]
            assert sampled == [(0.6, 20), (0.0, -1)]
            assert engine.seen[1].sampling.greedy

    run(main)


def test_generation_config(tmp_path):
    path = tmp_path / "generation_config.json"
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults()
    path.write_text('{"do_sample": false, "top_k": 0, "temperature": null}')
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults()
    path.write_text('{"do_sample": true, "top_k": 20, "top_p": 0.95, "temperature": 0.6}')
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults(
        temperature=0.6, top_p=0.95, top_k=20
    )
    for broken in ('{"top_p": 2}', '{"temperature": "hot"}', '{"top_k": 1.5}'):
        path.write_text(broken)
        with pytest.raises(ValueError, match="generation_config"):
            SamplingDefaults.from_folder(tmp_path)


def test_seeds_are_drawn_by_the_front_and_repeat_with_its_seed():
    async def main():
        drawn = []
        for _ in range(2):
            async with serving() as (http, _, engine):
                await post(http, prompt=[[5], [6]])
                drawn.append([request.sampling.seed for request in engine.seen])
        assert drawn[0] == drawn[1]
        assert drawn[0][0] != drawn[0][1]

    run(main)


def test_eos_ends_the_answer_without_its_text():
    async def main():
        script = [*tokens(" old man"), EOS, *tokens(" never")]
        async with serving(FakeEngine(next_token=scripted(script, 1))) as (http, _, engine):
            got = await post(http, prompt=[5], max_tokens=20)
            choice = got["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == (" old man", "stop")
            assert choice["matched_stop"] == EOS
            assert got["usage"]["completion_tokens"] == len(tokens(" old man")) + 1
            got = await post(http, prompt=[5], max_tokens=20, ignore_eos=True)
            assert " never" in got["choices"][0]["text"]
            assert engine.aborted == []

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_borders_cuts_and_finishes(stream):
    async def main():
        text = "Once upon a time there was"
        fake = FakeEngine(next_token=scripted(tokens(text), 1), delay_s=0.001)
        async with serving(fake) as (http, _, engine):
            body = {"prompt": [5], "max_tokens": 200, "stop": ["zebra", "me the"]}
            if stream:
                chunks = await post_stream(http, **body)
                choices = [chunk["choices"][0] for chunk in chunks]
                got = "".join(choice["text"] for choice in choices)
                last = choices[-1]
            else:
                last = (await post(http, **body))["choices"][0]
                got = last["text"]
            assert got == "Once upon a ti"
            assert (last["finish_reason"], last["matched_stop"]) == ("stop", "me the")
            while not engine.finished:
                await asyncio.sleep(0.005)
            assert not engine.running

    run(main)


def test_text_held_back_for_a_stop_string_comes_at_the_end():
    async def main():
        fake = FakeEngine(next_token=scripted(tokens("waiting E"), 1))
        async with serving(fake) as (http, _, _engine):
            num = len(tokens("waiting E"))
            got = await post(http, prompt=[5], max_tokens=num, stop="END")
            assert got["choices"][0]["text"] == "waiting E"
            assert got["choices"][0]["finish_reason"] == "length"

    run(main)


def test_half_a_character_at_the_end_is_a_replacement_character():
    async def main():
        halves = tokens("猫")
        assert len(halves) > 1
        async with serving(FakeEngine(next_token=scripted(halves, 1))) as (http, _, _engine):
            got = await post(http, prompt=[5], max_tokens=len(halves) + 1)
            assert got["choices"][0]["text"] == "猫\N{REPLACEMENT CHARACTER}"
            chunks = await post_stream(http, prompt=[5], max_tokens=len(halves) + 1)
            assert [c["choices"][0]["text"] for c in chunks] == [
                "猫",
                "\N{REPLACEMENT CHARACTER}",
            ]

    run(main)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(2, 511), min_size=1, max_size=40),
    stops=st.lists(st.sampled_from(["e", " t", "the", "a m", "é", "�"]), max_size=2),
)
def test_streamed_text_equals_unstreamed_text(ids, stops):
    async def main():
        async with serving(FakeEngine(next_token=scripted(ids, 1))) as (http, _, _engine):
            body = {"prompt": [5], "max_tokens": len(ids), "stop": stops}
            whole = (await post(http, **body))["choices"][0]
            chunks = await post_stream(http, **body)
            choices = [chunk["choices"][0] for chunk in chunks]
            assert "".join(choice["text"] for choice in choices) == whole["text"]
            assert choices[-1]["finish_reason"] == whole["finish_reason"]
            assert choices[-1]["matched_stop"] == whole["matched_stop"]
            if not stops:
                assert whole["text"] == TOKENIZER.decode(ids)

    run(main)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream):
    async def main():
        script = [*tokens("old 猫"), EOS]
        async with serving(FakeEngine(next_token=scripted(script, 1))) as (http, _, _engine):
            body = {"prompt": [5], "max_tokens": 30, "logprobs": 2}
            parts = await post_stream(http, **body) if stream else [await post(http, **body)]
            choices = [part["choices"][0] for part in parts]
            merged = {
                key: [item for choice in choices for item in choice["logprobs"][key]]
                for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            }
            assert len(merged["tokens"]) == len(script)
            assert merged["token_logprobs"] == [-0.5] * len(script)
            assert all(len(top) == 2 for top in merged["top_logprobs"])
            assert merged["tokens"][-1] == "<｜end▁of▁sentence｜>"
            assert any(name.startswith("bytes:\\x") for name in merged["tokens"])
            text = "".join(choice["text"] for choice in choices)
            assert text == "old 猫"
            assert merged["text_offset"][0] == 0
            assert merged["text_offset"][-1] == len(text)

    run(main)


def test_logprobs_0_reports_the_sampled_token_only():
    async def main():
        async with serving() as (http, _, _engine):
            got = (await post(http, prompt=[5], max_tokens=2, logprobs=0))["choices"][0]
            assert got["logprobs"]["token_logprobs"] == [-0.5, -0.5]
            assert got["logprobs"]["top_logprobs"] is None

    run(main)


def test_request_ids():
    async def main():
        async with serving(FakeEngine(delay_s=0.01)) as (http, _, engine):
            first = asyncio.create_task(http.post(URL, json={"prompt": [5], "rid": "mine"}))
            while not engine.running:
                await asyncio.sleep(0.005)
            second = await http.post(URL, json={"prompt": [5], "rid": "mine"})
            assert second.status_code == 400
            assert "'mine'" in second.json()["message"]
            assert (await first).json()["id"] == "mine"
            assert (await http.post(URL, json={"prompt": [5], "rid": "mine"})).is_success
            assert len({request.rid for request in engine.seen}) == 2

            headers = {"x-request-id": "trace"}
            both = await asyncio.gather(
                *(http.post(URL, json={"prompt": [5]}, headers=headers) for _ in range(2))
            )
            ids = {response.json()["id"] for response in both}
            assert "trace" in ids
            assert len(ids) == 2

    run(main)


def test_engine_errors_before_the_first_byte_are_statuses_and_later_ones_events():
    async def main():
        for stream in (False, True):
            async with serving(FakeEngine(error_at=0)) as (http, _, _engine):
                response = await http.post(URL, json={"prompt": [5], "stream": stream})
                assert response.status_code == 500
                assert response.json()["message"] == "The fake engine has had it."
        async with serving(FakeEngine(error_at=4)) as (http, state, _engine):
            response = await http.post(URL, json={"prompt": [5], "stream": True})
            assert response.status_code == 200
            *_, error, done = events_of(response.text)
            assert done == "[DONE]"
            assert json.loads(error)["error"]["message"] == "The fake engine has had it."
            assert json.loads(error)["error"]["code"] == 500
            assert state.engine.num_open == 0

    run(main)


def test_a_dead_engine_is_503():
    async def main():
        async with serving(FakeEngine(delay_s=0.01, die_after_steps=3)) as (http, _, _engine):
            streamed = await http.post(URL, json={"prompt": [5], "stream": True})
            assert streamed.status_code == 200
            assert json.loads(events_of(streamed.text)[-2])["error"]["code"] == 503
            for stream in (False, True):
                refused = await http.post(URL, json={"prompt": [5], "stream": stream})
                assert refused.status_code == 503
            assert (await http.get("/health")).status_code == 503
            assert (await http.get("/get_server_info")).status_code == 503

    run(main)


def test_one_failing_prompt_of_several_ends_all():
    async def main():
        async with serving(FakeEngine(error_at=2, delay_s=0.002)) as (http, state, engine):
            response = await http.post(URL, json={"prompt": [[5], [6, 7]], "max_tokens": 50})
            assert response.status_code == 500
            await asyncio.sleep(0.02)
            assert state.engine.num_open == 0
            assert not engine.running

    run(main)


def test_openai_client():
    async def main():
        async with serving() as (http, _, _engine):
            client = openai.AsyncOpenAI(
                api_key="none", base_url="http://test/v1", http_client=http, max_retries=0
            )
            prompt = TOKENIZER.encode("The old man")
            text = TOKENIZER.decode(answer(prompt, 8))
            got = await client.completions.create(
                model="tiny", prompt="The old man", max_tokens=8, logprobs=1, seed=3
            )
            assert got.choices[0].text == text
            assert len(got.choices[0].logprobs.tokens) == 8
            stream = await client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].text for c in chunks[:-1]) == text
            assert chunks[-1].usage.completion_tokens == 8
            with pytest.raises(openai.BadRequestError, match="temperature must be"):
                await client.completions.create(model="tiny", prompt="x", temperature=-1)

    run(main)


def test_special_tokens_are_shown_on_request():
    ids = [*tokens(" one"), EOS, *tokens(" two")]

    async def main():
        async with serving(FakeEngine(next_token=scripted(ids))) as (http, _, _):
            for skip in (None, True, False):
                got = await post(
                    http,
                    prompt=[5],
                    max_tokens=len(ids),
                    ignore_eos=True,
                    skip_special_tokens=skip,
                )
                text = got["choices"][0]["text"]
                assert text == TOKENIZER.decode(ids, skip_special_tokens=skip is not False)
                assert (text == " one two") is (skip is not False)

    run(main)
