"""A step plan into one padded int32 row per slice, and back into named arrays on the device.

One row per slice means one upload per step. `Packing` is the single description of what stands
where in a row: the host writes through it, the compiled programs read through it. `BatchBuilder`
writes; it keeps what stays the same from step to step (page tables, sampling numbers) by slot, so
that a step of hundreds of rows costs the host a few array operations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model.batch import ForwardBatch
from serving.engine.buckets import Shape
from serving.engine.sampler import SamplingBatch
from serving.request import SamplingParams
from serving.scheduler.plan import DecodeRow, PrefillChunk, SlicePlan, StepPlan

HOTTEST = 1e30
"""Beyond, a temperature means the same (every token alike) but leaves float32."""


class Column(IntEnum):
    """The numbers of a row to sample, i32 or the bits of f32.

    SLOT is where the token goes (the number of slots: nowhere), STATE_SLOT whose memory counts.
    """

    SLOT = 0
    POSITION = 1
    STATE_SLOT = 2
    SEED = 3
    TOP_K = 4
    TEMPERATURE = 5
    TOP_P = 6
    MIN_P = 7
    REPETITION = 8
    PRESENCE = 9
    FREQUENCY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Layout of a slice's row for one program shape.

    Attributes:
        table_width: P, pages of the longest sequence.
        num_slots: request slots of a slice; slot number `num_slots` means "none".
        threshold: the least share of a slice's tokens that a micro-batch may have if no chunk is
            cut for it (--tbo-token-distribution-threshold).
    """

    shape: Shape
    table_width: int
    num_slots: int
    threshold: float = 0.0

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every part of a row, in order."""
        b, m, c = self.shape.decode_rows, self.shape.prefill_rows, self.shape.chunks
        p = self.table_width
        return {
            "sampling": (self.shape.sampled_rows, len(Column)),
            "decode_positions": (b,),
            "prefill_tokens": (m,),
            "chunk_first_row": (c,),
            "chunk_rows": (c,),
            "chunk_start": (c,),
            "decode_tables": (b, p),
            "chunk_tables": (c, p),
        }

    @property
    def table_start(self) -> int:
        """Where the page tables begin, the bulk of a row; all else stands before them."""
        rows = self.shape.decode_rows + self.shape.chunks
        return self.width - rows * self.table_width

    @property
    def width(self) -> int:
        """int32 numbers in a row."""
        return sum(math.prod(shape) for shape in self.fields().values())

    def first_prefill_row(self, plan: SlicePlan) -> int:
        """Where a slice's first chunk stands, the others behind it.

        That is row 0, but for two-batch overlap: the program cuts at a fixed row, so the chunks are
        moved until it meets them where they should be cut.
        """
        if not self.shape.cut or not plan.prefill:
            return 0
        room = self.shape.cut - self.shape.decode_rows
        tokens = cut_tokens(
            [len(chunk.tokens) for chunk in plan.prefill],
            beside=len(plan.decode),
            first_room=room,
            second_room=self.shape.prefill_rows - room,
            threshold=self.threshold,
        )
        return room - tokens

    def views(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Named views [D, ...] into the rows of all slices, i32 [D, width] (host side)."""
        parts, at = {}, 0
        for name, shape in self.fields().items():
            size = math.prod(shape)
            parts[name] = rows[:, at : at + size].reshape(len(rows), *shape)
            at += size
        return parts

    def unpack(self, row: jax.Array) -> dict[str, jax.Array]:
        """Named arrays of one row (inside a program)."""
        parts, at = {}, 0
        for name, shape in self.fields().items():
            size = math.prod(shape)
            parts[name] = lax.slice_in_dim(row, at, at + size).reshape(shape)
            at += size
        return parts

    def forward_batch(
        self, row: jax.Array, last_tokens: jax.Array
    ) -> tuple[ForwardBatch, jax.Array]:
        """The model's view of a row, and the sampler's numbers, i32 [R, len(Column)].

        Decode rows take their slot's last token, i32 [slots + 1].
        """
        parts = self.unpack(row)
        numbers = parts["sampling"]
        batch = ForwardBatch(
            decode_tokens=last_tokens[numbers[: self.shape.decode_rows, Column.SLOT]],
            decode_positions=parts["decode_positions"],
            decode_tables=parts["decode_tables"],
            prefill_tokens=parts["prefill_tokens"],
            chunk_first_row=parts["chunk_first_row"],
            chunk_rows=parts["chunk_rows"],
            chunk_start=parts["chunk_start"],
            chunk_tables=parts["chunk_tables"],
        )
        return batch, numbers

    def empty(self, num_slices: int) -> np.ndarray:
        """i32 [D, width] in which every row of every slice is padding."""
        rows = np.zeros((num_slices, self.width), np.int32)
        parts = self.views(rows)
        parts["sampling"][..., Column.SLOT] = self.num_slots
        parts["sampling"][..., Column.STATE_SLOT] = self.num_slots
        parts["decode_positions"][:] = -1
        parts["chunk_first_row"][:] = self.shape.prefill_rows
        return rows


def cut_tokens(
    sizes: Sequence[int], *, beside: int, first_room: int, second_room: int, threshold: float
) -> int:
    """How many prompt tokens of a slice two-batch overlap gives to the first micro-batch.

    Between two chunks, where the two halves' tokens are most equal, if the smaller half then has at
    least `threshold` of all tokens; else in the middle of all tokens, inside a chunk. A chunk is
    also cut where no place between two chunks leaves each half no more than it has room for.

    Args:
        sizes: tokens of each chunk, in order.
        beside: decode rows, all of them in the first half.
        first_room, second_room: prefill rows that the halves have; enough for all tokens.
    """
    tokens = sum(sizes)
    least, most = max(0, tokens - second_room), min(tokens, first_room)

    def smaller(first: int) -> int:
        return min(beside + first, tokens - first)

    between = [at for at in itertools.accumulate(sizes, initial=0) if least <= at <= most]
    best = max(between, key=smaller, default=None)
    if best is not None and smaller(best) >= threshold * (beside + tokens):
        return best
    return min(max((tokens - beside) // 2, least), most)


def sampling_batch(numbers: jax.Array) -> SamplingBatch:
    """The sampler's view of the numbers of R rows, i32 [R, len(Column)]."""

    def real(column: Column) -> jax.Array:
        return lax.bitcast_convert_type(numbers[:, column], jnp.float32)

    return SamplingBatch(
        positions=numbers[:, Column.POSITION],
        seeds=numbers[:, Column.SEED],
        temperatures=real(Column.TEMPERATURE),
        top_ks=numbers[:, Column.TOP_K],
        top_ps=real(Column.TOP_P),
        min_ps=real(Column.MIN_P),
        repetition=real(Column.REPETITION),
        presence=real(Column.PRESENCE),
        frequency=real(Column.FREQUENCY),
    )


def sampling_numbers(params: SamplingParams, slot: int, num_slots: int) -> np.ndarray:
    """i32 [len(Column)] of a row in `slot`; the position is left 0."""
    state_slot = slot if params.needs_setup else num_slots
    seed = int(np.uint32(params.seed).view(np.int32))
    reals = (
        0.0 if params.greedy else min(params.temperature, HOTTEST),
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
    bits = np.array(reals, np.float32).view(np.int32)
    return np.array([slot, 0, state_slot, seed, params.top_k, *bits], np.int32)


class Batch(NamedTuple):
    """A plan for the device.

    Attributes:
        rows: i32 [D, packing.width]; a fresh array, which the upload may go on reading.
        samples: whether any row samples a token.
        plain: whether the best token and its log probability are all that any row wants.
    """

    rows: np.ndarray
    samples: bool
    plain: bool


class BatchBuilder:
    """Writes plans into rows. Owns a mirror of every slot's page table and sampling numbers.

    A mirror is refreshed where a row's `pages` or `sampling` is another object than last time;
    plans are immutable, so the same object means the same contents.
    """

    def __init__(self, *, num_slices: int, num_slots: int, table_width: int) -> None:
        self._num_slots = num_slots
        self._tables = np.zeros((num_slices, num_slots, table_width), np.int32)
        self._numbers = np.zeros((num_slices, num_slots, len(Column)), np.int32)
        self._plain = np.zeros((num_slices, num_slots), bool)
        self._pages: list[list[tuple[int, ...] | None]] = [
            [None] * num_slots for _ in range(num_slices)
        ]
        self._sampling: list[list[SamplingParams | None]] = [
            [None] * num_slots for _ in range(num_slices)
        ]
        self._empty: dict[Packing, tuple[np.ndarray, int]] = {}

    def build(self, plan: StepPlan, packing: Packing) -> Batch:
        """The rows of a plan that the packing's shape holds."""
        empty, tables = self._empty.get(packing) or self._remember(packing, len(plan.slices))
        rows = np.empty((len(plan.slices), packing.width), np.int32)
        rows[:, :tables] = empty
        parts = packing.views(rows)
        samples, plain = False, True
        for s, slice_plan in enumerate(plan.slices):
            if slice_plan.decode:
                plain &= self._fill_decode(s, slice_plan.decode, parts)
                samples = True
            if slice_plan.prefill:
                sampled = self._fill_prefill(s, slice_plan, parts, packing)
                samples |= bool(sampled)
                plain &= all(chunk.sampling.plain for chunk in sampled)
            self._fill_tables(s, slice_plan.decode, parts["decode_tables"][s])
            self._fill_tables(s, slice_plan.prefill, parts["chunk_tables"][s])
        return Batch(rows=rows, samples=samples, plain=plain)

    def _remember(self, packing: Packing, num_slices: int) -> tuple[np.ndarray, int]:
        """A packing's padding rows up to the tables, and where these begin."""
        start = packing.table_start
        self._empty[packing] = packing.empty(num_slices)[:, :start], start
        return self._empty[packing]

    def _fill_decode(self, s: int, rows: Sequence[DecodeRow], parts: dict[str, np.ndarray]) -> bool:
        """Write a slice's decode rows; whether all are plain."""
        _, slots, positions, pages, sampling = zip(*rows, strict=True)
        self._refresh(s, slots, pages, sampling)
        at, n = np.array(slots), len(rows)
        parts["decode_positions"][s, :n] = positions
        numbers = parts["sampling"][s, :n]
        numbers[:] = self._numbers[s, at]
        numbers[:, Column.POSITION] = parts["decode_positions"][s, :n] + 1
        return bool(self._plain[s, at].all())

    def _fill_prefill(
        self, s: int, plan: SlicePlan, parts: dict[str, np.ndarray], packing: Packing
    ) -> list[PrefillChunk]:
        """Write a slice's chunks; those that sample."""
        chunks, n = plan.prefill, len(plan.prefill)
        slots = [chunk.slot for chunk in chunks]
        self._refresh(s, slots, [c.pages for c in chunks], [c.sampling for c in chunks])
        sizes = np.array([len(chunk.tokens) for chunk in chunks])
        total, first = int(sizes.sum()), packing.first_prefill_row(plan)
        parts["prefill_tokens"][s, first : first + total] = np.fromiter(
            itertools.chain.from_iterable(chunk.tokens for chunk in chunks), np.int32, total
        )
        parts["chunk_first_row"][s, :n] = first + np.cumsum(sizes) - sizes
        parts["chunk_rows"][s, :n] = sizes
        parts["chunk_start"][s, :n] = [chunk.start for chunk in chunks]
        sampled = [i for i, chunk in enumerate(chunks) if chunk.samples]
        if sampled:
            at = [packing.shape.decode_rows + i for i in sampled]
            numbers = self._numbers[s, [slots[i] for i in sampled]]
            numbers[:, Column.POSITION] = [chunks[i].start + sizes[i] for i in sampled]
            parts["sampling"][s, at] = numbers
        return [chunks[i] for i in sampled]

    def _fill_tables(
        self, s: int, rows: Sequence[DecodeRow | PrefillChunk], tables: np.ndarray
    ) -> None:
        """Write the page tables of a slice's rows, i32 [B or C, P]; zeros behind them."""
        n = len(rows)
        if n:
            # No slot is out of range; "clip" is what lets take write without a copy.
            slots = [row.slot for row in rows]
            self._tables[s].take(slots, axis=0, out=tables[:n], mode="clip")
        tables[n:] = 0

    def _refresh(
        self,
        s: int,
        slots: Sequence[int],
        pages: Sequence[tuple[int, ...]],
        sampling: Sequence[SamplingParams],
    ) -> None:
        """Bring the mirrors of these slots up to date."""
        known_pages, known_sampling = self._pages[s], self._sampling[s]
        for slot, table, params in zip(slots, pages, sampling, strict=True):
            before = known_pages[slot]
            if before is not table:
                known_pages[slot] = table
                self._tables[s, slot, : len(table)] = table
                if before is not None and len(before) > len(table):
                    self._tables[s, slot, len(table) : len(before)] = 0
            if known_sampling[slot] is not params:
                known_sampling[slot] = params
                self._numbers[s, slot] = sampling_numbers(params, slot, self._num_slots)
                self._plain[s, slot] = params.plain
