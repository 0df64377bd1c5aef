"""Which functions a chat may call, checked: what the template shows, how calls are read, what is
demanded.

Where a call is demanded, a grammar makes the answer a JSON array of calls, whatever the model's own
format is; else calls are found in the text by the format of --tool-call-parser.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from serving.http.errors import ApiError
from serving.http.protocol import ChatBody, NamedTool, Tool
from serving.parsers.tool_calls import (
    REQUIRED_CALLS,
    TOOL_FORMATS,
    ToolFormat,
    infer_tool_format,
)
from serving.request import Grammar

CHOICES = ("auto", "none", "required")
MAX_TOOLS = 512
VALUES = ("const", "enum", "default", "examples")
"""Keywords of a schema that hold values, not schemas."""
NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keywords that hold schemas by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The functions of a chat.

    Attributes:
        tools: as templates expect them; empty where none are shown.
        form: how calls are written; None leaves them in the content.
        native: the model's own format, also where `form` is another; None where nothing tells.
        schemas: the parameters of the functions, by name.
        grammar: what a demanded call looks like; None where calls are free.
    """

    tools: tuple[dict[str, Any], ...] = ()
    form: ToolFormat | None = None
    native: ToolFormat | None = None
    schemas: dict[str, Any] = field(default_factory=dict)
    grammar: Grammar | None = None


def tool_use(body: ChatBody, *, parser: str, chat_template: str | None) -> ToolUse:
    """What a body says of functions.

    Args:
        parser: the value of --tool-call-parser.
        chat_template: the model's, which "auto" infers the format from.

    Raises:
        ApiError: `tools` or `tool_choice` has a wrong form, or calls cannot be read.
    """
    tools, choice = body.tools or [], body.tool_choice
    if choice is None:
        choice = "auto"
    if isinstance(choice, str) and choice not in CHOICES:
        raise ApiError(
            f"tool_choice must be one of {', '.join(CHOICES)}, or name a function, got "
            f"'{choice[:64]}'.",
            param="tool_choice",
        )
    native = _native(parser, chat_template)
    if not tools:
        if choice == "required":
            raise ApiError(
                "Tools cannot be empty if tool choice is set to required.", param="tool_choice"
            )
        if isinstance(choice, NamedTool):
            raise ApiError(
                "Tools cannot be empty if tool choice is set to a specific tool.",
                param="tool_choice",
            )
        return ToolUse(native=native)
    _check(tools)
    if choice == "none":
        return ToolUse(native=native)
    shown = tuple(_shown(tool) for tool in tools)
    schemas = {tool.function.name: _parameters(tool) for tool in tools}
    if choice == "auto":
        if native is None and parser != "none":
            raise ApiError(
                "The chat template of this model does not show how it writes tool calls: start the "
                f"server with --tool-call-parser ({', '.join(TOOL_FORMATS)}, or none to get them "
                "as text), or set tool_choice to 'required' or to a function.",
                param="tools",
            )
        return ToolUse(tools=shown, form=native, native=native, schemas=schemas)
    demanded = tools
    if isinstance(choice, NamedTool):
        name = choice.function.name
        demanded = [tool for tool in tools if tool.function.name == name]
        if not demanded:
            raise ApiError(f"Tool '{name}' not found in tools list.", param="tool_choice")
    one = isinstance(choice, NamedTool) or body.parallel_tool_calls is False
    try:
        schema = msgspec.json.encode(_calls_schema(demanded, most=1 if one else None)).decode()
    except RecursionError:
        raise ApiError(
            "A function has invalid 'parameters' schema: it is nested too deeply.", param="tools"
        ) from None
    return ToolUse(
        tools=shown,
        form=REQUIRED_CALLS,
        native=native,
        schemas=schemas,
        grammar=Grammar(kind="json_schema", text=schema),
    )


def _check(tools: list[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise ApiError(f"tools may hold {MAX_TOOLS} functions, got {len(tools)}.", param="tools")
    names = set()
    for i, tool in enumerate(tools):
        if tool.type != "function":
            raise ApiError(
                f"tools[{i}].type must be 'function', got '{tool.type[:64]}'.", param="tools"
            )
        name, parameters = tool.function.name, tool.function.parameters
        if not name or name in names:
            problem = "is used twice" if name else "is empty"
            raise ApiError(f"tools[{i}].function.name {problem}.", param="tools")
        names.add(name)
        if isinstance(parameters, dict) and not isinstance(parameters.get("properties", {}), dict):
            raise ApiError(
                f"Tool {i} function has invalid 'parameters' schema: properties must be an object.",
                param="tools",
            )
        if parameters is not None and not isinstance(parameters, dict):
            raise ApiError(
                f"Tool {i} function has invalid 'parameters' schema: it must be an object.",
                param="tools",
            )


def _native(parser: str, chat_template: str | None) -> ToolFormat | None:
    """How the model writes calls by itself; None where nothing tells, or nobody wants to know."""
    name = infer_tool_format(chat_template or "") if parser == "auto" else parser
    return None if name is None or name == "none" else TOOL_FORMATS[name]


def _shown(tool: Tool) -> dict[str, Any]:
    """A tool as templates expect it, without what was not given."""
    fields = msgspec.to_builtins(tool)
    function = {key: value for key, value in fields["function"].items() if value is not None}
    return {"type": tool.type, "function": function}


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object"}


def _calls_schema(tools: list[Tool], *, most: int | None) -> dict[str, Any]:
    """A JSON array of calls of these functions."""
    definitions, calls = {}, []
    for i, tool in enumerate(tools):
        parameters = _parameters(tool)
        # References are from the top of a schema: one that has some is moved, and they with it.
        moved = _moved(parameters, f"#/$defs/{i}")
        if moved != parameters:
            definitions[str(i)] = moved
            parameters = {"$ref": f"#/$defs/{i}"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = {"type": "array", "minItems": 1, "items": items}
    if most is not None:
        schema["maxItems"] = most
    return {**schema, "$defs": definitions} if definitions else schema


def _moved(schema: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy of a schema for another place: its references to itself hold there."""
    moved: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema))
    moved.pop("$id", None)  # would make its own top the one that "#" means
    nodes: list[tuple[Any, bool]] = [(moved, False)]
    while nodes:  # no recursion: a schema can be nested deeper than the interpreter's stack
        node, named = nodes.pop()
        if isinstance(node, list):
            nodes += [(part, False) for part in node]
        elif isinstance(node, dict):
            target = node.get("$ref")
            if not named and isinstance(target, str) and (target == "#" or target[:2] == "#/"):
                node["$ref"] = where + target[1:]
            nodes += [
                (value, key in NAMED and not named)
                for key, value in node.items()
                if named or key not in VALUES
            ]
    return moved
