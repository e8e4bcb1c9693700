"""Meshes, and which of their axes carry a logical axis."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmjax.core import meshes
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, Rules, make_mesh


def test_partition_uses_a_mesh_axis_once_and_leaves_uneven_dimensions_whole():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    assert meshes.partition(("heads", "mlp"), Rules(), sizes) == P("tensor", None)
    assert meshes.partition(("batch", None), Rules(), sizes, (8, 3)) == P(("data", "fsdp"), None)
    assert meshes.partition(("heads",), Rules(), sizes, (3,)) == P(None)
    assert meshes.partition(("length", "length"), Rules(), {"sequence": 1}) == P(None, None)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(InputError, match="does not fit 8 device"):
        make_mesh(MeshConfig(*sizes))


def test_neighbouring_devices_share_the_axes_with_the_most_traffic():
    ids = np.vectorize(lambda d: d.id)(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, sequence=2)).devices)
    assert ids[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]  # fsdp, sequence, tensor


class Torus:
    """A chip of a TPU that is not here."""

    device_kind, platform, core_on_chip, slice_index = "TPU v5p", "tpu", 0, 0

    def __init__(self, n: int, *coords: int):
        self.id, self.process_index, self.coords = n, n // 4, coords


def test_axes_of_a_torus_are_split_where_no_others_give_the_mesh():
    """4 × 4 × 4 as 2 × 32: JAX joins whole axes alone; every chip is there once, and 32 are half of the torus."""
    chips = [Torus(n, n % 4, n // 4 % 4, n // 16) for n in range(64)]
    placed = make_mesh(MeshConfig(data=2, fsdp=32), chips).devices
    assert placed.shape == (2, 32, 1, 1)
    assert {d.id for d in placed.flat} == set(range(64))
    spread = [[len({d.coords[axis] for d in half.flat}) for axis in range(3)] for half in placed]
    assert [sorted(sizes) for sizes in spread] == [[2, 4, 4]] * 2
