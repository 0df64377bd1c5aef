"""Finds tool calls in an answer's text, while it arrives in pieces, in the formats of the models.

A parser hands out content and calls; a call's name comes first, its arguments follow in pieces that
joined are what the model wrote. Text that turns out to be no call is content, unchanged. Formats:
model cards and chat templates of the models named in `TOOL_FORMATS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from serving.parsers.markers import cut

BLANKS = " \t\r\n"
EXAMPLE = '{"ARG": 1}'
MAX_ARGUMENTS_END = 64
"""Characters behind arguments that may belong to their end. Without a limit, an answer that goes on
with blanks would be read again at each of its tokens."""


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
        write: a call, given a function's name and its arguments as JSON.
        make: a parser; given the functions' parameter schemas by name.
        ids: what the ids of calls look like that the model did not give itself.
    """

    markers: tuple[str, ...]
    write: Callable[[str, str], str]
    make: Callable[[Mapping[str, Any]], ToolParser]
    ids: CallIds = "openai"


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
        # Passed since the last certain call or content, in case it is no call. In pieces, like
        # the head: an answer may go on for ever, and must not be read again at each token.
        self._raw: list[str] = []
        self._head: list[str] = []
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
            parsed.append("".join((*self._raw, *self._head, held)))
        self._raw.clear()
        self._head.clear()
        return parsed

    def _in_text(self, parsed: Parsed) -> bool:
        before, marker, self._held = cut(self._held, (self._form.section, self._form.call))
        parsed.append(before)
        if marker is None:
            return False
        self._raw = [marker]
        self._state = "section" if marker == self._form.section else "head"
        return True

    def _in_section(self, parsed: Parsed) -> bool:
        """Between calls: only blanks, another call, or the end of the section."""
        form = self._form
        before, marker, rest = cut(self._held, (form.call, form.section_end))
        if before.strip(BLANKS):
            self._back_to_text(parsed)
            return True
        self._raw.append(before)
        self._held = rest
        if marker is None:
            return False
        self._raw.append(marker)
        if marker == form.call:
            self._state = "head"
        else:
            self._state, self._raw = "text", []
        return True

    def _in_head(self, parsed: Parsed) -> bool:
        form = self._form
        before, marker, self._held = cut(self._held, (form.args_begin, form.call_end))
        self._head.append(before)
        if marker is None:
            return False
        head = "".join(self._head)
        match = form.head.fullmatch(head.strip(BLANKS))
        if marker == form.call_end or match is None:
            self._held = head + marker + self._held
            self._back_to_text(parsed)
            return True
        groups = match.groupdict()
        parsed.append(CallDelta(self._num_calls, "", groups["name"], groups.get("id")))
        self._num_calls += 1
        self._state, self._raw, self._head = "blanks", [], []
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
        text = text[-MAX_ARGUMENTS_END:]
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
        parsed.append("".join(self._raw))
        self._raw, self._head, self._state = [], [], "text"


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
    """One answer with `JsonCalls`. Without a marker, only objects that name one of `names` are
    calls, if it is given: an answer may be any other JSON."""

    def __init__(self, form: JsonCalls, names: Collection[str] | None = None) -> None:
        self._form = form
        self._state: Literal["start", "text", "between", "object"] = (
            "start" if form.bare else "text"
        )
        self._held = ""
        self._raw: list[str] = []
        self._num_calls = 0
        self._names = names
        self._marked = False
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
        raw = "".join(self._raw)
        if self._object is not None:
            if not self._object.named:
                parsed.append(raw + self._object.text + self._held)
        elif self._state == "between":
            # Behind a call, brackets and half an end marker are no content.
            if not self._called or not self._form.end.startswith(self._held):
                parsed.append(raw + self._held)
        else:
            parsed.append(self._held)
        self._held, self._raw, self._object = "", [], None
        return parsed

    def _in_start(self, parsed: Parsed) -> bool:
        """The answer's first character that is no blank says whether it is a call."""
        text = self._held.lstrip(BLANKS)
        if not text:
            return False
        self._state = "text"
        if text[0] in "{[":
            self._state, self._raw = "between", [self._held[: len(self._held) - len(text)]]
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
        self._state, self._raw, self._marked, self._called = "between", [marker], True, False
        return True

    def _in_between(self, parsed: Parsed) -> bool:
        """In front of an object: blanks, separators, brackets, perhaps the end marker."""
        text = self._held.lstrip(BLANKS + ",;[]")
        self._raw.append(self._held[: len(self._held) - len(text)])
        self._held, end = text, self._form.end
        if not text or (end and text != end and end.startswith(text)):
            return False
        if text.startswith("{"):
            names = None if self._marked else self._names
            self._state, self._object = "object", _CallObject(end, names)
        elif end and text.startswith(end):
            # Behind the last call; without one, the markers are text.
            if not self._called:
                parsed.append("".join((*self._raw, end)))
            self._held, self._raw, self._state = text[len(end) :], [], "text"
        else:
            parsed.append("".join(self._raw))
            self._raw, self._state = [], "text"
        return True

    def _in_object(self, parsed: Parsed) -> bool:
        assert self._object is not None
        used, arguments, name = self._object.push(self._held)
        self._held = self._held[used:]
        if name is not None:
            parsed.append(CallDelta(self._num_calls, "", name))
            self._num_calls += 1
            self._raw, self._called = [], True
        if arguments:
            parsed.append(CallDelta(self._num_calls - 1, arguments))
        if not self._object.closed:
            return False
        self._state = "between"
        if not self._object.named:  # an object, but no call; its end marker is text like it
            parsed.append("".join((*self._raw, self._object.text)))
            self._state, self._raw = "text", []
        self._object = None
        return True


class _CallObject:
    """A JSON object read as it comes: finds "name" and the text of the arguments.

    Attributes:
        named: its name was handed out.
        closed: it has ended, by its brace or by the marker behind it, which JSON cannot contain
            outside of strings (models forget braces).
    """

    _RUN = re.compile(r'[^"\\]+')  # of a string

    def __init__(self, end: str, names: Collection[str] | None) -> None:
        """Args:
        end: marker behind the object; "" without one.
        names: of functions; objects with another name are no calls. None for any name.
        """
        self.named = False
        self.closed = False
        self._end, self._names = end, names
        self._parts: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = False
        self._string: list[str] | None = None  # of a string that is read whole, with its quotes
        self._key: str | None = None  # the key whose value comes or is read
        self._value: Literal["none", "name", "arguments", "text", "other"] = "none"
        self._name: str | None = None
        self._has_arguments = False
        self._new: list[str] = []  # of the arguments, not handed out

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self._parts)

    def push(self, text: str) -> tuple[int, str, str | None]:
        """How many characters belong to the object, new argument text, and the name once."""
        at = 0
        while at < len(text) and not self.closed:
            if self._in_string:
                at += self._in_text(text, at)
                continue
            if self._end and text[at] == self._end[0]:
                rest = text[at : at + len(self._end)]
                if rest == self._end:
                    self.closed = True
                    break
                if self._end.startswith(rest):
                    break
            self._step(text[at])
            at += 1
        self._parts.append(text[:at])
        name = None
        if (
            not self.named
            and self._name is not None
            and (self._names is None or self._name in self._names)
            and (self.closed or self._has_arguments)
        ):
            self.named, name = True, self._name
        arguments = ""
        if self.named:
            if self.closed and not self._has_arguments:
                self._new.append("{}")
            arguments = "".join(self._new)
            self._new.clear()
        return at, arguments, name

    def _in_text(self, text: str, at: int) -> int:
        """Read on in a string; how many characters."""
        run = None if self._escaped else self._RUN.match(text, at)
        piece = text[at] if run is None else run[0]
        self._keep(piece)
        if self._escaped:
            self._escaped = False
        elif piece == "\\":
            self._escaped = True
        elif piece == '"':
            self._in_string = False
            if self._string is not None:
                self._end_string(_string_value("".join(self._string)))
        return len(piece)

    def _keep(self, piece: str) -> None:
        if self._string is not None:
            self._string.append(piece)
        elif self._value == "arguments":
            self._new.append(piece)

    def _step(self, char: str) -> None:
        """Outside of strings."""
        if self._depth == 1:
            if char == "," or char == "}" or (char in BLANKS and self._value != "none"):
                self._value = "none"
                if char == ",":
                    self._key = None
            elif char != ":" and char not in BLANKS and self._key is not None:
                self._begin_value(char)
        if char == '"':
            self._in_string = True
            if self._depth == 1 and self._value not in ("arguments", "other"):
                self._string = []
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.closed = self._depth == 0
        if self._depth > 0:
            self._keep(char)
        if char in "}]" and self._depth == 1:
            self._value = "none"

    def _begin_value(self, char: str) -> None:
        if self._value != "none":
            return
        self._value = "other"
        if self._key == "name" and char == '"' and self._name is None:
            self._value = "name"
        elif self._key in ("arguments", "parameters") and not self._has_arguments:
            # JSON in a string is known when it is complete.
            self._value = "text" if char == '"' else "arguments"
            self._has_arguments = char != '"'
        self._key = ""  # whatever follows before a comma is no value

    def _end_string(self, value: str) -> None:
        self._string = None
        if self._value == "name":
            self._name = value
        elif self._value == "text":
            self._has_arguments = True
            self._new.append(value)
        elif self._key is None:
            self._key = value
        self._value = "none"


def _string_value(text: str) -> str:
    """What a JSON string says; what is written in it, where it says nothing that can be sent."""
    try:
        value = str(json.loads(text, strict=False))
        value.encode()  # half a surrogate pair cannot be
    except ValueError:
        return text[1:-1]
    return value


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
        self._call: list[str] = []
        self._inside = False
        self._num_calls = 0

    def push(self, text: str) -> Parsed:
        self._held += text
        parsed: Parsed = []
        while True:
            marker = self.END if self._inside else self.BEGIN
            before, found, self._held = cut(self._held, (marker,))
            if self._inside:
                self._call.append(before)
            else:
                parsed.append(before)
            if found is None:
                return parsed
            if self._inside:
                self._end_call("".join(self._call), parsed)
                self._call.clear()
            self._inside = not self._inside

    def finish(self) -> Parsed:
        held = "".join((*self._call, self._held))
        self._held = ""
        self._call.clear()
        return [self.BEGIN + held if self._inside else held]

    def _end_call(self, text: str, parsed: Parsed) -> None:
        at = text.find("<arg_key>")
        name = (text if at < 0 else text[:at]).strip()
        arguments, rest = {}, "" if at < 0 else text[at:]
        properties = (self._schemas.get(name) or {}).get("properties") or {}
        while (match := self._ARGUMENT.match(rest)) is not None:
            key, value = match[1].strip(), match[2]
            arguments[key] = _json_text(value, properties.get(key))
            rest = rest[match.end() :]
        if rest or not re.fullmatch(r"[\w.-]+", name):
            parsed.append(self.BEGIN + text + self.END)
            return
        parsed += [
            CallDelta(self._num_calls, "", name),
            CallDelta(self._num_calls, _json_object(arguments)),
        ]
        self._num_calls += 1


def _json_object(members: Mapping[str, str]) -> str:
    """An object of values that are JSON texts."""
    pairs = (f"{json.dumps(key, ensure_ascii=False)}: {text}" for key, text in members.items())
    return "{" + ", ".join(pairs) + "}"


def _json_text(value: str, schema: Any) -> str:
    """A value as JSON: a string where its schema says so, what it is where it is JSON already."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    kinds = kinds if isinstance(kinds, list) else [kinds]
    is_null = value.strip() == "null" and "null" in kinds
    if is_null or "string" not in kinds:
        try:
            json.loads(value, parse_constant=_refuse)
        except (ValueError, RecursionError):
            pass
        else:
            return value.strip()
    return json.dumps(value, ensure_ascii=False)


def _refuse(constant: str) -> None:
    """NaN and Infinity are Python's, not JSON's."""
    raise ValueError(constant)


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
