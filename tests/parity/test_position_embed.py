"""Sinusoidal tables and interpolated ones against torch, transformers and timm's published orders."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
pytest.importorskip("transformers")

from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionConfig, Idefics2VisionEmbeddings
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding
from transformers.models.whisper.modeling_whisper import sinusoids

from mmjax.nn.position_embed import CONCATENATED, HEIGHT_FIRST, bucketised, interpolate, sinusoidal


def test_whisper():
    got = sinusoidal(np.arange(1500)[:, None], 64, CONCATENATED, closed=True)
    # 1e-4: at place 1,499 an ulp of the frequency alone is 1e-4.
    np.testing.assert_allclose(got, sinusoids(1500, 64).numpy(), atol=2e-4)


def test_vit_mae_of_transformers():
    expected = build_2d_sinusoidal_position_embedding(7, 5, 48).numpy()
    position = np.indices((7, 5)).reshape(2, -1).T
    np.testing.assert_allclose(sinusoidal(position, 48, HEIGHT_FIRST), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (13, 16), (6, 4), (2, 31)])
@pytest.mark.parametrize(
    ("method", "antialias", "align_corners"),
    [(m, *ac) for m in ("bilinear", "bicubic") for ac in ((False, False), (True, False), (False, True))],
)
def test_interpolation(rng, size, method, antialias, align_corners):
    table = rng.normal(size=(6, 4, 9)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(table).permute(2, 0, 1)[None],
        size=size,
        mode=method,
        antialias=antialias,
        align_corners=align_corners,
    )[0]
    position = jnp.asarray(np.indices(size).reshape(2, -1).T[None], jnp.int32)
    grid = jnp.broadcast_to(jnp.asarray(size, jnp.int32).reshape(1, 1, 2), position.shape)
    got = interpolate(
        jnp.asarray(table), position, grid, method=method, antialias=antialias, align_corners=align_corners
    )
    # An ulp of a source coordinate of 30 is 2e-6, times differences of up to 5 between neighbours in the table.
    np.testing.assert_allclose(got[0], expected.permute(1, 2, 0).reshape(-1, 9).numpy(), atol=5e-6)


@pytest.mark.parametrize("side", [16, 70])  # of published tables
def test_buckets_of_idefics2(side):
    """Columns of every number of patches up to twice the table's; single precision decides about places on edges."""
    config = Idefics2VisionConfig(hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1)
    model = Idefics2VisionEmbeddings(config)
    counts = np.arange(1, 2 * side + 1)
    there = np.arange(2 * side) < counts[:, None]
    with torch.no_grad():
        model.patch_embedding.weight.zero_()
        model.patch_embedding.bias.zero_()
        model.position_embedding.weight[:, 0] = torch.arange(side * side)
        found = model(torch.zeros(len(counts), 3, 2 * side, 1), torch.tensor(there)[..., None])[..., 0].numpy()
    count, index = np.broadcast_to(counts[:, None], there.shape)[there], np.nonzero(there)[1]
    grid = np.stack([count, np.ones_like(count)], -1)[None].astype(np.int32)
    position = np.stack([index, np.zeros_like(index)], -1)[None].astype(np.int32)
    table = jnp.arange(side * side, dtype=jnp.float32).reshape(side, side, 1)
    got = bucketised(table, jnp.asarray(position), jnp.asarray(grid))
    np.testing.assert_array_equal(got[0, :, 0], found[there])
