"""Calls between markers, whose names stand in front of arguments in JSON: DeepSeek's and Kimi's.

The arguments are handed out as they are written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from serving.parsers.calls import BLANKS, CallDelta, Parsed
from serving.parsers.markers import cut

MAX_ARGUMENTS_END = 64
"""Characters behind arguments that may belong to their end. Without a limit, an answer that goes on
with blanks would be read again at each of its tokens."""


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
        elif self._raw[0] == form.section:  # there was no call in it
            self._back_to_text(parsed)
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
