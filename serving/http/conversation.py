"""From the messages of a chat to the tokens of its prompt, through the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from serving.http.errors import ApiError
from serving.http.protocol import ChatBody, Message, MessageToolCall
from serving.http.tool_use import ToolUse
from serving.parsers.reasoning import ReasoningFormat
from serving.parsers.tool_calls import describe_tools
from serving.tokenizer import ChatTemplateError, Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
"""Roles that templates do not know, and what they know instead."""
TAIL_TOKENS = 16
"""In which the opening marker of thinking is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Attributes:
    opened: it ends inside the answer's thinking.
    """

    ids: list[int]
    opened: bool


def chat_prompt(
    body: ChatBody, use: ToolUse, tokenizer: Tokenizer, reasoning: ReasoningFormat | None
) -> Prompt:
    """The prompt of a body.

    Raises:
        ApiError: the messages have a wrong form, or the template refuses them.
    """
    if body.input_ids is not None:
        if body.continue_final_message:
            raise ApiError(
                "input_ids and continue_final_message cannot be used together.",
                param="continue_final_message",
            )
        tail = tokenizer.decode(body.input_ids[-TAIL_TOKENS:], skip_special_tokens=False)
        return Prompt(ids=body.input_ids, opened=_is_opened(tail, reasoning))
    messages, begun = to_messages(body), ""
    if body.continue_final_message:
        if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
            raise ApiError(
                "continue_final_message needs a last message of the assistant, without tool calls.",
                param="continue_final_message",
            )
        begun = messages.pop()["content"]
    shown: list[dict[str, Any]] | None = list(use.tools) or None
    if use.tools and not tokenizer.offers_tools:
        messages, shown = _described(messages, use), None
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    try:
        text = tokenizer.render_chat(messages, variables, shown)
        opened = _is_opened(text, reasoning) and (reasoning is None or reasoning.end not in begun)
        return Prompt(ids=tokenizer.encode_rendered(text + begun), opened=opened)
    except ChatTemplateError as error:
        raise ApiError(str(error), param="messages") from None


def _is_opened(text: str, reasoning: ReasoningFormat | None) -> bool:
    return reasoning is not None and text.rstrip().endswith(reasoning.start)


def to_messages(body: ChatBody) -> list[dict[str, Any]]:
    """The messages as templates expect them: plain strings for content, roles that they know.

    Raises:
        ApiError: there are none, or one has a wrong form.
    """
    if body.messages is None:
        raise ApiError("messages is missing.", param="messages")
    if not body.messages:
        raise ApiError("Messages cannot be empty.", param="messages")
    return [_to_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]


def _to_message(message: Message, where: str) -> dict[str, Any]:
    if message.role not in ROLES:
        raise ApiError(
            f"{where}.role must be one of {', '.join(ROLES)}, got '{message.role}'.",
            param="messages",
        )
    content = _text(message, where)
    told: dict[str, Any] = {
        "role": TEMPLATE_ROLES.get(message.role, message.role),
        "content": content,
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            told[name] = value
    if message.tool_calls:
        if message.role != "assistant":
            raise ApiError(f"{where}.tool_calls is the assistant's alone.", param="messages")
        told["tool_calls"] = [
            _to_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
        # Some templates (DeepSeek-V3's) show calls only where there is no content.
        told["content"] = content or None
    elif content is None:
        if message.role != "assistant":
            raise ApiError(f"{where}.content is missing.", param="messages")
        told["content"] = ""
    return told


def _text(message: Message, where: str) -> str | None:
    """The content as one text."""
    content = message.content
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        if part.type != "text":
            raise ApiError(
                f"{where}.content[{i}]: only parts of type 'text' are supported, got "
                f"'{part.type}'.",
                param="messages",
            )
        if part.text is None:
            raise ApiError(f"{where}.content[{i}].text is missing.", param="messages")
    return " ".join(part.text or "" for part in content)


class _Arguments(dict[str, Any]):
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


def _to_call(call: MessageToolCall, where: str) -> dict[str, Any]:
    given = call.function.arguments
    text = given if isinstance(given, str) else msgspec.json.encode(given or {}).decode()
    try:
        value = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(
            f"{where}.function.arguments must be a JSON object, or its text.", param="messages"
        )
    told = {
        "type": call.type,
        "function": {"name": call.function.name, "arguments": _Arguments(value, text or "{}")},
    }
    return told if call.id is None else {"id": call.id, **told}


def _described(messages: Sequence[dict[str, Any]], use: ToolUse) -> list[dict[str, Any]]:
    """The messages with a description of the functions, for a template that offers none."""
    assert use.form is not None
    text = describe_tools(use.tools, use.form)
    first = messages[0] if messages else None
    if first is not None and first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
