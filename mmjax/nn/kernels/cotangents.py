"""What the backward pass of every kernel of attention has in common."""

import jax
import jax.numpy as jnp

from mmjax.core import sharding
from mmjax.nn.kernels.inputs import Inputs, Static


def delta(out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array) -> jax.Array:
    """What comes off every d p of a query: d score = p (d p - delta). f32[B, K, G, L].

    Where nothing is seen, lse is -inf whatever the inputs are: its cotangent ends there.
    """
    own = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    return own - jnp.where(jnp.isfinite(lse), d_lse, 0.0)


def of_sinks(sinks: jax.Array, out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array) -> jax.Array:
    """The cotangent f32[K, G] of the sinks, from the results over all keys and their cotangents."""
    alive = jnp.isfinite(lse)
    p = jnp.exp(sinks.astype(jnp.float32)[None, :, :, None] - jnp.where(alive, lse, 0.0))
    return -(jnp.where(alive, p, 0.0) * delta(out, lse, d_out, d_lse)).sum((0, 3))


def settled(static: Static, found: Inputs, primal: Inputs) -> Inputs:
    """Cotangents as their inputs are: shared by as many devices, and of their types, or float32 where `static.wide`."""
    return jax.tree.map(
        lambda d, a: None if d is None else sharding.unvary(d, a).astype(jnp.float32 if static.wide else a.dtype),
        found,
        primal,
        is_leaf=lambda d: d is None,
    )
