"""A dataset on disk as a list of documents: any kind of file, read record by record, with nothing decoded."""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np

from mmjax.core.errors import InputError
from mmjax.data.formats import draft, index, paths, schemas, shards
from mmjax.data.formats.array_records import Records
from mmjax.data.formats.draft import Options
from mmjax.data.formats.index import Index
from mmjax.data.formats.json_files import Lines, List
from mmjax.data.formats.record import LIMITS, Address, Bad, Container, Limits
from mmjax.data.formats.shards import Found
from mmjax.data.formats.tables import Parquet
from mmjax.data.formats.tar_files import Tar
from mmjax.sequence.document import Document

CONTAINERS = {"json": List, "jsonl": Lines, "parquet": Parquet, "tar": Tar, "array_record": Records}

log = logging.getLogger("mmjax")


class Dataset(Sequence):
    """The documents of a dataset, by number; read from any thread, and pickled as where to read.

    schema: how records are read. entries: what is known of all of them. left_out: what could not be read, with reasons.
    name: what ids begin with, "name/id of the record" or "name/number of the record". Of records with one id all but
    the first get "#number" behind it. Records of mmjax's own keep their ids.
    """

    def __init__(self, name: str, container: Container, options: Options, made: Index):
        self.name, self.container, self.options, self.entries = name, container, options, made
        self.schema, self.left_out = made.schema, list(made.left_out)

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, n: int) -> Document: ...
    @overload
    def __getitem__(self, n: slice) -> list[Document]: ...
    def __getitem__(self, n):
        """Document n; InputError if its record has changed since it was indexed."""
        if isinstance(n, slice):
            return [self[i] for i in range(*n.indices(len(self)))]
        if not -len(self) <= n < len(self):
            raise IndexError(f"document {n} of {len(self)}")
        n %= len(self)
        address = self.address(n)
        try:
            made = index.read(self.container.read(address), self.schema, self.options)
            sizes = self.sizes(n)
            if index.crc(made) != self.entries.crc[n] or len(made.pictures) != len(sizes):
                raise InputError("the record is not the one that was indexed; make the index again")
            number = int(self.entries.number[n])
            base = index.base_id(made, self.name, number)
            return draft.finish(made, index.unique_id(base, number, int(self.entries.repeat[n])), sizes)
        except InputError as error:
            raise InputError(f"{self.container.place(address)}: {error}") from error

    def address(self, n: int) -> Address:
        """Where document n lies, as its container counts."""
        shard, start, length = map(int, self.entries.address[n])
        if shard >= len(self.container.shards):
            raise InputError(f"{self.name}: there is no shard {shard}; make the index again")
        return shard, start, length

    def place(self, n: int) -> str:
        """Where document n lies, for messages: file, and byte, row or record in it."""
        return self.container.place(self.address(n))

    def sizes(self, n: int) -> list[tuple[int, int]]:
        """Height and width of all pictures of document n's record, (0, 0) for one that is left out."""
        return [(int(h), int(w)) for h, w in self.entries.sizes[self.entries.first[n] : self.entries.first[n + 1]]]

    @property
    def fingerprint(self) -> str:
        """The same for the same documents in the same files, on every machine.

        Of files names and sizes; of documents all that is said, what is learnt of it, and what is declared of media; of
        pictures sizes, and of their files the length and the first bytes (image.START). So two datasets of one
        fingerprint may still differ in the pixels that follow, and in videos' and sounds'. A picture that is exchanged
        in its place after the index was made, for one of its size, is not noticed: the index is read, not the picture.
        """
        out = hashlib.sha256(f"{self.name} {self.schema} ".encode())
        for shard in self.container.shards:
            out.update(f"{shard.name} {shard.size} ".encode(errors="surrogateescape"))
        for name in ("address", "crc", "first", "sizes", "marks"):
            out.update(np.ascontiguousarray(getattr(self.entries, name)).tobytes())
        return out.hexdigest()[:32]


def open_dataset(
    path: str | os.PathLike,
    *,
    schema: str | None = None,
    root: str | os.PathLike | None = None,
    errors: int = 0,
    place: draft.Place = "as_written",
    missing: draft.Lost = "refuse",
    images: Mapping[str, str] | None = None,
    limits: Limits = LIMITS,
    cache: str | os.PathLike | Literal[False] | None = None,
) -> Dataset:
    """Opens a dataset: from its index if that is up to date, and otherwise after reading all of it once.

    Args:
      path: a file (.json, .jsonl, .parquet, .tar, .array_record), a folder of such files of one kind, or a pattern with
        `*`.
      schema: one of schemas.SCHEMAS; None: what the first record speaks for, which is said in the log.
      root: the folder that pictures given by path lie in; None: where the dataset's files are. Nothing outside is read.
      errors: how many places may be left out. A place is a record that cannot be read, or a damaged part of a file,
        whatever it held: a Parquet file's row group is one, and so is a file whose list of contents is lost.
      place: where LLaVA's pictures go, see conversations.llava.
      missing: what becomes of an interleaved document whose picture is not there, see interleaved.
      images: the path, relative to root, of pictures that records give by address.
      limits: what a record may take up.
      cache: the index's file; None: `<name>.mmjax-index` beside the dataset; False: the index is not kept.

    Raises:
      InputError: more places than `errors` cannot be read, with the first such place; there is no such dataset.
    """
    if schema is not None:
        schemas.find(schema)
    if place not in ("as_written", "front", "bare") or missing not in ("refuse", "skip_image") or errors < 0:
        raise InputError(
            f"place={place!r}, missing={missing!r}, errors={errors}: one of these cannot be; see the help."
        )
    folder = None if root is None else Path(os.path.realpath(root))
    if folder is not None and not folder.is_dir():
        raise InputError(f"root {folder} is not a folder; give the one that pictures' paths are relative to.")
    found = shards.find(path, folder)
    options = Options(folder or found.folder, place, missing, dict(images or {}), limits)
    container = CONTAINERS[found.kind](found.shards, limits)
    kept = None if cache is False else Path(cache) if cache else found.index
    made = _indexed(found, container, options, schema, errors, kept)
    index.refuse(made.left_out, errors)
    name, absent = shards.told(found.name), int((made.sizes[:, 0] == 0).sum())
    if made.left_out:
        log.warning("%s: %d places are left out, the first: %s", name, len(made.left_out), made.left_out[0])
    if absent:
        log.warning("%s: %d of %d pictures are not there and are left out", name, absent, len(made.sizes))
    return Dataset(found.name, container, options, made)


def _indexed(
    found: Found, container: Container, options: Options, schema: str | None, errors: int, kept: Path | None
) -> Index:
    """The index from its file, or made now and written there."""
    key = index.key(container, options, found.folder, found.name)
    if kept and os.path.lexists(kept):
        made = _load(kept, key, found)
        if isinstance(made, Index) and schema in (None, made.schema):
            return made
        reason = made if isinstance(made, str) else f"was made with the schema {made.schema}"
        log.warning("%s %s; it is made again", kept, reason)
    made = index.make(container, schema, options, found.name, errors)
    if kept:
        try:
            index.write(kept, made, key)
        except (InputError, OSError) as error:  # a folder that may not be written to: the next time it is made again
            log.warning("the index is not kept: %s", error)
    return made


def _load(path: Path, key: str, found: Found) -> Index | str:
    with open(paths.open_regular(Path(os.path.realpath(path))), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(index.MAGIC)) != index.MAGIC:
            return "is not an index"
        if size > index.most_bytes(sum(shard.size for shard in found.shards)):
            return f"has {size:,} bytes, more than an index of these files takes"
        file.seek(0)
        return index.load(file.read(size), key, str(path))


__all__ = ["Bad", "Dataset", "open_dataset"]
