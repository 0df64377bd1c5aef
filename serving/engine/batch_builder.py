"""A step plan into one padded int32 row per slice, and back into named arrays on the device.

One row per slice means one upload per step. `Packing` is the single description of what stands
where in a row: the host writes through it, the compiled programs read through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax import lax

from model.batch import ForwardBatch
from serving.engine.buckets import Shape
from serving.engine.sampler import SamplingBatch
from serving.request import SamplingParams
from serving.scheduler.plan import SlicePlan, StepPlan

HOTTEST = 1e30
"""Beyond, a temperature means the same (every token alike) but leaves float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Layout of a slice's row for one program shape.

    Attributes:
        table_width: P, pages of the longest sequence.
        num_slots: request slots of a slice; slot number `num_slots` means "none".
    """

    shape: Shape
    table_width: int
    num_slots: int

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every part of a row, in order."""
        b, m, c = self.shape.decode_rows, self.shape.prefill_rows, self.shape.chunks
        r, p = self.shape.sampled_rows, self.table_width
        return {
            "decode_slots": (b,),
            "decode_positions": (b,),
            "decode_tables": (b, p),
            "prefill_tokens": (m,),
            "chunk_first_row": (c,),
            "chunk_rows": (c,),
            "chunk_start": (c,),
            "chunk_tables": (c, p),
            "sample_slots": (r,),
            "sample_positions": (r,),
            "seeds": (r,),
            "temperatures": (r,),
            "top_ks": (r,),
            "top_ps": (r,),
        }

    @property
    def width(self) -> int:
        """int32 numbers in a row."""
        return sum(int(np.prod(shape)) for shape in self.fields().values())

    def views(self, row: np.ndarray) -> dict[str, np.ndarray]:
        """Named views into one row (host side)."""
        parts, at = {}, 0
        for name, shape in self.fields().items():
            size = int(np.prod(shape))
            parts[name] = row[at : at + size].reshape(shape)
            at += size
        return parts

    def unpack(self, row: jax.Array) -> dict[str, jax.Array]:
        """Named arrays of one row (inside a program)."""
        parts, at = {}, 0
        for name, shape in self.fields().items():
            size = int(np.prod(shape))
            parts[name] = lax.slice_in_dim(row, at, at + size).reshape(shape)
            at += size
        return parts

    def forward_batch(self, row: jax.Array, last_tokens: jax.Array) -> ForwardBatch:
        """The model's view of a row; decode rows take their slot's last token, i32 [slots + 1]."""
        parts = self.unpack(row)
        return ForwardBatch(
            decode_tokens=last_tokens[parts["decode_slots"]],
            decode_positions=parts["decode_positions"],
            decode_tables=parts["decode_tables"],
            prefill_tokens=parts["prefill_tokens"],
            chunk_first_row=parts["chunk_first_row"],
            chunk_rows=parts["chunk_rows"],
            chunk_start=parts["chunk_start"],
            chunk_tables=parts["chunk_tables"],
        )

    def sampling_batch(self, row: jax.Array) -> tuple[SamplingBatch, jax.Array]:
        """The sampler's view of a row, and the slot each row's token is for, i32 [R]."""
        parts = self.unpack(row)
        batch = SamplingBatch(
            positions=parts["sample_positions"],
            seeds=parts["seeds"],
            temperatures=lax.bitcast_convert_type(parts["temperatures"], np.float32),
            top_ks=parts["top_ks"],
            top_ps=lax.bitcast_convert_type(parts["top_ps"], np.float32),
        )
        return batch, parts["sample_slots"]

    def empty(self, num_slices: int) -> np.ndarray:
        """i32 [D, width] in which every row of every slice is padding."""
        rows = np.zeros((num_slices, self.width), np.int32)
        for row in rows:
            parts = self.views(row)
            parts["decode_slots"][:] = self.num_slots
            parts["decode_positions"][:] = -1
            parts["chunk_first_row"][:] = self.shape.prefill_rows
            parts["sample_slots"][:] = self.num_slots
        return rows


def build_batch(plan: StepPlan, packing: Packing) -> np.ndarray:
    """The packed rows of a plan, i32 [D, packing.width]."""
    rows = packing.empty(len(plan.slices))
    for row, slice_plan in zip(rows, plan.slices, strict=True):
        if slice_plan.decode or slice_plan.prefill:
            _fill(packing.views(row), slice_plan, packing.shape.decode_rows)
    return rows


def _fill(parts: dict[str, np.ndarray], plan: SlicePlan, decode_rows: int) -> None:
    temperatures = parts["temperatures"].view(np.float32)
    top_ps = parts["top_ps"].view(np.float32)

    def sampling(at: int, slot: int, position: int, params: SamplingParams) -> None:
        parts["sample_slots"][at] = slot
        parts["sample_positions"][at] = position
        parts["seeds"][at] = np.uint32(params.seed).view(np.int32)
        temperatures[at] = 0.0 if params.greedy else min(params.temperature, HOTTEST)
        parts["top_ks"][at] = params.top_k
        top_ps[at] = params.top_p

    for i, row in enumerate(plan.decode):
        parts["decode_slots"][i] = row.slot
        parts["decode_positions"][i] = row.position
        parts["decode_tables"][i, : len(row.pages)] = row.pages
        sampling(i, row.slot, row.position + 1, row.sampling)
    first = 0
    for i, chunk in enumerate(plan.prefill):
        size = len(chunk.tokens)
        parts["prefill_tokens"][first : first + size] = chunk.tokens
        parts["chunk_first_row"][i] = first
        parts["chunk_rows"][i] = size
        parts["chunk_start"][i] = chunk.start
        parts["chunk_tables"][i, : len(chunk.pages)] = chunk.pages
        first += size
        if chunk.samples:
            sampling(decode_rows + i, chunk.slot, chunk.start + size, chunk.sampling)
