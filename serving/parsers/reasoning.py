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
    """

    start: str = "<think>"
    end: str = "</think>"
    always: bool = False


REASONING_FORMATS = {
    "deepseek-r1": ReasoningFormat(always=True),
    "deepseek-v3": ReasoningFormat(),
    "glm45": ReasoningFormat(),
    "kimi": ReasoningFormat(start="◁think▷", end="◁/think▷"),
    "kimi_k2": ReasoningFormat(),
    "qwen3": ReasoningFormat(),
    "qwen3-thinking": ReasoningFormat(always=True),
}
"""By the names of --reasoning-parser."""


State = Literal["start", "open", "thinking", "closed", "answer"]


class ReasoningParser:
    """One answer. `opened`: the prompt ends with the opening marker, so the answer thinks at once.

    Without `opened`, an answer that does not begin with the marker is no thinking at all (but see
    `ReasoningFormat.always`).
    """

    def __init__(self, form: ReasoningFormat, *, opened: bool) -> None:
        self._form = form
        self._thinks = opened or form.always
        self._state: State = "start"
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """The thinking, and the text behind it, that are certain now."""
        self._held += text
        thought = ""
        if self._state == "start":
            self._start()
        if self._state == "open":
            self._skip_blanks("thinking")
        if self._state == "thinking":
            before, end, rest = cut(self._held, (self._form.end,))
            thought = before.rstrip()
            # Blanks at the end may be those in front of the marker.
            self._held = rest if end else before[len(thought) :] + rest
            if end:
                self._state = "closed"
        if self._state == "closed":
            self._skip_blanks("answer")
        if self._state != "answer":
            return thought, ""
        answer, self._held = self._held, ""
        return thought, answer

    def finish(self) -> tuple[str, str]:
        """What was held back, after the last piece."""
        held, self._held = self._held, ""
        if self._state == "start" and not self._thinks:
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
