"""What the benchmarks share: percentiles, a table for people, and the JSON line that is kept.

A result is a list of flat dictionaries. The same rows are printed and put into the line, together
with the commit, so that a number can always be traced to what produced it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Row = Mapping[str, Any]


def commit() -> str:
    """Short id of the checked-out commit, with a plus where files differ from it."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def own_parser(description: str | None) -> argparse.ArgumentParser:
    """For a script's own flags beside the engine's: those it does not know go on, none is cut."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def numbers(text: str) -> tuple[int, ...]:
    """A flag's "1,16,64"."""
    return tuple(int(part) for part in text.split(","))


def percentile(values: Iterable[float], p: float) -> float:
    """The p-th percentile, the nearest of the values; NaN where there are none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * p / 100) - 1)]


def spread(values: Sequence[float], name: str, scale: float = 1.0) -> dict[str, float]:
    """Mean and percentiles as columns `name mean`, `name p50`, `name p90`, `name p99`."""
    if not values:
        return {f"{name} {what}": math.nan for what in ("mean", "p50", "p90", "p99")}
    columns = {f"{name} mean": scale * sum(values) / len(values)}
    return columns | {f"{name} p{p}": scale * percentile(values, p) for p in (50, 90, 99)}


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a column for every key that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [not any(isinstance(row.get(c), str) for row in rows) for c in columns]

    def line(parts: Sequence[str]) -> str:
        aligned = [
            part.rjust(width) if right else part.ljust(width)
            for part, width, right in zip(parts, widths, numeric, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join(line(parts) for parts in [columns, *cells])


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def emit(benchmark: str, **facts: Any) -> None:
    """The JSON line: the benchmark's name, the commit, and what it measured under which setting."""
    line = {"benchmark": benchmark, "commit": commit(), **facts}
    print(json.dumps(_plain(line), allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    """JSON has no NaN, and nobody needs the twelfth digit."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def say(text: str) -> None:
    """Progress, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)
