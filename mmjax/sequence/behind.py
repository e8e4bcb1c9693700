"""Learned tokens that every picture of a row brings along: latents of a resampler, class and register tokens.

Their places are behind all patches of the row, picture after picture. Their labels alternate with the patches', so that
what a picture sees stays one interval, its own patches and tokens:

    places      a a a b b  A A B B        pictures a and b, two tokens each
    labels      0 1 2 5 6  3 4 7 8
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.core import sharding


def ends(
    image: Int[Array, "b s"], order: Int[Array, "b s"], pictures: int
) -> tuple[Int[Array, "b n"], Int[Array, "b n"]]:
    """Where each picture's labels start and stop (one past the last) in a packed row; start = stop where it has none.

    Counted, not read off the grid: a picture's features may have a class token, and its text has no grid.
    """
    here = image[:, :, None] == jnp.arange(pictures, dtype=jnp.int32)[None, None]
    stop = jnp.max(jnp.where(here, (order + 1)[:, :, None], 0), axis=1, initial=0)
    stop = jax.lax.cummax(stop, axis=1)
    return jnp.pad(stop[:, :-1], ((0, 0), (1, 0))), stop


def labels(
    image: Int[Array, "b p"], order: Int[Array, "b p"], grid: Int[Array, "b n 3"], many: int, counted: bool = False
) -> tuple[Int[Array, "b s"], Int[Array, "b m"], Int[Array, "b m"]]:
    """Labels of a row's patches and of the tokens behind them, and what these see (see intervals.perceiver).

    Args:
      image, order: i32[B, P], the picture of each patch and its label, counted through the row; -1 in empty places.
      grid: i32[B, N, 3], (frames, rows, columns) of each picture, zeros where there is none.
      many: how many tokens each picture has.
      counted: whether a picture's places are counted, as where class tokens are among them, and not read off its grid.

    Returns:
      The labels i32[B, P + N × many], -1 where there is nothing; and lo and hi of the tokens, i32[B, N × many].
    """
    b, n, _ = grid.shape
    count = grid.prod(-1)
    some = count > 0
    stop = jnp.cumsum(count, axis=1)
    if counted:
        start, stop = ends(image, order, n)
        count = stop - start
    first = (stop - count) + jnp.arange(n, dtype=jnp.int32)[None] * many
    own = (first + count)[:, :, None] + jnp.arange(many, dtype=jnp.int32)[None, None]
    own = jnp.where(some[:, :, None], own, -1).reshape(b, n * many)
    patches = jnp.where(order >= 0, order + image * many, -1)
    lo = jnp.repeat(jnp.where(some, first, 0), many, axis=1)
    hi = jnp.repeat(jnp.where(some, first + count + many - 1, -1), many, axis=1)
    return jnp.concatenate([patches, own], axis=1), lo, hi


def present(grid: Int[Array, "b n 3"], many: int) -> Bool[Array, "b m"]:
    """Which of the tokens exist: those of pictures that do."""
    return jnp.repeat(grid.prod(-1) > 0, many, axis=1)


def within(image: Int[Array, "b p"], order: Int[Array, "b p"], grid: Int[Array, "b n 3"]) -> Int[Array, "b p"]:
    """The number of each patch in its own picture, -1 in empty places."""
    count = grid.prod(-1)
    first = jnp.cumsum(count, axis=1) - count
    return jnp.where(order >= 0, order - sharding.take_rows(first, image), -1)


def start(tokens: Float[Array, "m d"], x: Float[Array, "b p _"], pictures: int) -> Float[Array, "b s d"]:
    """The learned tokens once for each picture of each row, typed as x is."""
    # In float32 first: the tokens' gradient is a sum over all pictures of all rows.
    wide = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))
    out = jnp.repeat(jnp.tile(wide, (pictures, 1))[None], x.shape[0], axis=0).astype(x.dtype)
    # Inside a shard_map the loop's state varies from device to device, as the features do, and must from the start.
    return sharding.constrain(sharding.vary(out, x), ("batch", None, None))
