"""The output of a response while it grows: items of thinking, text and calls, and their events.

One item is open at a time. What comes next of the same kind goes into it, anything else closes it
and opens another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from serving.http.responses_protocol import (
    ArgumentsDelta,
    ArgumentsDone,
    ItemAdded,
    ItemDone,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    ReasoningText,
    TextDelta,
    TextDone,
)
from serving.parsers.answer import Piece
from serving.parsers.calls import CallDelta

Event = msgspec.Struct


class GrowingOutput:
    """Takes the pieces of an answer.

    Attributes:
        items: the output so far, the open item included. Events hold these very objects: each must
            be encoded before the next is asked for.

    Args:
        numbers: the sequence numbers of the events.
    """

    def __init__(self, answer_id: str, numbers: Iterator[int]) -> None:
        self.items: list[OutputItem] = []
        self._answer_id, self._numbers = answer_id, numbers
        self._open: OutputItem | None = None

    def add(self, piece: Piece) -> Iterator[Event]:
        """The events of a piece."""
        if piece.reasoning:
            yield from self._think(piece.reasoning)
        if piece.content:
            yield from self._say(piece.content)
        for part in piece.calls:
            yield from self._call(part)

    def close(self, *, complete: bool) -> Iterator[Event]:
        """The end of the output, which has at least one item."""
        if not self.items:
            yield from self._say("")
        yield from self._close("completed" if complete else "incomplete")

    def _think(self, text: str) -> Iterator[Event]:
        item = self._open
        if not isinstance(item, OutputReasoning):
            yield from self._close()
            item = OutputReasoning(id=self._id("rs"), status="in_progress", content=[])
            yield from self._begin(item)
            yield self._part_added(item, ReasoningText(text=""))
            item.content.append(ReasoningText(text=""))
        item.content[0].text += text
        yield ReasoningDelta(**self._place(), item_id=item.id, delta=text)

    def _say(self, text: str) -> Iterator[Event]:
        item = self._open
        if not isinstance(item, OutputMessage):
            yield from self._close()
            item = OutputMessage(id=self._id("msg"), status="in_progress", content=[])
            yield from self._begin(item)
            yield self._part_added(item, OutputText(text=""))
            item.content.append(OutputText(text=""))
        if text:
            item.content[0].text += text
            yield TextDelta(**self._place(), item_id=item.id, delta=text)

    def _call(self, part: CallDelta) -> Iterator[Event]:
        item = self._open
        if part.name is not None or not isinstance(item, OutputCall):
            yield from self._close()
            item = OutputCall(
                id=self._id("fc"),
                call_id=part.id or "",
                name=part.name or "",
                arguments="",
                status="in_progress",
            )
            yield from self._begin(item)
        if part.arguments:
            item.arguments += part.arguments
            yield ArgumentsDelta(**self._place(), item_id=item.id, delta=part.arguments)

    def _begin(self, item: OutputItem) -> Iterator[Event]:
        self._open = item
        self.items.append(item)
        yield ItemAdded(**self._place(), item=item)

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """The end of the open item, if there is one."""
        item = self._open
        match item:
            case None:
                return
            case OutputCall():
                yield ArgumentsDone(
                    **self._place(), item_id=item.id, name=item.name, arguments=item.arguments
                )
            case OutputReasoning(content=[thought]):
                yield ReasoningDone(**self._place(), item_id=item.id, text=thought.text)
                yield PartDone(**self._place(), item_id=item.id, part=thought)
            case OutputMessage(content=[part]):
                yield TextDone(**self._place(), item_id=item.id, text=part.text)
                yield PartDone(**self._place(), item_id=item.id, part=part)
        item.status = status
        yield ItemDone(**self._place(), item=item)
        self._open = None

    def _part_added(self, item: OutputItem, part: OutputText | ReasoningText) -> PartAdded:
        return PartAdded(**self._place(), item_id=item.id, part=part)

    def _place(self) -> dict[str, Any]:
        """What all events of the open item have."""
        return {"sequence_number": next(self._numbers), "output_index": len(self.items) - 1}

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._answer_id}_{len(self.items)}"
