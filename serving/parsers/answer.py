"""One answer of a chat, as its text arrives: thinking first, then content and tool calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.parsers.reasoning import ReasoningParser
from serving.parsers.tool_calls import CallDelta, ToolParser


@dataclass(slots=True, kw_only=True)
class Piece:
    """What a piece of text brought."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class AnswerParser:
    """Parses one answer; without parsers, all text is content.

    With `whole_reasoning`, the thinking comes in one piece when it is complete.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
        *,
        whole_reasoning: bool = False,
    ) -> None:
        self._reasoning, self._tools = reasoning, tools
        self._whole = whole_reasoning
        self._thoughts: list[str] = []
        self._blanks = ""
        self._has_calls = False

    def push(self, text: str) -> Piece:
        """What is certain after the next piece of text."""
        thought = ""
        if self._reasoning is not None:
            thought, text = self._reasoning.push(text)
        return self._piece(thought, text, ended=False)

    def finish(self) -> Piece:
        """What was held back, after the last piece."""
        thought = text = ""
        if self._reasoning is not None:
            thought, text = self._reasoning.finish()
        return self._piece(thought, text, ended=True)

    def _piece(self, thought: str, text: str, *, ended: bool) -> Piece:
        piece = Piece(reasoning=thought, content=text)
        if self._whole:
            self._thoughts.append(thought)
            piece.reasoning = ""
            if text or ended:
                piece.reasoning = "".join(self._thoughts)
                self._thoughts.clear()
        if self._tools is not None:
            piece.content = ""
            for event in self._tools.push(text) + (self._tools.finish() if ended else []):
                self._take(event, piece)
            if ended and not self._has_calls:
                piece.content += self._blanks
        return piece

    def _take(self, event: str | CallDelta, piece: Piece) -> None:
        """Add content or a call. Blanks around calls are dropped: they are layout, not content."""
        if isinstance(event, CallDelta):
            self._has_calls, self._blanks = True, ""
            piece.calls.append(event)
            return
        text = self._blanks + event
        content = text.rstrip()
        self._blanks = text[len(content) :]
        piece.content += content
