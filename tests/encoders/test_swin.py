"""Windows against attention straight down, merging by hand, sizes of all kinds, meshes, refusals."""

import dataclasses

import hierarchical
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.core.errors import InputError
from mmjax.encoders import swin
from mmjax.nn import patch_embed
from mmjax.nn.patch_embed import IMAGENET

CFG = swin.Config(patch_embed.Config(2, 8, 3, *IMAGENET), (3, 2), (2, 4), window=4, ratio=2.0, classes=5)
forward = jax.jit(swin.apply, static_argnums=2)


@pytest.fixture(scope="module")
def params():
    return randomised(swin.spec(CFG))


def attention(p, x, grid, window, shift):
    """In float64, with a mask of all tokens: the lines between windows lie at shift, shift + window, …"""
    x = np.asarray(x, np.float64)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    q, k, v = (np.einsum("bld,dhe->blhe", x, p[n]["kernel"]) + p[n]["bias"] for n in ("q", "k", "v"))
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    near = np.ones((len(row), len(row)), bool)
    index = 0
    for at in (row, column):
        group = (at - shift) // window
        near &= group[:, None] == group[None]
        index = index * (2 * window - 1) + np.clip(at[:, None] - at[None], 1 - window, window - 1) + window - 1
    score = np.einsum("blhe,bshe->bhls", q, k) / np.sqrt(q.shape[-1]) + p["relative"][index].transpose(2, 0, 1)
    score = np.where(near, score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    out = np.einsum("bhls,bshe->blhe", weight / weight.sum(-1, keepdims=True), v)
    return np.einsum("blhe,hed->bld", out, p["out"]["kernel"]) + p["out"]["bias"]


@pytest.mark.parametrize("shift", [0, 2])
def test_windows_are_attention_with_a_mask(params, rng, shift):
    layer = jax.tree.map(lambda p: p[0], params["stage_0"]["layers"]["attention"])
    grid = (8, 12)
    x = rng.normal(size=(2, 96, 8)).astype(np.float32)
    got = jax.jit(swin._attention, static_argnums=(2, 3, 4))(layer, x, 4, grid, shift)
    np.testing.assert_allclose(got, attention(layer, x, grid, 4, shift), atol=2e-6)


def test_tables_of_a_window_of_two():
    relative = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    np.testing.assert_array_equal(swin.relative(2), relative)
    # One row of two windows, of one column more than a window each: rolled, the second holds the picture's edges.
    parts = swin.parts((2, 4), 2, 1)
    assert [len(set(row)) for row in parts] == [2, 4]


def test_merging_goes_down_columns_first():
    """2 × 3 tokens that are their own numbers: [0 3 1 4] and, filled up, [2 5 . .]."""
    cfg = swin.Config(patch_embed.Config(2, 1), (1, 1), (1, 1))
    params = {
        "merge_norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "merge": {"kernel": jnp.array([[1.0, 0], [10, 0], [100, 0], [1000, 1]])},
    }
    x = jnp.arange(6.0).reshape(1, 6, 1)
    got, grid = swin.merge(params, x, cfg, 0, (2, 3))
    squares = np.array([[0, 3, 1, 4], [2, 5, 0, 0]], float)
    normed = (squares - squares.mean(1, keepdims=True)) / np.sqrt(squares.var(1, keepdims=True) + 1e-5)
    assert grid == (1, 2)
    np.testing.assert_allclose(got[0, :, 0], normed @ [1, 10, 100, 1000], rtol=1e-5)


def test_windows_are_not_shifted_where_there_is_one():
    assert CFG.shifts((4, 9)) == (0,)
    assert CFG.shifts((5, 9)) == (0, 2)
    assert dataclasses.replace(CFG, always_shift=True).shifts((3, 3)) == (0, 2)


@pytest.mark.parametrize("size", [(32, 20), (17, 31), (1, 3)])
def test_any_size(params, rng, size):
    """Maps halve, rounded up, and a picture does not know the others of its batch."""
    images = rng.normal(size=(2, *size, 3)).astype(np.float32)
    out = forward(params, images, CFG)
    rows, columns = (-(-n // 2) for n in size)
    assert [m.shape for m in out.maps] == [(2, rows, columns, 8), (2, -(-rows // 2), -(-columns // 2), 16)]
    assert out.stem.shape == out.maps[0].shape
    assert out.logits.shape == (2, 5)
    other = forward(params, np.stack([np.full_like(images[0], 3.0), images[1]]), CFG)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), out, other)
    assert np.abs(out.logits[0] - other.logits[0]).max() > 0.01


def test_bytes_are_floats_that_were_normalised(params, rng):
    images = rng.integers(0, 256, (1, 5, 6, 3), dtype=np.uint8)
    floats = (images / 255 - np.array(IMAGENET[0])) / np.array(IMAGENET[1])
    some, others = (swin.embed(params, jnp.asarray(x), CFG)[0] for x in (images, floats.astype(np.float32)))
    np.testing.assert_allclose(some, others, atol=1e-5)


def test_extreme_pictures_have_finite_gradients(params):
    images = jnp.stack([jnp.zeros((12, 12, 3)), jnp.full((12, 12, 3), 1e4), jnp.full((12, 12, 3), -1e-20)])
    cfg = dataclasses.replace(CFG, remat="full")
    value, grads = jax.jit(jax.value_and_grad(hierarchical.loss), static_argnums=(2, 3))(params, images, swin, cfg)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))


@pytest.mark.slow
def test_everywhere(params, rng):
    hierarchical.check_everywhere(swin, CFG, params, rng.normal(size=(8, 12, 14, 3)).astype(np.float32))


def test_bfloat16(params, rng):
    """Parameters and pictures of 16 bits: the same but for their precision."""
    images = rng.normal(size=(1, 12, 14, 3)).astype(np.float32)
    exact = forward(params, images, CFG).pooled
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got = forward(half, jnp.asarray(images, jnp.bfloat16), CFG).pooled
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), exact, atol=0.15)


def test_refusals():
    for changes, words in (
        ({"heads": (2,)}, "2 depths and 1 head counts"),
        ({"heads": (3, 4)}, "8 values, which 3 heads cannot share"),
        ({"map_norms": (3,)}, "stages 0 to 2"),
    ):
        with pytest.raises(InputError, match=words):
            dataclasses.replace(CFG, **changes)
