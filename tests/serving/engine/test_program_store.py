"""Compiled programs on disk: what a start finds, what it must not find, and what it does without.

Each start here is one of an engine or a factory of its own in this process, which lowers and
compiles as a fresh process does: programs are functions made anew. XLA's own cache is a fresh one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec

from model.config import ModelConfig
from model.ops.kernels import XLA
from serving.engine import program_store
from serving.engine.buckets import Buckets
from serving.engine.engine import CompileCounter
from serving.engine.program_store import Definition, ProgramStore, environment
from serving.engine.programs import ProgramFactory
from sharding.comm import MeshComm
from sharding.layout import make_layout
from sharding.mesh import make_mesh
from sharding.step import ModelSpec, abstract_array
from tests.fixtures import DATA
from tests.serving.engine.engines import finish, fixture_engine, request

ROOT = Path(__file__).resolve().parents[3]
MESH = make_mesh(make_layout(1))


# ---- starts of an engine --------------------------------------------------------------------


@contextlib.contextmanager
def xla_cache(folder):
    """XLA's own cache is this folder, or none."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", folder and str(folder))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture
def cache(tmp_path):
    """An empty compilation cache, XLA's too."""
    with xla_cache(tmp_path / "cache"):
        yield tmp_path / "cache"


@pytest.fixture
def lowered(monkeypatch):
    """Names of the programs that are lowered."""
    names, lower = [], Definition.lower
    monkeypatch.setattr(Definition, "lower", lambda d: names.append(d.name) or lower(d))
    return names


def start(cache, name="llama3", **flags):
    return fixture_engine(name, compilation_cache_dir=str(cache), extend_buckets=(32,), **flags)


def answers(engine):
    """Tokens of all kinds of programs, none of which may compile anything now."""
    counter = CompileCounter()
    kinds = [{}, {"temperature": 1.0, "seed": 3}, {"frequency_penalty": 1.0, "logprobs": 2}]
    requests = [request(str(i), range(3, 40 + i), 12, **kind) for i, kind in enumerate(kinds)]
    tokens = finish(engine, requests)
    assert counter.count == 0
    return tokens


def memory(engine):
    """What the runner asks of its programs, by name."""
    runner = engine.runner
    found = {str(shape): runner.memory_analysis(shape) for shape in runner.buckets.shapes()}
    facts = ("temp_size_in_bytes", "alias_size_in_bytes", "argument_size_in_bytes")
    most = runner._factory.most_temporary_bytes(runner.table_width)
    return most, {name: [getattr(m, f) for f in facts] for name, m in found.items()}


def test_a_second_start_lowers_nothing_and_answers_the_same(cache, lowered, caplog):
    caplog.set_level(logging.INFO, "meshserve.engine")
    first = start(cache)
    names = ["extend 32 beside 4", "decode 4", "full 6", "full 4", "greedy 6", "greedy 4"]
    assert lowered == [*names, "set-up", "scoring"]
    want, sizes = answers(first), memory(first)
    lowered.clear()
    caplog.clear()
    second = start(cache)
    assert "8 programs from the program store, 0 compiled" in caplog.text
    pool = second.runner._kv
    assert answers(second) == want
    assert pool.is_deleted()  # still donated
    assert memory(second) == sizes
    assert lowered == []
    for a, b in zip(
        jax.tree.leaves(first.runner._state), jax.tree.leaves(second.runner._state), strict=True
    ):
        assert a.sharding == b.sharding
    # XLA's cache gives programs that lack functions if they are written once more (on CPU).
    shutil.rmtree(cache / "programs")
    for _ in range(2):
        assert answers(start(cache)) == want


@pytest.mark.parametrize(("platform", "asked"), [("cpu", True), ("cuda", False)])
def test_on_gpus_the_store_takes_the_place_of_xlas_cache(cache, platform, asked):
    store = ProgramStore(cache / "programs", MESH)
    store._devices = [SimpleNamespace(platform=platform)]

    def files_of_xla():
        return [file for file in cache.iterdir() if file.is_file()]

    before = len(files_of_xla())
    with contextlib.suppress(ZeroDivisionError), store.compiling():
        jax.jit(lambda x: 7 * x + 3).lower(jnp.zeros(5)).compile()
        raise ZeroDivisionError
    between = len(files_of_xla())
    assert (between > before) == asked
    jax.jit(lambda x: 8 * x + 3).lower(jnp.zeros(5)).compile()  # on again
    assert len(files_of_xla()) > between
    store._writes = False  # then XLA's cache is better than none
    with store.compiling():
        jax.jit(lambda x: 9 * x + 3).lower(jnp.zeros(5)).compile()
    assert len(files_of_xla()) > between + 1


def test_a_second_start_on_a_mesh(cache, lowered):
    layout = {"tp": 8, "dp": 4, "ep": 8, "exchange": "all_to_all"}
    want = answers(start(cache, "moonlight", **layout))
    assert len(lowered) == 8
    lowered.clear()
    assert answers(start(cache, "moonlight", **layout)) == want
    assert lowered == []


# ---- one small program ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """For a store, where XLA has no cache: all is really compiled."""
    with xla_cache(None):
        yield tmp_path / "cache" / "programs"


def shifted(by: int, x: jax.Array) -> jax.Array:
    return x + by


def definition(**changes):
    s = PartitionSpec()
    arguments = {
        "name": "shifted",
        "fn": functools.partial(shifted, 7),
        "mesh": MESH,
        "in_specs": (s,),
        "out_specs": s,
        "args": (abstract_array((4,), jnp.int32, MESH, s),),
        **changes,
    }
    return Definition(**arguments)


def works(program):
    return np.asarray(program(jnp.arange(4, dtype=jnp.int32))).tolist() == [7, 8, 9, 10]


def test_a_program_is_kept_where_nobody_else_writes(folder):
    store, wanted = ProgramStore(folder, MESH), definition()
    assert store.load(wanted) is None
    assert works(store.compile(wanted, wanted.lower()))
    assert works(ProgramStore(folder, MESH).load(definition()))
    assert store.load(definition(fn=functools.partial(shifted, 8))) is None
    assert folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o077 == 0


def test_a_folder_that_others_write_to_is_not_read(folder, caplog):
    store, wanted = ProgramStore(folder, MESH), definition()
    store.compile(wanted, wanted.lower())
    folder.chmod(0o770)
    assert ProgramStore(folder, MESH).load(wanted) is None
    assert f"compiled programs are not kept: others than you can write to {folder}" in caplog.text


def test_programs_that_no_start_used_for_long_are_deleted(folder):
    store, used, unused = ProgramStore(folder, MESH), definition(), definition(donate=(0,))
    for wanted in (used, unused):
        store.compile(wanted, wanted.lower())
    long_ago = time.time() - 31 * 24 * 3600
    for file in folder.iterdir():
        os.utime(file, (long_ago, long_ago))
    assert store.load(used) is not None
    (folder / ".part-of-one").touch()
    (folder / "thesis").touch()
    for name in (".part-of-one", "thesis"):
        os.utime(folder / name, (long_ago, long_ago))
    later = ProgramStore(folder, MESH)
    assert later.load(used) is not None
    assert later.load(unused) is None
    assert (folder / "thesis").exists()
    assert not (folder / ".part-of-one").exists()


def test_a_link_is_not_followed(folder, tmp_path, caplog):
    folder.parent.mkdir()
    folder.symlink_to(tmp_path)
    assert ProgramStore(folder, MESH).load(definition()) is None
    assert "is a link" in caplog.text


def changed(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def other(data):
    return lambda _: hashlib.sha256(data).digest() + data


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda content: content[:-1],
        changed,
        other(b"no pickle"),
        other(pickle.dumps((b"no program", None, None))),
    ],
    ids=["empty", "truncated", "changed", "no pickle", "no program"],
)
def test_a_damaged_file_is_written_anew(folder, caplog, damage):
    store, wanted = ProgramStore(folder, MESH), definition()
    store.compile(wanted, wanted.lower())
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert store.load(wanted) is None
    assert "the kept program shifted is of no use: " in caplog.text
    store.compile(wanted, wanted.lower())
    assert works(store.load(wanted))


def test_a_full_disk_is_told_once_and_costs_no_start(folder, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    store, wanted = ProgramStore(folder, MESH), definition()
    monkeypatch.setattr(program_store.os, "replace", full)
    for _ in range(2):
        assert works(store.compile(wanted, wanted.lower()))
    assert caplog.text.count("not kept from here on: [Errno 28] No space left on device") == 1
    assert list(folder.iterdir()) == []


def test_an_engine_works_without_a_folder(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    engine = start(tmp_path / "file")
    assert "compiled programs are not kept: " in caplog.text
    assert len(answers(engine)["0"]) == 12


def test_nothing_is_kept_where_nothing_is_to_be(tmp_path, monkeypatch):
    def keeps(cache):
        return ProgramStore.within(cache, MESH)._folder is not None

    assert keeps(str(tmp_path))
    assert not keeps(None)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert not keeps(str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert not keeps(str(tmp_path))
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


# ---- what programs are found by -------------------------------------------------------------


FP8_PATH = "segments.1.experts.w2"


def definitions(*, num_pages=9, table_width=5, **changes):
    """The programs of a factory, as text by name. `changes` are to the model's configuration, or of
    what the factory is given."""
    config = ModelConfig.from_folder(DATA / "moonlight")
    fields = {k: changes.pop(k) for k in list(changes) if hasattr(config, k) and k != "dtype"}
    config = replace(config, **fields)
    layout = changes.pop("layout", make_layout(8, 4, 8))
    spec = ModelSpec(
        config, changes.pop("dtype", jnp.dtype("float32")), layout, changes.pop("fp8", None)
    )
    comm = {"exchange": "auto", **{k: changes.pop(k) for k in COMM if k in changes}}
    mesh = make_mesh(layout)
    given = {
        "buckets": Buckets(decode=(4,), extend=(64,)),
        "kernels": XLA,
        "page_size": 4,
        "kv_dtype": jnp.dtype("float32"),
        **changes,
    }
    buckets = given.pop("buckets")
    factory = ProgramFactory(
        spec, mesh, buckets, comm=MeshComm(layout, **comm), store=ProgramStore(None, mesh), **given
    )
    packing = factory.packing(buckets.shapes()[0], table_width)
    return {
        "forward": str(factory.forward(packing, num_pages)),
        "greedy": str(factory.greedy(4)),
        "full": str(factory.full(4)),
        "set-up": str(factory.set_up()),
        "score": str(factory.score()),
    }


COMM = ("exchange", "fp8_dispatch", "deterministic")
ALL = {"forward", "greedy", "full", "set-up", "score"}


@pytest.fixture(scope="module")
def usual():
    return definitions()


@pytest.mark.parametrize(
    ("change", "programs"),
    [
        ({"rope_theta": 10001.0}, {"forward", "score"}),
        ({"vocab_size": 200}, ALL),
        ({"layout": make_layout(8, 2, 4)}, ALL),
        ({"dtype": jnp.dtype("bfloat16")}, {"forward", "score"}),
        ({"fp8": {FP8_PATH: (8, 8)}}, {"forward", "score"}),
        ({"exchange": "none"}, {"forward", "score"}),
        ({"fp8_dispatch": True}, {"forward", "score"}),
        ({"deterministic": True}, {"forward", "score"}),
        ({"kernels": replace(XLA, norm="pallas")}, {"forward"}),
        ({"page_size": 8}, {"forward"}),
        ({"kv_dtype": jnp.dtype("bfloat16")}, {"forward"}),
        ({"threshold": 0.5}, {"forward"}),
        ({"num_pages": 10}, {"forward"}),
        ({"table_width": 6}, {"forward"}),
        ({"buckets": Buckets(decode=(5,), extend=(64,))}, ALL - {"score"}),
        ({"buckets": Buckets(decode=(4,), extend=(64,), cut_extend_from=1)}, {"forward"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_engine_has_other_programs(usual, change, programs):
    other = definitions(**change)
    assert {name for name in other if other[name] != usual[name]} == programs


@pytest.mark.parametrize(
    "change",
    [
        {"fn": functools.partial(shifted, 8)},
        {"in_specs": (PartitionSpec("dp"),)},
        {"out_specs": PartitionSpec("dp")},
        {"args": (abstract_array((5,), jnp.int32, MESH, PartitionSpec()),)},
        {"donate": (0,)},
        {"options": {"xla_cpu_enable_fast_math": True}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_definition_is_another_program(change):
    assert str(definition(**change)) != str(definition())


def test_what_has_no_repr_is_refused():
    with pytest.raises(ValueError, match="shifted depends on what has no repr: <object object at"):
        str(definition(fn=functools.partial(shifted, object())))


def test_code_settings_and_devices_are_part_of_every_program(tmp_path, monkeypatch):
    usual = environment(MESH)
    assert environment(MESH) == usual
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert environment(MESH) == usual
    (tmp_path / "flags").write_text("--xla_dump_to=/tmp")
    seen = {usual, environment(make_mesh(make_layout(2)))}
    for name, value in (
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=false " * 20),
        ("XLA_FLAGS", str(tmp_path / "flags")),
        ("NVIDIA_TF32_OVERRIDE", "1"),
    ):
        monkeypatch.setenv(name, value)
        seen.add(environment(MESH))
    (tmp_path / "flags").write_text("--xla_dump_to=/elsewhere")
    seen.add(environment(MESH))
    with jax.default_matmul_precision("default"):
        seen.add(environment(MESH))
    with jax.enable_x64(True):
        seen.add(environment(MESH))
    monkeypatch.setattr(program_store, "SOURCE", "changed")
    seen.add(environment(MESH))
    assert len(seen) == 10


def test_the_source_is_read_whole(tmp_path, monkeypatch):
    """Every package that programs come from; a line in any module makes another digest."""
    assert program_store._digest_of_source() == program_store.SOURCE
    packages = [program_store.model, program_store.sharding, program_store.serving]
    copies = [tmp_path / package.__name__ for package in packages]
    for package, copy in zip(packages, copies, strict=True):
        shutil.copytree(package.__path__[0], copy, ignore=shutil.ignore_patterns("demo"))
        monkeypatch.setattr(package, "__path__", [str(copy)])
    assert program_store._digest_of_source() == program_store.SOURCE
    seen = {program_store.SOURCE}
    for file in ("model/ops/norm.py", "sharding/sums.py", "serving/engine/outputs.py"):
        with (tmp_path / file).open("a") as module:
            module.write("\n")
        seen.add(program_store._digest_of_source())
    assert len(seen) == 4


PRINT_KEYS = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
from tests.serving.engine.test_program_store import MESH, definitions, environment
print(repr((environment(MESH), sorted(definitions().items()))))
"""


def test_another_process_has_the_same_keys(usual):
    """There, addresses and the order of sets are others."""
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_KEYS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert printed.strip() == repr((environment(MESH), sorted(usual.items())))
