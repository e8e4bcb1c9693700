import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import attention


def attend(*inputs):
    """Compiled as a whole: op by op, compiling takes longer than all the rest."""
    return jax.jit(attention.attend)(*inputs)


def dense(q, k, v, order, lo, hi):
    """The reference: a dense mask, straight down, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    order, lo, hi = (np.asarray(x) for x in (order, lo, hi))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    score = np.einsum("blhe,bshe->bhls", q, k) / np.sqrt(q.shape[-1])
    seen = (lo[:, :, None] <= order[:, None, :]) & (order[:, None, :] <= hi[:, :, None])
    weight = np.where(seen[:, None], np.exp(score), 0.0)
    total = weight.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    out = np.einsum("bhls,bshe->blhe", weight / np.where(total > 0, total, 1), v)
    return out, lse[..., 0].transpose(0, 2, 1)


def case(rng, length, keys, heads, kv_heads, size=5, v_size=7, batch=3):
    """Random inputs whose intervals cover: all, some, one, none; and empty key slots."""
    q = rng.normal(size=(batch, length, heads, size)).astype(np.float32)
    k = rng.normal(size=(batch, keys, kv_heads, size)).astype(np.float32)
    v = rng.normal(size=(batch, keys, kv_heads, v_size)).astype(np.float32)
    order = np.tile(np.arange(keys, dtype=np.int32), (batch, 1))
    order[:, keys - keys // 5 :] = -1
    lo = rng.integers(0, keys, (batch, length), dtype=np.int32)
    hi = lo + rng.integers(-2, keys, (batch, length), dtype=np.int32)
    return tuple(jnp.asarray(x) for x in (q, k, v, order, lo, hi))


@pytest.mark.parametrize(
    ("length", "keys", "heads", "kv_heads"), [(1, 1, 1, 1), (7, 7, 4, 4), (33, 20, 4, 2), (19, 129, 8, 1)]
)
@pytest.mark.parametrize("block", [8, 512])
def test_equals_a_dense_mask(rng, monkeypatch, length, keys, heads, kv_heads, block):
    monkeypatch.setattr(attention, "BLOCK", block)
    inputs = case(rng, length, keys, heads, kv_heads)
    out, lse = attend(*inputs)
    expected, expected_lse = dense(*inputs)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [8, 512])
def test_gradients_equal_those_of_a_dense_mask(rng, monkeypatch, block):
    """Against central differences of the float64 reference."""
    monkeypatch.setattr(attention, "BLOCK", block)
    q, k, v, order, lo, hi = case(rng, 6, 20, 4, 2, batch=2)
    cotangent = rng.normal(size=(2, 6, 4, 7))

    def ours(q, k, v):
        return (attend(q, k, v, order, lo, hi)[0] * cotangent.astype(np.float32)).sum()

    grads = jax.jit(jax.grad(ours, (0, 1, 2)))(q, k, v)
    for which, grad in enumerate(grads):
        direction = rng.normal(size=grad.shape)
        moved = [
            [np.float64(x) + (s * 1e-4 * direction if i == which else 0) for i, x in enumerate((q, k, v))]
            for s in (1, -1)
        ]
        up, down = ((dense(*m, order, lo, hi)[0] * cotangent).sum() for m in moved)
        np.testing.assert_allclose((grad * direction).sum(), (up - down) / 2e-4, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("block", [4, 512])
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(rng, monkeypatch, block):
    monkeypatch.setattr(attention, "BLOCK", block)
    q, k, v, order, lo, hi = case(rng, 5, 10, 2, 1)
    lo, hi = jnp.zeros_like(lo), jnp.full_like(hi, -1)  # an empty place; the keys at -1 must not be seen either

    def total(q, k, v):
        out, lse = attend(q, k, v, order, lo, hi)
        return out.sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    out, lse = attend(q, k, v, order, lo, hi)
    assert not np.any(out)
    assert np.all(np.isneginf(lse))
    assert not any(np.any(g) for g in jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v))


def test_extreme_scores_stay_finite(rng):
    q, k, v, order, lo, hi = case(rng, 9, 9, 2, 2)
    out, lse = attend(1e4 * q, 1e4 * k, v, order, lo, hi)
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()


def test_batch_equals_singles_bit_for_bit(rng):
    q, k, v, order, lo, hi = case(rng, 13, 13, 4, 2)
    together, _ = attend(q, k, v, order, lo, hi)
    other, _ = attend(q, k, v.at[1:].add(1.0), order, lo, hi)
    np.testing.assert_array_equal(together[0], other[0])


def test_bfloat16_keeps_float32_sums(rng):
    q, k, v, order, lo, hi = case(rng, 17, 64, 4, 2)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out, lse = attend(*half, order, lo, hi)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    expected, _ = dense(*(np.asarray(x, np.float32) for x in half), order, lo, hi)
    np.testing.assert_allclose(out.astype(np.float32), expected, atol=2e-2)


def test_memory_is_linear_in_length():
    """No [L, S] buffer in the compiled program: four times the length takes about four times the temporaries."""

    def temporaries(length):
        q, i = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
        grad = jax.grad(lambda q, k, v, o, lo, hi: attend(q, k, v, o, lo, hi)[0].sum(), (0, 1, 2))
        return jax.jit(grad).lower(q, q, q, i, i, i).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 6 * temporaries(1024)
