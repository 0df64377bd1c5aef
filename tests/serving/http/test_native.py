"""POST /generate: the shape of answers and events, batches, log probabilities, wrong bodies."""

import asyncio
import itertools
import json

import pytest

from serving.config import parse_args
from serving.grammar import GrammarCompiler
from serving.http.native_protocol import (
    NATIVE_NOT_SERVED_YET,
    SAMPLING_NOT_SERVED_YET,
    GenerateBody,
    SamplingBody,
)
from tests.fakes import FakeEngine, answer, scripted
from tests.serving.http.support import TOKENIZER, events_of, run, serving

pytestmark = pytest.mark.timeout(30)


async def post(http, params=None, **body):
    if params is not None:
        body["sampling_params"] = params
    return await http.post("/generate", json=body)


def test_one_prompt_is_one_object():
    async def main():
        async with serving() as (http, _, engine):
            response = await post(
                http, {"max_new_tokens": 4}, input_ids=[5, 6], rid="mine", routed_dp_rank=1
            )
            told = response.json()
            tokens = answer([5, 6], 4)
            assert response.status_code == 200
            assert told["output_ids"] == tokens
            assert told["text"] == TOKENIZER.decode(tokens)
            meta = told["meta_info"]
            assert 0 <= meta.pop("e2e_latency") < 20
            assert meta == {
                "id": "mine",
                "finish_reason": {"type": "length", "length": 4},
                "prompt_tokens": 2,
                "completion_tokens": 4,
                "cached_tokens": 0,
                "weight_version": "default",
                "dp_rank": 1,
            }
            (seen,) = engine.seen
            assert seen.prompt == (5, 6)
            assert seen.sampling.temperature == 1.0
            assert seen.sampling.logprobs is None
            again = (await post(http, {"max_new_tokens": 4}, input_ids=[5, 6])).json()
            assert again["meta_info"]["cached_tokens"] == 1
            put = await http.put("/generate", json={"input_ids": [5], "text": None})
            assert put.status_code == 200

    run(main)


def test_every_sampling_parameter_reaches_the_engine():
    async def main():
        async with serving() as (http, _, engine):
            params = {
                "max_new_tokens": 7,
                "min_new_tokens": 2,
                "temperature": 0.5,
                "top_p": 0.9,
                "top_k": 3,
                "min_p": 0.1,
                "presence_penalty": 0.25,
                "frequency_penalty": -0.5,
                "repetition_penalty": 1.5,
                "logit_bias": {"9": 4},
                "stop_token_ids": [77],
                "ignore_eos": True,
                "sampling_seed": 12,
                "spaces_between_special_tokens": True,
            }
            body = {"priority": 3, "cache_salt": "s", "extra_key": "e"}
            assert (await post(http, params, text="hello", **body)).status_code == 200
            (seen,) = engine.seen
            assert seen.prompt == tuple(TOKENIZER.encode("hello"))
            assert seen.priority == 3
            assert seen.cache_key == '["s","e"]'
            sampling = seen.sampling
            assert (sampling.max_tokens, sampling.min_tokens, sampling.seed) == (7, 2, 12)
            assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 3)
            assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.5)
            assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
            assert sampling.logit_bias == ((9, 4.0),)
            assert sampling.stop_token_ids == (77,)
            await post(http, {"seed": 12}, input_ids=[5])
            assert engine.seen[-1].sampling.seed == 12
            assert engine.seen[-1].sampling.max_tokens == 128

    run(main)


def test_the_default_length_is_what_fits():
    async def main():
        async with serving(FakeEngine(max_context_tokens=64)) as (http, _, engine):
            told = (await post(http, {"ignore_eos": True}, input_ids=[5] * 60)).json()
            assert told["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
            response = await post(http, {"max_new_tokens": 5}, input_ids=[5] * 60)
            assert response.status_code == 400
            assert "maximum context length of 64" in response.json()["error"]["message"]
            assert len(engine.seen) == 1

    run(main)


def test_a_batch_is_a_list_with_parameters_for_each_prompt():
    async def main():
        async with serving() as (http, _, engine):
            text = TOKENIZER.decode(answer([6], 3))
            params = [{"max_new_tokens": 2}, {"max_new_tokens": 9, "stop": text[-2:]}]
            response = await post(http, params, input_ids=[[5], [6]], rid=["a", "b"])
            first, second = response.json()
            assert first["output_ids"] == answer([5], 2)
            assert second["text"] == text[:-2]
            assert second["meta_info"]["finish_reason"] == {"type": "stop", "matched": text[-2:]}
            assert [x["meta_info"]["id"] for x in (first, second)] == ["a", "b"]
            (only,) = (await post(http, {"max_new_tokens": 1}, text=["x"], rid="r")).json()
            assert only["meta_info"]["id"] == "r_0"
            assert [request.rid.split("#")[1] for request in engine.seen] == ["a.0", "b.0", "r_0.0"]

    run(main)


def test_several_answers_to_a_prompt_are_a_list():
    async def main():
        async with serving() as (http, _, engine):
            told = (await post(http, {"max_new_tokens": 1, "n": 3, "seed": 4}, text="x")).json()
            assert len(told) == 3
            assert len({request.sampling.seed for request in engine.seen}) == 3
            assert engine.seen[0].sampling.seed == 4

    run(main)


def test_stop_token_and_abort():
    async def main():
        engine = FakeEngine(next_token=scripted([20, 21, 22]))
        async with serving(engine) as (http, _state, _):
            params = {"max_new_tokens": 9, "stop_token_ids": [22]}
            told = (await post(http, params, input_ids=[5])).json()
            assert told["output_ids"] == [20, 21, 22]
            assert told["text"] == TOKENIZER.decode([20, 21])
            assert told["meta_info"]["finish_reason"] == {"type": "stop", "matched": 22}
            kept = (await post(http, params | {"no_stop_trim": True}, input_ids=[5])).json()
            assert kept["text"] == TOKENIZER.decode([20, 21, 22])
            engine.delay_s = 0.02
            slow = asyncio.create_task(post(http, {"max_new_tokens": 250}, input_ids=[5], rid="z"))
            while not any(".0" in rid and "z" in rid for rid in engine.running):
                await asyncio.sleep(0.005)
            await http.post("/abort_request", json={"rid": "z"})
            told = (await slow).json()
            assert told["meta_info"]["finish_reason"] == {"type": "abort", "message": "Aborted"}

    run(main)


def test_log_probabilities():
    async def main():
        async with serving() as (http, _, engine):
            tokens = answer([5, 6, 7], 2)
            body = {"input_ids": [5, 6, 7], "return_logprob": True, "top_logprobs_num": 2}
            meta = (await post(http, {"max_new_tokens": 2}, **body)).json()["meta_info"]
            assert meta["output_token_logprobs"] == [[-0.5, t, None] for t in tokens]
            assert meta["output_top_logprobs"][0] == [
                [-0.5, tokens[0], None],
                [-1.5, (tokens[0] + 1) % 512, None],
            ]
            assert meta["input_token_logprobs"] == meta["input_top_logprobs"] == []
            assert engine.seen[-1].prompt_logprobs is None
            body |= {"logprob_start_len": 0, "return_text_in_logprobs": True}
            meta = (await post(http, {"max_new_tokens": 2}, **body)).json()["meta_info"]
            texts = [TOKENIZER.token_bytes(i).decode(errors="replace") for i in (5, 6, 7)]
            assert meta["input_token_logprobs"] == [
                [None, 5, texts[0]],
                [-1.0, 6, texts[1]],
                [-2.0, 7, texts[2]],
            ]
            assert [top and top[0][1] for top in meta["input_top_logprobs"]] == [None, 6, 7]
            assert engine.seen[-1].prompt_logprobs == 2
            body |= {"logprob_start_len": 2, "top_logprobs_num": 0}
            meta = (await post(http, {"max_new_tokens": 2}, **body)).json()["meta_info"]
            assert meta["input_token_logprobs"] == [[-2.0, 7, texts[2]]]
            assert "input_top_logprobs" not in meta
            body["logprob_start_len"] = 3
            meta = (await post(http, {"max_new_tokens": 2}, **body)).json()["meta_info"]
            assert meta["input_token_logprobs"] == []

    run(main)


def test_scores_only():
    async def main():
        async with serving() as (http, _, engine):
            body = {"input_ids": [5, 6], "return_logprob": True, "logprob_start_len": 0}
            told = (await post(http, {"max_new_tokens": 0}, **body)).json()
            assert (told["text"], told["output_ids"]) == ("", [])
            meta = told["meta_info"]
            assert meta["input_token_logprobs"] == [[None, 5, None], [-1.0, 6, None]]
            assert meta["output_token_logprobs"] == []
            assert meta["finish_reason"] == {"type": "length", "length": 0}
            assert meta["completion_tokens"] == 0
            assert engine.seen[-1].sampling.max_tokens == 1

    run(main)


def test_log_probabilities_of_some_prompts():
    async def main():
        async with serving() as (http, _, engine):
            body = {"input_ids": [[5, 6], [5, 6]], "return_logprob": [True, False]}
            body |= {"logprob_start_len": [0, -1], "top_logprobs_num": [1, 0]}
            first, second = (await post(http, {"max_new_tokens": 1}, **body)).json()
            assert len(first["meta_info"]["input_top_logprobs"]) == 2
            assert "output_token_logprobs" not in second["meta_info"]
            assert [request.prompt_logprobs for request in engine.seen] == [1, None]

    run(main)


def test_a_stream_tells_the_answer_so_far():
    async def main():
        async with serving() as (http, _, _engine):
            body = {"input_ids": [5], "stream": True, "return_logprob": True}
            response = await post(http, {"max_new_tokens": 6}, **body)
            assert response.headers["content-type"].startswith("text/event-stream")
            *events, done = events_of(response.text)
            assert done == "[DONE]"
            told = [json.loads(event) for event in events]
            whole = (await post(http, {"max_new_tokens": 6}, input_ids=[5])).json()
            for before, after in itertools.pairwise(told):
                assert after["text"].startswith(before["text"])
                num = len(before["output_ids"])
                assert after["output_ids"][:num] == before["output_ids"]
                assert before["meta_info"]["finish_reason"] is None
                assert "e2e_latency" not in before["meta_info"]
                assert len(before["meta_info"]["output_token_logprobs"]) == num
            last = told[-1]
            assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
            assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
            assert len(told) > 2
            assert not any("index" in event for event in told)

    run(main)


def test_a_stream_of_new_pieces_only():
    config = parse_args(["--served-model-name", "tiny", "--incremental-streaming-output"])

    async def main():
        async with serving(config=config) as (http, _, _engine):
            body = {"input_ids": [5, 6], "return_logprob": True, "logprob_start_len": 0}
            params = {"max_new_tokens": 6}
            whole = (await post(http, params, **body)).json()
            response = await post(http, params, stream=True, **body)
            told = [json.loads(event) for event in events_of(response.text)[:-1]]
            assert len(told) > 2
            assert "".join(event["text"] for event in told) == whole["text"]
            for name in ("input_token_logprobs", "output_token_logprobs"):
                joined = [one for event in told for one in event["meta_info"][name]]
                assert joined == whole["meta_info"][name]
            assert [i for event in told for i in event["output_ids"]] == whole["output_ids"]
            assert told[-1]["meta_info"]["completion_tokens"] == 6
            begun = [{"token_ids": whole["output_ids"][:3]}]
            del body["return_logprob"]
            response = await post(http, params, stream=True, continue_from=begun, **body)
            told = [json.loads(event) for event in events_of(response.text)[:-1]]
            assert told[-1]["meta_info"]["completion_tokens"] == 6
            assert [i for event in told for i in event["output_ids"]] == whole["output_ids"][3:]

    run(main)


def test_events_of_a_batch_are_numbered():
    async def main():
        async with serving(FakeEngine(delay_s=0.001)) as (http, _, _engine):
            params = {"max_new_tokens": 5, "n": 2}
            response = await post(http, params, input_ids=[[5], [6]], stream=True)
            last = {}
            for event in events_of(response.text)[:-1]:
                told = json.loads(event)
                last[told["index"]] = told
            assert sorted(last) == [0, 1, 2, 3]
            assert [last[i]["output_ids"] for i in (0, 2)] == [answer([5], 5), answer([6], 5)]
            (only,) = {
                json.loads(e)["index"]
                for e in events_of(
                    (await post(http, {"max_new_tokens": 2}, text=["x"], stream=True)).text
                )[:-1]
            }
            assert only == 0

    run(main)


def test_a_stream_goes_on_where_another_broke():
    async def main():
        async with serving() as (http, _, engine):
            params = {"max_new_tokens": 6}
            whole = (await post(http, params, input_ids=[5])).json()
            begun = [{"token_ids": whole["output_ids"][:3]}]
            response = await post(http, params, input_ids=[5], stream=True, continue_from=begun)
            assert engine.seen[-1].answer == tuple(begun[0]["token_ids"])
            assert engine.seen[-1].prompt == (5,)
            assert response.status_code == 200
            refused = await post(
                http, params, input_ids=[[5], [6]], stream=True, continue_from=begun
            )
            assert "for each of the 2 answers, got 1" in refused.json()["error"]["message"]

    run(main)


def test_a_stream_with_nothing_left_to_tell():
    async def main():
        async with serving() as (http, _, engine):
            begun = [{"token_ids": [20, 21], "finished": True}]
            body = {"stream": True, "continue_from": begun}
            for path, prompt in (("/generate", "input_ids"), ("/v1/completions", "prompt")):
                response = await http.post(path, json=body | {prompt: [5]})
                assert (response.status_code, response.text) == (200, "data: [DONE]\n\n")
            assert engine.seen == []

    run(main)


def test_a_grammar_for_each_prompt():
    async def main():
        async with serving(grammars=GrammarCompiler(lambda: TOKENIZER)) as (http, _, engine):
            params = [{"regex": "a+"}, {"json_schema": '{"type": "object"}'}, {}]
            response = await post(http, params, text=["x", "y", "z"])
            assert response.status_code == 200
            grammars = [request.sampling.grammar for request in engine.seen]
            assert [g and g.kind for g in grammars] == ["regex", "json_schema", None]
            params[1] = {"json_schema": {"type": 5}}
            response = await post(http, params, text=["x", "y", "z"])
            assert response.status_code == 400
            assert len(engine.seen) == 3

    run(main)


def test_the_client_that_leaves_ends_all_prompts():
    async def main():
        engine = FakeEngine(delay_s=0.02)
        async with serving(engine) as (http, _, _engine):
            body = {"input_ids": [[5], [6]]}
            task = asyncio.create_task(post(http, {"max_new_tokens": 200}, **body))
            while len(engine.running) < 2:
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while engine.running:
                await asyncio.sleep(0.005)
            assert len(engine.aborted) == 2

    run(main)


def test_an_error_on_the_way():
    async def main():
        engine = FakeEngine(error_at=2, error_status=503, error_message="Full.")
        async with serving(engine) as (http, _, _engine):
            response = await post(http, input_ids=[5])
            assert response.status_code == 503
            assert response.json()["error"]["message"] == "Full."
            *_, error, done = events_of((await post(http, input_ids=[5], stream=True)).text)
            assert json.loads(error)["error"]["message"] == "Full."
            assert done == "[DONE]"

    run(main)


def test_grammars_are_checked_once_for_each():
    async def main():
        async with serving() as (http, _, _engine):
            response = await post(http, {"regex": "a+"}, text="x")
            assert response.status_code == 400
            assert "--grammar-backend none" in response.json()["error"]["message"]

    run(main)


WRONG = [
    ({}, "Exactly one of 'text' or 'input_ids' must be provided."),
    ({"text": "a", "input_ids": [5]}, "Exactly one of"),
    ({"text": ""}, "Prompt cannot be empty"),
    ({"text": []}, "Prompt cannot be empty"),
    ({"text": ["a", ""]}, "Prompt cannot be empty"),
    ({"input_ids": []}, "Prompt cannot be empty"),
    ({"input_ids": [[]]}, "Prompt cannot be empty"),
    ({"input_ids": [5, [6]]}, "not a mixture"),
    ({"input_ids": [512]}, "greater than the vocab size (512)"),
    ({"input_ids": [[5]] * 1025}, "at most 1024 prompts, got 1025"),
    ({"input_ids": [5] * 64}, "longer than the model's context length (64"),
    ({"text": 5}, "text: expected"),
    ({"text": "a", "sampling_params": {"max_tokens": 5}}, "unknown field `max_tokens`"),
    ({"text": "a", "sampling_params": [{}, {}]}, "sampling_params must have an entry for each"),
    ({"text": ["a", "b"], "sampling_params": [{"n": 2}, {}]}, "parallel_sample_num"),
    ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens must be at least 0"),
    ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature must be a non-negative"),
    ({"text": "a", "sampling_params": {"n": 0}}, "n must be in [1, 128]"),
    ({"text": "a", "sampling_params": {"min_new_tokens": 9, "max_new_tokens": 8}}, "min_new_tok"),
    ({"text": "a", "sampling_params": {"regex": "a", "ebnf": "b"}}, "Only one of regex"),
    ({"text": "a", "sampling_params": {"stop": ["", "a"]}}, "stop strings must have"),
    ({"text": "a", "rid": ["a", "b"]}, "rid must have an entry for each of the 1 prompts, got 2"),
    ({"text": ["a", "b"], "rid": ["a", "a"]}, "rid must be a different id"),
    ({"text": "a", "rid": ""}, "rid must have 1 to 256"),
    ({"text": "a", "top_logprobs_num": 21}, "top_logprobs_num must be in [0, 20], got 21"),
    ({"input_ids": [5], "logprob_start_len": 2}, "logprob_start_len must be -1"),
    ({"input_ids": [5], "logprob_start_len": -2}, "logprob_start_len must be -1"),
    ({"text": "a", "routed_dp_rank": 9}, "DP rank 9 is not active"),
    ({"text": "a", "priority": 2**40}, "priority must be in"),
    ({"text": "a", "stream": "yes"}, "stream: expected"),
    ({"text": "a", "continue_from": [{"token_ids": [5]}]}, "needs stream to be true"),
    (
        {"input_ids": [5], "stream": True, "return_logprob": True, "continue_from": []},
        "continue_from must have an entry",
    ),
]


def test_wrong_bodies_are_400_with_a_sentence():
    async def main():
        async with serving(FakeEngine(max_context_tokens=64)) as (http, _, engine):
            for body, sentence in WRONG:
                response = await post(http, **body)
                assert response.status_code == 400, (body, response.text)
                assert sentence in response.json()["error"]["message"], body
            assert engine.seen == []
            response = await http.post("/generate", content=b"{", headers={"content-type": "a/b"})
            assert "application/json" in response.json()["error"]["message"]

    run(main)


def test_what_is_not_served_is_refused_by_name():
    async def main():
        async with serving() as (http, _, engine):
            for name, neutral in NATIVE_NOT_SERVED_YET.items():
                wrong = True if neutral == (False,) else 5 if "rank" in name else ["x"]
                response = await post(http, text="a", **{name: wrong})
                assert f"{name} is not supported yet" in response.json()["error"]["message"]
                assert name in GenerateBody.__struct_fields__
            for name in SAMPLING_NOT_SERVED_YET:
                wrong = 5 if name == "stream_interval" else "x"
                response = await post(http, {name: wrong}, text="a")
                assert f"{name} is not supported yet" in response.json()["error"]["message"]
                assert name in SamplingBody.__struct_fields__
            assert engine.seen == []

    run(main)
