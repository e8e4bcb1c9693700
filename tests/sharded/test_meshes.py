"""The same 20 steps on 1, 2 and 8 devices, with all four axes, in Auto and Explicit mode.

MMJAX_WHOLE_MATRIX=1 python -m pytest -q -m slow tests/sharded/test_meshes.py -s     # CI tries three of them
"""

import dataclasses
import math
import os

import jax
import numpy as np
import pytest
from tiny import tiny_run

from mmjax.core.meshes import MeshConfig, make_mesh
from mmjax.train import loop, report

pytestmark = pytest.mark.slow


def losses(tmp_path_factory, mesh: MeshConfig, monkeypatch) -> np.ndarray:
    out = tmp_path_factory.mktemp("run")
    devices = math.prod((mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence))
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:devices]))
    cfg = tiny_run(out, steps=20, save_every=100, mesh=mesh)
    # Every axis really splits something: widths, heads and tokens divide by two, and logits come in chunks.
    cfg = dataclasses.replace(
        cfg,
        packing=dataclasses.replace(cfg.packing, rows=8),
        objective=dataclasses.replace(cfg.objective, chunk=48),
    )
    assert loop.run(cfg) == 0
    return np.array([loss for _, loss in report.losses(out)])


# data, fsdp, tensor, sequence
MESHES = [
    MeshConfig(2, 1, 1),
    MeshConfig(1, 2, 1),
    MeshConfig(1, 1, 2),
    MeshConfig(1, 1, 1, 2),
    MeshConfig(1, 1, 1, explicit=True),
    MeshConfig(1, 1, 1, 2, explicit=True),
    MeshConfig(2, 1, 2, 2),
    MeshConfig(2, 2, 2, explicit=True),
    MeshConfig(2, 2, 2),
    MeshConfig(8, 1, 1),
    MeshConfig(2, 1, 2, 2, explicit=True),
]
if not os.environ.get("MMJAX_WHOLE_MATRIX"):
    MESHES = MESHES[-3:]


def test_losses_agree_within_1e_5(tmp_path_factory, monkeypatch):
    one = losses(tmp_path_factory, MeshConfig(1, 1, 1), monkeypatch)
    worst = {}
    for mesh in MESHES:
        other = losses(tmp_path_factory, mesh, monkeypatch)
        worst[mesh] = float(np.max(np.abs(other / one - 1)))
    print(*(f"{name}: {value:.1e}" for name, value in worst.items()), sep="\n")
    assert len(one) == 20
    assert max(worst.values()) < 1e-5, worst
