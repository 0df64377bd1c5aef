"""One answer of a chat, as its text arrives: thinking first, then content and tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.parsers.calls import CallDelta, ToolParser
from serving.parsers.reasoning import Begins, ReasoningFormat, ReasoningParser
from serving.parsers.tool_calls import CallIds, ToolFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the answers to one prompt are read.

    Attributes:
        reasoning: how thinking is marked; None where nothing tells.
        separate: hand out the thinking by itself; else it stays in the content, marks and all.
        begins: where in its thinking an answer begins.
        whole_reasoning: hand the thinking out in one piece, when it is complete.
        tools: how calls are written; None leaves them in the content.
        schemas: the parameters of the functions, by name.
        ids: what ids calls get that the model gave none.
        calls_before: calls in the conversation so far.
    """

    reasoning: ReasoningFormat | None = None
    separate: bool = True
    begins: Begins = "free"
    whole_reasoning: bool = False
    tools: ToolFormat | None = None
    schemas: Mapping[str, Any] = field(default_factory=dict)
    ids: CallIds = "openai"
    calls_before: int = 0

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that must be seen, even if they are special tokens."""
        marks = () if self.tools is None else self.tools.markers
        form = self.reasoning
        return marks if form is None else (*marks, form.start, form.end)

    def parser(self) -> AnswerParser:
        """A parser for one answer."""
        form, tools = self.reasoning, self.tools
        return AnswerParser(
            ReasoningParser(form, self.begins) if form is not None and self.separate else None,
            None if tools is None else tools.make(self.schemas),
            whole_reasoning=self.whole_reasoning,
        )


@dataclass(slots=True, kw_only=True)
class Piece:
    """What a piece of text brought."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class AnswerParser:
    """Parses one answer; without parsers, all text is content.

    Attributes:
        has_calls: whether a call was handed out.
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
        self._blanks: list[str] = []
        self.has_calls = False

    @property
    def thinks(self) -> bool:
        """Whether the text so far ends in the thinking."""
        return self._reasoning is not None and self._reasoning.thinks

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
            if ended and not self.has_calls:
                piece.content += "".join(self._blanks)
        return piece

    def _take(self, event: str | CallDelta, piece: Piece) -> None:
        """Add content or a call. Blanks around calls are dropped: they are layout, not content."""
        if isinstance(event, CallDelta):
            self.has_calls = True
            self._blanks.clear()
            piece.calls.append(event)
            return
        content = event.rstrip()
        if content:
            piece.content += "".join((*self._blanks, content))
            self._blanks.clear()
        self._blanks.append(event[len(content) :])
