import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.nn import position_embed
from mmjax.nn.position_embed import (
    CONCATENATED,
    HEIGHT_FIRST,
    LONGEST,
    MAE,
    TIMM,
    bucketised,
    centred,
    fourier,
    interpolate,
    learned,
    sinusoidal,
)


def test_the_paper_s_own_order():
    """PE(pos, 2i) = sin(pos / 10000^(2i / d)), PE(pos, 2i + 1) = cos(…): Vaswani et al. 2017, section 3.5."""
    got = sinusoidal(np.arange(50)[:, None], 12, interleaved=True)
    for pos in (0, 1, 7, 49):
        for i in range(6):
            angle = pos / 10000 ** (2 * i / 12)
            np.testing.assert_allclose(got[pos, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "order"),
    [(CONCATENATED, "sr cr"), (MAE, "sc cc sr cr"), (HEIGHT_FIRST, "sr cr sc cc"), (TIMM, "sr sc cr cc")],
)
def test_orders(rng, parts, order):
    """Function (sine, cosine) and axis (row, column) of every part, written out."""
    position = rng.random((3, 4, 2)) * 30
    words = order.split()
    bands = 24 // len(words)
    frequency = 10000.0 ** -(np.arange(bands) / bands)
    expected = [{"s": np.sin, "c": np.cos}[f](position[..., "rc".index(axis), None] * frequency) for f, axis in words]
    np.testing.assert_allclose(sinusoidal(position, 24, parts), np.concatenate(expected, -1), atol=1e-5)


def test_closed_series_ends_at_theta():
    """Whisper's: the slowest wavelength is 2π × 10,000 exactly."""
    got = sinusoidal(np.array([[10_000.0]]), 8, closed=True)
    np.testing.assert_allclose(got[0, [3, 7]], [np.sin(1), np.cos(1)], atol=1e-6)


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="A width of 10 does not divide into 4"):
        sinusoidal(np.zeros((1, 2)), 10, MAE)


def test_fourier_features(rng):
    """sin(π f x) of the row's frequencies, then the column's, then cosines: Jaegle et al. 2021, section 3.2."""
    at = rng.random((2, 5, 2)) * 2 - 1
    turns = [at[..., i, None] * np.linspace(1, size / 2, 3) for i, size in enumerate((224, 8))]
    parts = [at, *(np.sin(np.pi * t) for t in turns), *(np.cos(np.pi * t) for t in turns)]
    # 2e-5: an ulp of a position is 6e-8, and the fastest frequency makes 112 π of it.
    np.testing.assert_allclose(fourier(at, 3, (224, 8)), np.concatenate(parts, -1), atol=2e-5)
    np.testing.assert_allclose(
        fourier(at, 3, (224, 8), concat_pos=False, sine_only=True), np.concatenate(parts[1:3], -1), atol=2e-5
    )
    with pytest.raises(InputError, match="1 resolutions do not fit 2 axes"):
        fourier(at, 3, (224,))


def test_centred_grids_reach_from_minus_one_to_one():
    index = jnp.array([[0, 0], [2, 0], [4, 0]], jnp.int32)
    np.testing.assert_array_equal(centred(index, jnp.array([[5, 1]] * 3, jnp.int32)), [[-1, -1], [0, -1], [1, -1]])


def test_learned_rows(rng):
    """Zeros where there is nothing, not a number past the table, and gradients of the rows that were read."""
    table = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    index = jnp.array([[2, -1, 0], [4, 2, -5]], jnp.int32)
    out = np.array(learned(table, index))
    np.testing.assert_array_equal(out[0], np.stack([table[2], np.zeros(3), table[0]]))
    assert np.isnan(out[1, 0]).all()
    assert not out[1, 2].any()
    gradient = jax.grad(lambda t: learned(t, index[:1]).sum())(table)
    np.testing.assert_array_equal(gradient, np.array([1, 0, 1, 0])[:, None] * np.ones((1, 3)))


def patches(sizes):
    """(position, grid) i32[1, P, 2] of packed pictures of these sizes."""
    position = np.concatenate([np.indices(s).reshape(2, -1).T for s in sizes])
    grid = np.concatenate([np.tile(s, (s[0] * s[1], 1)) for s in sizes])
    return jnp.asarray(position[None], jnp.int32), jnp.asarray(grid[None], jnp.int32)


OPTIONS = [
    {"method": m, "antialias": a, "align_corners": c}
    for m in ("bilinear", "bicubic")
    for a, c in ((False, False), (True, False), (False, True))
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_table_s_own_grid_gives_the_table(rng, options):
    table = rng.normal(size=(5, 7, 3)).astype(np.float32)
    got = interpolate(jnp.asarray(table), *patches([(5, 7)]), **options)
    np.testing.assert_allclose(got[0], table.reshape(-1, 3), atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_add_up_to_one_and_packed_is_alone(rng, options):
    table = jnp.asarray(rng.normal(size=(6, 4, 3)), jnp.float32)
    sizes = [(1, 1), (13, 9), (2, 5), (3, 3)]
    run = jax.jit(lambda t, p, g: interpolate(t, p, g, **options))
    together = run(table, *patches(sizes))
    np.testing.assert_allclose(run(jnp.ones_like(table), *patches(sizes)), 1.0, atol=1e-5)
    at = 0
    for size in sizes:
        alone = run(table, *patches([size]))
        np.testing.assert_allclose(together[:, at : at + alone.shape[1]], alone, atol=1e-6)
        at += alone.shape[1]


def test_bilinear_by_hand():
    """Two places to four: at −0.25 (the edge), 0.25, 0.75 and 1.25 (the edge)."""
    table = jnp.array([[[0.0], [1.0]]])
    got = interpolate(table, *patches([(1, 4)]))
    np.testing.assert_allclose(got[0, :, 0], [0, 0.25, 0.75, 1], atol=1e-6)
    corners = interpolate(table, *patches([(1, 4)]), align_corners=True)
    np.testing.assert_allclose(corners[0, :, 0], [0, 1 / 3, 2 / 3, 1], atol=1e-6)
    half = interpolate(jnp.arange(4.0).reshape(1, 4, 1), *patches([(1, 2)]), antialias=True)
    # The triangle is two places wide: weights 3 3 1 (of 7) at either end.
    np.testing.assert_allclose(half[0, :, 0], [(0 * 3 + 1 * 3 + 2 * 1) / 7, (1 * 1 + 2 * 3 + 3 * 3) / 7], atol=1e-6)


def test_gradient_reaches_the_table(rng):
    table = jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)
    where = patches([(5, 2), (1, 1)])
    out = jax.grad(lambda t: interpolate(t, *where, method="bicubic").sum())(table)
    np.testing.assert_allclose(out.sum(), 2 * 11, rtol=1e-5)  # every patch's weights add up to one


def test_empty_places_are_finite():
    zero = jnp.zeros((1, 3, 2), jnp.int32)
    for options in OPTIONS:
        assert np.isfinite(position_embed.interpolate(jnp.ones((4, 4, 2)), zero, zero, **options)).all()


def test_buckets_by_hand(rng):
    """Shares of the picture, packed: 5 rows of a table of 4, and 2 columns of a table of 3; an edge belongs behind."""
    table = jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32)
    sizes = [(5, 2), (1, 1), (8, 3)]
    got = jax.jit(bucketised)(table, *patches(sizes))
    rows, columns = ([0, 0, 1, 2, 3], [0], [0, 0, 1, 1, 2, 2, 3, 3]), ([0, 1], [0], [0, 1, 2])
    expected = [table[r, c] for down, across in zip(rows, columns, strict=True) for r in down for c in across]
    np.testing.assert_array_equal(got[0], np.stack(expected))
    same = jax.jit(bucketised)(jnp.arange(26.0 * 27).reshape(26, 27, 1), *patches([(26, 27)]))
    np.testing.assert_array_equal(same[0, :, 0], np.arange(26 * 27))
    gradient = jax.grad(lambda t: bucketised(t, *patches(sizes[:1])).sum())(table)
    np.testing.assert_array_equal(gradient[:, :, 0], [[2, 2, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]])


def test_places_on_an_edge_go_where_published_code_rounds_them():
    """29 · (1 / 58) is half in single precision, and 47 · (1 / 94) less: as torch has it, by a table of 2."""
    for count, index, bucket in ((58, 29, 1), (94, 47, 0)):
        got = bucketised(jnp.array([[[0.0]], [[1.0]]]), jnp.array([[[index, 0]]]), jnp.array([[[count, 1]]]))
        assert got[0, 0, 0] == bucket
        assert bucket == (np.float32(index) * (np.float32(1) / np.float32(count)) >= np.float32(0.5))


def test_pictures_past_the_longest_have_no_places():
    at = jnp.array([[[0, 0], [0, 0]]])
    got = bucketised(jnp.ones((2, 2, 1)), at, jnp.array([[[LONGEST + 1, 1], [0, 0]]]))
    assert np.isnan(got[0, 0]).all()
    assert np.isfinite(got[0, 1]).all()
