"""Checkpoints that are whole or absent: Orbax writes the arrays, this file makes a step exist and proves it unharmed.

    <dir>/<step>/...           what Orbax wrote: the tree as plain nested dicts, openable with no model code
    <dir>/done/<step>.json     the manifest: metadata, size and CRC-32 of every file, a checksum of every leaf

A step exists when its manifest does. It is written last and removed first, so a process killed at any moment leaves
whole steps and orphans, and `Checkpoints` sweeps orphans when it starts. Orbax itself has no checksum of the data.

    python -m mmjax.checkpoint list DIR
    python -m mmjax.checkpoint verify DIR      exit status 1 if anything is damaged
"""

import argparse
import atexit
import contextlib
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core.checksum import checksums, checksums_numpy, describe, is_key, parse
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike, disk_errors, lock_directory, sync_directory
from mmjax.core.manifest import (
    FORMAT,
    compare_leaves,
    damaged_files,
    finished_steps,
    list_files,
    listed_steps,
    match_leaves,
    newest_step,
    read_manifest,
    remove_step,
    sweep,
    write_manifest,
)
from mmjax.core.tree import flatten, unflatten


class Checkpoints:
    """The steps saved in one directory, of which the newest `keep` are kept.

    Saving runs in the background, one save at a time. Use it as a context manager, or call `close` at the end: a
    program that ends without either may lose the save that is still running (stderr says so). Any number of processes
    may read a directory while one saves into it.

    Raises:
      InputError: `keep` is less than 1, or the directory is not a local path.
    """

    def __init__(self, directory: PathLike, *, keep: int = 3):
        if keep < 1:
            raise InputError(f"keep = {keep} would delete every checkpoint; keep at least 1")
        self.directory = _local(directory)
        self.keep = keep
        self._saving: threading.Thread | None = None
        self._error: BaseException | None = None
        sweep(self.directory)

    def steps(self) -> list[int]:
        """The steps that exist, ascending. One that is still being saved does not."""
        return finished_steps(self.directory)

    def metadata(self, step: int) -> dict:
        """What was given as `metadata` when the step was saved.

        Raises:
          InputError: there is no such step.
        """
        return read_manifest(self.directory, step)["metadata"]

    def save(self, step: int, tree: Any, *, metadata: dict | None = None, wait: bool = False) -> None:
        """Saves a tree of arrays as one step; steps increase.

        Waits for the save before it and raises that one's error, if it failed. Returns once everything is copied to the
        host, so that the arrays may be donated, and writes in the background, unless `wait`.

        Args:
          tree: dicts, dataclasses, tuples of JAX or NumPy arrays, PRNG keys, Python numbers.
          metadata: small and JSON: the configuration, the position in the data.

        Raises:
          InputError: the step, or a later one, exists; a leaf is no array; the disk is full; another process is saving.
        """
        self.wait()
        manifest = {"format": FORMAT, "step": step, "metadata": metadata or {}, "keys": {}}
        try:
            json.dumps(manifest)
        except (TypeError, ValueError) as error:
            raise InputError(f"the metadata of step {step} cannot be written as JSON: {error}") from error
        existing = self.steps()
        if step < 0 or (existing and step <= existing[-1]):
            raise InputError(
                f"cannot save step {step} in {self.directory}: steps increase from 0, and it has {existing or 'none'};"
                f" save a later step, or use another directory"
            )
        flat = flatten(tree)
        dotted: dict[str, str] = {}
        for name, leaf in flat.items():
            # Orbax joins names with ".", and where two then meet it keeps one of the arrays without a word.
            if not name or dotted.setdefault(name.replace("/", "."), name) != name:
                raise InputError(f"cannot save the leaf {name!r}: its name is empty or, with '.' for '/', taken twice")
            if is_key(leaf):
                manifest["keys"][name] = str(jax.random.key_impl(leaf))
                flat[name] = jax.random.key_data(leaf)
            elif not isinstance(leaf, jax.Array):
                flat[name] = np.asarray(leaf)
        manifest["leaves"] = checksums(tree)
        # Orbax takes no arrays without elements; the manifest alone carries those.
        self._start(manifest, unflatten({name: leaf for name, leaf in flat.items() if leaf.size}))
        if wait:
            self.wait()

    def _start(self, manifest: dict, arrays: dict) -> None:
        step = manifest["step"]
        with contextlib.ExitStack() as stack:
            # A minute: a process that is only starting holds the lock while it sweeps. `done` and not the directory
            # itself, which the program that owns the run may have locked already.
            stack.enter_context(lock_directory(self.directory / "done", wait=60.0))
            stack.enter_context(disk_errors(f"save step {step} in", self.directory))
            remove_step(self.directory, step)
            try:
                with _orbax() as ocp:
                    response = ocp.save_async(self.directory / str(step), arrays) if arrays else None
            except BaseException:
                remove_step(self.directory, step)
                raise
            held = stack.pop_all()
        atexit.register(self._at_exit)
        self._saving = threading.Thread(target=self._complete, args=(manifest, response, held), name="mmjax-checkpoint")
        self._saving.start()

    def _complete(self, manifest: dict, response: Any, held: contextlib.ExitStack) -> None:
        step = manifest["step"]
        data = self.directory / str(step)
        try:
            with held:  # leaving it gives the lock back and turns disk errors into a sentence
                try:
                    if response is not None:
                        response.result()
                    data.mkdir(exist_ok=True)
                    manifest["files"] = list_files(data)
                    sync_directory(self.directory)
                    write_manifest(self.directory, manifest)
                except BaseException:
                    remove_step(self.directory, step)
                    raise
                for old in self.steps()[: -self.keep]:
                    remove_step(self.directory, old)
        except BaseException as error:
            self._error = error
            if "cannot schedule new futures" in str(error):  # Python's, when it is shutting down
                self._error = InputError(f"step {step} was not saved: the program ended first; call Checkpoints.close")

    def wait(self) -> None:
        """Returns when no save is running any more.

        Raises:
          InputError: the save failed because of the disk. Any other error of the save is raised as it is. Once.
        """
        if self._saving is not None:
            self._saving.join()
            self._saving = None
            atexit.unregister(self._at_exit)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def restore(self, like: Any, step: int | None = None, *, verify: bool = True) -> tuple[Any, dict]:
        """Loads a step (the newest, if None) into the structure of `like`; returns it with the step's metadata.

        The bits are those that were saved, on any number of devices. A leaf of `like` says where its array goes: a
        `jax.ShapeDtypeStruct` or JAX array with a sharding, there; without one, to the default device, uncommitted;
        a NumPy array or Python number, to the host. `verify` compares the checksums after loading.

        Raises:
          InputError: no such step; a leaf is missing, surplus, or of another shape or dtype; the data is damaged.
        """
        self.wait()
        step = newest_step(self.directory) if step is None else step
        manifest = read_manifest(self.directory, step)
        wanted = flatten(like)
        match_leaves(wanted, manifest, self.directory)
        loaded = _load(self.directory, manifest, {name: _target(name, leaf) for name, leaf in wanted.items()})
        values = {name: _place(leaf, loaded[name], manifest["keys"].get(name)) for name, leaf in wanted.items()}
        if verify:
            # Where a Python number is wanted, the array it was read from is checked.
            arrays = {name: v if isinstance(v, jax.Array) else loaded[name] for name, v in values.items()}
            compare_leaves(checksums(unflatten(arrays)), manifest, self.directory)
        return jax.tree.unflatten(jax.tree.structure(like), list(values.values())), manifest["metadata"]

    def close(self) -> None:
        """Finishes the save that is running; raises what `wait` raises."""
        self.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _at_exit(self) -> None:
        try:
            self.wait()
        except BaseException as error:
            print(f"mmjax.checkpoint: {error}", file=sys.stderr)


def open_nested(directory: PathLike, step: int | None = None) -> dict:
    """A step (the newest, if None) as a nested dict of NumPy arrays, with no model code, mesh or device.

    PRNG keys come as their key data. Checksums are compared.

    Raises:
      InputError: no such step, or its data is damaged.
    """
    directory = _local(directory)
    manifest = read_manifest(directory, newest_step(directory) if step is None else step)
    loaded = _load(directory, manifest, dict.fromkeys(manifest["leaves"], np.ndarray))
    compare_leaves(checksums_numpy(loaded), manifest, directory)
    return unflatten(loaded)


def verify(directory: PathLike, step: int) -> list[str]:
    """What is wrong with a step, a sentence each; nothing if it is whole.

    Compares the size and CRC-32 of every file, then, where those are right, the checksum of every leaf.
    """
    directory = _local(directory)
    try:
        manifest = read_manifest(directory, step)
    except InputError as error:
        return [str(error)]
    problems = damaged_files(directory / str(step), manifest["files"])
    if not problems:
        try:
            open_nested(directory, step)
        except Exception as error:
            problems.append(str(error))
    return problems


def _local(directory: PathLike) -> Path:
    if "://" in os.fspath(directory):
        raise InputError(f"{directory} is not a local path; mount the bucket and give the path of the mount")
    return Path(directory).absolute()


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    from orbax.checkpoint import v1 as ocp  # 2.6 seconds

    context = ocp.Context()
    # Named, because AUTO depends on the path and lists steps of the other mode as complete that are not.
    context.atomicity.mode = ocp.options.AtomicityMode.ATOMIC_RENAME
    # Otherwise a save that fails at its start leaves a thread that keeps the program from ending for five minutes.
    context.asynchronous.create_directories_asynchronously = False
    # For good, once: those threads may log after the save has failed.
    logging.getLogger("absl").addFilter(_wanted)
    with context:
        yield ocp


def _wanted(record: logging.LogRecord) -> bool:
    """Leaves out the errors that Orbax's threads log, hundreds of lines for a full disk, and `result` raises too."""
    return "_SignalingThread.run() raised" not in record.getMessage()


def _target(name: str, leaf: Any) -> Any:
    """What Orbax is to load: an abstract array with a sharding, or NumPy's."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or (isinstance(leaf, jax.Array) and not leaf.committed):
        return np.ndarray
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        raise InputError(f"the sharding of {name!r} names an abstract mesh; give one of a mesh of devices")
    dtype, shape = parse(describe(leaf))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _load(directory: Path, manifest: dict, targets: dict[str, Any]) -> dict[str, Any]:
    data = directory / str(manifest["step"])
    empty = {}
    for name, text in manifest["leaves"].items():
        dtype, shape = parse(text)
        if math.prod(shape) == 0:
            value, target = np.zeros(shape, dtype), targets[name]
            empty[name] = value if target is np.ndarray else jax.device_put(value, target.sharding)
    full = {name: target for name, target in targets.items() if name not in empty}
    try:
        with _orbax() as ocp:
            loaded = ocp.load(data, unflatten(full)) if full else {}
    except Exception as error:
        for problem in damaged_files(data, manifest["files"]):
            raise InputError(f"{problem}; restore another step") from error
        raise
    return flatten(loaded) | empty


def _place(leaf: Any, value: Any, impl: str | None) -> Any:
    if impl is not None:
        return jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
    if isinstance(leaf, bool | int | float):
        return type(leaf)(value.item())
    if isinstance(leaf, np.generic):
        return value[()]
    # 64-bit host arrays stay NumPy's where JAX would make 32 bits of them.
    if isinstance(leaf, np.ndarray) or jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        return value
    return jnp.asarray(value)


def main(arguments: list[str] | None = None) -> int:
    """`python -m mmjax.checkpoint list|verify DIR`; returns the exit status: 1 for a damaged step, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m mmjax.checkpoint", description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=["list", "verify"])
    parser.add_argument("directory", metavar="DIR")
    given = parser.parse_args(arguments)
    try:
        directory = _local(given.directory)
        damaged = False
        for step in listed_steps(directory) or [newest_step(directory)]:
            if given.action == "list":
                manifest = read_manifest(directory, step)
                size = sum(file["size"] for file in manifest["files"])
                print(
                    f"{step}\t{len(manifest['leaves'])} arrays\t{size / 1e6:.1f} MB", json.dumps(manifest["metadata"])
                )
            else:
                problems = verify(directory, step)
                damaged |= bool(problems)
                print("\n".join(f"step {step}: {problem}" for problem in problems or ["whole"]))
        return int(damaged)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
