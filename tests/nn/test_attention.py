import functools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interval_cases import both_ways, close, draw, equals_a_dense_mask, masks, stack

from mmjax.core import meshes
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, make_mesh
from mmjax.nn import attention
from mmjax.nn.kernels import xla
from mmjax.sequence import intervals


@pytest.fixture(params=[(16, 24), (256, 256)], ids=["many tiles", "few tiles"])
def tiles(request, monkeypatch):
    """Tiles so small that short rows have many, uneven ones, and those of use."""
    monkeypatch.setattr(xla, "QUERIES", request.param[0])
    monkeypatch.setattr(xla, "KEYS", request.param[1])


# Every row of the table is a row of the batch: all masks × all groups × all lengths × both types.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("length", [1, 7, 129, 640])
def test_equals_a_dense_mask_in_float64(rng, length, group, dtype):
    equals_a_dense_mask(rng, masks(length), length, group, 1, dtype)


def relative(table, query, key):
    """A learned bias by distance, [heads, distances]."""
    distance = jnp.clip(query[:, :, None] - key[:, None, :] + 4, 0, table.shape[1] - 1)
    return jnp.moveaxis(table[:, distance], 0, 1)


@pytest.mark.parametrize("option", ["softcap", "key_bias", "bias", "sinks", "all"])
def test_options_equal_a_dense_mask(rng, tiles, option):
    """Other lengths of queries and keys, some queries that see nothing, some keys hidden by their bias."""
    b, length, keys, heads = 3, 37, 53, 4
    qkv = draw(rng, b, length, keys, heads, 2)
    order = np.tile(np.arange(keys, dtype=np.int32), (b, 1))
    order[:, 40:] = -1
    lo = rng.integers(0, keys, (b, length), dtype=np.int32)
    see = (order, lo, lo + rng.integers(-3, keys, (b, length), dtype=np.int32))
    key_bias = rng.normal(size=(b, keys)).astype(np.float32)
    key_bias[:, 5] = -np.inf
    table = rng.normal(size=(heads, 9)).astype(np.float32)
    where = tuple(rng.integers(0, 9, (b, n), dtype=np.int32) for n in (length, keys))
    given = {
        "softcap": {"softcap": 0.7},
        "key_bias": {"key_bias": key_bias},
        "bias": {"params": table, "where": where, "function": relative},
        "sinks": {"sinks": rng.normal(size=heads).astype(np.float32)},
    }
    given = {k: v for name in given if option in (name, "all") for k, v in given[name].items()}
    cotangents = tuple(rng.normal(size=(b, length, heads, *e)).astype(np.float32) for e in [(10,), ()])
    out, lse, grads = both_ways(qkv, see, cotangents, **given)
    full = np.asarray(relative(jnp.asarray(table), *map(jnp.asarray, where)))
    expected, expected_lse, _, wanted = dense.attention(
        *qkv,
        dense.seen(*see),
        key_bias=given.get("key_bias"),
        bias=full if "params" in given else None,
        softcap=given.get("softcap"),
        sinks=given.get("sinks"),
        d_out=cotangents[0],
        d_lse=cotangents[1],
    )
    close("out", out, expected, 1e-5)
    close("lse", lse, expected_lse, 1e-5)
    for got, which in zip(grads[0], "qkv", strict=True):
        close(which, got, wanted[which], 1e-5)
    if "key_bias" in given:
        close("key_bias", grads[1], wanted["key_bias"], 1e-5)
    if "sinks" in given:
        close("sinks", grads[2], wanted["sinks"], 1e-5)
    if "params" in given:
        distance = np.clip(where[0][:, :, None] - where[1][:, None, :] + 4, 0, 8)
        by_distance = np.stack([wanted["bias"].transpose(1, 0, 2, 3)[:, distance == d].sum(-1) for d in range(9)], 1)
        close("bias", grads[3], by_distance, 1e-5)


def test_a_bias_of_one_head_serves_all(rng, tiles):
    qkv, table = draw(rng, 2, 33, 33, 4, 2), rng.normal(size=(1, 9)).astype(np.float32)
    where = tuple(rng.integers(0, 9, (2, 33), dtype=np.int32) for _ in range(2))
    see = tuple(np.tile(x, (2, 1)).astype(np.int32) for x in (np.arange(33), *intervals.causal(33)))
    cotangents = tuple(rng.normal(size=(2, 33, 4, *e)).astype(np.float32) for e in [(10,), ()])

    def shared(params, query, key):
        return relative(params["table"][:1], query, key)

    # The parameters' leading axis is always H heads; on one device a function may use one and return one.
    four = {"table": np.repeat(table, 4, 0)}
    got = both_ways(qkv, see, cotangents, params=four, where=where, function=shared)
    same = both_ways(qkv, see, cotangents, params=np.repeat(table, 4, 0), where=where, function=relative)
    np.testing.assert_allclose(got[0], same[0], atol=1e-6)
    np.testing.assert_allclose(got[2][3]["table"][0], same[2][3].sum(0), atol=1e-4)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(rng, tiles):
    qkv = draw(rng, 2, 5, 40, 2, 1)
    order = np.tile(np.arange(40, dtype=np.int32), (2, 1))
    order[:, 20:] = -1  # an empty slot must not be seen by an empty query either
    see = (order, np.zeros((2, 5), np.int32), np.full((2, 5), -1, np.int32))
    ones = np.ones((2, 5, 2, 10), np.float32), np.ones((2, 5, 2), np.float32)
    out, lse, (grads, *_) = both_ways(qkv, see, ones)
    assert not np.any(out)
    assert np.all(np.isneginf(lse))
    assert not any(np.any(g) for g in grads)


def test_extreme_scores_stay_finite(rng, tiles):
    q, k, v = draw(rng, 2, 40, 40, 2, 2)
    see = tuple(np.tile(x, (2, 1)).astype(np.int32) for x in (np.arange(40), *intervals.causal(40)))
    ones = np.ones((2, 40, 2, 10), np.float32), np.ones((2, 40, 2), np.float32)
    out, lse, (grads, *_) = both_ways((1e4 * q, 1e4 * k, v), see, ones)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    assert all(np.isfinite(g).all() for g in grads)


def test_rows_do_not_depend_on_each_other_bit_for_bit(rng, tiles):
    """Contents and intervals of the other rows change; nothing in the first does, forwards or backwards."""
    qkv = draw(rng, 3, 61, 61, 4, 2)
    cases = masks(61)
    see = stack([cases["packed"], cases["causal"], cases["images"]], 61)
    other = stack([cases["packed"], cases["pruned"], cases["blocks"]], 61)
    ones = tuple(rng.normal(size=(3, 61, 4, *e)).astype(np.float32) for e in [(10,), ()])
    changed = tuple(np.concatenate([x[:1], rng.normal(size=x[1:].shape).astype(np.float32)]) for x in qkv)
    a, b = both_ways(qkv, see, ones), both_ways(changed, other, ones)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), (a[0], a[1], a[2][0]), (b[0], b[1], b[2][0]))


def test_rows_do_not_depend_on_how_they_are_grouped(rng, monkeypatch):
    qkv = draw(rng, 4, 50, 50, 2, 1)
    see = stack([masks(50)[n] for n in ("packed", "causal", "images", "blocks")], 50)
    monkeypatch.setattr(xla, "QUERIES", 16)
    monkeypatch.setattr(xla, "KEYS", 16)
    results = []
    for scores in (1, 2**21):
        monkeypatch.setattr(xla, "SCORES", scores)
        results.append(jax.jit(lambda *x: attention.attend(*x))(*qkv, *see))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-6)


def test_tiles_that_no_interval_reaches_are_not_computed(monkeypatch):
    """For every block of queries, exactly the hull of the tiles its intervals touch: NaN elsewhere is not met."""
    monkeypatch.setattr(xla, "QUERIES", 8)
    monkeypatch.setattr(xla, "KEYS", 8)
    lo, hi = intervals.packed([12, 20, 16])
    of = lambda x: jnp.asarray(x, jnp.int32)[None]  # noqa: E731
    q = jnp.ones((1, 40, 1, 4))
    k = jnp.ones((1, 48, 1, 4)).at[:, 40:].set(np.nan)  # seen by nobody: the document that has them is cut short
    out, _ = attention.attend(q, k, k, of(np.arange(48)), of(lo[:40]), of(np.minimum(hi, 39)[:40]))
    np.testing.assert_array_equal(out, 1.0)
    heads = jnp.zeros((1, 1, 1, 48, 4)), jnp.zeros((1, 1, 48, 4)), jnp.zeros((1, 1, 48, 4))
    inputs = xla.Inputs(*heads, of(np.arange(48)), of(lo), of(intervals.packed([12, 20, 16])[1]), *[None] * 5)
    *_, start, stop = xla._tiles(inputs, xla.Tiling.of(inputs))
    assert start.tolist() == [[0, 0, 1, 1, 4, 4]]
    assert stop.tolist() == [[1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("label", [23, 24], ids=["a tile's last label", "a tile's first label"])
def test_one_label_at_the_edge_of_a_tile_is_reached(rng, monkeypatch, label):
    monkeypatch.setattr(xla, "QUERIES", 16)
    monkeypatch.setattr(xla, "KEYS", 24)
    q, k, v = map(jnp.asarray, draw(rng, 1, 32, 48, 4, 2))
    see = jnp.full((1, 32), label, jnp.int32)
    out, _ = attention.attend(q, k, v, jnp.arange(48)[None], see, see)
    np.testing.assert_allclose(out, jnp.broadcast_to(jnp.repeat(v[:, label], 2, axis=1)[:, None], out.shape), rtol=1e-6)


def test_merging_two_sets_of_keys_is_attention_over_both(rng, tiles):
    q, k, v = draw(rng, 2, 30, 41, 4, 2)
    order = jnp.tile(jnp.arange(41), (2, 1))
    lo = jnp.asarray(rng.integers(0, 41, (2, 30)), jnp.int32)
    hi = lo + jnp.asarray(rng.integers(-3, 20, (2, 30)), jnp.int32)
    cotangent = rng.normal(size=(2, 30, 4, 10)).astype(np.float32)

    def whole(q, k, v):
        out, lse = attention.attend(q, k, v, order, lo, hi)
        return (out * cotangent).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)

    def parts(q, k, v):
        a = attention.attend(q, k[:, :17], v[:, :17], order[:, :17], lo, hi)
        b = attention.attend(q, k[:, 17:], v[:, 17:], order[:, 17:], lo, hi)
        out, lse = attention.merge(*a, *b)
        return (out * cotangent).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)

    one, two = (jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, k, v) for f in (whole, parts))
    np.testing.assert_array_equal(np.isfinite(one[0][1][1]), np.isfinite(two[0][1][1]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), two[0][1], one[0][1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), two[1], one[1])


def test_received_is_the_column_sum_of_the_softmax(rng, tiles):
    q, k, v = draw(rng, 3, 37, 37, 4, 2)
    see = stack([masks(37)[n] for n in ("packed", "images", "pruned")], 37)
    key_bias = jnp.asarray(rng.normal(size=(3, 37)), jnp.float32)
    weight = jnp.asarray(rng.random((3, 37)), jnp.float32).at[:, ::3].set(0)  # only chosen queries count

    @jax.jit
    def ours(q, k, v):
        _, lse = attention.attend(q, k, v, *see, key_bias=key_bias, softcap=2.0)
        return attention.received(q, k, *see, lse, weight, key_bias=key_bias, softcap=2.0)

    _, _, p, _ = dense.attention(q, k, v, dense.seen(*see), key_bias=key_bias, softcap=2.0)
    np.testing.assert_allclose(ours(q, k, v), np.einsum("bhls,bl->bsh", p, weight), atol=1e-5)


def test_memory_is_linear_in_length():
    """No [L, S] buffer in the compiled program: four times the length takes about four times the temporaries."""

    def temporaries(length):
        q, i = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
        grad = jax.grad(lambda q, k, v, o, lo, hi: attention.attend(q, k, v, o, lo, hi)[0].sum(), (0, 1, 2))
        return jax.jit(grad).lower(q, q, q, i, i, i).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 5 * temporaries(2048)


def test_heads_that_do_not_divide_are_refused():
    q, k = jnp.zeros((1, 2, 5, 4)), jnp.zeros((1, 2, 2, 4))
    i = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(InputError, match="5 query heads cannot share 2 key heads"):
        attention.attend(q, k, k, i, i, i)


def everything(q, k, v, key_bias, sinks, table, order, lo, hi, where, cotangent):
    """All options at once, gradients too."""

    def total(q, k, v, key_bias, sinks, table):
        bias = attention.Bias(relative, table, *where)
        out, lse = attention.attend(q, k, v, order, lo, hi, key_bias=key_bias, sinks=sinks, bias=bias, softcap=3.0)
        return (out * cotangent).sum() + lse.sum(), (out, lse)

    grads, (out, lse) = jax.grad(total, (0, 1, 2, 3, 4, 5), has_aux=True)(q, k, v, key_bias, sinks, table)
    mass = attention.received(q, k, order, lo, hi, lse, jnp.ones(lo.shape), key_bias=key_bias)
    return out, lse, mass, grads


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(5)
    b, n = 8, 30
    see = stack([masks(n)[m] for m in list(masks(n))[:b]], n)
    arrays = (*draw(rng, b, n, n, 4, 2), *(rng.normal(size=s).astype(np.float32) for s in [(b, n), (4,), (4, 9)]))
    where = tuple(rng.integers(0, 9, (b, n), dtype=np.int32) for _ in range(2))
    inputs = (*arrays, *see, where, rng.normal(size=(b, n, 4, 10)).astype(np.float32))
    return inputs, jax.jit(everything)(*inputs)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
# Two key heads on four devices are repeated; 30 tokens are split over two devices, but not over four.
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4), (8, 1, 1), (2, 1, 2, 2), (1, 1, 4, 2), (1, 2, 1, 4)])
def test_any_mesh_gives_the_same(setting, sizes, explicit):
    inputs, expected = setting
    mesh = make_mesh(MeshConfig(*sizes, explicit=explicit))
    with jax.set_mesh(mesh):
        got = jax.jit(everything)(*inputs)
    split = sizes[3:] == (2,)
    assert got[0].addressable_shards[0].data.shape[1] == (15 if split else 30)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), got, expected)


def test_rows_that_devices_cannot_share_evenly_are_computed_by_all(setting):
    inputs, _ = setting
    three = tuple(x[:3] for x in (*inputs[:3], *inputs[6:9]))
    expected = jax.jit(attention.attend)(*three)
    with jax.set_mesh(make_mesh(MeshConfig(8, 1, 1))):
        got = jax.jit(attention.attend)(*three)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, expected)


def test_inside_shard_map(setting):
    """Types of what differs between devices are right: sinks and tables, which all share, get summed gradients."""
    inputs, expected = setting
    P = jax.sharding.PartitionSpec
    rows, whole = P("data"), P()
    specs = (rows, rows, rows, rows, whole, whole, rows, rows, rows, (rows, rows), rows)
    mesh = make_mesh(MeshConfig(4, 1, 1), jax.devices()[:4])
    split = jax.shard_map(
        everything, mesh=mesh, in_specs=specs, out_specs=(rows, rows, rows, (rows, rows, rows, rows, whole, whole))
    )
    got = jax.jit(split)(*inputs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), got, expected)


def test_under_vmap_and_remat(rng):
    qkv = draw(rng, 6, 20, 20, 2, 1)
    see = stack([masks(20)[m] for m in list(masks(20))[:6]], 20)

    def loss(qkv, see):
        return (attention.attend(*qkv, *see)[0] ** 2).sum()

    cut = lambda tree: jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), tree)  # noqa: E731
    expected = jax.jit(jax.grad(loss))(qkv, see)
    mapped = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(cut(qkv), cut(see))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), mapped, cut(expected))


def test_parts_of_the_mesh_in_force():
    assert meshes.parts("batch") == 1
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        assert (meshes.parts("batch"), meshes.parts("heads"), meshes.parts("nothing")) == (4, 2, 1)
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2, 2))):
        assert meshes.parts("length") == 2
        with meshes.whole("length"):
            assert (meshes.parts("length"), meshes.parts("heads")) == (1, 2)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_keys_are_kept_split_and_gathered_in_use(rng, explicit):
    """What the backward pass keeps of keys and values is each device's own half."""
    q, k, v = (jnp.asarray(x) for x in draw(rng, 1, 32, 32, 2, 2))
    see = stack([masks(32)["packed"]], 32)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1, 2, explicit=explicit), jax.devices()[:2])):
        kept = jax.jit(lambda *x: jax.vjp(lambda *x: attention.attend(*x, *see), *x)[1])(q, k, v)
    parts = {x.shape: x.addressable_shards[0].data.shape for x in jax.tree.leaves(kept)}
    assert parts[1, 2, 32, 6] == (1, 2, 16, 6)
    assert parts[1, 2, 32, 10] == (1, 2, 16, 10)
