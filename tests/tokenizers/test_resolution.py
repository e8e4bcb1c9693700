import math
import random
from fractions import Fraction

import pytest

from mmjax.core.errors import InputError
from mmjax.tokenizers.resolution import Fixed, NaFlex, Native
from mmjax.tokenizers.tiles import AnyRes
from mmjax.tokenizers.view import Resize, Window


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """Qwen2-VL's rule straight down, as published (transformers 4.50 and later)."""
    if max(height, width) / min(height, width) > 200:
        raise ValueError
    h_bar = round(height / factor) * factor
    w_bar = round(width / factor) * factor
    if h_bar * w_bar > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        h_bar = max(factor, math.floor(height / beta / factor) * factor)
        w_bar = max(factor, math.floor(width / beta / factor) * factor)
    elif h_bar * w_bar < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h_bar = math.ceil(height * beta / factor) * factor
        w_bar = math.ceil(width * beta / factor) * factor
    return h_bar, w_bar


POLICIES = [
    Native(patch=14, merge=2),
    Native(patch=16, merge=2, min_pixels=65_536, max_pixels=16_777_216),
    Native(patch=8, min_pixels=64, max_pixels=48 * 48),
    Native(patch=14, merge=2, min_pixels=784, max_pixels=784),
]


def pictures(count):
    dice = random.Random(0)
    for _ in range(count):
        longest = dice.choice((20, 300, 3000, 30_000))
        yield dice.randint(1, longest), dice.randint(1, longest)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_native_is_smart_resize(policy):
    unit, refused = policy.patch * policy.merge, 0
    for height, width in pictures(2000):
        try:
            want = smart_resize(height, width, unit, policy.min_pixels, policy.max_pixels)
        except ValueError:
            refused += 1
            with pytest.raises(InputError, match="200 times the other"):
                policy.size(height, width)
            continue
        assert policy.size(height, width) == want
        assert policy.grid(height, width) == (want[0] // policy.patch, want[1] // policy.patch)
    assert 0 < refused < 1000


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_native_keeps_its_promises(policy):
    unit = policy.patch * policy.merge
    for height, width in pictures(2000):
        if max(height, width) > 200 * min(height, width):
            continue
        tall, wide = policy.size(height, width)
        assert tall % unit == wide % unit == 0 < min(tall, wide)
        assert policy.size(width, height) == (wide, tall)
        rows, columns = policy.grid(height, width)
        assert (rows % policy.merge, columns % policy.merge) == (0, 0)
        if max(height, width) < 2 * min(height, width) and policy.max_pixels > 4 * policy.min_pixels:
            assert policy.min_pixels // 2 <= tall * wide <= policy.max_pixels
            # The shape survives up to the rounding of each side to one unit.
            scale = math.sqrt(Fraction(tall * wide, height * width))
            assert abs(tall - height * scale) <= unit
            assert abs(wide - width * scale) <= unit


def test_known_sizes():
    # By hand, with unit 28 and the published bounds (3,136 and 1,003,520 pixels).
    policy = Native(patch=14, merge=2)
    assert policy.size(28, 280) == (28, 280)
    assert policy.size(42, 70) == (56, 56)  # 1.5 and 2.5 units round to the even 2
    assert policy.size(1080, 1920) == (728, 1316)
    assert policy.size(1, 1) == (56, 56)
    assert policy.size(5, 400) == (28, 504)  # rounds to no height at all, so it is scaled up
    assert policy.grid(1080, 1920) == (52, 94)


@pytest.mark.parametrize(("height", "width"), [(1, 201), (201, 1), (4, 801)])
def test_a_strip_is_refused(height, width):
    with pytest.raises(InputError, match=f"{height}x{width} has one side over 200 times the other"):
        Native(patch=14).size(height, width)
    assert Native(patch=14).size(1, 200)
    assert Native(patch=14, max_ratio=250.0).size(height, width)


@pytest.mark.parametrize("policy", [Native(patch=14), Fixed(patch=14, height=28, width=28)], ids=str)
@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-3, 5)])
def test_a_picture_of_nothing_is_refused(policy, height, width):
    with pytest.raises(InputError, match=f"{height}x{width} has no pixels"):
        policy.grid(height, width)


def test_fixed_is_one_size():
    policy = Fixed(patch=16, height=224, width=320)
    assert {policy.size(height, width) for height, width in pictures(50)} == {(224, 320)}
    assert policy.grid(7, 7) == (14, 20)


def test_inset_by_hand():
    """The longer side fills the canvas, the picture is in its middle, and no side is below `short`."""
    policy = Fixed(4, 16, 16, "inset", 3, (1, 2, 3), "bilinear")
    assert policy.views(20, 10) == ((Resize(16, 8, "bilinear"), Window(0, -4, 16, 16, (1, 2, 3))),)
    assert policy.views(9, 40) == ((Resize(4, 16, "bilinear"), Window(-6, 0, 16, 16, (1, 2, 3))),)
    assert policy.views(1, 40)[0][0] == Resize(3, 16, "bilinear")
    assert policy.views(5, 5) == ((Resize(16, 16, "bilinear"),),)
    with pytest.raises(InputError, match="lower `short`"):
        Fixed(4, 16, 16, "inset", 17)
    with pytest.raises(InputError, match="'crop' and 'inset' alone"):
        Fixed(4, 16, 16, "pad", 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"patch": 0},
        {"patch": 14, "merge": 0},
        {"patch": 14, "max_ratio": 0.5},
        {"patch": 14, "min_pixels": 0},
        {"patch": 14, "min_pixels": 2000, "max_pixels": 1000},
        {"patch": 14, "merge": 4, "min_pixels": 1, "max_pixels": 3135},
    ],
)
def test_policies_that_allow_nothing_are_refused(settings):
    with pytest.raises(InputError, match="give"):
        Native(**settings)


@pytest.mark.parametrize("settings", [(14, 225, 224), (14, 224, 225), (0, 14, 14), (14, 0, 14)])
def test_fixed_sizes_that_are_no_grid_are_refused(settings):
    with pytest.raises(InputError, match="multiples of patch"):
        Fixed(*settings)


@pytest.mark.parametrize("most", [1, 7, 256])
def test_naflex_fills_its_patches_and_keeps_the_shape(most):
    """As many patches as fit, never more; equal to transformers in tests/parity."""
    policy = NaFlex(16, most)
    for height, width in pictures(200):
        rows, columns = policy.grid(height, width)
        assert 1 <= rows * columns <= most
        assert policy.size(height, width) == (rows * 16, columns * 16)
    assert NaFlex(16, 256).grid(300, 300) == (16, 16)
    assert NaFlex(16, 256).grid(100, 400) == (8, 32)


def test_any_res_by_hand():
    """A wide picture on 1 × 2 tiles of 2 × 2 patches: nothing to take off; a square one loses a column on each side."""
    policy = AnyRes(patch=4, tile=8, sizes=((1, 2), (2, 1)))
    wide = policy.picture(8, 16)
    assert wide.views == ((2, 2),) * 3
    assert wide.slots == (0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1)
    square = policy.picture(8, 8)
    assert square.slots == (0, 1, 2, 3, 5, 8, -1, 7, 10, -1)
    assert AnyRes(4, 8, ((1, 2),), newline=False).picture(8, 8).slots == (0, 1, 2, 3, 5, 8, 7, 10)
    assert policy.best(16, 8) == (2, 1)


@pytest.mark.parametrize("wrong", [lambda: NaFlex(16, 0), lambda: AnyRes(14, 20), lambda: AnyRes(14, 28, ())])
def test_policies_without_a_size_are_refused(wrong):
    with pytest.raises(InputError, match="is not a resolution"):
        wrong()
