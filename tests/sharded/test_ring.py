"""Keys and values that go round the devices of a split row: the numbers of one device, evenly shared, little memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interval_cases import draw, masks, stack
from jax.sharding import NamedSharding, PartitionSpec
from nn.test_attention import relative
from sharded import test_length as models

from mmjax.core import meshes, sharding, spec
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, make_mesh
from mmjax.nn import attention, ring, rope, transformer
from mmjax.nn.kernels import xla
from mmjax.nn.kernels.inputs import Inputs, Static
from mmjax.sequence import intervals

ROWS = 14


def mesh_of(*sizes, explicit=False):
    """data, fsdp, tensor, sequence."""
    return make_mesh(MeshConfig(*sizes, explicit=explicit), jax.devices()[: math.prod(sizes)])


@functools.cache
def setting(length, keys, dtype="float32"):
    """Every mask of the table, one more for an even number of rows, and all options."""
    rng = np.random.default_rng(length)
    longest = max(length, keys)
    cases = list(masks(longest).values())
    order, lo, hi = stack([*cases, cases[0]], longest)
    qkv = tuple(jnp.asarray(x, dtype) for x in draw(rng, ROWS, length, keys, 8, 2))
    key_bias, sinks, table = (rng.normal(size=s).astype(np.float32) for s in [(ROWS, keys), (8,), (8, 9)])
    where = tuple(rng.integers(0, 9, (ROWS, n), dtype=np.int32) for n in (length, keys))
    cotangents = tuple(rng.normal(size=(ROWS, length, 8, *e)).astype(np.float32) for e in [(10,), ()])
    return (qkv, key_bias, sinks, table), (order[:, :keys], lo[:, :length], hi[:, :length]), where, cotangents


def both_ways(learnt, see, where, cotangents, options):
    """attend's results and all gradients; without options those of q, k and v alone."""

    def total(learnt):
        qkv, key_bias, sinks, table = learnt
        given = {"key_bias": key_bias, "sinks": sinks, "bias": attention.Bias(relative, table, *where), "softcap": 3.0}
        out, lse = attention.attend(*qkv, *see, **(given if options else {}))
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return (out.astype(jnp.float32) * cotangents[0]).sum() + (finite * cotangents[1]).sum(), (out, lse)

    gradients, results = jax.grad(total, has_aux=True)(learnt)
    return results, gradients if options else gradients[0]


@functools.cache
def alone(length, keys, dtype, options):
    return jax.jit(both_ways, static_argnames="options")(*setting(length, keys, dtype), options=options)


def compare(mesh, length, keys, dtype="float32", options=True, near=2e-5):
    given = setting(length, keys, dtype)
    with jax.set_mesh(mesh), attention.context("ring"):
        got = jax.jit(both_ways, static_argnames="options")(*given, options=options)

    def close(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = max(1.0, np.abs(b[np.isfinite(b)]).max())  # sums of many terms: relative to the largest of them
        np.testing.assert_allclose(a / size, b / size, rtol=0, atol=near)

    jax.tree.map(close, got, alone(length, keys, dtype, options))


# 72 places are 9 for each of eight devices: chunks of 5 and of 4.
@pytest.mark.parametrize(
    ("sizes", "explicit", "options"),
    [
        ((1, 1, 1, 8), False, False),
        ((2, 1, 2, 2), True, True),
        pytest.param((1, 1, 2, 4), False, True, marks=pytest.mark.slow),  # the key heads, one each
        pytest.param((1, 1, 1, 8), True, True, marks=pytest.mark.slow),
        pytest.param((2, 1, 1, 4), True, False, marks=pytest.mark.slow),
        pytest.param((1, 1, 4, 2), False, True, marks=pytest.mark.slow),  # two key heads on four devices are repeated
    ],
)
def test_every_mask_gives_the_same(sizes, explicit, options):
    compare(mesh_of(*sizes, explicit=explicit), 72, 72, options=options)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "keys"), [(72, 24), (16, 72), (8, 72), (72, 8)])
def test_other_lengths_of_queries_and_keys(length, keys):
    """Down to parts of one place, which are dealt as they are."""
    compare(mesh_of(1, 1, 1, 8), length, keys)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 8])
def test_bfloat16(parts):
    compare(mesh_of(1, 1, 1, parts), 72, 72, "bfloat16", near=2**-7)  # a last bit of the largest


def test_results_of_steps_are_merged_in_float32():
    """All scores are zero: what comes out is a mean, and rounded once, on any number of devices."""
    length = 64
    q = k = jnp.zeros((1, length, 1, 4), jnp.bfloat16)
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, length, 1, 64)), jnp.bfloat16)
    see = jnp.arange(length)[None], jnp.zeros((1, length), int), jnp.full((1, length), length - 1)
    with jax.set_mesh(mesh_of(1, 1, 1, 8)), attention.context("ring"):
        out, _ = jax.jit(attention.attend)(q, k, v, *see)
    exact = np.asarray(v, np.float64).mean(1, keepdims=True)
    half = 2.0 ** (np.frexp(exact)[1] - 9)  # of the last of eight bits
    assert (np.abs(np.asarray(out, np.float64) - exact) <= half * 1.01).all()


def test_mesh_axes_that_carry_a_row_together():
    learnt, see, *_ = setting(72, 72)
    expected = jax.jit(attention.attend)(*learnt[0], *see)
    rules = meshes.Rules(batch=(), length=("data", "sequence"))
    with jax.set_mesh(mesh_of(2, 1, 2, 2)), meshes.use_rules(rules), attention.context("ring"):
        got = jax.jit(attention.attend)(*learnt[0], *see)
    assert got[0].addressable_shards[0].data.shape[1] == 18
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, expected)


def stack_of_blocks(params, x, see, window, position, cfg):
    places = dict(zip(("order", "lo", "hi"), see, strict=True)) | {"window": window, "position": position}

    def total(params, x):
        out = transformer.apply_with_taps(params, x, cfg, (0,), **places)
        return sum(jnp.sin(a).sum() for a in out), out

    return jax.grad(total, (0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize(
    ("sizes", "explicit"),
    [((2, 1, 1, 4), True), pytest.param((1, 1, 2, 4), False, marks=pytest.mark.slow)],
    ids=["explicit", "auto"],
)
def test_a_transformer_deals_its_rows_once(monkeypatch, sizes, explicit):
    """With windows, taps, positions and lengths that do not divide: a row of 71."""
    blocks = transformer.Config(16, 2, 4, 2, 8, 24, rope=rope.Config(8, (4,)), windowed=(1,), remat="full")
    rng, cases = np.random.default_rng(0), masks(71)
    see, window = (stack([cases[n] for n in names], 71) for names in (["packed", "images"], ["blocks", "causal"]))
    params = spec.init(transformer.spec(blocks), jax.random.key(0))
    x = rng.normal(size=(2, 71, 16)).astype(np.float32)
    given = params, x, see, window[1:], np.tile(np.arange(71)[:, None], (2, 1, 1))
    program = jax.jit(stack_of_blocks, static_argnames="cfg")
    expected = program(*given, cfg=blocks)
    monkeypatch.setattr(attention, "GATHERED", 0)
    deal, dealt = ring.Ring.deal, []
    monkeypatch.setattr(ring.Ring, "deal", lambda self, x, axis: dealt.append(x.ndim) or deal(self, x, axis))
    with jax.set_mesh(mesh_of(*sizes, explicit=explicit)):
        got = program(*given, cfg=blocks)
    assert sorted(dealt) == [2, 2, 2, 2, 2, 3, 3]  # order, lo, hi, both windows; x and position; no heads
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bidirectional images", "resampled, all images"])
def test_whole_models(monkeypatch, name):
    monkeypatch.setattr(attention, "GATHERED", 0)
    models.compare(name, MeshConfig(2, 1, 1, 4, explicit=True))


def test_dealt_rows_come_back():
    x = np.arange(2 * 26 * 3).reshape(2, 26, 3)
    with jax.set_mesh(mesh_of(1, 1, 1, 2)):
        dealt = jax.jit(ring.deal)(x)
        back = jax.jit(ring.undeal)(dealt)
    chunks = np.split(x, [7, 13, 20], 1)  # two devices: 13 places each, 7 and 6
    np.testing.assert_array_equal(dealt, np.concatenate([chunks[i] for i in (0, 3, 1, 2)], 1))
    np.testing.assert_array_equal(back, x)


def tiles(monkeypatch, order, lo, hi, parts=8):
    """How many tiles of scores every device (down) computes of every device's keys (across)."""
    monkeypatch.setattr(xla, "QUERIES", 16)
    monkeypatch.setattr(xla, "KEYS", 16)
    length = len(lo)
    home = [min(c, 2 * parts - 1 - c) for c in range(2 * parts)]  # whose chunk is it?

    def count(static, x):
        """A kernel whose weight is the number of tiles, and whose result says whose keys they are."""
        *_, start, stop = xla._tiles(x, xla.Tiling.of(x))
        weight = jnp.log(jnp.maximum(stop - start, 0).sum().astype(jnp.float32))
        return x.q + x.v[:, :, None, :1], x.q[..., 0] + weight

    q = jnp.zeros((1, 1, 1, length, parts))
    v = jnp.repeat(jax.nn.one_hot(jnp.asarray(home), parts), length // (2 * parts), axis=0)[None, None]
    see = (jnp.asarray(x, jnp.int32)[None] for x in (order, lo, hi))
    inputs = Inputs(q, v, v, *see, *[None] * 5)
    by_query, split = (None, "length"), (None, None, "length", None)
    reads = Inputs((None, *split), split, split, (None, None), by_query, by_query, *[None] * 5)
    run = functools.partial(ring.forward, Static(1.0, None, None), over=("sequence",), step=count)
    with jax.set_mesh(mesh_of(1, 1, 1, parts)):
        out, lse = jax.jit(
            lambda x: sharding.local(run, (x,), (reads,), ((None, *split), (None, None, None, "length")))
        )(inputs)
    found = np.asarray(jnp.exp(lse)[..., None] * out)[0, 0, 0]
    return np.round(found[:: length // (2 * parts)][:parts]).astype(int)  # chunk i is device i's, for the first half


def in_step(counts):
    """[devices, steps] from [devices, whose keys]."""
    at = np.arange(len(counts))
    return counts[at[:, None], (at[:, None] - at) % len(counts)]


def test_causal_rows_are_shared_evenly(monkeypatch):
    """In every step, too: a device waits for the keys of the one before."""
    counts = tiles(monkeypatch, np.arange(1024), *intervals.causal(1024))
    assert counts.sum() == 64 * 65 // 2
    assert counts.sum(1).max() <= 1.1 * counts.sum(1).mean()
    steps = in_step(counts)
    assert (steps.max(0) <= 1.1 * steps.mean(0)).all()


def test_packed_documents_are_shared_evenly(monkeypatch):
    counts = tiles(monkeypatch, np.arange(1024), *intervals.packed([64] * 16))
    assert counts.sum() == 16 * 10
    assert counts.sum(1).max() <= 1.1 * counts.sum(1).mean()
    # What no query here reaches is not computed: each device has two documents, whole.
    assert np.count_nonzero(counts) == 8


def test_keys_that_nobody_reaches_are_passed_on_and_not_computed():
    """Their values are no numbers, and one product with them would show."""
    parts, chunk = np.arange(64).reshape(16, 4), [3, 12]  # the fourth device's
    order, q = np.arange(64), jnp.ones((1, 64, 1, 4))
    order[parts[chunk]] = -1
    v = q.at[:, parts[chunk]].set(np.nan)
    see = (jnp.asarray(x, jnp.int32)[None] for x in (order, *intervals.causal(64)))
    with jax.set_mesh(mesh_of(1, 1, 1, 8)), attention.context("ring"):
        out, _ = jax.jit(attention.attend)(q, q, v, *see)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_one_label_at_the_edge_of_a_part_is_reached(rng):
    """The first or last of a chunk, wherever its queries are."""
    q, k, v = draw(rng, 1, 64, 64, 1, 1)
    with jax.set_mesh(mesh_of(1, 1, 1, 8)), attention.context("ring"):
        program = jax.jit(attention.attend)
        for label in (0, 3, 4, 31, 32, 60, 63):
            see = jnp.full((1, 64), label)
            out, _ = program(q, k, v, jnp.arange(64)[None], see, see)
            np.testing.assert_allclose(out, np.broadcast_to(v[:, label, None], out.shape), rtol=1e-6)


def on_a_ring(*sizes, length=64, keys=64, rows=2):
    """Whether attention passes keys on."""
    q, k = jnp.zeros((rows, length, 4, 8)), jnp.zeros((rows, keys, 2, 8))
    see = jnp.zeros((rows, keys), int), *[jnp.zeros((rows, length), int)] * 2
    with jax.set_mesh(mesh_of(*sizes)):
        return "ppermute" in str(jax.make_jaxpr(lambda *x: attention.attend(*x))(q, k, k, *see))


def test_long_rows_go_round_and_short_ones_are_gathered(monkeypatch):
    held = 2 * 64 * 2 * (8 + 8) * 4  # bytes of all keys and values
    assert not on_a_ring(1, 1, 1, 2)
    monkeypatch.setattr(attention, "GATHERED", held - 1)
    assert on_a_ring(1, 1, 1, 2)
    monkeypatch.setattr(attention, "GATHERED", held)
    assert not on_a_ring(1, 1, 1, 2)
    monkeypatch.setattr(attention, "GATHERED", held // 4 - 1)  # of a device's own rows and heads
    assert on_a_ring(2, 1, 2, 2)
    monkeypatch.setattr(attention, "GATHERED", held // 4)
    assert not on_a_ring(2, 1, 2, 2)
    with attention.context("ring"):
        assert on_a_ring(1, 1, 1, 2)
        assert not on_a_ring(1, 1, 1, 2, keys=63)  # not split, as they do not divide
        assert not on_a_ring(1, 1, 1, 2, length=63)
        assert not on_a_ring(2, 1, 1, 1)
    monkeypatch.setattr(attention, "GATHERED", 0)
    with attention.context("gather"):
        assert not on_a_ring(1, 1, 1, 2)
    with pytest.raises(InputError, match="no context 'round'"), attention.context("round"):
        pass


def test_no_device_gathers_keys_and_values():
    """Forwards and backwards, in the compiled program; `test_tpu` asks the TPU's compiler for memory."""
    mesh, see, found = mesh_of(1, 1, 1, 8), jax.ShapeDtypeStruct((1, 64), jnp.int32), {}
    split = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    q, k = (jax.ShapeDtypeStruct((1, 64, heads, 8), jnp.float32, sharding=split) for heads in (4, 2))
    for how in ("gather", "ring"):
        with jax.set_mesh(mesh), attention.context(how):
            gradient = jax.jit(jax.grad(lambda q, k, v, *see: attention.attend(q, k, v, *see)[0].sum(), (0, 1, 2)))
            text = gradient.lower(q, k, k, see, see, see).compile().as_text()
        found[how] = [len(re.findall(f"= f32.* {name}\\(", text)) > 0 for name in ("all-gather", "collective-permute")]
    assert found == {"gather": [True, False], "ring": [False, True]}
