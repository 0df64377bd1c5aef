"""Many more random schedules than the suite plays: `python -m tests.serving.scheduler.long_run N`.

The same play as in test_scheduler_properties, drawn from seeds 0 to N - 1 (or from --first on), so
that a failure can be played again by its seed.
"""

from __future__ import annotations

import argparse
import random
import time

from serving.scheduler.phases import PhasePolicy
from tests.serving.scheduler.fake_runner import Harness
from tests.serving.scheduler.test_scheduler_properties import play


def draw_harness(draw: random.Random) -> Harness:
    return Harness(
        num_slices=draw.randint(1, 5),
        slots=draw.randint(1, 6),
        pages=draw.randint(3, 20),
        page_size=draw.randint(1, 4),
        prefill_tokens=draw.randint(1, 12),
        prefill_rows=draw.randint(1, 3),
        overlap=draw.random() < 0.5,
        radix_cache=draw.random() < 0.7,
        schedule_policy=draw.choice(["fcfs", "lpm"]),
        load_balance=draw.choice(
            ["cache_aware", "cache_aware", "round_robin", "total_requests", "total_tokens"]
        ),
        phases=PhasePolicy(
            interval=draw.choice([0, 0, 1, 3]),
            max_delay=draw.choice([None, None, 1, 4]),
            exclusive=draw.random() < 0.3,
        ),
        reproducible=draw.random() < 0.3,
    )


def draw_events(draw: random.Random) -> list[tuple[str, int, int, int, int]]:
    events = []
    for _ in range(draw.randint(10, 40)):
        kind = draw.choice(["add", "add", "add", "add", "abort", "abort in flight"])
        size = draw.choice([draw.randint(1, 4), draw.randint(1, 40)])
        wait = draw.choice([0, 0, 0, 1, 2, 5])
        events.append((kind, wait, size, draw.randint(1, 40), draw.randrange(1 << 12)))
    return events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schedules", type=int)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    retracted = requests = cached = 0
    for seed in range(args.first, args.first + args.schedules):
        draw = random.Random(seed)
        harness = draw_harness(draw)
        try:
            play(harness, draw_events(draw))
        except BaseException:
            print(f"seed {seed} failed", flush=True)
            raise
        retracted += harness.scheduler.num_retracted
        requests += len(harness.requests)
        cached += sum(first.cached_tokens for first in harness.first.values())
        if (seed + 1) % 5000 == 0:
            print(f"{seed + 1} schedules after {time.monotonic() - started:.0f} s", flush=True)
    print(
        f"{args.schedules} schedules, {requests} requests, {retracted} retractions, {cached} "
        f"prompt tokens from the cache: nothing lost, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
