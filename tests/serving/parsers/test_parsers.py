"""Reasoning and tool calls: found whatever the text looks like and wherever it is cut."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.parsers.answer import AnswerParser, Piece
from serving.parsers.reasoning import REASONING_FORMATS, ReasoningParser
from serving.parsers.tool_calls import REQUIRED_CALLS, TOOL_FORMATS, infer_tool_format

WEATHER = '{"city": "Köln", "note": "a \\"b\\" }] \\\\"}'
NESTED = '{"a": {"b": [1, {"c": null}]}, "s": "</tool_call"}'
SCHEMAS = {
    "get_weather": {"properties": {"city": {"type": "string"}, "note": {"type": "string"}}},
    "f.x-1": {},
    "f": {},
}

DS = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
DS_END = "<｜tool▁calls▁end｜>"
KIMI = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"


def deepseek_v3(*calls):
    body = "\n".join(f"{DS[1]}function{DS[2]}{n}\n```json\n{a}\n```{DS[3]}" for n, a in calls)
    return DS[0] + body + DS_END


def deepseek_v31(*calls):
    return DS[0] + "".join(f"{DS[1]}{n}{DS[2]}{a}{DS[3]}" for n, a in calls) + DS_END


def kimi_k2(*calls):
    return KIMI.format(
        "".join(
            f"<|tool_call_begin|>functions.{n}:{i}<|tool_call_argument_begin|>{a}<|tool_call_end|>"
            for i, (n, a) in enumerate(calls)
        )
    )


def hermes(*calls):
    return "\n".join(
        f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls
    )


def llama3(*calls):
    return "<|python_tag|>" + "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)


def llama3_bare(*calls):
    return "".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)


def mistral(*calls):
    return (
        "[TOOL_CALLS][" + ", ".join(f'{{"name": "{n}", "arguments": {a}}}' for n, a in calls) + "]"
    )


def required(*calls):
    return "[" + ",".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls) + "]"


def glm(*calls):
    return "\n".join(
        f"<tool_call>{n}\n"
        + "\n".join(
            f"<arg_key>{k}</arg_key>\n<arg_value>{v if isinstance(v, str) else json.dumps(v)}"
            "</arg_value>"
            for k, v in json.loads(a).items()
        )
        + "\n</tool_call>"
        for n, a in calls
    )


WRITERS = {
    "deepseekv3": deepseek_v3,
    "deepseekv31": deepseek_v31,
    "kimi_k2": kimi_k2,
    "qwen": hermes,
    "llama3": llama3,
    "mistral": mistral,
    "glm45": glm,
}
CALLS = [("get_weather", WEATHER), ("f.x-1", NESTED)]


def format_of(name):
    return REQUIRED_CALLS if name == "required" else TOOL_FORMATS[name]


def parse(parser, pieces):
    """Everything a parser makes of pieces of text: (reasoning, content, calls by index)."""
    reasoning, content, calls = "", "", {}
    for piece in [*map(parser.push, pieces), parser.finish()]:
        assert isinstance(piece, Piece)
        reasoning += piece.reasoning
        content += piece.content
        for call in piece.calls:
            if call.name is not None:
                assert call.index == len(calls)
                calls[call.index] = [call.name, "", call.id]
            calls[call.index][1] += call.arguments
    return reasoning, content, [tuple(call) for call in calls.values()]


def of(name):
    return AnswerParser(tools=format_of(name).make(SCHEMAS))


def every_cut(text):
    yield [text]
    yield list(text)
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]


def names_and_arguments(calls):
    return [(name, json.loads(arguments)) for name, arguments, _ in calls]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("num_calls", [1, 2])
def test_calls_are_found_wherever_the_text_is_cut(name, num_calls):
    calls = CALLS[:num_calls]
    front = "" if name == "llama3" and num_calls == 2 else "I look.\n"
    for pieces in every_cut(front + WRITERS[name](*calls)):
        _, content, found = parse(of(name), pieces)
        assert names_and_arguments(found) == [(n, json.loads(a)) for n, a in calls], pieces
        assert content == front.rstrip(), pieces
        if name != "glm45":
            assert [arguments for _, arguments, _ in found] == [a for _, a in calls]
        if name == "kimi_k2":
            assert [i for _, _, i in found] == ["functions.get_weather:0", "functions.f.x-1:1"][
                :num_calls
            ]


@pytest.mark.parametrize("text", [required(*CALLS), llama3_bare(CALLS[1]), "\n" + required(*CALLS)])
@pytest.mark.parametrize("name", ["required", "llama3"])
def test_an_answer_that_is_nothing_but_calls(name, text):
    for pieces in every_cut(text):
        _, content, found = parse(of(name), pieces)
        assert content == ""
        assert found[-1][:2] == CALLS[1]


@pytest.mark.parametrize("name", [*WRITERS, "required"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain text\n",
        "a < b <tool and <| and ｜> [TOOL",
        "<tool_call>",
        "<tool_call>not json</tool_call> behind",
        '<tool_call>{"no_name": 1}</tool_call>!',
        f"{DS[0]}nonsense{DS_END}",
        f"{DS[0]}{DS[1]}{DS[3]}{DS_END} behind",
        f"{DS[1]}function",
        "<|tool_call_begin|>???<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "[TOOL_CALLS] nothing",
        "<|python_tag|>print(1)",
    ],
)
def test_what_is_no_call_stays_text(name, text):
    for pieces in every_cut(text) if text else [[""], []]:
        _, content, calls = parse(of(name), pieces)
        assert calls == []
        assert content == text


@pytest.mark.parametrize("name", WRITERS)
def test_a_call_that_is_cut_off_ends_where_it_is(name):
    """max_tokens may end an answer anywhere: never an exception, and what was told stays told."""
    whole = WRITERS[name](("get_weather", '{"a": 1, "b": [2, 3]}'))
    for end in range(len(whole)):
        _, content, calls = parse(of(name), [whole[:end]])
        assert len(calls) <= 1
        for called, arguments, _ in calls:
            assert called == "get_weather"
            assert '{"a": 1, "b": [2, 3]}'.startswith(arguments)
        if not calls and end:
            assert content.strip() == whole[:end].strip() or name in ("qwen", "mistral", "llama3")


def test_arguments_before_the_name_and_in_a_string():
    text = '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>'
    for pieces in every_cut(text):
        assert parse(of("qwen"), pieces)[2] == [("f", '{"x": 1}', None)]
    text = '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>'
    for pieces in every_cut(text):
        assert parse(of("qwen"), pieces)[2] == [("f", '{"x": 1}', None)]
    for text in ('{"name": "f"}', '{"name": "f", "parameters": {}}'):
        assert parse(of("llama3"), list(text))[2] == [("f", "{}", None)]


def test_arguments_stream():
    """Clients show them while they grow."""
    for name, write in WRITERS.items():
        if name == "glm45":
            continue
        parser = of(name)
        pieces = [parser.push(char) for char in write(("f", '{"text": "abcdefghij"}'))]
        grown = [c.arguments for piece in pieces for c in piece.calls if c.arguments]
        assert len(grown) > 10, name


@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_reasoning_is_separated_wherever_the_text_is_cut(name):
    form = REASONING_FORMATS[name]
    start, end = form.start, form.end
    texts = [
        (f"{start}\nI think {start} so. \n{end}\n\nYes. ", f"I think {start} so.", "Yes. ", False),
        (f"I think < so.\n{end}Yes", "I think < so.", "Yes", True),
        (f"{start}{end}Yes", "", "Yes", False),
        (f"{start} endless", "endless", "", False),
    ]
    if not form.always:
        texts += [("No thinking", "", "No thinking", False), ("<thin", "", "<thin", False)]
    else:
        texts += [(f"So. {end} Yes", "So.", "Yes", False)]
    for text, reasoning, content, opened in texts:
        for pieces in every_cut(text):
            parser = AnswerParser(ReasoningParser(form, "opened" if opened else "free"))
            assert parse(parser, pieces) == (reasoning, content, []), pieces


def test_whole_reasoning_comes_in_one_piece():
    parser = AnswerParser(
        ReasoningParser(REASONING_FORMATS["qwen3"], "opened"), whole_reasoning=True
    )
    pieces = [parser.push(char) for char in "long thoughts</think>\nYes"]
    assert [p.reasoning for p in pieces if p.reasoning] == ["long thoughts"]
    assert "".join(p.content for p in pieces) == "Yes"
    parser = AnswerParser(
        ReasoningParser(REASONING_FORMATS["qwen3"], "opened"), whole_reasoning=True
    )
    assert parser.push("endless").reasoning == ""
    assert parser.finish().reasoning == "endless"


FRAGMENTS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"),
        *(*DS, DS_END, "```json", "\n```", "```", "function", "get_weather", "\n", " ", "; ", ","),
        *('{"name": "f", ', '"arguments": ', '{"x": 1}', "}", "{", "[", "]", '"', "\\", "<", "｜"),
        *("<|tool_call_begin|>", "functions.f:0", "<|tool_call_argument_begin|>", "<arg_key>k"),
        *("</arg_key>", "<arg_value>v</arg_value>", "<|tool_call_end|>", "text", "é", "<tool"),
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS, max_size=14), st.integers(0, 2**32))
def test_any_text_parses_the_same_however_it_is_cut(fragments, seed):
    text, rng = "".join(fragments), random.Random(seed)
    cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randrange(1, 12))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for name in (*WRITERS, "required"):
        for reasoning in (None, "qwen3", "deepseek-r1"):
            form = REASONING_FORMATS.get(reasoning)

            def make(name=name, form=form):
                thinking = None if form is None else ReasoningParser(form)
                return AnswerParser(thinking, format_of(name).make(SCHEMAS))

            assert parse(make(), pieces) == parse(make(), [text])


def test_the_format_is_inferred_from_the_template():
    assert infer_tool_format("x <tool_call> y") == "qwen"
    assert infer_tool_format("<tool_call><arg_key>") == "glm45"
    assert infer_tool_format("<｜tool▁call▁begin｜>```json") == "deepseekv3"
    assert infer_tool_format("<｜tool▁call▁begin｜>") == "deepseekv31"
    assert infer_tool_format("nothing") is None
