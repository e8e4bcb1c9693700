"""The train step itself: what an update is, and that a broken batch changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_run

from mmjax.models import vlm
from mmjax.train import loop, state
from mmjax.train.config import Optimizer
from mmjax.train.step import loss_fn, train_step


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    cfg = tiny_run(tmp_path_factory.mktemp("unused"))
    tx = state.optimizer(cfg.optimizer, cfg.steps)
    now = state.create(vlm.spec(cfg.model), tx, jax.random.key(0))
    data = loop.prepare_data(cfg)
    step = jax.jit(functools.partial(train_step, cfg=cfg.model, tx=tx))
    return cfg, tx, now, jax.tree.map(jnp.asarray, data.training[0]), step


def test_an_update_is_optax_on_the_mean_gradient(setting):
    cfg, tx, now, batch, step = setting
    new, seen = step(now, batch)
    grads = jax.grad(lambda p: loss_fn(p, batch, cfg.model)[0])(now.params)
    updates, _ = tx.update(grads, now.optimizer, now.params)
    expected = optax.apply_updates(now.params, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), new.params, expected)
    assert int(new.step) == 1
    np.testing.assert_allclose(seen["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert int(seen["tokens"]) == int((batch.order >= 0).sum())
    assert not seen["violations"].any()


def test_the_first_gradient_is_no_spike(setting):
    """Most patches of the drawings are blank: were those vectors of zeros, it would be 3,000 here."""
    _, _, now, batch, step = setting
    assert step(now, batch)[1]["grad_norm"] < 50


def test_a_broken_batch_changes_nothing(setting):
    _, _, now, batch, step = setting
    new, seen = step(now, batch.replace(tokens=batch.tokens.at[1, 0].set(99999)))
    assert seen["violations"].sum(1).tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    jax.tree.map(np.testing.assert_array_equal, new, now)


def test_only_matrices_decay():
    cfg = Optimizer(learning_rate=1.0, warmup=0.0, weight_decay=0.5)
    tx = state.optimizer(cfg, 10)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "norm": {"scale": jnp.ones((3, 2))}}
    zero = jax.tree.map(jnp.zeros_like, params)
    moments = tx.init(params)
    _, moments = tx.update(zero, moments, params)  # warm-up starts at a rate of zero
    updates, _ = tx.update(zero, moments, params)
    assert np.all(np.array(updates["kernel"]) < -0.4)
    assert not np.any(updates["bias"])
    assert not np.any(updates["norm"]["scale"])


def test_schedule_warms_up_and_decays():
    cfg = Optimizer(learning_rate=1.0, warmup=0.2, final=0.1, weight_decay=0.0, clip=1e9)
    tx = state.optimizer(cfg, 10)
    params, moments, sizes = jnp.ones(1), None, []
    moments = tx.init({"kernel": params})
    for _ in range(11):
        updates, moments = tx.update({"kernel": jnp.ones(1)}, moments, {"kernel": params})
        sizes.append(-float(updates["kernel"][0]))
    np.testing.assert_allclose(sizes[:3], [0, 0.5, 1.0], atol=1e-3)
    np.testing.assert_allclose(sizes[10], 0.1, atol=1e-3)
    assert sizes[2:] == sorted(sizes[2:], reverse=True)


def test_the_running_mean_follows_the_parameters(rng):
    """Against the recurrence written straight down, for which the decay is reached late and early."""
    for decay in (0.3, 0.99):
        tx = state.optimizer(Optimizer(learning_rate=0.1, average=decay), 20)
        params = {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
        moments = tx.init(params)
        mean = np.float64(params["kernel"])
        for n in range(20):
            grads = {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
            updates, moments = tx.update(grads, moments, params)
            params = optax.apply_updates(params, updates)
            d = min(decay, (1 + n) / (10 + n))
            mean = d * mean + (1 - d) * np.float64(params["kernel"])
        now = state.TrainState(jnp.int32(20), params, moments, state.new_guard())
        np.testing.assert_allclose(state.averaged(now)["kernel"], mean, rtol=1e-5)


def test_without_a_running_mean_the_parameters_are_evaluated():
    params = {"kernel": jnp.ones((2, 2))}
    moments = state.optimizer(Optimizer(), 10).init(params)
    assert state.averaged(state.TrainState(jnp.int32(0), params, moments, state.new_guard())) is params
