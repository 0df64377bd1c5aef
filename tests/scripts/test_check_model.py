"""The check of a whole model's kernels, at a toy size with kernels in interpreters."""

from __future__ import annotations

import json

import pytest

from model.ops import hopper_products
from model.ops.dense import hopper_fp8 as dense
from model.ops.grouped_mlp import hopper_fp8 as experts
from model.ops.kernels import Kernels
from model.ops.mla_attention import extend, hopper
from scripts import check_model
from tests.fixtures import DATA
from tests.harness import KERNELS, PROCESSORS, needs_interpreter

FLAGS = ["--model-path", str(DATA / "deepseek_v2_lite"), "--device", "cpu", "--unit", "1"]


@pytest.fixture(autouse=True)
def configured(monkeypatch):
    """The devices of this process are chosen already."""
    monkeypatch.setattr(check_model, "configure_jax", lambda config: None)


def compared_step(number, flags, monkeypatch, capsys):
    """The row of one step, which is enough here: compiling takes long."""
    step = check_model.steps(1)[number]
    monkeypatch.setattr(check_model, "steps", lambda unit: [step])
    assert check_model.main(flags) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["result"] == "good"
    assert row["kernels"] != row["definition"]
    return row


def test_kernels_of_a_whole_model_are_compared_with_its_definition(monkeypatch, capsys):
    monkeypatch.setattr(check_model, "choose_kernels", lambda *_, **__: KERNELS)
    assert compared_step(3, FLAGS, monkeypatch, capsys)["step"] == "decode beside a prompt"


@needs_interpreter
def test_fp8_weights_stay_so_also_in_kernels_for_hopper(monkeypatch, capsys, tmp_path):
    """A whole model whose FP8 products and experts are all theirs."""
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    tiny = json.loads((DATA / "deepseek_v3" / "config.json").read_text()) | {
        **{"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"q_lora_rank": 128, "qk_nope_head_dim": 112, "v_head_dim": 128},
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        "quantization_config": block,
    }
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    flags = ["--model-path", str(tmp_path), "--load-format", "dummy", *FLAGS[2:]]
    taken = set()

    def choose(*args, fp8, **kwargs):
        taken.update(path for path, w in fp8.items() if not dense.unsupported(w, w.contracted[0]))
        return Kernels(dense="hopper", grouped_mlp="hopper", interpret=True)

    for kernel in (dense.matmul_parts, experts.grouped_mlp):
        kernel.clear_cache()  # traced with another number
    monkeypatch.setattr(hopper_products, "PROCESSORS", PROCESSORS)
    monkeypatch.setattr(check_model, "choose_kernels", choose)
    assert compared_step(4, flags, monkeypatch, capsys)["step"] == "decode"
    of = {path.rpartition(".")[2] for path in taken}
    assert of == {"q_b", "out", "gate_up", "down"}


def test_prefixes_have_one_piece_and_several():
    unit, pieces = 100, []
    for _, _, chunks in check_model.steps(unit)[:-1]:
        rows = -(-sum(n for _, _, n in chunks) // check_model.ROWS) * check_model.ROWS
        size = min(extend.MAX_PIECE, max(extend.MIN_PIECE, rows))
        pieces.append(-(-sum(start for _, start, _ in chunks) // size))
        assert rows >= hopper.LEAST_ROWS
    assert pieces == [0, 1, 2, 0]


def test_one_bad_step_is_an_error(monkeypatch):
    rows = [{"step": "one", "result": "good"}, {"step": "two", "result": "bad"}]
    monkeypatch.setattr(check_model, "compare", lambda *_: iter(rows))
    assert check_model.main(FLAGS) == 1


def test_a_wrong_flag_is_a_sentence(capsys):
    assert check_model.main(["--device", "cpu", "--nonsense"]) == 2
    assert "check_model: error:" in capsys.readouterr().err
