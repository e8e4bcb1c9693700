"""Which steps a checkpoint directory holds: a step exists when its manifest does, and only then.

    <dir>/<step>/...           the data
    <dir>/done/<step>.json     the manifest: metadata, size and CRC-32 of every file, a checksum of every leaf
    <dir>/damaged/<step>...    what was found damaged, data and manifest, out of the way and not deleted

The manifest is written last and removed first, so a process killed at any moment leaves whole steps and orphans. It
carries a CRC-32 of itself. A manifest that is there but damaged hides its step and keeps the data, which may be fine.

With several JAX processes, process 0 alone calls these functions (`mmjax.core.processes`).
"""

import contextlib
import itertools
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


class Damaged(InputError):
    """A step whose data or manifest is not what was written. What is wrong with it is `args[0]`, without the advice."""

    def __str__(self) -> str:
        return f"{self.args[0]}; restore another step"


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
      InputError: there is no such step, or it was saved by a newer mmjax.
      Damaged: its manifest is damaged, or its data is gone.
    """
    path = manifest_path(directory, step)
    try:
        data = path.read_bytes()
        content = json.loads(data)["content"]
        undamaged = data == _as_text(content).encode()
    except FileNotFoundError:
        have = ", ".join(map(str, listed_steps(directory))) or "none"
        raise InputError(f"there is no finished step {step} in {directory}; the steps there are: {have}") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        undamaged = False
    if not undamaged:
        raise Damaged(f"{path} is damaged")
    if content["format"] != FORMAT:
        raise InputError(f"{path} was written by a newer mmjax, in format {content['format']}; update mmjax")
    if content["step"] != step:
        raise Damaged(f"{path} is the manifest of step {content['step']}")
    if not (directory / str(step)).is_dir():
        raise Damaged(f"{directory / str(step)} is missing")
    return content


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Makes a step exist whose data is complete and durable; the manifest's "step" says which.

    Raises:
      InputError: the disk is full or the directory cannot be written.
    """
    write_atomic(manifest_path(directory, manifest["step"]), _as_text(manifest))


def _as_text(content: dict[str, Any]) -> str:
    crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    return json.dumps({"crc32": f"{crc:08x}", "content": content}, indent=1) + "\n"


def remove_step(directory: Path, step: int) -> None:
    """Deletes a step, whole or not. Data that cannot be deleted stays as an orphan, for `sweep`."""
    # The manifest first, and for good: a step that is half deleted must not exist.
    if manifest_path(directory, step).exists():
        manifest_path(directory, step).unlink()
        sync_directory(directory / "done")
    for path in (directory / str(step), *directory.glob(f"{step}{TEMPORARY}*")):
        shutil.rmtree(path, ignore_errors=True)


def surplus(steps: list[int], keep: int, every: int = 0) -> list[int]:
    """Which of the steps (ascending) retention deletes: all but the last `keep` and those that `every` divides."""
    return [step for step in steps[:-keep] if not (every and step % every == 0)]


def set_aside(directory: Path, step: int) -> Path:
    """Moves a damaged step to <dir>/damaged, so that its number can be saved again; returns where its data went.

    Whoever calls this holds the lock of <dir>/done.
    """
    aside = directory / "damaged"
    aside.mkdir(exist_ok=True)
    names = (f"{step}-{again}" if again else f"{step}" for again in itertools.count())
    name = next(n for n in names if not ((aside / n).exists() or (aside / f"{n}.json").exists()))
    # The data first: without a manifest it would be an orphan, which the next start deletes.
    with contextlib.suppress(FileNotFoundError):
        os.rename(directory / str(step), aside / name)
    os.rename(manifest_path(directory, step), aside / f"{name}.json")
    for changed in (aside, directory / "done", directory):
        sync_directory(changed)
    return aside / name


def sweep(directory: Path) -> None:
    """Deletes what an interrupted save or deletion has left; nothing while another process is saving here."""
    if (directory / "done").is_dir():  # or nothing was ever saved here, so nothing here is ours to delete
        # The lock is taken by whoever is saving, who has swept. A directory that cannot be written needs no sweeping.
        with contextlib.suppress(InputError, OSError), lock_directory(directory / "done"):
            remove_orphans(directory)


def remove_orphans(directory: Path) -> list[Path]:
    """Deletes the data that has no manifest, and temporary files; returns what it deleted.

    Whoever calls this holds the lock of <dir>/done, or it would delete a save in progress.
    """
    done = directory / "done"
    temporaries = sorted(done.glob(".*.tmp"))
    for temporary in temporaries:
        temporary.unlink()
    orphans = []
    for entry in sorted(directory.iterdir()):
        found = re.fullmatch(rf"(\d+)({re.escape(TEMPORARY)}.*)?", entry.name)
        if found and entry.is_dir() and (found[2] or not (done / f"{found[1]}.json").exists()):
            shutil.rmtree(entry, ignore_errors=True)
            orphans.append(entry)
    return temporaries + orphans


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
      Damaged: one differs; the sentence names leaf and step.
    """
    for name, saved in manifest["leaves"].items():
        if found[name] != saved:
            raise Damaged(
                f"{name!r} of step {manifest['step']} in {directory} is damaged: its checksum is {found[name]}, saved"
                f" was {saved}"
            )
