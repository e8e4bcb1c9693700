"""What adapters leave out in training: by the run's seed and the step, and nothing where nothing is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_run

from mmjax.core.meshes import make_mesh
from mmjax.nn import lora
from mmjax.plan import program
from mmjax.train import loop, parameters, presets, stages, state
from mmjax.train.step import loss_fn, train_step


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    of = lora.Config(2, dropout=0.5)
    return tiny_run(tmp_path_factory.mktemp("unused"), lora=of, stages=presets.stages(["lora:6:0.1"]), seed=3)


def test_each_step_drops_others_and_the_same_step_the_same(cfg):
    (part,), batch = stages.parts(cfg), loop.prepare_data(cfg).training[0]
    tx, update = stages.optimizer(part.cfg), part.cfg.update
    now = state.create(parameters.spec(cfg), tx, jax.random.key(0), update.frozen)
    now = now.replace(params=jax.tree.map(lambda x: jnp.where(x == 0, 0.1, x), now.params))  # B is zero to begin with
    step = jax.jit(functools.partial(train_step, cfg=cfg.model, tx=tx, update=update, dropout=0.5, seed=3))

    def loss(number):
        seen = step(now.replace(step=jnp.int32(number)), batch)[1]
        return float(seen["loss"] / seen["weight"])

    losses = [loss(number) for number in (0, 1, 1, 2)]
    assert losses[1] == losses[2]
    assert len(set(losses)) == 3
    batch = jax.tree.map(jnp.asarray, batch)
    plain = float(jax.jit(loss_fn, static_argnums=2)(now.params, batch, cfg.model)[0])  # as it is judged
    assert plain not in losses
    np.testing.assert_allclose(losses, plain, rtol=0.3)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_run_hands_it_to_its_steps(cfg, monkeypatch, adapted):
    given = []

    def compile_step(*of, **how):
        given.append(how)
        return jax.jit(lambda x: x).lower(1.0).compile()

    monkeypatch.setattr(loop, "compile_step", compile_step)
    cfg = cfg if adapted else dataclasses.replace(cfg, lora=None, stages=())
    (part,), mesh = stages.parts(cfg), make_mesh(cfg.mesh, jax.devices()[:1])
    loop.compile_steps(part.cfg, loop.prepare_data(cfg).training, stages.abstract(part, mesh), mesh)

    def planned(*of, **how):
        given.append(how)
        raise LookupError

    steps = len(given)
    monkeypatch.setattr(program, "compile_step", planned)  # what is planned of it is the same step
    with pytest.raises(LookupError):
        program.compiled(part, program.buckets(cfg)[-1], mesh)
    assert len(given) == steps + 1 > 1
    assert all(how == ({"dropout": 0.5, "seed": 3} if adapted else {}) for how in given)
