"""Which implementation every operation gets on this device: flags and sizes into a `Kernels`.

Decided once, before anything is compiled, and logged. What was asked for by name and cannot run is
refused; `auto` takes kernels where they can run, and the log says why where they cannot.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from model.config import ModelConfig
from model.ops.grouped_mlp import pallas as grouped_mlp_kernels
from model.ops.kernels import Implementation, Kernels
from model.ops.mla_attention import extend as extend_kernels
from model.ops.routing import unsupported as route_unsupported
from serving.config import ConfigError, ServerConfig
from sharding.layout import Layout
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
    fp8: Collection[str] = (),
) -> Kernels:
    """The implementations of a model's programs on a platform.

    Args:
        fp8: paths of the parameters that stay in FP8 on the devices.

    Raises:
        ConfigError: a back end asked for by name cannot run this model here.
    """
    here = None if platform in ("cuda", "gpu") else f"they need an NVIDIA GPU, this is {platform}"
    attention = _chosen(
        "--attention-backend", config.attention_backend, here or _no_attention(model)
    )
    experts: Implementation = "xla"
    if model.num_experts:
        experts = _chosen(
            "--moe-runner-backend",
            config.moe_runner_backend,
            here or _no_experts(model, layout, fp8_experts=any(".experts." in p for p in fp8)),
        )
    extend: Implementation = attention
    if attention == "pallas" and config.enable_deterministic_inference:
        extend = "xla"
        log.info(
            "extend attention: xla, because the kernel's bits depend on what is cached, which "
            "--enable-deterministic-inference excludes"
        )
    routing: Implementation = experts
    if experts == "pallas" and (reason := route_unsupported(model.hidden_size, model.num_groups)):
        routing = "xla"
        log.info("routing: xla, no kernel for it: %s", reason)
    kernels = Kernels(
        decode_attention=attention,
        extend_attention=extend,
        mla_inputs=attention,
        grouped_mlp=experts,
        routing=routing,
        norm=attention,
        dense=attention,
        unroll=config.layer_unroll or (LAYER_UNROLL if attention == "pallas" else 1),
    )
    if kernels.dense == "pallas" and any(".experts." not in path for path in fp8):
        log.info("dense products with weights that stay in FP8: xla, the kernel takes none")
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


def _no_attention(model: ModelConfig) -> str | None:
    if not model.is_mla:
        return "only multi-head latent attention (MLA) has them"
    return extend_kernels.unsupported(
        model.kv_lora_rank, model.rotary_dim, model.qk_nope_head_dim, model.v_head_dim
    )


def _no_experts(model: ModelConfig, layout: Layout, *, fp8_experts: bool) -> str | None:
    if fp8_experts:
        return "the experts' weights stay in FP8 (--fp8-weights dequantize makes them bfloat16)"
    inner = padded_sizes(model, layout).expert_intermediate // layout.size(layout.moe_tp)
    return grouped_mlp_kernels.unsupported(model.hidden_size, inner)
