"""Cross-entropy of the next token, weighted per token."""

import jax
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
    loss = jax.nn.logsumexp(logits, axis=-1) - _of_target(logits, target)
    return (loss * weight).sum(), weight.sum()


def correct(logits: Float[Array, "b l v"], target: Int[Array, "b l"], weight: Float[Array, "b l"]) -> Float[Array, ""]:
    """The weight of the tokens whose target no other token beats."""
    # Not argmax: XLA's takes five times as long as the whole loss on a CPU.
    return ((logits.max(-1) <= _of_target(logits, target)) * weight).sum()


def _of_target(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Each token's logit of its target; a one-hot product stays local where the vocabulary is split over devices."""
    return (logits * jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype)).sum(-1)
