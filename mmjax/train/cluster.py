"""Several processes that train one model: how they find each other, and which rows of a batch each of them loads."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from mmjax.core import meshes, processes
from mmjax.core.errors import InputError
from mmjax.core.meshes import Rules


@dataclass(frozen=True)
class Cluster:
    """How a process finds the others.

    join: "auto" joins where the environment shows several processes (SLURM, Open MPI, an indexed Kubernetes job, a TPU
      slice of several hosts) or a coordinator is given; "always" and "never" say so.
    coordinator: "host:port" of process 0; processes, process: how many there are, and which one this is, from 0. All
      three, where `jax.distributed.initialize` cannot find them out by itself.
    """

    join: Literal["auto", "always", "never"] = "auto"
    coordinator: str = ""
    processes: int = 0
    process: int = -1

    def __post_init__(self):
        given = [bool(self.coordinator), self.processes > 0, self.process >= 0]
        if any(given) and not all(given):
            raise InputError(
                "cluster.coordinator, cluster.processes and cluster.process go together; give all three, or none where "
                "JAX finds them out by itself (Cloud TPU, SLURM, Open MPI, Kubernetes)."
            )
        if all(given) and self.process >= self.processes:
            raise InputError(f"cluster.process is {self.process} of {self.processes}, but they are counted from 0.")


def several(environment: Mapping[str, str]) -> bool:
    """Whether environment variables show that this process is one of several that JAX can find by itself."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 0

    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    return (
        ("SLURM_PROCID" in environment and number("SLURM_NTASKS") > 1)
        or ("OMPI_MCA_orte_hnp_uri" in environment and number("OMPI_COMM_WORLD_SIZE") > 1)
        or ("KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment)
        or "JAX_COORDINATOR_ADDRESS" in environment
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or len(hosts.split(",")) > 1
    )


@contextlib.contextmanager
def joined(cfg: Cluster) -> Iterator[None]:
    """Joins the other processes, if there are any, before JAX starts its backend; leaves them at the end.

    Where one of several fails, it says why and its program ends here.

    Raises:
      InputError: the others cannot be found, or this is one of several processes that were not joined.
    """
    given = {"coordinator_address": cfg.coordinator, "num_processes": cfg.processes, "process_id": cfg.process}
    join = cfg.join == "always" or (cfg.join == "auto" and (bool(cfg.coordinator) or several(os.environ)))
    mine = join and not jax.distributed.is_initialized()
    if mine:
        try:
            jax.distributed.initialize(**given if cfg.coordinator else {})
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"the other processes were not found ({str(error).strip()}); give --cluster.coordinator, "
                f"--cluster.processes and --cluster.process, or --cluster.join never to run alone."
            ) from error
    try:
        if jax.process_count() > 1 and not jax.distributed.is_initialized():
            raise InputError(
                f"this is one of {jax.process_count()} processes of a TPU slice, which have not joined; give "
                f"--cluster.join always."
            )
        yield
    except BaseException as error:
        if mine and processes.several():
            _end(error)
        raise
    if mine:
        jax.distributed.shutdown()


def _end(error: BaseException) -> NoReturn:
    """Says what happened and ends this process at once: to leave as programs do would wait for the others for minutes,
    and they may wait for this one. They notice that it is gone, and end as well.
    """
    status = 1
    if isinstance(error, InputError):
        status = 2
        print(f"mmjax: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        status = 130
    else:
        traceback.print_exception(error)
    processes.meet(2.0)  # where all have failed for the same reason, all are to hear it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def parts(mesh: Mesh, rules: Rules) -> tuple[tuple[int, ...], int]:
    """Which parts of a batch's rows this process loads, and of how many: those that its devices hold.

    Processes that share a part (devices of one tensor axis on two hosts) load it each.
    """
    axes = rules.mesh_axes("batch")
    count = int(np.prod([mesh.shape[a] for a in axes if a in mesh.shape]))
    placed = meshes.named(mesh, ("batch",), rules, (count,))
    held = placed.addressable_devices_indices_map((count,)).values()
    if count == 1:
        return (0,), 1
    return tuple(sorted({index[0].start or 0 for index in held})), count


def place(local: Any, placed: Any, rows: Any) -> Any:
    """A tree of NumPy arrays that hold this process' rows, as global arrays.

    Args:
      local: arrays.
      placed: their shardings.
      rows: the same tree of abstract arrays, of all processes' rows.
    """
    if jax.process_count() == 1:
        return jax.device_put(local, placed)
    return jax.tree.map(
        lambda x, s, whole: jax.make_array_from_process_local_data(s, np.asarray(x), whole.shape), local, placed, rows
    )


def whole(value: np.ndarray, placed: Sharding) -> jax.Array:
    """An array that every process has whole, as a global array."""
    return jax.make_array_from_callback(value.shape, placed, lambda index: value[index])
