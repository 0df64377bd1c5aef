"""The choice of an exchange follows from sizes and the table alone."""

import numpy as np
import pytest

from sharding import exchange_choice
from sharding.exchange_choice import choose_exchange, dispatch_rows, exchange_us, rows_moved
from sharding.layout import make_layout

ROW = 4096  # bytes: 2048 numbers in bfloat16


def test_two_groups_get_every_token():
    assert all(dispatch_rows(tokens, 6, 2) == tokens for tokens in (1, 64, 2048, 8192))
    assert dispatch_rows(1000, 6, 1) == 1000


def test_decode_steps_have_one_round():
    assert dispatch_rows(256, 2, 64) == 256
    assert dispatch_rows(257, 2, 64) < 40


@pytest.mark.parametrize(("tokens", "k", "groups"), [(2048, 6, 8), (512, 8, 16), (8192, 1, 2)])
def test_a_round_is_enough_for_even_routing(tokens, k, groups):
    rows = dispatch_rows(tokens, k, groups)
    assert rows < tokens
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((tokens, 8 * groups)), axis=1)[:, :k] // 8
    sent = (chosen[:, :, None] == np.arange(groups)).any(axis=1).sum(axis=0)
    assert 0.75 * rows < sent.max() <= rows


def test_rows_that_leave_a_device():
    all_to_all = 7 * dispatch_rows(2048, 6, 8)
    assert rows_moved("none", make_layout(8, 8, 8), 2048, 6) == 7 * 2048
    assert rows_moved("all_to_all", make_layout(8, 8, 8), 2048, 6) == all_to_all
    # Two slices of four: an all-reduce sends 3/4 of the rows twice, an all-gather 3 quarters.
    assert rows_moved("none", make_layout(8, 2, 8), 100, 6) == 100 + 75
    assert rows_moved("all_to_all", make_layout(8, 2, 8), 100, 6) == 7 * 25 + 3 * 25 / 2
    # Eight slices, four groups of two: first both slices of a group get each other's tokens.
    assert rows_moved("all_to_all", make_layout(8, 8, 4), 100, 8) == 100 + 3 * 200


def test_times_are_those_of_the_table_and_between(monkeypatch):
    monkeypatch.setitem(
        exchange_choice.MEASURED_US, "none", ((1.0, 40.0), (2.0, 50.0), (4.0, 90.0))
    )
    got = [exchange_us("none", mib) for mib in (0.1, 1, 1.5, 2, 3, 4, 6)]
    assert got == [40, 40, 45, 50, 70, 90, 130]


def test_the_faster_one_is_chosen(monkeypatch):
    wide = make_layout(8, 8, 8)
    monkeypatch.setitem(exchange_choice.MEASURED_US, "none", ((0.0, 10.0), (1.0, 20.0)))
    monkeypatch.setitem(exchange_choice.MEASURED_US, "all_to_all", ((0.0, 50.0), (1.0, 60.0)))
    # 40 us more to begin with, 10 less for each MiB that stays: from 4 MiB on.
    saved = 7 * (1 - dispatch_rows(2048, 6, 8) / 2048) * ROW / 2**20 * 2048
    assert saved > 4
    assert choose_exchange(wide, 2048, 6, ROW) == "all_to_all"
    assert choose_exchange(wide, 2048, 6, int(ROW * 3.9 / saved)) == "none"
    assert choose_exchange(wide, 2048, 6, int(ROW * 4.1 / saved)) == "all_to_all"


@pytest.mark.parametrize("layout", [(1, 1, 1), (8, 1, 8), (8, 2, 1), (2, 2, 2)])
def test_all_gather_where_all_to_all_has_nothing_to_leave_out(layout):
    assert choose_exchange(make_layout(*layout), 8192, 6, ROW) == "none"


def test_tables_ascend():
    for points in exchange_choice.MEASURED_US.values():
        sizes, times = zip(*points, strict=True)
        assert list(sizes) == sorted(set(sizes))
        assert list(times) == sorted(times)
