import fractions

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.cast import cast
from mmjax.core.errors import InputError

NARROW = ["bfloat16", "float16", "float32"]


def nearest(x: float, dtype) -> float:
    """The nearest number of a format, by exact fractions; of two as near, the one whose last bit is 0."""
    bits = np.dtype(dtype).itemsize * 8
    word = np.dtype(f"uint{bits}")
    guess = int(np.asarray(np.float32(x) if bits < 32 else x).astype(dtype).view(word))
    found = []
    for near in range(max(guess - 2, 0), guess + 3):
        value = float(np.asarray(near, word).view(dtype))
        if np.isfinite(value):
            found.append((abs(fractions.Fraction(value) - fractions.Fraction(x)), near & 1, value))
    return min(found)[2]


@pytest.mark.parametrize("to", NARROW)
@pytest.mark.parametrize("of", ["float64", "float32"])
def test_to_the_nearest_ties_to_even(rng, of, to):
    x = rng.normal(size=500) * 10.0 ** rng.integers(-6, 4, 500)
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-24, 1 + 3 * 2.0**-24]
    # Just beyond a tie by less than float32 can hold: rounded twice, these would go the wrong way.
    beyond = [t + sign * 2.0**-40 for t in ties for sign in (1, -1)]
    x = np.array([*x, *ties, *beyond, 0.0, 2.0**-24, 3 * 2.0**-25, 65504.0])
    x = np.abs(x).astype(of)
    wanted = np.array([nearest(float(v), jnp.dtype(to)) for v in x])
    for sign in (1, -1):
        np.testing.assert_array_equal(cast(sign * x, to, "x").astype(np.float64), sign * wanted)


@pytest.mark.parametrize("to", NARROW)
def test_what_is_not_finite_stays_so(to):
    out = cast(np.array([np.nan, np.inf, -np.inf, -0.0]), to, "x").astype(np.float64)
    np.testing.assert_array_equal(out, [np.nan, np.inf, -np.inf, 0.0])
    assert np.signbit(out[3])


def test_what_does_not_fit_is_refused():
    for x in (np.float32([1e5]), np.float64([65520.0]), jnp.bfloat16(1e5) * np.ones(1, jnp.bfloat16)):
        with pytest.raises(InputError, match="The tensor a holds numbers larger than any of float16; choose another"):
            cast(np.asarray(x), "float16", "The tensor a")
    with pytest.raises(InputError, match="larger than any of bfloat16"):
        cast(np.float32([3.4e38]), jnp.bfloat16, "The tensor a")
    assert cast(np.float32([np.inf, 65504]), "float16", "x").tolist() == [np.inf, 65504]


def test_the_same_format_is_the_same_array():
    x = np.ones(3, np.float32)
    assert cast(x, "float32", "x") is x
