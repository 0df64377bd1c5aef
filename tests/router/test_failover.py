"""What happens to the bytes of a stream, without sockets."""

import json
import random

import pytest

from router.failover import (
    DONE,
    MAX_EVENT_BYTES,
    ContinuedStream,
    Events,
    PassedStream,
    error_event,
    usage_of,
)


def chunk(text="a", ids=(7,), *, index=0, finish=None, answer_id="one", created=1, **more):
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
    if ids is not None:
        choice["token_ids"] = list(ids)
    return event({"id": answer_id, "created": created, "model": "m", "choices": [choice], **more})


def chat(content, ids=(7,), *, role=None, index=0, answer_id="one", finish=None):
    delta = ({"role": role} if role else {}) | {"content": content}
    choice = {"index": index, "delta": delta, "finish_reason": finish, "token_ids": list(ids)}
    return event({"id": answer_id, "created": 1, "model": "m", "choices": [choice]})


def event(value):
    return (
        b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
    )


def stream_of(**fields):
    body = {"prompt": "x", "stream": True, "max_tokens": 9} | fields
    return ContinuedStream.of(json.dumps(body).encode(), seed=11)


def shown(stream, *pieces):
    return [
        json.loads(e[6:])
        for e in b"".join(map(stream.feed, pieces)).split(b"\n\n")
        if e and e != DONE[:-2]
    ]


def test_events_are_cut_at_their_ends_only():
    whole = b"data: 1\n\n: comment\n\ndata: a\r\n\r\ndata: 2\n\n"
    for seed in range(50):
        rng = random.Random(seed)
        cuts = sorted(rng.sample(range(len(whole)), 5))
        events, got = Events(), []
        for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
            got.append(events.feed(whole[start:end]))
            assert got[-1] == b"" or got[-1].endswith((b"\n\n", b"\r\n\r\n"))
        assert b"".join(got) == whole
        assert events.rest() == b""


def test_a_passed_stream_is_not_touched_and_its_usage_seen():
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    pieces = [chunk("ü", None), event({"choices": [], "usage": usage}), DONE]
    stream = PassedStream()
    assert b"".join(map(stream.feed, pieces)) == b"".join(pieces)
    assert (stream.usage.prompt_tokens, stream.usage.cached) == (5, 3)
    assert stream.usage.completion_tokens == 2
    assert stream.complete
    assert stream.num_events == 3


def test_usage_of_every_kind_of_answer():
    generate = {"text": "a", "meta_info": {"prompt_tokens": 4, "cached_tokens": 2, "id": "x"}}
    assert usage_of(json.dumps(generate).encode()).cached == 2
    assert usage_of(b'{"usage":{"prompt_tokens":4}}').cached is None
    assert usage_of(b'{"usage":null}') is None
    assert usage_of(b"[1]") is None
    assert usage_of(b"no JSON") is None


def test_a_passed_stream_without_event_ends_is_bounded():
    stream = PassedStream()
    assert stream.feed(b"x" * MAX_EVENT_BYTES) == b""
    assert len(stream.feed(b"x")) == MAX_EVENT_BYTES + 1
    assert stream.feed(b"tail") == b""
    assert stream.rest() == b"tail"


def test_what_is_added_to_the_request():
    assert stream_of().fields == {"return_token_ids": True, "seed": 11}
    assert stream_of(seed=0).fields == {"return_token_ids": True}
    assert stream_of(seed=None).fields == {"return_token_ids": True, "seed": 11}
    assert stream_of(return_token_ids=True, seed=3).fields == {}
    assert stream_of(return_token_ids=False, seed=3).fields == {"return_token_ids": True}


@pytest.mark.parametrize(
    "fields",
    [
        *({"echo": True}, {"seed": "x"}, {"n": 1.0}, {"stream_options": 1}),
        *({"continue_from": [{"token_ids": ids}]} for ids in (["a"], 5, [2**63])),
    ],
)
def test_what_cannot_go_on_elsewhere(fields):
    assert stream_of(**fields) is None


def test_token_ids_are_hidden_and_the_rest_is_byte_for_byte():
    stream = stream_of()
    given = chunk('Grüße, 世界 \\ " end', [5, 6])
    assert stream.feed(given) == given.replace(b',"token_ids":[5,6]', b"")
    assert stream.feed(chunk("b", [])) == chunk("b", None)
    asked = stream_of(return_token_ids=True)
    assert asked.feed(given) == given


@pytest.mark.parametrize(
    "text",
    [
        ',"token_ids":[1,2]',
        '"token_ids":[1]',
        '\\","token_ids":[1]',
        '\\\\","token_ids":[3]}]}',
        "token_ids",
        "data: [DONE]\n\n",
        'data: {"error": {"code": 500}}\n\n',
    ],
)
def test_a_text_cannot_look_like_the_field(text):
    stream = stream_of()
    (got,) = shown(stream, chunk(text, [4]))
    assert got["choices"][0]["text"] == text
    assert "token_ids" not in got["choices"][0]
    assert stream.fields_to_continue()["continue_from"] == [{"token_ids": [4]}]
    assert not stream.complete
    assert stream.failure is None


def test_other_ways_to_write_json_are_understood():
    stream = stream_of()
    choice = {"token_ids": [4, 5], "index": 0, "text": ',"token_ids":[1]', "finish_reason": None}
    spaced = b"data: " + json.dumps({"id": "a", "choices": [choice]}).encode() + b"\r\n\r\n"
    (got,) = shown(stream, spaced)
    assert got["choices"][0] == {"index": 0, "text": ',"token_ids":[1]', "finish_reason": None}


def test_a_name_of_a_token_among_the_logprobs_stays():
    stream = stream_of()
    choice = {
        "index": 0,
        "text": "a",
        "logprobs": {"top_logprobs": [{"token_ids": -0.5, ',"token_ids': -1.0}]},
        "token_ids": [3],
    }
    (got,) = shown(stream, event({"id": "a", "choices": [choice]}))
    assert got["choices"][0]["logprobs"] == choice["logprobs"]


def test_going_on_makes_one_stream():
    stream = stream_of(stream_options={"include_usage": True})
    first = shown(stream, chunk("a", [1]), chunk("b", [2, 3]), chunk("lost", [4])[:-9])
    assert stream.fields_to_continue() == {
        "return_token_ids": True,
        "seed": 11,
        "continue_from": [{"token_ids": [1, 2, 3]}],
    }
    usage = {"prompt_tokens": 1, "completion_tokens": 5}
    second = shown(
        stream,
        chunk("c", [4], answer_id="two", created=9),
        chunk("d", [5], finish="length", answer_id="two", created=9),
        event({"id": "two", "created": 9, "choices": [], "usage": usage}),
        DONE,
        chunk("after", [6]),
    )
    assert [c["choices"][0]["text"] for c in first + second[:2]] == ["a", "b", "c", "d"]
    assert {(c["id"], c["created"]) for c in first + second} == {("one", 1)}
    assert second[2]["usage"] == usage
    assert len(second) == 3
    assert stream.complete
    assert stream.usage.completion_tokens == 5
    assert "token_ids" not in json.dumps(first + second)


def test_going_on_several_times():
    stream = stream_of(return_token_ids=True)
    for i in range(5):
        shown(stream, chunk("x", [i], answer_id=str(i)))
        fields = stream.fields_to_continue()
    assert fields["continue_from"] == [{"token_ids": [0, 1, 2, 3, 4]}]
    (got,) = shown(stream, chunk("x", [5], answer_id="z"))
    assert got["id"] == "0"
    assert got["choices"][0]["token_ids"] == [5]


def test_every_answer_goes_on_from_its_place():
    stream = stream_of(prompt=["x", "y"], n=2)
    shown(
        stream,
        chunk("a", [1], index=2),
        chunk("b", [2], index=0),
        chunk("c", [3], index=2, finish="stop"),
    )
    assert stream.fields_to_continue()["continue_from"] == [
        {"token_ids": [2]},
        {"token_ids": []},
        {"token_ids": [1, 3], "finished": True},
        {"token_ids": []},
    ]
    assert not stream.only_done_missing


@pytest.mark.parametrize(
    ("prompt", "num"), [("x", 1), (["x", "y"], 2), ([4, 5, 6], 1), ([[4], [5, 6], [7]], 3)]
)
def test_how_many_answers_there_are(prompt, num):
    stream = stream_of(prompt=prompt, n=3)
    shown(stream, chunk("a", [1]))
    assert len(stream.fields_to_continue()["continue_from"]) == 3 * num


def test_what_the_client_itself_went_on_from_is_kept():
    stream = stream_of(continue_from=[{"token_ids": [8, 9]}])
    shown(stream, chunk("a", [1]))
    assert stream.fields_to_continue()["continue_from"] == [{"token_ids": [8, 9, 1]}]


def test_before_the_first_chunk_it_is_simply_asked_again():
    stream = stream_of()
    assert "continue_from" not in stream.fields_to_continue()
    (got,) = shown(stream, chunk("a", [1], answer_id="two"))
    assert got["id"] == "two"


def test_one_role_for_each_answer():
    stream = ContinuedStream.of(b'{"messages":[],"stream":true,"n":2}', seed=1)
    shown(stream, chat("a", [1], role="assistant"))
    stream.fields_to_continue()
    got = shown(stream, chat("b", [2], role="assistant"), chat("c", [3], role="assistant", index=1))
    assert [c["choices"][0]["delta"] for c in got] == [
        {"content": "b"},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize(("code", "broken"), [(500, True), (503, True), ("x", True), (400, False)])
def test_error_events_of_the_worker_and_of_the_request(code, broken):
    stream = stream_of()
    error = event({"error": {"message": "it hurts", "code": code}})
    assert len(shown(stream, chunk("a", [1]))) == 1
    out = stream.feed(error + DONE)
    if broken:
        assert out == b""
        assert stream.failure == "it hurts"
        assert not stream.complete
    else:
        assert out == error + DONE
        assert stream.failure is None
        assert stream.complete


@pytest.mark.parametrize("usage", [False, True])
def test_when_only_the_end_is_missing_nobody_is_asked(usage):
    stream = stream_of(n=2, stream_options={"include_usage": usage})
    shown(stream, chunk("a", [1], finish="stop"))
    assert not stream.only_done_missing
    shown(stream, chunk("a", [1], finish="length", index=1))
    assert stream.only_done_missing == (not usage)
    stream.feed(event({"choices": [], "usage": {"prompt_tokens": 1}}))
    assert stream.only_done_missing


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("router.failover.MAX_TOKENS", 10)
    stream = stream_of()
    for _ in range(10):
        shown(stream, chunk("a", [1]))
    assert stream.can_go_on
    assert len(shown(stream, chunk("a", [1]))) == 1
    assert not stream.can_go_on
    assert stream.feed(b"x" * (MAX_EVENT_BYTES + 1)) == b""
    assert "4 MiB" in stream.failure


def test_text_whose_tokens_are_not_told_cannot_go_on():
    stream = stream_of()
    shown(stream, chunk("a", [1]))
    assert stream.can_go_on
    shown(stream, chunk("b", None))
    assert not stream.can_go_on


def test_what_is_no_chunk_breaks_a_continued_stream():
    stream = stream_of()
    assert stream.feed(b": ping\n\n") == b": ping\n\n"
    assert stream.feed(b"data: {no JSON\n\n") == b""
    assert stream.failure is not None


def test_the_error_event_ends_the_stream():
    text = error_event("timeout", 504, 'it "took" long')
    first, done, rest = text.split(b"\n\n")
    assert json.loads(first[6:])["error"] == {
        "message": 'it "took" long',
        "type": "timeout",
        "code": 504,
    }
    assert (done, rest) == (b"data: [DONE]", b"")
