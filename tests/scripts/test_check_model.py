"""The check of a whole model's kernels, at a toy size with kernels in interpreters."""

from __future__ import annotations

import json

import pytest

from model.ops.mla_attention import extend, hopper
from scripts import check_model
from tests.fixtures import DATA
from tests.harness import KERNELS

FLAGS = ["--model-path", str(DATA / "deepseek_v2_lite"), "--device", "cpu", "--unit", "1"]


@pytest.fixture(autouse=True)
def configured(monkeypatch):
    """The devices of this process are chosen already."""
    monkeypatch.setattr(check_model, "configure_jax", lambda config: None)


def test_kernels_of_a_whole_model_are_compared_with_its_definition(monkeypatch, capsys):
    monkeypatch.setattr(check_model, "choose_kernels", lambda *_, **__: KERNELS)
    last = check_model.steps(1)[-1]  # one is enough here: compiling takes long
    monkeypatch.setattr(check_model, "steps", lambda unit: [last])
    assert check_model.main(FLAGS) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (row["step"], row["result"]) == (last[0], "good")
    assert row["kernels"] != row["definition"]


def test_prefixes_have_one_piece_and_several():
    unit, pieces = 100, []
    for _, _, chunks in check_model.steps(unit):
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
