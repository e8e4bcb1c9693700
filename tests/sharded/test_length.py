"""Rows split along their length: every way of fusing and every connector gives the loss and gradients of one device."""

import math

import jax
import numpy as np
import pytest
from fused import VOCAB, even, everything, make
from tiny import randomised

from mmjax.core import spec as specs
from mmjax.core.meshes import MeshConfig, Rules, make_mesh
from mmjax.models import vlm
from mmjax.nn import attention, block
from mmjax.sequence import invariants
from mmjax.sequence.batch import Bucket
from mmjax.train.config import Objective
from mmjax.train.step import batch_shardings, loss_fn

SPLIT = Bucket(4, 112, 48, 7)  # tokens and patches of a row divide by four


def setting(name, bucket):
    """The model, a batch of four rows, parameters, and what is computed of them."""
    (model, cfg), (one, two, three) = everything()[name], even()
    batch = make([[one, two], [three], [two], [one]], bucket, model, cfg)

    def run(params, batch):
        loss, sums = loss_fn(params, batch, model, Objective(z=1e-3, chunk=20))
        return loss, (sums, invariants.violations(batch, 40, VOCAB.image, vlm.present(batch, model)))

    return model, batch, randomised(vlm.spec(model)), jax.jit(jax.value_and_grad(run, has_aux=True))


def compare(name, mesh_config, bucket=SPLIT):
    model, batch, params, run = setting(name, bucket)
    expected = run(params, batch)
    cfg = mesh_config
    mesh = make_mesh(cfg, jax.devices()[: math.prod((cfg.data, cfg.fsdp, cfg.tensor, cfg.sequence))])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, specs.shardings(vlm.spec(model), mesh, Rules()))
        got = run(placed, jax.device_put(batch, batch_shardings(batch, mesh, Rules())))
    assert not np.any(got[0][1][1])
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-5)

    def close(a, b):  # sums of many terms: relative to the largest of them
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))

    jax.tree.map(close, got[1], expected[1])


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_media_in_the_sequence(explicit):
    compare("causal", MeshConfig(2, 1, 1, 4, explicit=explicit))


@pytest.mark.slow
@pytest.mark.parametrize("name", everything())
def test_every_system_and_connector(name):
    """Explicit axes, which refuse whatever is not said."""
    compare(name, MeshConfig(2, 1, 1, 4, explicit=True))


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["causal", "resampled, all images", "merger"])
@pytest.mark.parametrize("bucket", [Bucket(4, 111, 48, 7), Bucket(4, 112, 47, 7), Bucket(4, 111, 47, 7)])
def test_lengths_that_do_not_divide(name, bucket, explicit, monkeypatch):
    """They stay whole, but not in the blocks of encoder and decoder."""
    queries = set()

    def attend(q, *args, **kwargs):
        if explicit and not jax.typeof(q).sharding.mesh.empty:
            queries.add((q.shape[1] % 4, jax.typeof(q).sharding.spec[1]))
        return attention.attend(q, *args, **kwargs)

    monkeypatch.setattr(block, "attend", attend)
    compare(name, MeshConfig(1, 2, 1, 4, explicit=explicit), bucket)
    assert queries == ({(0, "sequence")} if explicit else set())
