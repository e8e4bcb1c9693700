"""Times from counts that are known."""

import pytest

from mmjax.core.hlo import Collective, Count, Work
from mmjax.plan import chips, roofline

POD = chips.topology("v5e:16x16")
PLACES = [(i, j) for i in range(16) for j in range(16)]
ROW = tuple(range(16))  # devices of one row of the torus


def test_a_step_of_known_work():
    """Ten turns of a product (2 ms) and a read (1 ms) beside a gather (4 ms), then a sum that nothing runs beside."""
    chip = POD.chip
    product, read = Work("a", "jvp(decoder)", 2e-3 * chip.flops), Work("b", "loss", 0.0, 1e-3 * chip.bandwidth)
    sent = 2 * chip.link  # bytes in a second, over both links of a row
    gather = Work("c", "", collective=Collective("all-gather", ROW, 4e-3 * sent, True))
    total = Work("d", "", collective=Collective("all-reduce", ROW, 5e-3 * sent, False))
    loop = Work("e", "", loop=Count([product, read, gather]), turns=10.0)
    found = roofline.estimate(Count([loop, total]), POD, PLACES)
    assert found.products == pytest.approx(20e-3)
    assert found.memory == pytest.approx(10e-3)
    assert found.operations == pytest.approx(30e-3)
    assert (found.beside, found.alone) == pytest.approx((40e-3, 5e-3))
    assert found.step == pytest.approx(45e-3)  # of each turn the longer, then the sum
    assert found.serial == pytest.approx(75e-3)
    assert found.parts == pytest.approx({"decoder": 20e-3, "loss": 10e-3})


def test_the_compilers_cycles_where_it_makes_an_estimate():
    kernel, fused = (
        Work("a", "", 2e-3 * POD.chip.flops),
        Work("b", "", 1e-3 * POD.chip.flops, 0.0, 7e-3 * POD.chip.clock),
    )
    assert roofline.estimate(Count([kernel, fused]), POD, PLACES).cycles == pytest.approx(9e-3)
    gpu = chips.topology("h100:8")
    assert roofline.estimate(Count([kernel]), gpu, [(i,) for i in range(8)]).cycles == 0


def test_links_carry_one_thing_at_a_time():
    """A loop that waits a second for its gather leaves the links no time for another beside it."""
    gather = Work("a", "", collective=Collective("all-gather", ROW, 2 * POD.chip.link, True))
    loop = Work("b", "", loop=Count([gather]), turns=1.0)
    found = roofline.estimate(Count([loop, gather]), POD, PLACES)
    assert (found.beside, found.step, found.cycles) == pytest.approx((2.0, 2.0, 2.0))
