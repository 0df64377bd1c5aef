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
from typing import Any, Literal, Protocol

from serving.parsers.markers import cut

BLANKS = " \t\r\n"


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of call number `index`; `name` (and the id that the model gave it, if it does) come
    with its first piece."""

    index: int
    arguments: str
    name: str | None = None
    id: str | None = None


Parsed = list[str | CallDelta]
"""What a piece of text brought, in order: content and pieces of calls."""


class ToolParser(Protocol):
    """Parses one answer."""

    def push(self, text: str) -> Parsed:
        """What is certain after the next piece of text."""

    def finish(self) -> Parsed:
        """What was held back, after the last piece. An unfinished call ends where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How a model writes calls.

    Attributes:
        markers: texts that may be special tokens, and must then not be left out of the text.
        example: how to call the function `NAME` with the arguments `{"ARG": 1}`, for a prompt.
        make: a parser; given the functions' parameter schemas by name.
    """

    markers: tuple[str, ...]
    example: str
    make: Callable[[Mapping[str, Any]], ToolParser]


# ---- calls between markers ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Delimited:
    """[section] call HEAD args_begin ARGUMENTS call_end ... [section_end].

    Attributes:
        head: reads a head; its groups are `name` and perhaps `id`.
        fenced: the arguments end with a ``` line.
    """

    section: str
    section_end: str
    call: str
    args_begin: str
    call_end: str
    head: re.Pattern[str]
    fenced: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        # The mark between head and arguments is a token, too, where text may surround it.
        marks = (self.section, self.section_end, self.call, self.args_begin.strip(), self.call_end)
        return (*marks, "<｜tool▁sep｜>") if self.fenced else marks


class DelimitedParser:
    """One answer with `Delimited` calls."""

    def __init__(self, form: Delimited) -> None:
        self._form = form
        self._state: Literal["text", "section", "head", "blanks", "arguments"] = "text"
        self._held = ""
        self._raw = ""  # passed since the last certain call or content, in case it is no call
        self._num_calls = 0

    def push(self, text: str) -> Parsed:
        self._held += text
        parsed: Parsed = []
        while getattr(self, f"_in_{self._state}")(parsed):
            pass
        return parsed

    def finish(self) -> Parsed:
        held = self._held
        parsed: Parsed = []
        self._held = ""
        if self._state in ("blanks", "arguments"):
            if not self._is_end(held):
                parsed.append(CallDelta(self._num_calls - 1, held))
        elif self._state != "section" or not self._num_calls:
            parsed.append(self._raw + held)
        self._raw = ""
        return parsed

    def _in_text(self, parsed: Parsed) -> bool:
        before, marker, self._held = cut(self._held, (self._form.section, self._form.call))
        parsed.append(before)
        if marker is None:
            return False
        self._raw = marker
        self._state = "section" if marker == self._form.section else "head"
        return True

    def _in_section(self, parsed: Parsed) -> bool:
        """Between calls: only blanks, another call, or the end of the section."""
        form = self._form
        before, marker, rest = cut(self._held, (form.call, form.section_end))
        if before.strip(BLANKS):
            self._back_to_text(parsed)
            return True
        if marker is None:
            return False
        self._raw += before + marker
        self._held = rest
        if marker == form.call:
            self._state = "head"
        else:
            self._state, self._raw = "text", ""
        return True

    def _in_head(self, parsed: Parsed) -> bool:
        form = self._form
        before, marker, rest = cut(self._held, (form.args_begin, form.call_end))
        if marker is None:
            return False
        match = form.head.fullmatch(before.strip(BLANKS))
        if marker == form.call_end or match is None:
            self._back_to_text(parsed)
            return True
        groups = match.groupdict()
        parsed.append(CallDelta(self._num_calls, "", groups["name"], groups.get("id")))
        self._num_calls += 1
        self._state, self._held, self._raw = "blanks", rest, ""
        return True

    def _in_blanks(self, parsed: Parsed) -> bool:
        """In front of the arguments."""
        self._held = self._held.lstrip(BLANKS)
        if self._held:
            self._state = "arguments"
        return bool(self._held)

    def _in_arguments(self, parsed: Parsed) -> bool:
        before, marker, rest = cut(self._held, (self._form.call_end,))
        end = self._end_of(before)
        arguments = before[: len(before) - end]
        if arguments:
            parsed.append(CallDelta(self._num_calls - 1, arguments))
        if marker is None:
            self._held = before[len(arguments) :] + rest
            return False
        self._held, self._state = rest, "section"
        return True

    def _end_of(self, text: str) -> int:
        """Length of what belongs to the end of the arguments, or may do: blanks, a fence."""
        stripped = text.rstrip(BLANKS)
        if self._form.fenced:
            stripped = stripped.rstrip("`").rstrip(BLANKS)
        return len(text) - len(stripped)

    def _is_end(self, held: str) -> bool:
        """Whether what is left of the arguments is only their end, cut off."""
        rest = held.lstrip(BLANKS)
        rest = rest.lstrip("`").lstrip(BLANKS) if self._form.fenced else rest
        return self._form.call_end.startswith(rest)

    def _back_to_text(self, parsed: Parsed) -> None:
        """What was taken for the beginning of a call is content; go on behind it."""
        parsed.append(self._raw)
        self._raw, self._state = "", "text"


# ---- calls as JSON objects ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonCalls:
    """Calls as {"name": ..., "arguments": {...}}, the latter also called "parameters".

    Attributes:
        begin: marker in front of a call or of several; "" without one.
        end: marker behind; "" without one.
        bare: an answer that begins with an object, or a list, is calls without a marker.
    """

    begin: str
    end: str = ""
    bare: bool = False


class JsonCallsParser:
    """One answer with `JsonCalls`."""

    def __init__(self, form: JsonCalls) -> None:
        self._form = form
        self._state: Literal["start", "text", "between", "object"] = (
            "start" if form.bare else "text"
        )
        self._held = ""
        self._raw = ""
        self._num_calls = 0
        self._called = False  # since the marker
        self._object: _CallObject | None = None

    def push(self, text: str) -> Parsed:
        self._held += text
        parsed: Parsed = []
        while getattr(self, f"_in_{self._state}")(parsed):
            pass
        return parsed

    def finish(self) -> Parsed:
        parsed: Parsed = []
        if self._object is not None:
            if self._object.named:
                self._add(parsed, self._object.cut_off())
            else:
                parsed.append(self._raw + self._object.text)
        elif self._state == "between":
            # Behind a call, brackets and half an end marker are no content.
            if not self._called or not self._form.end.startswith(self._held):
                parsed.append(self._raw + self._held)
        else:
            parsed.append(self._held)
        self._held = self._raw = ""
        self._object = None
        return parsed

    def _in_start(self, parsed: Parsed) -> bool:
        """The answer's first character that is no blank says whether it is a call."""
        text = self._held.lstrip(BLANKS)
        if not text:
            return False
        self._state = "text"
        if text[0] in "{[":
            self._state, self._raw = "between", self._held[: len(self._held) - len(text)]
            self._held = text
        return True

    def _in_text(self, parsed: Parsed) -> bool:
        if not self._form.begin:
            parsed.append(self._held)
            self._held = ""
            return False
        before, marker, self._held = cut(self._held, (self._form.begin,))
        parsed.append(before)
        if marker is None:
            return False
        self._state, self._raw, self._called = "between", marker, False
        return True

    def _in_between(self, parsed: Parsed) -> bool:
        """In front of an object: blanks, separators, brackets, perhaps the end marker."""
        text = self._held.lstrip(BLANKS + ",;[]")
        self._raw += self._held[: len(self._held) - len(text)]
        self._held, end = text, self._form.end
        if not text or (end and text != end and end.startswith(text)):
            return False
        if text.startswith("{"):
            self._state, self._object = "object", _CallObject()
        elif end and text.startswith(end):
            # Behind the last call; without one, the markers are text.
            if not self._called:
                parsed.append(self._raw + end)
            self._held, self._raw, self._state = text[len(end) :], "", "text"
        else:
            parsed.append(self._raw)
            self._raw, self._state = "", "text"
        return True

    def _in_object(self, parsed: Parsed) -> bool:
        assert self._object is not None
        used, pieces, name = self._object.push(self._held)
        self._held = self._held[used:]
        if name is not None:
            parsed.append(CallDelta(self._num_calls, "", name))
            self._num_calls += 1
            self._raw, self._called = "", True
        self._add(parsed, pieces)
        if not self._object.closed:
            return False
        if not self._object.named:  # an object, but no call
            parsed.append(self._raw + self._object.text)
            self._raw, self._state = "", "text"
        else:
            self._state = "between"
        self._object = None
        return True

    def _add(self, parsed: Parsed, arguments: str) -> None:
        if arguments:
            parsed.append(CallDelta(self._num_calls - 1, arguments))


class _CallObject:
    """A JSON object read character by character: finds "name" and the text of the arguments.

    Attributes:
        text: all of it so far.
        named: its name was handed out.
        closed: it has ended.
    """

    def __init__(self) -> None:
        self.text = ""
        self.named = False
        self.closed = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: str | None = None  # the key whose value comes or is read
        self._value_at: int | None = None  # where that value begins in `text`
        self._string_at = 0
        self._name: str | None = None
        self._arguments_at: int | None = None
        self._arguments_end: int | None = None
        self._told = 0  # up to where in `text` the arguments were handed out

    def push(self, text: str) -> tuple[int, str, str | None]:
        """How many characters belong to the object, new argument text, and the name once."""
        used = 0
        for char in text:
            self.text += char
            used += 1
            self._step(char)
            if self.closed:
                break
        name = None
        if (
            self._name is not None
            and not self.named
            and (self.closed or self._arguments_at is not None)
        ):
            self.named, name = True, self._name
        return used, self._new_arguments(), name

    def cut_off(self) -> str:
        """The arguments that are left of an object that was not finished."""
        return "" if self.closed else self._new_arguments()

    def _new_arguments(self) -> str:
        if not self.named:
            return ""
        if self._arguments_at is None:
            return "{}" if self.closed else ""
        begin, end = self._arguments_at, self._arguments_end
        if self.text[begin] == '"':  # JSON in a string: known when it is complete
            if end is None or self._told:
                return ""
            self._told = end
            return str(json.loads(self.text[begin:end]))
        upto = len(self.text) if end is None else end
        new = self.text[max(begin, self._told) : upto]
        if end is None:  # blanks may be those behind the value
            new = new.rstrip(BLANKS)
        self._told = max(begin, self._told) + len(new)
        return new

    def _step(self, char: str) -> None:
        at = len(self.text) - 1
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                self._end_string(at)
            return
        if char in BLANKS:
            return
        if self._depth == 1 and char == ":" and self._value_at is None:
            return
        if self._depth == 1 and char in ",}":
            self._end_value(at)
        elif self._depth == 1 and self._key is not None and self._value_at is None:
            self._begin_value(at)
        if char == '"':
            self._in_string, self._string_at = True, at
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.closed = self._depth == 0

    def _begin_value(self, at: int) -> None:
        self._value_at = at
        if self._key in ("arguments", "parameters") and self._arguments_at is None:
            self._arguments_at = at

    def _end_value(self, at: int) -> None:
        reads = self._value_at is not None and self._value_at == self._arguments_at
        if reads and self._arguments_end is None:
            self._arguments_end = len(self.text[:at].rstrip(BLANKS))
        self._key = self._value_at = None

    def _end_string(self, at: int) -> None:
        if self._depth != 1:
            return
        try:
            value = json.loads(self.text[self._string_at : at + 1])
        except ValueError:  # a control character, perhaps
            value = self.text[self._string_at + 1 : at]
        if self._key is None:
            self._key = value
        elif self._key == "name" and self._value_at == self._string_at:
            self._name = value


# ---- GLM ---------------------------------------------------------------------------------------


class GlmParser:
    """<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>.

    A call is handed out when it is complete: its arguments must be put together. A value is text
    where the function's schema says "string", else JSON if it can be.
    """

    BEGIN, END = "<tool_call>", "</tool_call>"
    _ARGUMENT = re.compile(
        r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL
    )

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self._schemas = schemas
        self._held = ""
        self._inside = False
        self._num_calls = 0

    def push(self, text: str) -> Parsed:
        self._held += text
        parsed: Parsed = []
        while True:
            marker = self.END if self._inside else self.BEGIN
            before, found, rest = cut(self._held, (marker,))
            if not self._inside:
                parsed.append(before)
                self._held = rest
            if found is None:
                return parsed
            if self._inside:
                self._call(before, parsed)
            self._held, self._inside = rest, not self._inside

    def finish(self) -> Parsed:
        held, self._held = self._held, ""
        return [self.BEGIN + held if self._inside else held]

    def _call(self, text: str, parsed: Parsed) -> None:
        at = text.find("<arg_key>")
        name = (text if at < 0 else text[:at]).strip()
        arguments, rest = {}, "" if at < 0 else text[at:]
        properties = (self._schemas.get(name) or {}).get("properties") or {}
        while (match := self._ARGUMENT.match(rest)) is not None:
            key, value = match[1].strip(), match[2]
            arguments[key] = _typed(value, properties.get(key))
            rest = rest[match.end() :]
        if rest or not re.fullmatch(r"[\w.-]+", name):
            parsed.append(self.BEGIN + text + self.END)
            return
        encoded = json.dumps(arguments, ensure_ascii=False)
        parsed += [CallDelta(self._num_calls, "", name), CallDelta(self._num_calls, encoded)]
        self._num_calls += 1


def _typed(value: str, schema: Any) -> Any:
    if isinstance(schema, dict) and schema.get("type") == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


# ---- the formats by name -----------------------------------------------------------------------


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


def _delimited(form: Delimited, example: str) -> ToolFormat:
    return ToolFormat(
        markers=form.markers, example=example, make=lambda schemas: DelimitedParser(form)
    )


def _json_calls(form: JsonCalls, example: str) -> ToolFormat:
    return ToolFormat(
        markers=tuple(mark for mark in (form.begin, form.end) if mark),
        example=example,
        make=lambda schemas: JsonCallsParser(form),
    )


_HERMES = _json_calls(
    JsonCalls(begin="<tool_call>", end="</tool_call>"),
    '<tool_call>\n{"name": "NAME", "arguments": {"ARG": 1}}\n</tool_call>',
)

TOOL_FORMATS: dict[str, ToolFormat] = {
    "deepseekv3": _delimited(
        DEEPSEEK_V3,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n"
        '{"ARG": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    "deepseekv31": _delimited(
        DEEPSEEK_V31,
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{"ARG": 1}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "kimi_k2": _delimited(
        KIMI_K2,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0"
        '<|tool_call_argument_begin|>{"ARG": 1}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    "qwen": _HERMES,
    "qwen25": _HERMES,
    "hermes": _HERMES,
    "llama3": _json_calls(
        JsonCalls(begin="<|python_tag|>", bare=True), '{"name": "NAME", "parameters": {"ARG": 1}}'
    ),
    "mistral": _json_calls(
        JsonCalls(begin="[TOOL_CALLS]"), '[TOOL_CALLS][{"name": "NAME", "arguments": {"ARG": 1}}]'
    ),
    "glm45": ToolFormat(
        markers=(
            *(GlmParser.BEGIN, GlmParser.END),
            *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        ),
        example="<tool_call>NAME\n<arg_key>ARG</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
        make=GlmParser,
    ),
}
"""By the names of --tool-call-parser."""

REQUIRED_CALLS = ToolFormat(
    markers=(),
    example="",
    make=lambda schemas: JsonCallsParser(JsonCalls(begin="", bare=True)),
)
"""What an answer is made to look like where it must call: a JSON array of calls."""


def infer_tool_format(chat_template: str) -> str | None:
    """The name of the format that a chat template writes calls in; None if it names no marker."""
    marks = {
        "<｜tool▁call▁begin｜>": "deepseekv3" if "```json" in chat_template else "deepseekv31",
        "<|tool_calls_section_begin|>": "kimi_k2",
        "<arg_key>": "glm45",
        "<tool_call>": "qwen",
        "[TOOL_CALLS]": "mistral",
        "<|python_tag|>": "llama3",
    }
    return next((name for mark, name in marks.items() if mark in chat_template), None)


def describe_tools(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> str:
    """A system message that offers functions, for templates that do not do it themselves."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    how = (
        "To call one, write exactly this, with its name and arguments in place of NAME and "
        f"ARG, and then nothing more:\n{form.example}"
    )
    return f"You can call these functions, described as JSON:\n{functions}\n" + (
        how if form.example else "Answer with the calls that you want to make."
    )
