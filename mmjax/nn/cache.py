"""Keys and values of tokens that have been through the blocks: what a decoder keeps from one token to the next.

    place   0  1  2  3  4  5  6  7
    order   0  1  2 -1  3  4 -1 -1      a prompt of 3 tokens, a place of padding, two tokens of the answer; room for 2
                              ↑ at      where the next token goes, of all rows alike

Shapes are static: rows of different length have padding, whose label −1 nobody sees (see nn.attention). Labels travel
with the tokens, so a place says nothing, and intervals mean what they mean in a whole row.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmjax.core import sharding

AXES = ("batch", "heads", None, None)


@flax.struct.dataclass
class KVCache:
    """Of all layers: either stacked, for a scan over them, or a tuple of one array for each, where they are unrolled.

    Heads stand before places: products with queries then read each head's keys as they lie.
    """

    k: Any  # [layers, B, K, S, E], or so many [B, K, S, E]
    v: Any
    order: Any  # i32[B, S], the label of the token in each place, -1 where there is none
    at: Any  # i32[], the next place to write
    media: Any = None  # of layers that look at media by cross-attention: a KVCache of media tokens

    @property
    def places(self) -> int:
        """S."""
        return self.order.shape[1]


@flax.struct.dataclass
class Past:
    """What a block is given of a cache: its own arrays, or all of them and the number of its layer."""

    k: Any
    v: Any
    at: Any
    layer: Any = None  # i32[]


def empty(
    layers: int, rows: int, heads: int, places: int, head: int, dtype: Any = jnp.float32, *, stacked: bool = True
) -> KVCache:
    """A cache with nothing in it, of so many key heads of `head` values.

    Args:
      layers, rows, heads, places, head: sizes (layers, B, K, S, E).
      dtype: of keys and values.
      stacked: for blocks whose parameters are stacked; else for a tuple of blocks (nn.transformer.unstack).
    """

    def array() -> jax.Array:
        return sharding.constrain(jnp.zeros((rows, heads, places, head), dtype), AXES)

    def stack() -> jax.Array:
        return sharding.constrain(jnp.zeros((layers, rows, heads, places, head), dtype), (None, *AXES))

    make = stack if stacked else lambda: tuple(array() for _ in range(layers))
    return KVCache(make(), make(), jnp.full((rows, places), -1, jnp.int32), jnp.zeros((), jnp.int32))


def labelled(cache: KVCache, order: Int[Array, "b l"]) -> KVCache:
    """The cache with the labels of the next L tokens in their places, and `at` past them.

    Nothing is checked in here: past the last place JAX would silently write over what is there. Whoever knows how many
    tokens there are must have made the cache large enough (generate.session does).
    """
    new = jax.lax.dynamic_update_slice_in_dim(cache.order, order, cache.at, 1)
    return cache.replace(order=new, at=cache.at + np.int32(order.shape[1]))


def put(past: Past, k: Float[Array, "b l k e"], v: Float[Array, "b l k e"]) -> Past:
    """With the keys and values of L tokens written from place `at` on."""

    def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
        new = sharding.constrain(new.transpose(0, 2, 1, 3).astype(buffer.dtype), AXES)
        zero = jnp.zeros((), past.at.dtype)
        start: Sequence[Any] = (zero, zero, past.at, zero)
        if past.layer is None:
            return jax.lax.dynamic_update_slice(buffer, new, start)
        return jax.lax.dynamic_update_slice(buffer, new[None], (past.layer.astype(past.at.dtype), *start))

    return past.replace(k=write(past.k, k), v=write(past.v, v))


def layer(past: Past) -> tuple[Float[Array, "b k s e"], Float[Array, "b k s e"]]:
    """This layer's keys and values."""
    if past.layer is None:
        return past.k, past.v
    k, v = (jax.lax.dynamic_index_in_dim(x, past.layer, keepdims=False) for x in (past.k, past.v))
    return k, v
