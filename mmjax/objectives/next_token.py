"""Cross-entropy of the next token, weighted per token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def loss(
    logits: Float[Array, "b l v"], target: Int[Array, "b l"], weight: Float[Array, "b l"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weight × −log p(target), sum of weight).

    Args:
      logits: f32[B, L, V].
      target: i32[B, L], in range even where the weight is 0.
      weight: f32[B, L], 0 for prompt, media and padding.
    """
    # A one-hot product instead of a gather: it stays local where the vocabulary is split over devices.
    hit = jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype)
    loss = jax.nn.logsumexp(logits, axis=-1) - (logits * hit).sum(-1)
    return (loss * weight).sum(), weight.sum()


def correct(
    logits: Float[Array, "b l v"], target: Int[Array, "b l"], weight: Float[Array, "b l"]
) -> Float[Array, ""]:
    """The weight of the tokens whose target has the largest logit."""
    return ((jnp.argmax(logits, -1) == target) * weight).sum()
