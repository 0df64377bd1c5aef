"""Finding marker texts in a text that arrives in pieces, wherever the pieces are cut."""

from __future__ import annotations

from collections.abc import Sequence


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that may be the beginning of `marker`, not all of it."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def cut(text: str, markers: Sequence[str]) -> tuple[str, str | None, str]:
    """Split a text at the first marker: what stands before it, the marker, what is behind it.

    Without one: what cannot belong to any marker, None, and the end that may begin one.
    """
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    if found:
        at, _, marker = min(found)
        return text[:at], marker, text[at + len(marker) :]
    keep = max((overlap(text, marker) for marker in markers), default=0)
    return text[: len(text) - keep], None, text[len(text) - keep :]
