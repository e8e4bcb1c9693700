"""The vision transformer's variants: pictures packed and alone, class tokens, tables, taps, heads, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.core.errors import InputError
from mmjax.encoders import head, text, vit
from mmjax.nn import attention_pool, norm, patch_embed, transformer
from mmjax.sequence import intervals
from mmjax.sequence.positions import grid_positions

WIDTH, GRIDS = 16, [(1, 3, 5), (1, 2, 2), (1, 4, 1)]
BLOCKS = transformer.Config(
    WIDTH, 3, 2, 2, 8, 24, "gelu", gated=False, bias=True, norm_kind="layer", layer_scale=0.5, qk_norm="width"
)
POOL = attention_pool.Config(WIDTH, 2, 20)
FULL = vit.Config(
    patch_embed.Config(2, WIDTH),
    BLOCKS,
    vit.Table(3, 4),
    classes=2,
    registers=3,
    mask=True,
    pre_norm=True,
    head=head.Config(WIDTH, "attention", POOL, norm.Config(WIDTH, "layer"), outputs=5),
)


def row(grids: list, empty: int = 3, pictures: int | None = None) -> dict:
    """Descriptors of one row: pictures, empty places, empty pictures."""
    counts = [r * c for _, r, c in grids]
    total = sum(counts)
    lo, hi = intervals.blocks(counts)

    def padded(x, fill):
        return jnp.asarray(np.concatenate([x, np.full((empty, *np.shape(x)[1:]), fill)])[None], jnp.int32)

    more = [(0, 0, 0)] * ((pictures or len(grids) + 1) - len(grids))
    return {
        "order": padded(np.arange(total), -1),
        "lo": padded(lo, 0),
        "hi": padded(hi, -1),
        "image": padded(np.repeat(np.arange(len(grids)), counts), -1),
        "position": padded(np.concatenate([grid_positions(g)[:, 1:] for g in grids]), 0),
        "grid": jnp.asarray([[*grids, *more]], jnp.int32),
    }


def pixels(count: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (1, count, 12)), jnp.uint8)


def encode(params, patches, cfg, **see):
    return jax.jit(lambda p, x, s: vit.encode(p, x, cfg, taps=(0, 2), **s))(params, patches, see)


POOLS = {
    "attention": FULL.head,
    "class": head.Config(WIDTH, "class", tanh=6),
    "mean": head.Config(WIDTH, "mean"),
    "class_mean": head.Config(WIDTH, "class_mean", outputs=4, bias=False),
    "distilled": head.Config(WIDTH, "distilled", outputs=4),
}


@pytest.mark.parametrize("pool", POOLS)
def test_packed_is_alone(pool):
    cfg = dataclasses.replace(FULL, head=POOLS[pool])
    params = randomised(vit.spec(cfg))
    see = row(GRIDS)
    patches = pixels(see["order"].shape[1])
    packed = encode(params, patches, cfg, **see)
    at = 0
    for n, grid in enumerate(GRIDS):
        count = grid[1] * grid[2]
        alone = encode(params, patches[:, at : at + count], cfg, **row([grid], empty=0, pictures=1))
        for got, want in (
            (packed.patches[0, at : at + count], alone.patches[0]),
            (packed.taps[:, 0, at : at + count], alone.taps[:, 0]),
            (packed.prefix[0, n], alone.prefix[0, 0]),
            (packed.prefix_taps[:, 0, n], alone.prefix_taps[:, 0, 0]),
            (packed.pooled[0, n], alone.pooled[0, 0]),
        ):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        at += count
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(packed))


def test_a_picture_does_not_see_another():
    params, see = randomised(vit.spec(FULL)), row(GRIDS)
    patches = pixels(see["order"].shape[1])
    other = patches.at[:, 15:19].set(7)  # the second picture
    a, b = encode(params, patches, FULL, **see), encode(params, other, FULL, **see)
    for got, want in (
        (a.patches[0, :15], b.patches[0, :15]),
        (a.prefix[0, 0], b.prefix[0, 0]),
        (a.pooled[0, 2], b.pooled[0, 2]),
    ):
        np.testing.assert_array_equal(got, want)
    for got, want in (
        (a.patches[0, 15:19], b.patches[0, 15:19]),
        (a.prefix[0, 1], b.prefix[0, 1]),
        (a.pooled[0, 1], b.pooled[0, 1]),
    ):
        assert np.abs(got - want).min() > 1e-6


def test_taps_are_what_fewer_blocks_put_out():
    cfg = dataclasses.replace(FULL, final_norm=False, head=None)
    params, see = randomised(vit.spec(cfg)), row(GRIDS)
    patches = pixels(see["order"].shape[1])
    out = encode(params, patches, cfg, **see)
    short = dataclasses.replace(cfg, blocks=dataclasses.replace(BLOCKS, layers=1))
    first = params | {"blocks": jax.tree.map(lambda p: p[:1], params["blocks"])}
    got = jax.jit(lambda p: vit.encode(p, patches, short, **see))(first)
    np.testing.assert_allclose(out.taps[0], got.patches, atol=1e-6)
    np.testing.assert_allclose(out.prefix_taps[0], got.prefix, atol=1e-6)
    np.testing.assert_array_equal(out.taps[1], out.patches)
    for taps in ((2, 0), (0, 0), (3,)):
        with pytest.raises(InputError, match="must rise and name blocks from 0 to 2"):
            vit.encode(params, patches, cfg, taps=taps, **see)


def test_masked_patches():
    """Whatever is under the mask, the result is the same; and it is not that of the patch."""
    params, see = randomised(vit.spec(FULL)), row(GRIDS)
    patches = pixels(see["order"].shape[1])
    masked = jnp.zeros(see["order"].shape, bool).at[0, 4].set(True)
    run = jax.jit(lambda x, m: vit.encode(params, x, FULL, masked=m, **see).patches)
    np.testing.assert_array_equal(run(patches, masked), run(patches.at[0, 4].set(9), masked))
    assert np.abs(run(patches, masked) - run(patches, ~masked & False)).max() > 1e-3
    bare = dataclasses.replace(FULL, mask=False)
    with pytest.raises(InputError, match="no vector for masked patches"):
        vit.encode(params, patches, bare, masked=masked, **see)


def test_layer_scale_of_zero_is_no_block_at_all():
    cfg = dataclasses.replace(FULL, final_norm=False, head=None)
    params, see = randomised(vit.spec(cfg)), row(GRIDS)
    params["blocks"] |= {k: jnp.zeros_like(params["blocks"][k]) for k in ("attention_scale", "mlp_scale")}
    out = encode(params, pixels(see["order"].shape[1]), cfg, **see)
    np.testing.assert_array_equal(out.taps[0], out.taps[1])


def test_gradients_reach_every_parameter():
    params, see = randomised(vit.spec(FULL)), row(GRIDS)
    patches = pixels(see["order"].shape[1])
    masked = jnp.zeros(see["order"].shape, bool).at[0, 4].set(True)

    def loss(p):
        out = vit.encode(p, patches, FULL, masked=masked, taps=(1,), **see)
        return jnp.sin(out.pooled[:, :3]).sum() + jnp.sin(out.patches).sum() + jnp.sin(out.taps).sum()

    for path, x in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(x).all(), path
        assert np.abs(x).max() > 0, path


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(remat):
    params, see = randomised(vit.spec(FULL)), row(GRIDS)
    patches = pixels(see["order"].shape[1])

    def gradient(cfg):
        return jax.jit(jax.grad(lambda p: jnp.sin(vit.encode(p, patches, cfg, taps=(0,), **see).taps).sum()))(params)

    again = dataclasses.replace(FULL, blocks=dataclasses.replace(BLOCKS, remat=remat))
    for a, b in zip(jax.tree.leaves(gradient(FULL)), jax.tree.leaves(gradient(again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_refusals():
    params, see = randomised(vit.spec(FULL)), row(GRIDS)
    patches = pixels(see["order"].shape[1])
    less = {k: v for k, v in see.items() if k != "grid"}
    with pytest.raises(InputError, match="give `image` and `grid`"):
        vit.apply(params, patches, FULL, **less)
    windowed = dataclasses.replace(FULL, blocks=dataclasses.replace(BLOCKS, windowed=(1,)))
    with pytest.raises(InputError, match="Window attention knows no class tokens"):
        vit.apply(params, patches, windowed, window=(see["lo"], see["hi"]), **see)
    bare = dataclasses.replace(FULL, classes=0, registers=0, head=head.Config(WIDTH, "class"))
    with pytest.raises(InputError, match="the encoder has none"):
        vit.apply(randomised(vit.spec(bare)), patches, bare, **see)
    for wrong in ({"pool": "attention"}, {"pool": "mean", "attention": POOL}):
        with pytest.raises(InputError, match="go together"):
            head.Config(WIDTH, **wrong)
    with pytest.raises(InputError, match="give the number of outputs"):
        head.Config(WIDTH, "distilled")
    with pytest.raises(InputError, match="does not divide into 3 heads"):
        attention_pool.Config(WIDTH, 3, 20)
    with pytest.raises(InputError, match="go through one matrix"):
        patch_embed.Config(2, WIDTH, frames=2, patch_norm=True)


def test_a_still_picture_is_a_clip_that_stands_still():
    cfg = patch_embed.Config(2, WIDTH, frames=2, bias=False)
    params = randomised(patch_embed.spec(cfg))
    patches = pixels(6)
    still = patch_embed.apply(params, patches, cfg)
    clip = patch_embed.apply(params, jnp.concatenate([patches, patches], -1), cfg)
    np.testing.assert_allclose(still, clip, rtol=1e-5, atol=1e-5)
    # By hand: (bytes / 255 − 0.5) / 0.5, times both matrices.
    values = (np.asarray(patches[0], np.float64) / 255 - 0.5) / 0.5
    kernel = np.asarray(params["kernel"], np.float64)
    np.testing.assert_allclose(still[0], values @ (kernel[:12] + kernel[12:]), rtol=1e-5, atol=1e-5)


def test_the_mean_of_a_picture():
    see = row(GRIDS)
    x = jnp.arange(26 * 2, dtype=jnp.float32).reshape(1, 26, 2)
    got = head.mean(x, see["image"], 4)
    np.testing.assert_allclose(got[0], [[14, 15], [33, 34], [41, 42], [0, 0]])


def test_texts_packed_are_texts_alone():
    blocks = dataclasses.replace(BLOCKS, qk_norm="none", layer_scale=None)
    cfg = text.Config(30, 8, blocks, outputs=5)
    params = randomised(text.spec(cfg))
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 30, n) for n in (4, 7, 1)]

    def run(some, causal):
        lengths = [len(t) for t in some]
        lo, hi = (intervals.packed if causal else intervals.blocks)(lengths)
        tokens = jnp.asarray(np.concatenate(some)[None], jnp.int32)
        see = {
            "order": jnp.arange(sum(lengths), dtype=jnp.int32)[None],
            "lo": jnp.asarray(lo)[None],
            "hi": jnp.asarray(hi)[None],
        }
        place = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None], jnp.int32)
        hidden, _ = text.apply(params, tokens, cfg, position=place, **see)
        return text.pool(params, hidden, cfg, jnp.asarray([[*(np.cumsum(lengths) - 1), -1]], jnp.int32))

    for causal in (True, False):
        packed = run(texts, causal)
        for n, one in enumerate(texts):
            np.testing.assert_allclose(packed[0, n], run([one], causal)[0, 0], rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(packed[0, 3], 0)  # nobody's
    assert text.first(jnp.asarray([[3, 9, 9], [9, 1, 1], [1, 1, 1]], jnp.int32), 9).tolist() == [[1], [0], [0]]
