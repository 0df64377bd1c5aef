"""GET /docs: the OpenAPI document as one plain page that needs nothing from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

import msgspec

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; font-family: ui-monospace, monospace; }
h3 { font-size: 1rem; margin: 2rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0;
  border-bottom: 1px solid #ddd; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
nav a { margin-right: .8rem; white-space: nowrap; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; } a { color: #8bf; } td, th { border-color: #444; }
}
"""


def page(document: dict[str, Any]) -> str:
    """HTML of an OpenAPI document: first the paths, then the schemas they name."""
    info, paths = document["info"], document["paths"]
    links = "".join(f'<a href="#{_anchor(path)}">{escape(path)}</a> ' for path in paths)
    schemas = document["components"]["schemas"]
    return "".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(info['title'])}</title><style>{STYLE}</style>",
            f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
            f"<p>{escape(info['description'])} As JSON: <a href='openapi.json'>openapi.json</a>.",
            f"<nav>{links}</nav>",
            *(_path(path, operations) for path, operations in paths.items()),
            "<h1>Schemas</h1>",
            *(_schema(name, schema) for name, schema in schemas.items()),
            "</html>",
        ]
    )


def _path(path: str, operations: dict[str, Any]) -> str:
    methods = ", ".join(method.upper() for method in operations)
    told = next(iter(operations.values()))
    parts = [f'<h2 id="{_anchor(path)}">{methods} {escape(path)}</h2><p>{escape(told["summary"])}']
    if "parameters" in told:
        rows = {one["name"]: one["schema"] for one in told["parameters"]}
        parts.append(_table(rows))
    if "requestBody" in told:
        schema = told["requestBody"]["content"]["application/json"]["schema"]
        parts.append(f"<p>Takes {_type(schema)}.")
    answers = "".join(
        f"<tr><td>{status}<td>{_contents(answer)}<td>{escape(answer['description'])}"
        for status, answer in told["responses"].items()
    )
    return "".join(parts) + f"<table>{answers}</table>"


def _contents(answer: dict[str, Any]) -> str:
    return "<br>".join(
        _type(content["schema"])
        if media_type == "application/json"
        else escape(media_type) + _events(content["schema"])
        for media_type, content in answer.get("content", {}).items()
    )


def _events(schema: dict[str, Any]) -> str:
    if "data" not in schema.get("properties", {}):
        return ""
    data = schema["properties"]["data"]["anyOf"]
    return " of " + " or ".join(_type(one.get("contentSchema", one)) for one in data)


def _schema(name: str, schema: dict[str, Any]) -> str:
    text = escape(schema.get("description", "").split("\n\n")[0])
    required = set(schema.get("required", ()))
    head = f'<h3 id="{_anchor(name)}">{escape(name)}</h3><p>{text}'
    return head + _table(schema.get("properties", {}), required)


def _table(properties: dict[str, Any], required: set[str] | None = None) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in (required or ()) else ''}"
        f"<td>{_type(schema)}<td>{escape(schema.get('description', ''))}"
        for name, schema in properties.items()
    )
    return f"<table>{rows}</table>"


def _type(schema: dict[str, Any]) -> str:
    """A schema's type in a few words; null goes without saying."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{_anchor(name)}">{escape(name)}</a>'
    if "anyOf" in schema:
        kinds = [one for one in schema["anyOf"] if one != {"type": "null"}]
        return " or ".join(_type(one) for one in kinds) + _range(schema)
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"<code>{escape(msgspec.json.encode(v).decode())}</code>" for v in values)
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(schema.get('items') or {})}"
    if isinstance(kind, list):
        kind = " or ".join(kind)
    return escape(kind) + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    words = {
        "minimum": "&ge; ",
        "exclusiveMinimum": "&gt; ",
        "maximum": "&le; ",
        "minLength": "characters &ge; ",
        "maxLength": "characters &le; ",
        "maxProperties": "entries &le; ",
    }
    found = [f"{word}{schema[key]}" for key, word in words.items() if key in schema]
    return f" ({', '.join(found)})" if found else ""


def _anchor(name: str) -> str:
    return escape(name.strip("/").replace("/", "-").replace("{", "").replace("}", ""))
