"""Which exchange a program of a given size takes: measured times, carried over by bytes moved.

Everything here follows from static sizes, so all devices of a step choose alike. Kept free of JAX,
as `sharding.layout` is.
"""

from __future__ import annotations

import bisect
import math
from typing import Literal

from sharding.layout import Layout

Exchange = Literal["none", "all_to_all"]

MEASURED_US: dict[Exchange, tuple[tuple[float, float], ...]] = {
    "none": ((0.25, 29.0), (1.0, 41.0), (2.0, 54.0), (4.0, 72.0), (8.0, 119.0), (32.0, 376.0)),
    "all_to_all": ((1.4, 101.0), (2.75, 101.0), (5.4, 164.0), (20.7, 341.0)),
}
"""(MiB that leave a device on the way out, us there and back), ascending: two H200 over NVLink,
bfloat16, by scripts/bench_exchange.py. all_to_all is one round with its sorting."""

ONE_ROUND_TOKENS = 256
"""Up to this many tokens all_to_all has room for every token at every destination. Beyond, how many
rounds there are is known at run time only, for which a GPU waits for its host: too long for
decode steps."""
ROOM = 1.25
"""Rows of a round, as a multiple of what even routing sends to one group."""
WORTH_LEAVING_OUT = 0.8
"""A round that has room for more than this share of the tokens gets room for all of them."""


def dispatch_rows(tokens: int, k: int, groups: int) -> int:
    """Rows that a round of all_to_all has for each destination: `tokens` if for every token.

    A token goes once to every group that holds one of its `k` experts. Under even routing that is
    a share of 1 - (1 - 1/groups)^k of the tokens; a quarter more and four standard deviations
    make a second round rare.
    """
    share = 1 - (1 - 1 / groups) ** k
    rows = math.ceil(ROOM * tokens * share + 4 * math.sqrt(tokens * share * (1 - share)))
    worth_it = tokens > ONE_ROUND_TOKENS and rows <= WORTH_LEAVING_OUT * tokens
    return rows if worth_it else tokens


def rows_moved(exchange: Exchange, layout: Layout, tokens: int, k: int) -> float:
    """Rows that leave a device on the way out, if half of all that it sends is the way out.

    Args:
        tokens: of each dp slice, padding included.
        k: experts of a token.
    """

    def others(axes: tuple[str, ...]) -> int:
        return layout.size(axes) - 1

    def summed(axes: tuple[str, ...], rows: float) -> float:  # all-reduce: scatter and gather
        return rows * others(axes) / layout.size(axes)

    if exchange == "none":
        return tokens * others(layout.attn_dp) + summed(layout.attn_tp, tokens)
    split, gather = layout.split, layout.gather
    share = -(-tokens // layout.size(split))
    rows = share * layout.size(gather)
    rest = tuple(axis for axis in layout.moe_tp if axis not in gather)
    return (
        share * others(gather)
        + dispatch_rows(rows, k, layout.size(layout.moe_ep)) * others(layout.moe_ep)
        + summed(rest, rows)
        + share * others(split) / 2
    )


def exchange_us(exchange: Exchange, mib: float) -> float:
    """Time of an exchange, us: between measured sizes and beyond the last one, in proportion."""
    points = MEASURED_US[exchange]
    if mib <= points[0][0]:
        return points[0][1]
    after = min(bisect.bisect_left(points, (mib, 0.0)), len(points) - 1)
    (low, low_us), (high, high_us) = points[after - 1], points[after]
    return low_us + (mib - low) * (high_us - low_us) / (high - low)


def choose_exchange(layout: Layout, tokens: int, k: int, row_bytes: int) -> Exchange:
    """The exchange of a program with `tokens` rows a slice: the faster one, "none" where equal.

    Where a round of all_to_all has room for every token it saves nothing ("none" it is): with two
    groups and six experts a token, nearly every token goes to both.

    Args:
        row_bytes: of one token on its way out.
    """
    if layout.num_slices == 1 or layout.size(layout.moe_ep) == 1:
        return "none"  # every device has all tokens of its experts; or there is one group
    sent = -(-tokens // layout.size(layout.split)) * layout.size(layout.gather)
    if dispatch_rows(sent, k, layout.size(layout.moe_ep)) == sent:
        return "none"

    def us(exchange: Exchange) -> float:
        moved = rows_moved(exchange, layout, tokens, k)
        return exchange_us(exchange, moved * row_bytes / 2**20)

    return "all_to_all" if us("all_to_all") < us("none") else "none"
