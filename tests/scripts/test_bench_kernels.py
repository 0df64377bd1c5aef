"""The times of kernels alone, as far as a machine without a GPU can tell."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest

from model.ops.mla_attention import hopper_decode
from scripts import bench_kernels
from tests.harness import lowered_for_cuda

SMALL = {"small": ((2, 128), (256,), (1, 128, 128))}


def lowered(case):
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), case.args)
    return lowered_for_cuda(case.program, *shapes)


def test_a_case_runs_the_kernel_that_it_names(monkeypatch):
    monkeypatch.setattr(bench_kernels, "MATRICES", SMALL)
    monkeypatch.setattr(hopper_decode, "LEAST_ROWS", 0)
    for make, of_hopper in (
        (lambda which: bench_kernels.products("small", 16, which), "dense_fp8"),
        (lambda which: bench_kernels.decode(3, 40, 32, which), "mla_decode_many_heads"),
    ):
        assert of_hopper in lowered(make("hopper"))
        assert of_hopper not in lowered(make("pallas"))
        assert bench_kernels.NAMES.search(of_hopper)


def test_bytes_and_operations_are_those_of_one_layer(monkeypatch):
    monkeypatch.setattr(bench_kernels, "MATRICES", SMALL)
    case = bench_kernels.products("small", 16, "pallas")
    assert (case.read, case.operations) == (256 * 256, 2 * 16 * 256 * 256)
    case = bench_kernels.decode(3, 40, 32, "pallas")
    assert case.read == 3 * 40 * 576 * 2
    assert case.operations == 2 * 3 * 40 * 32 * (576 + 512)


def test_a_layer_takes_the_best_run_of_the_kernels_alone(monkeypatch):
    """Other kernels do not count, and a run has several layers."""
    runs = iter([9000.0, 6000.0, 7000.0])
    monkeypatch.setattr(
        bench_kernels,
        "device_events",
        lambda folder: [("dense_fp8", 0.0, next(runs)), ("loop_fusion", 0.0, 1e9)],
    )
    monkeypatch.setattr(jax.profiler, "trace", contextlib.nullcontext)
    case = bench_kernels.Case("x", "pallas", lambda x: x + 1, (np.zeros(1),), 3000, 6000)
    assert bench_kernels.layer_us(case) == pytest.approx(6.0 / bench_kernels.REPEATS)


def test_it_needs_a_gpu_and_rows_that_kernels_take(capsys):
    assert bench_kernels.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_kernels.main(["--rows", "16,513"])
    assert "up to 512" in capsys.readouterr().err
