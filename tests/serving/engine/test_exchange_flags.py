"""What the flags about expert exchange mean, and what they refuse."""

from __future__ import annotations

import pytest

from serving.config import ConfigError, parse_args
from serving.engine.engine import XLA_FLAGS_OF_MESHES, describe, xla_flags
from sharding import comm
from tests.serving.engine.engines import finish, fixture_engine, request, uncompiled

DPA = ["--tp", "8", "--dp-size", "8", "--ep", "8", "--enable-dp-attention"]


def test_defaults():
    config = parse_args(DPA)
    assert (config.moe_a2a_backend, config.moe_dispatch_dtype) == ("auto", "auto")


@pytest.mark.parametrize(
    "flags",
    [
        ["--moe-dispatch-dtype", "fp8_e4m3"],
        ["--deepep-dispatcher-output-dtype", "fp8"],
    ],
)
def test_float8_by_either_name(flags):
    assert parse_args([*DPA, *flags]).moe_dispatch_dtype == "fp8_e4m3"


def test_flags_for_what_the_layout_does_change_nothing():
    plain = parse_args(DPA)
    assert parse_args([*DPA, "--enable-dp-lm-head", "--moe-dense-tp-size", "1"]) == plain
    groups = ["--tp", "8", "--dp-size", "2", "--enable-dp-attention"]
    assert parse_args([*groups, "--moe-dense-tp-size", "4"]) == parse_args(groups)
    assert parse_args(["--tp", "4", "--moe-dense-tp-size", "4"]) == parse_args(["--tp", "4"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tp", "8", "--enable-dp-lm-head"], "Please enable dp attention"),
        ([*DPA, "--moe-dense-tp-size", "8"], "an attention group (--tp / --dp-size, here 1)"),
        (
            ["--tp", "8", "--dp", "2", "--enable-dp-attention", "--moe-dense-tp-size", "1"],
            "an attention group (--tp / --dp-size, here 4)",
        ),
        (["--tp", "8", "--moe-dispatch-dtype", "fp8_e4m3"], "no token is sent"),
        ([*DPA, "--moe-dispatch-dtype", "int4"], "--moe-dispatch-dtype"),
    ],
)
def test_what_is_refused(flags, sentence):
    with pytest.raises(ConfigError) as error:
        parse_args(flags)
    assert sentence in str(error.value)


@pytest.mark.parametrize("flags", [{"moe_dispatch_dtype": "fp8_e4m3"}, {"exchange": "all_to_all"}])
def test_a_model_without_experts_exchanges_nothing(flags):
    with pytest.raises(ConfigError, match="no experts"):
        fixture_engine("llama", tp=2, dp=2, ep=2, **flags)


def test_micro_batches_choose_by_their_own_rows(monkeypatch):
    """All of a cut program's rows would take all_to_all, and neither half of them does."""

    def choice(layout, tokens, k, row_bytes):
        return "all_to_all" if tokens > 6 else "none"

    monkeypatch.setattr(comm, "choose_exchange", choice)
    flags = {"decode_buckets": (2, 10, 20), "extend_buckets": (8,)}
    overlap = {"enable_two_batch_overlap": True, "tbo_min_decode_rows": 10}
    with uncompiled():
        runner = fixture_engine(tp=2, dp=2, ep=2, exchange="auto", **flags, **overlap).runner
    assert runner.exchanges == {
        "extend 8 beside 20": "all_to_all",
        "decode 20": "all_to_all",
        "decode 10": "none",
        "decode 2": "none",
    }
    assert "expert exchange all_to_all or none, " in describe(runner)[0]


def test_sizes_of_two_batch_overlap_mean_nothing_without_it():
    flags = ["--tbo-min-decode-rows", "8"]
    (warning,) = parse_args([*DPA, *flags]).warnings
    assert warning == "--tbo-min-decode-rows has no effect without --enable-two-batch-overlap."
    assert not parse_args([*DPA, *flags, "--enable-two-batch-overlap"]).warnings


def test_the_users_options_of_xla_win():
    (name,) = XLA_FLAGS_OF_MESHES
    assert xla_flags("") == f"--{name}=true"
    assert xla_flags(f"--xla_a=1 --{name}=false") == f"--xla_a=1 --{name}=false"
    assert xla_flags("--xla_a=1") == f"--xla_a=1 --{name}=true"


def test_an_engine_tells_the_exchange_of_each_program():
    engine = fixture_engine(
        "deepseek_v2_lite", tp=8, dp=8, ep=8, exchange="auto", moe_dispatch_dtype="fp8_e4m3"
    )
    assert set(engine.runner.exchanges) == {"decode 4", "extend 64 beside 4"}
    assert set(engine.runner.exchanges.values()) <= {"none", "all_to_all"}
    prompts = [[5 + i, 9, 11] for i in range(9)]
    tokens = finish(engine, [request(str(i), p, 4) for i, p in enumerate(prompts)])
    assert all(len(answer) == 4 for answer in tokens.values())
