"""What the router reads of a request's body: enough to choose a worker, and nothing to change it.

The routing key is what the worker will compute on, in the order in which its prompt has it. It is
cut into blocks, each named by a hash of all text up to its end: two requests share a prefix exactly
as far as their blocks are equal. Blocks grow behind BLOCKS_OF_FIRST_SIZE of them, so that the work
for a long prompt is bounded. Hashes are those of this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

BLOCK_CHARS = 64
BLOCKS_OF_FIRST_SIZE = 256
LONG_BLOCK_CHARS = 1024
FIRST_CHARS = BLOCK_CHARS * BLOCKS_OF_FIRST_SIZE
CHARS_PER_ID = 4
"""A token id counts as so many characters, so that a block holds as much of either."""

ENDPOINTS = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/generate": "generate",
    "/v1/responses": "responses",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
    "/rerank": "rerank",
    "/v1/classify": "classify",
}
NO_MODEL = {"generate": "default"}
"""What a request without a model is called in metrics, by endpoint; others are "unknown"."""
ROUTING_KEY = b"x-smg-routing-key"
TARGET_WORKER = b"x-smg-target-worker"
IMPLICIT_KEYS = (b"authorization", b"x-forwarded-for", b"cookie")


class BadRequest(Exception):
    """A body that no worker could serve.

    Attributes:
        status: of the answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class _Body(msgspec.Struct, gc=False):
    """The fields of any route that routing looks at. Wrong types are the worker's business."""

    model: Any = None
    stream: Any = None
    prompt: Any = None
    messages: Any = None
    tools: msgspec.Raw = msgspec.Raw()
    text: Any = None
    input_ids: Any = None
    input: Any = None
    instructions: Any = None
    query: Any = None
    cache_salt: Any = None
    extra_key: Any = None


_DECODER = msgspec.json.Decoder(_Body)
_ENCODER = msgspec.json.Encoder()


class RoutedRequest:
    """A request to a generating route.

    Attributes:
        endpoint: the route's name in metrics.
        model: "unknown" (or "default") where the body names none.
        stream: the answer is a stream.
        blocks: the routing key, see the module.
        num_chars: length of the whole key, and of the other prompts if there are several.
        by_ids: the key is token ids.
        routing_key: who is to get the same worker again, by the client's header.
        target: index of the worker that the client's header names.
        implicit_key: what tells clients apart that give no key.
    """

    __slots__ = (
        "_chain",
        "_tail",
        "blocks",
        "body",
        "by_ids",
        "endpoint",
        "implicit_key",
        "model",
        "num_chars",
        "path",
        "routing_key",
        "stream",
        "target",
    )

    def __init__(
        self,
        *,
        path: str,
        body: bytes,
        model: str = "unknown",
        stream: bool = False,
        blocks: tuple[int, ...] = (),
        num_chars: int = 0,
    ) -> None:
        self.path = path
        self.endpoint = ENDPOINTS.get(path, "other")
        self.body = body
        self.model = model
        self.stream = stream
        self.blocks = blocks
        self.num_chars = num_chars
        self.by_ids = False
        self._chain = 0
        self._tail: str | list[Any] = ""
        self.routing_key: str | None = None
        self.target: str | None = None
        self.implicit_key: str | None = None

    @classmethod
    def parse(
        cls, path: str, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> RoutedRequest:
        """Read a body.

        Raises:
            BadRequest: it is no JSON object.
        """
        try:
            fields = _DECODER.decode(body)
            key = _key(fields)  # its tools are decoded only here
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise BadRequest(400, f"Failed to parse the request body as JSON: {error}") from None
        model = fields.model
        salt = (model, fields.cache_salt, fields.extra_key)
        seed = hash(salt) if all(s is None or isinstance(s, str) for s in salt) else 0
        by_ids = not isinstance(key, str)
        if isinstance(key, str):
            blocks, num_chars = text_blocks(key, seed), len(key)
        else:
            try:
                blocks, num_chars = id_blocks(key, seed), len(key) * CHARS_PER_ID
            except TypeError:  # no ids: there are lists or objects among them
                blocks, num_chars = (), 0
        num_chars += _other_prompts(fields)
        request = cls(
            path=path,
            body=body,
            stream=fields.stream is True,
            blocks=blocks,
            num_chars=num_chars,
        )
        request.by_ids = by_ids
        request._chain = blocks[-1] if blocks else _first_link(seed, by_ids)
        end = block_end(len(blocks) - 1) if blocks else 0
        request._tail = key[end // CHARS_PER_ID if by_ids else end :]
        if isinstance(model, str) and model:
            request.model = model
        else:
            request.model = NO_MODEL.get(request.endpoint, "unknown")
        request._read_headers(headers)
        return request

    def blocks_with(self, answer: str | Sequence[int]) -> tuple[int, ...]:
        """The blocks of the prompt and its answer: how the next request of a conversation begins.

        Args:
            answer: token ids if the prompt is `by_ids`, else text.
        """
        if self.endpoint == "chat" and isinstance(answer, str):
            answer = f"{_turn('assistant')}{answer}"
        rest = [*self._tail, *answer] if self.by_ids else f"{self._tail}{answer}"
        blocks, chain, at = list(self.blocks), self._chain, 0
        while True:
            long = len(blocks) >= BLOCKS_OF_FIRST_SIZE
            size = LONG_BLOCK_CHARS if long else BLOCK_CHARS
            if self.by_ids:
                size //= CHARS_PER_ID
            if at + size > len(rest):
                return tuple(blocks)
            piece = rest[at : at + size]
            chain = hash((chain, piece)) if isinstance(piece, str) else hash((chain, *piece))
            blocks.append(chain)
            at += size

    def _read_headers(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        for name, value in headers:
            if name == ROUTING_KEY:
                self.routing_key = value.decode("latin-1")
            elif name == TARGET_WORKER:
                self.target = value.decode("latin-1")
            elif name in IMPLICIT_KEYS and self.implicit_key is None:
                self.implicit_key = value.decode("latin-1")


def block_end(index: int) -> int:
    """Characters up to the end of block `index`."""
    if index < BLOCKS_OF_FIRST_SIZE:
        return BLOCK_CHARS * (index + 1)
    return FIRST_CHARS + LONG_BLOCK_CHARS * (index + 1 - BLOCKS_OF_FIRST_SIZE)


def text_blocks(text: str, seed: int = 0) -> tuple[int, ...]:
    """The hashes of the full blocks of a text."""
    blocks, chain, size = [], seed, len(text)
    first = min(size, FIRST_CHARS)
    for end in range(BLOCK_CHARS, first + 1, BLOCK_CHARS):
        chain = hash((chain, text[end - BLOCK_CHARS : end]))
        blocks.append(chain)
    for end in range(FIRST_CHARS + LONG_BLOCK_CHARS, size + 1, LONG_BLOCK_CHARS):
        chain = hash((chain, text[end - LONG_BLOCK_CHARS : end]))
        blocks.append(chain)
    return tuple(blocks)


def id_blocks(ids: Sequence[Any], seed: int = 0) -> tuple[int, ...]:
    """The hashes of the full blocks of a list of token ids."""
    blocks, chain, start = [], _first_link(seed, True), 0
    for index in range(len(ids) // (BLOCK_CHARS // CHARS_PER_ID) + 1):
        end = block_end(index) // CHARS_PER_ID
        if end > len(ids):
            break
        chain = hash((chain, *ids[start:end]))
        blocks.append(chain)
        start = end
    return tuple(blocks)


def _first_link(seed: int, by_ids: bool) -> int:
    """What the chain of blocks begins with: ids are never text."""
    return hash((seed, "ids")) if by_ids else seed


def with_fields(body: bytes, fields: dict[str, Any]) -> bytes:
    """A JSON object's bytes with more fields at its end, the rest as it was.

    The last of two equal names wins in every decoder, so these fields do.
    """
    end = body.rstrip(b" \t\r\n")
    head = end[:-1].rstrip(b" \t\r\n")
    comma = b"" if head.endswith(b"{") else b","
    return head + comma + _ENCODER.encode(fields)[1:]


# ---- the routing key ---------------------------------------------------------------------------


def _key(body: _Body) -> str | list[Any]:
    """What the worker's prompt is made of, in its order: text, or token ids."""
    if body.messages is not None:
        # Templates put tools in front of everything.
        tools = bytes(body.tools)
        front = "" if tools in (b"", b"null") else tools.decode()
        return front + _conversation(body.messages)
    for prompt in (body.prompt, body.text, body.input_ids):
        if prompt is not None:
            return _prompt(prompt)
    if body.input is not None:  # /v1/responses, or texts to embed
        front = _text(body.instructions) if body.instructions is not None else ""
        return front + (
            _conversation(body.input) if isinstance(body.input, list) else _text(body.input)
        )
    return _text(body.query) if body.query is not None else ""


def _prompt(prompt: Any) -> str | list[Any]:
    """One prompt, or the first of several: where it is cached, the others most likely are."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            return prompt
        return _prompt(prompt[0])
    return ""


def _other_prompts(body: _Body) -> int:
    """Characters of all prompts but the first: they are not matched, and must be computed."""
    if body.messages is not None:
        return 0
    prompts = next((p for p in (body.prompt, body.text, body.input_ids) if p is not None), None)
    if not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int):
        return 0
    return sum(
        len(prompt) * (1 if isinstance(prompt, str) else CHARS_PER_ID)
        for prompt in prompts[1:]
        if isinstance(prompt, str | list)
    )


def _conversation(messages: Any) -> str:
    """Messages with their roles, in order."""
    if not isinstance(messages, list):
        return _text(messages)
    parts: list[str] = []
    for message in messages:
        if not isinstance(message, dict):
            parts.append(_text(message))
            continue
        parts.append(_turn(message.get("role")))
        content = message.get("content")
        if isinstance(content, str):
            parts.append(content)
        elif isinstance(content, list):
            parts.extend(map(_part, content))
        for name in ("tool_calls", "tool_call_id", "name", "output", "arguments"):
            value = message.get(name)
            if value is not None:
                parts.append(_text(value))
    return "".join(parts)


def _turn(role: Any) -> str:
    """What a message begins with."""
    return f"\x02{role}\x03"


def _part(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    # An image of a megabyte is not a megabyte of text.
    return f"\x04{hash(_text(part)):x}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _ENCODER.encode(value).decode()
