"""Numerics of the TPU kernels, interpreted on a CPU. That they compile for TPUs: tests/test_tpu.py."""

import functools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interval_cases import both_ways, close, draw, equals_a_dense_mask, masks

from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, make_mesh
from mmjax.nn import attention
from mmjax.nn.kernels import backend, tpu
from mmjax.nn.kernels.inputs import Inputs, Static
from mmjax.nn.kernels.tpu_blocks import Blocks
from mmjax.sequence import intervals


@pytest.fixture(autouse=True)
def kernels():
    jax.clear_caches()  # what was traced before keeps its own kernel
    with backend.use("tpu"):
        yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("length", "heads", "kv", "size", "dtype"),
    [(640, 4, 1, 64, "float32"), (401, 3, 3, 128, "float32"), (384, 8, 1, 80, "bfloat16")],
)
def test_equals_a_dense_mask_in_float64(rng, length, heads, kv, size, dtype):
    """Every row of the table; lengths that are whole blocks and not, head sizes that fill the lanes and do not."""
    equals_a_dense_mask(rng, masks(length), length, heads, kv, dtype, size, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_the_blocks_that_ship(rng, size):
    """Blocks of several parts, both of queries and of keys, in bfloat16."""
    length = 1024
    cases = {name: masks(length)[name] for name in ("causal", "packed", "images", "perceiver")}
    x = Inputs(
        *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 2, 2, length, size), *[(1, 2, length, size)] * 2)),
        *[None] * 8,
    )
    blocks = Blocks.of(x)
    assert blocks.queries > blocks.query_part
    assert blocks.keys > blocks.key_part
    equals_a_dense_mask(rng, cases, length, 4, 2, "bfloat16", size, size)


def table_of(params, query, key):
    """A bias by distance, by comparisons: what a TPU kernel can do."""
    distance = jnp.clip(query[:, :, None] - key[:, None, :] + 4, 0, 8)[:, None]
    # (Slices as such: Pallas of jax 0.7 takes an index for a look-up.)
    column = lambda n: jax.lax.slice_in_dim(params, n, n + 1, axis=1)[None, :, :, None]  # noqa: E731
    return sum(jnp.where(distance == n, column(n), 0.0) for n in range(9))


def gathered(params, query, key):
    distance = jnp.clip(query[:, :, None] - key[:, None, :] + 4, 0, 8)
    return jnp.moveaxis(params[:, distance], 0, 1)


@pytest.mark.parametrize(("size", "kv"), [(32, 2), (128, 4)])
def test_options_equal_a_dense_mask(rng, size, kv):
    """All options at once: other lengths of queries and keys, labels in any order, queries that see nothing."""
    b, length, keys, heads = 2, 137, 301, 4
    qkv = draw(rng, b, length, keys, heads, kv, size, size)
    order = np.stack([rng.permutation(keys).astype(np.int32) for _ in range(b)])
    order[:, 240:] = -1
    lo = rng.integers(0, keys, (b, length), dtype=np.int32)
    see = (order, lo, lo + rng.integers(-3, keys, (b, length), dtype=np.int32))
    key_bias = rng.normal(size=(b, keys)).astype(np.float32)
    key_bias[:, 5] = -np.inf
    table = rng.normal(size=(heads, 9)).astype(np.float32)
    where = tuple(rng.integers(0, 9, (b, n), dtype=np.int32) for n in (length, keys))
    sinks = rng.normal(size=heads).astype(np.float32)
    cotangents = tuple(rng.normal(size=(b, length, heads, *e)).astype(np.float32) for e in [(size,), ()])
    given = {"key_bias": key_bias, "sinks": sinks, "params": table, "where": where, "softcap": 0.7}
    out, lse, (grads, *rest) = both_ways(qkv, see, cotangents, function=table_of, **given)
    assert tpu.refusal(Static(1.0, None, table_of), biased(see, (kv, heads // kv), size, table)) is None
    expected, expected_lse, _, wanted = dense.attention(
        *qkv,
        dense.seen(*see),
        key_bias=key_bias,
        bias=np.asarray(gathered(jnp.asarray(table), *map(jnp.asarray, where))),
        softcap=0.7,
        sinks=sinks,
        d_out=cotangents[0],
        d_lse=cotangents[1],
    )
    close("out", out, expected, 1e-5)
    close("lse", lse, expected_lse, 1e-5)
    distance = np.clip(where[0][:, :, None] - where[1][:, None, :] + 4, 0, 8)
    by_distance = np.stack([wanted["bias"].transpose(1, 0, 2, 3)[:, distance == d].sum(-1) for d in range(9)], 1)
    names = ("q", "k", "v", "key_bias", "sinks")
    for name, got, want in zip((*names, "bias"), (*grads, *rest), (*map(wanted.get, names), by_distance), strict=True):
        close(name, got, want, 1e-5)


def inputs(see, heads=(1, 2), size=128):
    length, keys = see[1].shape[1], see[0].shape[1]
    of = lambda *s: jnp.zeros((1, *s), jnp.bfloat16)  # noqa: E731
    return Inputs(of(*heads, length, size), of(heads[0], keys, size), of(heads[0], keys, size), *see, *[None] * 5)


def biased(see, heads, size, table):
    where = [jnp.zeros(see[n].shape[:1] + see[n].shape[1:], jnp.int32) for n in (1, 0)]
    return inputs(see, heads, size).replace(bias_params=jnp.asarray(table), bias_query=where[0], bias_key=where[1])


def test_what_no_interval_reaches_is_not_computed():
    """NaN in such parts of keys and values is not met (a weight of zero times it would be NaN), nor backwards."""
    lo, hi = intervals.packed([300, 700, 536])
    see = tuple(jnp.asarray(x, jnp.int32)[None] for x in (np.arange(1536), lo, hi))
    q = jnp.ones((1, 1536, 1, 128))
    # Of queries 256 to 511 the part of keys before them is reached, none of those after them; and so on.
    for first in (0, 512, 1024):
        mine = slice(first, first + 256)
        k = jnp.ones((1, 1536, 1, 128)).at[:, first + 256 :].set(np.nan)
        if first == 1024:
            k = k.at[:, :768].set(np.nan)  # the third document begins at 1000, in the part that begins at 768
            lo_here = jnp.full((1, 256), 1000)
        else:
            lo_here = see[1][:, mine]
        call = lambda q, k, lo: attention.attend(q, k, k, see[0], lo, see[2][:, mine])[0].sum()  # noqa: E731, B023
        value, grads = jax.value_and_grad(call, (0, 1))(q[:, mine], k, lo_here)
        assert np.isfinite(value), first
        assert all(np.isfinite(grad).all() for grad in grads), first


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(rng):
    qkv = draw(rng, 2, 130, 256, 2, 1, 16, 16)
    order = np.tile(np.arange(256, dtype=np.int32), (2, 1))
    order[:, 20:] = -1
    see = (order, np.zeros((2, 130), np.int32), np.full((2, 130), -1, np.int32))
    ones = np.ones((2, 130, 2, 16), np.float32), np.ones((2, 130, 2), np.float32)
    out, lse, (grads, *_) = both_ways(qkv, see, ones)
    assert not np.any(out)
    assert np.all(np.isneginf(lse))
    assert not any(np.any(g) for g in grads)


def test_a_whole_tile_is_not_masked_and_an_empty_slot_in_it_is():
    see = tuple(jnp.asarray(x, jnp.int32)[None] for x in (np.arange(512), *intervals.prefix(512, 512)))
    x = inputs(see)
    padded, grid = tpu.layout(x)
    of, _ = tpu.ranges(padded, grid)

    def full(of):
        return (of["most"][:, :, None] <= of["whole"][:, None]) & (of["high"][:, None] <= of["least"][:, :, None])

    assert full(of).all()
    hole, _ = tpu.ranges(padded.replace(order=padded.order.at[0, 300].set(-1)), grid)
    assert full(hole)[0, 0].tolist() == [True, False]


def test_what_a_kernel_cannot_do_is_left_to_xla():
    see = tuple(jnp.asarray(x, jnp.int32)[None] for x in (np.arange(512), *intervals.causal(512)))
    x, static = inputs(see), Static(1.0, None, None)
    assert tpu.refusal(static, x) is None
    given = biased(see, (1, 2), 128, np.zeros((2, 9), np.float32))
    assert tpu.refusal(Static(1.0, None, table_of), given) is None
    assert "lower the bias" in tpu.refusal(Static(1.0, None, gathered), given)  # a look-up
    one = lambda params, query, key: table_of(params[:1], query, key)  # noqa: E731
    assert "from its own" in tpu.refusal(Static(1.0, None, one), given)
    narrow = given.replace(bias_query=given.bias_query.astype(jnp.int8))
    assert "lower the bias" in tpu.refusal(Static(1.0, None, table_of), narrow)
    assert "bfloat16" in tpu.refusal(static, x.replace(q=x.q.astype(jnp.float16)))
    assert "256" in tpu.refusal(static, inputs(see, size=512))
    assert "fewer than 128" in tpu.refusal(static, inputs(tuple(a[:, :100] for a in see)))
    text = str(jax.make_jaxpr(functools.partial(backend.forward, Static(1.0, None, gathered)))(given))
    assert "pallas_call" not in text


def test_a_program_gets_the_kernel_of_the_platform_it_is_compiled_for():
    see = tuple(jnp.asarray(x, jnp.int32)[None] for x in (np.arange(512), *intervals.causal(512)))
    x = inputs(see)

    def program(kernel, *platforms):
        with backend.use(kernel):
            traced = jax.jit(functools.partial(backend.forward, Static(1.0, None, None))).trace(x)
            return traced.lower(lowering_platforms=platforms).as_text()

    assert "tpu_custom_call" in program("auto", "tpu")
    assert "tpu_custom_call" in program("tpu", "tpu")
    assert "tpu_custom_call" not in program("xla", "tpu")
    assert "tpu_custom_call" not in program("auto", "cpu")
    with (
        pytest.raises(InputError, match="no kernel of attention 'cudnn'; choose one of auto, xla, tpu, gpu"),
        backend.use("cudnn"),
    ):
        pass


@pytest.mark.parametrize("explicit", [False, True])
def test_on_a_mesh_every_platform_gets_its_kernel(explicit):
    """Types say over which devices results vary, and every kernel must say so alike."""
    mesh = make_mesh(MeshConfig(data=2, tensor=2, sequence=2, explicit=explicit))
    q, k = (jnp.zeros((2, 512, heads, 64), jnp.bfloat16) for heads in (4, 2))
    see = tuple(jnp.tile(jnp.asarray(x, jnp.int32)[None], (2, 1)) for x in (np.arange(512), *intervals.causal(512)))
    table = jnp.zeros((4, 9))

    def total(q, k, table):
        bias = attention.Bias(table_of, table, see[1], see[0])
        return attention.attend(q, k, k, *see, bias=bias)[0].astype(jnp.float32).sum()

    for devices in (mesh, make_mesh(MeshConfig(explicit=explicit), jax.devices()[:1])):
        for how in ("gather", "ring"):
            with jax.set_mesh(devices), backend.use("auto"), attention.context(how):
                traced = jax.jit(jax.grad(total, (0, 1))).trace(q, k, table)
            assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
            assert "custom_call @tpu" not in traced.lower(lowering_platforms=("cpu",)).as_text()
