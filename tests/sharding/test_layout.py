"""The mesh arithmetic: roles for every combination, and refusals that say what is possible."""

from __future__ import annotations

import pytest

from sharding.layout import LayoutError, divisors, make_layout

POSSIBLE = [
    (w, d, e)
    for w in (1, 2, 4, 6, 8, 16)
    for d in divisors(w)
    for e in divisors(w)
    if d % e == 0 or e % d == 0
]


@pytest.mark.parametrize(("w", "d", "e"), POSSIBLE)
def test_roles_cover_the_mesh_twice(w, d, e):
    layout = make_layout(w, d, e)
    assert layout.num_devices == w
    assert layout.num_slices == d
    assert layout.size(layout.moe_ep) == e
    assert layout.size(layout.attn_tp) == w // d
    assert layout.size(layout.moe_tp) == w // e
    for outer, inner in ((layout.attn_dp, layout.attn_tp), (layout.moe_ep, layout.moe_tp)):
        # Both cuts are in rank order, so ranks of a group are neighbours.
        assert outer + inner == layout.axis_names


def test_the_guides_layouts():
    assert str(make_layout(8, 4, 8)) == (
        "mesh dp4 ep2 tp1 (attn_dp 4, attn_tp 2, moe_ep 8, moe_tp 1)"
    )
    assert make_layout(8, 2, 1).axis_names == ("ep", "dp", "tp")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((8, 3, 1), r"Constraint tp_size % dp_size == 0 not satisfied.*one of \[1, 2, 4, 8\]"),
        ((6, 1, 4), r"tp_size % ep_size == 0 not satisfied.*one of \[1, 2, 3, 6\]"),
        ((6, 2, 3), r"one of the two must divide the other.*--ep can be one of \[1, 2, 6\]"),
        ((0, 1, 1), "--tp must be at least 1"),
        ((8, 0, 1), "--dp-size must be at least 1"),
        ((8, 1, -1), "--ep must be at least 1"),
    ],
)
def test_impossible_layouts_say_what_is_possible(flags, text):
    with pytest.raises(LayoutError, match=text):
        make_layout(*flags)
