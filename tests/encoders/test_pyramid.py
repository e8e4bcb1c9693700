"""Convolutions and averages against loops, class token and maps, sizes of all kinds, meshes, refusals."""

import dataclasses

import hierarchical
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.core.errors import InputError
from mmjax.encoders import hierarchy, pyramid

SIZES = {"widths": (4, 8), "depths": (1, 2), "heads": (1, 2), "ratios": (2.0, 2.0), "reductions": (2, 1), "classes": 5}
V1 = pyramid.Config("v1", patches=(4, 2), strides=(4, 2), image=24, **SIZES)
V2 = pyramid.Config("v2", patches=(7, 3), strides=(4, 2), **SIZES)
LINEAR = dataclasses.replace(V2, kind="v2_linear")
KINDS = pytest.mark.parametrize("cfg", [V1, V2, LINEAR], ids=lambda c: c.kind)
forward = jax.jit(pyramid.apply, static_argnums=2)


def test_depthwise_is_a_convolution_of_each_channel(rng):
    x = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    params = {"kernel": rng.normal(size=(3, 3, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}
    padded, expected = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), np.zeros((2, 4, 5, 3))
    for row in range(4):
        for column in range(5):
            square = padded[:, row : row + 3, column : column + 3]
            expected[:, row, column] = (square * params["kernel"]).sum((1, 2)) + params["bias"]
    got = pyramid.depthwise(jax.tree.map(jnp.asarray, params), jnp.asarray(x))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("side", "step", "pad"), [(3, 2, 1), (2, 2, 0), (5, 3, 0)])
def test_unfold_cuts_squares(rng, side, step, pad):
    x = rng.normal(size=(1, 7, 9, 2)).astype(np.float32)
    got, grid = pyramid.unfold(jnp.asarray(x), side, step, pad)
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    squares = [
        padded[0, row : row + side, column : column + side].ravel()
        for row in range(0, padded.shape[1] - side + 1, step)
        for column in range(0, padded.shape[2] - side + 1, step)
    ]
    assert grid[0] * grid[1] == len(squares)
    np.testing.assert_array_equal(got[0], squares)


def test_averages_overlap_where_they_must():
    """Torch's rule: from floor(i n / p) to ceil((i + 1) n / p)."""
    x = jnp.arange(5.0).reshape(1, 5, 1, 1)
    got = pyramid.averaged(jnp.broadcast_to(x, (1, 5, 3, 1)), 3).reshape(3, 3)
    np.testing.assert_allclose(got, [[0.5] * 3, [2.0] * 3, [3.5] * 3], rtol=1e-6)
    fewer = pyramid.averaged(jnp.array([[[[1.0]], [[5.0]]]]), 3).reshape(3, 3)
    np.testing.assert_allclose(fewer[:, 0], [1, 3, 5], rtol=1e-6)


@KINDS
def test_any_size(cfg, rng):
    """Maps have the sizes of the convolutions, and a picture does not know the others of its batch."""
    params = randomised(pyramid.spec(cfg))
    images = rng.normal(size=(2, 19, 42, 3)).astype(np.float32)
    out = forward(params, images, cfg)
    first, second = ((4, 10), (2, 5)) if cfg.kind == "v1" else ((5, 11), (3, 6))
    assert [m.shape for m in out.maps] == [(2, *first, 4), (2, *second, 8)]
    assert out.tokens.shape == (2, second[0] * second[1] + (cfg.kind == "v1"), 8)
    other = forward(params, np.stack([np.full_like(images[0], 3.0), images[1]]), cfg)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), out, other)
    assert np.abs(out.logits[0] - other.logits[0]).max() > 0.01


def test_bytes_are_floats_that_were_normalised(rng):
    params = randomised(pyramid.spec(V2))["stage_0"]
    images = rng.integers(0, 256, (1, 5, 6, 3), dtype=np.uint8)
    floats = (images / 255 - np.array(V2.mean)) / np.array(V2.deviation)
    some, others = (
        pyramid.embed(params, hierarchy.floats(jnp.asarray(x), V2.pixels), V2, 0)[0]
        for x in (images, floats.astype(np.float32))
    )
    np.testing.assert_allclose(some, others, atol=1e-5)


def test_the_class_token_stands_first_and_in_no_map(rng):
    params = randomised(pyramid.spec(V1))
    out = forward(params, rng.normal(size=(1, 24, 24, 3)).astype(np.float32), V1)
    np.testing.assert_array_equal(out.pooled, out.tokens[:, 0])
    last = out.maps[-1].reshape(1, -1, 8)
    scale, shift = params["norm"]["scale"], params["norm"]["bias"]
    normed = (last - last.mean(-1, keepdims=True)) / jnp.sqrt(last.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed * scale[None, None] + shift[None, None], out.tokens[:, 1:], atol=1e-5)


@KINDS
def test_extreme_pictures_have_finite_gradients(cfg):
    params = randomised(pyramid.spec(cfg))
    images = jnp.stack([jnp.zeros((24, 24, 3)), jnp.full((24, 24, 3), 1e4), jnp.full((24, 24, 3), -1e-20)])
    run = jax.jit(jax.value_and_grad(hierarchical.loss), static_argnums=(2, 3))
    value, grads = run(params, images, pyramid, dataclasses.replace(cfg, remat="full"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [V1, LINEAR], ids=lambda c: c.kind)
def test_everywhere(cfg, rng):
    params = randomised(pyramid.spec(cfg))
    hierarchical.check_everywhere(pyramid, cfg, params, rng.normal(size=(8, 19, 26, 3)).astype(np.float32))


def test_refusals():
    for cfg, changes, words in (
        (V2, {"heads": (1,)}, "pyramid of 2 widths"),
        (V2, {"heads": (3, 2)}, "4 values cannot be shared by 3 heads"),
        (V1, {"patches": (7, 2)}, "as far apart as they are wide"),
        (V1, {"reductions": (2, 2)}, "cannot reduce keys"),
    ):
        with pytest.raises(InputError, match=words):
            dataclasses.replace(cfg, **changes)
    params = randomised(pyramid.spec(V1))
    with pytest.raises(InputError, match="3 × 24 places is too small for squares of 4"):
        pyramid.apply(params, jnp.zeros((1, 3, 24, 3)), V1)
    with pytest.raises(InputError, match="1 × 6 places is too small for squares of 2"):
        pyramid.apply(params, jnp.zeros((1, 4, 24, 3)), V1)
