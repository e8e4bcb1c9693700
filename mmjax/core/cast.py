"""Numbers in another floating-point format, on the host."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.core.errors import InputError


def cast(x: np.ndarray, dtype: Any, what: str) -> np.ndarray:
    """x in another floating-point format, rounded to the nearest, ties to even; x itself where it has it already.

    Raises:
      InputError: a number of x is larger than any of the format.
    """
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x
    if x.dtype == np.float64 and dtype.itemsize < 4:
        # By way of float32, whose last bit keeps a number that was cut off a tie.
        near = x.astype(np.float32)
        wide = near.astype(np.float64)
        inner = np.where(np.abs(wide) > np.abs(x), np.nextafter(near, np.float32(0)), near)
        x = (inner.view(np.uint32) | (inner.astype(np.float64) != x)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        out = x.astype(dtype)
    narrower = jnp.finfo(dtype).max < jnp.finfo(x.dtype).max
    if narrower and np.count_nonzero(~np.isfinite(out)) > np.count_nonzero(~np.isfinite(x)):
        raise InputError(f"{what} holds numbers larger than any of {dtype}; choose another format (dtype)")
    return out
