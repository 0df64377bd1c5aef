"""Rules that stretch rotary embeddings to longer contexts, as `config.json` states them.

Each rule turns the plain frequencies (angle per position of each pair) into stretched ones and
names the factor on cos and sin; `model.rope` applies them. Both spellings of the keys are read:
published checkpoints (`rope_theta`, `rope_scaling`) and transformers 5 (`rope_parameters`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.architectures import UnsupportedModelError

SUPPORTED = ("default", "linear", "llama3", "longrope", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope:
    """Every frequency divided by one factor (position interpolation, arXiv:2306.15595)."""

    factor: float
    attention_factor: float = 1.0

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        return plain / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's rule: slow pairs divided by `factor`, fast ones kept, a smooth step between.

    A pair is slow if it turns fewer than `low_freq_factor` times over the original context, fast
    if it turns more than `high_freq_factor` times.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return plain * kept + plain / self.factor * (1 - kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope:
    """One divisor for each pair (LongRoPE, arXiv:2402.13753): the list for the original context.

    The other list of such a checkpoint belongs to longer sequences and would change the keys that
    are cached already, so the context is limited to the original one where the two lists differ.
    """

    factors: tuple[float, ...]
    attention_factor: float

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        return plain / np.asarray(self.factors, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071), as DeepSeek uses it.

    Pairs that turn less than `beta_slow` times over the original context are interpolated by
    `factor`, those that turn more than `beta_fast` times are kept, those between are blended.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    stated_attention_factor: float | None = None

    @property
    def attention_factor(self) -> float:
        """The factor on cos and sin: as stated, or m(mscale) / m(mscale_all_dim)."""
        if self.stated_attention_factor is not None:
            return self.stated_attention_factor
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        low, high = self._blend_range(2 * len(plain), theta)
        ramp = np.clip((np.arange(len(plain)) - low) / (high - low), 0, 1)
        return plain / self.factor * ramp + plain * (1 - ramp)

    def _blend_range(self, dim: int, theta: float) -> tuple[float, float]:
        """First and last pair of the blend, as indices."""

        def pair_turning(turns: float) -> float:
            context = self.original_max_position_embeddings
            return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_turning(self.beta_fast)), 0)
        high = min(math.ceil(pair_turning(self.beta_slow)), dim - 1)
        return low, high if high != low else high + 0.001


RopeScaling = LinearRope | Llama3Rope | LongRope | YarnConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's m(x) = 0.1 x ln(factor) + 1 (1 for factors up to 1)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling keys of either dialect, in one dictionary (empty if there are none)."""
    return dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})


def read_rope_scaling(hf: Mapping[str, Any], rotary_dim: int) -> tuple[RopeScaling | None, int]:
    """The rule of a `config.json`, and the longest context it is exact for.

    Raises:
        UnsupportedModelError: a rule that is not supported, or one without its original context.
    """
    keys, longest = rope_parameters(hf), int(hf["max_position_embeddings"])
    kind = keys.get("rope_type") or keys.get("type") or "default"
    if kind not in SUPPORTED:
        raise UnsupportedModelError(
            f"Rope scaling of type {kind} is not supported; supported are {', '.join(SUPPORTED)}."
        )
    if kind == "default":
        return None, longest
    if kind == "linear":
        return LinearRope(factor=float(keys["factor"])), longest
    original = keys.get("original_max_position_embeddings")
    if original is None:
        raise UnsupportedModelError(f"Rope scaling {kind} needs original_max_position_embeddings.")
    if kind == "llama3":
        return Llama3Rope(
            factor=float(keys["factor"]),
            low_freq_factor=float(keys["low_freq_factor"]),
            high_freq_factor=float(keys["high_freq_factor"]),
            original_max_position_embeddings=int(original),
        ), longest
    if kind == "longrope":
        return _read_longrope(keys, int(original), longest, rotary_dim)
    if keys.get("truncate") is False:
        raise UnsupportedModelError("YaRN with truncate false is not supported.")
    factor, stated = float(keys["factor"]), keys.get("attention_factor")
    both_mscales = bool(keys.get("mscale") and keys.get("mscale_all_dim"))
    if stated is None and not both_mscales:
        # transformers takes the two only together; m(factor) otherwise.
        stated = yarn_mscale(factor, 1.0)
    return YarnConfig(
        factor=factor,
        original_max_position_embeddings=int(original),
        beta_fast=float(keys.get("beta_fast") or 32),
        beta_slow=float(keys.get("beta_slow") or 1),
        mscale=float(keys["mscale"]) if both_mscales else 1.0,
        mscale_all_dim=float(keys.get("mscale_all_dim") or 0.0),
        stated_attention_factor=None if stated is None else float(stated),
    ), longest


def _read_longrope(
    keys: Mapping[str, Any], original: int, longest: int, rotary_dim: int
) -> tuple[LongRope, int]:
    short, long = (tuple(map(float, keys[name])) for name in ("short_factor", "long_factor"))
    if {len(short), len(long)} != {rotary_dim // 2}:
        raise UnsupportedModelError(
            f"longrope needs {rotary_dim // 2} short_factor and long_factor entries, one for each "
            f"pair, but config.json has {len(short)} and {len(long)}."
        )
    stated, factor = keys.get("attention_factor"), keys.get("factor") or longest / original
    if stated is None:
        stated = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    rule = LongRope(factors=short, attention_factor=float(stated))
    return rule, longest if short == long else min(longest, original)
