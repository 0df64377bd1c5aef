"""What a launch will be, from sizes alone: weights, KV tokens, the largest batch, and whether DP
attention pays for this model. Nothing here touches a device.

Weights and pages are exact; what programs need for temporaries is known once they are compiled, and
guessed here.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig
from serving.config import ServerConfig
from serving.engine.buckets import Buckets, make_buckets
from serving.engine.memory import (
    CPU_POOL_BYTES,
    pages_for,
    pages_in,
    pool_bytes,
    step_bytes,
    tokens_in,
)
from serving.engine.runner import check_exchange, longest_context, resolve_dtype, resolve_kv_dtype
from sharding.layout import Layout, make_layout
from sharding.sources import WeightSource
from sharding.step import ModelSpec, page_bytes

GIB = 1 << 30
PAYS = 1.1
"""DP attention is said to pay from this factor of KV tokens on."""


def working_bytes(config: ModelConfig, layout: Layout, buckets: Buckets, itemsize: int) -> int:
    """A guess of what steps need beside weights and pool.

    What lives between programs is exact. The largest program's temporaries are guessed as if all
    of these lived at once: a layer's activations at the widest places, the rows that other slices
    send for the experts, and a copy of the sampler's logits.
    """
    rows = buckets.slots + buckets.prefill_tokens
    attn_tp = layout.size(layout.attn_tp)
    heads = -(-config.num_heads // attn_tp)
    head_widths = 3 * config.qk_head_dim if config.is_mla else 3 * config.head_dim
    dense = 2 * -(-config.intermediate_size // attn_tp)
    per_row = 4 * config.hidden_size + heads * head_widths + dense
    total = rows * per_row * itemsize
    if config.num_experts:
        everywhere = rows * layout.num_slices
        # Kernels have room for all pairs of tokens and experts, wherever the experts are.
        routed = everywhere * config.num_experts_per_token
        width = -(-config.moe_intermediate_size // layout.size(layout.moe_tp))
        total += itemsize * (3 * everywhere * config.hidden_size)
        total += itemsize * routed * (width + config.hidden_size)
    total += 4 * buckets.sampled_rows[0] * config.vocab_size
    width, vocab = config.hidden_size, config.vocab_size
    return total + step_bytes(buckets, vocab=vocab, width=width, itemsize=itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one launch will be. Bytes are of each device.

    Attributes:
        memory: what a device may use (its memory times --mem-fraction-static); None where unknown.
        working: guessed bytes of programs.
        pages: of each slice's pool, the sink among them; None where the memory is unknown, 0 where
            nothing is left for it.
        slots: most running requests of a slice; context: most tokens of one.
        kv_factor: KV tokens of all slices together, in the same pool bytes, over those of the same
            devices without DP attention.
        more_weights: bytes of weights that DP attention costs.
        best_factor: the `kv_factor` of as many slices as devices.
    """

    config: ModelConfig
    layout: Layout
    exchange: str
    dtype: str
    weights: int
    memory: int | None
    working: int
    page_bytes: int
    page_size: int
    pages: int | None
    slots: int
    context: int
    kv_factor: float
    more_weights: int
    best_factor: float

    @property
    def kv_tokens(self) -> int | None:
        """KV tokens of each slice."""
        return None if self.pages is None else tokens_in(self.pages, self.page_size)

    @property
    def net_factor(self) -> float | None:
        """`kv_factor`, but the weights that DP attention costs would be KV pool without it; None
        where the pool is not what memory leaves."""
        if self.memory is None or self.pages is None:
            return None
        pool = self.pages * self.page_bytes
        return self.kv_factor * pool / (pool + self.more_weights)

    @property
    def fits(self) -> bool:
        """Whether a pool is left at all, or the one asked for is not larger than what weights
        leave (True where memory is unknown)."""
        if self.pages is None:
            return True
        pool = self.pages * self.page_bytes
        return self.pages >= 2 and (self.memory is None or self.weights + pool <= self.memory)


def estimate(
    config: ServerConfig,
    source: WeightSource,
    layout: Layout,
    *,
    platform: str,
    memory: int | None,
) -> Estimate:
    """The estimate of a launch.

    Args:
        platform: "cpu" or an accelerator's, which decides dtypes and buckets.
        memory: bytes that an accelerator's device may use, see `Estimate`.

    Raises:
        ConfigError: flags that no engine could start with.
    """
    model = source.config
    check_exchange(config, model, layout)
    dtype = resolve_dtype(config.dtype, platform)
    kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, dtype)
    spec = ModelSpec(model, dtype, layout, source.fp8)
    page = spec.page_bytes(config.page_size, kv_dtype)
    context = longest_context(config, model)
    buckets = make_buckets(
        config, platform=platform, num_slices=layout.num_slices, max_context=context
    )
    working = working_bytes(model, layout, buckets, dtype.itemsize)
    pages: int | None
    if config.max_total_tokens is not None:
        pages = pages_for(config.max_total_tokens, config.page_size, page)
    elif platform == "cpu":
        pages = pages_in(CPU_POOL_BYTES, page)
    elif memory is not None:
        free = pool_bytes(memory, weights=spec.device_bytes(), working=working)
        pages = pages_in(free, page)
    else:
        pages = None

    def without(slices: int) -> Layout:
        """The same devices with another number of slices."""
        size = layout.num_devices
        return make_layout(size, slices, size if slices > 1 else layout.size(layout.moe_ep))

    def factor(cut: Layout) -> float:
        plain, one = (page_bytes(model, c, config.page_size, kv_dtype) for c in (without(1), cut))
        return cut.num_slices * plain / one

    more_weights = 0
    if layout.num_slices > 1:
        plain = ModelSpec(model, dtype, without(1), source.fp8)
        more_weights = spec.device_bytes() - plain.device_bytes()
    return Estimate(
        config=model,
        layout=layout,
        exchange=config.moe_a2a_backend,
        dtype=f"FP8, the rest {dtype}" if source.fp8 else str(dtype),
        weights=spec.device_bytes(),
        memory=memory,
        working=working,
        page_bytes=page,
        page_size=config.page_size,
        pages=pages,
        slots=buckets.slots,
        context=context,
        kv_factor=factor(layout),
        more_weights=more_weights,
        best_factor=factor(without(layout.num_devices)),
    )


# ---- in words ------------------------------------------------------------------------------------


def describe(e: Estimate, name: str) -> list[str]:
    """The estimate as lines for a person."""
    layout, model = e.layout, e.config
    kind = "MLA" if model.is_mla else f"GQA with {model.num_kv_heads} KV heads"
    experts = f", {model.num_experts} experts" if model.num_experts else ""
    lines = [
        f"{name}: {model.model_type}, {kind}, {model.num_layers} layers{experts}, on "
        f"{layout.num_devices} devices",
        f"  layout        {layout}",
    ]
    if model.num_experts:
        held = -(-model.num_experts // layout.size(layout.moe_ep))
        lines.append(f"  experts       {held} on each device, --moe-a2a-backend {e.exchange}")
    lines.append(f"  weights       {size(e.weights)} a device ({e.dtype})")
    return [*lines, *_describe_kv(e), f"  DP attention  {worth(e)}"]


def _describe_kv(e: Estimate) -> list[str]:
    """Lines on KV tokens and the batch, or on why there are none."""
    token = e.page_bytes / e.page_size
    if e.kv_tokens is None or e.pages is None:
        return [
            f"  KV cache      {token:,.0f} bytes a token and device; how many tokens depends on "
            "the device's memory (--device-memory-gib)"
        ]
    if not e.fits:
        have = "" if e.memory is None else f" of {size(e.memory)} that it may use"
        beside, need = "programs", e.working
        if e.kv_tokens:
            beside, need = f"a pool of {e.kv_tokens:,} tokens", e.pages * e.page_bytes
        return [
            f"  KV cache      does not fit: weights and {beside} take about "
            f"{size(e.weights + need)} a device{have}"
        ]
    slices, tokens = e.layout.num_slices, e.kv_tokens
    each = min(e.context, tokens)
    lines = [
        f"  KV cache      {tokens:,} tokens in each of {slices} slices, {tokens * slices:,} in all "
        f"({size(e.pages * e.page_bytes)} a device, {token:,.0f} bytes a token)",
        f"  largest batch {e.slots} requests a slice, {e.slots * slices:,} in all: "
        f"{min(each, tokens // e.slots):,} tokens each; {tokens // each} a slice at the longest "
        f"context of {each:,}",
    ]
    if e.memory is not None:
        lines.append(
            f"  programs      about {size(e.working)} a device, a guess: known once they "
            "are compiled"
        )
    return lines


def worth(e: Estimate) -> str:
    """Whether DP attention pays for this model on so many devices, in a sentence."""
    devices, slices, model = e.layout.num_devices, e.layout.num_slices, e.config
    if devices == 1:
        return "needs more than one device"
    why = (
        "MLA caches one latent, which tensor parallelism copies to every device"
        if model.is_mla
        else f"tensor parallelism cuts {model.num_kv_heads} KV heads over the devices"
    )
    if slices == 1:
        if e.best_factor >= PAYS:
            return (
                f"is off; --dp-size {devices} would hold {e.best_factor:.2f} times the KV tokens "
                f"in the same bytes ({why})"
            )
        return f"is off and would save no KV memory ({why})"
    cost = f"{size(e.more_weights)} more of weights a device"
    if e.kv_factor < PAYS:
        return f"saves no KV memory here ({why}) and costs {cost}"
    net = e.net_factor
    gain = f"{e.kv_factor:.2f} times the KV tokens of --tp {devices} without it in the same bytes"
    if net is None:
        return f"pays: {gain}, for {cost} ({why})"
    verdict = "pays" if net >= PAYS else "does not pay here"
    return f"{verdict}: {gain}, {net:.2f} times after {cost} ({why})"


def size(count: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"
