"""Which implementation every operation gets on this device: flags and sizes into a `Kernels`.

Decided once, before anything is compiled, and logged. What was asked for by name and cannot run is
refused; `auto` takes kernels where they can run, and the log says why where they cannot.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from jax.typing import DTypeLike

from model.config import ModelConfig
from model.ops import hopper_products
from model.ops.dense import hopper_fp8 as hopper_dense
from model.ops.grouped_mlp import hopper as hopper_experts
from model.ops.grouped_mlp import hopper_fp8
from model.ops.grouped_mlp import pallas as grouped_mlp_kernels
from model.ops.kernels import HopperImplementation, Implementation, Kernels
from model.ops.matrices import out_of_reach
from model.ops.matrices import unsupported as fp8_unsupported
from model.ops.mla_attention import hopper as hopper_attention
from model.ops.mla_attention import hopper_decode
from model.ops.mla_attention import triton as triton_attention
from model.ops.routing import unsupported as route_unsupported
from model.quantization import AS_THEY_ARE, BlockFP8
from serving.config import ConfigError, ServerConfig
from sharding.layout import Layout
from sharding.mesh import is_gpu
from sharding.rules import padded_sizes

log = logging.getLogger("meshserve.engine")

LAYER_UNROLL = 2
"""Layers of straight code where kernels take them out of their stacks: every turn of the loop
begins a CUDA graph, and nothing of one layer runs beside the next across its border."""


def choose_kernels(
    config: ServerConfig,
    model: ModelConfig,
    layout: Layout,
    *,
    platform: str,
    capability: str | None,
    dtype: DTypeLike,
    kv_dtype: DTypeLike | None = None,
    fp8: Mapping[str, BlockFP8] | None = None,
) -> Kernels:
    """The implementations of a model's programs on a platform.

    Args:
        capability: the devices' compute capability, if they are NVIDIA GPUs.
        dtype: of activations.
        kv_dtype: of the KV pool, if not the same.
        fp8: the parameters that stay in FP8 on the devices, see `ModelSpec.fp8_weights`.

    Raises:
        ConfigError: a back end asked for by name cannot run this model here.
    """
    fp8 = fp8 or {}
    refused = {
        path: why for path, w in fp8.items() if (why := fp8_unsupported(w.data.shape, w.block))
    }
    here = None if is_gpu(platform) else f"they need an NVIDIA GPU, this is {platform}"
    attention = _chosen(
        "--attention-backend", config.attention_backend, here or _no_attention(model)
    )
    routing: Implementation = "xla"
    if model.num_experts:
        routing = _chosen(
            "--moe-runner-backend",
            config.moe_runner_backend,
            here or _no_experts(model, layout, refused),
        )
    experts: HopperImplementation = routing
    if experts == "pallas" and config.moe_runner_backend == "auto":
        experts = _experts_kernel(model, layout, capability, dtype, fp8)
    decode: HopperImplementation = attention
    extend: HopperImplementation = attention
    if attention == "pallas" and config.enable_deterministic_inference:
        extend = "xla"
        log.info(
            "extend attention: xla, because the kernel's bits depend on what is cached, and none "
            "of those for Hopper GPUs in decode attention, whose bits depend on who decodes "
            "beside: --enable-deterministic-inference excludes both"
        )
    elif attention == "pallas" and config.attention_backend == "auto":
        decode = _decode_kernel(config, model, layout, capability, dtype, kv_dtype)
        extend = _extend_kernel(model, capability, dtype)
    dense: HopperImplementation = attention
    if attention == "pallas" and config.attention_backend == "auto" and fp8:
        reason = hopper_products.unsupported(capability, dtype)
        dense = _hopper_unless(reason, "FP8 products of few rows: pallas, Hopper GPUs' kernel is")
    if routing == "pallas" and (reason := route_unsupported(model.hidden_size)):
        routing = "xla"
        log.info("routing: xla, no kernel for it: %s", reason)
    kernels = Kernels(
        decode_attention=decode,
        extend_attention=extend,
        mla_inputs=attention,
        grouped_mlp=experts,
        routing=routing,
        norm=attention,
        dense=dense,
        unroll=config.layer_unroll or (LAYER_UNROLL if attention == "pallas" else 1),
    )
    if kernels.dense != "xla":
        _log_fp8(fp8, refused, experts, dense)
    log.info(
        "decode attention: %s, extend attention: %s, experts: %s, routing: %s, dense products of "
        "few rows: %s",
        *(kernels.decode_attention, kernels.extend_attention),
        *((experts, routing) if model.num_experts else ("none", "none")),
        kernels.dense,
    )
    return kernels


def _chosen(flag: str, asked: str, reason: str | None) -> Implementation:
    """What a flag means where kernels cannot run for `reason`, or can (None)."""
    if asked == "xla" or reason is None:
        return "xla" if asked == "xla" else "pallas"
    if asked == "pallas":
        raise ConfigError(f"{flag} pallas: no kernels for this model here: {reason}; use xla.")
    log.info("%s auto: xla, no kernels for this model here: %s", flag, reason)
    return "xla"


def _hopper_unless(reason: str | None, otherwise: str) -> HopperImplementation:
    """Hopper's kernels, or those for all GPUs if there is a reason, which is logged."""
    if reason is None:
        return "hopper"
    log.info("%s not for this: %s", otherwise, reason)
    return "pallas"


def _decode_kernel(
    config: ServerConfig,
    model: ModelConfig,
    layout: Layout,
    capability: str | None,
    dtype: DTypeLike,
    kv_dtype: DTypeLike | None,
) -> HopperImplementation:
    types = dtype, dtype if kv_dtype is None else kv_dtype
    heads = padded_sizes(model, layout).heads // layout.size(layout.attn_tp)
    sizes = model.kv_lora_rank, model.rotary_dim, heads, config.page_size
    reason = hopper_decode.unsupported(capability, *types, *sizes)
    return _hopper_unless(reason, "decode attention: pallas, the kernel for Hopper GPUs is")


def _extend_kernel(
    model: ModelConfig, capability: str | None, dtype: DTypeLike
) -> HopperImplementation:
    sizes = model.kv_lora_rank, model.rotary_dim, model.qk_nope_head_dim, model.v_head_dim
    reason = hopper_attention.unsupported(capability, dtype, *sizes)
    return _hopper_unless(reason, "extend attention: pallas, the kernel for Hopper GPUs is")


def _no_attention(model: ModelConfig) -> str | None:
    if not model.is_mla:
        return "only multi-head latent attention (MLA) has them"
    return triton_attention.unsupported(
        model.kv_lora_rank, model.rotary_dim, model.qk_nope_head_dim, model.v_head_dim
    )


def _no_experts(model: ModelConfig, layout: Layout, refused: Mapping[str, str]) -> str | None:
    for path, reason in refused.items():
        if ".experts." in path:
            return f"{reason} (--fp8-weights dequantize makes them bfloat16)"
    return grouped_mlp_kernels.unsupported(model.hidden_size, _inner(model, layout))


def _inner(model: ModelConfig, layout: Layout) -> int:
    """Width of an expert on a device."""
    return padded_sizes(model, layout).expert_intermediate // layout.size(layout.moe_tp)


def _experts_kernel(
    model: ModelConfig,
    layout: Layout,
    capability: str | None,
    dtype: DTypeLike,
    fp8: Mapping[str, BlockFP8],
) -> HopperImplementation:
    sizes = model.hidden_size, _inner(model, layout)
    blocks = {path: weight.block for path, weight in fp8.items() if ".experts." in path}
    reason = hopper_experts.unsupported(capability, dtype, *sizes)
    for experts in sorted({path.rpartition(".")[0] for path in blocks}):
        w1, w2 = (blocks.get(f"{experts}.{name}") for name in ("w1", "w2"))
        if w1 is None or w2 is None:
            reason = reason or f"of {experts} only {'w2' if w1 is None else 'w1'} is FP8"
        else:
            reason = reason or hopper_fp8.unsupported(capability, dtype, *sizes, (w1, w2))
    return _hopper_unless(reason, "experts: pallas, those for Hopper GPUs are")


def _log_fp8(
    fp8: Mapping[str, BlockFP8],
    refused: Mapping[str, str],
    experts: HopperImplementation,
    dense: HopperImplementation,
) -> None:
    """Which FP8 parameters cost more than reading them."""
    for path, weight in fp8.items():
        of_experts = ".experts." in path
        if path in refused:
            if not of_experts:
                log.info("products with %s: xla, no kernel for it: %s", path, refused[path])
            continue
        on_hopper = (experts if of_experts else dense) == "hopper"
        if not of_experts and on_hopper:
            # What is stored as it is multiplied is too small for that kernel.
            on_hopper = weight.contracted != AS_THEY_ARE
            if on_hopper and (reason := hopper_dense.unsupported(weight, weight.contracted[0])):
                on_hopper = False
                log.info(
                    "products with %s: pallas, Hopper GPUs' kernel is not for it: %s", path, reason
                )
        if not on_hopper and out_of_reach(weight.data.size):
            log.info(
                "%s: kernels reach no FP8 weights of %.1f GiB a device (from 2 to 4 GiB), so each "
                "layer is copied before it is read",
                *(path, weight.data.size / 2**30),
            )
