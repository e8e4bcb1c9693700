"""Operations that hide the mesh: no mesh, Auto, Explicit, inside shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmjax.core import meshes, sharding
from mmjax.core.meshes import MeshConfig, Rules, make_mesh


@sharding.whole_rows("x", "order")
def running(x, cfg, *, order):
    """What mixes the tokens of a row: Explicit axes would refuse it of rows that are split."""
    assert meshes.parts("length") == 1
    x = jnp.concatenate([x, x[:, ::-1]], axis=1)[:, : order.shape[1]]
    return jnp.cumsum(x, axis=1) * sharding.take_rows(order, order)[..., None] + cfg


def forward(w, table, ids, x, slot):
    """Every helper once."""
    y = sharding.take(table, ids, ("batch", "length", None)) + sharding.dense(x, w, ("batch", "length", "mlp"))
    y = sharding.take_rows(sharding.constrain(y, ("batch", "length", None)), slot)
    y = sharding.regroup(sharding.regroup(y, (2, y.shape[2])), (3, 2))  # pairs of tokens; four of six values
    return jnp.sin(y).sum() + jnp.cos(running(x, 0.5, order=jnp.maximum(ids, 0) % 5)).sum()


@pytest.fixture
def inputs(rng):
    f = lambda *s: rng.normal(size=s).astype(np.float32)  # noqa: E731
    ids, slot = rng.integers(0, 12, (8, 6), dtype=np.int32), rng.integers(-1, 6, (8, 10), dtype=np.int32)
    return tuple(jnp.asarray(x) for x in (f(4, 6), f(12, 6), ids, f(8, 6, 4), slot))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 2, 2, 2), (2, 1, 1, 4)])
def test_helpers_give_the_same_on_every_mesh(inputs, sizes, explicit):
    w, table, ids, x, slot = inputs
    expected, grads = jax.value_and_grad(forward, (0, 1, 3))(*inputs)
    mesh = make_mesh(MeshConfig(*sizes, explicit=explicit))
    put = lambda a, *axes: jax.device_put(a, meshes.named(mesh, axes, Rules(), a.shape))  # noqa: E731
    placed = (
        put(w, "embed", "mlp"),
        put(table, "vocab", "embed"),
        put(ids, "batch", "length"),
        put(x, "batch", "length", None),
        put(slot, "batch", "length"),
    )
    with jax.set_mesh(mesh):
        value, got = jax.jit(jax.value_and_grad(forward, (0, 1, 3)))(*placed)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(got, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_helpers_inside_shard_map(inputs):
    mesh = make_mesh(MeshConfig(8, 1, 1))

    def local(w, table, ids, x, slot):
        return jax.lax.psum(forward(w, table, ids, x, slot), "data")

    row = P("data")
    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), row, row, row), out_specs=P())
    np.testing.assert_allclose(jax.jit(run)(*inputs), forward(*inputs), rtol=1e-5)


def test_take_rows_gives_zeros_for_negative_slots_and_never_wraps():
    x = np.arange(6, dtype=np.float32).reshape(1, 3, 2) + 1
    out = sharding.take_rows(jnp.asarray(x), jnp.array([[2, -1, 0, -3]]))
    np.testing.assert_array_equal(out, [[[5, 6], [0, 0], [1, 2], [0, 0]]])


def test_what_is_taken_apart_or_put_together_stays_split_where_it_divides():
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 1, 4, explicit=True))):
        x = sharding.constrain(jnp.arange(64.0).reshape(2, 8, 4), ("batch", "length", None))
        for shape, split in [((2,), "sequence"), ((2, 4), "sequence"), ((4, 4), None)]:
            y = jax.jit(sharding.regroup, static_argnums=1)(x, shape)
            np.testing.assert_array_equal(y, np.arange(64.0).reshape(2, -1, *shape))
            assert jax.typeof(y).sharding.spec[1] == split, shape
