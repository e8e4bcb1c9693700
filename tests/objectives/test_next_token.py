import jax
import jax.numpy as jnp
import numpy as np

from mmjax.objectives import next_token


def test_known_value_and_gradient(rng):
    logits = rng.normal(size=(2, 3, 7))
    target, weight = rng.integers(0, 7, (2, 3)), np.array([[1, 0, 2.0], [0, 0, 0.5]])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(p, target[..., None], -1)[..., 0]
    args = jnp.asarray(logits, jnp.float32), jnp.asarray(target), jnp.asarray(weight, jnp.float32)
    total, count = next_token.loss(*args)
    np.testing.assert_allclose(total, -(np.log(picked) * weight).sum(), rtol=1e-5)
    np.testing.assert_allclose(count, 3.5)
    gradient = jax.grad(lambda x: next_token.loss(x, *args[1:])[0])(args[0])
    np.testing.assert_allclose(gradient, (p - np.eye(7)[target]) * weight[..., None], atol=1e-6)


def test_extreme_logits_stay_finite():
    logits = jnp.array([[[1e30, -1e30, 0.0], [1e4, 1e4, 1e4]]])
    target, weight = jnp.array([[0, 1]]), jnp.ones((1, 2))
    value, gradient = jax.value_and_grad(lambda x: next_token.loss(x, target, weight)[0])(logits)
    np.testing.assert_allclose(value, np.log(3), atol=1e-3)  # 1e-3: an ulp of 1e4
    assert np.isfinite(gradient).all()


def test_correct_counts_the_weight_of_unbeaten_targets():
    logits = jnp.array([[[0.0, 2, 1], [3, 0, 0], [0, 0, 1]]])
    assert next_token.correct(logits, jnp.array([[1, 1, 2]]), jnp.array([[1.0, 1, 0.5]])) == 1.5
