"""Resizing on device against Pillow, pixel by pixel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from PIL import __version__ as pillow_version

from mmjax.core.errors import InputError
from mmjax.nn.resize import resize, rows_first, weights

FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")}
SIZES = [((61, 47), (28, 28)), ((30, 45), (64, 64)), ((96, 96), (7, 61)), ((17, 90), (60, 5)), ((64, 64), (64, 64))]
SIZES += [((5, 7), (63, 62)), ((96, 3), (4, 4)), ((1, 1), (9, 2)), ((96, 95), (1, 1))]
run = functools.partial(jax.jit, static_argnames=("shape", "filter", "rows_first"))(resize)
PILLOW_13 = int(pillow_version.split(".")[0]) >= 13  # older ones always begin with the lines


@pytest.mark.parametrize("name", FILTERS)
def test_it_is_pillows(name, rng):
    """All sizes in one program and one batch, on canvases full of other things; bytes apart by at most one."""
    pictures = [rng.integers(0, 256, (*before, 3), np.uint8) for before, _ in SIZES]
    canvas = rng.integers(0, 256, (len(SIZES), 96, 96, 3), np.uint8)
    for i, picture in enumerate(pictures):
        canvas[i, : picture.shape[0], : picture.shape[1]] = picture
    before, after = (jnp.array(s, jnp.int32) for s in zip(*SIZES, strict=True))
    orders = [
        np.asarray(run(jnp.asarray(canvas), before, after, (64, 64), filter=name, rows_first=r)) for r in (False, True)
    ]
    different = total = 0
    for i, (size, (height, width)) in enumerate(SIZES):
        got = orders[int(PILLOW_13) and rows_first(size, (height, width))]
        want = np.asarray(Image.fromarray(pictures[i]).resize((width, height), FILTERS[name]))
        apart = np.abs(got[i, :height, :width].astype(int) - want)
        assert apart.max() <= 1
        assert not got[i, height:].any()
        assert not got[i, :, width:].any()
        different, total = different + (apart > 0).sum(), total + apart.size
    # Bilinear by whole factors has many exact halves, which fall by the last digit.
    assert different / total < (0.01 if name == "bilinear" else 0.001)


def test_which_direction_pillow_takes_first(rng):
    """Both orders, at sizes on either side of the rule, against Pillow: one of them is equal to the last digit."""
    picture = rng.integers(0, 256, (96, 80, 3), np.uint8)
    before = jnp.array([[96, 80]], jnp.int32)
    seen = set()
    for after in ((56, 60), (55, 60), (50, 60), (95, 80), (90, 99), (20, 90), (60, 30)):
        want = np.asarray(Image.fromarray(picture).resize(after[::-1], Image.Resampling.BICUBIC))
        first = PILLOW_13 and rows_first((96, 80), after)
        args = jnp.asarray(picture[None]), before, jnp.array([after], jnp.int32), after
        apart = [(np.asarray(run(*args, rows_first=order))[0] != want).mean() for order in (first, not first)]
        assert apart[0] < 0.001
        if after[1] != 80:
            assert apart[1] > 0.02
        seen.add(first)
    assert seen == ({False, True} if PILLOW_13 else {False})


def test_a_window_of_a_resized_picture(rng):
    """Any part of it, also one that leaves it, where there is black."""
    picture = rng.integers(0, 256, (40, 30, 3), np.uint8)
    sizes = jnp.array([[40, 30]], jnp.int32), jnp.array([[50, 60]], jnp.int32)
    whole = np.asarray(run(jnp.asarray(picture[None]), *sizes, (64, 64)))[0]
    for top, left in ((0, 0), (13, 7), (40, 55), (-5, -9), (-16, 0), (50, 0)):
        start = jnp.array([[top, left]], jnp.int32)
        got = np.asarray(run(jnp.asarray(picture[None]), *sizes, (16, 16), start=start))[0]
        want = np.zeros((96, 96, 3), np.uint8)
        want[16:66, 16:76] = whole[:50, :60]
        np.testing.assert_array_equal(got, want[16 + top : 32 + top, 16 + left : 32 + left])


def test_large_sizes_keep_their_digits():
    """Weights of a line of 16,000 pixels against float64: what would be lost in 32 bits is the pixel's own place."""
    before, after = 15_999, 337
    got = np.asarray(weights(before, after, 0, (after, before)), np.float64)
    centre = (np.arange(after)[:, None] + 0.5) * before / after
    x = np.abs(np.arange(before)[None] + 0.5 - centre) * after / before
    want = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))
    want /= want.sum(1, keepdims=True)
    np.testing.assert_allclose(got, want, atol=2e-6 * want.max())
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)


def test_an_unknown_filter_is_refused():
    sizes = jnp.array([[4, 4]], jnp.int32)
    with pytest.raises(InputError, match="'nearest' is not a filter"):
        resize(jnp.zeros((1, 4, 4, 3), jnp.uint8), sizes, sizes, (4, 4), filter="nearest")
