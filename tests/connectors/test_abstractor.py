"""The convolutional abstractor: packed = alone, what is missing does not matter (its numbers: tests/parity)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.connectors import abstractor
from mmjax.core.errors import InputError

CFG = abstractor.Config(6, 4, 5, side=2, depth=1, positions=3, prenorm=True, eos=1)
GRIDS = [(3, 4), (1, 1), (2, 5)]
PLACES = 30


def row(grids, rng, count=4):
    sizes = [a * b for a, b in grids]
    image = np.concatenate([[i] * n for i, n in enumerate(sizes)] + [[-1] * (PLACES - sum(sizes))])
    order = np.where(image >= 0, np.arange(PLACES), -1)
    grid = [(1, *g) for g in grids] + [(0, 0, 0)] * (count - len(grids))
    see = {name: jnp.asarray(a, jnp.int32)[None] for name, a in (("image", image), ("order", order), ("grid", grid))}
    return jnp.asarray(rng.normal(size=(1, PLACES, 6)), jnp.float32), see


@functools.partial(jax.jit, static_argnums=0)
def run(cfg, params, x, see):
    return abstractor.apply(params, x, cfg, **see)


def test_packed_is_alone(rng):
    params = randomised(abstractor.spec(CFG))
    x, see = row(GRIDS, rng)
    out = run(CFG, params, x, see)
    assert out.shape == (1, 4 * CFG.media, 5)
    np.testing.assert_array_equal(abstractor.present(see["grid"], CFG)[0], [True] * 15 + [False] * 5)
    start = 0
    for i, (rows, columns) in enumerate(GRIDS):
        n = rows * columns
        _, see_one = row([(rows, columns)], rng)
        one = jnp.zeros_like(x).at[:, :n].set(x[:, start : start + n])
        alone = run(CFG, params, one, see_one)
        at = slice(i * CFG.media, (i + 1) * CFG.media)
        np.testing.assert_allclose(out[:, at], alone[:, : CFG.media], atol=1e-6)
        start += n
    # Neighbours count, and each picture's own only.
    moved = run(CFG, params, x.at[:, 0, 0].add(1.0), see)
    assert np.abs(moved[:, :4] - out[:, :4]).max() > 1e-3
    np.testing.assert_array_equal(moved[:, 5:15], out[:, 5:15])
    np.testing.assert_array_equal(out[0, 4], params["eos"][0])


def test_missing_pictures_are_harmless(rng):
    """A hole between pictures, empty places full of anything: finite, and no gradient."""
    params = randomised(abstractor.spec(CFG))
    x, see = row(GRIDS, rng)
    exists = np.asarray(see["order"][0]) >= 0
    keep = np.asarray(abstractor.present(see["grid"], CFG)[0])
    out = run(CFG, params, x, see)
    other = run(CFG, params, x.at[:, ~exists].set(-1e5), see)
    np.testing.assert_array_equal(out[:, keep], other[:, keep])

    def loss(params, x):
        return jnp.sin(run(CFG, params, x, see)[:, keep]).sum()

    grads = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    assert all(np.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads))
    assert (grads[1][:, ~exists] == 0).all()
    nothing, none = row([], rng)
    assert np.isfinite(run(CFG, params, nothing, none)).all()


def test_without_blocks_it_is_pooling_and_a_linear_map(rng):
    cfg = abstractor.Config(6, 4, 5, side=2, depth=0, readout=1)
    params = randomised(abstractor.spec(cfg))
    x, see = row([(3, 4)], rng)
    picture = np.asarray(x[0, :12]).reshape(3, 4, 6)
    bins = [picture[a:b, c:d].mean((0, 1)) for a, b in ((0, 2), (1, 3)) for c, d in ((0, 2), (2, 4))]
    last = jax.tree.map(np.asarray, params["readout"]["0"])
    want = np.stack(bins) @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(run(cfg, params, x, see)[0, :4], want, atol=1e-5)


def test_tokens():
    assert CFG.tokens((1, 3, 4)) == 5
    with pytest.raises(InputError, match="every frame a picture"):
        CFG.tokens((2, 3, 4))
