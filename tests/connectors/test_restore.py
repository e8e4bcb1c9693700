"""Slice restoration against NumPy, on stitched slices beside pictures that are alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.connectors import restore
from mmjax.core.errors import InputError

CFG = restore.Config(width=8, side=2, heads=2, head=3)
# A view of the whole, 2 × 3 slices of 2 × 3 patches, a picture of one patch, one of 5 × 2, and none.
GRID = [(1, 3, 3), *[(1, 2, 3)] * 6, (1, 1, 1), (1, 5, 2), (0, 0, 0)]
SLICES = [(0, 1, 1), *[(1, 2, 3)] * 6, (7, 1, 1), (8, 1, 1), (9, 0, 0)]
SPARE = 4


def row(grid=GRID):
    image = np.concatenate([[i] * int(np.prod(g)) for i, g in enumerate(grid)] + [[-1] * SPARE])
    order = np.where(image >= 0, np.arange(len(image)), -1)
    return {name: jnp.asarray(a, jnp.int32)[None] for name, a in (("image", image), ("order", order), ("grid", grid))}


def oracle(x, params, cfg):
    """H + local(H) + upsample(attention(downsample(H))) of one map [rows, columns, width], in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    rows, columns, width = x.shape
    pad = np.pad(x.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
    local = sum(pad[i : i + rows, j : j + columns] * p["local"]["kernel"][i, j] for i in range(3) for j in range(3))

    def bins(n):
        return [(i * n // cfg.side, -(-(i + 1) * n // cfg.side)) for i in range(cfg.side)]

    small = [x[a:b, c:d].mean((0, 1)) for a, b in bins(rows) for c, d in bins(columns)]
    small = np.stack(small).astype(np.float64)
    q, k, v = (np.einsum("td,dhe->hte", small, p[name]["kernel"]) for name in "qkv")
    score = np.einsum("hte,hse->hts", q, k) / np.sqrt(cfg.head)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    small = np.einsum("hts,hse,hed->td", weight, v, p["out"]["kernel"]).reshape(cfg.side, cfg.side, width)

    def read(n):
        at = np.clip((np.arange(n) + 0.5) * cfg.side / n - 0.5, 0, cfg.side - 1)
        return np.stack([np.interp(at, np.arange(cfg.side), unit) for unit in np.eye(cfg.side)], -1)

    return x + local + p["local"]["bias"] + np.einsum("yi,xj,ijd->yxd", read(rows), read(columns), small)


@jax.jit
def run(params, x, see, slices):
    return restore.apply(params, x, CFG, slices=slices, **see)


def test_slices_are_seen_as_the_whole(rng):
    params, see = randomised(restore.spec(CFG)), row()
    x = rng.normal(size=(see["order"].shape[1], 8)).astype(np.float32)
    got = run(params, jnp.asarray(x)[None], see, jnp.asarray([SLICES], jnp.int32))[0]
    stop = np.cumsum(np.prod(GRID, axis=1))

    def of(i, a):
        return np.asarray(a[stop[i] - np.prod(GRID[i]) : stop[i]]).reshape(*GRID[i][1:], 8)

    def whole(a):
        return np.concatenate([np.concatenate([of(1 + 3 * i + j, a) for j in range(3)], 1) for i in range(2)], 0)

    np.testing.assert_allclose(whole(got), oracle(whole(x), params, CFG), atol=2e-5)
    for i in (0, 7, 8):
        np.testing.assert_allclose(of(i, got), oracle(of(i, x), params, CFG), atol=2e-5)

    # As pictures of their own, which is what no slices mean, they see other neighbours.
    apart = run(params, jnp.asarray(x)[None], see, jnp.asarray([[(i, 1, 1) for i in range(10)]], jnp.int32))[0]
    np.testing.assert_allclose(of(3, apart), oracle(of(3, x), params, CFG), atol=2e-5)
    assert np.abs(of(3, apart) - of(3, got)).max() > 0.1
    np.testing.assert_allclose(of(8, apart), of(8, got), atol=2e-5)
    plain = jax.jit(lambda x: restore.apply(params, x, CFG, **see))(jnp.asarray(x)[None])[0]
    np.testing.assert_allclose(plain, apart, atol=1e-6)


def test_empty_places_do_not_matter_and_gradients_are_finite(rng):
    params, see = randomised(restore.spec(CFG)), row()
    x = jnp.asarray(rng.normal(size=(1, see["order"].shape[1], 8)), jnp.float32)
    slices = jnp.asarray([SLICES], jnp.int32)
    exists = np.asarray(see["order"][0]) >= 0
    out = run(params, x, see, slices)
    other = run(params, x.at[:, ~exists].set(1e6), see, slices)
    np.testing.assert_array_equal(out[:, exists], other[:, exists])

    def loss(params, x):
        return jnp.sin(run(params, x, see, slices))[:, exists].sum()

    grads = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    assert all(np.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads))
    assert (grads[1][:, ~exists] == 0).all()


def test_tokens():
    assert CFG.tokens((1, 3, 4)) == 12
    with pytest.raises(InputError, match="every frame a picture"):
        CFG.tokens((2, 3, 4))
