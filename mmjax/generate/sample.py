"""The next token from logits: greedy, or drawn after temperature, top-k, top-p and min-p; with a repetition penalty.

Every row has numbers and a seed of its own, and a row draws the same alone and in a batch. The processors and their
order are those of transformers' `generate`: penalty, temperature, top-k, top-p, min-p. Equal logits are kept or removed
together, and the first of them is the likeliest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from mmjax.core.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one row are chosen; what is left out changes nothing.

    temperature: logits are divided by it; 0 takes the likeliest token (and top-k, top-p, min-p then have no effect).
    top_k: only the k likeliest tokens; 0 for all.
    top_p: only the likeliest tokens that together have this probability (Holtzman et al. 2020, nucleus sampling).
    min_p: only tokens at least so likely, as a share of the likeliest's probability (Nguyen et al. 2024).
    repetition_penalty: logits of tokens that stand in the prompt or the answer are divided by it where they are
      positive, else multiplied (Keskar et al. 2019, CTRL, section 4.1, as transformers does it); 1 for none.
    seed: of the draws, 0 to 2**32 - 1.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        # Comparisons that NaN fails, too.
        for name, fine, allowed in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (all tokens) or more"),
            ("top_p", 0 <= self.top_p <= 1, "from 0 to 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 (1 is none)"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295"),
        ):
            if not fine:
                raise InputError(f"{name} is {getattr(self, name)}; give a number {allowed}.")


GREEDY = Sampling()
Field = Any  # an array on host or device


@dataclass(frozen=True)
class Switches:
    """What a program does at all: the static part of how a batch is sampled. Numbers change without compiling."""

    draw: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    penalty: bool = False


@flax.struct.dataclass
class Values:
    """The numbers of every row."""

    temperature: Field  # f32[B]
    top_k: Field  # i32[B]
    top_p: Field  # f32[B]
    min_p: Field  # f32[B]
    penalty: Field  # f32[B]
    seed: Field  # u32[B]


def prepare(rows: Sequence[Sampling]) -> tuple[Switches, Values]:
    """The static part of a batch's sampling, and its numbers; one Sampling per row."""
    drawn = [row for row in rows if row.temperature > 0]
    switches = Switches(
        draw=bool(drawn),
        top_k=any(row.top_k > 0 for row in drawn),
        top_p=any(row.top_p < 1 for row in drawn),
        min_p=any(row.min_p > 0 for row in drawn),
        penalty=any(row.repetition_penalty != 1 for row in rows),
    )
    return switches, Values(
        temperature=np.array([row.temperature for row in rows], np.float32),
        top_k=np.array([row.top_k for row in rows], np.int32),
        top_p=np.array([row.top_p for row in rows], np.float32),
        min_p=np.array([row.min_p for row in rows], np.float32),
        penalty=np.array([row.repetition_penalty for row in rows], np.float32),
        seed=np.array([row.seed for row in rows], np.uint32),
    )


def choose(
    logits: Float[Array, "b vocab"],
    tokens: Int[Array, "b s"],
    label: Int[Array, "b"],
    values: Values,
    switches: Switches,
) -> Int[Array, "b"]:
    """The next token of every row, i32[B].

    Args:
      logits: [B, V].
      tokens: i32[B, S], the prompt's and the answer's tokens in any order, -1 where there is none; read for the
        repetition penalty alone.
      label: i32[B], which token of its row is drawn: the same seed and label draw the same.
      values, switches: as `prepare` makes them.
    """
    logits, values = logits.astype(jnp.float32), jax.tree.map(jnp.asarray, values)
    if switches.penalty:
        logits = penalised(logits, tokens, values.penalty)
    likeliest = _first(logits)
    if not switches.draw:
        return likeliest
    left = filtered(logits, values, switches)

    def draw(seed: jax.Array, label: jax.Array, row: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), label)
        return row + jax.random.gumbel(key, row.shape)

    drawn = _first(jax.vmap(draw)(values.seed, label, left))
    return jnp.where(values.temperature > 0, drawn, likeliest)


def _first(x: Float[Array, "b vocab"]) -> Int[Array, "b"]:
    """Where the largest number of every row stands first. As an argmax, but XLA on CPUs has vectors for it: 5 times."""
    at = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    found = jnp.where(x == x.max(-1, keepdims=True), at, x.shape[1] - 1)
    return found.min(-1)


def penalised(
    logits: Float[Array, "b vocab"], tokens: Int[Array, "b s"], penalty: Float[Array, "b"]
) -> Float[Array, "b vocab"]:
    """Logits with those of tokens that were said already made smaller."""
    vocab = logits.shape[1]
    said = jnp.take_along_axis(logits, jnp.clip(tokens, 0, vocab - 1), axis=1)
    said = jnp.where(said < 0, said * penalty[:, None], said / penalty[:, None])
    # Past the end is dropped; a token that stands twice gets the same number twice.
    at = jnp.where((tokens >= 0) & (tokens < vocab), tokens, vocab)
    return jax.vmap(lambda row, i, new: row.at[i].set(new, mode="drop"))(logits, at, said)


def filtered(logits: Float[Array, "b vocab"], values: Values, switches: Switches) -> Float[Array, "b vocab"]:
    """Logits after temperature, top-k, top-p and min-p: -inf where removed, and 0 for the likeliest.

    The likeliest always stays. Rows of temperature 0 are not to be read.
    """
    # From the top, so that no temperature makes them overflow.
    left = logits - logits.max(-1, keepdims=True)
    left = left / jnp.where(values.temperature > 0, values.temperature, 1.0)[:, None]
    top = left == 0
    if switches.top_k:
        count = jnp.where(values.top_k > 0, jnp.minimum(values.top_k, left.shape[1]), left.shape[1])
        keys, others = _rising(left), (left.shape[1] - count).astype(jnp.float32)
        left = jnp.where(keys >= _largest(keys, jnp.ones_like(left), others)[:, None], left, -jnp.inf)
    if switches.top_p:
        keys, mass = _rising(left), jnp.exp(left)
        cut = _largest(keys, mass, (1 - values.top_p) * mass.sum(-1))
        nucleus = (keys >= cut[:, None]) | (values.top_p >= 1)[:, None]
        left = jnp.where(nucleus | top, left, -jnp.inf)
    if switches.min_p:
        left = jnp.where((jnp.exp(left) >= values.min_p[:, None]) | top, left, -jnp.inf)
    return left


def _rising(x: Float[Array, "b vocab"]) -> UInt32[Array, "b vocab"]:
    """Integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(
    keys: UInt32[Array, "b vocab"], weight: Float[Array, "b vocab"], room: Float[Array, "b"]
) -> UInt32[Array, "b"]:
    """The largest number that keys below it do not weigh more than `room` together.

    Bit by bit, in 32 passes over the row: a vocabulary takes longer to sort, and much longer on a TPU.
    """

    def bit(n: jax.Array, found: jax.Array) -> jax.Array:
        more = found | (jnp.uint32(1 << 31) >> n.astype(jnp.uint32))
        below = jnp.where(keys < more[:, None], weight, 0.0).sum(-1)
        return jnp.where(below <= room, more, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(keys[:, 0]))
