"""Resizing pictures on device, as Pillow does it, for hosts whose CPUs are the bottleneck.

A picture lies in the upper left corner of a larger canvas, so that pictures of all sizes share a few compiled programs.
Each direction is one matrix product with the filter's weights, which are made from the sizes on device. Both results
are rounded to bytes, as Pillow's are, so it matters which direction comes first.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from mmjax.core.errors import InputError

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}  # source pixels on each side, when nothing shrinks


def kernel(x: Float[Array, "..."], filter: str, a: float = -0.5) -> Float[Array, "..."]:
    """A filter's value at a distance in source pixels: the triangle, Keys's cubic with parameter a, or Lanczos's of 3.

    Keys 1981, equation 4; Pillow's cubic has a = -0.5, torch's without antialiasing -0.75.
    """
    x = jnp.abs(x)
    if filter == "bilinear":
        return jnp.maximum(1.0 - x, 0.0)
    if filter == "bicubic":
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        return jnp.where(x <= 1, near, jnp.where(x < 2, far, 0.0))
    return jnp.where(x < 3.0, jnp.sinc(x) * jnp.sinc(x / 3.0), 0.0)


def weights(
    before: Int[Array, ""] | int,
    after: Int[Array, ""] | int,
    start: Int[Array, ""] | int,
    shape: tuple[int, int],
    filter: str = "bicubic",
) -> Float[Array, "outputs inputs"]:
    """How much each source pixel of a line counts for each output pixel: f32[outputs, inputs].

    Args:
      before, after: pixels of the line, and of the resized one; up to 16,384 each.
      start: which of the resized line's pixels is the first output; outputs outside the line weigh 0.
      shape: (outputs, inputs), at least as many as there are.
      filter: Pillow's filter of that name; where the line shrinks it is widened, so that it averages.
    """
    before, after, start = (jnp.asarray(n, jnp.int32) for n in (before, after, start))
    i = jnp.arange(shape[0], dtype=jnp.int32)[:, None] + start
    x = jnp.arange(shape[1], dtype=jnp.int32)[None]
    # The distance of two pixels' centres is a fraction of integers: exact, where floats of 32 bits would not be.
    distance = ((2 * i + 1) * before - (2 * x + 1) * after).astype(jnp.float32) / (2 * after).astype(jnp.float32)
    scale = jnp.maximum(before.astype(jnp.float32) / after.astype(jnp.float32), 1.0)
    out = kernel(distance / scale, filter)
    # The first and the last source pixel that Pillow looks at: it takes none that is only touched beyond its centre.
    reach = SUPPORT[filter] * scale
    seen = (jnp.abs(distance) < reach) & (x < before) & (i >= 0) & (i < after)
    out = jnp.where(seen, out, 0.0)
    return out / jnp.where(seen.any(1), out.sum(1), 1.0)[:, None]


def rows_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether Pillow 13 resizes a picture's columns of pixels before its lines.

    It does where the height shrinks by more than twice as many pixels as the width (pull request 9549; found by trying
    4,000 sizes). Pillow 12 and older never do: such pictures differ between them by a grey level or two.
    """
    return before[0] - after[0] > 2 * max(0, before[1] - after[1])


def resize(
    images: UInt8[Array, "b height width c"],
    before: Int[Array, "b 2"],
    after: Int[Array, "b 2"],
    shape: tuple[int, int],
    *,
    start: Int[Array, "b 2"] | None = None,
    filter: str = "bicubic",
    rows_first: bool = False,
) -> UInt8[Array, "b rows columns c"]:
    """Pictures in the upper left corners of their canvases → pictures in the upper left corners of others.

    Equal to Pillow's `Image.resize` within 1 grey level; nearly all bytes are equal.

    Args:
      images: u8[B, H, W, C].
      before: height and width of every picture; what lies beyond is not looked at.
      after: height and width to resize it to. Sides may be up to 16,384 pixels.
      shape: rows and columns of the output: static.
      start: the first row and column of the resized picture that is wanted, for a window of it (a tile); beyond the
        picture there is 0.
      filter: "bilinear", "bicubic" or "lanczos".
      rows_first: the order, for all pictures: static; see the function of that name.

    Raises:
      InputError: an unknown filter.
    """
    if filter not in SUPPORT:
        raise InputError(f"{filter!r} is not a filter; give one of {', '.join(SUPPORT)}.")
    start = jnp.zeros_like(after) if start is None else start

    def one(image: Array, before: Array, after: Array, start: Array) -> Array:
        across = weights(before[1], after[1], start[1], (shape[1], image.shape[1]), filter)
        down = weights(before[0], after[0], start[0], (shape[0], image.shape[0]), filter)
        if rows_first:
            return _product("ow,pwc->poc", across, _product("ph,hwc->pwc", down, image))
        return _product("ph,hoc->poc", down, _product("ow,hwc->hoc", across, image))

    return jax.vmap(one)(images, before, after, start)


def _product(subscripts: str, weights: Array, pixels: Array) -> Array:
    """In full precision, for TPUs would round the weights to 8 bits; to the nearest byte, halves up."""
    out = jnp.einsum(subscripts, weights, pixels.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.clip(jnp.floor(out + 0.5), 0, 255).astype(jnp.uint8)
