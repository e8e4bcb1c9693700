"""Labels of learned tokens behind the pictures of a row, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.sequence import behind

IMAGE = jnp.array([[0, 0, 0, 1, 1, -1], [1, 1, 1, 1, -1, -1]])
ORDER = jnp.array([[0, 1, 2, 3, 4, -1], [0, 1, 2, 3, -1, -1]])
# The second row's first place for a picture is empty.
GRID = jnp.array([[[1, 1, 3], [1, 2, 1]], [[0, 0, 0], [1, 2, 2]]])


def test_labels_alternate():
    labels, lo, hi = jax.jit(behind.labels, static_argnums=3)(IMAGE, ORDER, GRID, 2)
    np.testing.assert_array_equal(labels[0], [0, 1, 2, 5, 6, -1, 3, 4, 7, 8])
    np.testing.assert_array_equal(lo[0], [0, 0, 5, 5])
    np.testing.assert_array_equal(hi[0], [4, 4, 8, 8])
    np.testing.assert_array_equal(labels[1], [2, 3, 4, 5, -1, -1, -1, -1, 6, 7])
    np.testing.assert_array_equal(lo[1], [0, 0, 2, 2])
    np.testing.assert_array_equal(hi[1], [-1, -1, 7, 7])


def test_labels_of_places_that_are_counted():
    """A class token behind either picture's patches, which no grid counts."""
    image = jnp.array([[0, 0, 0, 1, 1, -1, 0, 1]])
    order = jnp.array([[0, 1, 2, 4, 5, -1, 3, 6]])
    labels, lo, hi = behind.labels(image, order, GRID[:1], 2, True)
    np.testing.assert_array_equal(labels[0], [0, 1, 2, 6, 7, -1, 3, 8, 4, 5, 9, 10])
    np.testing.assert_array_equal(lo[0], [0, 0, 6, 6])
    np.testing.assert_array_equal(hi[0], [5, 5, 10, 10])


def test_present_within_and_start():
    np.testing.assert_array_equal(behind.present(GRID, 2), [[True] * 4, [False, False, True, True]])
    np.testing.assert_array_equal(behind.within(IMAGE, ORDER, GRID), [[0, 1, 2, 0, 1, -1], [0, 1, 2, 3, -1, -1]])
    tokens = jnp.arange(6.0).reshape(2, 3)
    out = behind.start(tokens, jnp.zeros((2, 5, 1), jnp.bfloat16), 2)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), np.tile(tokens, (2, 2, 1)))
