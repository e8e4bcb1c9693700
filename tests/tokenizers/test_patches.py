import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.sequence import windows
from mmjax.tokenizers.patches import Pixels, patchify


@pytest.mark.parametrize(("merge", "window"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2), (2, 1), (1, 5)])
def test_orders_are_those_of_the_sequence(merge, window, rng):
    """Written straight into part of a buffer, and nowhere else."""
    rows, columns, patch = 6, 12, 3
    image = rng.integers(0, 256, (rows * patch, columns * patch, 3), np.uint8)
    order, _, _ = windows.order((1, rows, columns), merge, window)
    buffer = np.full((80, patch * patch * 3), 9, np.uint8)
    got = patchify(image, patch, merge=merge, window=window, out=buffer[5:77])
    np.testing.assert_array_equal(buffer[5:77], patchify(image, patch)[order])
    assert got.base is buffer or got is buffer
    assert (buffer[:5] == 9).all()
    assert (buffer[77:] == 9).all()


def test_views_follow_each_other(rng):
    views = [rng.integers(0, 256, (8, width, 3), np.uint8) for width in (8, 24)]
    pixels = Pixels(views, 4)
    assert (pixels.shape, len(pixels), pixels.dtype, pixels.ndim) == ((16, 48), 16, np.uint8, 2)
    out = np.empty(pixels.shape, np.uint8)
    pixels.write(out, merge=2)
    np.testing.assert_array_equal(out, np.concatenate([patchify(view, 4, merge=2) for view in views]))


def test_wrong_shapes_are_refused(rng):
    image = rng.integers(0, 256, (8, 12, 3), np.uint8)
    with pytest.raises(InputError, match="8x12 is not a grid of 4-pixel patches, 2x2 together"):
        patchify(image, 4, merge=2)
    for out in (np.empty((5, 48), np.uint8), np.empty((6, 96), np.uint8)[:, ::2]):
        with pytest.raises(InputError, match="does not hold the patches"):
            patchify(image, 4, out=out)
