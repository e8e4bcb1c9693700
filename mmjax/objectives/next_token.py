"""Cross-entropy of the next token, weighted per token."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.core import meshes, sharding


class Loss(NamedTuple):
    """Sums over tokens, and what a z-loss needs."""

    loss: jax.Array  # f32[], sum of weight × −log p(target)
    weight: jax.Array  # f32[], sum of the weights
    correct: jax.Array  # f32[], sum of the weights of the tokens whose target no other token beats
    log_partition: jax.Array  # f32[B, L], log-sum-exp of a token's logits

    def z(self, weight: Float[Array, "b l"]) -> jax.Array:
        """Sum of weight × log_partition², which keeps logits from drifting (Chowdhery et al. 2022, PaLM, section 5)."""
        return (weight * jnp.square(self.log_partition)).sum()


def loss(
    logits: Callable[[jax.Array], jax.Array],
    hidden: Float[Array, "b l d"],
    target: Int[Array, "b l"],
    weight: Float[Array, "b l"],
    *,
    chunk: int = 128,
    params: Any = None,
) -> Loss:
    """The loss without [B, L, V] logits: they exist for `chunk` tokens of every row at a time, forwards and backwards.

    The backward pass computes each chunk's logits again: a third more products for memory that does not grow with L.
    Where rows are split along their length, each device takes `chunk` of its own tokens at a time.

    Args:
      logits: hidden states [B, n, D] → logits f32[B, n, V], token by token (a head with its parameters bound), or
        (params, hidden states) → logits where `params` are given. V may be split over devices.
      hidden: [B, L, D].
      target: i32[B, L], in range even where the weight is 0.
      weight: f32[B, L], 0 for prompt, media and padding.
      chunk: tokens of a row on a device; one that has no more goes in one piece and is computed once.
      params: the head's, a tree of arrays. Unless V is split over devices, they are then gathered once, and their
        gradients summed over devices once; else for every chunk.
    """
    bound = logits if params is None else functools.partial(logits, params)

    def part(head: Callable, hidden: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        scores = head(hidden)
        return _log_partition(scores), _of_target(scores, target), scores.max(-1)

    rows, split = meshes.fitting(("batch", "length"), target.shape)
    length = target.shape[1] // (meshes.parts("length") if split else 1)
    if length <= chunk:
        log_partition, picked, best = part(bound, hidden, target)
    else:
        count = -(-length // chunk)
        whole, turns = (rows, split), (None, rows, split)

        def cut(hidden: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
            """A device's own tokens in chunks [count, B, chunk, …], so that all devices work in every turn."""

            def one(x: jax.Array) -> jax.Array:
                x = jnp.pad(x, [(0, count * chunk - length if axis == 1 else 0) for axis in range(x.ndim)])
                return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

            return one(hidden), one(target)

        def join(*parts: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length] for x in parts)

        def each(head: Callable, cuts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            return jax.lax.map(jax.checkpoint(lambda xs: part(head, *xs), prevent_cse=False), cuts)

        def apart(params: Any, hidden: jax.Array, target: jax.Array) -> tuple[jax.Array, ...]:
            """On each device, which adds up its own gradient of the head."""
            head = functools.partial(logits, sharding.vary(params, (hidden, target)))
            return join(*each(head, cut(hidden, target)))

        if params is not None and meshes.parts("vocab") == 1:
            of_head = jax.tree.map(lambda p: (None,) * p.ndim, params)
            out = sharding.local(apart, (params, hidden, target), (of_head, (*whole, None), whole), (whole,) * 3)
        else:
            cuts = sharding.local(cut, (hidden, target), ((*whole, None), whole), ((*turns, None), turns))
            out = sharding.local(join, each(bound, cuts), (turns,) * 3, (whole,) * 3)
        log_partition, picked, best = out
    return Loss(
        ((log_partition - picked) * weight).sum(), weight.sum(), ((best <= picked) * weight).sum(), log_partition
    )


def _log_partition(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1)


def _of_target(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Each token's logit of its target; a one-hot product stays local where the vocabulary is split over devices."""
    return (logits * jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype)).sum(-1)
