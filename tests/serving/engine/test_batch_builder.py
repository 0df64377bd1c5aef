"""The builder's rows equal those of a straightforward one, whatever the steps before were."""

from __future__ import annotations

import numpy as np
import pytest

from serving.engine.batch_builder import BatchBuilder, Column, Packing
from serving.engine.buckets import Shape
from serving.request import Grammar, SamplingParams
from serving.scheduler.plan import DecodeRow, PrefillChunk, SlicePlan, StepPlan

SLOTS, WIDTH = 6, 9
PACKINGS = [
    Packing(shape=shape, table_width=WIDTH, num_slots=SLOTS, threshold=0.3)
    for shape in (
        Shape(decode_rows=6),
        Shape(decode_rows=6, prefill_rows=40, chunks=4),
        Shape(decode_rows=0, prefill_rows=40, chunks=4),
        Shape(decode_rows=6, prefill_rows=40, chunks=4, cut=23),
        Shape(decode_rows=6, cut=3),
    )
]
CHOICES = [
    SamplingParams(max_tokens=4, temperature=0.0),
    SamplingParams(max_tokens=4, temperature=0.0, logprobs=0),
    SamplingParams(max_tokens=4, temperature=0.0, logprobs=3),
    SamplingParams(max_tokens=4, temperature=1e40, seed=2**32 - 1, top_k=1),
    SamplingParams(max_tokens=4, temperature=1e40, seed=2**31 + 5, top_p=0.25),
    SamplingParams(max_tokens=4, temperature=0.5, seed=7, top_k=40, min_p=0.125),
    SamplingParams(max_tokens=4, temperature=0.0, repetition_penalty=1.5),
    SamplingParams(max_tokens=4, presence_penalty=-1.5, frequency_penalty=0.75),
    SamplingParams(max_tokens=4, temperature=0.0, logit_bias=((3, 1.0),)),
    SamplingParams(max_tokens=4, temperature=0.0, min_tokens=2, stop_token_ids=(3,)),
    SamplingParams(max_tokens=4, temperature=0.0, grammar=Grammar(kind="regex", text="a")),
]


def built_by_hand(plan, packing):
    """Row after row, number after number."""
    rows = np.zeros((len(plan.slices), packing.width), np.int32)
    for parts in (packing.views(rows),):
        parts["sampling"][..., [Column.SLOT, Column.STATE_SLOT]] = packing.num_slots
        parts["decode_positions"][:] = -1
        parts["chunk_first_row"][:] = packing.shape.prefill_rows
    plain = True

    def sampling(s, at, row, position):
        nonlocal plain
        p = row.sampling
        reals = [0.0 if p.greedy else min(p.temperature, 1e30), p.top_p, p.min_p]
        reals += [p.repetition_penalty, p.presence_penalty, p.frequency_penalty]
        numbers = parts["sampling"][s, at]
        numbers[:3] = row.slot, position, row.slot if p.needs_setup else packing.num_slots
        numbers[3] = np.array(p.seed, np.uint32).view(np.int32)
        numbers[4] = p.top_k
        numbers[5:] = np.array(reals, np.float32).view(np.int32)
        plain = plain and p.plain

    for s, slice_plan in enumerate(plan.slices):
        for i, row in enumerate(slice_plan.decode):
            parts["decode_positions"][s, i] = row.position
            parts["decode_tables"][s, i, : len(row.pages)] = row.pages
            sampling(s, i, row, row.position + 1)
        first = packing.first_prefill_row(slice_plan)
        for i, chunk in enumerate(slice_plan.prefill):
            n = len(chunk.tokens)
            parts["prefill_tokens"][s, first : first + n] = chunk.tokens
            parts["chunk_first_row"][s, i] = first
            parts["chunk_rows"][s, i] = n
            parts["chunk_start"][s, i] = chunk.start
            parts["chunk_tables"][s, i, : len(chunk.pages)] = chunk.pages
            first += n
            if chunk.samples:
                sampling(s, packing.shape.decode_rows + i, chunk, chunk.start + n)
    return rows, plain


def random_plan(rng, packing, held):
    """Rows in random slots; pages and parameters change, shrink or stay by slot."""

    def facts(s, slot):
        pages, params = held.get((s, slot), ((), None))
        if params is None or rng.random() < 0.3:
            params = CHOICES[rng.integers(len(CHOICES))]
        if not pages or rng.random() < 0.3:
            pages = tuple(rng.integers(1, 99, rng.integers(1, WIDTH + 1)).tolist())
        held[s, slot] = pages, params
        return pages, params

    slices = []
    for s in range(2):
        slots = rng.permutation(SLOTS).tolist()
        num_decode = int(rng.integers(0, 4)) if packing.shape.decode_rows else 0
        num_chunks = int(rng.integers(0, 3)) if packing.shape.chunks else 0
        decode, prefill = [], []
        for slot in slots[:num_decode]:
            pages, params = facts(s, slot)
            decode.append(DecodeRow("d", slot, int(rng.integers(0, 30)), pages, params))
        for slot in slots[num_decode : num_decode + num_chunks]:
            pages, params = facts(s, slot)
            tokens = tuple(rng.integers(0, 500, rng.integers(1, 10)).tolist())
            chunk = PrefillChunk(
                "c", slot, tokens, int(rng.integers(0, 30)), pages, rng.random() < 0.6, params
            )
            prefill.append(chunk)
        slices.append(SlicePlan(decode=tuple(decode), prefill=tuple(prefill)))
    return StepPlan(slices=tuple(slices))


@pytest.mark.parametrize("seed", range(3))
def test_rows_equal_the_straightforward_ones(seed):
    rng = np.random.default_rng(seed)
    builder = BatchBuilder(num_slices=2, num_slots=SLOTS, table_width=WIDTH)
    held, plains = {}, []
    for _ in range(150):
        packing = PACKINGS[rng.integers(len(PACKINGS))]
        plan = random_plan(rng, packing, held)
        batch = builder.build(plan, packing)
        rows, plain = built_by_hand(plan, packing)
        np.testing.assert_array_equal(batch.rows, rows)
        assert batch.plain == plain
        sampled = [[*s.decode, *(c for c in s.prefill if c.samples)] for s in plan.slices]
        assert batch.samples == any(sampled)
        plains.append(plain)
    assert any(plains)
    assert not all(plains)


def test_a_batch_is_not_written_again():
    """Its upload may still be reading it when the next step is built."""
    builder = BatchBuilder(num_slices=1, num_slots=SLOTS, table_width=WIDTH)
    row = DecodeRow("a", 2, 7, (3, 4), CHOICES[0])
    first = builder.build(StepPlan(slices=(SlicePlan(decode=(row,)),)), PACKINGS[0])
    before = first.rows.copy()
    row = row._replace(slot=1, position=9, pages=(8,))
    second = builder.build(StepPlan(slices=(SlicePlan(decode=(row,)),)), PACKINGS[0])
    np.testing.assert_array_equal(first.rows, before)
    assert not np.array_equal(second.rows, before)
