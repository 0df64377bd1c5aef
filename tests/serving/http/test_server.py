"""The whole front process, with a fake engine process behind it: start, failures, exit codes."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from serving.config import parse_args

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "tests" / "data" / "deepseek_v3"

pytestmark = pytest.mark.timeout(60)

SERVE = """
import sys
from serving.config import parse_args
from serving.http import server
sys.exit(server.run(parse_args(sys.argv[1:]), engine_command=[sys.executable, "-m", "tests.fakes"]))
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A front process; its output is read by a thread so that it never blocks."""

    def __init__(self, *flags, mode="", port=0, model=MODEL):
        command = [sys.executable, "-c", SERVE, "--model-path", str(model), "--tp", "1"]
        command += ["--shutdown-grace-period-secs", "1"]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            cwd=ROOT,
            env=os.environ | {"FAKE_ENGINE": mode},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out, self.err = [], []
        self._threads = [
            threading.Thread(target=lines.extend, args=(pipe,), daemon=True)
            for lines, pipe in ((self.out, self.process.stdout), (self.err, self.process.stderr))
        ]
        for thread in self._threads:
            thread.start()

    def wait_for(self, text):
        deadline = time.monotonic() + 20
        while not (found := [line for line in self.out if text in line]):
            assert time.monotonic() < deadline, (self.out, self.err)
            assert self.process.poll() is None, (self.out, self.err)
            time.sleep(0.02)
        return found[0]

    def url(self):
        return self.wait_for(" at http").split(" at ")[1].split()[0].rstrip(".")

    def exit_code(self):
        code = self.process.wait(20)
        self.close()
        return code

    def close(self):
        for thread in self._threads:
            thread.join(5)
        self.process.stdout.close()
        self.process.stderr.close()

    def stderr(self):
        return "".join(self.err)


@contextlib.contextmanager
def serving(*args, **options):
    server = Server(*args, **options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        server.close()


def children_of(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def gone(pid):
    with contextlib.suppress(FileNotFoundError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "Z"  # ended; some containers' init is slow to notice
    return True


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_serves_what_it_prints_and_exits_0(signum):
    with serving() as server:
        curl = server.wait_for("curl http").strip()
        server.wait_for("mesh dp2 ep1 tp1")
        answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=20)
        assert json.loads(answer.stdout)["choices"][0]["finish_reason"] in ("length", "stop")
        (child,) = children_of(server.process.pid)
        server.process.send_signal(signum)
        assert server.exit_code() == 0
        assert server.stderr() == ""
        assert gone(child)


def test_idle_connections_outlive_those_of_clients():
    """httpx, and so the openai package, uses one again for 5 s: it must still be there then."""
    with serving() as server:
        address = server.url().removeprefix("http://")
        with contextlib.closing(http.client.HTTPConnection(address, timeout=10)) as client:
            for pause in (5.5, 0):
                client.request("GET", "/v1/models")
                response = client.getresponse()
                assert (response.status, response.will_close) == (200, False)
                response.read()
                time.sleep(pause)


def test_port_in_use_is_one_sentence_before_the_engine_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serving(port=port) as server:
            assert server.exit_code() == 1
            assert server.stderr() == (
                f"serve.py: error: Port {port} on 127.0.0.1 is already in use: choose another "
                "with --port.\n"
            )
            assert server.out == []


def test_port_taken_while_the_engine_starts():
    port = free_port()
    with serving(port=port) as first, serving(port=port) as second:
        codes = []
        deadline = time.monotonic() + 20
        while not codes and time.monotonic() < deadline:
            codes = [s for s in (first, second) if s.process.poll() is not None]
            time.sleep(0.02)
        (loser,) = codes
        assert loser.exit_code() == 1
        assert "already in use" in loser.stderr()
        winner = second if loser is first else first
        assert httpx.get(f"{winner.url()}/health").status_code == 200


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("exit", "The engine process ended with exit code 3 before it was ready."),
        ("fail", "The fake engine cannot start: no reason."),
    ],
)
def test_engine_that_does_not_start(mode, sentence):
    with serving(mode=mode) as server:
        assert server.exit_code() == 1
        assert server.stderr() == f"serve.py: error: {sentence}\n"


def test_missing_tokenizer_is_one_sentence(tmp_path):
    with serving(model=tmp_path) as server:
        assert server.exit_code() == 1
        assert server.stderr() == (
            f"serve.py: error: {tmp_path} has no tokenizer.json: is the model path right?\n"
        )


def test_engine_that_dies_ends_the_server():
    with serving(mode="die") as server:
        url = server.url()
        body = {"prompt": [5], "max_tokens": 50, "stream": True}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=20)
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"code":503' in response.text
        assert server.exit_code() == 1
        assert server.stderr() == ("serve.py: error: The engine process ended with exit code 7.\n")


def test_sigterm_while_the_engine_starts():
    with serving(mode="slow-start") as server:
        server.wait_for("Starting the engine")
        deadline = time.monotonic() + 10
        while not children_of(server.process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        (child,) = children_of(server.process.pid)
        server.process.terminate()
        assert server.exit_code() == 0
        assert server.stderr() == ""
        assert gone(child)


def test_sigterm_lets_answers_finish():
    with serving() as server:
        url = server.url()
        body = {"prompt": [5], "max_tokens": 30, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.terminate()
            lines = [line for line in lines if line]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.exit_code() == 0
        assert server.stderr() == ""


def test_new_connections_are_refused_while_answers_finish():
    with serving() as server:
        url = server.url()
        body = {"prompt": [5], "max_tokens": 45, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.terminate()
            server.wait_for("Stopping")
            deadline = time.monotonic() + 5
            while not refuses(url):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            lines = [line for line in lines if line]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.exit_code() == 0


def refuses(url):
    try:
        httpx.get(f"{url}/health", timeout=5)
    except httpx.ConnectError:
        return True
    return False


def test_no_grace_ends_answers_at_once():
    with serving("--shutdown-grace-period-secs", "0") as server:
        url = server.url()
        body = {"prompt": [5], "max_tokens": 250, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            began = time.monotonic()
            server.process.terminate()
            lines = [line for line in lines if line]
        assert time.monotonic() - began < 0.9
        assert lines[-1] == "data: [DONE]"
        assert "shutting down" in lines[-2]
        assert server.exit_code() == 0


def test_keys_reach_the_server_and_stay_there():
    with serving("--api-key", "sk-one") as server:
        url = server.url()
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        bearer = {"authorization": "Bearer sk-one"}
        info = httpx.get(f"{url}/get_server_info", headers=bearer)
        assert info.status_code == 200
        assert "sk-one" not in info.text
        server.process.terminate()
        assert server.exit_code() == 0
        assert "sk-one" not in server.stderr() + "".join(server.out)


def test_answers_that_take_too_long_end_with_an_event():
    with serving() as server:
        url = server.url()
        body = {"prompt": [5], "max_tokens": 250, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.terminate()
            lines = [line for line in lines if line]
        assert lines[-1] == "data: [DONE]"
        error = json.loads(lines[-2][6:])["error"]
        assert error["message"] == "The server is shutting down."
        assert server.exit_code() == 0
        assert server.stderr() == ""


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tp", "8", "--dp-size", "3", "--enable-dp-attention"], "tp_size % dp_size == 0"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--port", "many"], "--port"),
    ],
)
def test_wrong_flags_exit_2(flags, sentence):
    script = ROOT / "scripts" / "serve.py"
    done = subprocess.run(
        [sys.executable, str(script), *flags], capture_output=True, text=True, timeout=30, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("serve.py: error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_flags_for_what_is_always_on_change_nothing():
    assert parse_args(["--enable-metrics", "--enable-cache-report"]) == parse_args([])
