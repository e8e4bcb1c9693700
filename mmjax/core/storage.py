"""The arrays of a step on disk: the only file that knows Orbax.

What Orbax writes is the tree as plain nested dicts, which opens with Orbax alone. Nothing here says whether a step is
whole; that is the manifest's to say (`mmjax.core.manifest`).
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core import processes
from mmjax.core.checksum import checksums_numpy, describe, is_key, parse
from mmjax.core.errors import InputError
from mmjax.core.manifest import Damaged, damaged_files
from mmjax.core.tree import flatten, unflatten

COMMITS = ("rename", "marker")  # how a step's data appears under its name: see mmjax.checkpoint.Checkpoints


def as_arrays(tree: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The leaves by name as `save` takes them, and the kinds of those that are PRNG keys.

    Raises:
      InputError: a name is empty, or Orbax would take two for the same.
    """
    flat, keys = flatten(tree), {}
    dotted: dict[str, str] = {}
    for name, leaf in flat.items():
        # Orbax joins names with ".", and where two then meet it keeps one of the arrays without a word.
        if not name or dotted.setdefault(name.replace("/", "."), name) != name:
            raise InputError(f"cannot save the leaf {name!r}: its name is empty or, with '.' for '/', taken twice")
        if is_key(leaf):
            keys[name] = str(jax.random.key_impl(leaf))
            flat[name] = leaf = jax.random.key_data(leaf)
        # Of several processes, what each has for itself is the same in all.
        if not isinstance(leaf, jax.Array) or (processes.several() and leaf.is_fully_addressable):
            flat[name] = np.asarray(leaf)
    return flat, keys


def refuse_different(flat: Mapping[str, Any]) -> None:
    """Checks that what each of several processes has for itself is the same in all of them.

    Raises:
      InputError: in every process, if one has something else than process 0.
    """
    if not processes.several():
        return
    mine = checksums_numpy({name: leaf for name, leaf in flat.items() if not isinstance(leaf, jax.Array)})
    first = processes.from_first(lambda: mine)
    names = [name for name in mine if mine[name] != first.get(name)]
    text = f"{names[0]!r} in process {processes.index()} is not what it is in process 0" if names else ""
    processes.together(InputError(f"cannot save {text}; make it the same in all of them") if text else None)


def save(path: Path, flat: Mapping[str, Any], commit: str) -> Callable[[], None]:
    """Starts writing what `as_arrays` gave; returns, once the arrays may be donated or overwritten, how to wait.

    With several processes, each calls this; NumPy arrays are taken from process 0.
    """
    # Orbax takes no arrays without elements; the manifest alone carries those.
    full = {name: leaf for name, leaf in flat.items() if leaf.size}
    if not full:
        return lambda: None
    with _orbax(commit) as ocp:
        return ocp.save_async(path, unflatten(full)).result


def load(directory: Path, manifest: dict[str, Any], targets: Mapping[str, Any], *, alone: bool = False) -> dict:
    """Loads leaves of a step by name, each to its `target`: some, or all that the manifest lists.

    With several processes each calls this, unless `alone`, which loads in this process only.

    Raises:
      Damaged: Orbax fails, and a file is not as it was written. Any other error of Orbax is raised as it is.
    """
    data = directory / str(manifest["step"])
    empty = {}
    for name, target in targets.items():
        dtype, shape = parse(manifest["leaves"][name])
        if math.prod(shape) == 0:
            value = np.zeros(shape, dtype)
            empty[name] = value if target is np.ndarray else jax.device_put(value, target.sharding)
    full = {name: target for name, target in targets.items() if name not in empty}
    try:
        with _orbax(alone=alone, partial=len(targets) < len(manifest["leaves"])) as ocp:
            loaded = ocp.load(data, unflatten(full)) if full else {}
    except Exception as error:
        for problem in damaged_files(data, manifest["files"]):
            raise Damaged(problem) from error
        raise
    return flatten(loaded) | empty


def target(name: str, leaf: Any) -> Any:
    """Where `load` is to put what will stand for a leaf: an abstract array with a sharding, or NumPy's."""
    sharding = _sharding(leaf)
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        raise InputError(f"the sharding of {name!r} names an abstract mesh; give one of a mesh of devices")
    # Of several processes, each has arrays of its own: Orbax has arrays of all, or NumPy's.
    if sharding is None or (processes.several() and sharding.is_fully_addressable):
        return np.ndarray
    dtype, shape = parse(describe(leaf))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def place(leaf: Any, value: Any, impl: str | None) -> Any:
    """What was loaded for a leaf, as what the leaf is: `impl` is the kind of PRNG key, None for other arrays."""
    if isinstance(leaf, bool | int | float):
        return type(leaf)(value.item())
    if isinstance(leaf, np.generic):
        return value[()]
    # 64-bit host arrays stay NumPy's where JAX would make 32 bits of them.
    if isinstance(leaf, np.ndarray) or jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        return value
    if isinstance(value, np.ndarray):
        sharding = _sharding(leaf)
        value = jnp.asarray(value) if sharding is None else jax.device_put(value, sharding)
    return value if impl is None else jax.random.wrap_key_data(value, impl=impl)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a leaf says that it lies, or is to lie; None where it does not say."""
    sharding = getattr(leaf, "sharding", None)
    return None if isinstance(leaf, jax.Array) and not leaf.committed else sharding


@contextlib.contextmanager
def _orbax(commit: str = "rename", *, alone: bool = False, partial: bool = False) -> Iterator[Any]:
    from orbax.checkpoint import v1 as ocp  # 2.6 seconds

    context = ocp.Context()
    # Named, because AUTO depends on the path and lists steps of the other mode as complete that are not. To load, the
    # modes do not differ: "marker" only asks for the marker, and the manifest lists that like any file.
    modes = ocp.options.AtomicityMode
    context.atomicity.mode = modes.COMMIT_FILE if commit == "marker" else modes.ATOMIC_RENAME
    # Otherwise a save that fails at its start leaves a thread that keeps the program from ending for five minutes.
    context.asynchronous.create_directories_asynchronously = False
    context.pytree.loading.partial_load = partial
    if alone and processes.several():
        context.multiprocessing.primary_host = processes.index()
        context.multiprocessing.active_processes = {processes.index()}
        context.multiprocessing.barrier_sync_key_prefix = f"alone{processes.index()}"
    # For good, once: those threads may log after the save has failed.
    logging.getLogger("absl").addFilter(_wanted)
    with context:
        yield ocp


def _wanted(record: logging.LogRecord) -> bool:
    """Leaves out the errors that Orbax's threads log, hundreds of lines for a full disk, and `result` raises too."""
    return "_SignalingThread.run() raised" not in record.getMessage()
