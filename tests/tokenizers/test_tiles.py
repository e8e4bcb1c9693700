"""Policies of several views: known choices, and what holds for every published policy and size.

Equal to transformers to the pixel in tests/parity/test_images.py.
"""

import dataclasses
import math
import random

import pytest

from mmjax.core.errors import InputError
from mmjax.tokenizers.canvas import Canvas
from mmjax.tokenizers.published import PUBLISHED
from mmjax.tokenizers.resolution import Fixed, NaFlex, Native, Pixtral
from mmjax.tokenizers.slices import UHD, Bounded, Slices
from mmjax.tokenizers.tiles import AnyRes, PanAndScan, Splits, Tiles
from mmjax.tokenizers.view import Resize, Window


def pictures(count, seed=0):
    dice = random.Random(seed)
    for _ in range(count):
        height = math.exp(dice.uniform(math.log(10), math.log(4000)))
        yield int(height), max(1, int(height * math.exp(dice.gauss(0, 0.7))))


def grids(policy, height, width):
    return policy.picture(height, width).views if hasattr(policy, "picture") else (policy.grid(height, width),)


@pytest.mark.parametrize("name", PUBLISHED)
def test_pixels_agree_with_grids_and_slots(name):
    """Each view's pixels are its grid of patches; every slot is a token there is, at most once."""
    policy = PUBLISHED[name].policy
    for height, width in pictures(150):
        views, found = policy.views(height, width), grids(policy, height, width)
        assert [(v[-1].height, v[-1].width) for v in views] == [(r * policy.patch, c * policy.patch) for r, c in found]
        assert policy.grid(height, width) == found[0]
        for view in views:
            size = height, width
            for step in view:
                if (
                    isinstance(step, Window)
                    and step.fill == (0, 0, 0)
                    and not isinstance(policy, AnyRes | Canvas | Slices)
                ):
                    assert 0 <= step.top <= step.top + step.height <= size[0]
                    assert 0 <= step.left <= step.left + step.width <= size[1]
                size = step.height, step.width
        if hasattr(policy, "picture") and (picture := policy.picture(height, width)).slots is not None:
            shown = [slot for slot in picture.slots if slot >= 0]
            tokens = sum(rows * columns for rows, columns in found) // picture.merge**2
            assert len(set(shown)) == len(shown)
            assert 0 <= min(shown) <= max(shown) < tokens


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_picture_of_nothing_is_refused(name):
    policy = PUBLISHED[name].policy
    for size in ((0, 5), (5, 0)):
        with pytest.raises(InputError, match="has no pixels"):
            policy.views(*size)
        with pytest.raises(InputError, match="has no pixels"):
            policy.grid(*size)


@pytest.mark.parametrize(
    "policy",
    [
        *(Native(14, 2), NaFlex(16, 256), Pixtral(16, 1024), AnyRes(14, 336), Tiles(14, 448), Splits(14, 364)),
        *(Slices(14, 336, 1344), UHD(14, 336, 6), PanAndScan(14, 448)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_lowered_policies_take_less(policy):
    """Of a picture that takes the most: never more with a smaller share, and much less with a small one."""
    taken = []
    for share in (1.0, 0.8, 0.5, 0.3, 0.1):
        found = grids(policy.lowered(share), 4000, 3000)
        taken.append(sum(rows * columns for rows, columns in found))
    assert taken == sorted(taken, reverse=True)
    assert taken[0] == sum(rows * columns for rows, columns in grids(policy, 4000, 3000))
    assert taken[-1] <= 0.6 * taken[0]


def test_fixed_fits():
    """By hand: a picture of 100 × 300 in squares of 56."""
    assert Fixed(14, 56, 56).views(100, 300) == ((Resize(56, 56),),)
    assert Fixed(14, 56, 56, "crop").views(100, 300) == ((Resize(56, 168), Window(0, 56, 56, 56)),)
    assert Fixed(14, 56, 56, "crop", 70).views(100, 300) == ((Resize(70, 210), Window(7, 77, 56, 56)),)
    canvas = Window(-100, 0, 300, 300, (122, 116, 104))
    assert Fixed(14, 56, 56, "pad").views(100, 300) == ((canvas, Resize(56, 56)),)
    assert Fixed(14, 56, 56, "pad").views(100, 100) == ((Resize(56, 56),),)
    assert Fixed(14, 56, 84, "crop").views(100, 100) == ((Resize(84, 84), Window(14, 0, 56, 84)),)
    assert Fixed(14, 60, 60, drop=True).views(9, 9) == ((Resize(60, 60), Window(0, 0, 56, 56)),)
    assert Fixed(14, 60, 60, drop=True).grid(9, 9) == (4, 4)
    for wrong in ({"short": 60}, {"height": 60}, {"height": 10, "drop": True}):
        with pytest.raises(InputError, match="give"):
            Fixed(**({"patch": 14, "height": 56, "width": 56} | wrong))


def test_pixtral_breaks_its_rows():
    assert Pixtral(16, 64).picture(30, 50).slots == (0, 1, 2, 3, -1, 4, 5, 6, 7)
    assert Pixtral(16, 64, 2).picture(60, 64).slots == (0, 1, -1, 2, 3)
    assert Pixtral(16, 64).size(1000, 500) == (64, 32)
    assert Pixtral(16, 64, breaks=False).picture(30, 50).slots is None


def test_llava_1_5_hd_is_one_view_or_two_by_two():
    policy = PUBLISHED["llava-1.5-hd"].policy
    assert policy.picture(336, 336).views == ((24, 24),)
    assert policy.picture(336, 336).slots == tuple(range(576))
    large = policy.picture(672, 672)
    assert large.views == ((24, 24),) * 5
    assert len(large.slots) == 576 + 48 * 49  # the whole, then 48 rows of 48, each with its newline


def test_internvl_prefers_the_nearest_shape_then_more_tiles():
    policy = Tiles(14, 448)
    assert policy.best(448, 1344) == (1, 3)
    assert policy.best(900, 900) == (2, 2)
    assert policy.best(400, 400) == (1, 1)
    assert policy.best(3000, 3000) == (3, 3)
    assert len(policy.views(400, 400)) == 1
    assert len(policy.views(448, 1344)) == 4
    assert policy.views(448, 1344)[-1] == (Resize(448, 448),)
    assert len(dataclasses.replace(policy, thumbnail=False).views(448, 1344)) == 3


def test_idefics3_resizes_three_times():
    assert Splits(14, 364, 1456).views(1000, 2000)[-1] == (
        Resize(728, 1456, "lanczos"),
        Resize(728, 1456, "lanczos"),
        Resize(364, 364, "lanczos"),
    )
    assert len(Splits(14, 364, 1456).views(1000, 2000)) == 2 * 4 + 1
    assert len(Splits(14, 364, 364).views(50, 60)) == 1
    assert Splits(14, 364, 1456, split=False).views(1000, 2000) == (
        (Resize(728, 1456, "lanczos"), Resize(364, 364, "lanczos")),
    )


def test_the_first_smolvlm_drops_what_is_left_beside_27_patches():
    policy = Splits(14, 384, 1536, drop=True)
    views = policy.views(1000, 2000)
    assert {(view[-1].height, view[-1].width) for view in views} == {(378, 378)}
    assert views[1][-1] == Window(0, 384, 378, 378)
    assert views[-1][2:] == (Resize(384, 384, "lanczos"), Window(0, 0, 378, 378))
    assert dataclasses.replace(policy, split=False).views(50, 60)[0][1:] == views[-1][2:]
    assert policy.picture(1000, 2000).views == ((27, 27),) * 9


def test_idefics2_bounds_sides_and_quarters():
    """The larger side first, then the smaller, so that long pictures lose their shape; 980 pixels are 70 patches."""
    policy = Bounded(14, 378, 980)
    assert policy.size(1000, 2000) == (490, 980)
    assert policy.size(100, 200) == (378, 378)
    assert policy.size(2000, 100) == (980, 378)
    assert policy.size(500, 600) == (500, 600)
    assert policy.views(500, 600) == ((Resize(500, 600, "bilinear"), Window(0, 0, 490, 588)),)
    assert policy.picture(500, 600).views == ((35, 42),)
    four = dataclasses.replace(policy, split=True)
    assert [view[0] for view in four.views(1001, 2003)] == [
        *(Window(0, 0, 500, 1001), Window(0, 1001, 500, 1002)),
        *(Window(500, 0, 501, 1001), Window(500, 1001, 501, 1002)),
        Resize(489, 980, "bilinear"),
    ]
    assert four.picture(1001, 2003).rows == 2
    assert policy.lowered(0.25) == Bounded(14, 378, 490)
    with pytest.raises(InputError, match="1x50 has no four quarters"):
        four.views(1, 50)


def test_pan_and_scan_cuts_along_the_longer_side():
    policy = PanAndScan(14, 896)
    assert len(policy.views(600, 700)) == 1
    wide = policy.views(600, 2000)
    assert [view[0] for view in wide[1:]] == [
        Window(0, 0, 600, 667),
        Window(0, 667, 600, 667),
        Window(0, 1334, 600, 666),
    ]
    assert [view[0].top for view in policy.views(1300, 300)[1:]] == [0, 325, 650, 975]
    assert len(policy.views(200, 900)) == 1  # crops would be smaller than 256
    assert len(policy.views(300, 9000)) == 5


def test_slices_are_cut_from_what_is_left_and_restored():
    plain = Slices(14, 28, 56)
    assert [view[-1] for view in plain.views(40, 30)] == [
        Window(0, 0, 28, 28),
        Window(0, 28, 28, 28),
        Window(28, 0, 28, 28),
        Window(28, 28, 28, 28),
    ]
    assert plain.views(40, 30)[0] == (Window(0, 0, 28, 28),)  # small enough: not resized
    assert plain.views(112, 56)[0] == (Resize(56, 28), Window(0, 0, 28, 28))
    assert plain.picture(40, 30).slots is None
    # 40 × 30 pixels touch 3 × 3 patches; slices have 2 × 2, after the whole's.
    restored = Slices(14, 28, 56, whole=True, restored=True)
    assert restored.picture(40, 30).slots == (0, 1, 2, 3, 4, 5, 8, 6, 7, 10, 12, 13, 16)
    assert restored.views(40, 30)[0] == (Resize(28, 28),)


def test_uhd_grids_and_their_last_digit():
    """Reference values of MiniCPM-V 4.6; squares of 1,024 pixels are 2 × 3 by the last digit of a logarithm."""
    policy = PUBLISHED["minicpm-v-4.6"].policy
    assert [policy.best(*size) for size in ((480, 640), (1080, 1920), (448, 448), (700, 700), (1200, 1200))] == [
        *((1, 2), (2, 4), (1, 1), (2, 2), (3, 3))
    ]
    assert policy.best(1024, 1024) == (2, 3)
    assert policy.best(1000, 4000) == (1, 8)
    assert policy.views(480, 640)[0] == (Resize(392, 504),)
    assert policy.views(100, 900)[0] == (Resize(168, 1344),)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Tiles(14, 20),
        lambda: Tiles(14, 28, 3, 2),
        lambda: Splits(14, 28, 0),
        lambda: PanAndScan(14, 28, 0),
        lambda: Bounded(14, 10, 20),
        lambda: Bounded(14, 30, 20),
        lambda: Slices(14, 0),
        lambda: UHD(14, 28, 6, 7),
        lambda: UHD(14, 28, 0),
        lambda: AnyRes(14, 10, drop=True),
        lambda: Pixtral(0),
    ],
)
def test_policies_without_a_size_are_refused(wrong):
    with pytest.raises(InputError, match="is not a resolution"):
        wrong()
