"""Estimates against engines that really run, and --dry-run without any device."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from model.config import ModelConfig
from scripts.bench_offline import SHAPES
from serving.config import ConfigError, ServerConfig, parse_args
from serving.engine import dry_run as dry_runs
from serving.engine import estimate as estimates
from serving.engine import runner as runners
from serving.engine.buckets import make_buckets
from serving.engine.dry_run import dry_run
from serving.engine.engine import make_engine
from serving.engine.estimate import describe, estimate, worth
from serving.engine.memory import MANY_PAGES, PAGES_STEP, pages_in, step_bytes
from sharding.layout import LayoutError, make_layout
from sharding.sources import open_source
from sharding.step import ModelSpec
from tests.fixtures import DATA
from tests.integration.server import command, environment
from tests.serving.engine.engines import uncompiled

GIB = 1 << 30
POOL = 1_000_000


def estimated(name, layout, **flags):
    config = ServerConfig(model_path=str(DATA / name), **flags)
    source = open_source(config.model_path, "dummy")
    return estimate(config, source, make_layout(*layout), platform="cpu", memory=None)


@pytest.fixture
def v3(tmp_path):
    folder = tmp_path / "deepseek-v3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES["deepseek-v3"]), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "layout", "kv"),
    [
        ("deepseek_v3", (8, 8, 8), "auto"),
        ("deepseek_v3", (8, 2, 8), "bfloat16"),
        ("glm4_moe_lite", (4, 1, 4), "auto"),  # 5 heads and 4 devices: padded
        ("mixtral", (4, 2, 1), "auto"),  # 3 KV heads: padded, and cut in two
        ("qwen3", (8, 1, 1), "auto"),  # 2 KV heads: copied
    ],
)
def test_weights_and_pages_are_those_of_the_engine(name, layout, kv, monkeypatch):
    """Byte by byte on the first device, for a pool of given bytes."""
    monkeypatch.setattr(runners, "CPU_POOL_BYTES", POOL)
    monkeypatch.setattr(estimates, "CPU_POOL_BYTES", POOL)
    flags = {"page_size": 4, "decode_buckets": (4,), "extend_buckets": (16,), "kv_cache_dtype": kv}
    found = estimated(name, layout, **flags)
    tp, dp, ep = layout
    config = ServerConfig(
        model_path=str(DATA / name),
        load_format="dummy",
        tp_size=tp,
        dp_size=dp,
        ep_size=ep,
        **flags,
    )
    with uncompiled():
        runner = make_engine(config).runner
    first = jax.devices()[0]
    held = [s.data for w in runner.weights for s in w.addressable_shards if s.device == first]
    assert len(held) == len(runner.weights)
    assert found.weights == sum(array.nbytes for array in held)
    assert found.pages == runner.num_pages
    assert found.kv_tokens == (runner.num_pages - 1) * 4
    assert runner.kv_bytes_per_device() == found.pages * found.page_bytes
    assert POOL - found.page_bytes < found.pages * found.page_bytes <= POOL
    assert (found.slots, found.context) == (
        runner.buckets.slots,
        runner.model.max_position_embeddings,
    )


def test_what_lives_between_programs_is_counted():
    """As `ProgramFactory.step_bytes` counts it; a guess of temporaries comes on top."""
    flags = {"decode_buckets": (64,), "extend_buckets": (1,)}
    found = estimated("qwen3", (1, 1, 1), **flags)
    config = ServerConfig(**flags)
    buckets = make_buckets(config, platform="cpu", num_slices=1, max_context=found.context)
    sizes = {"vocab": found.config.vocab_size, "width": found.config.hidden_size}
    assert found.working > step_bytes(buckets, **sizes, itemsize=4)


def test_tokens_asked_for_are_pages_and_the_sink():
    found = estimated("deepseek_v3", (8, 8, 8), page_size=16, max_total_tokens=100)
    assert (found.pages, found.kv_tokens) == (8, 112)


@pytest.mark.parametrize(
    ("name", "layout", "factor", "text"),
    [
        ("deepseek_v3", (8, 8, 8), 8, "pays: 8.00 times the KV tokens of --tp 8"),
        ("deepseek_v3", (8, 2, 8), 2, "pays: 2.00 times"),
        ("qwen3", (4, 4, 1), 2, "pays: 2.00 times"),  # 4 devices hold 2 copies of 2 KV heads
        ("qwen3", (2, 2, 1), 1, "saves no KV memory here (tensor parallelism cuts 2 KV heads"),
        ("deepseek_v3", (8, 1, 8), 1, "is off; --dp-size 8 would hold 8.00 times the KV tokens"),
        ("qwen3", (2, 1, 1), 1, "is off and would save no KV memory"),
        ("qwen3", (1, 1, 1), 1, "needs more than one device"),
    ],
)
def test_it_says_whether_dp_attention_pays(name, layout, factor, text):
    found = estimated(name, layout)
    assert found.kv_factor == factor
    assert worth(found).startswith(text)


def test_more_weights_count_against_it():
    found = estimated("deepseek_v3", (8, 8, 8))
    pool, plain = found.pages * found.page_bytes, estimated("deepseek_v3", (8, 1, 8))
    assert found.more_weights == found.weights - plain.weights > 0
    assert found.net_factor is None  # the pool of an emulated device is the same all the same
    dear = replace(found, memory=GIB, more_weights=7 * pool)
    assert dear.net_factor == pytest.approx(1)
    assert worth(dear).startswith("does not pay here: 8.00 times")


def test_deepseek_v3_has_its_published_size(v3):
    source = open_source(v3, "dummy")
    spec = ModelSpec(source.config, jnp.dtype(jnp.bfloat16), make_layout(8, 8, 8), source.fp8)
    numbers = sum(math.prod(p.real_shape) for p in spec.params if p.block is None)
    assert numbers == pytest.approx(671.03e9, rel=1e-4)
    assert ModelConfig.from_folder(v3).latent_dim == 576
    assert spec.page_bytes(16, jnp.bfloat16) == 16 * 61 * 576 * 2


@pytest.mark.parametrize(
    ("flags", "slices", "texts"),
    [
        ("--tp 8 --dp-size 8 --ep 8", 8, ["32 on each device", "pays: 8.00 times"]),
        ("--tp 16 --dp-size 16 --ep 16", 16, ["16 on each device", "pays: 16.00 times"]),
        ("--tp 32 --dp-size 8 --ep 32", 8, ["(attn_dp 8, attn_tp 4, moe_ep 32, moe_tp 1)"]),
    ],
)
def test_a_dry_run_needs_no_machine_of_that_size(v3, flags, slices, texts):
    argv = ["--model-path", str(v3), "--dry-run", "--device-memory-gib", "141"]
    lines = "\n".join(dry_run(parse_args([*argv, *flags.split(), "--enable-dp-attention"])))
    for text in [*texts, f"in each of {slices} slices", "weights", "largest batch"]:
        assert text in lines


def test_a_dry_run_says_what_does_not_fit_or_is_not_known(v3):
    argv = ["--model-path", str(v3), "--dry-run", "--tp", "8", "--device", "tpu"]
    assert "depends on the device's memory (--device-memory-gib)" in "\n".join(
        dry_run(parse_args(argv))
    )
    lines = "\n".join(dry_run(parse_args([*argv, "--device-memory-gib", "80"])))
    assert "does not fit: weights and programs take about" in lines
    assert "of 72.00 GiB that it may use" in lines
    flags = ["--device-memory-gib", "141", "--max-total-tokens", "10000000"]
    lines = "\n".join(dry_run(parse_args([*argv, *flags])))
    assert "does not fit: weights and a pool of 10,000,000 tokens take about 734." in lines


def test_the_command_touches_no_device(v3):
    """The script itself, then what it calls, with JAX's table of devices still empty after."""
    flags = [*("--model-path", str(v3), "--dry-run", "--device-memory-gib", "141"), "--tp", "8"]
    done = subprocess.run(
        command(*flags, "--attn-dp-size", "8", "--ep", "8"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "pays: 8.00 times" in done.stdout
    code = (
        "import sys; from jax._src import xla_bridge; from serving.config import parse_args; "
        "from serving.engine.dry_run import dry_run; dry_run(parse_args(sys.argv[1:])); "
        "assert not xla_bridge._backends, xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code, *flags], check=True, timeout=120, env=environment())


def test_a_dry_run_refuses_as_a_launch_does(v3):
    done = subprocess.run(
        command("--model-path", str(v3), "--dry-run", "--tp", "8", "--context-length", "999999"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(),
    )
    assert done.returncode == 2
    assert "--context-length 999999 is longer than the model's 163840" in done.stderr
    with pytest.raises(ConfigError, match="goes with --dry-run"):
        parse_args(["--device-memory-gib", "80"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--enable-two-batch-overlap"], "llama model of this size has no experts"),
        (["--moe-a2a-backend", "all_to_all"], "llama model of this size has no experts"),
        (["--moe-dispatch-dtype", "fp8"], "llama model of this size has no experts"),
        (["--max-total-tokens", "99999999999999"], "--max-total-tokens 99999999999999 would take"),
        (["--device-memory-gib", "inf"], "must be positive and at most 1048576, got inf"),
    ],
)
def test_a_dry_run_refuses_what_an_engine_would(flags, sentence):
    layout = ["--tp", "2", "--dp-size", "2", "--ep", "2", "--enable-dp-attention"]
    with pytest.raises(ConfigError) as error:
        dry_run(parse_args(["--model-path", str(DATA / "llama"), "--dry-run", *layout, *flags]))
    assert sentence in str(error.value)


def test_every_gpu_of_a_machine_with_one_has_nobody_to_exchange_with(monkeypatch):
    monkeypatch.setattr(dry_runs, "gpu_memories", lambda: [80 * GIB])
    with pytest.raises(LayoutError, match="all_to_all needs more than one device"):
        dry_run(parse_args(["--dry-run", "--moe-a2a-backend", "all_to_all"]))


def test_a_launch_logs_the_estimate_before_loading(caplog):
    config = ServerConfig(
        model_path=str(DATA / "deepseek_v2_lite"),
        load_format="dummy",
        max_total_tokens=64,
        decode_buckets=(1,),
        extend_buckets=(16,),
    )
    with uncompiled(), caplog.at_level("INFO", "meshserve.engine"):
        make_engine(config)
    messages = [record.getMessage() for record in caplog.records]
    (at,) = [
        i for i, m in enumerate(messages) if "KV cache      64 tokens in each of 1 slices" in m
    ]
    (loaded,) = [i for i, m in enumerate(messages) if m.startswith("weights on the devices")]
    assert at < loaded
    assert describe(estimated("deepseek_v2_lite", (1, 1, 1)), "x")[0].startswith(
        "x: deepseek_v2, MLA"
    )


def test_a_few_bytes_more_or_less_give_the_same_pool():
    page, many = 31_104 * 16, MANY_PAGES + PAGES_STEP
    assert {pages_in(many * page + more, page) for more in (0, 17, 60 * page)} == {many}
    assert pages_in((MANY_PAGES - 1) * page, page) == MANY_PAGES - 1
    assert pages_in(-page, page) == 0
