"""GLM's calls, whose arguments are no JSON and are made into it, by the functions' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from serving.parsers.calls import CallDelta, Parsed
from serving.parsers.markers import cut


class GlmParser:
    """<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>.

    A call is handed out when it is complete: its arguments must be put together. A value is text
    where the function's schema says "string", else JSON if it can be.
    """

    BEGIN, END = "<tool_call>", "</tool_call>"

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
        written = _written("" if at < 0 else text[at:])
        if written is None or not re.fullmatch(r"[\w.-]+", name):
            parsed.append(self.BEGIN + text + self.END)
            return
        properties = (self._schemas.get(name) or {}).get("properties") or {}
        arguments = {key: _json_text(value, properties.get(key)) for key, value in written.items()}
        parsed += [
            CallDelta(self._num_calls, "", name),
            CallDelta(self._num_calls, _json_object(arguments)),
        ]
        self._num_calls += 1


def _written(text: str) -> dict[str, str] | None:
    """The arguments as they stand there; None if something else does. Reads the text once."""
    written, at = {}, 0
    while at < len(text):
        parts = []
        for part in ("arg_key", "arg_value"):
            begin, end = f"<{part}>", f"</{part}>"
            at = _after_blanks(text, at)
            if not text.startswith(begin, at) or (to := text.find(end, at)) < 0:
                return None
            parts.append(text[at + len(begin) : to])
            at = to + len(end)
        written[parts[0].strip()] = parts[1]
        at = _after_blanks(text, at)
    return written


def _after_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


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
