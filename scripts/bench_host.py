"""Host time of a decode step: what planning, packing, launching and applying cost beside a model.

The scheduler, the batch builder and the reading of tokens are the real ones; in place of the
model's two programs stand two that do nothing with as many arguments, compiled over as many
emulated devices as there are slices. A step is planned and launched before the one before is
applied, as the engine does. For example:

  python scripts/bench_host.py
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from scripts.benchmarking import emit, percentile, table
from scripts.workloads import Vocabulary
from serving.engine.batch_builder import Batch, BatchBuilder, Packing
from serving.engine.buckets import Buckets, Shape
from serving.engine.outputs import read_tokens
from serving.messages import StepOutput, TokenEvent, frame
from serving.request import Request, SamplingParams
from serving.scheduler.plan import StepPlan, StepResult
from serving.scheduler.scheduler import Scheduler, SchedulerConfig, TokenOutcome
from sharding.layout import make_layout
from sharding.mesh import by_slice, make_mesh

PARTS = ("plan", "build", "dispatch", "wait", "read", "apply", "encode")
"""In the order of a step; `wait` is the devices', the others are the host's."""
COUNTED = ("plan", "build", "dispatch", "apply")
"""What the targets are about."""
TARGETS_MS = {1: 1.0, 8: 5.0}
"""By number of slices, at 64 requests each."""


class Devices:
    """Stands where the model's programs are: takes what they take, gives tokens of the same shape.

    Not measured here: what a program does, and the host's time inside an accelerator's driver.
    """

    def __init__(self, num_slices: int, packing: Packing, num_weights: int) -> None:
        layout = make_layout(num_slices, num_slices, 1)
        self._by_slice = by_slice(make_mesh(layout), layout)
        self._rows = packing.shape.sampled_rows
        self._weights = [self._zeros((num_slices, 1)) for _ in range(num_weights)]
        self._kv = self._zeros((num_slices, 16))
        self._last = self._zeros((num_slices, packing.num_slots + 1))
        rows = self._upload(np.zeros((num_slices, packing.width), np.int32))
        self._forward_program = (
            jax.jit(self._forward, donate_argnums=1, out_shardings=(self._by_slice,) * 2)
            .lower(self._weights, self._kv, self._last, rows)
            .compile()
        )
        logits, self._kv = self._forward_program(self._weights, self._kv, self._last, rows)
        self._sample_program = (
            jax.jit(self._sample, donate_argnums=1, out_shardings=(self._by_slice,) * 2)
            .lower(logits, self._last)
            .compile()
        )

    def launch(self, rows: np.ndarray) -> jax.Array:
        """Upload a batch and start both programs: packed tokens i32 [D, R, 2], not ready yet."""
        logits, self._kv = self._forward_program(
            self._weights, self._kv, self._last, self._upload(rows)
        )
        tokens, self._last = self._sample_program(logits, self._last)
        tokens.copy_to_host_async()
        return tokens

    def _zeros(self, shape: tuple[int, ...]) -> jax.Array:
        return jax.device_put(jnp.zeros(shape, jnp.int32), self._by_slice)

    def _upload(self, rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(rows.shape, self._by_slice, rows.__getitem__)

    def _forward(
        self, weights: list[jax.Array], kv: jax.Array, last: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        total = sum(w[:, 0] for w in weights) + last[:, 0] + rows[:, 0]
        return jnp.broadcast_to(total[:, None], (len(rows), self._rows)), kv + 1

    def _sample(self, logits: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.stack([logits % 7, logits * 0], axis=-1), last + 1


class Stopwatch:
    """Seconds of every part of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        self.steps.append(dict.fromkeys(PARTS, 0.0))

    def time(self, part: str, work: Callable[..., Any], *args: Any) -> Any:
        """The result of `work(*args)`."""
        began = time.perf_counter()
        result = work(*args)
        self.steps[-1][part] += time.perf_counter() - began
        return result


def encode(outcomes: list[TokenOutcome]) -> bytes:
    """The message to the front."""
    events = [TokenEvent(o.rid, o.token_id, o.finish_reason, o.logprob) for o in outcomes]
    return frame(StepOutput(events))


def measure(args: argparse.Namespace, num_slices: int) -> dict[str, Any]:
    """Milliseconds of the parts of a decode step with --batch requests on every slice."""
    buckets = Buckets(decode=(args.batch,), extend=(args.batch * args.context,))
    scheduler = filled(args, num_slices, buckets)
    table_width = -(-args.max_context // args.page_size)
    packing = Packing(
        shape=Shape(decode_rows=args.batch), table_width=table_width, num_slots=args.batch
    )
    builder = BatchBuilder(num_slices=num_slices, num_slots=args.batch, table_width=table_width)
    devices = Devices(num_slices, packing, args.weights)
    watch, in_flight = Stopwatch(), None
    gc.collect()
    gc.freeze()  # as the engine's process does

    def build(plan: StepPlan) -> Batch:
        assert buckets.shape_for(plan) == packing.shape
        return builder.build(plan, packing)

    for _ in range(args.steps):
        watch.begin()
        plan = watch.time("plan", scheduler.plan)
        batch = watch.time("build", build, plan)
        tokens = watch.time("dispatch", devices.launch, batch.rows)
        if in_flight is not None:
            before, pending = in_flight
            packed = watch.time("wait", np.asarray, pending)
            result = watch.time("read", read, before, packed, args.batch)
            outcomes = watch.time("apply", scheduler.apply, before, result)
            watch.time("encode", encode, outcomes)
        in_flight = plan, tokens
        # Emulated devices compute on the host's cores, where real ones would not: let them end.
        jax.block_until_ready(tokens)
    rows = watch.steps[args.steps // 10 :]
    host = [sum(step[part] for part in COUNTED) for step in rows]
    milliseconds = {part: 1e3 * statistics.median(step[part] for step in rows) for part in PARTS}
    return {
        "slices": num_slices,
        "batch": args.batch,
        **milliseconds,
        "host": 1e3 * statistics.median(host),
        "host p10": 1e3 * percentile(host, 10),
        "host mean": 1e3 * statistics.mean(host),
        "host p99": 1e3 * percentile(host, 99),
        "target": TARGETS_MS.get(num_slices) if args.batch == 64 else None,
    }


def read(plan: StepPlan, packed: np.ndarray, decode_rows: int) -> StepResult:
    return StepResult(tokens=read_tokens(plan, packed, decode_rows), scores={})


def filled(args: argparse.Namespace, num_slices: int, buckets: Buckets) -> Scheduler:
    """A scheduler whose slots are all taken by requests that decode, far from their end.

    Prompts differ by up to a page, so that not all need a new page in the same step.
    """
    answer = args.steps + 8
    pages = -(-(args.context + args.page_size + answer) // args.page_size)
    scheduler = Scheduler(
        SchedulerConfig(
            num_slices=num_slices,
            slots_per_slice=args.batch,
            pages_per_slice=1 + args.batch * (pages + 1),
            page_size=args.page_size,
            prefill_tokens_per_step=buckets.prefill_tokens,
            prefill_rows_per_step=args.batch,
            max_context_tokens=args.max_context,
        )
    )
    vocabulary = Vocabulary(32000, args.seed)
    params = SamplingParams(max_tokens=answer, temperature=0.0)
    for i in range(args.batch * num_slices):
        prompt = vocabulary.draw(args.context - i % args.page_size)
        rank = i % num_slices
        scheduler.add(Request(rid=f"request-{i}", prompt=prompt, sampling=params, dp_rank=rank))
    while any(
        load.running < args.batch or load.pending_prefill_tokens for load in scheduler.status()
    ):
        plan = scheduler.plan()
        assert plan is not None
        zeros = np.zeros((num_slices, 2 * args.batch, 2), np.int32)
        scheduler.apply(plan, read(plan, zeros, args.batch))
    return scheduler


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64, help="requests of each slice")
    parser.add_argument(
        "--slices", type=lambda t: tuple(int(p) for p in t.split(",")), default=(1, 8)
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument(
        "--max-context", type=int, default=16384, help="page tables are as wide (default: 16384)"
    )
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--weights", type=int, default=40, help="arrays that a forward program takes (default: 40)"
    )
    parser.add_argument("--seed", type=int, default=1)
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.slices))
    rows = [measure(args, num_slices) for num_slices in args.slices]
    print("Median milliseconds; host = " + " + ".join(COUNTED) + ".")
    print(table(rows) + "\n")
    emit("host", arguments=vars(args), devices="emulated on CPU", rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
