"""Strict tests: eight simulated CPU devices, no silent rank promotion, signatures checked at run time."""

import os
import sys

os.environ["JAX_PLATFORMS"] = os.environ.get("MMJAX_TEST_PLATFORM", "cpu")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # The tests compile hundreds of programs and run each for a millisecond: LLVM's optimiser would take most of the time.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

# Before anything imports mmjax: its functions then check their jaxtyping signatures with beartype on every call.
from jaxtyping import install_import_hook

if "mmjax" in sys.modules:
    raise RuntimeError("mmjax was imported before the jaxtyping hook; run the tests with plain `pytest`.")
install_import_hook("mmjax", "beartype.beartype")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def full_precision():
    """Comparisons are made at the precision the numbers claim."""
    with jax.default_matmul_precision("highest"):
        yield
