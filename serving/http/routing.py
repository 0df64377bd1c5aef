"""Where a request runs and what it shares: its dp slice, its priority, its part of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from serving.http.errors import ApiError
from serving.http.protocol import GenerationBody

DP_RANK_HEADER = "x-data-parallel-rank"
MAX_PRIORITY = 2**31 - 1
MAX_CACHE_KEY_LENGTH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the scheduler is told beside the prompt; see `serving.request.Request`."""

    dp_rank: int | None = None
    priority: int = 0
    cache_key: str = ""


def routing(body: GenerationBody, headers: Mapping[str, str], *, num_slices: int) -> Routing:
    """Read the routing fields of a body and the X-Data-Parallel-Rank header, which wins.

    Raises:
        ApiError: there is no such slice, or a field is out of range.
    """
    priority = body.priority or 0
    if abs(priority) > MAX_PRIORITY:
        raise ApiError(
            f"priority must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], got {priority}.",
            param="priority",
        )
    return Routing(
        dp_rank=_dp_rank(body, headers.get(DP_RANK_HEADER), num_slices),
        priority=priority,
        cache_key=_cache_key(body),
    )


def _dp_rank(body: GenerationBody, header: str | None, num_slices: int) -> int | None:
    """`data_parallel_rank` is the old name of `routed_dp_rank`, which wins over it."""
    name, rank = "routed_dp_rank", body.routed_dp_rank
    if rank is None:
        name, rank = "data_parallel_rank", body.data_parallel_rank
    if header is not None:
        name = "X-Data-Parallel-Rank"
        digits = header.strip().removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 12):
            raise ApiError(f"{name} must be an integer, got '{header[:64]}'.", param=name)
        rank = int(header)
    if rank is not None and not 0 <= rank < num_slices:
        raise ApiError(
            f"DP rank {rank} is not active. {name} must be in [0, {num_slices - 1}].", param=name
        )
    return rank


def _cache_key(body: GenerationBody) -> str:
    """ "" without a salt; else a text that no other pair of salt and key has."""
    for name in ("cache_salt", "extra_key"):
        value = getattr(body, name)
        if value is not None and len(value) > MAX_CACHE_KEY_LENGTH:
            raise ApiError(
                f"{name} may have {MAX_CACHE_KEY_LENGTH} characters, got {len(value)}.", param=name
            )
    if not body.cache_salt and not body.extra_key:
        return ""
    return msgspec.json.encode([body.cache_salt or "", body.extra_key or ""]).decode()
