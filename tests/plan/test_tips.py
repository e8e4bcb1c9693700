"""What is said to be slow, and only where it is."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from tiny import tiny_run

from mmjax.core.hlo import Collective, Count, Work
from mmjax.core.meshes import MESH_AXES
from mmjax.plan.tips import tips
from mmjax.train.config import Objective


def mesh(*sizes: int) -> Mesh:
    return Mesh(np.array(jax.devices())[: np.prod(sizes)].reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def sends(scope: str, kind: str, sent: float, turns: float = 1.0, count: int = 8) -> Work:
    inside = Count([Work("x", scope, collective=Collective(kind, tuple(range(count)), sent, False))])
    return Work("loop", scope, loop=inside, turns=turns)


@pytest.mark.parametrize(
    ("chunk", "turns", "sizes", "said"),
    [
        (16, 8.0, (1, 4, 1, 2), True),
        (16, 8.0, (1, 8, 1, 1), False),  # gathered once
        (128, 8.0, (1, 4, 1, 2), False),
        (16, 0.1, (1, 4, 1, 2), False),
        (64, 8.0, (1, 2, 2, 2), False),  # a device has no more of a row than that
    ],
)
def test_a_head_that_is_gathered_for_every_chunk(chunk, turns, sizes, said):
    cfg = dataclasses.replace(tiny_run(Path("unused")), objective=Objective(chunk=chunk))
    work = [sends("jvp(loss)", "all-gather", 10.0, turns), sends("jvp(decoder)", "all-gather", 100.0)]
    found = tips(cfg, Count(work), mesh(*sizes))
    assert bool(found) is said
    assert not said or "--objective.chunk 32" in found[0]


@pytest.mark.parametrize(("sizes", "said"), [((1, 8, 1, 1), True), ((2, 4, 1, 1), False), ((1, 5, 1, 1), False)])
def test_gradients_that_are_summed_whole(sizes, said):
    count = math.prod(sizes)
    work = [
        sends("transpose(jvp(decoder))", "all-reduce", 100.0, count=count),
        sends("jvp(decoder)", "all-gather", 100.0),
    ]
    found = tips(tiny_run(Path("unused")), Count(work), mesh(*sizes))
    assert bool(found) is said
    assert not said or "--mesh.data 2 --mesh.fsdp 4" in found[0]
