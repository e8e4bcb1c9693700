"""Strict tests: eight simulated CPU devices, no silent rank promotion, signatures checked at run time."""

import atexit
import os
import shutil
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = os.environ.get("MMJAX_TEST_PLATFORM", "cpu")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # The tests compile hundreds of programs and run each for a millisecond: optimising them would take the most time.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

# Collectives of simulated devices block a thread each; with as few threads as cores they wait for each other for ever.
os.environ.setdefault("NPROC", "32")

# Before anything imports mmjax: its functions then check their jaxtyping signatures with beartype on every call.
from jaxtyping import install_import_hook

if "mmjax" in sys.modules:
    raise RuntimeError("mmjax was imported before the jaxtyping hook; run the tests with plain `pytest`.")
install_import_hook("mmjax", "beartype.beartype")

import jax
import numpy as np
import pytest

# Many tests run the same tiny programs: compile each once a session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="mmjax-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # for the processes that tests start
    jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def full_precision():
    """Comparisons are made at the precision the numbers claim."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs go with the file that needed them.

    Each takes a few memory maps of the process, of which Linux allows 65,530: all tests together would need more, and
    XLA then crashes.
    """
    yield
    jax.clear_caches()
