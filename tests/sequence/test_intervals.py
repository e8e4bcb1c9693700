import inspect
import re
from itertools import pairwise

import numpy as np
import pytest

from mmjax.sequence import intervals


def dense(lo, hi):
    """The mask of intervals, labels being 0 … n−1."""
    order = np.arange(len(lo))
    return (lo[:, None] <= order) & (order <= hi[:, None])


def drawing(function):
    """The mask drawn in a docstring: a line `t  x x` per query, a column of two characters per key."""
    rows = re.findall(r"^ *([ti])  ([x ]*x)$", inspect.cleandoc(function.__doc__), re.MULTILINE)
    mask = np.array([[cells[2 * key : 2 * key + 1] == "x" for key in range(len(rows))] for _, cells in rows])
    assert mask.sum() == sum(cells.count("x") for _, cells in rows)  # nothing is drawn between or beyond the columns
    return "".join(kind for kind, _ in rows), mask


EXAMPLES = {
    intervals.causal: ((4,), "tiit"),
    intervals.bidirectional_images: ((4, [(1, 3)]), "tiit"),
    intervals.blocks: (([2, 3],), "iiiii"),
}


@pytest.mark.parametrize("function", EXAMPLES)
def test_every_mask_is_as_drawn(function):
    arguments, kinds = EXAMPLES[function]
    drawn_kinds, mask = drawing(function)
    assert drawn_kinds == kinds
    np.testing.assert_array_equal(dense(*function(*arguments)), mask)


def test_no_mask_is_left_out():
    public = [f for name, f in inspect.getmembers(intervals, inspect.isfunction) if not name.startswith("_")]
    assert {f for f in public if f.__module__ == intervals.__name__} == set(EXAMPLES)


def random_images(rng, length):
    """Spans that do not overlap, some of them side by side, some at the ends."""
    edges = np.sort(rng.choice(length + 1, rng.integers(0, min(length, 6)), replace=False)).tolist()
    return [pair for pair in pairwise(edges) if rng.random() < 0.6]


def test_dense_definitions(rng):
    for length in [1, 2, *rng.integers(3, 30, 40).tolist()]:
        images = random_images(rng, length)
        of = [next((n for n, (a, b) in enumerate(images) if a <= i < b), None) for i in range(length)]
        causal = [[key <= query for key in range(length)] for query in range(length)]
        both = [[k <= q or (of[q] is not None and of[q] == of[k]) for k in range(length)] for q in range(length)]
        np.testing.assert_array_equal(dense(*intervals.causal(length)), causal)
        np.testing.assert_array_equal(dense(*intervals.bidirectional_images(length, images)), both)

        lengths = rng.integers(0, 6, rng.integers(0, 6)).tolist()
        of = np.repeat(np.arange(len(lengths)), lengths)
        got = intervals.blocks(lengths)
        np.testing.assert_array_equal(dense(*got), of[:, None] == of[None, :])
        assert all(bound.dtype == np.int32 and len(bound) == sum(lengths) for bound in got)
