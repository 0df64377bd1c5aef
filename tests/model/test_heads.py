"""Where heads stand on devices: every head once, beside its key/value head."""

from __future__ import annotations

import pytest

from model.heads import PADDING, HeadSlots, head_slots


@pytest.mark.parametrize(
    ("sizes", "kv", "query"),
    [
        ((4, 2, 1), (0, 1), (0, 1, 2, 3)),
        ((4, 2, 2), (0, 1), (0, 1, 2, 3)),
        ((9, 3, 2), (0, 1, 2, -1), (0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1, -1)),
        ((4, 2, 8), (0, 0, 1, 1, -1, -1, -1, -1), (0, 1, 2, 3, -1, -1, -1, -1)),
        (
            (9, 3, 8),
            (0, 0, 1, 1, 2, 2, -1, -1),
            (0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, -1, -1, -1, -1),
        ),
        ((48, 8, 16), tuple(i // 2 for i in range(16)), tuple(range(48))),
        ((3, 3, 2), (0, 1, 2, -1), (0, 1, 2, -1)),
    ],
)
def test_known_cases(sizes, kv, query):
    assert head_slots(*sizes) == HeadSlots(kv=kv, query=query)


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 8, 16, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("per_kv", [1, 2, 3, 7, 12])
def test_every_query_head_once_beside_its_key_value_head(per_kv, kv_heads, devices):
    slots = head_slots(per_kv * kv_heads, kv_heads, devices)
    assert len(slots.kv) % devices == 0
    assert len(slots.query) == len(slots.kv) * slots.group
    assert sorted(h for h in slots.query if h != PADDING) == list(range(per_kv * kv_heads))
    assert {h for h in slots.kv if h != PADDING} == set(range(kv_heads))
    for i, head in enumerate(slots.query):
        if head != PADDING:
            assert slots.kv[i // slots.group] == head // per_kv
    # No device holds more key/value heads than an even share, rounded up.
    assert len(slots.kv) // devices == -(-kv_heads // devices)
    assert all(
        n == (1 if head == PADDING else slots.kv.count(head))
        for head, n in zip(slots.kv, slots.copies, strict=True)
    )
