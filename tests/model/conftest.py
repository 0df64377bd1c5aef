"""What tests of kernels share."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from model.ops import hopper_products
from model.ops.grouped_mlp import grouped_mlp, hopper, hopper_fp8
from model.ops.kernels import XLA
from tests.harness import HOPPER, PROCESSORS


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().generate_state(1)[0]
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def both():
    """The experts' kernels for Hopper and their twin, compiled once: interpreting is little beside
    it."""

    def outputs(*args):
        with pytest.MonkeyPatch.context() as patch:
            for kernels in (hopper, hopper_fp8):
                kernels.grouped_mlp.clear_cache()  # traced with other constants
            patch.setattr(hopper_products, "PROCESSORS", PROCESSORS)
            patch.setattr(hopper, "LEAST_LOAD", 0)
            return grouped_mlp(*args, kernels=HOPPER), grouped_mlp(*args, kernels=XLA)

    return jax.jit(outputs)
