"""Constrained decoding: grammars become masks over the vocabulary, through llguidance.

A `GrammarCompiler` reads grammars for one tokenizer (the front checks requests with it), a
`GrammarSet` holds where the running requests of an engine stand in theirs. Everything slow happens
in the compiler's one thread; what a grammar does wrong is a `GrammarError` with one sentence.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from serving.config import ServerConfig
from serving.request import Grammar, GrammarKind, Thinking
from serving.tokenizer import Tokenizer, TokenizerError

NAMES: dict[GrammarKind, str] = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "ebnf": "EBNF grammar",
}
MAX_CHARS: dict[GrammarKind, int] = {"json_schema": 1 << 17, "regex": 1 << 15, "ebnf": 1 << 15}
"""Longest text of each kind. It bounds how deep a grammar can nest, and so the stack it takes."""
MAX_GBNF_RULES = 1000
"""The converter's time grows with the square of the rules."""
STACK_BYTES = 128 << 20
"""llguidance recurses about 4 KiB a level; the worst text of MAX_CHARS takes half of this."""
MAX_LEXER_STATES = 50_000
"""1 to 2 KiB each; llguidance's own limit would allow a single request half a gigabyte."""
MAX_WAIT_S = 20.0
"""How long a grammar may take to be prepared, those in front of it included."""
CONVERTED_TEXTS = 32
"""Converted grammars that are remembered, so that the answers of one request share the work."""
MAX_REASON = 300
JSON_WHITESPACE = r"[ \t\n\r]{0,64}"
"""Between the parts of a JSON text. Without an end, a model can go on with blanks for ever."""


class GrammarError(ValueError):
    """A grammar cannot be used, or not any longer; the message is one sentence."""


class GrammarCompiler:
    """Turns grammars into matchers for one tokenizer. Thread-safe.

    The tokenizer's tables are built in a thread that starts at once (1 to 2 s for 130,000 entries);
    whoever needs them first waits.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int | None = None) -> None:
        """Args:
        load: makes the tokenizer, in the thread.
        vocab_size: ids of the model, padding included; None for the tokenizer's own number.
        """
        self._converted = lru_cache(CONVERTED_TEXTS)(_to_llguidance)
        self._limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        previous = threading.stack_size(STACK_BYTES)
        try:  # the first job starts the thread
            self._tables = self._thread.submit(_build_tables, load, vocab_size)
        finally:
            threading.stack_size(previous)

    @property
    def ready(self) -> bool:
        """Whether the tables are built (or cannot be)."""
        return self._tables.done()

    @property
    def num_ids(self) -> int:
        """Ids that a mask covers: the model's or the tokenizer's, whichever are more."""
        return int(self._tables.result().vocab_size)

    async def prepare(self, grammar: Grammar) -> float:
        """Check that decoding can begin with this grammar; the seconds that this takes the
        compiler's thread, for each answer anew.

        No other thread waits. A caller that is cancelled takes its grammar out of the queue.

        Raises:
            GrammarError: it cannot be used, or was not prepared within MAX_WAIT_S.
        """
        job = self._thread.submit(self._seconds, grammar)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job), MAX_WAIT_S)
        except TimeoutError:
            raise GrammarError(_takes_too_long(grammar)) from None

    def compile(self, grammar: Grammar) -> Future[LLMatcher]:
        """A fresh matcher that has seen no token, or its GrammarError. Cancelling the future takes
        it out of the queue."""
        return self._thread.submit(self._matcher, grammar)

    def _seconds(self, grammar: Grammar) -> float:
        self._tables.result()
        began = time.perf_counter()
        self._matcher(grammar)
        return time.perf_counter() - began

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        # Never a copy of another request's matcher: copies share MAX_LEXER_STATES.
        matcher = LLMatcher(
            self._tables.result(), self._converted(grammar), log_level=0, limits=self._limits
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # what is too complex, or matches nothing, often shows here
        failure = _failure(matcher)
        if failure is not None:
            raise _unusable(grammar.kind, failure)
        return matcher


def _build_tables(load: Callable[[], Tokenizer], vocab_size: int | None) -> LLTokenizer:
    try:
        tokenizer = load()
    except TokenizerError as error:
        raise GrammarError(f"Constrained decoding needs the tokenizer: {error}") from None
    if not tokenizer.eos_token_ids:
        raise GrammarError(
            "Constrained decoding needs an end-of-sequence token, and this model's files name none."
        )
    try:
        return LLTokenizer(
            tokenizer.to_json(),
            # llguidance refuses fewer ids than the tokenizer has; some models do have fewer.
            n_vocab=max(vocab_size or tokenizer.vocab_size, tokenizer.num_ids),
            eos_token=list(tokenizer.eos_token_ids),
        )
    except Exception as error:  # a Rust library: anything it cannot read
        raise GrammarError(
            f"Constrained decoding cannot use this model's tokenizer: {_reason(str(error))}."
        ) from None


@dataclass(slots=True, kw_only=True)
class _Constrained:
    """One request: its matcher (or what is wrong), and the tokens that it has not seen yet.

    Attributes:
        since: when it began to wait for its matcher, by the set's clock.
    """

    grammar: Grammar
    since: float
    matcher: Future[LLMatcher]
    unseen: list[int]


class GrammarSet:
    """Where each constrained request of an engine stands. One loop calls it."""

    def __init__(
        self,
        compiler: GrammarCompiler,
        vocab_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        vocab_size: ids of the model; a mask row has a bit for each.
        clock: seconds.
        """
        self._compiler = compiler
        self._clock = clock
        self._vocab_size = vocab_size
        self._live: dict[str, _Constrained] = {}
        self._scratch = np.zeros(0, np.int32)

    @property
    def words(self) -> int:
        """int32 numbers of a mask row."""
        return -(-self._vocab_size // 32)

    def start(self, rid: str, grammar: Grammar, answer: Sequence[int] = ()) -> None:
        """Begin a request, or begin it again after `answer`, its tokens so far. Never waits."""
        self.drop(rid)
        self._live[rid] = _Constrained(
            grammar=grammar,
            since=self._clock(),
            matcher=self._compiler.compile(grammar),
            unseen=list(answer),
        )

    def drop(self, rid: str) -> None:
        """Forget a request; its grammar is not prepared if that has not begun. Harmless if the
        request is not there."""
        dropped = self._live.pop(rid, None)
        if dropped is not None:
            dropped.matcher.cancel()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, rid: str) -> bool:
        return rid in self._live

    def is_ready(self, rid: str) -> bool:
        """Whether `advance` and `fill` would not wait for the grammar to be prepared."""
        return rid not in self._live or self._live[rid].matcher.done()

    def failure(self, rid: str) -> str | None:
        """Why the request's grammar cannot be used, in a sentence: it is wrong, or was not prepared
        within MAX_WAIT_S. None while it may be, once it is, and if the request is not there.
        """
        constrained = self._live.get(rid)
        if constrained is None:
            return None
        if constrained.matcher.done():
            error = constrained.matcher.exception()
            if error is None or isinstance(error, GrammarError):
                return None if error is None else str(error)
            return str(_unusable(constrained.grammar.kind, str(error)))
        if self._clock() - constrained.since > MAX_WAIT_S:
            return _takes_too_long(constrained.grammar)
        return None

    def advance(self, rid: str, token_id: int) -> None:
        """Tell what token the request drew. Nothing happens if the request is not there, or if
        its grammar is complete already (the token was drawn a step late).

        Raises:
            GrammarError: the grammar does not allow the token, or has become too complex.
        """
        if rid in self._live:
            self._live[rid].unseen.append(token_id)
            self._caught_up(rid)

    def is_finished(self, rid: str) -> bool:
        """Whether the grammar is complete, so that only the end may follow. False if the request
        is not there.

        Raises:
            GrammarError: as `advance`.
        """
        return rid in self._live and bool(self._caught_up(rid).is_stopped())

    def fill(self, rid: str, row: np.ndarray) -> None:
        """Write the mask of the request's next token: bit b of word w is token 32 * w + b.

        Once the grammar is complete, end-of-sequence ids are all that is allowed.

        Args:
            row: int32 [words].

        Raises:
            GrammarError: the grammar has become too complex, or no token can go on.
        """
        matcher = self._caught_up(rid)
        if not self._scratch.size:
            self._scratch = np.zeros(-(-self._compiler.num_ids // 32), np.int32)
        matcher.unsafe_compute_mask_ptr(self._scratch.ctypes.data, self._scratch.nbytes)
        self._check(rid, matcher)
        row[:] = self._scratch[: row.size]
        if self._vocab_size % 32:
            row[-1] &= (1 << self._vocab_size % 32) - 1
        if not row.any():
            raise GrammarError("No token of the model can continue the answer under its grammar.")

    def _caught_up(self, rid: str) -> LLMatcher:
        """The request's matcher, after all of its tokens."""
        constrained = self._live[rid]
        try:
            matcher = constrained.matcher.result(MAX_WAIT_S)
        except TimeoutError:
            raise GrammarError(_takes_too_long(constrained.grammar)) from None
        for token_id in constrained.unseen:
            if not matcher.is_stopped():
                matcher.consume_token(token_id)
        constrained.unseen.clear()
        self._check(rid, matcher)
        return matcher

    def _check(self, rid: str, matcher: LLMatcher) -> None:
        failure = _failure(matcher)
        if failure is not None:
            name = NAMES[self._live[rid].grammar.kind]
            raise GrammarError(f"The answer cannot be continued under its {name}: {failure}.")


def make_grammar_set(config: ServerConfig, vocab_size: int) -> GrammarSet | None:
    """The engine's grammars, None where --grammar-backend is none. The tokenizer is read by the
    compiler's thread, while the model loads.

    Args:
        vocab_size: ids of the model, as many as there are logits.
    """
    if config.grammar_backend == "none":
        return None

    def load() -> Tokenizer:
        return Tokenizer.load(config.model_path, tokenizer_path=config.tokenizer_path)

    return GrammarSet(GrammarCompiler(load, vocab_size), vocab_size)


# ---- texts to llguidance's form -------------------------------------------------------------


def _to_llguidance(grammar: Grammar) -> str:
    text, kind = grammar.text, grammar.kind
    if len(text) > MAX_CHARS[kind]:
        raise GrammarError(
            f"The {NAMES[kind]} has {len(text)} characters; at most {MAX_CHARS[kind]} are possible."
        )
    if "\0" in text:
        raise _unusable(kind, "it contains a null character")
    if kind == "regex":
        # \d is 0-9, as everybody means it; \w stays all letters.
        pattern = regex_to_lark(text, "d")
        if grammar.thinking is not None:
            return _after_thinking(grammar.thinking, f"/{pattern}/")
        return str(LLMatcher.grammar_from_regex(pattern))
    if kind == "ebnf":
        return str(LLMatcher.grammar_from_lark(_to_lark(text)))
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"The JSON schema is not valid JSON: {_reason(str(error))}.") from None
    if schema is True:
        text = "{}"
    elif not isinstance(schema, dict):
        raise GrammarError("The JSON schema must be an object (or true, for any JSON).")
    defaults: Any = {"whitespace_pattern": JSON_WHITESPACE}
    if grammar.thinking is not None:
        # A schema that is text here has its defaults inside.
        whole = {"x-guidance": defaults, **({} if schema is True else schema)}
        return _after_thinking(grammar.thinking, f"%json {json.dumps(whole)}")
    try:
        return str(LLMatcher.grammar_from_json_schema(text, defaults=defaults))
    except Exception as error:  # a Rust library
        raise _unusable(kind, str(error)) from None


def _after_thinking(thinking: Thinking, answer: str) -> str:
    """An answer that may think first; `answer` is a right side in Lark."""
    marks = [
        f"<[{mark}]>" if isinstance(mark, int) else json.dumps(mark)
        for mark in (thinking.start, thinking.end)
    ]
    # Up to the first end marker: a special token ends the text by itself, else the text must.
    if isinstance(thinking.end, int):
        rules = f"thoughts: TEXT {marks[1]}\nTEXT: /(?s:.*)/"
    else:
        rules = f"thoughts[lazy]: /(?s:.*){_escaped(thinking.end)}/"
    if thinking.opened:
        front = "thoughts BLANKS"
    elif thinking.always:
        front = f"{marks[0]}? thoughts BLANKS"
    else:
        front = f"({marks[0]} thoughts BLANKS)?"
    return str(
        LLMatcher.grammar_from_lark(
            f"start: {front} answer\n{rules}\nBLANKS: /[ \\t\\r\\n]{{0,16}}/\nanswer: {answer}"
        )
    )


def _escaped(marker: str) -> str:
    """A marker inside of a Lark regular expression."""
    return re.escape(marker).replace("/", "\\/")


def _to_lark(text: str) -> str:
    """Lark text as it is, GBNF (its rules have ::=) converted."""
    # Blanks but no newlines: \s would go on over all blank lines from each of them.
    rules = len(re.findall(r"(?m)^[ \t]*[\w-]+[ \t]*::=", text.replace("\r", "\n")))
    if not rules:
        if re.search(r"(?m)^[ \t]*start[ \t]*:", text) is None:
            raise GrammarError(
                "The EBNF grammar is neither GBNF (rules written with ::=, beginning at root) nor "
                "Lark (rules written with :, beginning at start)."
            )
        return text
    if rules > MAX_GBNF_RULES:
        raise GrammarError(
            f"The EBNF grammar has {rules} rules; at most {MAX_GBNF_RULES} are possible."
        )
    text = _without_escapes(text)
    try:
        return str(gbnf_to_lark(text))
    except RecursionError:
        raise _unusable("ebnf", "it is nested too deeply") from None
    except Exception as error:  # the converter raises plain Exception
        raise _unusable("ebnf", str(error)) from None


def _without_escapes(text: str) -> str:
    r"""GBNF with the characters themselves for \u and \U, which the converter gets wrong."""

    def character(match: re.Match[str]) -> str:
        if match[1] is None:  # some other escape
            return match[0]
        code = int(match[1][1:], 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise GrammarError(f"The EBNF grammar names {match[0]}, which is no character.")
        return f"\\x{code:02x}" if code < 0x80 else chr(code)

    return re.sub(r"\\(?:(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|.)", character, text, flags=re.DOTALL)


def _failure(matcher: LLMatcher) -> str | None:
    """Why a matcher cannot go on, None where it can or is complete."""
    message = matcher.get_error() if matcher.is_error() else ""
    if message.startswith("NoExtension") or (
        not message and matcher.is_stopped() and not matcher.is_accepting()
    ):
        return "no text completes it"
    return _reason(message) if message else None


def _unusable(kind: GrammarKind, message: str) -> GrammarError:
    return GrammarError(f"The {NAMES[kind]} cannot be used: {_reason(message)}.")


def _takes_too_long(grammar: Grammar) -> str:
    return (
        f"The {NAMES[grammar.kind]} takes more than {MAX_WAIT_S:g} s to prepare: make it simpler."
    )


def _reason(message: str) -> str:
    """The part of a library's message that says what is wrong, on one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["unknown reason"]
    errors = [line for line in lines if line.startswith("error: ")]
    reason = errors[-1].removeprefix("error: ") if errors else lines[0]
    return re.sub(r"^at \d+\(\d+\): ", "", reason)[:MAX_REASON].rstrip(". ")
