"""What a parser of tool calls is, and what it hands out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
