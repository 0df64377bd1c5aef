"""From the model's logical axis names to mesh axes: the one table of how weights are cut."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import PartitionSpec

from model.config import ModelConfig
from model.transformer import Sizes
from sharding.layout import Axes, Layout


def role_of(axis: str | None, layout: Layout) -> Axes:
    """The mesh axes that cut a logical axis; () for none.

    Heads, vocabulary and dense width are cut inside a dp slice (attn_tp), experts over moe_ep and
    an expert's width over moe_tp. Nothing but experts is cut over dp slices, so only the expert
    exchange couples them.
    """
    match axis:
        case None:
            return ()
        case "heads" | "kv_heads" | "vocab" | "mlp":
            return layout.attn_tp
        case "experts":
            return layout.moe_ep
        case "expert_mlp":
            return layout.moe_tp
    raise ValueError(f"unknown logical axis {axis!r}")


def param_spec(axes: Sequence[str | None], layout: Layout) -> PartitionSpec:
    """The PartitionSpec of a parameter with these logical axes."""
    return PartitionSpec(*(role_of(axis, layout) or None for axis in axes))


def padded_sizes(config: ModelConfig, layout: Layout) -> Sizes:
    """The model's cut dimensions, rounded up to whole shares of this layout."""
    return Sizes.of(
        config,
        attn_tp=layout.size(layout.attn_tp),
        moe_ep=layout.size(layout.moe_ep),
        moe_tp=layout.size(layout.moe_tp),
    )
