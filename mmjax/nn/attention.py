"""Attention by intervals: a query sees exactly the keys with lo <= order <= hi.

    key order   0 1 2 3 4 5 6 7 -1        two packed documents (0-3, 4-7) and an empty slot
    query 0     x                         lo 0 hi 0
    query 1     x x                       lo 0 hi 1
    query 4             x                 lo 4 hi 4
    query 6             x x x             lo 4 hi 6
    query -                               lo 0 hi -1: sees nothing, gives zeros

A label of -1 is never seen, because lo >= 0 wherever lo <= hi. Mask memory is O(L): no [L, S] array outlives a block.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 512  # keys per block: a row up to this long is one block, and then there is no loop at all


def attend(
    q: Float[Array, "b l h e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k ev"],
    order: Int[Array, "b s"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
) -> tuple[Float[Array, "b l h ev"], Float[Array, "b l h"]]:
    """softmax(q kᵀ / sqrt(E)) v over the keys each query sees (Dao et al. 2022, algorithm 1, for the running maximum).

    Query head h reads key head h // (H / K) (grouped queries). Scores and sums are float32.

    Args:
      q: [B, L, H, E].
      k, v: [B, S, K, E] and [B, S, K, Ev]; K divides H.
      order: i32[B, S], the keys' labels, -1 in empty slots.
      lo, hi: i32[B, L], inclusive; lo > hi sees nothing.

    Returns:
      out [B, L, H, Ev] in v's dtype, and the log-sum-exp of the scores f32[B, L, H]. A query that sees nothing gets
      zeros, -inf and no gradient.
    """
    b, length, heads, size = q.shape
    keys = k.shape[2]
    # Heads before positions: the CPU's batched products are twice as fast with rows of keys next to each other.
    q = (q * size**-0.5).reshape(b, length, keys, heads // keys, size).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if k.shape[2] <= BLOCK:
        total, out, top = _block(q, k, v, order, lo, hi)
    else:
        total, out, top = _blocks(q, k, v, order, lo, hi)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out = (out / safe[..., None]).astype(v.dtype)
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
    out = out.transpose(0, 3, 1, 2, 4).reshape(b, length, heads, -1)
    return out, lse.transpose(0, 3, 1, 2).reshape(b, length, heads)


def _block(q, k, v, order, lo, hi):
    """Sum of weights, weighted values (both relative to exp(top)) and the maximum score, over one block of keys."""
    score = jnp.einsum("bkgle,bkse->bkgls", q, k, preferred_element_type=jnp.float32)
    visible = (lo[:, :, None] <= order[:, None, :]) & (order[:, None, :] <= hi[:, :, None])
    visible = visible[:, None, None]
    # A finite floor: a row that sees nothing must give exp(...) = 0 below and no NaN in its gradient.
    top = jax.lax.stop_gradient(jnp.max(score, axis=-1, initial=-1e30, where=visible))
    weight = jnp.where(visible, jnp.exp(jnp.where(visible, score - top[..., None], 0.0)), 0.0)
    out = jnp.einsum("bkgls,bkse->bkgle", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return weight.sum(-1), out, top


def _blocks(q, k, v, order, lo, hi):
    """The same over many blocks, one alive at a time, forwards and backwards."""
    count = -(-k.shape[2] // BLOCK)
    pad = count * BLOCK - k.shape[2]

    def cut(x, axis, fill):
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, BLOCK, *x.shape[axis + 1 :]), axis, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry, block):
        total, out, top = carry
        more, more_out, more_top = _block(q, *block, lo, hi)
        new = jnp.maximum(top, more_top)
        a, c = jnp.exp(top - new), jnp.exp(more_top - new)
        return (a * total + c * more, a[..., None] * out + c[..., None] * more_out, new), None

    shape = q.shape[:-1]
    start = (jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1])), jnp.full(shape, -1e30))
    return jax.lax.scan(step, start, (cut(k, 2, 0), cut(v, 2, 0), cut(order, 1, -1)))[0]
