"""Every encoder and connector against its published implementation: each intermediate, and gradients."""

import pytest

pytest.importorskip("torch", reason="needs the `parity` extra")
pytest.importorskip("transformers")

from parity import modules
from parity.harness import SYSTEMS, Compare

MISSING = modules.load()


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_system(name):
    compare = Compare(name)
    SYSTEMS[name](compare)
    compare.check()


@pytest.mark.parametrize("family", sorted(MISSING))
def test_family(family):
    pytest.skip(MISSING[family])
