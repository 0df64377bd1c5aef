"""Talk to a server from the terminal: answers stream, with their speed behind them.

  python scripts/chat.py                                   (a server of scripts/serve.py here)
  python scripts/chat.py --url http://HOST:PORT --prompt "Tell me a story."
  echo "Tell me a story." | python scripts/chat.py

Ctrl-C stops an answer, Ctrl-D ends. Works with any OpenAI-compatible server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import httpx

DIM, PLAIN = "\033[2m", "\033[0m"
HELP = """\
/help            this
/system [TEXT]   set the system message, or drop it; starts anew
/temp [NUMBER]   set the temperature, or leave it to the model
/max [NUMBER]    most tokens of an answer, or leave it to the server
/reset           forget the conversation
/quit            end (or Ctrl-D); Ctrl-C stops an answer
"""


class ChatError(RuntimeError):
    """The server cannot answer; one sentence."""


@dataclass(slots=True)
class Reply:
    """An answer so far. Times are seconds since the request."""

    content: str = ""
    tokens: int = 0
    first: float | None = None
    seconds: float = 0.0
    finish_reason: str | None = None

    @property
    def speed(self) -> str:
        """What it took, for people."""
        if self.first is None:
            return "no answer"
        parts = [f"{self.tokens} tokens", f"first after {self.first:.2f} s"]
        if self.tokens > 1 and self.seconds > self.first:
            parts.append(f"{(self.tokens - 1) / (self.seconds - self.first):.1f} tokens/s")
        if self.finish_reason not in (None, "stop"):
            parts.append(f"ended by {self.finish_reason}")
        return ", ".join(parts)


@dataclass(slots=True, kw_only=True)
class Chat:
    """A conversation with one server."""

    http: httpx.Client
    model: str
    templated: bool = True
    """The server can chat; else every message is completed for itself."""
    temperature: float | None = None
    max_tokens: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str, out: IO[str], *, colour: bool) -> Reply:
        """Send a message and write the answer as it comes. Ctrl-C stops it; what was said stays.

        Raises:
            ChatError: the server refuses, or is gone; the message is taken back.
        """
        self.messages.append({"role": "user", "content": text})
        reply, began, dim = Reply(), time.perf_counter(), False
        try:
            for kind, piece in self._pieces(reply, began):
                if colour and dim != (kind == "reasoning"):
                    dim = not dim
                    out.write(DIM if dim else f"{PLAIN}\n\n")
                out.write(piece)
                out.flush()
        except KeyboardInterrupt:
            reply.finish_reason = "you"
        except BaseException:
            self.messages.pop()
            raise
        finally:
            out.write(PLAIN if dim else "")
        reply.seconds = time.perf_counter() - began
        self.messages.append({"role": "assistant", "content": reply.content})
        return reply

    def forget(self) -> None:
        """Keep the system message alone."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def _pieces(self, reply: Reply, began: float) -> Iterator[tuple[str, str]]:
        """Pieces of ("reasoning" or "content") text."""
        for event in self._events():
            if event.get("usage"):
                reply.tokens = event["usage"]["completion_tokens"]
            if "error" in event:
                raise ChatError(event["error"]["message"])
            for choice in event.get("choices", ()):
                delta = choice.get("delta") or {"content": choice.get("text")}
                reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
                for kind, name in (("reasoning", "reasoning_content"), ("content", "content")):
                    if piece := delta.get(name):
                        if reply.first is None:
                            reply.first = time.perf_counter() - began
                        if kind == "content":
                            reply.content += piece
                        yield kind, piece

    def _events(self) -> Iterator[dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.templated:
            path, body["messages"] = "/v1/chat/completions", self.messages
            if self.max_tokens is not None:
                body["max_tokens"] = self.max_tokens
        else:
            path, body["prompt"] = "/v1/completions", self.messages[-1]["content"]
            body["max_tokens"] = self.max_tokens or 256
        try:
            with self.http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    raise ChatError(_reason(response))
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        yield json.loads(data)
        except httpx.HTTPError as error:
            raise ChatError(f"The connection to {self.http.base_url} broke: {error}.") from None


def _reason(response: httpx.Response) -> str:
    """Why the server refuses, in its own words where it has some."""
    try:
        body = json.loads(response.read())
        error = body.get("error", body)
        message = error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, AttributeError):
        message = response.text[:200]
    return f"{message} (HTTP {response.status_code})"


def connect(http: httpx.Client) -> Chat:
    """Find the server's model.

    Raises:
        ChatError: there is no server, or it refuses.
    """
    try:
        response = http.get("/v1/models")
    except httpx.HTTPError as error:
        raise ChatError(
            f"No server answers at {http.base_url} ({error}): start one with scripts/serve.py, or "
            "name it with --url."
        ) from None
    if response.status_code != 200:
        raise ChatError(_reason(response))
    return Chat(http=http, model=response.json()["data"][0]["id"])


def ask_and_tell(chat: Chat, text: str, *, colour: bool) -> bool:
    """One exchange at the terminal; whether it worked."""
    try:
        try:
            reply = chat.ask(text, sys.stdout, colour=colour)
        except ChatError as error:
            if not chat.templated or "chat template" not in str(error):
                raise
            print("(This model has no chat template: each message is completed by itself.)")
            chat.templated = False
            reply = chat.ask(text, sys.stdout, colour=colour)
    except ChatError as error:
        print(f"chat.py: error: {error}", file=sys.stderr)
        return False
    speed = f"[{reply.speed}]"
    print(f"\n{DIM}{speed}{PLAIN}\n" if colour else "", flush=True)
    return True


def command(chat: Chat, line: str) -> bool:
    """Carry out a line that begins with a slash; False to end."""
    name, _, value = line.partition(" ")
    value = value.strip()
    try:
        match name:
            case "/quit" | "/exit":
                return False
            case "/reset":
                chat.forget()
            case "/system":
                chat.messages = [{"role": "system", "content": value}] if value else []
            case "/temp":
                chat.temperature = float(value) if value else None
            case "/max":
                chat.max_tokens = int(value) if value else None
            case _:
                print(HELP, end="")
    except ValueError:
        print(f"{value} is no number.")
    return True


def interact(chat: Chat) -> None:
    """Ask and answer until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    print(f"{chat.model} at {chat.http.base_url}. /help lists commands, Ctrl-D ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.startswith("/"):
            if not command(chat, line):
                return
        elif line:
            ask_and_tell(chat, line, colour=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server")
    parser.add_argument("--api-key", help="sent as a Bearer")
    parser.add_argument("--prompt", help="ask this, print the answer, end")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float, help="default: the model's")
    parser.add_argument("--max-tokens", type=int, help="of an answer; default: the server's")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    url = args.url.rstrip("/").removesuffix("/v1")
    timeout = httpx.Timeout(10, read=None)
    with httpx.Client(base_url=url, headers=headers, timeout=timeout) as http:
        try:
            chat = connect(http)
        except ChatError as error:
            print(f"chat.py: error: {error}", file=sys.stderr)
            return 1
        chat.temperature, chat.max_tokens = args.temperature, args.max_tokens
        if args.system:
            chat.messages.append({"role": "system", "content": args.system})
        if args.prompt is not None:
            return 0 if ask_and_tell(chat, args.prompt, colour=False) else 1
        if not sys.stdin.isatty():
            text = sys.stdin.read().strip()
            return 0 if text and ask_and_tell(chat, text, colour=False) else 1
        interact(chat)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
