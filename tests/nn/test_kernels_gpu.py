"""Numerics of the GPU kernels: interpreted on a CPU in small tiles; where there is a GPU, compiled, in those that ship.

On a GPU: MMJAX_TEST_PLATFORM=cuda pytest tests/nn/test_kernels_gpu.py
"""

import contextlib
import functools

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interval_cases import both_ways, close, draw, equals_a_dense_mask, masks, stack

from mmjax.core.meshes import MeshConfig, make_mesh
from mmjax.nn import attention
from mmjax.nn.kernels import backend, gpu, gpu_tiles
from mmjax.nn.kernels.gpu_blocks import Blocks, Plan, Shape
from mmjax.nn.kernels.inputs import Inputs, Static
from mmjax.sequence import intervals

# Newer versions of JAX would rather have its other kernels for GPUs.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
ON_GPU = jax.default_backend() == "gpu"


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    if not ON_GPU:
        small = Plan(Blocks(32, 16), Blocks(16, 32), Blocks(32, 16))
        monkeypatch.setattr(Plan, "of", classmethod(lambda cls, x: small))
    monkeypatch.setattr(gpu, "one_tile", lambda x: False)  # short rows as well
    jax.clear_caches()  # what was traced before keeps its own kernel
    with backend.use("gpu"):
        yield
    jax.clear_caches()


# Head sizes of one part and of two, whole and not; lengths that are whole blocks and not; grouped queries that are
# taken apart, and short ones that are folded into one block.
@pytest.mark.parametrize(
    ("length", "heads", "kv", "size", "v_size", "dtype"),
    [
        (129, 4, 1, 24, 24, "float32"),
        (128, 2, 2, 80, 64, "bfloat16"),
        (7, 8, 2, 6, 10, "float32"),
        pytest.param(320, 4, 2, 96, 128, "float32", marks=pytest.mark.slow),
        pytest.param(300, 2, 1, 256, 256, "bfloat16", marks=pytest.mark.slow),
        pytest.param(1, 4, 1, 64, 64, "float16", marks=pytest.mark.slow),
    ],
)
def test_equals_a_dense_mask_in_float64(rng, length, heads, kv, size, v_size, dtype):
    """Every row of the interval table, forwards and backwards."""
    equals_a_dense_mask(rng, masks(length), length, heads, kv, dtype, size, v_size)


@pytest.mark.parametrize("length", [3, 75], ids=["folded", "not folded"])
def test_options_equal_a_dense_mask(rng, length):
    """All options at once: other lengths of queries and keys, labels in any order, queries that see nothing."""
    b, keys, heads = 2, 101, 4
    qkv = draw(rng, b, length, keys, heads, 2)
    order = np.stack([rng.permutation(keys).astype(np.int32) for _ in range(b)])
    order[:, 80:] = -1
    lo = rng.integers(0, keys, (b, length), dtype=np.int32)
    see = (order, lo, lo + rng.integers(-3, keys, (b, length), dtype=np.int32))
    key_bias = rng.normal(size=(b, keys)).astype(np.float32)
    key_bias[:, 5] = -np.inf
    sinks = rng.normal(size=heads).astype(np.float32)
    cotangents = tuple(rng.normal(size=(b, length, heads, *e)).astype(np.float32) for e in [(10,), ()])
    given = {"key_bias": key_bias, "sinks": sinks, "softcap": 0.7}
    out, lse, (grads, *rest) = both_ways(qkv, see, cotangents, **given)
    expected, expected_lse, _, wanted = dense.attention(
        *qkv, dense.seen(*see), d_out=cotangents[0], d_lse=cotangents[1], **given
    )
    close("out", out, expected, 1e-5)
    close("lse", lse, expected_lse, 1e-5)
    for name, got in zip(("q", "k", "v", "key_bias", "sinks"), (*grads, *rest), strict=False):
        close(name, got, wanted[name], 1e-5)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(rng):
    qkv = draw(rng, 2, 40, 70, 2, 1)
    order = np.tile(np.arange(70, dtype=np.int32), (2, 1))
    order[:, 20:] = -1  # an empty slot must not be seen by an empty query either
    see = (order, np.zeros((2, 40), np.int32), np.full((2, 40), -1, np.int32))
    ones = np.ones((2, 40, 2, 10), np.float32), np.ones((2, 40, 2), np.float32)
    out, lse, (grads, *_) = both_ways(qkv, see, ones)
    assert not np.any(out)
    assert np.all(np.isneginf(lse))
    assert not any(np.any(g) for g in grads)


def shape(length, keys, queries_block, keys_block):
    q, k = jax.ShapeDtypeStruct((1, 1, 1, length, 8), jnp.float32), jax.ShapeDtypeStruct((1, 1, keys, 8), jnp.float32)
    return Shape.of(Static(1.0, None, None), Inputs(q, k, k, *[None] * 8), Blocks(queries_block, keys_block))


def reached(order, lo, hi, by_key=False):
    """(start, stop, run, end) of every block of 16 queries over the blocks of 16 keys; by_key, the other way round."""
    x = Inputs(*[None] * 3, *(jnp.asarray(a, jnp.int32)[None] for a in (order, lo, hi)), *[None] * 5)
    s = shape(len(lo), len(order), 16, 16)
    keys, queries = (tuple(a[0] for a in gpu_tiles.of_blocks(x, s, of).values()) for of in (False, True))
    count = s.key_blocks if by_key else s.query_blocks
    pick = lambda of, i: tuple(a[i] for a in of)  # noqa: E731
    pairs = ((queries, pick(keys, i)) if by_key else (pick(queries, i), keys) for i in range(count))
    return [tuple(int(n) for n in gpu_tiles.reach(*pair)) for pair in pairs]


def test_ranges_are_the_hull_of_what_is_touched_and_its_first_whole_run():
    at = np.arange(80)
    assert reached(at, *intervals.causal(80)) == [(0, i + 1, 0, i) if i else (0, 1, 1, 1) for i in range(5)]
    by_key = reached(at, *intervals.causal(80), by_key=True)
    assert by_key == [(i, 5, i + 1, 5) if i < 4 else (4, 5, 5, 5) for i in range(5)]
    lo, hi = intervals.packed([24, 40, 16])
    assert [r[:2] for r in reached(at, lo, hi)] == [(0, 1), (0, 2), (1, 3), (1, 4), (4, 5)]
    window = np.maximum(at - 56, 0), at  # two whole blocks between two that are not
    assert reached(at, *window)[4] == (0, 5, 2, 4)
    hole = np.where(at == 20, -1, at)  # an empty slot: its block is not whole
    assert reached(hole, *intervals.causal(80))[4] == (0, 5, 0, 1)
    nothing = np.zeros(80), np.full(80, -1)
    assert all(start >= stop and run >= end for start, stop, run, end in reached(at, *nothing))
    one = np.where(at == 70, 3, 0), np.where(at == 70, 3, -1)  # one query sees one key
    assert reached(at, *one)[4][:2] == (0, 1)


def test_blocks_that_no_interval_reaches_are_not_computed():
    """NaN in such blocks of keys and values is not met (a weight of zero times it would be NaN), nor backwards."""
    block = 128 if ON_GPU else 32
    lengths = np.array([2, 4, 3]) * block
    lo, hi = intervals.packed(lengths.tolist())
    order = jnp.arange(lengths.sum(), dtype=jnp.int32)[None]
    mine = slice(2 * block, 6 * block)  # the second document's queries alone
    see = order, *(jnp.asarray(a[mine], jnp.int32)[None] for a in (lo, hi))
    q = jnp.ones((1, 4 * block, 1, 16))
    k = jnp.full((1, lengths.sum(), 1, 16), np.nan).at[:, mine].set(1.0)
    call = lambda q, k: attention.attend(q, k, k, *see)[0].sum()  # noqa: E731
    value, grads = jax.value_and_grad(call, (0, 1))(q, k)
    assert value == q.size
    assert np.isfinite(grads[0]).all()
    assert np.isfinite(grads[1][:, mine]).all()
    assert not np.any(np.nan_to_num(grads[1].at[:, mine].set(0)))


def test_rows_do_not_depend_on_each_other_bit_for_bit(rng):
    qkv = draw(rng, 3, 61, 61, 4, 2)
    cases = masks(61)
    see, other = (stack([cases[n] for n in ("packed", *rest)], 61) for rest in (("causal", "images"), ("pruned",) * 2))
    ones = tuple(rng.normal(size=(3, 61, 4, *e)).astype(np.float32) for e in [(10,), ()])
    changed = tuple(np.concatenate([x[:1], rng.normal(size=x[1:].shape).astype(np.float32)]) for x in qkv)
    a, b = both_ways(qkv, see, ones), both_ways(changed, other, ones)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), (a[0], a[1], a[2][0]), (b[0], b[1], b[2][0]))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_on_a_mesh(rng, explicit):
    """Rows and heads split: each device runs the kernels on its own, and shared sinks get summed gradients.

    Without GPUs the program is traced alone: Pallas cannot interpret kernels where types say what varies.
    """
    qkv, see = draw(rng, 2, 40, 40, 4, 2), stack([masks(40)[n] for n in ("packed", "images")], 40)
    sinks = rng.normal(size=4).astype(np.float32)
    ones = tuple(rng.normal(size=(2, 40, 4, *e)).astype(np.float32) for e in [(10,), ()])
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2, explicit=explicit), jax.devices()[:4])), backend.use("auto"):
        traced = both_ways.trace(qkv, see, ones, sinks=sinks)
        got = both_ways(qkv, see, ones, sinks=sinks) if ON_GPU else None
    if ON_GPU:
        expected = both_ways(qkv, see, ones, sinks=sinks)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, expected)
    assert str(traced.jaxpr).count("pallas_call") >= 3
    if jax.__version_info__ < (0, 11) or ON_GPU:  # newer ones ask the mesh's devices what GPUs they are
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("triton") >= 3


def inputs(size=64, dtype="bfloat16"):
    see = tuple(jnp.asarray(a, jnp.int32)[None] for a in (np.arange(64), *intervals.causal(64)))
    of = lambda *s: jnp.zeros((1, *s), dtype)  # noqa: E731
    return Inputs(of(2, 2, 64, size), of(2, 64, size), of(2, 64, size), *see, *[None] * 5)


def test_what_a_kernel_cannot_do_is_left_to_xla(monkeypatch):
    plain, x = Static(1.0, None, None), inputs()
    assert gpu.refusal(plain, x) is None
    assert "256" in gpu.refusal(plain, inputs(512))
    assert "one type" in gpu.refusal(plain, x.replace(v=x.v.astype(jnp.float32)))
    biased = Static(1.0, None, lambda params, query, key: jnp.zeros((1, 1, 64, 64)))
    assert "bias" in gpu.refusal(biased, x)
    assert "pallas_call" in str(jax.make_jaxpr(functools.partial(backend.forward, plain))(x))
    assert "pallas_call" not in str(jax.make_jaxpr(functools.partial(backend.forward, biased))(x))
    monkeypatch.undo()
    assert "one tile" in gpu.refusal(plain, x)
    decoding = x.replace(q=x.q[..., :1, :], k=jnp.tile(x.k, (1, 1, 8, 1)), v=jnp.tile(x.v, (1, 1, 8, 1)))
    assert gpu.refusal(plain, decoding) is None


def test_a_program_for_gpus_gets_the_kernels():
    def program(platform):
        traced = jax.jit(functools.partial(backend.forward, Static(1.0, None, None))).trace(inputs())
        return traced.lower(lowering_platforms=(platform,)).as_text()

    with backend.use("auto"):
        assert "triton" not in program("cpu")
        with contextlib.ExitStack() as target:
            # Newer versions of JAX want to be told which GPU it is for; older ones have no such thing.
            with contextlib.suppress(AttributeError, TypeError):
                device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
                mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
                target.enter_context(jax.sharding.use_abstract_mesh(mesh))
            assert "triton" in program("cuda")
