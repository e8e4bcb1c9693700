"""How many parameters the published hierarchical encoders have."""

import pytest

from mmjax.core.errors import InputError
from mmjax.core.spec import count
from mmjax.encoders import published_pyramids, pyramid, swin

# Counted in the reference implementations; rounded, they are what the papers' authors publish.
SWIN = {"tiny": 28_288_354, "small": 49_606_258, "base": 87_768_224, "large": 196_532_476}
PVT = {"tiny": 13_229_288, "small": 24_485_864, "medium": 44_208_104, "large": 61_369_320}
PVT_V2 = {
    "b0": 3_666_760,
    "b1": 14_009_000,
    "b2": 25_362_856,
    "b2_linear": 22_553_512,
    "b3": 45_238_696,
    "b4": 62_556_072,
    "b5": 81_956_008,
}


@pytest.mark.parametrize("size", SWIN)
def test_swin(size):
    make = getattr(published_pyramids, f"swin_{size}")
    assert count(swin.spec(make())) == SWIN[size]
    head = 1000 * (make().width(3) + 1)
    assert count(swin.spec(make(None))) == SWIN[size] - head


def test_pvt():
    assert {size: count(pyramid.spec(published_pyramids.pvt(size))) for size in published_pyramids.PVT_DEPTHS} == PVT


def test_pvt_v2():
    sizes = published_pyramids.PVT_V2
    assert {size: count(pyramid.spec(published_pyramids.pvt_v2(size))) for size in sizes} == PVT_V2
    with pytest.raises(InputError, match="no published PVT v2; there are b0"):
        published_pyramids.pvt_v2("b9")
