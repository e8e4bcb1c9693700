"""What one process does alone to the steps of a directory: open, verify, export and prune them; and the command."""

import argparse
import fnmatch
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmjax.core import storage
from mmjax.core.checksum import checksums_numpy
from mmjax.core.errors import InputError
from mmjax.core.export import write_safetensors
from mmjax.core.files import PathLike, lock_directory
from mmjax.core.manifest import (
    Damaged,
    compare_leaves,
    damaged_files,
    finished_steps,
    listed_steps,
    newest_step,
    read_manifest,
    remove_orphans,
    remove_step,
    surplus,
)
from mmjax.core.tree import unflatten


def local_path(directory: PathLike) -> Path:
    """The absolute path of a directory.

    Raises:
      InputError: it is the address of a bucket.
    """
    if "://" in os.fspath(directory):
        raise InputError(f"{directory} is not a local path; mount the bucket and give the path of the mount")
    return Path(directory).absolute()


def open_nested(directory: PathLike, step: int | None = None) -> dict:
    """A step (the newest, if None) as a nested dict of NumPy arrays, with no model code, mesh or device.

    PRNG keys come as their key data. Checksums are compared.

    Raises:
      InputError: no such step, or its data is damaged.
    """
    directory = local_path(directory)
    manifest = read_manifest(directory, newest_step(directory) if step is None else step)
    loaded = storage.load(directory, manifest, dict.fromkeys(manifest["leaves"], np.ndarray), alone=True)
    compare_leaves(checksums_numpy(loaded), manifest, directory)
    return unflatten(loaded)


def verify(directory: PathLike, step: int) -> list[str]:
    """What is wrong with a step, a sentence each; nothing if it is whole.

    Compares the size and CRC-32 of every file, then, where those are right, the checksum of every leaf.
    """
    directory = local_path(directory)
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


def export(directory: PathLike, path: PathLike, step: int | None = None, *, only: Sequence[str] = ("*",)) -> int:
    """Writes leaves of a step (the newest, if None) as one safetensors file; returns the file's size in bytes.

    One leaf is in memory at a time. PRNG keys are written as their key data. Checksums are compared.

    Args:
      path: a file that does not exist yet; on an error it does not exist.
      only: patterns of names ("params/*", where "*" stands for any characters) of which one must match.

    Raises:
      InputError: no such step, its data is damaged, no name matches, or safetensors has no such dtype.
    """
    directory = local_path(directory)
    manifest = read_manifest(directory, newest_step(directory) if step is None else step)
    chosen = {n: text for n, text in manifest["leaves"].items() if any(fnmatch.fnmatchcase(n, p) for p in only)}
    if not chosen:
        some = ", ".join(sorted(manifest["leaves"])[:3])
        raise InputError(f"no leaf of step {manifest['step']} matches {' or '.join(only)}; there are {some}, …")

    def read(name: str) -> np.ndarray:
        loaded = storage.load(directory, manifest, {name: np.ndarray}, alone=True)
        compare_leaves(checksums_numpy(loaded), manifest | {"leaves": {name: chosen[name]}}, directory)
        return loaded[name]

    return write_safetensors(path, chosen, read, {"step": str(manifest["step"])})


def prune(directory: PathLike, *, keep: int | None = None, every: int = 0, damaged: bool = False) -> list[Path]:
    """Deletes steps as `Checkpoints` would, and what interrupted saves have left; returns what it deleted.

    Args:
      keep: how many of the newest steps stay; None for all, or, where `every` is given, for the newest.
      every: steps that are multiples of this stay too; 0 for none.
      damaged: whether steps that were set aside are deleted as well.

    Raises:
      InputError: `keep` or `every` is too small, nothing was ever saved here, or a process is saving here.
    """
    directory = local_path(directory)
    if every < 0 or (keep is not None and keep < 1):
        raise InputError(f"keep = {keep} or every = {every} is too small; keep at least 1, and give every = 0 for none")
    if not (directory / "done").is_dir():
        newest_step(directory)
    with lock_directory(directory / "done"):
        gone = remove_orphans(directory)
        if keep is not None or every:
            for step in surplus(finished_steps(directory), keep or 1, every):
                remove_step(directory, step)
                gone.append(directory / str(step))
        if damaged and (directory / "damaged").is_dir():
            gone += sorted((directory / "damaged").iterdir())
            shutil.rmtree(directory / "damaged")
    return gone


def main(arguments: list[str] | None = None) -> int:
    """`python -m mmjax.checkpoint`; returns the exit status: 1 for a damaged step, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m mmjax.checkpoint", description="Looks after saved checkpoints.")
    actions = parser.add_subparsers(dest="action", required=True)
    told = {
        "list": "the steps, their sizes and metadata",
        "verify": "reads everything and compares it with what was written",
        "export": "writes leaves of a step as one safetensors file",
        "prune": "deletes old steps, and what interrupted saves have left",
    }
    parsers = {action: actions.add_parser(action, help=text, description=text) for action, text in told.items()}
    for of in parsers.values():
        of.add_argument("directory", metavar="DIR")
    add = parsers["export"].add_argument
    add("file", metavar="FILE")
    add("--step", type=int, help="the newest, if not given")
    add("--only", action="append", metavar="PATTERN", help="leaves whose names match: 'params/*'; may be repeated")
    add = parsers["prune"].add_argument
    add("--keep", type=int, metavar="N", help="keep the newest N steps")
    add("--every", type=int, metavar="M", default=0, help="keep the multiples of M too, and the newest step")
    add("--damaged", action="store_true", help="delete the steps that were set aside as damaged")
    given = parser.parse_args(arguments)
    try:
        directory = local_path(given.directory)
        if given.action == "list":
            _list(directory)
        elif given.action == "verify":
            return _verify_all(directory)
        elif given.action == "export":
            size = export(directory, given.file, given.step, only=given.only or ("*",))
            print(f"{given.file}\t{size / 1e6:.1f} MB")
        else:
            for path in prune(directory, keep=given.keep, every=given.every, damaged=given.damaged):
                print(f"deleted {path}")
        return 0
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def _list(directory: Path) -> None:
    for step in listed_steps(directory) or [newest_step(directory)]:
        try:
            manifest = read_manifest(directory, step)
        except Damaged as error:
            print(f"{step}\tdamaged: {error.args[0]}")
            continue
        size = sum(file["size"] for file in manifest["files"])
        print(f"{step}\t{len(manifest['leaves'])} arrays\t{size / 1e6:.1f} MB", json.dumps(manifest["metadata"]))
    for path in sorted((directory / "damaged").glob("*.json")):
        print(f"{path.stem}\tset aside as damaged, in {path.parent}")


def _verify_all(directory: Path) -> int:
    damaged = False
    for step in listed_steps(directory) or [newest_step(directory)]:
        problems = verify(directory, step)
        damaged |= bool(problems)
        print("\n".join(f"step {step}: {problem}" for problem in problems or ["whole"]))
    return int(damaged)
