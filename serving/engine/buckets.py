"""Which sizes programs are compiled for, and which of them a step takes.

Two families: *decode* programs (one row per running request) and *extend* programs (prompt tokens
behind decode rows, a few or a full set). All slices of a step run the same program, at the fullest
slice's size. Deterministic inference has one size of each family, and no step mixes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.ops.kernels import PrefixesFound
from serving.config import ConfigError, ServerConfig
from serving.scheduler.plan import StepPlan

DEFAULT_DECODE = {"cpu": (1, 8, 32), "accelerator": (1, 8, 32, 64, 128, 256, 512)}
DEFAULT_EXTEND = {"cpu": (64, 512), "accelerator": (128, 512, 2048, 8192)}
DETERMINISTIC_DECODE = {"cpu": (32,), "accelerator": (256,)}
DETERMINISTIC_EXTEND = {"cpu": (512,), "accelerator": (2048,)}
"""Every prefill step costs the one size there is: smaller than the largest of the others."""
FRESH_ROWS = 2048
"""Extend programs from that size on are worth a version of their own without cached prefixes."""
MAX_CHUNKS = 64
CUT_STEP = 128
"""Large micro-batches are multiples of this many prefill rows: whole blocks of the kernels."""
FEW_DECODE_ROWS = 32
"""Up to so many decode rows, a step with prefill takes a program that has no more: a prompt that
comes to an idle server does not pay for padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The static sizes of one program, per slice.

    Attributes:
        decode_rows: B; prefill_rows: M, 0 in a decode program; chunks: C, most prompt chunks.
        cut: two-batch overlap: how many of the B + M rows the first micro-batch has; 0 without it.
        prefixes: whether chunks begin behind cached tokens.
    """

    decode_rows: int
    prefill_rows: int = 0
    chunks: int = 0
    cut: int = 0
    prefixes: PrefixesFound = "perhaps"

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    @property
    def sampled_rows(self) -> int:
        return self.decode_rows + self.chunks

    def __str__(self) -> str:
        if self.prefill_rows:
            fresh = ", nothing cached" if self.prefixes == "none" else ""
            return f"extend {self.prefill_rows} beside {self.decode_rows}{fresh}"
        return f"decode {self.decode_rows}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """All programs of an engine, ascending.

    Attributes:
        mixed: whether extend programs have decode rows too. Else a plan holds either decode rows
            or chunks.
        cut_extend_from, cut_decode_from: the smallest programs of each family that compute two
            micro-batches; None: no program does.
        fresh: whether large extend programs come in two versions, one for steps in which no chunk
            begins behind cached tokens.
    """

    decode: tuple[int, ...]
    extend: tuple[int, ...]
    mixed: bool = True
    cut_extend_from: int | None = None
    cut_decode_from: int | None = None
    fresh: bool = False

    @property
    def slots(self) -> int:
        """Most running requests of a slice."""
        return self.decode[-1]

    @property
    def prefill_tokens(self) -> int:
        """Most prompt tokens of a slice in one step."""
        return self.extend[-1]

    @property
    def prefill_chunks(self) -> int:
        """Most prompt chunks of a slice in one step: room for prompts of 16 tokens, within reason.

        It is the same in every extend program, so that they share their sampling programs.
        """
        return min(MAX_CHUNKS, max(1, self.extend[-1] // 16))

    @property
    def beside_prefill(self) -> tuple[int, ...]:
        """Decode rows that extend programs have room for, ascending; the last takes all."""
        if not self.mixed:
            return (0,)
        few = [b for b in self.decode[:-1] if FEW_DECODE_ROWS // 2 <= b <= FEW_DECODE_ROWS]
        return (*few[-1:], self.slots)

    def shapes(self) -> list[Shape]:
        """Every program's sizes, the largest extend program first."""
        extend = [
            self._extend_shape(m, b, prefixes)
            for m in reversed(self.extend)
            for b in reversed(self.beside_prefill)
            for prefixes in ((True, False) if self._has_fresh(m) else (True,))
        ]
        return extend + [self._decode_shape(b) for b in reversed(self.decode)]

    @property
    def sampled_rows(self) -> list[int]:
        """The sizes of sampling programs, the largest first."""
        return sorted({shape.sampled_rows for shape in self.shapes()}, reverse=True)

    def _decode_shape(self, rows: int) -> Shape:
        cut = self.cut_decode_from is not None and rows >= self.cut_decode_from
        return Shape(decode_rows=rows, cut=rows // 2 if cut else 0)

    def _has_fresh(self, prefill_rows: int) -> bool:
        return self.fresh and prefill_rows >= FRESH_ROWS

    def _extend_shape(self, prefill_rows: int, decode_rows: int, prefixes: bool) -> Shape:
        found: PrefixesFound = "some" if prefixes else "none"
        cut = 0
        if self.cut_extend_from is not None and prefill_rows >= self.cut_extend_from:
            cut = _cut(decode_rows, prefill_rows)
        return Shape(
            decode_rows=decode_rows,
            prefill_rows=prefill_rows,
            chunks=self.prefill_chunks,
            cut=cut,
            prefixes=found if self._has_fresh(prefill_rows) else "perhaps",
        )

    def shape_for(self, plan: StepPlan) -> Shape:
        """The smallest program that holds every slice of the plan.

        Raises:
            ValueError: the plan is larger than the largest program (a scheduler bug).
        """
        rows = max(len(s.decode) for s in plan.slices)
        if not plan.is_extend:
            for b in self.decode:
                if rows <= b:
                    return self._decode_shape(b)
            raise ValueError(f"{rows} decode rows exceed the largest bucket {self.slots}")
        if rows and not self.mixed:
            raise ValueError("Deterministic steps either decode or prefill; the plan does both.")
        tokens = max(sum(len(c.tokens) for c in s.prefill) for s in plan.slices)
        chunks = max(len(s.prefill) for s in plan.slices)
        if rows <= self.slots and chunks <= self.prefill_chunks:
            beside = next(b for b in self.beside_prefill if rows <= b)
            prefixes = any(c.start for s in plan.slices for c in s.prefill)
            for m in self.extend:
                if tokens <= m:
                    return self._extend_shape(m, beside, prefixes)
        raise ValueError(
            f"{tokens} prompt tokens in {chunks} chunks beside {rows} decode rows exceed "
            f"{self.extend[-1]} in {self.prefill_chunks} beside {self.slots}"
        )


def _cut(decode_rows: int, prefill_rows: int) -> int:
    """Where an extend program is cut: in the middle of all rows, but behind the decode rows, which
    are one micro-batch's. 0 where these are more than half."""
    prefill = (decode_rows + prefill_rows) // 2 - decode_rows
    if prefill >= CUT_STEP:
        prefill = round(prefill / CUT_STEP) * CUT_STEP
    return decode_rows + prefill if prefill > 0 else 0


def make_buckets(
    config: ServerConfig, *, platform: str, num_slices: int, max_context: int, fresh: bool = False
) -> Buckets:
    """Buckets from the flags, else defaults of the device; `fresh`: see `Buckets`.

    Deterministic inference takes the largest size of each family: what else runs must not decide
    which program a request meets.

    Raises:
        ConfigError: a limit for all slices is smaller than the number of slices.
    """
    kind = "cpu" if platform == "cpu" else "accelerator"
    deterministic = config.enable_deterministic_inference
    default_decode = DETERMINISTIC_DECODE if deterministic else DEFAULT_DECODE
    default_extend = DETERMINISTIC_EXTEND if deterministic else DEFAULT_EXTEND
    decode = config.decode_buckets or default_decode[kind]
    extend = config.extend_buckets or default_extend[kind]
    if config.extend_buckets is None:
        # A prompt longer than the context cannot come; a bucket beyond it fills with many.
        extend = tuple(m for m in extend if m <= 4 * max_context) or extend[:1]
    decode = _limit(decode, config.max_running_requests, "--max-running-requests", num_slices)
    extend = _limit(extend, config.chunked_prefill_size, "--chunked-prefill-size", num_slices)
    if deterministic:
        decode, extend = decode[-1:], extend[-1:]
    overlap = config.enable_two_batch_overlap
    return Buckets(
        decode=decode,
        extend=extend,
        mixed=not deterministic,
        cut_extend_from=config.tbo_min_prefill_tokens if overlap else None,
        cut_decode_from=config.tbo_min_decode_rows if overlap else None,
        fresh=fresh,
    )


def _limit(sizes: Sequence[int], total: int | None, flag: str, num_slices: int) -> tuple[int, ...]:
    """Bucket sizes up to a limit given for all slices together; the limit is the last one."""
    if total is None:
        return tuple(sorted(sizes))
    if total < num_slices:
        raise ConfigError(f"{flag} {total} is less than one for each of {num_slices} dp slices.")
    share = total // num_slices
    return (*sorted(size for size in sizes if size < share), share)
