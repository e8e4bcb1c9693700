"""Relative positions as a bias of the scores: a number of its own for each head and each range of distances (T5).

    how far back   0  1  2  3  4–5  6–8  9 …   few ranges, wider with the distance (Raffel et al. 2020, section 2.1)

Distances are counted by labels (nn.attention), which are consecutive within a document: packed is alone.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec
from mmjax.nn.attention import Bias


@dataclass(frozen=True)
class Config:
    """heads: of queries. ranges: how many, of both sides together. furthest: from there on it is all one range.

    both: whether keys before and behind a query differ (encoders); else all that lies behind counts as distance 0.
    """

    heads: int
    ranges: int = 32
    furthest: int = 128
    both: bool = False

    def __post_init__(self):
        if self.side < 2 or self.ranges % 2 or self.furthest <= self.side // 2:
            raise InputError(
                f"{self.ranges} ranges of distances up to {self.furthest} cannot be made; give an even number, and a "
                f"distance beyond half of one side's."
            )

    @property
    def side(self) -> int:
        """Ranges of one side."""
        return self.ranges // 2 if self.both else self.ranges


def spec(cfg: Config) -> ParamSpec:
    """[heads, ranges]; of both sides the keys before a query, itself among them, come first."""
    return ParamSpec((cfg.heads, cfg.ranges), ("heads", None), Normal(0.02))


@functools.cache
def starts(cfg: Config) -> tuple[int, ...]:
    """The smallest distance of every range of a side but the first; half of them are of one distance each.

    In float32 and cut to whole numbers, as the published code does it.
    """
    exact = cfg.side // 2
    at = np.arange(1, cfg.furthest + 1)
    wide = np.log(at.astype(np.float32) / np.float32(exact)) / np.float32(math.log(cfg.furthest / exact))
    number = exact + np.trunc(wide * np.float32(cfg.side - exact)).astype(np.int64)
    number = np.where(at < exact, at, np.minimum(number, cfg.side - 1))
    return tuple(int(at[number >= n][0]) for n in range(1, cfg.side))


def bias(table: Float[Array, "h n"], cfg: Config, query: Int[Array, "b l"], key: Int[Array, "b s"]) -> Bias:
    """What nn.attention adds to the scores; `query` and `key` are labels."""
    return Bias(_function(cfg), table, query, key)


@functools.cache  # the same function for the same config: programs are kept by it
def _function(cfg: Config) -> Callable:
    steps = starts(cfg)

    def side(table: jax.Array, first: int, distance: jax.Array) -> jax.Array:
        """f32[B, heads, queries, keys]: choices of numbers, which every kernel knows, and no look-up."""

        def column(n: int) -> jax.Array:
            return table[:, first + n].astype(jnp.float32)[None, :, None, None]

        out = jnp.broadcast_to(column(0), (distance.shape[0], table.shape[0], *distance.shape[1:]))
        for n, start in enumerate(steps, 1):
            out = jnp.where((distance >= start)[:, None], column(n), out)
        return out

    def function(table: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
        back = query[:, :, None] - key[:, None, :]
        before = side(table, 0, back)
        return jnp.where((back < 0)[:, None], side(table, cfg.side, -back), before) if cfg.both else before

    return function
