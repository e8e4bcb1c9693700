import inspect
import re
from itertools import pairwise

import numpy as np
import pytest

from mmjax.sequence import intervals


def dense(lo, hi, order=None):
    """The mask of intervals; labels are 0 … n−1 where no others are given."""
    order = np.arange(hi.max() + 1) if order is None else order
    return (lo[:, None] <= order) & (order <= hi[:, None])


def drawing(function):
    """The mask drawn in a docstring: a line `t  x x` per query, a column of two characters per key."""
    lines = [line.strip() for line in inspect.cleandoc(function.__doc__).splitlines()]
    rows = [(line[0], line[3:]) for line in lines if re.fullmatch(r"[tiq](  [x ]*x)?", line)]
    keys = max(len(cells) // 2 + 1 for _, cells in rows)
    mask = np.array([[cells[2 * key : 2 * key + 1] == "x" for key in range(keys)] for _, cells in rows])
    assert mask.sum() == sum(cells.count("x") for _, cells in rows)  # nothing is drawn between or beyond the columns
    return "".join(kind for kind, _ in rows), mask


def gemma3(length, images, size):
    return intervals.sliding_window(*intervals.bidirectional_images(length, images), size)


# What draws each mask: the function, its arguments, and what its queries are.
EXAMPLES = {
    intervals.causal: ((4,), "tiit"),
    intervals.packed: (([2, 3],), "ttttt"),
    intervals.prefix: ((5, 3), "iittt"),
    intervals.bidirectional_images: ((4, [(1, 3)]), "tiit"),
    intervals.sliding_window: ((*intervals.bidirectional_images(6, [(3, 5)]), 2), "tttiit"),
    intervals.blocks: (([2, 3],), "iiiii"),
    intervals.last_image: ((5, [1, 3], [3, 2]), "ttttt"),
    intervals.all_images: ((5, [1, 3], [3, 2]), "ttttt"),
    intervals.last_images: ((5, [1, 2, 4], [3, 2, 1]), "ttttt"),
    intervals.qformer_contrastive: ((2, 2), "qqtt"),
    intervals.qformer_generation: ((2, 2), "qqtt"),
    intervals.qformer_matching: ((2, 2), "qqtt"),
    intervals.perceiver: (([3, 2], 2), "qqqq"),
}


@pytest.mark.parametrize("function", EXAMPLES)
def test_every_mask_is_as_drawn(function):
    arguments, kinds = EXAMPLES[function]
    drawn_kinds, mask = drawing(function)
    assert drawn_kinds == kinds
    got = function(*arguments)
    got = dense(*got[1], got[0]) if function is intervals.perceiver else dense(*got)
    np.testing.assert_array_equal(got, mask)


def test_no_mask_is_left_out():
    public = [f for name, f in inspect.getmembers(intervals, inspect.isfunction) if not name.startswith("_")]
    counted = {intervals.looked_at}  # how many a mask shows, which is no mask
    assert {f for f in public if f.__module__ == intervals.__name__} - counted == set(EXAMPLES)


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
        if sum(lengths):
            np.testing.assert_array_equal(dense(*got), of[:, None] == of[None, :])
        assert all(bound.dtype == np.int32 and len(bound) == sum(lengths) for bound in got)
