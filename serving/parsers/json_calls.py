"""Calls as JSON objects, between markers or without: Qwen's, Llama's, Mistral's and demanded ones.

An object is read as it comes, in any order of its members; what is not JSON after all is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from serving.parsers.calls import BLANKS, CallDelta, Parsed
from serving.parsers.markers import cut


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
