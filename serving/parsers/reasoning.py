"""Separates a model's thinking from its answer, while the text arrives in pieces.

Blanks around the thinking belong to neither. The pieces joined do not depend on where the text is
cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serving.parsers.markers import cut


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """How a model marks its thinking.

    Attributes:
        always: every answer begins with thinking, with or without its opening marker.
        calls: marker of tool calls that ends the thinking, too: some models forget the other.
    """

    start: str = "<think>"
    end: str = "</think>"
    always: bool = False
    calls: str | None = None


REASONING_FORMATS = {
    "deepseek-r1": ReasoningFormat(always=True),
    "deepseek-v3": ReasoningFormat(),
    "glm45": ReasoningFormat(),
    "kimi": ReasoningFormat(start="◁think▷", end="◁/think▷"),
    "kimi_k2": ReasoningFormat(calls="<|tool_calls_section_begin|>"),
    "qwen3": ReasoningFormat(),
    "qwen3-thinking": ReasoningFormat(always=True),
}
"""By the names of --reasoning-parser."""


Begins = Literal["free", "opened", "thinking", "answer"]
"""Where an answer begins: anywhere, behind the opening marker that ends its prompt, in the middle
of thinking, or behind all thinking."""
State = Literal["start", "open", "thinking", "closed", "answer"]


def begins(prompt: str, begun: str, form: ReasoningFormat) -> Begins:
    """Where an answer begins.

    Args:
        prompt: the end of what the template rendered.
        begun: the answer's text that the client wrote behind it.
    """
    start, end = begun.rfind(form.start), begun.rfind(form.end)
    if end > start:
        return "answer"
    if start >= 0:
        return "opened" if begun.rstrip().endswith(form.start) else "thinking"
    prompt = prompt.rstrip()
    if prompt.endswith(form.start):
        return "thinking" if begun.strip() else "opened"
    return "answer" if begun.strip() or prompt.endswith(form.end) else "free"


class ReasoningParser:
    """One answer. One that begins "free" and not with the opening marker is no thinking at all (but
    see `ReasoningFormat.always`)."""

    def __init__(self, form: ReasoningFormat, where: Begins = "free") -> None:
        self._form = form
        self._thinks = where == "opened" or (where == "free" and form.always)
        self._state: State = "start"
        if where in ("thinking", "answer"):
            self._state = where
        self._ends = (form.end,) if form.calls is None else (form.end, form.calls)
        self._held = ""

    @property
    def thinks(self) -> bool:
        """Whether the text so far ends in the thinking, its opening marker included."""
        if self._state == "start":
            return self._thinks or bool(self._held.strip())
        return self._state in ("open", "thinking")

    def push(self, text: str) -> tuple[str, str]:
        """The thinking, and the text behind it, that are certain now."""
        self._held += text
        thought = ""
        if self._state == "start":
            self._start()
        if self._state == "open":
            self._skip_blanks("thinking")
        if self._state == "thinking":
            before, end, rest = cut(self._held, self._ends)
            thought = before.rstrip()
            # Blanks at the end may be those in front of the marker.
            self._held = rest if end else before[len(thought) :] + rest
            if end:
                self._state = "closed"
                if end == self._form.calls:
                    self._held = end + rest
        if self._state == "closed":
            self._skip_blanks("answer")
        if self._state != "answer":
            return thought, ""
        answer, self._held = self._held, ""
        return thought, answer

    def finish(self) -> tuple[str, str]:
        """What was held back, after the last piece."""
        held, self._held = self._held, ""
        if self._state == "answer" or (self._state == "start" and not self._thinks):
            return "", held
        return held.rstrip(), ""

    def _start(self) -> None:
        """Pass the opening marker, if there is one."""
        start, text = self._form.start, self._held.lstrip()
        if text.startswith(start):
            self._state, self._held = "open", text[len(start) :]
        elif not start.startswith(text):
            self._state = "open" if self._thinks else "answer"

    def _skip_blanks(self, then: State) -> None:
        self._held = self._held.lstrip()
        if self._held:
            self._state = then
