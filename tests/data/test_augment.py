import dataclasses

import numpy as np
import pytest

from mmjax.data import drawings
from mmjax.data.augment import Config, augment

STILL = Config(*[0.0] * len(dataclasses.fields(Config)))  # every amount
YELLOW, WHITE = (255, 200, 0), (255, 255, 255)


class Lowest(np.random.Generator):
    """Draws the lower end of every range, and so no event but those that always happen."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def random(self):
        return 0.999

    def uniform(self, low, high, size=None):
        return low if size is None else np.full(size, low)


def noise(height, width):
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)


def varied(**amounts):
    return dataclasses.replace(STILL, **amounts)


def test_nothing_to_change_changes_nothing(rng):
    image = noise(13, 17)
    got = augment(image, 13, 17, STILL, rng)
    assert np.abs(got.astype(int) - image).max() <= 1  # the colour matrix is the identity but for rounding


@pytest.mark.parametrize("size", [(12, 48), (33, 7), (40, 40)])
def test_size_and_type_asked_for(rng, size):
    got = augment(noise(20, 30), *size, Config(), rng)
    assert (got.shape, got.dtype) == ((*size, 3), np.uint8)


def test_the_same_draws_give_the_same_picture():
    image = noise(24, 20)
    one, again, other = (augment(image, 30, 30, Config(), np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one.astype(int) - other).mean() > 5


def test_half_size_stands_in_the_middle_of_white(rng):
    black = np.zeros((16, 16, 3), np.uint8)
    got = augment(black, 16, 16, varied(scale=1.0), Lowest())  # log2 of the zoom is -1
    expected = np.full((16, 16, 3), 255)
    expected[4:12, 4:12] = 0
    np.testing.assert_array_equal(got, expected)


def test_twice_the_size_shows_the_middle():
    picture = np.full((16, 16, 3), 255, np.uint8)
    picture[4:12, 4:12] = 0
    got = augment(picture, 16, 16, varied(scale=-1.0), Lowest())
    assert (got[1:-1, 1:-1] == 0).all()


def test_mirror_image():
    image = noise(9, 14)
    got = augment(image, 9, 14, varied(flip=1.0), Lowest())
    np.testing.assert_allclose(got.astype(int), image[:, ::-1], atol=1)


def test_quarter_turn():
    image = noise(11, 11)
    got = augment(image, 11, 11, varied(rotate=90.0), Lowest()).astype(int)
    assert min(np.abs(got - np.rot90(image, k)).max() for k in (1, 3)) <= 1


def test_shift_is_in_shares_of_the_side():
    image = noise(10, 20)
    got = augment(image, 10, 20, varied(shift=0.2), Lowest()).astype(int)
    assert np.abs(got[2:, 4:] - image[:-2, :-4]).max() <= 1
    assert (got[:2] == 255).all()
    assert (got[:, :4] == 255).all()


def test_stretch_trades_height_for_width():
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[12:20, 12:20] = 0
    dark = augment(picture, 32, 32, varied(stretch=-1.0), Lowest())[..., 0] < 128  # log2 of the change is +1
    assert dark.sum(1).max() == 4
    assert dark.sum(0).max() == 16


def test_white_paper_stays_white_whatever_the_colours_do():
    """Without a change of light, paper and what lies outside the picture are white."""
    cfg = dataclasses.replace(Config(), light=0.0, erase=0.0)
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[14:18, 14:18] = YELLOW
    for seed in range(50):
        got = augment(picture, 40, 36, cfg, np.random.default_rng(seed)).astype(int)
        ring = np.concatenate([got[:6].ravel(), got[-6:].ravel(), got[:, :6].ravel(), got[:, -6:].ravel()])
        assert ring.min() >= 254


def test_light_moves_all_of_the_paper_alike(rng):
    for _ in range(20):
        got = augment(np.full((12, 12, 3), 255, np.uint8), 16, 16, dataclasses.replace(Config(), erase=0.0), rng)
        assert np.ptp(got) <= 1


def test_hue_leaves_lightness_alone(rng):
    pale = np.tile(np.array([150, 120, 130], np.uint8), (8, 8, 1))
    got = np.stack([augment(pale, 8, 8, varied(hue=0.5), rng)[4, 4] for _ in range(20)]).astype(float)
    np.testing.assert_allclose(got @ [0.299, 0.587, 0.114], pale[0, 0] @ [0.299, 0.587, 0.114], atol=1)
    assert np.ptp(got, axis=0).min() > 20


def test_grey_has_no_colour(rng):
    got = augment(noise(8, 8), 8, 8, varied(grey=1.0, hue=0.5, colour=0.6), rng).astype(int)
    assert np.ptp(got, axis=2).max() <= 1


def test_blur_halves_the_resolution(rng):
    stripes = np.zeros((24, 24, 3), np.uint8)
    stripes[:, ::2] = 255
    got = augment(stripes, 24, 24, varied(blur=1.0), rng).astype(int)
    inside = got[:, 2:-2]
    assert np.ptp(inside) < 128
    assert np.ptp(augment(stripes, 24, 24, STILL, rng)) == 255


def test_the_dataset_is_really_varied(rng):
    """Two showings of one drawing differ by more than a shade, and neither is blank."""
    concept = drawings.named(drawings.Config())[5]
    picture = drawings.pixels("fluent", concept.code)
    shown = np.stack([augment(picture, 32, 32, Config(), rng) for _ in range(10)]).astype(float)
    assert shown.std(0).mean() > 10
    assert shown.std((1, 2)).max(1).min() > 5


def test_erasing_hides_one_rectangle_of_one_colour(rng):
    picture = noise(40, 30)
    for _ in range(20):
        hidden = (augment(picture, 40, 30, dataclasses.replace(STILL, erase=1.0), rng) != picture).any(-1)
        rows, columns = np.flatnonzero(hidden.any(1)), np.flatnonzero(hidden.any(0))
        tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 0.2 * 40 - 1 <= tall <= 20
        assert 0.2 * 30 - 1 <= wide <= 15
        assert hidden.sum() > 0.95 * tall * wide  # noise has the colour itself now and then


def test_strength_scales_everything_but_the_mirror():
    image = noise(16, 16)
    whole = varied(scale=1.0, shift=0.0, flip=1.0)
    np.testing.assert_array_equal(
        augment(image, 16, 16, whole, Lowest(), 0.5), augment(image, 16, 16, varied(scale=0.5, flip=1.0), Lowest())
    )
    mirrored = augment(image, 16, 16, varied(flip=1.0, rotate=90.0), Lowest(), 0.0)
    assert np.abs(mirrored.astype(int) - image[:, ::-1]).max() <= 1
