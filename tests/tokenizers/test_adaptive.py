import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.tokenizers.adaptive import Adaptive, entropy, shrink
from mmjax.tokenizers.patches import patchify


def test_entropy_by_hand():
    """One level is 0 bits, two equally often 1, four 2; a square cut by the edge is infinite."""
    image = np.zeros((4, 10, 3), np.uint8)
    image[:, 4:8] = np.array([0, 90, 0, 90])[:, None]
    image[0, 8:] = 9
    np.testing.assert_allclose(entropy(image, 4), [[0, 1, np.inf]], atol=1e-8)
    image[:, 4:8] = np.array([0, 60, 120, 180])[:, None]
    np.testing.assert_allclose(entropy(image, 4)[0, 1], 2, atol=1e-8)
    assert np.isinf(entropy(image, 16)).all()


def test_every_pixel_lies_in_one_cell(rng):
    """On a grid that the largest squares do not divide, of pictures from flat to noisy."""
    policy, seen = Adaptive(4, (3.0, 2.0)), set()
    for levels in (1, 3, 6, 40, 256):
        coarse = rng.integers(0, levels, (9, 13, 3))
        image = np.kron(coarse, np.ones((4, 4, 1))).astype(np.uint8)[:28, :44]
        image[14:] = rng.integers(0, levels, (14, 44, 3))
        cells = policy.cells(image)
        covered = np.zeros((7, 11), int)
        for row, column, side in cells:
            assert row % side == column % side == 0
            covered[row : row + side, column : column + side] += 1
        assert (covered == 1).all()
        assert (np.diff(cells[:, 2]) >= 0).all()
        seen |= set(cells[:, 2].tolist())
        patches = policy.patches(image, cells)
        small = cells[:, 2] == 1
        np.testing.assert_array_equal(patches[small], patchify(image, 4)[cells[small, 0] * 11 + cells[small, 1]])
    assert seen == {1, 2, 4}


def test_a_flat_picture_takes_the_fewest_and_thresholds_below_zero_merge_nothing():
    flat = np.full((32, 32, 3), 7, np.uint8)
    assert Adaptive(4, (1.0, 1.0)).cells(flat).tolist() == [[y, x, 4] for y in (0, 4) for x in (0, 4)]
    assert len(Adaptive(4, (-1.0, -1.0)).cells(flat)) == 64
    assert len(Adaptive(4, ()).cells(flat)) == 64
    assert (Adaptive(4, (1.0, 1.0)).patches(flat, Adaptive(4, (1.0, 1.0)).cells(flat)) == 7).all()


def test_shrinking_takes_the_middle_of_a_square():
    image = np.zeros((4, 4, 3), np.uint8)
    image[1:3, 1:3] = [[[1], [2]], [[3], [5]]]
    image[0] = 200
    assert shrink(image, 4).tolist() == [[[3, 3, 3]]]  # 11 / 4, to the nearest
    assert shrink(image, 2)[0, 0].tolist() == [100, 100, 100]
    assert shrink(image, 1) is image


def test_what_is_no_grid_is_refused():
    with pytest.raises(InputError, match="30x32 is not a grid of 4-pixel patches"):
        Adaptive(4).cells(np.zeros((30, 32, 3), np.uint8))
    with pytest.raises(InputError, match="cuts nothing"):
        Adaptive(0)
