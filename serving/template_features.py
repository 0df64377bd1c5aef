"""What a chat template does with functions, found by rendering small conversations with it.

Templates differ in ways that their text does not tell: some show calls only beside a content of
null and some fail on one, some show no calls, results or functions at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

TOOL_NAME, CALL_NAME, ARGUMENT, RESULT = (
    "probe_tool",
    "probe_call",
    "probe_argument",
    "probe_result",
)
CALL_ID = "probe0001"
"""Nine letters and digits: Mistral's template takes nothing else."""

Render = Callable[[list[dict[str, Any]], None, list[dict[str, Any]] | None], str]


class CallArguments(dict[str, Any]):
    """The arguments of a call for templates, which disagree about what they are.

    Some treat them as an object (`arguments | tojson`), some as its text (`'...' + arguments`).
    """

    def __init__(self, value: dict[str, Any], text: str) -> None:
        super().__init__(value)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFeatures:
    """Attributes:
    tools: functions are offered to the model.
    calls: what content must stand beside calls for the template to show them; "hidden" if it shows
        none.
    results: messages of the role tool are shown.
    """

    tools: bool
    calls: Literal["text", "null", "hidden"]
    results: bool


def probe_template(render: Render) -> TemplateFeatures:
    """The features of a template. What it cannot render it does not have.

    Args:
        render: of messages, None, and functions to the text of a prompt; may raise anything.
    """
    user = {"role": "user", "content": "Hi"}
    schema = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": TOOL_NAME, "parameters": schema}}
    arguments = CallArguments({"a": ARGUMENT}, f'{{"a": "{ARGUMENT}"}}')
    function = {"name": CALL_NAME, "arguments": arguments}
    call = {"id": CALL_ID, "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": CALL_ID, "name": CALL_NAME, "content": RESULT}

    def shown(messages: list[dict[str, Any]], *texts: str, tools: bool = False) -> bool:
        try:
            prompt = render(messages, None, [tool] if tools else None)
        except Exception:  # a template can fail in any way
            return False
        return all(text in prompt for text in texts)

    def called(content: str | None) -> list[dict[str, Any]]:
        return [user, {"role": "assistant", "content": content, "tool_calls": [call]}]

    calls: Literal["text", "null", "hidden"] = "hidden"
    if shown(called(""), CALL_NAME, ARGUMENT):
        calls = "text"
    elif shown(called(None), CALL_NAME, ARGUMENT):
        calls = "null"
    before = [user, {"role": "assistant", "content": "Hi"}]
    if calls != "hidden":
        before = called("" if calls == "text" else None)
    return TemplateFeatures(
        tools=shown([user], TOOL_NAME, tools=True),
        calls=calls,
        results=shown([*before, result], RESULT),
    )
