"""What `bench_parallel` makes of the rows of its layouts: tables, ratios, a model of a step.

A layout's rows are flat dictionaries: `kind` is facts, decode, prefill, exchange, skipped or
failed; one that could not be measured has a `note`. `why` tells what a decode row is for: limit
(the largest batch), check (the model of a step) or table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]


def of(rows: Rows, kind: str, **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows of a kind with these entries, as far as they were measured."""
    return [
        row
        for row in rows
        if row["kind"] == kind
        and "note" not in row
        and all(row.get(key) == value for key, value in wanted.items())
    ]


def first(rows: Rows, kind: str, **wanted: Any) -> Mapping[str, Any] | None:
    return next(iter(of(rows, kind, **wanted)), None)


def overview(results: Mapping[str, Rows]) -> list[Row]:
    """A line for each layout: memory, the largest batch, prefill."""
    lines = []
    for name, rows in results.items():
        facts, limit = first(rows, "facts"), first(rows, "decode", why="limit")
        prefill = first(rows, "prefill")
        line: Row = {"layout": name}
        if facts:
            line |= {
                "weights GB": facts["weight bytes"] / 1e9,
                "KV GB": facts["KV bytes"] / 1e9,
                "KV tokens": facts["KV tokens"],
                "in memory": facts["KV tokens in memory"],
            }
        if limit:
            line |= {"batch": limit["batch"], "ms": limit["ms"], "tok/s": limit["tok/s"]}
            line |= {k: limit[k] for k in ("collective ms", "idle %", "imbalance %") if k in limit}
        if prefill:
            line["prefill tok/s"] = prefill["tok/s"]
            if "collective ms" in prefill:
                line["prefill collective %"] = 100 * prefill["collective ms"] / prefill["ms/step"]
        for tokens in (row["tokens"] for row in of(rows, "exchange")):
            line[f"us/{tokens}"] = first(rows, "exchange", tokens=tokens)["us"]
        notes = [row["note"] for row in rows if row["kind"] == "failed"]
        skipped = sum(row["kind"] == "skipped" for row in rows)
        notes += [f"{skipped} rows skipped by the time limit"] if skipped else []
        lines.append(line | ({"note": "; ".join(notes)} if notes else {}))
    return lines


def decode_table(
    results: Mapping[str, Rows], bases: Sequence[str], dpas: Sequence[str]
) -> list[Row]:
    """Tokens a second by batch and context, a column a layout; and the ratio of the fastest DPA
    layout to the fastest one of plain TP."""
    cells = {
        name: {(r["context"], r["batch"]): r["tok/s"] for r in of(rows, "decode")}
        for name, rows in results.items()
    }
    table_rows = [r for rows in results.values() for r in of(rows, "decode", why="table")]
    lines = []
    for context, batch in sorted({(r["context"], r["batch"]) for r in table_rows}):
        line: Row = {"context": context, "batch": batch}
        line |= {name: cell.get((context, batch)) for name, cell in cells.items()}
        a, b = (
            max((line[name] for name in names if line.get(name)), default=None)
            for names in (dpas, bases)
        )
        line["DPA / TP"] = a / b if a and b else None
        lines.append(line)
    return lines


def modelled_ms(
    results: Mapping[str, Rows], single: str, name: str, *, each: int, context: int, devices: int
) -> Row | None:
    """A layout's decode step against one made of its parts: a single device's step at the same
    batch a slice, its experts replaced by a device's share of all slices' tokens, and exchanges.
    None where a part was not measured.

    Args: each: sequences of a slice.
    """
    at = {"why": "check", "context": context}
    alone = first(results[single], "decode", **at, **{"each slice": each})
    together = first(results[single], "decode", **at, **{"each slice": each * devices})
    measured = first(results[name], "decode", **at)
    exchange = first(results[name], "exchange", tokens=each)
    facts = first(results[name], "facts")
    if not (alone and together and measured and exchange and facts) or "expert ms" not in alone:
        return None
    parts = {
        "single ms": alone["ms"],
        "its experts": alone["expert ms"],
        "share of experts": together["expert ms"] / devices,
        "exchanges": facts["moe layers"] * exchange["us"] / 1e3,
    }
    model = parts["single ms"] - parts["its experts"]
    model += parts["share of experts"] + parts["exchanges"]
    return {
        "layout": name,
        "step": f"{facts['slices']}x{each}",
        **parts,
        "model ms": model,
        "measured ms": measured["ms"],
        "measured / model": measured["ms"] / model,
    }


def ratios(results: Mapping[str, Rows], base: str, name: str) -> Row:
    """A layout against plain TP: KV tokens and decode throughput at the largest batches."""
    a, b = first(results[name], "facts"), first(results[base], "facts")
    x, y = (first(results[n], "decode", why="limit") for n in (name, base))
    line: Row = {"layout": name, "against": base}
    if a and b:
        line["KV tokens"] = a["KV tokens"] / b["KV tokens"]
        if b["KV tokens in memory"]:
            line["in memory"] = a["KV tokens in memory"] / b["KV tokens in memory"]
            line["goal 1.9 of 2"] = line["in memory"] / a["slices"] >= 0.95
    if a and b and x and y:
        line["decode tok/s"] = x["tok/s"] / y["tok/s"]
        line["share of KV ratio"] = line["decode tok/s"] / line["KV tokens"]
        line["goal 0.9"] = line["share of KV ratio"] >= 0.9
        if a["capped"] or b["capped"]:
            line["note"] = "not KV-limited: --max-batch caps it"
    return line
