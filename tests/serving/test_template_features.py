"""What chat templates do with functions, found out by rendering. The short templates here have the
habits of published ones that other servers stumble over."""

import json
from pathlib import Path

import pytest

from serving.http.conversation import fitted
from serving.parsers.tool_calls import TOOL_FORMATS
from serving.template_features import CallArguments, TemplateFeatures, probe_template
from serving.tokenizer import Tokenizer, _compile_template

DATA = Path(__file__).resolve().parents[1] / "data"
PUBLISHED = {path.stem: path.read_text() for path in (DATA / "templates").glob("*.jinja")}
PUBLISHED["deepseek_v2"] = json.loads(
    (DATA / "deepseek_v2_lite" / "tokenizer_config.json").read_text()
)["chat_template"]

LIST_UNLESS_STRING = (  # the first of Kimi-K2: fails on null, shows no calls
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
WRITES_NULL = (  # GLM: a content of null reads "None"; arguments are items
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{% for c in m.tool_calls %}[{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}]"
    "{% endfor %}{% endfor %}"
)
STRICT_IDS = (  # Mistral: ids of nine characters, the call as JSON cut open
    "{% if tools is not none %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
    "{{ ', \"id\": \"' + c.id + '\"}' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NULL_ONLY = (  # DeepSeek-V3: calls beside null only, arguments as text
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for c in m['tool_calls'] %}{{ '[' + c['function']['name'] + ' '"
    " + c['function']['arguments'] + ']' }}{% endfor %}"
    "{% else %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
)
FAILS = "{{ raise_exception('never') }}"


def features(template):
    tokenizer = Tokenizer.from_folder(DATA / "deepseek_v3")
    tokenizer._template = _compile_template(template)
    return tokenizer.template_features


@pytest.mark.parametrize(
    ("template", "tools", "calls", "results"),
    [
        (PUBLISHED["deepseek_v3"], False, "null", True),
        (PUBLISHED["deepseek_v2"], False, "hidden", False),
        (PUBLISHED["qwen3"], True, "text", True),
        (LIST_UNLESS_STRING, True, "hidden", True),
        (WRITES_NULL, True, "text", True),
        (STRICT_IDS, True, "text", True),
        (NULL_ONLY, False, "null", True),
        (FAILS, False, "hidden", False),
    ],
)
def test_features_of_templates(template, tools, calls, results):
    assert features(template) == TemplateFeatures(tools=tools, calls=calls, results=results)


def test_a_renderer_that_fails_in_any_way_has_no_features():
    def render(*_):
        raise RecursionError

    assert probe_template(render) == TemplateFeatures(tools=False, calls="hidden", results=False)


def call(name, text, call_id):
    arguments = CallArguments(json.loads(text), text)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLING = {
    "role": "assistant",
    "content": "I look.",
    "reasoning_content": "hm",
    "tool_calls": [call("f", '{"a":  1}', "x"), call("g", "{}", "y")],
}
USER = {"role": "user", "content": "Hi"}


def test_calls_beside_null_only_are_a_message_of_their_own():
    shows = TemplateFeatures(tools=True, calls="null", results=True)
    first, second = fitted([CALLING], shows, TOOL_FORMATS["qwen"])
    assert first == {"role": "assistant", "content": "I look.", "reasoning_content": "hm"}
    assert second == {"role": "assistant", "content": None, "tool_calls": CALLING["tool_calls"]}
    (only,) = fitted([{**CALLING, "content": ""}], shows, TOOL_FORMATS["qwen"])
    assert only["content"] is None
    assert only["reasoning_content"] == "hm"


def test_calls_and_results_that_a_template_hides_become_text():
    results = [
        {"role": "tool", "tool_call_id": "x", "content": "1"},
        {"role": "tool", "name": "h", "tool_call_id": "z", "content": "2"},
        {"role": "tool", "content": "3"},
    ]
    hidden = TemplateFeatures(tools=False, calls="hidden", results=False)
    messages = [USER, CALLING, *results, USER, results[0]]
    told = fitted(messages, hidden, TOOL_FORMATS["deepseekv31"])
    assert [message["role"] for message in told] == ["user", "assistant", "user", "user", "user"]
    assert told[1] == {
        "role": "assistant",
        "reasoning_content": "hm",
        "content": "I look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"
        '{"a":  1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>\n<｜tool▁calls▁begin｜>'
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    }
    assert told[2]["content"] == "Result of f:\n1\n\nResult of h:\n2\n\nResult of the call:\n3"
    assert told[4]["content"] == "Result of f:\n1"


def test_calls_that_a_template_shows_are_left_alone():
    shows = TemplateFeatures(tools=True, calls="text", results=True)
    assert fitted([USER, CALLING], shows, TOOL_FORMATS["qwen"]) == [USER, CALLING]
