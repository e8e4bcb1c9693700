"""Which processes there are, and what each of them loads; runs of two are in tests/sharded."""

import jax
import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, Rules, make_mesh, named
from mmjax.train import cluster
from mmjax.train.cluster import Cluster, several


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # an allocation, without srun
        ({"OMPI_MCA_orte_hnp_uri": "1;tcp://a", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_what_shows_several_processes(environment, expected):
    assert several(environment) is expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"coordinator": "a:1"}, "go together"),
        ({"processes": 2, "process": 0}, "go together"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "counted from 0"),
    ],
)
def test_half_a_cluster_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        Cluster(**wrong)


def test_one_process_loads_all_parts():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    assert cluster.parts(mesh, Rules()) == ((0, 1, 2, 3), 4)
    assert cluster.parts(make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2]), Rules()) == ((0,), 1)


def test_what_every_process_has_whole():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    x = np.arange(8).reshape(4, 2)
    y = cluster.whole(x, named(mesh, ("batch", None), Rules()))
    assert [s.data.shape for s in y.addressable_shards] == [(1, 2)] * 4
    np.testing.assert_array_equal(y, x)
