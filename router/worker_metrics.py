"""The metrics pages of several workers as one page.

Every sample keeps its labels and gets two: `worker_addr` and `source`, both the worker's URL. Names
lose their colons, as Prometheus keeps those for itself. It promises that no page can spoil the
others: labels may differ from worker to worker, and lines that are no samples are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?[ \t]+(\S+(?:[ \t]+-?\d+)?)\s*$")
_COMMENT = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][\w:]*)(?: (.*))?$")
_OURS = re.compile(r"(^|,)\s*(worker_addr|source)=")
SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_created")


@dataclass(slots=True)
class _Family:
    """All samples of one metric."""

    help: str = ""
    type: str = ""
    samples: list[str] = field(default_factory=list)


def merge(pages: Mapping[str, str]) -> str:
    """One page of many.

    Args:
        pages: text form, by the URL of the worker.
    """
    families: dict[str, _Family] = {}
    for url, page in pages.items():
        _read(families, url, page)
    lines = []
    for name, family in families.items():
        if not family.samples:
            continue
        if family.help:
            lines.append(f"# HELP {name} {family.help}")
        if family.type:
            lines.append(f"# TYPE {name} {family.type}")
        lines += family.samples
    return "".join(f"{line}\n" for line in lines)


def _read(families: dict[str, _Family], url: str, page: str) -> None:
    """Add the samples of one page."""
    escaped = url.replace("\\", "\\\\").replace('"', '\\"')
    ours = f'worker_addr="{escaped}",source="{escaped}"'
    for line in page.splitlines():
        comment = _COMMENT.match(line)
        if comment is not None:
            kind, name, text = comment.groups()
            family = families.setdefault(name.replace(":", "_"), _Family())
            if kind == "HELP":
                family.help = family.help or text or ""
            else:
                family.type = family.type or text or ""
            continue
        sample = _SAMPLE.match(line)
        if line.startswith("#") or sample is None:
            continue
        name, labels, value = sample.groups()
        name = name.replace(":", "_")
        if labels:
            labels = _OURS.sub(r"\1exported_\2=", labels).strip().rstrip(",")
        labels = f"{labels},{ours}" if labels else ours
        family = families.setdefault(_family(families, name), _Family())
        family.samples.append(f"{name}{{{labels}}} {value}")


def _family(families: Mapping[str, _Family], name: str) -> str:
    """The metric that a sample belongs to."""
    if name in families:
        return name
    for suffix in SUFFIXES:
        base = name.removesuffix(suffix)
        if base != name and base in families:
            return base
    return name
