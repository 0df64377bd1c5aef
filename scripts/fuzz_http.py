"""Wrong requests to a running server: none may be a 5xx, a traceback, a hang, or leave a trace.

  python scripts/fuzz_http.py --url http://127.0.0.1:30000 --cases 10000 --seed 1

Routes and bodies are drawn from what the server's own OpenAPI document says, then broken: wrong
types, huge numbers, NaN, deep nesting, invalid UTF-8, wrong content types, cut off and repeated
keys. At the end an ordinary request must work and nothing may be running.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx

from scripts.benchmarking import emit, say, table

HANG_S = 60.0
"""No request of these may take so long."""
MAX_TOKENS = 4
LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens")
REFUSED = ("/v1/embeddings", "/v1/score", "/v1/rerank")
SHARED = ("/abort_request", "/flush_cache")
"""They may end what others asked for, which must be harmless, too."""
FEW = 0.1
NOT_FLUSHED = ("/flush_cache", b"Cache not flushed: requests are running or waiting.\n")
"""The one refusal that is a text, as SGLang's is."""

NUMBERS = [
    0,
    -1,
    1,
    2,
    5,
    1.5,
    -0.0,
    1e-12,
    2**31,
    2**53,
    2**63,
    2**64,
    -(2**63) - 1,
    10**40,
    1e308,
    float("nan"),
    float("-inf"),
]
STRINGS = ["", " ", "a", "ü世🪁", "\u0000", "\u202e", "a" * 5000, "null", "true", "0", "[", "{{x}}"]
JSON_SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"enum": ["yes", "no"]},
    {"$ref": "#/$defs/x", "$defs": {"x": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/x"}]}}},
    {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    {"not": {}},
    {"$ref": "#"},
]
BOUNDS = ("minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength")
ODD_PATHS = ["/", "/nothing", "/v1/../v1/models", "/%00", "/v1/models/ü"]
RAW = [
    b"",
    b"null",
    b"[]",
    b"{",
    b'"x"',
    b"NaN",
    b'{"prompt": NaN}',
    b'{"temperature": Infinity, "prompt": "a"}',
    b'{"temperature": 1e999, "prompt": "a"}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "a", "prompt": ["b"]}',
    b'{"prompt": "a"} trailing',
    b"\xef\xbb\xbf{}",
    b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"x": ' + b'{"x": ' * 5000,
    b'{"prompt": [' + b"1," * 50_000 + b"1]}",
    b'{"messages": [' + b'{"role": "user", "content": "a"},' * 5000 + b"{}]}",
    b'{"input_ids": [' + b"[1]," * 5000 + b"[1]]}",
    b'{"stop": [' + b'"a",' * 20_000 + b'"b"], "prompt": "a"}',
    b'{"logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(20_000)) + b'}, "prompt": "a"}',
    b'{"prompt": ' + b"9" * 5000 + b"}",
    b'{"max_tokens": 1e400, "prompt": "a"}',
    b'{"max_tokens": ' + b"9" * 5000 + b', "prompt": "a"}',
    b'{"prompt": "a", "\\udc00": 1, "rid": "\\ud800"}',
    b'{"text": "\\udfff", "sampling_params": {"max_new_tokens": -Infinity}}',
    b'{"messages": [{"role": "user", "content": "\\udfff\\ud800"}]}',
]
MEDIA_TYPES = ["application/json"] * 100 + [
    "application/json; charset=utf-8",
    "text/plain",
    "",
    "multipart/form-data; boundary=x",
    "APPLICATION/JSON",
    "application/x-www-form-urlencoded",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request."""

    method: str
    path: str
    content: bytes
    media_type: str


class Fuzzer:
    """Draws requests from an OpenAPI document. The same seed draws the same."""

    def __init__(self, document: dict[str, Any], seed: int) -> None:
        self._schemas = document.get("components", {}).get("schemas", {})
        self._rng = random.Random(seed)
        self._bodies: dict[str, Any] = {}
        for path, methods in sorted(document["paths"].items()):
            if "post" in methods:
                content = methods["post"].get("requestBody", {}).get("content", {})
                self._bodies[path] = content.get("application/json", {}).get("schema", {})
        # Routes that only say no are worth few cases, and those that end others' answers are few.
        self._weights = [FEW if path in (*REFUSED, *SHARED) else 1.0 for path in self._bodies]
        self._paths = sorted(document["paths"])

    def case(self) -> Case:
        """The next request."""
        rng = self._rng
        path = rng.choices(list(self._bodies), self._weights)[0]
        method = "POST" if rng.random() < 0.97 else rng.choice(["GET", "PUT", "DELETE", "PATCH"])
        if rng.random() < 0.02:
            path = rng.choice([*self._paths, *ODD_PATHS])
        if rng.random() < 0.06:
            content = rng.choice(RAW)
        else:
            schema = self._bodies.get(path, {})
            body = self._draw(schema, 0)
            body = self._broken(body, schema) if isinstance(body, dict) else body
            content = self._encode(body)
        return Case(method=method, path=path, content=content, media_type=rng.choice(MEDIA_TYPES))

    def _encode(self, body: Any) -> bytes:
        content = json.dumps(body).encode()
        if self._rng.random() < 0.02 and isinstance(body, dict) and body:
            # The last of two equal keys counts, if any; json.dumps cannot say a key twice.
            name = self._rng.choice(list(body))
            again = json.dumps({name: self._anything(0)}).encode()
            content = content[:-1] + b", " + again[1:]
        if self._rng.random() < 0.03:
            at = self._rng.randrange(len(content))
            content = content[:at] + self._rng.randbytes(2) + content[at + 1 :]
        elif self._rng.random() < 0.02:
            content = content[: self._rng.randrange(len(content))]
        return content

    def _broken(self, body: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
        """The body with some fields of the wrong kind, and bounded work."""
        rng = self._rng
        schema = self._schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
        for name in LIMITS:
            given = body.get(name)
            if name in schema.get("properties", {}) and isinstance(given, int | None):
                body[name] = MAX_TOKENS if given is None else min(given, MAX_TOKENS)
        params = body.get("sampling_params")
        for part in params if isinstance(params, list) else [params]:
            if isinstance(part, dict):
                part["max_new_tokens"] = MAX_TOKENS
        if rng.random() < 0.02:
            return dict.fromkeys(body) if rng.random() < 0.5 else self._all_null(schema)
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 5])):
            name = rng.choice([*(n for n in body if n not in LIMITS), "unknown"])
            body[name] = self._anything(0)
        return body

    def _all_null(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Every field null, but for what the route needs and what bounds its work."""
        properties, needed = schema.get("properties", {}), schema.get("required", ())
        body = dict.fromkeys(properties) | {n: self._draw(properties[n], 1) for n in needed}
        return body | {name: MAX_TOKENS for name in LIMITS if name in properties}

    def _anything(self, depth: int) -> Any:
        rng = self._rng
        kind = rng.randrange(6 if depth < 3 else 4)
        if kind == 0:
            return rng.choice([None, True, False])
        if kind == 1:
            return rng.choice(NUMBERS)
        if kind in (2, 3):
            return rng.choice(STRINGS)
        if kind == 4:
            return [self._anything(depth + 1) for _ in range(rng.choice([0, 1, 2, 3, 40]))]
        names = [*STRINGS[:6], "type", "content", "role", "properties", "$ref", "function"]
        return {rng.choice(names): self._anything(depth + 1) for _ in range(rng.randrange(4))}

    def _draw(self, schema: Any, depth: int) -> Any:
        """A value that a schema allows, more or less."""
        rng = self._rng
        if not isinstance(schema, dict) or depth > 5 or not schema:
            return self._anything(depth)
        if "$ref" in schema:
            return self._draw(self._schemas.get(schema["$ref"].rpartition("/")[2]), depth)
        if "properties" in schema:
            return self._object(schema, depth)
        for several in ("anyOf", "oneOf"):
            if several in schema:  # the bounds of a field stand beside its alternatives
                bounds = {name: schema[name] for name in BOUNDS if name in schema}
                return self._draw(bounds | rng.choice(schema[several]), depth)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        kind = schema.get("type")
        draw: dict[str, Callable[[], Any]] = {
            "object": lambda: self._object(schema, depth),
            "array": lambda: [
                self._draw(schema.get("items", {}), depth + 1)
                for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 5]))
            ],
            "string": self._string,
            "integer": lambda: self._number(schema, whole=True),
            "number": lambda: self._number(schema, whole=False),
            "boolean": lambda: rng.random() < 0.5,
            "null": lambda: None,
        }
        if isinstance(kind, list):
            kind = rng.choice(kind)
        return draw[kind]() if kind in draw else self._anything(depth)

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        rng = self._rng
        properties = schema.get("properties", {})
        if not properties:
            values = schema.get("additionalProperties", {})
            names = [self._name() for _ in range(rng.randrange(3))]
            some = {name: self._draw(values, depth + 1) for name in names}
            return rng.choice([some, *JSON_SCHEMAS])
        needed, fixed = self._needed(schema)
        chance = rng.choice([0.0, 0.01, 0.03, 0.1, 0.5])
        drawn = {}
        for name, part in properties.items():
            if name in needed and rng.random() < 0.97:
                value = self._draw(fixed.get(name, part), depth + 1)
                for _ in range(5):  # null is allowed by the type, but not here
                    value = self._draw(part, depth + 1) if value is None else value
                drawn[name] = value
            elif rng.random() < chance:
                drawn[name] = self._draw(part, depth + 1)
        return drawn

    def _needed(self, schema: dict[str, Any]) -> tuple[set[str], dict[str, Any]]:
        """Fields without which an object is wrong, and the values that some must have.

        Where there are alternatives, it is one of them.
        """
        needed, fixed = set(schema.get("required", ())), {}
        for name, part in schema.get("properties", {}).items():
            if "const" in part or "enum" in part:
                fixed[name] = part
        parts = [*schema.get("allOf", ()), *(schema[one] for one in ("else",) if one in schema)]
        parts += [self._rng.choice(schema[one]) for one in ("anyOf", "oneOf") if one in schema]
        for part in parts:
            more_needed, more_fixed = self._needed(part)
            needed, fixed = needed | more_needed, fixed | more_fixed
        return needed, fixed

    def _name(self) -> str:
        return self._rng.choice([*STRINGS, *map(str, range(20))])

    def _string(self) -> str:
        rng = self._rng
        if rng.random() < 0.2:
            return rng.choice(STRINGS)
        return "".join(rng.choices(string.printable + "äß€🪁", k=rng.randrange(30)))

    def _number(self, schema: dict[str, Any], *, whole: bool) -> float:
        rng = self._rng
        low, high = schema.get("minimum", -3), schema.get("maximum", 300)
        if rng.random() < 0.03:
            return rng.choice(NUMBERS)
        if rng.random() < 0.05:
            return rng.choice([low, high, low - 1, high + 1])
        low, high = max(low, -(10**6)), min(high, 10**6)
        return rng.randint(int(low), int(high)) if whole else rng.uniform(low, high)


def problem(status: int, headers: Any, content: bytes, case: Case) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    if status >= 500 and status != 503:
        return f"status {status}"
    if b"Traceback" in content:
        return "a traceback"
    if status >= 400 and (case.path, content) != NOT_FLUSHED:
        try:
            body = json.loads(content)
        except ValueError:
            return f"status {status} with a body that is no JSON"
        error = body.get("error", body) if isinstance(body, dict) else {}
        if not isinstance(error, str) and not error.get("message"):
            return f"status {status} without a message"
    if b'"code":500' in content and b"event-stream" in str(headers.get("content-type")).encode():
        return "an internal error in a stream"
    return None


async def fuzz(
    http: httpx.AsyncClient, cases: Sequence[Case], concurrency: int
) -> tuple[Counter[int], list[str]]:
    """Send them all; answers by status, and what was wrong."""
    statuses: Counter[int] = Counter()
    problems: list[str] = []
    queue = iter(cases)

    async def client() -> None:
        for case in queue:
            headers = {"content-type": case.media_type} if case.media_type else {}
            try:
                async with asyncio.timeout(HANG_S):
                    response = await http.request(
                        case.method, case.path, content=case.content, headers=headers
                    )
                wrong = problem(response.status_code, response.headers, response.content, case)
                statuses[response.status_code] += 1
            except TimeoutError:
                wrong = f"no answer within {HANG_S:g} s"
            except httpx.HTTPError as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong is not None:
                problems.append(f"{wrong}: {case.method} {case.path} {case.content[:2000]!r}")

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return statuses, problems


async def is_idle(http: httpx.AsyncClient) -> str | None:
    """What is still there after all answers; None if nothing."""
    left: dict[str, float] = {}
    for _ in range(100):
        loads = (await http.get("/v1/loads")).json()["loads"]
        left = {
            name: sum(load.get(name) or 0 for load in loads)
            for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        }
        if not any(left.values()):
            return None
        await asyncio.sleep(0.1)
    return f"after all answers there are {left}"


async def run(args: argparse.Namespace) -> int:
    async with httpx.AsyncClient(base_url=args.url, timeout=None) as http:
        document = (await http.get("/openapi.json")).json()
        fuzzer = Fuzzer(document, args.seed)
        cases = [fuzzer.case() for _ in range(args.cases)]
        began = time.perf_counter()
        statuses, problems = await fuzz(http, cases, args.concurrency)
        seconds = time.perf_counter() - began
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": 4}
        after = await http.post("/v1/completions", json=body)
        if after.status_code != 200:
            problems.append(f"an ordinary request afterwards: {after.status_code} {after.text}")
        if (left := await is_idle(http)) is not None:
            problems.append(left)
    say(table([{"status": status, "answers": n} for status, n in sorted(statuses.items())]))
    say(f"{len(cases)} requests in {seconds:.0f} s, {len(problems)} problems")
    for text in problems[:20]:
        say(f"  {text}")
    emit(
        "fuzz_http",
        configuration={"cases": args.cases, "seed": args.seed, "concurrency": args.concurrency},
        results={"statuses": dict(statuses), "problems": len(problems), "seconds": seconds},
    )
    return 1 if problems else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=8)
    args = parser.parse_args(argv)
    try:
        return asyncio.run(run(args))
    except httpx.ConnectError as error:
        print(f"fuzz_http.py: error: no server at {args.url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
