"""What attention by intervals is tried on: every row of the interval table, and gradients through both results."""

import functools
import itertools

import dense
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.nn import attention
from mmjax.sequence import intervals


def masks(length):
    """Every row of the interval table at a length: (order, lo, hi) for at most `length` queries and keys."""
    rng = np.random.default_rng(length)
    cuts = np.sort(rng.choice(np.arange(1, length), min(5, length - 1), replace=False)) if length > 1 else []
    lengths = np.diff([0, *cuts, length]).tolist()  # documents or pictures of any length
    edges = np.cumsum([0, *lengths]).tolist()
    pictures = list(itertools.pairwise(edges))[1::2]
    both = intervals.bidirectional_images(length, pictures)
    at, media = edges[:-1], [1 + n // 2 for n in lengths]
    half = max(1, length // 2)
    features = [max(1, n // 2) for n in lengths][: max(1, length // 8)]
    order, (lo, hi) = intervals.perceiver(features, 3)
    kept = np.flatnonzero(rng.random(length) < 0.6)  # a cache, or keys that pruning left
    plain = {
        "causal": intervals.causal(length),
        "packed": intervals.packed(lengths),
        "prefix": intervals.prefix(length, half),
        "images": both,
        "sliding window": intervals.sliding_window(*both, max(1, length // 5)),
        "blocks": intervals.blocks(lengths),
        "last image": intervals.last_image(length, at, media),
        "all images": intervals.all_images(length, at[1:], media[1:]),
        "contrastive": intervals.qformer_contrastive(half, length - half),
        "generation": intervals.qformer_generation(half, length - half),
        "matching": intervals.qformer_matching(half, length - half),
    }
    out = {name: (np.arange(length), *pair) for name, pair in plain.items()}
    out["perceiver"] = (order, lo, hi)
    out["pruned"] = (kept, *intervals.causal(length))
    return out


def stack(cases, length):
    """The cases as rows of one batch; what is left of a row is empty."""
    pad = lambda x, fill: np.pad(x[:length], (0, length - len(x[:length])), constant_values=fill)  # noqa: E731
    fills = (-1, 0, -1)
    return tuple(
        jnp.asarray(np.stack([pad(np.asarray(c[i]), fill) for c in cases]), jnp.int32) for i, fill in enumerate(fills)
    )


def draw(rng, b, length, keys, heads, kv, size=6, v_size=10):
    shapes = (b, length, heads, size), (b, keys, kv, size), (b, keys, kv, v_size)
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


@functools.partial(jax.jit, static_argnames=("softcap", "function"))
def both_ways(qkv, see, cotangents, key_bias=None, sinks=None, params=None, where=None, softcap=None, function=None):
    """attend's results, and the gradients of their product with the cotangents."""

    def total(qkv, key_bias, sinks, params):
        bias = None if function is None else attention.Bias(function, params, *where)
        out, lse = attention.attend(*qkv, *see, key_bias=key_bias, sinks=sinks, bias=bias, softcap=softcap)
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return (out.astype(jnp.float32) * cotangents[0]).sum() + (finite * cotangents[1]).sum(), (out, lse)

    grads, (out, lse) = jax.grad(total, (0, 1, 2, 3), has_aux=True)(qkv, key_bias, sinks, params)
    return out, lse, grads


def close(name, got, expected, near):
    """Relative to the largest value, as sums of many terms are."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(got), finite, err_msg=name)
    size = np.abs(expected[finite]).max(initial=1.0)
    np.testing.assert_allclose(got[finite] / size, expected[finite] / size, rtol=0, atol=near, err_msg=name)


NEAR = {"float32": (1e-5, 1e-5), "bfloat16": (1e-2, 3e-2), "float16": (2e-3, 5e-3)}  # results, and gradients


def equals_a_dense_mask(rng, cases, length, heads, kv, dtype, size=6, v_size=10):
    """Asserts that attention agrees with float64: every mask a row of one batch; out, log-sum-exp and gradients."""
    see = stack(cases.values(), length)
    qkv = draw(rng, len(cases), length, length, heads, kv, size, v_size)
    qkv = tuple(np.asarray(jnp.asarray(x, dtype), np.float32) for x in qkv)
    cotangents = tuple(rng.normal(size=(len(cases), length, heads, *e)).astype(np.float32) for e in [(v_size,), ()])
    out, lse, (grads, *_) = both_ways(tuple(jnp.asarray(x, dtype) for x in qkv), see, cotangents)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    near, near_grad = NEAR[dtype]
    for row, name in enumerate(cases):
        one = tuple(x[row : row + 1] for x in (*qkv, *see, *cotangents))
        expected, expected_lse, _, wanted = dense.attention(*one[:3], dense.seen(*one[3:6]), d_out=one[6], d_lse=one[7])
        close(name, out[row], expected[0], near)
        close(name, lse[row], expected_lse[0], near)
        for got, which in zip(grads, "qkv", strict=True):
            close(name, got[row], wanted[which][0], near_grad)
