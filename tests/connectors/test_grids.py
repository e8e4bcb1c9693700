"""Index arithmetic of grid connectors, pooling and merging by hand, and every grid connector on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny import randomised

from mmjax.connectors import abstractor, grids, linear, merger, mlp, pixel_shuffle, pool, restore, wico
from mmjax.core import meshes, spec
from mmjax.core.errors import InputError
from mmjax.sequence import windows


def ints(values):
    return jnp.asarray(values, jnp.int32)[None]


def test_squares_become_channels():
    #  0 1  4 5
    #  2 3  6 7     two values each: 10 · patch, 10 · patch + 1
    x = (10 * jnp.arange(8, dtype=jnp.float32)[:, None] + jnp.arange(2, dtype=jnp.float32)[None])[None]
    rest = jnp.concatenate([x, x[:, :3]], axis=1)
    for given in (x, rest):  # a row need not divide into squares
        got = grids.concatenate(given, 2)[0, :2]
        np.testing.assert_array_equal(got, [[0, 1, 10, 11, 20, 21, 30, 31], [40, 41, 50, 51, 60, 61, 70, 71]])
        got = grids.concatenate(given, 2, "channel")[0, :2]
        np.testing.assert_array_equal(got, [[0, 10, 20, 30, 1, 11, 21, 31], [40, 50, 60, 70, 41, 51, 61, 71]])
    order = ints([0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(grids.present(order, 2), [[True, True, False]])


def test_places_in_stitched_slices():
    # Two slices of 2 × 2 side by side, then a picture of 1 × 3.
    grid, slices = (
        ints([(1, 2, 2), (1, 2, 2), (1, 1, 3), (0, 0, 0)]),
        ints([(0, 1, 2), (0, 1, 2), (2, 1, 1), (3, 0, 0)]),
    )
    image, order = ints([0] * 4 + [1] * 4 + [2] * 3 + [-1]), ints([*range(11), -1])
    where = grids.places(image, order, grid, slices)
    np.testing.assert_array_equal(where.row[0], [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(where.column[0], [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 2, 0])
    right = grids.at(where.of, where.row, where.column + 1)
    np.testing.assert_array_equal(right[0], [1, 4, 3, 6, 5, -1, 7, -1, 9, 10, -1, -1])
    below = grids.at(where.of, where.row + 1, where.column)
    np.testing.assert_array_equal(below[0], [2, 3, -1, -1, 6, 7, -1, -1, -1, -1, -1, -1])
    maps = grids.wholes(grid, slices)
    np.testing.assert_array_equal(maps.exists[0], [True, False, True, False])
    np.testing.assert_array_equal(maps.columns[0, jnp.array([0, 2])], [4, 3])


@functools.partial(jax.jit, static_argnums=4)
def averages(x, image, order, grid, side):
    return grids.average(x, grids.places(image, order, grid), grids.wholes(grid), side)


def test_averages_of_bins(rng):
    sizes = [(5, 3), (1, 1), (4, 7)]
    x = [rng.normal(size=(*s, 2)).astype(np.float32) for s in sizes]
    flat = np.concatenate([a.reshape(-1, 2) for a in x] + [np.full((4, 2), 1e6, np.float32)])
    image = ints(np.concatenate([[i] * (a * b) for i, (a, b) in enumerate(sizes)] + [[-1] * 4]))
    order = jnp.where(image >= 0, jnp.arange(len(flat), dtype=jnp.int32)[None], -1)
    grid = ints([(1, *s) for s in sizes] + [(0, 0, 0)])
    for side in (1, 2, 3):
        got = averages(jnp.asarray(flat)[None], image, order, grid, side).reshape(4, side, side, 2)
        for n, a in enumerate(x):
            ends = [[(i * s // side, -(-(i + 1) * s // side)) for i in range(side)] for s in a.shape[:2]]
            want = [[a[t:b, left:right].mean((0, 1)) for left, right in ends[1]] for t, b in ends[0]]
            np.testing.assert_allclose(got[n], want, atol=1e-6)
        np.testing.assert_array_equal(got[3], 0)


def test_bilinear_samples_as_torch_places_them():
    for before, after in ((7, 4), (4, 7), (1, 3), (3, 1), (6, 3), (5, 5)):
        low, high, weight = grids.between(jnp.arange(after, dtype=jnp.int32), after, before)
        at = np.maximum((np.arange(after) + 0.5) * before / after - 0.5, 0)
        got = low + weight * (high - low)
        np.testing.assert_allclose(got, np.minimum(at, before - 1), atol=1e-6)


@pytest.mark.parametrize("kind", ["average", "max", "bilinear"])
def test_pooling_of_odd_frames(rng, kind):
    """Two frames of 3 × 5, then a picture of 4 × 2: squares by hand; bilinear of even sides is the average."""
    clip, picture = rng.normal(size=(2, 3, 5, 2)).astype(np.float32), rng.normal(size=(4, 2, 2)).astype(np.float32)
    flat = np.concatenate([clip.reshape(-1, 2), picture.reshape(-1, 2), np.full((3, 2), 1e6, np.float32)])
    cfg, reduce = pool.Config(2, kind, True), np.max if kind == "max" else np.mean
    out = jax.jit(lambda x, g: pool.pool(x, cfg, g, 20))(
        jnp.asarray(flat)[None], ints([(2, 3, 5), (1, 4, 2), (0, 0, 0)])
    )[0]
    n = cfg.tokens((2, 3, 5))
    assert n == (12 if kind == "bilinear" else 4)
    small = [reduce(picture[2 * i : 2 * i + 2], (0, 1)) for i in range(2)]
    np.testing.assert_allclose(out[n : n + 2], small, atol=1e-6)
    np.testing.assert_array_equal(out[n + 2 :], 0)
    if kind != "bilinear":
        want = [reduce(frame[:2, 2 * j : 2 * j + 2], (0, 1)) for frame in clip for j in range(2)]
        np.testing.assert_allclose(out[:n], want, atol=1e-6)


def test_pooling_of_squares_is_pooling_of_rows(rng):
    picture = rng.normal(size=(4, 6, 3)).astype(np.float32)
    squares = picture.reshape(-1, 3)[windows.order((1, 4, 6), 2)[0]]
    for kind in ("average", "max"):
        got = pool.pool(jnp.asarray(squares)[None], pool.Config(2, kind))
        want = pool.pool(jnp.asarray(picture.reshape(1, -1, 3)), pool.Config(2, kind, True), ints([(1, 4, 6)]))
        np.testing.assert_allclose(got[0], want[0, :6], atol=1e-6)


def test_tokens_and_what_is_refused():
    for cfg in (pixel_shuffle.Config(4, 5), merger.Config(4, 5), pool.Config(), wico.Config(4, 5)):
        assert cfg.tokens((3, 4, 6)) == 18
        with pytest.raises(InputError, match="multiples of 2"):
            cfg.tokens((1, 4, 5))
    for cfg in (linear.Config(4, 5), mlp.Config(4, 5, depth=3)):
        assert cfg.tokens((3, 4, 5)) == 60
    with pytest.raises(InputError, match="raster=True"):
        pool.Config(2, "bilinear")
    with pytest.raises(InputError, match="give grid="):
        pool.pool(jnp.ones((1, 4, 2)), pool.Config(2, "max", True))


ROWS, WIDTH = 8, 8
SEE = {
    "image": [0] * 6 + [1] * 6 + [2] * 12 + [-1] * 2,
    "order": [*range(24), -1, -1],
    "grid": [(1, 2, 3), (1, 2, 3), (1, 3, 4), (0, 0, 0)],
    "slices": [(0, 1, 2), (0, 1, 2), (2, 1, 1), (3, 0, 0)],
}
CASES = {
    "mlp": (mlp, mlp.Config(WIDTH, 6, depth=3), ()),
    "pixel_shuffle": (pixel_shuffle, pixel_shuffle.Config(WIDTH, 10), ()),
    "merger": (merger, merger.Config(WIDTH, 10, norm="rms", reduce=True, channels="channel"), ()),
    "pool": (pool, pool.Config(2, "bilinear", True, inputs=WIDTH, outputs=6), ("grid",)),
    "wico": (wico, wico.Config(WIDTH, 10, 2, 1, layers=2), ("grid",)),
    "abstractor": (
        abstractor,
        abstractor.Config(WIDTH, 6, 10, 2, 2, positions=3, prenorm=True, eos=2),
        ("image", "order", "grid"),
    ),
    "restore": (restore, restore.Config(WIDTH, 2, 2, 4), ("image", "order", "grid", "slices")),
}


@functools.cache
def reference(name):
    """Module, config, arguments, output and gradients, without a mesh."""
    of, cfg, fields = CASES[name]
    params, x = randomised(of.spec(cfg)), jax.random.normal(jax.random.key(1), (ROWS, 26, WIDTH))
    see = {k: jnp.tile(ints(SEE[k]), (ROWS, *[1] * np.ndim(SEE[k]))) for k in fields}
    call = functools.partial(_call, of, cfg)
    args = params, x, see
    return of.spec(cfg), call, args, jax.jit(call)(*args), jax.jit(jax.grad(_loss(call), (0, 1)))(*args)


def _call(of, cfg, params, x, see):
    return of.apply(params, x, cfg, **see)


def _loss(call):
    return lambda params, x, see: jnp.sin(call(params, x, see)).sum()


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-5 * max(1, np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", CASES)
def test_meshes(name, kind):
    of, call, (params, x, see), out, gradient = reference(name)
    mesh, rules = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3), meshes.Rules()
    with jax.set_mesh(mesh):
        params = jax.device_put(params, spec.shardings(of, mesh, rules))
        x, see = jax.device_put((x, see), jax.NamedSharding(mesh, P(("data", "fsdp"))))
        close(jax.jit(call)(params, x, see), out)
        close(jax.jit(jax.grad(_loss(call), (0, 1)))(params, x, see), gradient)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_transforms(name):
    """Inside shard_map, under vmap, rematerialised: as plainly."""
    _, call, (params, x, see), out, gradient = reference(name)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    local = jax.shard_map(call, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    close(jax.jit(local)(params, x, see), out)
    close(jax.jit(jax.grad(_loss(local), (0, 1)))(params, x, see), gradient)

    halves = jax.tree.map(lambda a: a.reshape(2, ROWS // 2, *a.shape[1:]), (x, see))
    close(jax.jit(jax.vmap(lambda x, see: call(params, x, see)))(*halves).reshape(out.shape), out)
    close(jax.jit(jax.grad(jax.checkpoint(_loss(call)), (0, 1)))(params, x, see), gradient)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("along", ["sequence", "channels"])
def test_expansion_on_meshes(along, kind):
    x = jax.random.normal(jax.random.key(1), (ROWS, 7, WIDTH))
    order = jnp.tile(ints([0, 1, 2, 3, 4, 5, -1]), (ROWS, 1))
    picture = jnp.tile(ints([-1, 0, 0, 0, -1, 1, -1]), (ROWS, 1))
    see = {
        "picture": picture,
        "document": jnp.zeros_like(order),
        "order": order,
        "lo": jnp.zeros_like(order),
        "hi": order,
    }

    def call(x, see):
        return wico.expand(x, 2, 12, along=along, **see).x

    def loss(x, see):
        return jnp.sin(call(x, see)).sum()

    out, gradient = jax.jit(call)(x, see), jax.jit(jax.grad(loss))(x, see)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        x, see = jax.device_put((x, see), jax.NamedSharding(mesh, P(("data", "fsdp"))))
        close(jax.jit(call)(x, see), out)
        close(jax.jit(jax.grad(loss))(x, see), gradient)
