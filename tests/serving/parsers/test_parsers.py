"""Reasoning and tool calls: found whatever the text looks like and wherever it is cut."""

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.parsers.answer import AnswerParser, Piece
from serving.parsers.reasoning import REASONING_FORMATS, ReasoningParser, begins
from serving.parsers.tool_calls import (
    REQUIRED_CALLS,
    TOOL_FORMATS,
    call_id,
    infer_tool_format,
)

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
        f"{DS[0]}{DS_END}",
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

            whole = parse(make(), [text])
            assert parse(make(), pieces) == whole
            if form is None and not whole[2]:
                assert whole[1] == text  # nothing is lost


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    arguments=st.dictionaries(st.text(), JSON, max_size=3),
    extra=st.dictionaries(st.text(min_size=1).map("x".__add__), JSON, max_size=2),
    order=st.permutations([0, 1, 2]),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    step=st.integers(1, 40),
)
def test_arguments_are_the_text_that_the_model_wrote(
    arguments, extra, order, indent, ascii_only, step
):
    """Whatever else an object holds, in whatever order."""

    def dump(value):
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only)

    written = dump(arguments)
    name = '"name" : "f.x-1"'
    others = ", ".join(f"{dump(key)}:{dump(value)}" for key, value in extra.items())
    parts = [(name, f'"arguments":{written}', others)[i] for i in order]
    text = "{" + " ,\n".join(part for part in parts if part) + " }"
    for format_name, marked in (
        ("qwen", f"<tool_call>{text}</tool_call>"),
        ("llama3", text),
        ("mistral", f"[TOOL_CALLS][{text}]"),
    ):
        pieces = [marked[i : i + step] for i in range(0, len(marked), step)]
        assert parse(of(format_name), pieces) == ("", "", [("f.x-1", written, None)])


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_every_format_reads_what_it_writes(name):
    for arguments in ('{"city": "Köln", "note": "3"}', "{}"):
        text = TOOL_FORMATS[name].write("get_weather", arguments)
        assert parse(of(name), list(text))[1:] == (
            "",
            [("get_weather", arguments, "functions.get_weather:0" if name == "kimi_k2" else None)],
        )


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        # Models forget braces; what stands outside of strings cannot be an end marker's part.
        ('<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call> So.', " So.", '{"a": 1}'),
        ('<tool_call>{"name": "f", "arguments": {"a": [1\n</tool_call>', "", '{"a": [1\n'),
        ('<tool_call>{"name": "f", "arguments": 12 </tool_call>', "", "12"),
        ('<tool_call>{"name": "f"</tool_call>', "", "{}"),
        ('<tool_call>{"name": "f", "arguments": {}}}</tool_call>', "}</tool_call>", "{}"),
        # Strings that say what cannot be sent, or nothing, are left as they are written.
        ('<tool_call>{"name": "f", "arguments": "\\ud800"}</tool_call>', "", "\\ud800"),
        ('<tool_call>{"name": "f", "arguments": "\\q"}</tool_call>', "", "\\q"),
        ('<tool_call>{"name": "f", "arguments": "{\n}"}</tool_call>', "", "{\n}"),
        ('<tool_call>{"name": "f", "arguments": {"s": "</tool_call>"}}</tool_call>', "", None),
        (
            '<tool_call>{"name": "f", "arguments": {"\\"": "\\\\"}}</tool_call>',
            "",
            '{"\\"": "\\\\"}',
        ),
        ('<tool_call>{"name": "f", "x": "name", "arguments": null}</tool_call>', "", "null"),
        ('<tool_call>{"x": {"name": "g"}, "name": "f", "arguments" : {} }</tool_call>', "", "{}"),
    ],
)
def test_calls_that_are_not_quite_right(text, content, arguments):
    for pieces in every_cut(text):
        _, said, calls = parse(of("qwen"), pieces)
        assert said == content, pieces
        assert calls == [("f", '{"s": "</tool_call>"}' if arguments is None else arguments, None)]


def test_a_name_that_cannot_be_sent_is_told_as_it_is_written():
    text = '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'
    for pieces in every_cut(text):
        assert parse(of("qwen"), pieces)[2] == [("\\ud800", "{}", None)]


@pytest.mark.parametrize(
    "text", ['{"name": "Bob", "age": 3}', '[{"name": "Bob"}]', '{"name": "Bob", "parameters": {}}']
)
def test_json_without_a_marker_that_names_no_function_is_an_answer(text):
    for pieces in every_cut(text):
        assert parse(of("llama3"), pieces) == ("", text, [])
    marked = f"<|python_tag|>{text}"
    assert parse(of("llama3"), [marked])[2][0][0] == "Bob"


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ("1.50", {"type": "number"}, "1.50"),
        ("1e999", None, "1e999"),
        ("NaN", None, '"NaN"'),
        ('"\\ud800"', None, '"\\ud800"'),
        ("3", {"type": "string"}, '"3"'),
        ("3", {"type": ["string", "null"]}, '"3"'),
        ("null", {"type": ["string", "null"]}, "null"),
        (' {"a": [1]} ', {"type": "object"}, '{"a": [1]}'),
        ("two words", {"type": "integer"}, '"two words"'),
        ("[" * 100_000, None, json.dumps("[" * 100_000)),
    ],
)
def test_values_of_glm_are_json(value, schema, expected):
    parser = TOOL_FORMATS["glm45"].make({"f": {"properties": {"x": schema}}})
    text = f"<tool_call>f<arg_key>x</arg_key><arg_value>{value}</arg_value></tool_call>"
    _, content, ((name, arguments, _),) = parse(AnswerParser(tools=parser), [text])
    assert (content, name, arguments) == ("", "f", f'{{"x": {expected}}}')
    arguments.encode()


@pytest.mark.parametrize(
    ("name", "front", "flood"),
    [
        ("qwen", "", " "),
        ("qwen", "<tool_call>", " "),
        ("qwen", '<tool_call>{"name": "f", "arguments": {"t": "', "a"),
        ("qwen", '<tool_call>{"name": "f", "arguments": {}', "\n"),
        ("deepseekv3", DS[0], "\n"),
        ("deepseekv3", DS[1], "a"),
        ("deepseekv3", f"{DS[1]}function{DS[2]}f\n```json\n{{}}", "\n"),
        ("deepseekv31", f"{DS[1]}f{DS[2]}{{}}", "\n"),
        ("glm45", "<tool_call>f<arg_key>x</arg_key><arg_value>", "a"),
        ("llama3", "", "["),
    ],
)
def test_no_answer_is_read_again_at_each_token(name, front, flood):
    """The time of an answer grows as its length: parsers run where all streams are served."""

    def seconds(num):
        began = time.process_time()
        parser = of(name)
        parser.push(front)
        for _ in range(num):
            parser.push(flood * 4)
        parser.finish()
        return time.process_time() - began

    short = min(seconds(2_000) for _ in range(3))
    # Sixteen times the time if it grew as the length, 256 times if as its square.
    assert seconds(32_000) < 64 * short + 0.2


@pytest.mark.parametrize(
    ("prompt", "begun", "where"),
    [
        ("<a>", "", "free"),
        ("<a><think>\n", "", "opened"),
        ("<a><think>\n", "So", "thinking"),
        ("<a><think>\n\n</think>\n\n", "", "answer"),
        ("<a>", "So", "answer"),
        ("<a>", "<think>", "opened"),
        ("<a>", "<think>So", "thinking"),
        ("<a>", "<think>So</think>", "answer"),
        ("<a><think>", "So</think>Yes", "answer"),
        ("<a>", "<think>So</think>No.<think>But", "thinking"),
    ],
)
def test_where_an_answer_begins(prompt, begun, where):
    assert begins(prompt, begun, REASONING_FORMATS["qwen3"]) == where


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
def test_answers_that_go_on_keep_their_blanks(name):
    form = REASONING_FORMATS[name]
    text = " see.\n</think>\n yes </think>"
    for pieces in every_cut(text):
        parser = AnswerParser(ReasoningParser(form, "thinking"))
        assert parse(parser, pieces) == (" see.", "yes </think>", [])
        assert parse(AnswerParser(ReasoningParser(form, "answer")), pieces) == ("", text, [])


def test_a_section_of_calls_ends_thinking_that_was_not_closed():
    """Kimi-K2-Thinking leaves the closing marker out at times."""
    form = REASONING_FORMATS["kimi_k2"]
    for pieces in every_cut("<think>Let me look.\n" + kimi_k2(("f", "{}"))):
        parser = AnswerParser(ReasoningParser(form), TOOL_FORMATS["kimi_k2"].make({}))
        assert parse(parser, pieces) == ("Let me look.", "", [("f", "{}", "functions.f:0")])


def test_ids_of_calls():
    fresh = "0123456789abcdef" * 2
    given = {"name": "f", "number": 3, "fresh": fresh}
    assert call_id("openai", **given) == "call_0123456789abcdef01234567"
    assert call_id("numbered", **given) == "functions.f:3"
    assert call_id("short", **given) == "012345678"


def test_the_format_is_inferred_from_the_template():
    assert infer_tool_format("x <tool_call> y") == "qwen"
    assert infer_tool_format("<tool_call><arg_key>") == "glm45"
    assert infer_tool_format("<｜tool▁call▁begin｜>```json") == "deepseekv3"
    assert infer_tool_format("<｜tool▁call▁begin｜>") == "deepseekv31"
    assert infer_tool_format("nothing") is None
    assert infer_tool_format("<tool_call><function=f>") is None
    assert infer_tool_format("[TOOL_CALLS]f[ARGS]") is None
    assert infer_tool_format("[TOOL_CALLS]") == "mistral"
    assert infer_tool_format('{"name": function name, "parameters": ...}') == "llama3"


@pytest.mark.parametrize(
    "inside",
    [
        "f" + "<arg_key>a</arg_key><arg_value>" * 8000,
        "f" + "<arg_key>a</arg_key>" * 8000,
        "f<arg_key>a</arg_key>" + " " * 100_000,
    ],
)
def test_arguments_of_glm_that_never_end_are_read_once(inside):
    """Clients can write them, in an answer to go on with; all streams wait meanwhile."""
    text = f"<tool_call>{inside}</tool_call>"
    began = time.perf_counter()
    _, content, calls = parse(of("glm45"), [text])
    assert time.perf_counter() - began < 2.0  # the first took 40 s
    assert (content, calls) == (text, [])
