"""Strict tests: eight simulated CPU devices, no silent rank promotion, signatures checked at run time."""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import quick

os.environ["JAX_PLATFORMS"] = os.environ.get("MMJAX_TEST_PLATFORM", "cpu")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick.flags(8)}"

# Collectives of simulated devices block a thread each; with as few threads as cores they wait for each other for ever.
os.environ.setdefault("NPROC", "32")

# Before anything imports mmjax: its functions then check their signatures with beartype on every call.
from jaxtyping import install_import_hook

if "mmjax" in sys.modules:
    raise RuntimeError("mmjax was imported before the jaxtyping hook; run the tests with plain `pytest`.")


def checked() -> list[str]:
    """Modules whose signatures are checked: all, or (MMJAX_TEST_TYPES=arrays) those that say shapes of arrays.

    On the host a check takes longer than what most functions do: of all modules, a run's data take six times as long.
    """
    if os.environ.get("MMJAX_TEST_TYPES", "all") == "all":
        return ["mmjax"]
    root = Path(importlib.util.find_spec("mmjax").origin).parent
    files = (path for path in root.rglob("*.py") if "from jaxtyping import" in path.read_text(encoding="utf-8"))
    names = (".".join(path.relative_to(root.parent).with_suffix("").parts) for path in files)
    return [name.removesuffix(".__init__") for name in names]


install_import_hook(checked(), "beartype.beartype")

import jax
import numpy as np
import pytest

# Many tests run the same tiny programs: compile each once a session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="mmjax-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # for the processes that tests start
    jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
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
