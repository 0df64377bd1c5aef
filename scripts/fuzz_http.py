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
LEFT_OUT = ("/abort_request", "/flush_cache")
"""They would disturb the other requests of the run."""
REFUSED = ("/v1/embeddings", "/v1/score", "/v1/rerank")

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
]
STRINGS = ["", " ", "a", "ü世🪁", "\u0000", "\u202e", "a" * 5000, "null", "true", "0", "[", "{{x}}"]
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
    b'{"prompt": "a", "prompt": ["b"]}',
    b'{"prompt": "a"} trailing',
    b"\xef\xbb\xbf{}",
    b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"x": ' + b'{"x": ' * 5000,
    b'{"prompt": [' + b"1," * 50_000 + b"1]}",
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
            if path not in LEFT_OUT and "post" in methods:
                content = methods["post"].get("requestBody", {}).get("content", {})
                self._bodies[path] = content.get("application/json", {}).get("schema", {})
        # Routes that only say no are worth few cases.
        self._weights = [0.1 if path in REFUSED else 1.0 for path in self._bodies]
        self._paths = [p for p in sorted(document["paths"]) if p not in LEFT_OUT]

    def case(self) -> Case:
        """The next request."""
        rng = self._rng
        path = rng.choices(list(self._bodies), self._weights)[0]
        method = "POST" if rng.random() < 0.97 else rng.choice(["GET", "PUT", "DELETE", "PATCH"])
        if rng.random() < 0.02:
            path = rng.choice(
                [*self._paths, "/", "/nothing", "/v1/../v1/models", "/%00", "/v1/models/ü"]
            )
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
            given = body.get(name, MAX_TOKENS)
            if name in schema.get("properties", {}) and isinstance(given, int):
                body[name] = min(given, MAX_TOKENS)
        params = body.get("sampling_params")
        for part in params if isinstance(params, list) else [params]:
            if isinstance(part, dict):
                part["max_new_tokens"] = MAX_TOKENS
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 5])):
            name = rng.choice([*(n for n in body if n not in LIMITS), "unknown"])
            body[name] = self._anything(0)
        return body

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
        for several in ("anyOf", "oneOf"):
            if several in schema:
                return self._draw(rng.choice(schema[several]), depth)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        kind = schema.get("type")
        draw: dict[str, Callable[[], Any]] = {
            "object": lambda: self._object(schema, depth),
            "array": lambda: [
                self._draw(schema.get("items", {}), depth + 1)
                for _ in range(rng.choice([0, 1, 1, 2, 5]))
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

    def _array(self, items: Any, depth: int) -> list[Any]:
        return [self._draw(items, depth + 1) for _ in range(self._rng.choice([0, 1, 1, 2, 5]))]

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        rng = self._rng
        needed = schema.get("required", ())
        chance = rng.choice([0.01, 0.03, 0.1, 0.5])
        return {
            name: self._draw(part, depth + 1)
            for name, part in schema.get("properties", {}).items()
            if (name in needed and rng.random() < 0.97) or rng.random() < chance
        }

    def _string(self) -> str:
        rng = self._rng
        if rng.random() < 0.5:
            return rng.choice(STRINGS)
        return "".join(rng.choices(string.printable + "äß€🪁", k=rng.randrange(30)))

    def _number(self, schema: dict[str, Any], *, whole: bool) -> float:
        rng = self._rng
        low, high = schema.get("minimum", -3), schema.get("maximum", 300)
        if rng.random() < 0.15:
            return rng.choice(NUMBERS)
        if rng.random() < 0.2:
            return rng.choice([low, high, low - 1, high + 1])
        low, high = max(low, -(10**6)), min(high, 10**6)
        return rng.randint(int(low), int(high)) if whole else rng.uniform(low, high)


def problem(status: int, headers: Any, content: bytes, case: Case) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    if status >= 500 and status != 503:
        return f"status {status}"
    if b"Traceback" in content:
        return "a traceback"
    if status >= 400 and case.method != "HEAD":
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
