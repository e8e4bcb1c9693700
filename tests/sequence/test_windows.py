import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.sequence import windows


def drawing(name):
    """The places drawn in the docstring: what lies where in the picture."""
    lines = windows.order.__doc__.split("windows of 2\n")[1].splitlines()[: 2 if name == "merged" else 3]
    width = 4 if name == "merged" else 3
    numbers = [[int(n) for n in line.split()] for line in lines]
    return np.array([row[:width] if name == "merged" else row[-width:] for row in numbers])


@pytest.mark.parametrize(("name", "merge", "window"), [("merged", 2, 0), ("windows", 1, 2)])
def test_as_drawn(name, merge, window):
    places = drawing(name)
    patches, tokens, counts = windows.order((1, *places.shape), merge, window)
    np.testing.assert_array_equal(np.argsort(patches).reshape(places.shape), places)
    if name == "windows":
        np.testing.assert_array_equal(patches, tokens)
        assert counts == [4, 2, 2, 1]
    else:
        np.testing.assert_array_equal(tokens, [0, 1])
        assert counts == [8]


@pytest.mark.parametrize(("grid", "merge", "window"), [((3, 4, 6), 2, 2), ((2, 6, 10), 2, 3), ((1, 5, 7), 1, 3)])
def test_every_patch_once_squares_whole_and_frames_apart(grid, merge, window):
    patches, tokens, counts = windows.order(grid, merge, window)
    assert sorted(patches) == list(range(np.prod(grid)))
    assert sum(counts) == np.prod(grid)
    place = np.indices(grid).reshape(3, -1).T[patches]
    square = place // [1, merge, merge]
    groups = square.reshape(len(tokens), merge * merge, 3)
    assert (groups == groups[:, :1]).all()
    which = square // [1, window, window]
    for start, n in zip(np.cumsum(counts) - counts, counts, strict=True):
        assert len({tuple(w) for w in which[start : start + n]}) == 1
    assert len({tuple(w) for w in which}) == len(counts)


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(InputError, match="3×4 patches cannot be merged 2×2"):
        windows.order((1, 3, 4), 2)
