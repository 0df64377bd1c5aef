"""From the messages of a chat to the tokens of its prompt, through the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from serving.http.errors import ApiError
from serving.http.protocol import ChatBody, Message, MessageToolCall
from serving.http.tool_use import ToolUse
from serving.parsers.reasoning import Begins, ReasoningFormat, begins
from serving.parsers.tool_calls import REQUIRED_CALLS, ToolFormat, describe_tools
from serving.template_features import CallArguments, TemplateFeatures
from serving.tokenizer import ChatTemplateError, Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
"""Roles that templates do not know, and what they know instead."""
TAIL_TOKENS = 16
"""In which the opening marker of thinking is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Attributes:
    begins: where in its thinking the answer begins.
    num_calls: calls that the conversation holds.
    """

    ids: list[int]
    begins: Begins = "free"
    num_calls: int = 0


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
        known = [i for i in body.input_ids[-TAIL_TOKENS:] if 0 <= i < tokenizer.vocab_size]
        tail = tokenizer.decode(known, skip_special_tokens=False)
        return Prompt(
            ids=body.input_ids,
            begins="free" if reasoning is None else begins(tail, "", reasoning),
        )
    messages, begun = to_messages(body), ""
    if body.continue_final_message:
        if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
            raise ApiError(
                "continue_final_message needs a last message of the assistant, without tool calls.",
                param="continue_final_message",
            )
        begun = messages.pop()["content"]
    num_calls = sum(len(message.get("tool_calls", ())) for message in messages)
    shown: list[dict[str, Any]] | None = list(use.tools) or None
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    try:
        if shown or num_calls or any(message["role"] == "tool" for message in messages):
            features = tokenizer.template_features
            messages = fitted(messages, features, use.form or use.native or REQUIRED_CALLS)
            if shown and not features.tools:
                messages, shown = _described(messages, use), None
        text = tokenizer.render_chat(messages, variables, shown)
        return Prompt(
            ids=tokenizer.encode_rendered(text + begun),
            begins="free" if reasoning is None else begins(text, begun, reasoning),
            num_calls=num_calls,
        )
    except ChatTemplateError as error:
        raise ApiError(str(error), param="messages") from None


def fitted(
    messages: Sequence[dict[str, Any]], features: TemplateFeatures, form: ToolFormat
) -> list[dict[str, Any]]:
    """The messages so that the template shows their calls and results: those that it would leave
    out become text of the assistant and of the user.

    Args:
        form: how to write a call.
    """
    told: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of called functions, by the ids of the calls
    in_results = False
    for message in messages:
        calls = message.get("tool_calls", ())
        names |= {call["id"]: call["function"]["name"] for call in calls if "id" in call}
        is_result = message["role"] == "tool" and not features.results
        if calls:
            told += _with_calls(message, features, form)
        elif is_result:
            name = message.get("name") or names.get(message.get("tool_call_id", ""), "the call")
            text = f"Result of {name}:\n{message['content']}"
            if in_results:  # many templates want user and assistant in turn
                told[-1] = {"role": "user", "content": f"{told[-1]['content']}\n\n{text}"}
            else:
                told.append({"role": "user", "content": text})
        else:
            told.append(message)
        in_results = is_result
    return told


def _with_calls(
    message: dict[str, Any], features: TemplateFeatures, form: ToolFormat
) -> list[dict[str, Any]]:
    """A message with calls, as the template takes it."""
    content = message["content"]
    if features.calls == "hidden":
        functions = [call["function"] for call in message["tool_calls"]]
        written = [form.write(each["name"], str(each["arguments"])) for each in functions]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        return [{**rest, "content": "\n".join([*([content] if content else []), *written])}]
    if features.calls == "text":
        return [message]
    silent = {**message, "content": None}
    if not content:
        return [silent]
    silent.pop("reasoning_content", None)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return [rest, silent]


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
    if content is None:
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
        "function": {"name": call.function.name, "arguments": CallArguments(value, text or "{}")},
    }
    return told if call.id is None else {"id": call.id, **told}


def _described(messages: Sequence[dict[str, Any]], use: ToolUse) -> list[dict[str, Any]]:
    """The messages with a description of the functions, for a template that offers none."""
    text = describe_tools(use.tools, use.form)
    first = messages[0] if messages else None
    if first is not None and first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
