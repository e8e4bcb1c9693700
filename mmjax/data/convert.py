"""Any documents to ArrayRecord files of mmjax's own records: random access at any order, media and all in one place."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmjax.core.errors import InputError
from mmjax.core.files import disk_errors, sync_directory
from mmjax.data.formats import packed
from mmjax.sequence.document import Document

# Each record on its own, so that one damaged record is one lost document.
OPTIONS = "group_size:1,zstd:1"
SUFFIX = ".array_record"


def write(documents: Sequence[Document], out: str | os.PathLike, *, shard_bytes: int | None = None) -> list[Path]:
    """Writes documents, in order, and gives the files. What is read back is equal to the documents, ids and all.

    `out` appears when everything is written and on the disk, and never a part of it.

    Args:
      out: a new file that ends in .array_record; with shard_bytes, a new folder of such files.
      shard_bytes: of a file at least, before compression; the document that goes over it is the file's last.

    Raises:
      InputError: `out` exists or has another suffix, a medium cannot be read, or the disk is full.
    """
    out = Path(out).absolute()
    if out.suffix != SUFFIX or os.path.lexists(out):
        raise InputError(f"{out} exists, or does not end in {SUFFIX}; give a new name that does")
    if shard_bytes is not None and shard_bytes < 1:
        raise InputError(f"shard_bytes is {shard_bytes}; give 1 or more")
    if not len(documents):
        raise InputError("there are no documents to write; give some")
    files: list[Path] = []
    with disk_errors("write", out), _whole(out, folder=shard_bytes is not None) as temporary:
        done = 0
        while done < len(documents):
            name = "" if shard_bytes is None else f"{len(files):05d}{SUFFIX}"
            done = _shard(documents, done, temporary / name, shard_bytes)
            files.append(out / name)
    return files


@contextlib.contextmanager
def _whole(out: Path, *, folder: bool) -> Iterator[Path]:
    """A temporary name beside `out` that takes its name at the end, or is gone if the block is left by an error."""
    temporary = out.with_name(f".{out.stem}.{secrets.token_hex(4)}.tmp")
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        if folder:
            sync_directory(temporary)
        # Not over one that someone else has made since: a folder is then refused by the rename itself.
        if os.path.lexists(out):
            raise InputError(f"{out} was made by someone else meanwhile; give another name")
        os.rename(temporary, out)
        sync_directory(out.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _shard(documents: Sequence[Document], start: int, path: Path, least: int | None) -> int:
    """Writes documents from `start` on, until there are `least` bytes; gives the number of the next."""
    from array_record.python.array_record_module import ArrayRecordWriter  # comes with grain

    size = 0
    writer = ArrayRecordWriter(str(path), OPTIONS)
    with contextlib.ExitStack() as stack:
        # The library raises RuntimeError with the operating system's own words in it, some of them only at the end.
        stack.callback(writer.close)
        for n in range(start, len(documents)):
            record = packed.encode(documents[n])
            writer.write(record)
            size += len(record)
            if least is not None and size >= least:
                break
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return n + 1
