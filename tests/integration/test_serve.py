"""From HTTP to the mesh and back: the reference's tokens, crowds, disconnects, bad starts."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time

import httpx
import openai
import pytest

from tests.fixtures import DATA, load_fixture
from tests.integration.server import command, environment, running_server

pytestmark = pytest.mark.timeout(300)

SMALL = ("--max-total-tokens", "2048", "--decode-buckets", "8", "--extend-buckets", "256")
LAYOUTS = {
    "8/8/8": ("--tp", "8", "--dp-size", "8", "--ep", "8", "--enable-dp-attention"),
    "8/4/4": ("--tp", "8", "--dp-size", "4", "--ep", "4", "--enable-dp-attention"),
}


SERVERS = [
    ("deepseek_v3", "8/8/8"),
    ("deepseek_v2", "8/8/8"),
    ("deepseek_v3", "8/4/4"),
    ("deepseek_v2_lite", "8/4/4"),
]


@pytest.fixture(scope="module", params=SERVERS, ids=str)
def server(request):
    name, layout = request.param
    exchange = "all_to_all" if name == "deepseek_v2" else "none"
    with running_server(
        *("--model-path", str(DATA / name), "--moe-a2a-backend", exchange),
        *(*LAYOUTS[layout], *SMALL),
    ) as url:
        yield url, load_fixture(name)


def complete(url, **body):
    response = httpx.post(f"{url}/v1/completions", json={"temperature": 0, **body}, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def assert_idle(url):
    """Nothing runs, waits or holds a page; nothing was compiled."""
    deadline = time.monotonic() + 20
    while True:
        info = httpx.get(f"{url}/get_server_info").json()
        busy = info["waiting"] + sum(
            s["running"] + s["used_tokens"] for s in info["internal_states"]
        )
        if not busy:
            assert info["recompilations"] == 0
            return
        assert time.monotonic() < deadline, info
        time.sleep(0.1)


def test_the_references_answers_over_http(server):
    url, fixture = server
    ids = [p["prompt"] for p in fixture.prompts]
    answer = complete(url, prompt=ids, max_tokens=32, logprobs=0)
    for p, choice in zip(fixture.prompts, answer["choices"], strict=True):
        for got, want in zip(choice["logprobs"]["token_logprobs"], p["logprobs"], strict=True):
            assert abs(got - want) < 1e-3
    texts = fixture.expected["text_prompts"]
    answer = complete(url, prompt=[t["text"] for t in texts], max_tokens=32)
    assert [c["text"] for c in answer["choices"]] == [t["output_text"] for t in texts]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    for chat in fixture.expected["chats"]:
        answer = client.chat.completions.create(
            model="x", messages=chat["messages"], max_tokens=32, temperature=0
        )
        assert answer.choices[0].message.content == chat["output_text"]
    assert_idle(url)


def test_64_streams_of_which_10_hang_up(server):
    """Mixed lengths, all at once; those who stay get exactly their tokens, pages balance."""
    url, fixture = server
    reference = {}
    for p in fixture.prompts:
        whole = complete(url, prompt=p["prompt"], max_tokens=32, logprobs=0)["choices"][0]
        reference[p["id"]] = whole["logprobs"]["tokens"]

    async def one(client, i):
        prompt = fixture.prompts[i % 8]
        length = 1 + (i * 7) % 32
        leaves = i % 6 == 5 and i < 60
        body = {
            "prompt": prompt["prompt"],
            "max_tokens": 32 if leaves else length,
            "temperature": 0,
            "stream": True,
            "logprobs": 0,
        }
        tokens = []
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        tokens += choice["logprobs"]["tokens"] if choice["logprobs"] else []
                if leaves and len(tokens) >= 1 + i % 4:
                    return "left"
        assert tokens == reference[prompt["id"]][:length], i
        return "stayed"

    async def crowd():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    outcomes = asyncio.run(crowd())
    assert (outcomes.count("left"), outcomes.count("stayed")) == (10, 54)
    assert_idle(url)


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--tp", "8", "--dp", "3", "--enable-dp-attention"], 2, "one of [1, 2, 4, 8]"),
        (["--tp", "8", "--dp", "2", "--enable-dp-attention", "--ep", "3"], 2, "tp_size % ep_size"),
        (["--dp-size", "2"], 2, "scripts/launch_server.py"),
        (["--enable-eplb"], 2, "--enable-eplb"),
        (["--port", "99999"], 2, "between 0 and 65535"),
        (["--model-path", "/nowhere"], 1, "/nowhere is not a folder"),
        (["--device", "cuda"], 1, "no such device"),
        (["--max-total-tokens", "99999999999999"], 1, "GiB on each device"),
        (["--model-path", str(DATA / "deepseek_v3"), "--context-length", "9999"], 1, "9999"),
    ],
)
def test_a_bad_start_is_one_sentence(flags, code, text):
    done = subprocess.run(
        command("--device", "cpu", "--port", "0", *flags),
        env={name: v for name, v in environment().items() if name != "JAX_PLATFORMS"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert text in errors[0]
    assert "Traceback" not in done.stderr


def test_a_broken_checkpoint_is_one_sentence(tmp_path):
    for file in (DATA / "deepseek_v3").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    done = subprocess.run(
        command("--device", "cpu", "--port", "0", "--model-path", str(tmp_path)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "not a complete safetensors file" in done.stderr
    assert "Traceback" not in done.stderr
