"""Which steps a checkpoint directory holds: a step exists when its manifest does, and only then.

    <dir>/<step>/...           the data
    <dir>/done/<step>.json     the manifest: metadata, size and CRC-32 of every file, a checksum of every leaf

The manifest is written last and removed first, so a process killed at any moment leaves whole steps and orphans. It
carries a CRC-32 of itself. A manifest that is there but damaged hides its step and keeps the data, which may be fine.
"""

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mmjax.core.checksum import describe, is_key
from mmjax.core.errors import InputError
from mmjax.core.files import lock_directory, sync_directory, write_atomic

FORMAT = 1
TEMPORARY = ".orbax-checkpoint-tmp"  # what Orbax appends to the step while it writes


def manifest_path(directory: Path, step: int) -> Path:
    """Where the manifest of a step is."""
    return directory / "done" / f"{step}.json"


def listed_steps(directory: Path) -> list[int]:
    """The steps that have a manifest, whole or damaged, ascending."""
    return sorted(int(path.stem) for path in (directory / "done").glob("[0-9]*.json") if path.stem.isdecimal())


def finished_steps(directory: Path) -> list[int]:
    """The steps that exist, ascending: their manifest is whole and their data is there."""
    found = []
    for step in listed_steps(directory):
        with contextlib.suppress(InputError):
            found.append(read_manifest(directory, step)["step"])
    return found


def newest_step(directory: Path) -> int:
    """The last of the steps that exist.

    Raises:
      InputError: there is none.
    """
    steps = finished_steps(directory)
    if not steps:
        raise InputError(f"there is no finished checkpoint in {directory}; give the directory of a run that saved one")
    return steps[-1]


def read_manifest(directory: Path, step: int) -> dict[str, Any]:
    """The manifest of a step that exists.

    Raises:
      InputError: there is no such step, or its manifest is damaged or of another version.
    """
    path = manifest_path(directory, step)
    if not (path.exists() and (directory / str(step)).is_dir()):
        have = ", ".join(map(str, listed_steps(directory))) or "none"
        raise InputError(f"there is no finished step {step} in {directory}; the steps there are: {have}")
    try:
        whole = json.loads(path.read_bytes())
        content = whole["content"]
        undamaged = whole["crc32"] == _crc_of(content)
    except (ValueError, TypeError, KeyError):
        undamaged = False
    if not undamaged:
        raise InputError(f"{path} is damaged; put a copy of it back, or use another step")
    if content["format"] != FORMAT or content["step"] != step:
        raise InputError(f"{path} is of another step, or of a newer mmjax; use another step, or update mmjax")
    return content


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Makes a step exist whose data is complete and durable; the manifest's "step" says which.

    Raises:
      InputError: the disk is full or the directory cannot be written.
    """
    text = json.dumps({"crc32": _crc_of(manifest), "content": manifest}, indent=1)
    write_atomic(manifest_path(directory, manifest["step"]), text + "\n")


def _crc_of(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def remove_step(directory: Path, step: int) -> None:
    """Deletes a step, whole or not. Data that cannot be deleted stays as an orphan, for `sweep`."""
    # The manifest first, and for good: a step that is half deleted must not exist.
    if manifest_path(directory, step).exists():
        manifest_path(directory, step).unlink()
        sync_directory(directory / "done")
    for path in (directory / str(step), *directory.glob(f"{step}{TEMPORARY}*")):
        shutil.rmtree(path, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Deletes what an interrupted save or deletion has left; nothing while another process is saving here."""
    done = directory / "done"
    if not done.is_dir():  # nothing was ever saved here, so nothing here is ours to delete
        return
    # The lock is taken by whoever is saving, who has swept. A directory that cannot be written needs no sweeping.
    with contextlib.suppress(InputError, OSError), lock_directory(done):
        for temporary in done.glob(".*.tmp"):
            temporary.unlink()
        for entry in directory.iterdir():
            found = re.fullmatch(rf"(\d+)({re.escape(TEMPORARY)}.*)?", entry.name)
            if found and entry.is_dir() and (found[2] or not (done / f"{found[1]}.json").exists()):
                shutil.rmtree(entry, ignore_errors=True)


def list_files(directory: Path) -> list[dict[str, Any]]:
    """Every file below a directory as {"path", "size", "crc32"}, sorted; all of them are durable on return."""
    found = []
    for root, folders, names in os.walk(directory):
        folders.sort()
        for name in names:
            path = Path(root) / name
            found.append({"path": str(path.relative_to(directory)), **_measure(path, sync=True)})
        sync_directory(root)
    return sorted(found, key=lambda file: file["path"])


def damaged_files(directory: Path, files: list[dict[str, Any]]) -> list[str]:
    """A sentence for every listed file that is missing, of another size, or of another content."""
    problems = []
    for file in files:
        path = directory / file["path"]
        try:
            size = path.stat().st_size
            if size != file["size"]:
                problems.append(f"{path} has {size} bytes where {file['size']} were written")
            elif _measure(path, sync=False)["crc32"] != file["crc32"]:
                problems.append(f"{path} has changed since it was written: its CRC-32 is another one")
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
    return problems


def _measure(path: Path, *, sync: bool) -> dict[str, Any]:
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            crc = zlib.crc32(block, crc)
        if sync:
            os.fsync(file.fileno())
    return {"size": size, "crc32": f"{crc:08x}"}


def match_leaves(wanted: Mapping[str, Any], manifest: dict[str, Any], directory: Path) -> None:
    """Checks that a step has exactly these leaves, each of the same shape and dtype, before anything is loaded.

    Orbax would cast to another dtype without a word.

    Raises:
      InputError: it has not; the sentence names the leaf.
    """
    where = f"step {manifest['step']} in {directory}"
    saved = manifest["leaves"]
    for name in sorted(wanted.keys() ^ saved.keys()):
        if name in saved:
            raise InputError(f"{where} holds {name!r}, which the tree to restore has not; use the configuration it had")
        raise InputError(f"{where} has no {name!r}, which the tree to restore has; use the configuration it had")
    for name, leaf in wanted.items():
        has, wants = saved[name].split(":")[0], describe(leaf)
        impl = manifest["keys"].get(name)
        if is_key(leaf) != (impl is not None):
            has, wants = ("a PRNG key" if impl else has), ("a PRNG key" if is_key(leaf) else wants)
        elif impl and jax.eval_shape(lambda i=impl: jax.random.key(0, impl=i)).dtype != leaf.dtype:
            has, wants = f"a {impl} key", str(leaf.dtype)
        if has != wants:
            raise InputError(f"{name!r} is {has} in {where} and {wants} in the tree to restore; make them the same")


def compare_leaves(found: Mapping[str, str], manifest: dict[str, Any], directory: Path) -> None:
    """Compares the checksums of loaded leaves with those that were saved.

    Raises:
      InputError: one differs; the sentence names leaf and step.
    """
    for name, saved in manifest["leaves"].items():
        if found[name] != saved:
            raise InputError(
                f"{name!r} of step {manifest['step']} in {directory} is damaged: its checksum is {found[name]}, saved"
                f" was {saved}; restore another step"
            )
