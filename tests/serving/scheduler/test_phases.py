"""Which steps prefill and which decode, policy by policy."""

from __future__ import annotations

import pytest

from serving.scheduler.phases import Phase, PhasePolicy, SliceWork, choose_phase
from tests.serving.scheduler.fake_runner import Harness

IDLE = SliceWork(decoding=0, prefilling=False, can_start=True)
DECODES = SliceWork(decoding=3, prefilling=False, can_start=True)
FULL = SliceWork(decoding=4, prefilling=False, can_start=False)
PREFILLS = SliceWork(decoding=0, prefilling=True, can_start=True)

BOTH = Phase(prefill=True, decode=True)
PREFILL = Phase(prefill=True, decode=False)
DECODE = Phase(prefill=False, decode=True)
MIXED = PhasePolicy()
INTERLEAVED = PhasePolicy(interval=3)
ALIGNED = PhasePolicy(max_delay=5)
EXCLUSIVE = PhasePolicy(exclusive=True)


@pytest.mark.parametrize(
    ("policy", "slices", "waiting", "since", "delayed", "phase"),
    [
        (MIXED, [DECODES, IDLE], 1, 0, 0, BOTH),
        (MIXED, [PREFILLS, DECODES], 0, 0, 0, BOTH),
        # Nothing may prefill until three decode steps have passed, except where nothing decodes.
        (INTERLEAVED, [DECODES, IDLE], 1, 2, 0, DECODE),
        (INTERLEAVED, [DECODES, IDLE], 1, 3, 0, BOTH),
        (INTERLEAVED, [PREFILLS, IDLE], 1, 0, 0, BOTH),
        # One slice alone waits for the other, but not for ever; two do not wait.
        (ALIGNED, [DECODES, PREFILLS], 0, 9, 4, DECODE),
        (ALIGNED, [DECODES, PREFILLS], 0, 9, 5, BOTH),
        (ALIGNED, [DECODES, PREFILLS], 1, 9, 0, BOTH),
        (ALIGNED, [DECODES, DECODES], 1, 9, 0, DECODE),
        (ALIGNED, [DECODES, DECODES], 2, 9, 0, BOTH),
        (ALIGNED, [DECODES, FULL], 2, 9, 0, DECODE),
        (ALIGNED, [IDLE, PREFILLS], 0, 0, 0, BOTH),
        # Never both, and one decode step at least between two with prefill.
        (EXCLUSIVE, [DECODES, PREFILLS], 0, 0, 0, DECODE),
        (EXCLUSIVE, [DECODES, PREFILLS], 0, 1, 0, PREFILL),
        (EXCLUSIVE, [IDLE, IDLE], 2, 0, 0, PREFILL),
        (EXCLUSIVE, [DECODES, FULL], 0, 9, 0, DECODE),
        (EXCLUSIVE, [FULL, FULL], 7, 9, 0, DECODE),
    ],
)
def test_choices(policy, slices, waiting, since, delayed, phase):
    chosen = choose_phase(policy, slices, waiting=waiting, since_prefill=since, delayed=delayed)
    assert chosen == phase


def modes(harness: Harness) -> list[str]:
    """One letter a step: what all slices together do."""
    letters = []
    for plan in harness.drain():
        kinds = {
            "prefill": any(rows.prefill for rows in plan.slices),
            "decode": any(rows.decode for rows in plan.slices),
        }
        letters.append("b" if all(kinds.values()) else "p" if kinds["prefill"] else "d")
    return letters


@pytest.mark.parametrize("overlap", [False, True])
def test_exclusive_steps_never_mix(overlap):
    harness = Harness(num_slices=2, pages=64, prefill_tokens=4, overlap=overlap, phases=EXCLUSIVE)
    for number in range(12):
        harness.add(f"r{number}", prompt_tokens=3 + number, max_tokens=2 + number % 5)
    assert set(modes(harness)) == {"p", "d"}


def test_decode_steps_between_two_prefills():
    harness = Harness(pages=64, prefill_tokens=4, phases=PhasePolicy(interval=2))
    harness.add("decodes", prompt_tokens=2, max_tokens=20)
    harness.step()
    harness.add("long", prompt_tokens=12, max_tokens=1)
    assert "".join(modes(harness)).startswith("ddbddbddb")


def test_a_prompt_waits_for_company_but_not_for_ever():
    harness = Harness(num_slices=2, pages=64, phases=PhasePolicy(max_delay=3))
    harness.add("decodes", prompt_tokens=2, max_tokens=30)
    harness.step()
    harness.add("alone", prompt_tokens=2, max_tokens=2)
    assert "".join(modes(harness)).startswith("dddbd")


def test_the_delay_counts_only_while_something_is_held_back():
    harness = Harness(num_slices=2, pages=64, phases=PhasePolicy(max_delay=3))
    harness.add("decodes", prompt_tokens=2, max_tokens=30)
    for _ in range(9):
        harness.step()
    harness.add("alone", prompt_tokens=2, max_tokens=2)
    assert "".join(modes(harness)).startswith("dddbd")
