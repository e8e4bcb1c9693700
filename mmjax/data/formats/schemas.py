"""Which reader makes documents of which records."""

import logging
from collections.abc import Callable

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.data.formats import conversations, draft, interleaved, packed
from mmjax.data.formats.draft import Draft, Options
from mmjax.data.formats.record import Record

Schema = Callable[[Record, Options], Draft]

SCHEMAS: dict[str, Schema] = {
    "llava": conversations.llava,
    "messages": conversations.messages,
    "obelics": interleaved.obelics,
    "mmc4": interleaved.mmc4,
    "comm": interleaved.comm,
    "captions": interleaved.captions,
    "mmjax": packed.decode,
}
# The first that has all of these fields.
MARKS = {
    "llava": {"conversations"},
    "messages": {"messages"},
    "mmc4": {"text_list", "image_info"},
    "comm": {"step_info"},
    "obelics": {"texts", "images"},
    "mmjax": {"data"},
}

log = logging.getLogger("mmjax")


def find(name: str) -> Schema:
    """The reader of that name; InputError lists those that there are."""
    if name not in SCHEMAS:
        raise InputError(f"There is no schema {name!r}; give one of {', '.join(SCHEMAS)}.")
    return SCHEMAS[name]


def guess(record: Record) -> str:
    """The schema that a record's fields speak for; says so in the log."""
    fields = record.fields.keys()
    name = next((name for name, marks in MARKS.items() if marks <= fields), None)
    captioned = bool(fields & {"caption", "text"}) or "txt" in record.files
    pictured = bool(fields & {"image", "image_path", "file_name"}) or bool(draft.pictures_beside(record))
    if name is None and captioned and pictured:
        name = "captions"
    if name is None:
        told = ", ".join(sorted(map(str, [*record.fields, *record.files])))
        raise InputError(f"a record with {shown(told)} speaks for no schema; give one of {', '.join(SCHEMAS)}")
    log.info("%s: read as %s", record.place, name)
    return name
