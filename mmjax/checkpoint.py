"""Checkpoints that are whole or absent: Orbax writes the arrays, this file makes a step exist and proves it unharmed.

    <dir>/<step>/...           what Orbax wrote: the tree as plain nested dicts, openable with no model code
    <dir>/done/<step>.json     the manifest: metadata, size and CRC-32 of every file, a checksum of every leaf
    <dir>/damaged/<step>...    what `restore` found damaged, and went back to the step before

A step exists when its manifest does. It is written last and removed first, so a process killed at any moment leaves
whole steps and orphans, and `Checkpoints` sweeps orphans when it starts. Orbax itself has no checksum of the data.

    python -m mmjax.checkpoint list DIR
    python -m mmjax.checkpoint verify DIR      exit status 1 if anything is damaged
    python -m mmjax.checkpoint export DIR FILE.safetensors [--step N] [--only 'params/*']
    python -m mmjax.checkpoint prune DIR [--keep N] [--every M] [--damaged]
"""

import atexit
import contextlib
import dataclasses
import json
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mmjax.core import processes, storage
from mmjax.core.archive import export, local_path, main, open_nested, prune, verify
from mmjax.core.checksum import checksums, start_checksums
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike, disk_errors, lock_directory, sync_directory
from mmjax.core.manifest import (
    FORMAT,
    Damaged,
    compare_leaves,
    damaged_files,
    finished_steps,
    list_files,
    listed_steps,
    manifest_path,
    match_leaves,
    newest_step,
    read_manifest,
    remove_step,
    set_aside,
    surplus,
    sweep,
    write_manifest,
)
from mmjax.core.tree import flatten, unflatten

__all__ = ["Checkpoints", "Restored", "export", "main", "open_nested", "prune", "verify"]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` found. Unpacks as `tree, metadata`."""

    tree: Any
    metadata: dict
    step: int

    def __iter__(self) -> Iterator[Any]:
        return iter((self.tree, self.metadata))


class Checkpoints:
    """The steps saved in one directory, of which the newest `keep` are kept, and those that `every` divides.

    Saving runs in the background, one save at a time. Use it as a context manager, or call `close` at the end: a
    program that ends without either may lose the save that is still running (stderr says so). Any number of processes
    may read a directory while one saves into it.

    Where `jax.distributed` joins several processes, each makes its own Checkpoints of the same shared directory and
    calls the same methods in the same order, all of them; then they all get the same answer or the same error.

    Args:
      keep: how many of the newest steps are kept.
      every: steps that are multiples of this are never deleted; 0 for none.
      commit: how a step's data appears under its name, on top of which the manifest says whether it is whole. "rename":
        it is written beside it and renamed, in one stroke on a file system. "marker": it is written in place and a
        file in it marks the end, for mounted object stores, which rename by copying every file. Either may be read,
        and gone on with, by either.

    Raises:
      InputError: `keep` or `every` is too small, `commit` unknown, or the directory is not a local path.
    """

    def __init__(self, directory: PathLike, *, keep: int = 3, every: int = 0, commit: str = "rename"):
        if keep < 1:
            raise InputError(f"keep = {keep} would delete every checkpoint; keep at least 1")
        if every < 0:
            raise InputError(f"every = {every} is negative; give 0 to keep the newest steps only")
        if commit not in storage.COMMITS:
            raise InputError(f"commit = {commit!r} is neither 'rename' nor 'marker'; use 'rename' on file systems")
        self.directory = local_path(directory)
        self.keep, self.every, self.commit = keep, every, commit
        self._saving: threading.Thread | None = None
        self._error: BaseException | None = None
        processes.from_first(lambda: sweep(self.directory))

    def steps(self) -> list[int]:
        """The steps that exist, ascending. One that is still being saved does not, nor one with a damaged manifest."""
        return processes.from_first(lambda: finished_steps(self.directory))

    def metadata(self, step: int) -> dict:
        """What was given as `metadata` when the step was saved.

        Raises:
          InputError: there is no such step.
        """
        return processes.from_first(lambda: read_manifest(self.directory, step))["metadata"]

    def save(self, step: int, tree: Any, *, metadata: dict | None = None, wait: bool = False) -> None:
        """Saves a tree of arrays as one step; steps increase.

        Waits for the save before it and raises that one's error, if it failed. Returns once the arrays may be donated
        and overwritten, and writes in the background, unless `wait`. What is NumPy's is summed before it returns.

        Args:
          tree: dicts, dataclasses, tuples of JAX or NumPy arrays, PRNG keys, Python numbers. With several processes,
            what they do not hold together is the same in each.
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
        flat, manifest["keys"] = storage.as_arrays(tree)
        sums = start_checksums(tree)
        storage.refuse_different(flat)
        self._start(manifest, flat, sums)
        if wait:
            self.wait()

    def _start(self, manifest: dict, flat: dict[str, Any], sums: Callable[[], dict[str, str]]) -> None:
        step = manifest["step"]
        written = error = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(disk_errors(f"save step {step} in", self.directory))
            processes.from_first(lambda: self._claim(step, stack))
            try:
                written = storage.save(self.directory / str(step), flat, self.commit)
            except BaseException as raised:
                error = raised
            try:
                processes.together(error)
            except BaseException:
                self._remove(step)
                raise
            held = stack.pop_all()
        atexit.register(self._at_exit)
        arguments = (manifest, sums, written, held)
        self._saving = threading.Thread(target=self._complete, args=arguments, name="mmjax-checkpoint")
        self._saving.start()

    def _claim(self, step: int, stack: contextlib.ExitStack) -> None:
        existing = finished_steps(self.directory)
        if step < 0 or (existing and step <= existing[-1]):
            raise InputError(
                f"cannot save step {step} in {self.directory}: steps increase from 0, and it has {existing or 'none'};"
                f" save a later step, or use another directory"
            )
        # A minute: a process that is only starting holds the lock while it sweeps. `done` and not the directory
        # itself, which the program that owns the run may have locked already.
        stack.enter_context(lock_directory(self.directory / "done", wait=60.0))
        if manifest_path(self.directory, step).exists():
            set_aside(self.directory, step)
        remove_step(self.directory, step)

    def _complete(
        self, manifest: dict, sums: Callable[[], dict], written: Callable[[], None], held: contextlib.ExitStack
    ) -> None:
        step = manifest["step"]
        try:
            with held:  # leaving it gives the lock back and turns disk errors into a sentence
                try:
                    written()
                    manifest["leaves"] = sums()
                    if processes.index() == 0:
                        self._finish(manifest)
                except BaseException:
                    self._remove(step)
                    raise
                if processes.index() == 0:
                    for old in surplus(finished_steps(self.directory), self.keep, self.every):
                        remove_step(self.directory, old)
        except BaseException as error:
            self._error = error
            if "cannot schedule new futures" in str(error):  # Python's, when it is shutting down
                self._error = InputError(f"step {step} was not saved: the program ended first; call Checkpoints.close")

    def _finish(self, manifest: dict) -> None:
        data = self.directory / str(manifest["step"])
        data.mkdir(exist_ok=True)
        manifest["files"] = list_files(data)
        sync_directory(self.directory)
        write_manifest(self.directory, manifest)

    def _remove(self, step: int) -> None:
        if processes.index() == 0:
            remove_step(self.directory, step)

    def wait(self) -> None:
        """Returns when no save is running any more.

        Raises:
          InputError: the save failed because of the disk. Any other error of the save is raised as it is. Once.
        """
        if self._saving is not None:
            self._join()
            error, self._error = self._error, None
            processes.together(error)

    def _join(self) -> None:
        if self._saving is not None:
            self._saving.join()
            self._saving = None
            atexit.unregister(self._at_exit)

    def restore(
        self,
        like: Any,
        step: int | None = None,
        *,
        fallback: bool = True,
        verify: bool = True,
        partial: bool = False,
    ) -> Restored:
        """Loads a step into the structure of `like`: the newest that is whole, or the one that is asked for.

        The bits are those that were saved, on any number of devices. A leaf of `like` says where its array goes: a
        `jax.ShapeDtypeStruct` or JAX array with a sharding, there; without one, to the default device, uncommitted;
        a NumPy array or Python number, to the host. Where steps hold different trees, it is a function of the step.

        A damaged step is set aside, in <dir>/damaged, with a warning that names the file or leaf, and the step before
        it is tried; if none is whole, all stay where they are. Damage is: a manifest or file that is missing or not as
        it was written, or numbers that are not those that were saved.

        Args:
          step: None for the newest.
          fallback: whether the newest step being damaged is a warning, and not an error.
          verify: whether to compare the CRC-32 of every file before loading, and the checksum of every leaf after.
          partial: whether the step may hold leaves that `like` has not; they are not loaded.

        Raises:
          InputError: no such step; a leaf is missing, surplus, or of another shape or dtype; the step is damaged and
            was asked for, or `fallback` is off; no step is whole.
        """
        self.wait()
        if step is not None:
            return self._restore(like, step, verify, partial)
        damaged: dict[int, str] = {}
        for candidate in reversed(processes.from_first(lambda: listed_steps(self.directory))):
            try:
                restored = self._restore(like, candidate, verify, partial)
            except InputError as error:
                if self._deleted(candidate):  # meanwhile, by the process that saves here
                    continue
                if not (fallback and isinstance(error, Damaged)):
                    raise
                damaged[candidate] = error.args[0]
            else:
                processes.from_first(lambda step=candidate: self._set_aside(damaged, step))
                return restored
        if not damaged:
            processes.from_first(lambda: newest_step(self.directory))  # which says that there is none
        found = "; ".join(f"step {step}: {what}" for step, what in damaged.items())
        raise InputError(f"no step in {self.directory} is whole ({found}); put copies back, or use another directory")

    def _restore(self, like: Any, step: int, verify: bool, partial: bool) -> Restored:
        manifest = processes.from_first(lambda: read_manifest(self.directory, step))
        like = like(step) if callable(like) else like
        wanted = flatten(like)
        leaves = {name: text for name, text in manifest["leaves"].items() if name in wanted or not partial}
        match_leaves(wanted, manifest | {"leaves": leaves}, self.directory)
        if verify:
            # Before Orbax sees them: one process may fail on its files where the others go on, and wait for it.
            mine = manifest["files"][processes.index() :: processes.count()]
            problems = damaged_files(self.directory / str(step), mine)
            processes.together(Damaged(problems[0]) if problems else None)
        targets = {name: storage.target(name, leaf) for name, leaf in wanted.items()}
        error = None
        try:
            loaded = storage.load(self.directory, manifest, targets)
            values = {n: storage.place(leaf, loaded[n], manifest["keys"].get(n)) for n, leaf in wanted.items()}
        except Exception as raised:
            error = raised
        processes.together(error)
        if verify:
            # Where a Python number is wanted, the array it was read from is checked.
            arrays = {name: v if isinstance(v, jax.Array) else loaded[name] for name, v in values.items()}
            found = checksums(unflatten(arrays))
            try:
                compare_leaves(found, manifest | {"leaves": leaves}, self.directory)
            except Damaged as raised:
                error = raised
            processes.together(error)
        tree = jax.tree.unflatten(jax.tree.structure(like), list(values.values()))
        return Restored(tree, manifest["metadata"], step)

    def _deleted(self, step: int) -> bool:
        return processes.from_first(lambda: not manifest_path(self.directory, step).exists())

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        for step, what in damaged.items():
            try:
                # Whoever holds the lock is saving here, and this process only reads.
                with lock_directory(self.directory / "done"):
                    where = f"was moved to {set_aside(self.directory, step)}"
            except (InputError, OSError) as error:
                where = f"stays where it is ({error})"
            warnings.warn(f"{what}: step {used} is used instead, and step {step} {where}", stacklevel=5)

    def close(self) -> None:
        """Finishes the save that is running; raises what `wait` raises."""
        self.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None:
            self.close()
            return
        # The other processes may be anywhere: wait for none of them.
        self._at_exit()

    def _at_exit(self) -> None:
        self._join()
        error, self._error = self._error, None
        if error is not None:
            print(f"mmjax.checkpoint: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
