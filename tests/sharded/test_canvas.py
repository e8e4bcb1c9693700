"""Tiles seen together, and looked at from beside, where rows are split along their length: as on one device."""

import jax
import numpy as np
import pytest
from canvases import documents, make, model
from tiny import randomised

from mmjax.core import spec as specs
from mmjax.core.meshes import MeshConfig, Rules, make_mesh
from mmjax.models import vlm
from mmjax.sequence import invariants
from mmjax.sequence.batch import Bucket
from mmjax.train.config import Objective
from mmjax.train.step import batch_shardings, loss_fn


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_as_on_one_device(explicit):
    a, b, c = documents()
    batch, params = make([[a, c], [b], [b, a], [c]], Bucket(4, 60, 28, 5)), randomised(vlm.spec(model()))

    def run(params, batch):
        loss, _ = loss_fn(params, batch, model(), Objective(z=1e-3, chunk=20))
        found = invariants.violations(batch, 40, None, vlm.present(batch, model()), said=model().decoder.said)
        return loss, found

    run = jax.jit(jax.value_and_grad(run, has_aux=True))
    expected = run(params, batch)
    mesh = make_mesh(MeshConfig(1, 2, 1, 4, explicit=explicit), jax.devices()[:8])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, specs.shardings(vlm.spec(model()), mesh, Rules()))
        got = run(placed, jax.device_put(batch, batch_shardings(batch, mesh, Rules())))
    assert not np.any(got[0][1])
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-5)

    def close(a, b):  # sums of many terms: relative to the largest of them
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))

    jax.tree.map(close, got[1], expected[1])
