"""Text to token ids and back: tokenizer files, chat template, incremental decoding, stop strings.

A `Tokenizer` is read once from a model folder and then never changes; `Detokenizer` and
`StopMatcher` hold the state of one answer. Text that they hand out is final: pieces joined are the
text decoded at once, and a stop string is cut wherever the borders between pieces fall.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders

from serving.gguf_tokenizer import GGUFTokenizerError, read_gguf_tokenizer
from serving.template_features import TemplateFeatures, probe_template

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")

LONG_TOKENS = 1000
"""Longer lists are decoded as a batch of one: only batches release the interpreter lock."""


class TokenizerError(ValueError):
    """The tokenizer's files are missing or broken; the message is one sentence."""


class ChatTemplateError(ValueError):
    """The chat template refuses these messages, or there is no template; one sentence."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file.

    Raises:
        TokenizerError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # no folder at all: the model is one file
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object.")
    return content


class Tokenizer:
    """The tokenizer, special tokens and chat template of one model.

    Attributes:
        vocab_size: ids below it exist in the model (its padded vocabulary, if config.json says).
        bos_token_id: begin-of-sequence id, None where the model has none.
        eos_token_ids: ids that end an answer, ascending.
        chat_template: the template's source, None without one.
    """

    def __init__(
        self,
        *,
        fast: FastTokenizer,
        config: Mapping[str, Any],
        chat_template: str | None,
        eos_token_ids: Sequence[int],
        vocab_size: int | None,
    ) -> None:
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self._special_tokens = _special_tokens(config)
        self.chat_template = chat_template
        self._template = None if chat_template is None else _compile_template(chat_template)
        self._add_bos: bool | None = config.get("add_bos_token")
        self._special_ids = frozenset(
            i for i, token in fast.get_added_tokens_decoder().items() if token.special
        )
        self._byte_level = isinstance(fast.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = vocab_size or fast.get_vocab_size()
        self.bos_token_id = self._token_id("bos_token")
        eos = self._token_id("eos_token")
        self.eos_token_ids = tuple(sorted({*eos_token_ids, *(() if eos is None else (eos,))}))

    @classmethod
    def load(
        cls,
        model_path: str | Path,
        *,
        tokenizer_path: str | Path | None = None,
        chat_template: str | Path | None = None,
    ) -> Tokenizer:
        """The tokenizer of a model folder (`from_folder`) or inside a GGUF file.

        Raises:
            TokenizerError: a file is missing or broken.
        """
        path = Path(model_path)
        if path.suffix.lower() != ".gguf" or tokenizer_path is not None:
            return cls.from_folder(path, tokenizer_path=tokenizer_path, chat_template=chat_template)
        try:
            parts = read_gguf_tokenizer(path)
        except GGUFTokenizerError as error:
            raise TokenizerError(str(error)) from None
        return cls(
            fast=parts.fast,
            config=parts.config,
            chat_template=(
                parts.chat_template if chat_template is None else _read_file(Path(chat_template))
            ),
            eos_token_ids=parts.eos_token_ids,
            vocab_size=None,
        )

    @classmethod
    def from_folder(
        cls,
        model_path: str | Path,
        *,
        tokenizer_path: str | Path | None = None,
        chat_template: str | Path | None = None,
    ) -> Tokenizer:
        """Read a tokenizer.

        Args:
            model_path: folder with config.json and generation_config.json.
            tokenizer_path: folder with tokenizer.json, if not the model's.
            chat_template: file with a Jinja template, instead of the model's.

        Raises:
            TokenizerError: a file is missing or broken.
        """
        model_folder = Path(model_path)
        folder = Path(tokenizer_path or model_path)
        path = folder / "tokenizer.json"
        if not path.is_file():
            problem = "has no tokenizer.json" if folder.is_dir() else "is not a folder"
            raise TokenizerError(f"{folder} {problem}: is the model path right?")
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} cannot be read: {error}.") from None
        config = read_json(folder / "tokenizer_config.json")
        model_config = read_json(model_folder / "config.json")
        eos_ids: set[int] = set()
        for source in (model_config, read_json(model_folder / "generation_config.json")):
            eos = source.get("eos_token_id")
            eos_ids.update(eos if isinstance(eos, list) else () if eos is None else (eos,))
        if not all(isinstance(i, int) for i in eos_ids):
            raise TokenizerError(f"eos_token_id in {model_folder} must be an integer or a list.")
        return cls(
            fast=fast,
            config=config,
            chat_template=_read_template(folder, config, chat_template),
            eos_token_ids=sorted(eos_ids),
            vocab_size=model_config.get("vocab_size"),
        )

    @property
    def num_entries(self) -> int:
        """Tokens of the tokenizer itself (a model's vocabulary may be padded beyond)."""
        return int(self._fast.get_vocab_size())

    @property
    def num_ids(self) -> int:
        """One more than the tokenizer's highest id (ids may have holes)."""
        return 1 + max(self._fast.get_vocab(with_added_tokens=True).values())

    def to_json(self) -> str:
        """The text of a tokenizer.json that says the same."""
        return str(self._fast.to_str())

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can work."""
        return self._template is not None

    @cached_property
    def template_features(self) -> TemplateFeatures:
        """What the chat template does with functions."""
        return probe_template(self.render_chat)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """A batch of one: only batches release the interpreter lock while they work."""
        (encoding,) = self._fast.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text prompt, with the BOS that `add_bos_token` asks for, never two.

        Without the flag the tokenizer's own post-processor decides.

        Args:
            add_special_tokens: False for the text's own tokens only.
        """
        if not add_special_tokens:
            return self._encode(text, add_special_tokens=False)
        ids: list[int] = self._encode(text, add_special_tokens=self._add_bos is not False)
        if self._add_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text of a conversation, up to where the assistant's answer begins.

        Args:
            variables: further names for the template; they win over everything but messages.
            tools: function descriptions as in the OpenAI API, for templates that offer them.

        Raises:
            ChatTemplateError: there is no template, or it refuses these messages.
        """
        if self._template is None:
            raise ChatTemplateError(
                "This model has no chat template: use /v1/completions, or start the server with "
                "--chat-template."
            )
        context: dict[str, Any] = {"tools": tools, "documents": None, "add_generation_prompt": True}
        context |= {**self._special_tokens, **(variables or {}), "messages": messages}
        try:
            return self._template.render(context)
        except Exception as error:  # a template can fail in any way on messages it did not expect
            raise ChatTemplateError(f"The chat template refuses these messages: {error}.") from None

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; the template writes the special tokens itself.

        Raises:
            ChatTemplateError: there is no template, or it refuses these messages.
        """
        return self.encode_rendered(self.render_chat(messages, variables, tools))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what `render_chat` gave: the special tokens are in the text."""
        return self._encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids at once."""
        text: str
        if len(ids) > LONG_TOKENS:
            (text,) = self._fast.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
            return text
        text = self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for (half a character, perhaps); special tokens included."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute_bytes(token_id)
        return known

    def is_special(self, token_id: int) -> bool:
        """Whether the token appears in an answer's text only where that is asked for."""
        return token_id in self._special_ids

    def special_ids(self, texts: Iterable[str]) -> dict[str, int]:
        """The ids of those texts that are special tokens."""
        ids = {text: self._fast.token_to_id(text) for text in texts}
        return {text: i for text, i in ids.items() if i is not None and i in self._special_ids}

    def detokenizer(
        self, *, skip_special_tokens: bool = True, keep: Collection[int] = ()
    ) -> Detokenizer:
        """A fresh incremental decoder for one answer; `keep` are special tokens never skipped."""
        hidden = self._special_ids if skip_special_tokens else frozenset()
        if keep:
            hidden = hidden.difference(keep)
        if self._byte_level:
            return _ByteLevelDetokenizer(self, hidden)
        return _WindowDetokenizer(self, hidden)

    def _token_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        found: int | None = None if token is None else self._fast.token_to_id(token)
        return found

    def _compute_bytes(self, token_id: int) -> bytes:
        token = self._fast.id_to_token(token_id)
        if token is None:  # the model's vocabulary is padded beyond the tokenizer's
            return b""
        if self._byte_level:
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:  # an added token is written as it is
                return bytes(token.encode())
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return bytes(self._fast.decode([token_id], skip_special_tokens=False).encode())


class Detokenizer(Protocol):
    """Decodes one answer token by token."""

    def push(self, token_id: int) -> str:
        """The text that is final now and was not before; often "" inside a character."""

    def flush(self) -> str:
        """What was held back, after the last token."""


class _ByteLevelDetokenizer:
    """For byte-level vocabularies: a token is bytes whatever stands around it."""

    def __init__(self, tokenizer: Tokenizer, hidden: Collection[int]) -> None:
        self._tokenizer, self._hidden = tokenizer, hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """For every other vocabulary: decodes a window of tokens and hands out what it added.

    The window begins with the tokens of the text handed out last, because a token's text (its
    leading space above all) depends on whether something stands before it. One exception to
    "pieces joined are the whole": byte-fallback decoders take back good characters when invalid
    bytes follow them directly; here they stay.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: Collection[int]) -> None:
        self._tokenizer, self._hidden = tokenizer, hidden
        self._window: list[int] = []
        self._num_done = 0
        self._done = ""

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._decode()
        if len(text) <= len(self._done) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new = text[len(self._done) :]
        self._window = self._window[self._num_done :]
        self._num_done = len(self._window)
        self._done = self._decode()
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)

    def flush(self) -> str:
        new = self._decode()[len(self._done) :]
        self._num_done = len(self._window)
        self._done += new
        return new


class StopMatcher:
    """Finds stop strings in a text that arrives in pieces, and cuts it at the first.

    First is the one whose last character comes first (of several, the longest): the only rule
    whose outcome does not depend on where the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._overlaps = [_Overlap(stop) for stop in stops]
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that no stop string can begin in, and the stop string found, if any."""
        if not self._overlaps:
            return text, None
        num_held = len(self._held)
        self._held += text
        found = []
        for overlap in self._overlaps:
            end = overlap.push(text)
            if end is not None:
                end += num_held
                found.append((end, end - len(overlap.stop), overlap.stop))
        if found:
            _, start, stop = min(found)
            text, self._held = self._held[:start], ""
            for overlap in self._overlaps:
                overlap.length = 0
            return text, stop
        cut = len(self._held) - max(overlap.length for overlap in self._overlaps)
        text, self._held = self._held[:cut], self._held[cut:]
        return text, None

    def flush(self) -> str:
        """What was held back, after the last piece."""
        text, self._held = self._held, ""
        return text


class _Overlap:
    """How long a beginning of one stop string a growing text ends with, by Knuth, Morris and Pratt.

    A character takes the same time however much of the stop string stands before it: stop strings
    are the clients' own, and all streams wait for this.

    Attributes:
        length: of that beginning, less than the stop string's.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._borders = [0]  # of stop[: i + 1]; made when they are needed

    def push(self, text: str) -> int | None:
        """Where in `text` the stop string's first occurrence ends, None without one."""
        stop, length, at = self.stop, self.length, 0
        while at < len(text):
            if not length:
                at = text.find(stop[0], at)
                if at < 0:
                    break
            while length and stop[length] != text[at]:
                length = self._border(length)
            length += stop[length] == text[at]
            at += 1
            if length == len(stop):
                self.length = 0
                return at
        self.length = length
        return None

    def _border(self, length: int) -> int:
        """Length of the longest shorter beginning of stop[:length] that is also its end."""
        stop, borders = self.stop, self._borders
        while len(borders) < length:
            border = borders[-1]
            while border and stop[border] != stop[len(borders)]:
                border = borders[border - 1]
            borders.append(border + (stop[border] == stop[len(borders)]))
        return borders[length - 1]


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, the letters of byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(256 + offset): byte for offset, byte in enumerate(rest)}
    return {chr(byte): byte for byte in printable} | stand_ins


_BYTE_OF_CHAR = _byte_of_char()


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; they are written as strings or as AddedToken objects."""
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            if not isinstance(token, str):
                raise TokenizerError(f"{name} in tokenizer_config.json must be a string.")
            tokens[name] = token
    return tokens


def _read_template(
    folder: Path, config: Mapping[str, Any], override: str | Path | None
) -> str | None:
    """The chat template: the override, else chat_template.jinja, else tokenizer_config.json."""
    path = folder / "chat_template.jinja" if override is None else Path(override)
    if override is not None or path.is_file():
        return _read_file(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError("chat_template in tokenizer_config.json must be a string.")
    return template


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"The chat template {path} cannot be read: {error}.") from None


def _compile_template(source: str) -> jinja2.Template:
    """A template with what Hugging Face's renderer offers, in a sandbox: the files are foreign."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        # jinja2's own filter escapes for HTML; prompts want the characters themselves.
        return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise TokenizerError(f"The chat template is broken: {error}.") from None
