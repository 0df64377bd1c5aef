"""What the router reads and changes in a stream of server-sent events.

`PassedStream` hands bytes on untouched, whole events at a time. `ContinuedStream` is for workers
that can go on with another worker's stream: it remembers the token ids of every answer (and hides
them from a client that did not ask), tells what to send to the next worker when a stream breaks,
and makes the pieces one stream, with one id, one role, one usage and one [DONE]. Neither does any
input or output, and what they remember is bounded.
"""

from __future__ import annotations

import re
from array import array
from typing import Annotated, Any

import msgspec

DONE = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = 4 << 20
"""A longer piece without an event's end is handed on as it is, or breaks a continued stream."""
MAX_TOKENS = 1 << 20
"""Token ids that are remembered for one stream (8 MiB); a longer one cannot go on elsewhere."""

_TOKEN_IDS = re.compile(rb',"token_ids":\[[0-9,]*\]')


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    """What an answer cost, as OpenAI's routes tell it (`usage`), or /generate (`meta_info`)."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    cached_tokens: int | None = None

    @property
    def cached(self) -> int | None:
        """Prompt tokens that the worker had in its cache, if it says so."""
        details = self.prompt_tokens_details
        return self.cached_tokens if details is None else details.cached_tokens


class _Told(msgspec.Struct, gc=False):
    """Where an answer, or an event of one, tells its usage."""

    usage: Usage | None = None
    meta_info: Usage | None = None


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    text: str | None = None
    delta: _Delta | None = None


class _WholeChoice(msgspec.Struct, gc=False):
    text: str | None = None
    message: _Delta | None = None


class _Whole(msgspec.Struct, gc=False):
    """A plain answer: that of completions or chat, or of /generate."""

    usage: Usage | None = None
    meta_info: Usage | None = None
    text: str | None = None
    choices: list[_WholeChoice] | None = None


class _Error(msgspec.Struct, gc=False):
    code: Any = None
    message: str = ""


class _Chunk(msgspec.Struct, gc=False):
    id: str = ""
    created: int = 0
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: _Error | None = None


_TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Begun(msgspec.Struct, gc=False):
    """An answer that the client itself goes on with."""

    token_ids: list[_TokenId] | None = None
    finished: bool | None = None


class _Asked(msgspec.Struct, gc=False):
    """The fields of a request that decide whether and how its stream can go on."""

    seed: int | None = None
    n: int | None = None
    return_token_ids: bool | None = None
    echo: bool | None = None
    continue_from: list[_Begun] | None = None
    stream_options: dict[str, Any] | None = None


class _Size(msgspec.Struct, gc=False):
    """The fields that decide how many answers there are."""

    n: int | None = None
    prompt: Any = None


_TOLD = msgspec.json.Decoder(_Told)
_WHOLE = msgspec.json.Decoder(_Whole)
_CHUNK = msgspec.json.Decoder(_Chunk)
_ASKED = msgspec.json.Decoder(_Asked)
_SIZE = msgspec.json.Decoder(_Size)
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoders raise."""


def usage_of(content: bytes) -> Usage | None:
    """The usage that a JSON answer or event tells, if it does."""
    try:
        told = _TOLD.decode(content)
    except _UNREADABLE:
        return None
    return told.usage or told.meta_info


def usage_and_text_of(content: bytes) -> tuple[Usage | None, str]:
    """What a plain JSON answer cost, and the text of its first choice, empty if it has none."""
    try:
        whole = _WHOLE.decode(content)
    except _UNREADABLE:
        return usage_of(content), ""
    text = whole.text
    if text is None and whole.choices:
        first = whole.choices[0]
        text = first.message.content if first.message is not None else first.text
    return whole.usage or whole.meta_info, text or ""


class Events:
    """Cuts bytes into whole events."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = b""

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def feed(self, data: bytes) -> bytes:
        """All whole events so far that were not returned yet, the last one's end included."""
        pending = self._pending
        if pending:
            data = pending + data
        if data.endswith((b"\n\n", b"\r\n\r\n")):
            self._pending = b""
            return data
        end = data.rfind(b"\n\n") + 2
        if b"\r" in data:
            end = max(end, data.rfind(b"\n\r\n") + 3)
        if end < 4:
            end = 0  # neither is there
        self._pending = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """What is left, an event without an end."""
        rest, self._pending = self._pending, b""
        return rest


class PassedStream:
    """A stream that goes to the client as it comes; only its usage is noticed.

    Attributes:
        usage: what the last event with a usage told.
        num_events: data events so far.
        complete: [DONE] was there.
        failure: never set: what such a stream says of itself is the client's to read.
    """

    __slots__ = ("_events", "complete", "failure", "num_events", "usage")

    def __init__(self) -> None:
        self._events = Events()
        self.usage: Usage | None = None
        self.num_events = 0
        self.complete = False
        self.failure: str | None = None

    def feed(self, data: bytes) -> bytes:
        """What the client gets of it now."""
        ready = self._events.feed(data)
        if not ready:
            if self._events.num_pending > MAX_EVENT_BYTES:
                return self._events.rest()
            return b""
        self.num_events += ready.count(b"data:")
        if b'"usage":{' in ready or b'"usage": {' in ready or b'"cached_tokens":' in ready:
            self._find_usage(ready)
        if b"[DONE]" in ready:
            self.complete = True
        return ready

    def rest(self) -> bytes:
        """What comes after the last whole event, at the clean end of the stream."""
        return self._events.rest()

    def _find_usage(self, ready: bytes) -> None:
        for event in ready.splitlines():
            if event.startswith(b"data:"):
                self.usage = usage_of(event[5:]) or self.usage


class ContinuedStream:
    """One client's stream over as many workers as it takes.

    Args:
        body: the client's request, JSON.

    Attributes:
        fields: what must be added to the body before it goes to the first worker.
        usage, num_events, complete: as of `PassedStream`.
        failure: why this worker's stream cannot be used any more, though it has not ended.
    """

    __slots__ = (
        "_answers",
        "_body",
        "_created",
        "_events",
        "_finished",
        "_hide",
        "_id",
        "_include_usage",
        "_lossy",
        "_num_tokens",
        "_opened",
        "_resumed",
        "_text",
        "_told_total",
        "complete",
        "failure",
        "fields",
        "num_events",
        "usage",
    )

    def __init__(self, body: bytes, asked: _Asked, seed: int) -> None:
        self._body = body
        self._events = Events()
        self._answers: dict[int, array[int]] = {}
        self._finished: set[int] = set()
        self._opened: set[int] = set()
        self._hide = not asked.return_token_ids
        self._include_usage = bool((asked.stream_options or {}).get("include_usage"))
        self._id = ""
        self._created = 0
        self._num_tokens = 0
        self._lossy = False
        self._resumed = False
        self._text: list[str] = []
        self._told_total = False
        self.usage: Usage | None = None
        self.num_events = 0
        self.complete = False
        self.failure: str | None = None
        self.fields: dict[str, Any] = {}
        if self._hide:
            self.fields["return_token_ids"] = True
        if asked.seed is None:
            self.fields["seed"] = seed
        for index, begun in enumerate(asked.continue_from or ()):
            self._answers[index] = array("q", begun.token_ids or ())
            if begun.finished:
                self._finished.add(index)

    @classmethod
    def of(cls, body: bytes, seed: int) -> ContinuedStream | None:
        """For a streamed chat or completions body; None if its stream could not go on elsewhere.

        Args:
            seed: what the answer draws from if the client gave none.
        """
        try:
            asked = _ASKED.decode(body)
        except _UNREADABLE:
            return None  # the worker will say what is wrong with it
        return None if asked.echo else cls(body, asked, seed)

    @property
    def first_text(self) -> str:
        """The text of the first answer so far; empty for one that is too long to be remembered."""
        return "".join(self._text)

    @property
    def first_ids(self) -> list[int]:
        """The tokens of the first answer so far, likewise."""
        return list(self._answers.get(0, ()))

    @property
    def can_go_on(self) -> bool:
        """Whether everything is known that another worker needs."""
        return self._num_tokens <= MAX_TOKENS and not self._lossy

    @property
    def only_done_missing(self) -> bool:
        """Whether the client has everything but [DONE]."""
        if self._told_total:
            return True
        if self._include_usage or not self._finished:
            return False
        return len(self._finished) >= self._num_answers()

    def feed(self, data: bytes) -> bytes:
        """What the client gets of it now; nothing any more once `failure` or `complete` is set."""
        ready = self._events.feed(data)
        if not ready:
            if self._events.num_pending > MAX_EVENT_BYTES:
                self.failure = "it sent an event of more than 4 MiB"
            return b""
        out = []
        for event in ready.replace(b"\r\n", b"\n").split(b"\n\n"):
            if self.failure is not None or self.complete:
                break
            if event:
                out.append(self._event(event))
        return b"".join(out)

    def rest(self) -> bytes:
        """Nothing: an event without an end is worth nothing."""
        self._events.rest()
        return b""

    def fields_to_continue(self) -> dict[str, Any]:
        """What must be added to the client's body for the next worker. Starts a new piece."""
        self._events.rest()
        self.failure = None
        self._resumed = self._id != ""
        fields = dict(self.fields)
        if self._answers or self._finished:
            fields["continue_from"] = [self._begun(i) for i in range(self._num_answers())]
        return fields

    def _begun(self, index: int) -> dict[str, Any]:
        begun: dict[str, Any] = {"token_ids": list(self._answers.get(index, ()))}
        if index in self._finished:
            begun["finished"] = True
        return begun

    def _num_answers(self) -> int:
        size = _SIZE.decode(self._body)
        prompts = 1
        if isinstance(size.prompt, list) and size.prompt and not isinstance(size.prompt[0], int):
            prompts = len(size.prompt)
        return prompts * (size.n or 1)

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data:"):
            return event + b"\n\n"
        content = event[5:].lstrip()
        if content == b"[DONE]":
            self.complete = True
            return DONE
        try:
            chunk = _CHUNK.decode(content)
        except _UNREADABLE:
            self.failure = "it sent an event that is no chunk"
            return b""
        if chunk.error is not None:
            code = chunk.error.code
            if not isinstance(code, int) or code >= 500:
                self.failure = chunk.error.message or "it sent an error event"
                return b""
            # The request's own fault: it would fail anywhere.
            return event + b"\n\n"
        self.num_events += 1
        content = self._shown(content, chunk)
        if not self._resumed:
            if not self._id:
                self._id, self._created = chunk.id, chunk.created
        else:
            content = self._joined(content)
        self._remember(chunk)
        return b"data: %b\n\n" % content

    def _remember(self, chunk: _Chunk) -> None:
        if chunk.usage is not None:
            self.usage = chunk.usage
            if not chunk.choices:
                self._told_total = True
        for choice in chunk.choices:
            ids = choice.token_ids
            if ids is None:
                self._lossy = True  # text whose tokens are not known would come twice
            elif ids:
                self._num_tokens += len(ids)
                if self._num_tokens > MAX_TOKENS:
                    self._answers.clear()
                    self._text.clear()
                else:
                    answer = self._answers.get(choice.index)
                    if answer is None:
                        answer = self._answers[choice.index] = array("q")
                    answer.extend(ids)
                    if not choice.index:
                        text = choice.text if choice.delta is None else choice.delta.content
                        self._text.append(text or "")
            if choice.finish_reason is not None:
                self._finished.add(choice.index)
            if choice.delta is not None and choice.delta.role is not None:
                self._opened.add(choice.index)

    def _shown(self, content: bytes, chunk: _Chunk) -> bytes:
        """The chunk without its token ids, if the client did not ask for them.

        Inside a JSON string every quote is escaped, so that a text cannot look like the field; if
        the bytes still hold another number of them than the chunk does, it is encoded anew.
        """
        if not self._hide:
            return content
        told = sum(choice.token_ids is not None for choice in chunk.choices)
        if not told:
            return content
        shown, removed = _TOKEN_IDS.subn(b"", content)
        if removed == told:
            return shown
        whole = msgspec.json.decode(content)
        for choice in whole["choices"]:
            choice.pop("token_ids", None)
        return msgspec.json.encode(whole)

    def _joined(self, content: bytes) -> bytes:
        """A chunk of a later worker as one of the first worker's stream."""
        whole = msgspec.json.decode(content)
        whole["id"] = self._id
        if "created" in whole:
            whole["created"] = self._created
        for choice in whole.get("choices") or ():
            delta = choice.get("delta")
            if delta and choice.get("index", 0) in self._opened:
                delta.pop("role", None)
        return msgspec.json.encode(whole)


def error_event(kind: str, code: int, message: str) -> bytes:
    """The end of a stream that cannot go on."""
    body = {"error": {"message": message, "type": kind, "code": code}}
    return b"data: %b\n\n%b" % (msgspec.json.encode(body), DONE)
