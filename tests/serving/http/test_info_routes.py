"""What the server says of itself, and what its modules must not drag in."""

import subprocess
import sys

import pytest

from tests.serving.http.support import run, serving

pytestmark = pytest.mark.timeout(30)


def test_models():
    async def main():
        async with serving(started=1234.5) as (http, _, _engine):
            card = (await http.get("/v1/models/tiny")).json()
            assert card["id"] == "tiny"
            assert card["object"] == "model"
            assert card["created"] == 1234
            assert card["max_model_len"] == 256
            listed = (await http.get("/v1/models")).json()
            assert listed == {"object": "list", "data": [card]}
            for other in ("x", "org/x"):
                response = await http.get(f"/v1/models/{other}")
                assert response.status_code == 404
                assert response.json() == {
                    "error": {
                        "message": f"The model '{other}' does not exist",
                        "type": "invalid_request_error",
                        "param": "model",
                        "code": "model_not_found",
                    }
                }

    run(main)


def test_health_and_info():
    async def main():
        async with serving() as (http, state, _engine):
            assert (await http.get("/health")).status_code == 200
            info = (await http.get("/get_model_info")).json()
            assert info["is_generation"] is True
            assert info["model_path"] == state.config.model_path
            assert info["model_type"] == "deepseek_v3"
            assert info["architectures"] == ["DeepseekV3ForCausalLM"]
            assert (await http.get("/get_weight_version")).json() == {"weight_version": "default"}
            assert (await http.get("/ping")).status_code == 200
            info = (await http.get("/get_server_info")).json()
            assert info["topology"] == "mesh dp2 ep1 tp1 on 2 fake devices"
            assert info["engine"] == {"device": "fake"}
            assert info["tp_size"] == 1
            assert info["recompilations"] == 0
            assert [part["dp_rank"] for part in info["internal_states"]] == [0, 1]
            state.stopping = True
            assert (await http.get("/health")).status_code == 503
            assert (await http.get("/get_server_info")).json()["status"] == "stopping"

    run(main)


def test_the_front_does_without_jax():
    code = (
        "import sys, serving.http.server, serving.tokenizer, serving.engine_process\n"
        "print([m for m in ('jax', 'flax', 'model', 'sharding', 'serving.scheduler') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert done.stdout.strip() == "[]", done.stderr
