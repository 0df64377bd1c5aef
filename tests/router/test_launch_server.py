"""Replicas behind the router in one command: flags, restarts, and nothing that outlives it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from router.config import ConfigError as RouterConfigError
from scripts.launch_server import engine_flags, free_ports, parse, visible_gpus
from serving.config import ConfigError
from sharding.layout import LayoutError

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).resolve().parents[2]
FAKE = str(ROOT / "tests" / "router" / "fake_serve.py")
DRIVER = (
    "import sys; from scripts.launch_server import main; "
    f"sys.exit(main(sys.argv[1:], command=[sys.executable, {FAKE!r}]))"
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launched:
    """A launch_server process over fake workers, and what it has printed so far."""

    def __init__(self, *flags, **environ):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", DRIVER, "--host", "127.0.0.1", "--port", str(self.port)),
                *("--device", "cpu", "--router-prometheus-port", "0"),
                *("--router-dp-worker-base-port", str(free_port()), *flags),
            ],
            cwd=ROOT,
            env={k: v for k, v in {**os.environ, **environ}.items() if v is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self):
        return "\n".join(self.lines)

    def until(self, condition, seconds=20):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)
        return value

    def found(self, pattern):
        return re.findall(pattern, self.text)

    def ready(self, num):
        def check():
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"{self.url}/readiness").json()
                return answer["status"] == "ready" and answer["healthy_workers"] == num
            return False

        return check

    def reasons(self):
        """Why it is not ready; None while it does not answer."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readiness").json()["workers"]

    def ask(self):
        body = {"model": "x", "prompt": "hello", "max_tokens": 3, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=20)
        assert answer.status_code == 200, (answer.text, self.text)

    def end(self, signum, seconds=20):
        self.process.send_signal(signum)
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@contextlib.contextmanager
def launched(*flags, **environ):
    server = Launched(*flags, **environ)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGTERM)
        for pid in map(int, server.found(r"(?:pid|child) (\d+)")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def alive(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_two_workers_a_killed_one_comes_back_and_ctrl_c_ends_all():
    with launched("--dp-size", "2") as server:
        server.until(server.ready(2))
        server.ask()
        pids = dict(server.found(r"\[worker (\d)\] pid (\d+)"))
        assert sorted(pids) == ["0", "1"]
        os.kill(int(pids["1"]), signal.SIGKILL)
        server.until(lambda: "worker 1 died: it was ended by SIGKILL" in server.text)
        # The other one serves meanwhile.
        server.ask()
        server.until(lambda: len(server.found(r"\[worker 1\] pid (\d+)")) == 2)
        server.until(server.ready(2))
        workers = httpx.get(f"{server.url}/workers").json()["workers"]
        assert len({worker["url"] for worker in workers}) == 2
        for _ in range(4):
            server.ask()
        assert server.end(signal.SIGINT) == 0
        started = {int(pid) for pid in server.found(r"pid (\d+)")}
        assert len(started) == 3
        assert not any(alive(pid) for pid in started)


def test_each_worker_sees_its_own_gpus_also_after_a_restart():
    flags = ("--device", "cuda", "--tp", "2", "--dp-size", "2")
    environ = {"CUDA_VISIBLE_DEVICES": "3,5,6,7", "JAX_PLATFORMS": None}
    with launched(*flags, **environ) as server:
        server.until(server.ready(2))
        seen = server.found(r"\[worker (\d)\] pid (\d+) rank (\d) gpus (\S+)")
        assert sorted((w, rank, gpus) for w, _, rank, gpus in seen) == [
            ("0", "0", "3,5"),
            ("1", "1", "6,7"),
        ]
        pid = next(int(pid) for w, pid, *_ in seen if w == "1")
        os.kill(pid, signal.SIGKILL)
        server.until(lambda: len(server.found(r"\[worker 1\] pid \d+ rank 1 gpus 6,7")) == 2)


def test_what_a_worker_started_goes_with_it():
    """The engine is in a session of its own: a kill of its parent must not leave it behind."""
    with launched("--served-model-name", "forks") as server:
        server.until(server.ready(1))
        pid, child = (int(server.found(p)[0]) for p in (r"pid (\d+)", r"child (\d+)"))
        assert alive(child)
        os.kill(pid, signal.SIGKILL)
        server.until(lambda: not alive(child))
        server.until(lambda: len(server.found(r"child (\d+)")) == 2)
        server.until(server.ready(1))
        assert server.end(signal.SIGTERM) == 0
        assert not alive(int(server.found(r"child (\d+)")[1]))


def test_no_orphan_when_the_launcher_itself_is_killed():
    with launched("--dp-size", "2") as server:
        server.until(server.ready(2))
        pids = [int(pid) for pid in server.found(r"pid (\d+)")]
        server.end(signal.SIGKILL)
        server.until(lambda: not any(alive(pid) for pid in pids))


def test_workers_that_cannot_start_say_why_and_the_launch_ends():
    with launched("--dp-size", "2", "--served-model-name", "fails") as server:
        reasons = server.until(server.reasons)
        assert set(reasons.values()) == {"it is starting"}
        assert server.process.wait(30) == 1
        server._reader.join(5)
        assert "could not start 3 times in a row (serve.py: error: the weights are missing)" in (
            server.text
        )
        assert "No worker can start: giving up." in server.text
        assert len(server.found(r"\[worker 0\] serve.py: error: the weights are missing")) == 3


def test_a_stream_that_runs_is_finished_on_ctrl_c():
    with launched() as server:
        server.until(server.ready(1))
        body = {"model": "x", "prompt": "hello", "max_tokens": 40, "stream": True}
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body, timeout=20
        ) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) >= 40
        assert server.process.wait(20) == 0


# ---- flags -------------------------------------------------------------------------------------


def test_engine_flags_go_to_workers_and_router_flags_to_the_router():
    launch = parse(
        [
            *("--tp", "2", "--dp-size", "3", "--page-size", "32", "--port", "1234"),
            *("--router-policy", "round_robin", "--router-cache-threshold", "0.7"),
            *("--device", "cpu", "--router-dp-worker-base-port", "41000"),
        ],
        {},
    )
    assert launch.engine == ("--tp", "2", "--page-size", "32", "--device", "cpu")
    assert launch.num_workers == 3
    assert launch.base_port == 41000
    assert launch.devices == ()
    router = launch.router
    assert (router.policy, router.cache_threshold) == ("round_robin", 0.7)
    assert (router.host, router.port, router.dp_aware) == ("127.0.0.1", 1234, False)


def test_dp_attention_is_one_worker_whose_ranks_are_addressed():
    flags = ("--tp", "4", "--dp-size", "2", "--enable-dp-attention", "--device", "cpu")
    launch = parse(flags, {})
    assert launch.num_workers == 1
    assert launch.engine == flags
    assert launch.router.dp_aware


def test_replicas_without_tp_have_one_device_each():
    launch = parse(["--dp-size", "2", "--device", "cpu"], {})
    assert launch.engine == ("--device", "cpu", "--tp-size", "1")
    assert parse(["--device", "cpu"], {}).engine == ("--device", "cpu")


def test_gpus_are_shared_out():
    environ = {"CUDA_VISIBLE_DEVICES": "3,5,6,7"}
    assert parse(["--tp", "2", "--dp-size", "2"], environ).devices == ("3,5", "6,7")
    assert parse(["--tp", "2", "--dp-size", "2", "--device", "cpu"], environ).devices == ()
    with pytest.raises(ConfigError, match="need 6 GPUs, and there are 4"):
        parse(["--tp", "2", "--dp-size", "3"], environ)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--router-policy", "best"], "--router-policy"),
        (["--router-worker-urls", "http://a:1"], "launch_router.py"),
        (["--dp-size", "0"], "must be positive"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--router-cache-threshold", "7"], "between 0 and 1"),
        (["--tp", "8", "--dp-size", "3", "--enable-dp-attention"], "one of"),
        (["--device", "tpu", "--dp-size", "2"], "TPU"),
    ],
)
def test_a_bad_flag_is_one_sentence(flags, text):
    with pytest.raises((ConfigError, RouterConfigError, LayoutError), match=re.escape(text)):
        parse(flags, {})


def test_router_flags_with_several_values_take_none_of_the_engines():
    argv = ["--router-request-id-headers", "a", "b", "--model-path", "x", "--port=3"]
    assert engine_flags(argv, with_dp_size=True) == ["--model-path", "x"]


def test_ports_in_use_are_left_out():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert next(free_ports(port)) > port
