"""Parameters from specs, and the helpers that hide the mesh: no mesh, Auto, Explicit, inside shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmjax.core import sharding
from mmjax.core import spec as specs
from mmjax.core.errors import InputError
from mmjax.core.sharding import MeshConfig, Rules, make_mesh
from mmjax.core.spec import Normal, ParamSpec

SPEC = {
    "table": ParamSpec((12, 8), ("vocab", "embed"), Normal(0.5)),
    "block": specs.stack({"kernel": ParamSpec((8, 6), ("embed", "mlp"), Normal(1.0))}, 3),
}


def test_initial_values_do_not_depend_on_the_mesh_or_on_other_parameters():
    alone = specs.init({"table": SPEC["table"]}, jax.random.key(1))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = specs.shardings(SPEC, mesh, Rules())
    made = jax.jit(lambda k: specs.init(SPEC, k), out_shardings=placed)(jax.random.key(1))
    # The random bits are equal; the inverse error function is rounded as XLA fuses it.
    np.testing.assert_allclose(made["table"], alone["table"], rtol=1e-5, atol=1e-7)
    assert made["table"].sharding.spec == P("tensor", "fsdp")
    assert made["block"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert made["block"]["kernel"].shape == (3, 8, 6)
    np.testing.assert_allclose(np.std(made["block"]["kernel"]), 0.88, atol=0.12)  # a normal cut at two deviations


def test_count_and_abstract_agree_with_the_values():
    shapes = specs.abstract(SPEC)
    assert specs.count(SPEC) == 12 * 8 + 3 * 8 * 6 == sum(x.size for x in jax.tree.leaves(shapes))


def test_axis_names_must_match_the_shape():
    with pytest.raises(ValueError, match="needs 2 axis names"):
        ParamSpec((3, 4), ("embed",))


def test_partition_uses_a_mesh_axis_once_and_leaves_uneven_dimensions_whole():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.partition(("heads", "mlp"), Rules(), sizes) == P("tensor", None)
    assert sharding.partition(("batch", None), Rules(), sizes, (8, 3)) == P(("data", "fsdp"), None)
    assert sharding.partition(("heads",), Rules(), sizes, (3,)) == P(None)
    assert sharding.partition(("length", "length"), Rules(), {"sequence": 1}) == P(None, None)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(InputError, match="does not fit 8 device"):
        make_mesh(MeshConfig(*sizes))


def test_neighbouring_devices_share_the_axes_with_the_most_traffic():
    ids = np.vectorize(lambda d: d.id)(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, sequence=2)).devices)
    assert ids[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]  # fsdp, sequence, tensor


@sharding.whole_rows("x", "order")
def running(x, cfg, *, order):
    """What mixes the tokens of a row: Explicit axes would refuse it of rows that are split."""
    assert sharding.parts("length") == 1
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


class Torus:
    """A chip of a TPU that is not here."""

    device_kind, platform, core_on_chip, slice_index = "TPU v5p", "tpu", 0, 0

    def __init__(self, n: int, *coords: int):
        self.id, self.process_index, self.coords = n, n // 4, coords


def test_axes_of_a_torus_are_split_where_no_others_give_the_mesh():
    """4 × 4 × 4 as 2 × 32: JAX joins whole axes alone; every chip is there once, and 32 are half of the torus."""
    chips = [Torus(n, n % 4, n // 4 % 4, n // 16) for n in range(64)]
    placed = make_mesh(MeshConfig(data=2, fsdp=32), chips).devices
    assert placed.shape == (2, 32, 1, 1)
    assert {d.id for d in placed.flat} == set(range(64))
    spread = [[len({d.coords[axis] for d in half.flat}) for axis in range(3)] for half in placed]
    assert [sorted(sizes) for sizes in spread] == [[2, 4, 4]] * 2


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 2, 2, 2), (2, 1, 1, 4)])
def test_helpers_give_the_same_on_every_mesh(inputs, sizes, explicit):
    w, table, ids, x, slot = inputs
    expected, grads = jax.value_and_grad(forward, (0, 1, 3))(*inputs)
    mesh = make_mesh(MeshConfig(*sizes, explicit=explicit))
    put = lambda a, *axes: jax.device_put(a, sharding.named(mesh, axes, Rules(), a.shape))  # noqa: E731
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
