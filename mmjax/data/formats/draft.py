"""Between a record and a document: the spans are known, the pictures are not looked at yet."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.data.formats import paths
from mmjax.data.formats.record import LIMITS, Limits, Record
from mmjax.sequence.document import Document, Encoded, Image, Role, Span, Text
from mmjax.tokenizers import image as images

Place = Literal["as_written", "front", "bare"]
Lost = Literal["refuse", "skip_image"]


@dataclass(frozen=True)
class Options:
    """How records are read.

    root: the folder that all pictures named by path lie in. place: see `conversations.llava`. missing: what becomes of
    an interleaved document's pictures that are not there (see `interleaved`). images: the path of every picture that
    is known by an address only.
    """

    root: Path
    place: Place = "as_written"
    missing: Lost = "refuse"
    images: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = LIMITS


@dataclass(frozen=True)
class Picture:
    """An Image to be. source: None if there is none.

    optional: may be left out of the document if it is not there. size: what it is declared to be, to be checked.
    """

    source: bytes | Path | Encoded | None
    role: Role = "user"
    turn: bool = False
    optional: bool = False
    size: tuple[int, int] | None = None
    name: str = ""


@dataclass(frozen=True)
class Draft:
    """A document to be. id: the record's own. join: what is put between texts that meet; None: they stay apart.

    whole: the id is the document's own already, with no dataset's name before it.
    """

    id: str | None
    spans: tuple[Span | Picture, ...]
    join: str | None = None
    whole: bool = False

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(span for span in self.spans if isinstance(span, Picture))


class Seen(NamedTuple):
    """What a picture's file says before it is decoded: height and width, and a mark of its content (image.Found)."""

    size: tuple[int, int]
    mark: int


ABSENT = Seen((0, 0), 0)


def look(picture: Picture, limits: Limits) -> Seen:
    """Reads the header; ABSENT for a picture that is to be left out.

    Raises:
      InputError: the picture is not there and may not be left out, or is not sound as far as a header shows.
    """
    source = picture.source
    try:
        if source is None:
            raise paths.Missing(f"the picture {shown(picture.name)} is not here, and nothing is fetched")
        if isinstance(source, Path):
            paths.require_regular(source)
    except paths.Missing as error:
        if picture.optional:
            return ABSENT
        raise InputError(f"{error}; allow it with missing='skip_image'" if source is None else str(error)) from None
    found = images.find(source.read() if isinstance(source, Encoded) else source, limits.picture)
    if picture.size and found.size != picture.size:
        raise InputError(f"a picture is declared as {picture.size} but is {found.size}; make the file again")
    return Seen(found.size, found.mark)


def finish(draft: Draft, id: str, sizes: Iterable[tuple[int, int]]) -> Document:
    """The document, given its pictures' sizes in order; those of size (0, 0) are left out.

    Raises:
      InputError: nothing is left.
    """
    spans: list[Span] = []
    left = iter(sizes)
    for span in draft.spans:
        if isinstance(span, Picture):
            height, width = next(left)
            if height:
                spans.append(Image(height, width, span.source, span.role, span.turn))
        elif draft.join is not None and isinstance(span, Text) and spans and isinstance(spans[-1], Text):
            spans[-1] = Text(spans[-1].text + draft.join + span.text, span.role, span.train)
        else:
            spans.append(span)
    return Document(id, tuple(spans))


def check(draft: Draft, limits: Limits) -> Draft:
    """The draft itself, if it is a document's. InputError otherwise."""
    if not draft.spans:
        raise InputError("the record says nothing and shows nothing; take it out")
    if len(draft.pictures) > limits.images:
        raise InputError(
            f"the record has {len(draft.pictures):,} pictures, over the limit of {limits.images:,}; split it"
        )
    return draft


def picture(given: Any, keys: tuple[str | int, ...], record: Record, options: Options, role: Role = "user") -> Picture:
    """What a record gives as a picture: a path, a data: URL, bytes, or Hugging Face's {"bytes": …, "path": …}.

    Args:
      given: found in the record's fields by `keys`.

    Raises:
      InputError: it is none of these, or the path leads out of the root.
    """
    if isinstance(given, dict) and given.keys() & {"bytes", "path"}:
        if given.get("bytes") is not None:
            return picture(given["bytes"], (*keys, "bytes"), record, options, role)
        given = given.get("path")
    if isinstance(given, bytes):
        return Picture(record.later(*keys), role, name="of bytes")
    if not isinstance(given, str):
        raise InputError(
            f"{'.'.join(map(str, keys))} is {shown(given)}, not a picture; give a relative path or its bytes"
        )
    if given[:5].lower() == "data:":
        return Picture(record.later(*keys), role, name="in a data: URL")
    return Picture(paths.inside(options.root, options.images.get(given, given)), role, name=given)


PICTURES = re.compile(r"(^|\.)(jpe?g|png|webp|gif)$")
# Media that are not read: to pass them over would leave a document that speaks of what it does not show.
OTHERS = re.compile(
    r"(^|\.)(bmp|tiff?|heic|heif|avif|jp2|jxl|svg|ico|ppm|pgm|pbm|pnm|tga|psd|eps|pdf|exr|hdr|dcm"
    r"|mp4|m4v|mov|avi|mkv|webm|mpe?g|wmv|flv|ogv|3gp|wav|mp3|flac|ogg|oga|opus|m4a|aac|wma|aiff?)$"
)


def pictures_beside(record: Record, role: Role = "user") -> list[Picture]:
    """The pictures among a tar record's files, by name, numbers in it counted: "2.jpg" comes before "10.jpg".

    Raises:
      InputError: there are other media among them.
    """
    others = [name for name in record.files if OTHERS.search(name)]
    if others:
        raise InputError(
            f"the file {shown(others[0])} of the record is no JPEG, PNG, WebP or GIF, and no other media are read from "
            f"archives; convert it, or leave the record out"
        )
    named = [name for name in record.files if PICTURES.search(name)]
    named.sort(
        key=lambda name: [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
    )
    return [Picture(record.files[name], role, name=name) for name in named]


def text_of(given: Any, what: str) -> str:
    """A text; InputError if it is something else."""
    if not isinstance(given, str):
        raise InputError(f"{what} is {shown(given)} and not text; have the record repaired, or leave it out")
    return given


def list_of(given: Any, what: str) -> list:
    """A list; InputError if it is something else."""
    if not isinstance(given, list):
        raise InputError(f"{what} is {shown(given)} and not a list; have the record repaired, or leave it out")
    return given


def dict_of(given: Any, what: str) -> dict:
    """An object; InputError if it is something else."""
    if not isinstance(given, dict):
        raise InputError(f"{what} is {shown(given)} and not an object; have the record repaired, or leave it out")
    return given


def own_id(fields: Mapping[str, Any], *names: str) -> str | None:
    """The record's own id: the first of these fields that it has."""
    for name in names:
        if isinstance(fields.get(name), str | int) and not isinstance(fields[name], bool):
            given = str(fields[name])
            if len(given) > 1024:
                raise InputError(f"the {name} {shown(given)} has {len(given):,} characters, over the limit of 1,024")
            return given
    return None
