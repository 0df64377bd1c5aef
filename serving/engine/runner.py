"""The device side of an engine: weights, KV pool, last tokens, sampling state, and their programs.

A step is launched (`ModelRunner.launch`), sampled (`LaunchedStep.sample`) and read
(`LaunchedStep.result`); only reading waits for the devices. Every program is compiled and has run
once before the engine is ready. Arrays that a step changes (pool, last tokens, sampling state) are
donated to it and rebound to its outputs; nobody else holds a reference to them.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model.config import ModelConfig
from model.ops.matrices import out_of_reach
from model.quantization import FP8
from serving.config import ConfigError, ServerConfig
from serving.engine.batch_builder import BatchBuilder, Packing
from serving.engine.buckets import Shape, make_buckets
from serving.engine.implementations import choose_kernels
from serving.engine.memory import (
    CPU_POOL_BYTES,
    pages_for,
    pages_in,
    pool_bytes,
)
from serving.engine.outputs import no_tokens, read_scores, read_tokens
from serving.engine.program_store import ProgramStore
from serving.engine.programs import SCORE_ROWS, ForwardProgram, ProgramFactory
from serving.engine.sampling_state import SamplingState, no_piece, pieces
from serving.scheduler.plan import PrefillChunk, StepPlan, StepResult
from sharding.comm import MeshComm
from sharding.layout import Layout
from sharding.mesh import by_slice, make_mesh
from sharding.sources import WeightSource
from sharding.step import ModelSpec, sharded

log = logging.getLogger("meshserve.engine")

RANDOM_PAGES = 64
"""Pages that `randomise_pool` draws at a time."""


class ScoredChunk(NamedTuple):
    """A chunk whose prompt tokens are scored, and where the scores stand.

    Attributes:
        slice: its dp slice; first: its first target among all that the slice scores in this step.
    """

    chunk: PrefillChunk
    slice: int
    first: int


class LaunchedStep:
    """A step on its way: its logits until it is sampled, then its tokens until they are read.

    Attributes:
        shape: of the program that runs it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        plan: StepPlan,
        program: ForwardProgram,
        *,
        plain: bool,
        logits: tuple[jax.Array, jax.Array] | None,
        scored: list[ScoredChunk],
        scores: list[jax.Array],
    ) -> None:
        """Args:
        plain: whether the best tokens are all that is wanted.
        logits: f32 [D, R, V] and the sampler's numbers; None if the plan samples nothing.
        scores: i32 [D, SCORE_ROWS, columns] of every launch of the scoring program.
        """
        self.plan, self.shape = plan, program.packing.shape
        self.sampled = False
        self._runner, self._plain, self._logits = runner, plain, logits
        self._scored, self._scores = scored, scores
        self._tokens: jax.Array | None = None

    def open_masks(self) -> np.ndarray:
        """Masks that allow every token, i32 [D, R, ceil(V / 32)], to be narrowed row by row.

        Bit b of word w of a row stands for token 32 * w + b.
        """
        words = self._runner.mask_words
        return np.full((len(self.plan.slices), self.shape.sampled_rows, words), -1, np.int32)

    def mask_row(self, dp_rank: int, index: int) -> int:
        """Where row `index` of a slice's plan (decode rows, then chunks) stands in the masks."""
        num_decode = len(self.plan.slices[dp_rank].decode)
        return index if index < num_decode else self.shape.decode_rows + index - num_decode

    def sample(self, masks: np.ndarray | None = None) -> None:
        """Launch the sampling program, and the copies of what it gives to the host.

        Args:
            masks: i32 or u32, see `open_masks`; must not change any more. None allows all.

        Raises:
            RuntimeError: the step is sampled already.
            ValueError: the masks have another shape.
        """
        if self.sampled:
            raise RuntimeError("A step is sampled once.")
        if self._logits is not None:
            self._tokens = self._runner.sample(*self._logits, plain=self._plain, masks=masks)
            self._tokens.copy_to_host_async()
        self._logits, self.sampled = None, True

    def result(self) -> StepResult:
        """Wait for the tokens and scores, and read them.

        Raises:
            RuntimeError: the step has not been sampled.
        """
        if not self.sampled:
            raise RuntimeError("A step must be sampled before its result is read.")
        if self._tokens is None:
            tokens = no_tokens(self.plan)
        else:
            tokens = read_tokens(self.plan, np.asarray(self._tokens), self.shape.decode_rows)
        scores = {}
        if self._scored:
            packed = np.concatenate([np.asarray(s) for s in self._scores], axis=1)
            for chunk, dp_rank, first in self._scored:
                targets = chunk.targets or ()
                rows = packed[dp_rank, first : first + len(targets)]
                scores[chunk.rid] = read_scores(targets, rows, chunk.num_alternatives)
        return StepResult(tokens=tokens, scores=scores)


class ModelRunner:
    """Runs step plans on the mesh.

    Attributes:
        buckets: the program sizes, which bound what a plan may hold.
        num_pages: pages of each slice's pool, the sink (page 0) included.
        max_context: most tokens of one sequence.
        mask_words: int32 words of one row's grammar mask.
    """

    def __init__(self, config: ServerConfig, source: WeightSource, layout: Layout) -> None:
        """Load the weights, size the pool, compile everything.

        Raises:
            CheckpointError, LayoutError, ConfigError: with the sentence for the user.
        """
        started = time.perf_counter()
        self.config, self.model, self.layout = config, source.config, layout
        model = source.config
        check_exchange(config, model, layout)
        self.mesh = make_mesh(layout)
        device = self.mesh.devices.flat[0]
        self.platform = device.platform
        self.dtype = resolve_dtype(config.dtype, self.platform)
        self.kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, self.dtype)
        self.spec = ModelSpec(model, self.dtype, layout, source.fp8)
        self.page_size = config.page_size
        self._by_slice = by_slice(self.mesh, layout)
        self.kernels = choose_kernels(
            config,
            model,
            layout,
            platform=self.platform,
            capability=getattr(device, "compute_capability", None),
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            fp8=self.spec.fp8_weights,
        )
        self._log_fp8(source)
        self.weights = source.load(self.spec, self.mesh)
        self.load_seconds = time.perf_counter() - started
        log.info("weights on the devices after %.1f s", self.load_seconds)

        context = longest_context(config, model)
        self.buckets = make_buckets(
            config,
            platform=self.platform,
            num_slices=layout.num_slices,
            max_context=context,
            fresh=self.kernels.extend_attention != "xla",
        )
        self._log_overlap()
        self.comm = MeshComm(
            layout,
            config.moe_a2a_backend,
            fp8_dispatch=config.moe_dispatch_dtype == "fp8_e4m3",
            deterministic=config.enable_deterministic_inference,
        )
        if self.exchanges:
            log.info(
                "expert exchange: %s", "; ".join(f"{s}: {e}" for s, e in self.exchanges.items())
            )
        self._factory = ProgramFactory(
            self.spec,
            self.mesh,
            self.buckets,
            comm=self.comm,
            kernels=self.kernels,
            page_size=self.page_size,
            kv_dtype=self.kv_dtype,
            store=ProgramStore.within(config.compilation_cache_dir, self.mesh),
            threshold=config.tbo_token_distribution_threshold,
        )
        self.mask_words = self._factory.mask_words
        self.num_pages = self._size_pool(context)
        self.max_context = min(context, (self.num_pages - 1) * self.page_size)
        if self.max_context < 2:
            raise ConfigError("A context of one token has no room for a prompt and an answer.")
        self.table_width = -(-self.max_context // self.page_size)
        started = time.perf_counter()
        self._programs = self._factory.compile_all(
            num_pages=self.num_pages,
            table_width=self.table_width,
            with_greedy=not config.enable_deterministic_inference,
        )
        self._make_state()
        self._warm_up()
        self.compile_seconds = time.perf_counter() - started
        log.info("all programs ready after %.1f s", self.compile_seconds)

    # ---- running ---------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start a step: the forward program, then the set-up of samplers and prompt scoring.

        Steps may be launched before the ones before are read, but not before they are sampled:
        their tokens are this step's input.

        Raises:
            RuntimeError: the step launched last has not been sampled.
            ValueError: the plan fits no program, or lacks what a sampler must be set up with.
        """
        if self._last is not None and not self._last.sampled:
            raise RuntimeError("The step launched last must be sampled before the next one.")
        program = self._programs.forward[self.buckets.shape_for(plan)]
        setups = _setups(plan, self.buckets.slots)
        batch = self._builder.build(plan, program.packing)
        logits, numbers, hidden = self._forward(program, batch.rows)
        for rows in setups:
            self._set_up(rows)
        scored, requests = _scoring(plan, program.packing)
        scores = [self._score(hidden, rows) for rows in requests]
        for array in scores:
            array.copy_to_host_async()
        self._last = LaunchedStep(
            self,
            plan,
            program,
            plain=batch.plain,
            logits=(logits, numbers) if batch.samples else None,
            scored=scored,
            scores=scores,
        )
        return self._last

    def sample(
        self,
        logits: jax.Array,
        numbers: jax.Array,
        *,
        plain: bool,
        masks: np.ndarray | None = None,
    ) -> jax.Array:
        """Launch the sampling program (for `LaunchedStep.sample`): packed tokens i32 [D, R, n].

        Deterministic inference always draws by the full program.

        Raises:
            ValueError: the masks are not of the shape of `LaunchedStep.open_masks`.
        """
        rows = logits.shape[1]
        if plain and masks is None and self._programs.greedy:
            greedy = self._programs.greedy[rows]
            tokens, self._last_tokens = greedy(logits, numbers, self._last_tokens)
            return tokens
        allowed = self._open_masks[rows]
        if masks is not None:
            if masks.shape != allowed.shape or masks.dtype.itemsize != 4:
                raise ValueError(
                    f"Masks must be int32 {allowed.shape}, got {masks.dtype} {masks.shape}."
                )
            allowed = self._upload(masks.view(np.int32))
        full = self._programs.full[rows]
        tokens, self._last_tokens, self._state = full(
            logits, numbers, allowed, self._last_tokens, self._state
        )
        return tokens

    def _upload(self, rows: np.ndarray) -> jax.Array:
        """i32 [D, ...] to the devices of each slice."""
        return jax.make_array_from_callback(rows.shape, self._by_slice, rows.__getitem__)

    def _forward(
        self, program: ForwardProgram, rows: np.ndarray
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Logits, the sampler's numbers, and an extend program's hidden rows."""
        logits, numbers, self._kv, *hidden = program.run(
            self.weights, self._kv, self._last_tokens, self._upload(rows)
        )
        return logits, numbers, hidden[0] if hidden else None

    def _set_up(self, rows: np.ndarray) -> None:
        """Set up a slot of each slice, i32 [D, SETUP_WIDTH]."""
        self._state = self._programs.set_up(self._state, self._upload(rows))

    def _score(self, hidden: jax.Array | None, rows: np.ndarray) -> jax.Array:
        """Score rows of hidden states, i32 [D, 2 * SCORE_ROWS]."""
        return self._programs.score(self.weights, hidden, self._upload(rows))

    # ---- setting up ------------------------------------------------------------------------

    def _log_overlap(self) -> None:
        if not self.config.enable_two_batch_overlap:
            return
        cut = [str(shape) for shape in self.buckets.shapes() if shape.cut]
        if cut:
            log.info("two-batch overlap in these programs: %s", ", ".join(cut))
        else:
            log.warning(
                "two-batch overlap in no program: none is of the sizes that "
                "--tbo-min-prefill-tokens and --tbo-min-decode-rows name (by default none is: it "
                "lost where it was measured)"
            )

    def _log_fp8(self, source: WeightSource) -> None:
        if not source.fp8:
            return
        kept = len(source.fp8) - len(self.spec.not_kept)
        log.info("%d parameters stay in FP8 on the devices", kept)
        if self.spec.recut:
            log.info(
                "shards cut the FP8 blocks of %d parameters (%s, ...): their factors are repeated "
                "for smaller blocks",
                len(self.spec.recut),
                self.spec.recut[0],
            )
        if self.spec.not_kept:
            log.warning(
                "shards cut the FP8 blocks of %d parameters to pieces, they are dequantised to "
                "%s: %s",
                len(self.spec.not_kept),
                self.dtype,
                ", ".join(self.spec.not_kept),
            )

    @property
    def exchanges(self) -> dict[str, str]:
        """The expert exchange of each forward program, by the program's name; "A, B" where the two
        micro-batches of two-batch overlap take different ones."""
        if not self.model.num_experts or self.layout.num_devices == 1:
            return {}

        def chosen(shape: Shape) -> str:
            k, width = self.model.num_experts_per_token, self.model.hidden_size
            parts = (shape.cut, shape.rows - shape.cut) if shape.cut else (shape.rows,)
            of = [self.comm.exchange_for(n, k, width, self.dtype.itemsize) for n in parts]
            return ", ".join(dict.fromkeys(of))

        return {str(shape): chosen(shape) for shape in self.buckets.shapes()}

    def _zeros(
        self, shape: Sequence[int], dtype: Any, spec: PartitionSpec | None = None
    ) -> jax.Array:
        """Zeros on the mesh, by slice if no spec is given."""
        sharding = self._by_slice if spec is None else NamedSharding(self.mesh, spec)
        return jax.jit(functools.partial(jnp.zeros, tuple(shape), dtype), out_shardings=sharding)()

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers, on each device of its slice."""
        return self.spec.page_bytes(self.page_size, self.kv_dtype)

    def kv_bytes_per_device(self) -> int:
        """Bytes of the pool that the first device really holds."""
        return int(self._kv.addressable_shards[0].data.nbytes)

    def _size_pool(self, context: int) -> int:
        """Pages of each slice's pool: the flag, or what the device's memory allows."""
        if self.config.max_total_tokens is not None:
            pages = pages_for(self.config.max_total_tokens, self.page_size, self.page_bytes)
            if self._beyond_kernels(pages):
                raise ConfigError(
                    f"--max-total-tokens {self.config.max_total_tokens}: kernels reach no FP8 pool "
                    f"of {pages * self.page_bytes / 2**30:.1f} GiB a device; make it at most 2 GiB "
                    "or more than 4, or use --kv-cache-dtype auto or --attention-backend xla."
                )
            return pages
        budget = CPU_POOL_BYTES if self.platform == "cpu" else self._free_bytes(context)
        pages = pages_in(budget, self.page_bytes)
        if self._beyond_kernels(pages):
            pages = 2**31 // self.page_bytes
            log.warning("the FP8 pool is cut to 2 GiB: kernels reach none between 2 and 4 GiB")
        if pages < 2:
            raise ConfigError(
                f"No memory is left for a KV pool: {budget >> 20} MiB a device after weights "
                f"({self.spec.device_bytes() >> 20} MiB) and programs; raise "
                "--mem-fraction-static, spread the model over more devices, or lower "
                "--extend-buckets."
            )
        return pages

    def _beyond_kernels(self, pages: int) -> bool:
        """Whether the attention kernels cannot address a pool of so many pages."""
        numbers = pages * self.page_bytes // self.kv_dtype.itemsize
        of_bytes = self.kernels.decode_attention == "pallas" and self.kv_dtype == FP8
        return of_bytes and out_of_reach(numbers)

    def _free_bytes(self, context: int) -> int:
        """Memory left on the fullest device, less what steps need beside weights and pool."""
        temporary = self._factory.most_temporary_bytes(-(-context // self.page_size))
        working = temporary + self._factory.step_bytes()
        return min(
            pool_bytes(
                int(stats["bytes_limit"]), weights=int(stats["bytes_in_use"]), working=working
            )
            for device in self.mesh.local_devices
            if (stats := device.memory_stats())
        )

    def pages_in_memory(self) -> int | None:
        """Pages that --mem-fraction-static leaves each slice beside the weights and the programs
        that were compiled, whatever the pool really has; None on CPU, which has no limit."""
        if self.platform == "cpu":
            return None
        limit = min(
            int(stats["bytes_limit"])
            for device in self.mesh.local_devices
            if (stats := device.memory_stats())
        )
        programs = [p.run for p in self._programs.forward.values()] + [
            *self._programs.full.values()
        ]
        temporary = max(p.memory_analysis().temp_size_in_bytes for p in programs)
        working = temporary + self._factory.step_bytes()
        free = pool_bytes(limit, weights=self.spec.device_bytes(), working=working)
        return pages_in(free, self.page_bytes)

    def _make_state(self) -> None:
        """Everything that steps change, empty; and masks that allow all."""
        slices, slots = self.layout.num_slices, self.buckets.slots
        self._last_tokens = self._zeros((slices, slots + 1), jnp.int32)
        pool = self.spec.pool_shape(self.num_pages, self.page_size)
        self._kv = self._zeros(pool, self.kv_dtype, self.spec.pool_spec)
        self._state = SamplingState(
            *(self._zeros(part.shape, part.dtype) for part in self._factory.state)
        )
        self._open_masks = {
            rows: self._upload(np.full((slices, rows, self.mask_words), -1, np.int32))
            for rows in self.buckets.sampled_rows
        }
        self._builder = BatchBuilder(
            num_slices=slices, num_slots=slots, table_width=self.table_width
        )
        self._last: LaunchedStep | None = None

    def _warm_up(self) -> None:
        """Run every program once on padding alone: nothing is left to set up for a request."""
        slices = self.layout.num_slices
        hidden = None
        for shape, program in self._programs.forward.items():
            logits, numbers, rows = self._forward(program, program.packing.empty(slices))
            hidden = rows if hidden is None else hidden
            masks = np.full((slices, shape.sampled_rows, self.mask_words), -1, np.int32)
            for plain, mask in ((True, None), (False, None), (False, masks)):
                tokens = self.sample(logits, numbers, plain=plain, masks=mask)
                tokens.copy_to_host_async()
                np.asarray(tokens)
        self._set_up(np.stack([no_piece(self.buckets.slots)] * slices))
        np.asarray(self._score(hidden, np.zeros((slices, 2 * SCORE_ROWS), np.int32)))
        jax.block_until_ready(self._state)

    def randomise_pool(self, seed: int) -> None:
        """Random numbers, N(0, 1), into the whole KV pool: for benchmarks, long contexts that
        nothing had to compute. Slices get the same ones."""
        fill = functools.partial(_random_pool, dtype=self.kv_dtype)
        spec = self.spec.pool_spec
        program = sharded(fill, self.mesh, (spec, PartitionSpec()), spec, donate=(0,))
        self._kv = program(self._kv, jnp.uint32(seed))

    def memory_analysis(self, shape: Shape) -> Any:
        """XLA's account of a forward program's memory (temporaries, aliased bytes)."""
        return self._programs.forward[shape].run.memory_analysis()


def _random_pool(kv: jax.Array, seed: jax.Array, *, dtype: Any) -> jax.Array:
    """A device's pool [1, L, N, ...] filled with N(0, 1), some pages at a time and in place."""
    block = (*kv.shape[:2], min(RANDOM_PAGES, kv.shape[2]), *kv.shape[3:])
    key = jax.random.key(seed)

    def fill(i: jax.Array, kv: jax.Array) -> jax.Array:
        drawn = jax.random.normal(jax.random.fold_in(key, i), block).astype(dtype)
        first = jnp.minimum(i * block[2], kv.shape[2] - block[2])
        return jax.lax.dynamic_update_slice_in_dim(kv, drawn, first, axis=2)

    return jax.lax.fori_loop(0, -(-kv.shape[2] // block[2]), fill, kv)


def check_exchange(config: ServerConfig, model: ModelConfig, layout: Layout) -> None:
    """Refuse flags about the expert exchange where nothing is exchanged.

    Raises:
        ConfigError: the model has no experts, or every device has all tokens anyway.
    """
    backend, dtype = config.moe_a2a_backend, config.moe_dispatch_dtype
    overlap = "--enable-two-batch-overlap has nothing to overlap here: "
    no_experts = f"a {model.model_type} model of this size has no experts to exchange tokens with."
    if not model.num_experts:
        if dtype != "auto":
            raise ConfigError(f"--moe-dispatch-dtype {dtype}: {no_experts}")
        if backend == "all_to_all":
            raise ConfigError(f"--moe-a2a-backend {backend}: {no_experts}")
        if config.enable_two_batch_overlap:
            raise ConfigError(overlap + no_experts)
    if config.enable_two_batch_overlap and layout.num_slices == 1 and backend != "all_to_all":
        raise ConfigError(f"{overlap}with one dp slice no tokens are exchanged.")


def longest_context(config: ServerConfig, model: ModelConfig) -> int:
    """Most tokens of one sequence, by the flags and the model.

    Raises:
        ConfigError: the model cannot serve as many as were asked for.
    """
    context = config.context_length or model.max_position_embeddings
    if context > model.max_position_embeddings:
        raise ConfigError(
            f"--context-length {context} is longer than the model's "
            f"{model.max_position_embeddings}."
        )
    if model.sliding_window is not None and context > model.sliding_window:
        raise ConfigError(
            f"Sliding-window attention is not supported; this model is exact up to its window: "
            f"--context-length {model.sliding_window} serves it, {context} does not."
        )
    return context


def resolve_dtype(name: str, platform: str) -> Any:
    """--dtype as a NumPy dtype; auto is float32 on CPU (where bfloat16 is slow) else bfloat16."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def resolve_kv_dtype(name: str, dtype: Any) -> Any:
    """--kv-cache-dtype as a NumPy dtype; auto is the model's."""
    if name == "auto":
        return dtype
    return FP8 if name == "fp8_e4m3" else jnp.dtype(name)


# ---- what a plan asks for beside its rows --------------------------------------------------


def _setups(plan: StepPlan, num_slots: int) -> list[np.ndarray]:
    """The rows of each launch of the set-up program, i32 [D, SETUP_WIDTH].

    Each launch takes one piece of one request in every slice.
    """
    by_slice = [
        [
            row
            for chunk in s.prefill
            if chunk.samples and chunk.sampling.needs_setup
            for row in pieces(chunk)
        ]
        for s in plan.slices
    ]
    if not any(by_slice):
        return []
    idle = no_piece(num_slots)
    return [np.stack(rows) for rows in itertools.zip_longest(*by_slice, fillvalue=idle)]


def _scoring(plan: StepPlan, packing: Packing) -> tuple[list[ScoredChunk], list[np.ndarray]]:
    """The chunks to score, and the rows of each launch of the scoring program, i32 [D, 2 * n]."""
    scored: list[ScoredChunk] = []
    by_slice: list[tuple[list[int], list[int]]] = []
    for s, slice_plan in enumerate(plan.slices):
        rows: list[int] = []
        targets: list[int] = []
        first = packing.first_prefill_row(slice_plan)
        for chunk in slice_plan.prefill:
            if chunk.targets is not None:
                scored.append(ScoredChunk(chunk, s, len(targets)))
                rows += range(first, first + len(chunk.targets))
                targets += chunk.targets
            first += len(chunk.tokens)
        by_slice.append((rows, targets))
    most = max(len(rows) for rows, _ in by_slice)
    requests = []
    for first in range(0, most, SCORE_ROWS):
        packed = np.zeros((len(by_slice), 2, SCORE_ROWS), np.int32)
        for s, parts in enumerate(by_slice):
            for part, values in enumerate(parts):
                values = values[first : first + SCORE_ROWS]
                packed[s, part, : len(values)] = values
        requests.append(packed.reshape(len(by_slice), -1))
    return scored, requests
