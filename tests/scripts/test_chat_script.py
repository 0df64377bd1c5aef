"""scripts/chat.py against the app over a fake engine, in a process of its own."""

import asyncio
import io
import os
import pty
import signal
import sys
from pathlib import Path

import httpx
import pytest

from scripts.chat import DIM, PLAIN, connect
from serving.config import ServerConfig
from serving.tokenizer import Tokenizer
from tests.fakes import FakeEngine, scripted
from tests.serving.http.support import DATA, TOKENIZER, listening, run

pytestmark = pytest.mark.timeout(60)
SCRIPT = str(Path(__file__).resolve().parents[2] / "scripts" / "chat.py")
STORY = "A kite, über alles. 世界!"


def telling(text=STORY, **changes):
    ids = TOKENIZER._fast.encode(text, add_special_tokens=False).ids
    return FakeEngine(next_token=scripted([*ids, 1]), max_context_tokens=4096, **changes)


async def chat(*args, stdin=b""):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        SCRIPT,
        *args,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


def test_one_question_by_flag_or_by_pipe():
    async def main():
        async with listening(telling()) as (url, _, engine):
            assert await chat("--url", url, "--prompt", "Hi") == (0, f"{STORY}\n", "")
        async with listening(telling()) as (url, _, engine):
            flags = ("--url", f"{url}/v1", "--temperature", "0", "--max-tokens", "500")
            code, out, _ = await chat(*flags, "--system", "Be kind.", stdin=b"Hi\n")
            assert (code, out) == (0, f"{STORY}\n")
            prompt = TOKENIZER.decode(engine.seen[0].prompt, skip_special_tokens=False)
            assert "Be kind." in prompt
            assert engine.seen[0].sampling.max_tokens == 500
            assert engine.seen[0].sampling.greedy

    run(main)


def test_no_server_and_a_wrong_key_are_a_sentence():
    async def main():
        code, out, err = await chat("--url", "http://127.0.0.1:9", "--prompt", "Hi")
        assert (code, out) == (1, "")
        assert "No server answers at http://127.0.0.1:9" in err
        config = ServerConfig(served_model_name="tiny", api_key="secret")
        async with listening(telling(), config=config) as (url, _, _):
            code, _, err = await chat("--url", url, "--prompt", "Hi")
            assert code == 1
            assert "Unauthorized (HTTP 401)" in err
            code, out, _ = await chat("--url", url, "--prompt", "Hi", "--api-key", "secret")
            assert (code, out) == (0, f"{STORY}\n")

    run(main)


def test_a_model_without_a_chat_template_completes():
    async def main():
        tokenizer = Tokenizer.from_folder(DATA / "deepseek_v3")
        tokenizer._template = None
        async with listening(telling(), tokenizer=tokenizer) as (url, _, _):
            code, out, _ = await chat("--url", url, "--prompt", "Hi")
            assert code == 0
            assert "has no chat template" in out
            assert out.endswith(f"{STORY}\n")

    run(main)


def test_thinking_is_dimmed_and_not_sent_again():
    async def main():
        config = ServerConfig(served_model_name="tiny", reasoning_parser="qwen3")
        says = telling("<think>Kites, hm.</think>They fly.")
        async with listening(says, config=config) as (url, _, _engine):

            def talk():
                with httpx.Client(base_url=url) as http:
                    talker, out = connect(http), io.StringIO()
                    reply = talker.ask("Hi", out, colour=True)
                    return out.getvalue(), reply, talker.messages

            shown, reply, messages = await asyncio.to_thread(talk)
            thinking, _, said = shown.removeprefix(DIM).partition(PLAIN)
            assert shown.startswith(DIM)
            assert (thinking.strip(), said.strip()) == ("Kites, hm.", "They fly.")
            assert messages[-1] == {"role": "assistant", "content": reply.content}
            assert reply.content.strip() == "They fly."
            assert reply.tokens > 6

    run(main)


def test_at_a_terminal():
    """Commands, an answer with its speed, Ctrl-C in the middle of one, Ctrl-D."""

    async def main():
        loop = asyncio.get_running_loop()
        async with listening(telling("la " * 400, delay_s=0.01)) as (url, _, engine):
            parent, child = pty.openpty()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, SCRIPT, "--url", url),
                stdin=child,
                stdout=child,
                stderr=child,
                start_new_session=True,
                # What runs in the background, as these tests may, ignores Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            os.close(child)
            seen = ""

            async def until(text):
                nonlocal seen
                while text not in seen:
                    seen += (await loop.run_in_executor(None, os.read, parent, 4096)).decode()
                before, _, seen = seen.partition(text)
                return before

            await until("> ")
            os.write(parent, b"/max 3\n")
            await until("> ")
            os.write(parent, b"Hi\n")
            assert "la" in await until("3 tokens, first after")
            await until("ended by length]")
            await until("> ")
            os.write(parent, b"/help\n")
            await until("forget the conversation")
            await until("> ")
            os.write(parent, b"/max\n")
            await until("> ")
            os.write(parent, b"More\n")
            await until("la la la")
            process.send_signal(signal.SIGINT)
            await until("ended by you]")
            assert len(engine.seen) == 2
            await until("> ")
            os.write(parent, b"\x04")
            assert await process.wait() == 0
            os.close(parent)
            assert engine.running == {}

    run(main)
