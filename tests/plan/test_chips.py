"""Topologies, their networks, and how the compiler's refusals are read."""

import dataclasses

import pytest

from mmjax.core.errors import InputError
from mmjax.plan import chips, program
from mmjax.plan.chips import GIB
from mmjax.plan.program import TooLarge


def test_a_torus_has_two_links_along_an_axis_that_closes_and_one_else():
    pod, slice_ = chips.topology("v5e:16x16"), chips.topology("v5e:4x16")
    link = pod.chip.link
    row, column = [(i, 3) for i in range(16)], [(3, i) for i in range(16)]
    some, every = ([(i, j) for i in range(n) for j in range(16)] for n in (2, 16))
    assert [pod.bandwidth(c) for c in (row, column, some, every)] == [2 * link, 2 * link, 3 * link, 4 * link]
    assert [slice_.bandwidth(c) for c in (row[:4], column, some)] == [link, 2 * link, 3 * link]


@pytest.mark.parametrize(("text", "rings"), [("v5p:4x4x4", 2), ("v4:4x4x8", 2), ("v5p:2x4x4", 1), ("v4:4x4x6", 1)])
def test_a_torus_of_three_axes_closes_in_whole_cubes(text, rings):
    of = chips.topology(text)
    assert of.bandwidth([(0, i, 0) for i in range(4)]) == rings * of.chip.link


def test_gpus_talk_by_nvlink_within_a_node_and_by_network_beyond(monkeypatch):
    two = chips.topology("h100:16")
    assert two.bandwidth([(i,) for i in range(8)]) == two.chip.link
    assert two.bandwidth([(7,), (8,)]) == two.chip.network
    # Whole nodes leave by all of their adapters, as far as NVLink brings data there.
    assert chips.topology("h100:64").bandwidth([(i,) for i in range(64)]) == 8 * two.chip.network == 4e11
    assert two.bandwidth([(i,) for i in range(0, 16, 4)]) == 2 * two.chip.network
    fast = dataclasses.replace(chips.CHIPS["a100"], network=1e11)
    monkeypatch.setitem(chips.CHIPS, "a100", fast)
    assert chips.topology("a100:16").bandwidth([(i,) for i in range(16)]) == fast.link


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e", "'v5e' is no topology"),
        ("v5p:4x4", "the torus of TPU v5p has 3 axes, as in v5p:4x4x4"),
        ("h100:2x4", "GPUs are counted, as in h100:8"),
        ("h100:12", "GPUs come in nodes of 8"),
        ("h10:8", "did you mean 'h100'"),
        ("v5e:0x4", "is no topology"),
    ],
)
def test_a_topology_that_is_none(text, message):
    with pytest.raises(InputError, match=message):
        chips.topology(text)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", (20.5, 15.75)),
        ("the total memory required for HLO temporaries (367.63G) exceeds available HBM (15.75G).", (367.63, 15.75)),
        ("Ran out of memory in memory space hbm. Used 512.00M of 256.00M hbm.", (0.5, 0.25)),
        ("RESOURCE_EXHAUSTED: out of something", (0.0, 0.0)),
    ],
)
def test_what_the_compiler_says_when_memory_runs_out(message, found):
    assert program.too_large(message) == TooLarge(*(n * GIB for n in found))
