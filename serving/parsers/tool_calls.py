"""Finds tool calls in an answer's text, while it arrives in pieces, in the formats of the models.

A parser hands out content and calls; a call's name comes first, its arguments follow in pieces that
joined are what the model wrote. Text that turns out to be no call is content, unchanged. Formats:
model cards and chat templates of the models named in `TOOL_FORMATS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serving.parsers.calls import ToolParser
from serving.parsers.delimited import Delimited, DelimitedParser
from serving.parsers.glm import GlmParser
from serving.parsers.json_calls import JsonCalls, JsonCallsParser

EXAMPLE = '{"ARG": 1}'

CallIds = Literal["openai", "numbered", "short"]
"""call_..., functions.NAME:N (Kimi's, whose template shows them to the model), or 9 letters and
digits (all that Mistral's template takes)."""


def call_id(ids: CallIds, *, name: str, number: int, fresh: str) -> str:
    """The id of a call.

    Args:
        number: calls of the conversation before it.
        fresh: hexadecimal digits that no other call has, 24 or more.
    """
    match ids:
        case "numbered":
            return f"functions.{name}:{number}"
        case "short":
            return fresh[:9]
        case _:
            return f"call_{fresh[:24]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How a model writes calls.

    Attributes:
        markers: texts that may be special tokens, and must then not be left out of the text.
        write: a call, given a function's name and its arguments as JSON.
        make: a parser; given the functions' parameter schemas by name.
        ids: what the ids of calls look like that the model did not give itself.
    """

    markers: tuple[str, ...]
    write: Callable[[str, str], str]
    make: Callable[[Mapping[str, Any]], ToolParser]
    ids: CallIds = "openai"


def _deepseek(*, args_begin: str, head: str, fenced: bool) -> Delimited:
    return Delimited(
        section="<｜tool▁calls▁begin｜>",
        section_end="<｜tool▁calls▁end｜>",
        call="<｜tool▁call▁begin｜>",
        args_begin=args_begin,
        call_end="<｜tool▁call▁end｜>",
        head=re.compile(head),
        fenced=fenced,
    )


DEEPSEEK_V3 = _deepseek(
    args_begin="```json", head=r"\w*<｜tool▁sep｜>\s*(?P<name>[\w.-]+)", fenced=True
)
DEEPSEEK_V31 = _deepseek(args_begin="<｜tool▁sep｜>", head=r"(?P<name>[\w.-]+)", fenced=False)
KIMI_K2 = Delimited(
    section="<|tool_calls_section_begin|>",
    section_end="<|tool_calls_section_end|>",
    call="<|tool_call_begin|>",
    args_begin="<|tool_call_argument_begin|>",
    call_end="<|tool_call_end|>",
    head=re.compile(r"(?P<id>(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?)"),
)


def _delimited(
    form: Delimited, write: Callable[[str, str], str], ids: CallIds = "openai"
) -> ToolFormat:
    return ToolFormat(
        markers=form.markers, write=write, make=lambda schemas: DelimitedParser(form), ids=ids
    )


def _json_calls(
    form: JsonCalls, write: Callable[[str, str], str], ids: CallIds = "openai"
) -> ToolFormat:
    return ToolFormat(
        markers=tuple(mark for mark in (form.begin, form.end) if mark),
        write=write,
        make=lambda schemas: JsonCallsParser(form, schemas),
        ids=ids,
    )


def _json_call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {arguments}}}'


def _write_kimi(name: str, arguments: str) -> str:
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0"
        f"<|tool_call_argument_begin|>{arguments}<|tool_call_end|><|tool_calls_section_end|>"
    )


def _write_glm(name: str, arguments: str) -> str:
    pairs = (
        f"<arg_key>{key}</arg_key>\n<arg_value>"
        f"{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        "</arg_value>\n"
        for key, value in json.loads(arguments).items()
    )
    return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"


_HERMES = _json_calls(
    JsonCalls(begin="<tool_call>", end="</tool_call>"),
    lambda name, arguments: f"<tool_call>\n{_json_call(name, arguments)}\n</tool_call>",
)

TOOL_FORMATS: dict[str, ToolFormat] = {
    "deepseekv3": _delimited(
        DEEPSEEK_V3,
        lambda name, arguments: (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n"
            f"{arguments}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
    ),
    "deepseekv31": _delimited(
        DEEPSEEK_V31,
        lambda name, arguments: (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}"
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
    ),
    "kimi_k2": _delimited(KIMI_K2, _write_kimi, "numbered"),
    "qwen": _HERMES,
    "qwen25": _HERMES,
    "hermes": _HERMES,
    "llama3": _json_calls(
        JsonCalls(begin="<|python_tag|>", bare=True),
        lambda name, arguments: _json_call(name, arguments, "parameters"),
    ),
    "mistral": _json_calls(
        JsonCalls(begin="[TOOL_CALLS]"),
        lambda name, arguments: f"[TOOL_CALLS][{_json_call(name, arguments)}]",
        "short",
    ),
    "glm45": ToolFormat(
        markers=(
            *(GlmParser.BEGIN, GlmParser.END),
            *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        ),
        write=_write_glm,
        make=GlmParser,
    ),
}
"""By the names of --tool-call-parser."""

REQUIRED_CALLS = ToolFormat(
    markers=(),
    write=lambda name, arguments: f"[{_json_call(name, arguments, 'parameters')}]",
    make=lambda schemas: JsonCallsParser(JsonCalls(begin="", bare=True)),
)
"""What an answer is made to look like where it must call: a JSON array of calls."""


def infer_tool_format(chat_template: str) -> str | None:
    """The name of the format that a chat template writes calls in; None if it shows none of ours.

    Formats that share a marker with ours but are others: <function=...> (Qwen3-Coder), and a
    name and [ARGS] behind Mistral's marker (since 2025).
    """
    if "<function=" in chat_template or "[ARGS]" in chat_template:
        return None
    marks = {
        "<｜tool▁call▁begin｜>": "deepseekv3" if "```json" in chat_template else "deepseekv31",
        "<|tool_calls_section_begin|>": "kimi_k2",
        "<arg_key>": "glm45",
        "<tool_call>": "qwen",
        "[TOOL_CALLS]": "mistral",
        "<|python_tag|>": "llama3",
        '{"name": function name, "parameters": ': "llama3",
    }
    return next((name for mark, name in marks.items() if mark in chat_template), None)


def describe_tools(tools: Sequence[Mapping[str, Any]], form: ToolFormat | None) -> str:
    """A system message that offers functions, for templates that do not do it themselves.

    Args:
        form: how to write a call; None says nothing of it.
    """
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    offer = f"You can call these functions, described as JSON:\n{functions}"
    if form is None:
        return offer
    if form is REQUIRED_CALLS:
        return f"{offer}\nAnswer with the calls that you want to make."
    return (
        f"{offer}\nTo call one, write exactly this, with its name and arguments in place of NAME "
        f"and ARG, and then nothing more:\n{form.write('NAME', EXAMPLE)}"
    )
