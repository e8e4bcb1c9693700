"""Known values, gradients and variants of the small layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.core import spec
from mmjax.core.errors import InputError
from mmjax.nn import linear, mlp, norm, patch_embed
from mmjax.tokenizers import patches


def test_linear_is_a_product_and_a_bias(rng):
    cfg = linear.Config(5, 7)
    p = randomised(linear.spec(cfg))
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(
        linear.apply(p, jnp.asarray(x), cfg), x @ np.array(p["kernel"]) + np.array(p["bias"]), atol=1e-6
    )


def test_layer_norm(rng):
    cfg = norm.Config(6, "layer", 1e-5)
    p = randomised(norm.spec(cfg))
    x = rng.normal(size=(2, 3, 6)).astype(np.float32)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        norm.apply(p, jnp.asarray(x), cfg), y * np.array(p["scale"]) + np.array(p["bias"]), atol=2e-6
    )


def test_rms_norm_in_float32_whatever_the_input(rng):
    cfg = norm.Config(6, "rms", 1e-6)
    p = randomised(norm.spec(cfg))
    x = jnp.asarray(300 * rng.normal(size=(2, 3, 6)), jnp.bfloat16)
    exact = np.asarray(x, np.float32)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * np.array(p["scale"])
    out = norm.apply(p, x, cfg)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out), np.asarray(jnp.asarray(exact, jnp.bfloat16)))


@pytest.mark.parametrize("gated", [False, True])
def test_mlp(rng, gated):
    cfg = mlp.Config(5, 9, 3, "silu", gated)
    p = randomised(mlp.spec(cfg))
    x = rng.normal(size=(2, 3, 5)).astype(np.float32)
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    lin = lambda q, a: a @ np.array(q["kernel"]) + np.array(q["bias"])  # noqa: E731
    hidden = silu(lin(p["gate"], x)) * lin(p["up"], x) if gated else silu(lin(p["up"], x))
    np.testing.assert_allclose(mlp.apply(p, jnp.asarray(x), cfg), lin(p["down"], hidden), atol=2e-6)


def test_patch_embedding_equals_a_convolution(rng):
    cfg = patch_embed.Config(4, 6)
    p = randomised(patch_embed.spec(cfg))
    pictures = rng.integers(0, 256, (3, 12, 20, 3), dtype=np.uint8)
    patches = patch_embed.patchify(jnp.asarray(pictures), 4)
    assert patches.shape == (3, 15, 48)
    ours = patch_embed.apply(p, patches, cfg)
    pixels = (pictures / np.float32(255) - 0.5) / 0.5
    kernel = np.array(p["kernel"]).reshape(4, 4, 3, 6)
    theirs = jax.lax.conv_general_dilated(
        pixels.astype(np.float32), kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(3, 15, 6)
    np.testing.assert_allclose(ours, theirs + np.array(p["bias"]).reshape(1, 1, -1), atol=1e-5)
    floats = patch_embed.patchify(jnp.asarray(pixels, jnp.float32), 4)
    np.testing.assert_allclose(patch_embed.apply(p, floats, cfg), ours, atol=1e-5)


def test_stem_equals_convolutions_over_whole_pictures(rng):
    """Strided convolutions with LayerNorm and GELU between: strides that tile a patch never look beyond it."""
    cfg = patch_embed.Config(8, 6, stem=((2, 5), (4, 7)))
    p = randomised(patch_embed.spec(cfg))
    pictures = rng.integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    x = jnp.asarray((pictures / np.float32(255) - 0.5) / 0.5, jnp.float32)
    for q, inputs, outputs in ((p["stem_0"], 3, 5), (p["stem_1"], 5, 7), (p, 7, 6)):
        x = jax.lax.conv_general_dilated(
            x, q["kernel"].reshape(2, 2, inputs, outputs), (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ) + q["bias"].reshape(1, 1, 1, -1)
        if q is not p:
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = jax.nn.gelu(x * q["norm"]["scale"].reshape(1, 1, 1, -1) + q["norm"]["bias"].reshape(1, 1, 1, -1))
    patches = patch_embed.patchify(jnp.asarray(pictures), 8)
    np.testing.assert_allclose(patch_embed.apply(p, patches, cfg), x.reshape(3, 6, 6), atol=2e-5)


def test_patch_norm_forgets_brightness_and_contrast(rng):
    cfg = patch_embed.Config(4, 6, patch_norm=True)
    p = randomised(patch_embed.spec(cfg))
    x = rng.normal(size=(2, 5, 48)).astype(np.float32)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2)
    y = y * np.array(p["norm"]["scale"]) + np.array(p["norm"]["bias"])
    expected = y @ np.array(p["kernel"]) + np.array(p["bias"])
    np.testing.assert_allclose(patch_embed.apply(p, jnp.asarray(x), cfg), expected, atol=1e-5)
    other = patch_embed.apply(p, jnp.asarray(20 * x + 3), cfg)
    np.testing.assert_allclose(other, patch_embed.apply(p, jnp.asarray(30 * x - 1), cfg), atol=2e-4)


def test_a_stem_that_does_not_tile_a_patch_is_refused():
    with pytest.raises(InputError, match=r"squares of \[3\] pixels do not tile each other and a patch of 8"):
        patch_embed.Config(8, 6, stem=((3, 5),))


def test_unpatchify_undoes_patchify(rng):
    pictures = jnp.asarray(rng.integers(0, 256, (2, 8, 12, 3), dtype=np.uint8))
    np.testing.assert_array_equal(patch_embed.unpatchify(patch_embed.patchify(pictures, 4), 2, 3), pictures)
    for merge, channels in ((1, 1), (2, 3), (3, 5)):
        pictures = jnp.asarray(rng.normal(size=(3, 6 * 5, 12 * 5, channels)), jnp.float32)
        cut = patch_embed.patchify(pictures, 5, merge)
        assert cut.shape == (3, 72, 25 * channels)
        np.testing.assert_array_equal(patch_embed.unpatchify(cut, 6, 12, channels, merge), pictures)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_patches_on_device_are_the_hosts(merge, rng):
    pictures = rng.integers(0, 256, (2, 24, 48, 3), np.uint8)
    got = patch_embed.patchify(jnp.asarray(pictures), 4, merge)
    np.testing.assert_array_equal(got, np.stack([patches.patchify(p, 4, merge=merge) for p in pictures]))


def test_gelu_and_its_derivatives_are_jaxs():
    """Two derivatives, far into both tails, and in bfloat16."""
    gelu, want = mlp.ACTIVATIONS["gelu"], lambda x: jax.nn.gelu(x, approximate=False)
    x = jnp.linspace(-12, 12, 501)
    for _ in range(3):
        np.testing.assert_allclose(jax.vmap(gelu)(x), jax.vmap(want)(x), rtol=1e-5, atol=1e-7)
        gelu, want = jax.grad(gelu), jax.grad(want)
    gelu = mlp.ACTIVATIONS["gelu"]
    assert gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [("quick_gelu", 1.0, 0.845796), ("quick_gelu", -2.0, -0.064346), ("relu", -1.0, 0.0), ("relu", 2.0, 2.0)],
)
def test_activations(name, at, value):
    """By hand: 1 / (1 + e^-1.702) and −2 / (1 + e^3.404)."""
    np.testing.assert_allclose(mlp.ACTIVATIONS[name](jnp.float32(at)), value, atol=1e-5)


def test_a_norm_whose_scale_is_kept_as_its_distance_from_one(rng):
    """Gemma's: the same numbers, and a start at zero."""
    plain, offset = norm.Config(6), norm.Config(6, offset=1.0)
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    scale = jnp.asarray(rng.normal(size=6), jnp.float32)
    np.testing.assert_allclose(
        norm.apply({"scale": scale - 1}, x, offset), norm.apply({"scale": scale}, x, plain), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_array_equal(spec.init(norm.spec(offset), jax.random.key(0))["scale"], 0)
