import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core import hlo, meshes, sharding
from mmjax.core.meshes import MeshConfig, Rules, make_mesh
from mmjax.objectives import next_token


def itself(hidden):
    """A head that gives its input as logits."""
    return hidden


@pytest.mark.parametrize("chunk", [2, 128])
def test_known_value_and_gradient(rng, chunk):
    """In rows whose length the chunk does not divide; z-loss too."""
    logits = rng.normal(size=(2, 5, 7))
    target = rng.integers(0, 7, (2, 5))
    weight = np.array([[1, 0, 2.0, 0, 1], [0, 0, 0.5, 3, 0]])
    exp = np.exp(logits)
    p, partition = exp / exp.sum(-1, keepdims=True), np.log(exp.sum(-1))
    picked = np.take_along_axis(p, target[..., None], -1)[..., 0]
    args = jnp.asarray(logits, jnp.float32), jnp.asarray(target), jnp.asarray(weight, jnp.float32)
    found = next_token.loss(itself, *args, chunk=chunk)
    np.testing.assert_allclose(found.loss, -(np.log(picked) * weight).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.weight, 7.5)
    np.testing.assert_allclose(found.correct, (weight * (logits.argmax(-1) == target)).sum())
    np.testing.assert_allclose(found.log_partition, partition, rtol=1e-5)
    np.testing.assert_allclose(found.z(args[2]), (weight * partition**2).sum(), rtol=1e-5)

    def total(x):
        found = next_token.loss(itself, x, *args[1:], chunk=chunk)
        return found.loss + 0.1 * found.z(args[2])

    expected = (p - np.eye(7)[target] + 0.2 * partition[..., None] * p) * weight[..., None]
    np.testing.assert_allclose(jax.grad(total)(args[0]), expected, atol=1e-6)


def test_extreme_logits_stay_finite():
    logits = jnp.array([[[1e30, -1e30, 0.0], [1e4, 1e4, 1e4]]])
    target, weight = jnp.array([[0, 1]]), jnp.ones((1, 2))
    value, gradient = jax.value_and_grad(lambda x: next_token.loss(itself, x, target, weight).loss)(logits)
    np.testing.assert_allclose(value, np.log(3), atol=1e-3)  # 1e-3: an ulp of 1e4
    assert np.isfinite(gradient).all()


def test_correct_counts_the_weight_of_unbeaten_targets():
    logits = jnp.array([[[0.0, 2, 1], [3, 0, 0], [0, 0, 1]]])
    found = next_token.loss(itself, logits, jnp.array([[1, 1, 2]]), jnp.array([[1.0, 1, 0.5]]))
    assert found.correct == 1.5


def both_ways(hidden, table, target, weight, chunk, given=True):
    """Loss and gradients of a head that multiplies by a table, which is `given` or bound."""

    def head(table, hidden):
        return sharding.dense(hidden, table.T, ("batch", "length", "vocab"))

    def total(hidden, table):
        call, own = (head, {"params": table}) if given else (functools.partial(head, table), {})
        found = next_token.loss(call, hidden, target, weight, chunk=chunk, **own)
        return found.loss + 1e-2 * found.z(weight), found

    return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, table)


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(3)
    arrays = (
        jnp.asarray(rng.normal(size=(8, 12, 16)), jnp.float32),
        jnp.asarray(rng.normal(size=(24, 16)), jnp.float32),
        jnp.asarray(rng.integers(0, 24, (8, 12))),
        jnp.asarray(rng.random((8, 12)), jnp.float32),
    )
    return arrays, jax.jit(functools.partial(both_ways, chunk=128))(*arrays)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 2, 2), (2, 2, 1, 2)])
def test_chunks_and_meshes_change_nothing(setting, sizes, explicit):
    """The vocabulary is split over the tensor axis, where there is one, the table over fsdp, rows over the rest."""
    arrays, expected = setting
    mesh, rules = make_mesh(MeshConfig(*sizes, explicit=explicit)), Rules()
    axes = (("batch", "length", None), ("vocab", "embed"), ("batch", "length"), ("batch", "length"))
    placed = [jax.device_put(x, meshes.named(mesh, a, rules, x.shape)) for x, a in zip(arrays, axes, strict=True)]
    with jax.set_mesh(mesh):
        got = jax.jit(functools.partial(both_ways, chunk=5))(*placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize(("given", "times"), [(True, 1), (False, 4)])
def test_a_head_that_is_given_travels_once_for_all_chunks(given, times):
    """Four chunks of three tokens on eight devices, over which the table is split: its gradient is summed so often."""
    mesh, rules = make_mesh(MeshConfig(1, 8, 1)), Rules()
    shapes = ((8, 12, 16), jnp.float32), ((24, 16), jnp.float32), ((8, 12), jnp.int32), ((8, 12), jnp.float32)
    axes = (("batch", "length", None), ("vocab", "embed"), ("batch", "length"), ("batch", "length"))
    args = [
        jax.ShapeDtypeStruct(*x, sharding=meshes.named(mesh, a, rules, x[0])) for x, a in zip(shapes, axes, strict=True)
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(both_ways, chunk=3, given=given)).lower(*args).compile()
    found = [
        (w.collective.kind, turns)
        for w, turns in hlo.count(hlo.parse(program.as_text())).every()
        if w.collective and w.collective.bytes > 4 * 24 * 16 / 2
    ]
    summed = sum(turns for kind, turns in found if kind == "all-reduce")
    assert summed == times, found


def test_every_device_works_in_every_turn():
    """24 tokens on 4 devices in chunks of 3: two turns, in each of which every device has 3 of its own 6 tokens."""
    mesh, seen = make_mesh(MeshConfig(2, 1, 1, 4, explicit=True)), []

    def head(hidden):
        seen.append((hidden.shape, jax.typeof(hidden).sharding.spec))
        return hidden

    rng = np.random.default_rng(1)
    arrays = rng.normal(size=(2, 24, 5)).astype(np.float32), rng.integers(0, 5, (2, 24)), np.ones((2, 24), np.float32)
    expected = next_token.loss(itself, *map(jnp.asarray, arrays))
    with jax.set_mesh(mesh):
        placed = [sharding.constrain(jnp.asarray(x), ("batch", "length", None)[: x.ndim]) for x in arrays]
        found = jax.jit(lambda *x: next_token.loss(head, *x, chunk=3))(*placed)
    assert set(seen) == {((2, 12, 5), jax.sharding.PartitionSpec(("data", "fsdp"), "sequence", None))}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


def test_logits_never_exist_for_a_whole_row():
    """16 chunks of 64 tokens: the temporaries of both passes stay far below one [B, L, V] array."""
    b, length, width, vocab = 2, 1024, 16, 4096
    shapes = ((b, length, width), jnp.float32), ((vocab, width), jnp.float32), ((b, length), jnp.int32)
    args = [jax.ShapeDtypeStruct(*s) for s in (*shapes, ((b, length), jnp.float32))]
    whole = b * length * vocab * 4

    def temporaries(chunk):
        compiled = jax.jit(functools.partial(both_ways, chunk=chunk)).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(64) < whole / 3
    assert temporaries(1024) > whole  # that the measure would see it
