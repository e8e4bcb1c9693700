import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.sequence.pack import pack


@st.composite
def workloads(draw):
    """A capacity in three dimensions, and documents that each fit it."""
    capacity = tuple(draw(st.lists(st.integers(1, 50), min_size=3, max_size=3)))
    sizes = draw(st.lists(st.tuples(*[st.integers(0, c) for c in capacity]), max_size=40))
    return np.array(sizes, np.int64).reshape(-1, 3), capacity


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(workloads())
def test_every_document_once_and_no_row_too_full(workload):
    sizes, capacity = workload
    rows = pack(sizes, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    for row in rows:
        assert row
        assert (sizes[row].sum(0) <= capacity).all()


def first_fit(sizes, capacity):
    """How many rows first fit takes, in the order given."""
    rows = []
    for size in sizes:
        for row in rows:
            if (row + size <= capacity).all():
                row += size
                break
        else:
            rows.append(size.copy())
    return len(rows)


@pytest.mark.parametrize("images", [8, 400])
def test_no_more_rows_than_first_fit(rng, images):
    """Conversations of one or two pictures, as in the built-in dataset; few or plenty of images may stand in a row."""
    pictures = rng.integers(1, 3, 400)
    patches = pictures * rng.integers(12, 37, 400)
    sizes = np.stack([patches + rng.integers(8, 20, 400), patches, pictures], 1)
    capacity = (160, 130, images)
    packed = len(pack(sizes, capacity))
    assert packed <= first_fit(sizes, capacity)
    assert packed <= 1.06 * np.ceil((sizes.sum(0) / capacity).max())  # nearly what any packing needs at least


@pytest.mark.parametrize("n", [3, 7, 10, 49, 128])
def test_rows_can_be_full_to_the_last_token(n):
    """Shares of a row are fractions; n of them must still be one."""
    ones = np.ones((2 * n + 1, 3), np.int64)
    assert [len(row) for row in pack(ones, (n, n, n))] == [n, n, 1]


def test_largest_first():
    """Lengths 6 and 4, 5 and 5 fill two rows of 10; in the order given, first fit would need three."""
    rows = pack(np.array([[4], [5], [5], [6]]), (10,))
    assert sorted(map(sorted, rows)) == [[0, 3], [1, 2]]


def test_dimension_that_nothing_uses():
    assert pack(np.array([[3, 0], [4, 0], [3, 0]]), (10, 0)) == [[1, 0, 2]]


def test_nothing():
    assert pack(np.zeros((0, 3), np.int64), (8, 8, 8)) == []


def test_too_large_a_document_spoils_no_other_row():
    """Callers refuse it beforehand; here it gets a row to itself, where batch.build would name it."""
    rows = pack(np.array([[2, 1], [11, 1], [3, 1], [0, 0]]), (10, 5))
    assert [1] in rows
    assert sorted(i for row in rows for i in row) == [0, 1, 2, 3]
