"""Attention pooling against its formula in NumPy, picture by picture."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import randomised

from mmjax.nn import attention_pool

CFG = attention_pool.Config(width=12, heads=3, hidden=10, activation="relu", epsilon=1e-5)


def formula(p: dict, x: np.ndarray) -> np.ndarray:
    """One picture's features [P, D] → [D], in float64."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), p), np.asarray(x, np.float64)
    q = np.einsum("d,dhe->he", p["probe"][0], p["q"]["kernel"]) + p["q"]["bias"]
    k, v = (np.einsum("pd,dhe->phe", x, p[n]["kernel"]) + p[n]["bias"] for n in ("k", "v"))
    s = np.exp(np.einsum("he,phe->hp", q, k) / 2)  # heads of 4
    out = np.einsum("hp,phe->he", s / s.sum(-1, keepdims=True), v)
    out = np.einsum("he,hed->d", out, p["out"]["kernel"]) + p["out"]["bias"]
    h = (out - out.mean()) / np.sqrt(out.var() + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    h = np.maximum(h @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"], 0)
    return out + h @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]


def test_formula(rng):
    params = randomised(attention_pool.spec(CFG))
    x = jnp.asarray(rng.normal(size=(2, 9, 12)), jnp.float32)
    order = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, -1, -1]] * 2, jnp.int32)
    lo, hi = jnp.asarray([[0, 5, 0]] * 2, jnp.int32), jnp.asarray([[4, 6, -1]] * 2, jnp.int32)
    got = jax.jit(lambda p: attention_pool.apply(p, x, CFG, order=order, lo=lo, hi=hi))(params)
    for b in range(2):
        np.testing.assert_allclose(got[b, 0], formula(params, x[b, :5]), rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(got[b, 1], formula(params, x[b, 5:7]), rtol=2e-5, atol=2e-5)
    assert np.isfinite(got).all()  # the third picture has nothing to look at
