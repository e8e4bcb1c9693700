import numpy as np
import pytest
from PIL import Image

from mmjax.core.errors import InputError
from mmjax.tokenizers.view import Resize, Window, needed, render, resized, size

FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")}
WINDOWS = [
    *(Window(3, 4, 5, 6), Window(-2, -3, 20, 20, (1, 2, 3))),
    *(Window(8, 9, 9, 9, (4, 5, 6)), Window(-30, 0, 5, 5, (7, 7, 9))),
]


def of(pixels, height, width, filter="bicubic"):
    return np.asarray(Image.fromarray(pixels).resize((width, height), FILTERS[filter]))


@pytest.mark.parametrize("filter", FILTERS)
def test_resize_is_pillows(filter, rng):
    picture = rng.integers(0, 256, (30, 41, 3), np.uint8)
    (got,) = render(picture, [(Resize(17, 60, filter),)])
    np.testing.assert_array_equal(got, of(picture, 17, 60, filter))


@pytest.mark.parametrize("last", [True, False], ids=["last", "resized next"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_window_crops_and_pads(window, last, rng):
    """The same pixels whether it is looked at or resized next, from an array or from a picture of Pillow's."""
    picture = rng.integers(0, 256, (12, 13, 3), np.uint8)
    canvas = np.zeros((100, 100, 3), np.uint8) + np.array(window.fill, np.uint8)
    canvas[40:52, 40:53] = picture
    want = canvas[40 + window.top :, 40 + window.left :][: window.height, : window.width]
    view = (window,) if last else (window, Resize(8, 7))
    for source in (picture, Image.fromarray(picture)):
        (got,) = render(source, [view])
        np.testing.assert_array_equal(got, want if last else of(want, 8, 7))


def test_steps_in_common_are_done_once(rng, monkeypatch):
    picture = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
    done = []
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: done.append(a[0]) or real(self, *a, **k))
    canvas = Resize(8, 8)
    views = [(canvas, Window(y, x, 4, 4)) for y in (0, 4) for x in (0, 4)] + [(canvas, Resize(4, 4)), (Resize(4, 4),)]
    tiles = render(picture, views)
    assert done == [(8, 8), (4, 4), (4, 4)]
    joined = np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:4], 1)])
    np.testing.assert_array_equal(joined, np.asarray(real(picture, (8, 8), Image.Resampling.BICUBIC)))


def test_what_a_chain_does_to_sizes():
    view = (Resize(10, 40), Window(0, 0, 10, 20), Resize(20, 10))
    assert size(view, 100, 100) == (20, 10)
    assert size((), 7, 9) == (7, 9)
    assert resized(view, 100, 100) == (0.2, 0.2)
    assert needed([view, (Resize(12, 3),)]) == (12, 40)
    assert needed([view, (Window(0, 0, 1, 1),)]) is None
    assert needed([()]) is None


@pytest.mark.parametrize("step", [Resize(0, 5), Window(0, 0, 5, 0)], ids=str)
def test_a_step_that_leaves_nothing_is_refused(step, rng):
    with pytest.raises(InputError, match="leaves no picture"):
        render(rng.integers(0, 256, (5, 5, 3), np.uint8), [(step,)])
