"""Tiles seen together: packed and alone, padding that is seen and that is hidden, labels, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import randomised

from mmjax.core.errors import InputError
from mmjax.encoders import tiled
from mmjax.nn import patch_embed, transformer

BLOCKS = transformer.Config(8, 2, 2, 2, 4, 12, "gelu", gated=False, norm_kind="layer")
CFG = tiled.Config(
    patch_embed.Config(2, 8, bias=False),
    BLOCKS,
    dataclasses.replace(BLOCKS, layers=1, gate=0.7),
    side=2,
    tiles=3,
    shapes=((1, 1), (1, 2), (1, 3), (2, 1), (3, 1)),
    taps=(0, 1),
)
PARAMS = randomised(tiled.spec(CFG), 0)


def row(*shapes, empty=1, seed=0):
    """Patches of pictures of so many (rows, columns) of tiles, and their grids."""
    counts = [r * c * CFG.area for r, c in shapes]
    each = [np.random.default_rng(seed + n).integers(0, 256, (k, 12)).astype(np.uint8) for n, k in enumerate(counts)]
    patches = np.concatenate([*each, np.zeros((3, 12), np.uint8)])[None]
    grid = [(1, r * CFG.side, c * CFG.side) for r, c in shapes] + [(0, 0, 0)] * empty
    return jnp.asarray(patches), jnp.asarray([grid], jnp.int32)


@jax.jit
def _features(params, patches, grid):
    return tiled.encode(params, patches, CFG, grid=grid).patches


def features(params, patches, grid, cfg=CFG):
    found = _features(params, patches, grid) if cfg is CFG else tiled.encode(params, patches, cfg, grid=grid).patches
    return np.asarray(found).reshape(grid.shape[1], cfg.tiles, cfg.places, cfg.outputs)


def test_packed_is_alone():
    packed = features(PARAMS, *row((1, 2), (3, 1), empty=1))
    assert packed.shape == (3, 3, 5, 24)
    assert np.isfinite(packed).all()
    alone = features(PARAMS, *row((3, 1), empty=2, seed=1))
    np.testing.assert_allclose(packed[1], alone[0], atol=1e-5)


def test_taps_stand_beside_the_features():
    """Value by value: the first of each tap, the second …"""
    first = dataclasses.replace(CFG, taps=(0,))
    whole, one = features(PARAMS, *row((1, 2))), features(PARAMS, *row((1, 2)), first)
    np.testing.assert_allclose(whole[..., :8], one[..., :8], atol=1e-5)
    np.testing.assert_allclose(whole[..., 8::2], one[..., 8:], atol=1e-5)


def test_padding_is_seen_or_hidden():
    """What tile 2 of two tiles has learned, which are none, is seen by the others in the published models."""
    other = jax.tree.map(lambda x: x, PARAMS)
    other["before"] = {
        "table": PARAMS["before"]["table"].at[2, 2].add(jnp.arange(8.0)),
        "gate": PARAMS["before"]["gate"],
    }
    given = row((1, 2))
    change = np.abs(features(PARAMS, *given) - features(other, *given))[0]
    assert (change[:2].max((1, 2)) > 1e-3).all()
    hidden = dataclasses.replace(CFG, padding="hidden")
    mine = features(PARAMS, *given, hidden)[0]
    np.testing.assert_allclose(mine[:2], features(other, *given, hidden)[0, :2], atol=1e-6)
    # Then as many tiles as a picture has, and no padded places, are enough.
    small = dataclasses.replace(hidden, tiles=2, shapes=((1, 1), (1, 2)), multiple=1)
    cut = PARAMS | {
        name: PARAMS[name] | {"table": PARAMS[name]["table"][:3, :2]} for name in ("before", "after", "tile_position")
    }
    np.testing.assert_allclose(mine[:2], features(cut, *given, small)[0], atol=1e-5)


def test_who_sees_whom():
    """Of two tiles: everything sees them, they see all, and padding does not see padding."""
    see = {name: np.asarray(x)[0] for name, x in tiled._see(CFG, row((1, 2), empty=1)[1]).items()}
    whole = CFG.tokens(0)
    assert (whole, CFG.pads) == (24, 9)
    seen = (see["lo"][:whole, None] <= see["order"]) & (see["order"] <= see["hi"][:whole, None])
    own = np.zeros(2 * whole, bool)
    own[9:19] = True
    assert (seen[own[:whole]] == (np.arange(2 * whole) < whole)).all()
    assert (seen[~own[:whole]] == own).all()
    assert (see["order"][whole:] == -1).all()
    assert (see["lo"] > see["hi"])[whole:].all()


def test_labels_of_padding_come_last():
    """Two pictures of a document, of two tiles and of one, then one of another document."""
    _, grid = row((1, 2), (1, 1), (3, 1))
    found = tiled.labels(grid, jnp.asarray([[0, 0, 2, 2]]), CFG)
    found = np.asarray(found).reshape(4, 3, 5)
    np.testing.assert_array_equal(found[:3, :, 0] // 5, [[0, 1, 3], [2, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(found[:3] - found[:3, :, :1], np.broadcast_to(np.arange(5), (3, 3, 5)))
    assert (found[3] == -1).all()


def test_other_shapes_have_learned_nothing():
    """A picture of another shape makes its row NaN."""
    wide = dataclasses.replace(CFG, shapes=((1, 1), (1, 2), (1, 3), (2, 1)))
    params = PARAMS | {n: PARAMS[n] | {"table": PARAMS[n]["table"][:5]} for n in ("before", "after", "tile_position")}
    found = features(params, *row((3, 1), (1, 2)), wide)
    assert np.isnan(found).all()
    assert np.isfinite(features(params, *row((1, 3), (1, 2)), wide)[:2]).all()


def test_gates_of_blocks_close():
    """tanh(0) adds nothing: the second transformer is not there."""
    shut = jax.tree.map(lambda x: x, PARAMS)
    shut["whole"] = PARAMS["whole"] | {name: jnp.zeros((1, 1)) for name in ("attention_gate", "mlp_gate")}
    moved = jax.tree.map(lambda x: x + 1.0, shut["whole"]) | {
        name: shut["whole"][name] for name in ("attention_gate", "mlp_gate")
    }
    given = row((1, 2))
    np.testing.assert_array_equal(features(shut, *given), features(shut | {"whole": moved}, *given))
    assert np.abs(features(shut, *given) - features(PARAMS, *given)).max() > 1e-3


def test_gradients_reach_every_parameter():
    given = row((1, 2), (3, 1))
    slopes = jax.jit(jax.grad(lambda p: (_features(p, *given) ** 2).sum()))(PARAMS)
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
        assert np.isfinite(slope).all(), path
        assert np.abs(slope).max() > 0, path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shapes": ((2, 2),)}, "do not fit"),
        ({"shapes": ()}, "do not fit"),
        ({"whole": dataclasses.replace(BLOCKS, width=16)}, "one width"),
    ],
)
def test_refusals(change, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(CFG, **change)


def test_taps_of_others_are_refused():
    with pytest.raises(InputError, match="taps"):
        tiled.encode(PARAMS, *row((1, 1))[:1], CFG, grid=row((1, 1))[1], taps=(0,))
