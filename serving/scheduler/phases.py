"""When slices prefill: a pure policy over what each slice could do in the next step.

All slices of a step run the same program, so one slice's prompt makes the others' decode rows wait.
*Mixed* lets everyone prefill at once beside decode rows; *interleaved* keeps a number of decode
steps between two steps with prefill, which bounds how long tokens wait; *aligned* holds prefill
back until every slice has some (or has waited long enough), so that fewer steps are slow;
*exclusive* never puts decode and prefill rows into one step, which bit-exactness needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePolicy:
    """Attributes:
    interval: decode steps that must follow a step with prefill, while anything decodes.
    max_delay: most steps that prefill is held back until all slices have some; None never
        holds it back.
    exclusive: no step has both decode and prefill rows.
    """

    interval: int = 0
    max_delay: int | None = None
    exclusive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceWork:
    """What one slice could do in the next step.

    Attributes:
        decoding: requests with a decode row.
        prefilling: whether a prompt of its own is unfinished.
        can_start: whether it has a slot for a waiting request.
    """

    decoding: int
    prefilling: bool
    can_start: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What a step may do: prefill, decode, or both."""

    prefill: bool
    decode: bool


MIXED = PhasePolicy()
"""The policy that allows everything in every step, whatever the slices could do."""
BOTH = Phase(prefill=True, decode=True)


def choose_phase(
    policy: PhasePolicy,
    slices: Sequence[SliceWork],
    *,
    waiting: int,
    since_prefill: int,
    delayed: int,
) -> Phase:
    """Whether the next step prefills and whether it decodes.

    Args:
        slices: in rank order.
        waiting: requests in the central queue that any slice may start.
        since_prefill: steps since the last one with prefill.
        delayed: steps for which this policy has held prefill back since then.
    """
    decoding = any(s.decoding for s in slices)
    ready = sum(s.prefilling for s in slices)
    startable = min(waiting, sum(s.can_start and not s.prefilling for s in slices))
    if not ready and not startable:
        return Phase(prefill=not policy.exclusive, decode=True)
    if not decoding:
        return Phase(prefill=True, decode=not policy.exclusive)
    interval = max(policy.interval, 1) if policy.exclusive else policy.interval
    held = since_prefill < interval
    if policy.max_delay is not None and ready + startable < len(slices):
        held = held or delayed < policy.max_delay
    return Phase(prefill=not held, decode=held or not policy.exclusive)
