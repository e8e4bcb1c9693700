"""Documents longer than a row: cut at the borders of their spans, never inside one."""

from collections.abc import Callable

from mmjax.core.errors import InputError
from mmjax.sequence.document import Document
from mmjax.sequence.layout import DIMENSIONS, Layout, Size


def split(document: Document, layout: Callable[[Document], Layout], room: Size) -> list[Document]:
    """The document itself where it fits a row, else documents of consecutive spans that each do.

    Each part takes as many spans as fit and is laid out as a document of its own: its first turn begins with its role's
    marker, and nothing in it sees the parts before. Parts are named id#0, id#1, …

    Args:
      document: to split.
      layout: counts it.
      room: what a row holds (Bucket.row).

    Raises:
      InputError: a single span that is larger than a row.
    """

    def too_large(part: Document) -> bool:
        return any(n > most for n, most in zip(layout(part).size, room, strict=True))

    if not too_large(document):
        return [document]
    parts, start = [], 0
    spans = document.spans
    while start < len(spans):
        stop = start + 1
        while stop < len(spans) and not too_large(Document(document.id, spans[start : stop + 1])):
            stop += 1
        part = Document(f"{document.id}#{len(parts)}", spans[start:stop])
        if stop == start + 1 and too_large(part):
            what = ", ".join(f"{n} {name}" for n, name in zip(layout(part).size, DIMENSIONS, strict=True))
            raise InputError(
                f"Document {document.id!r}, span {start} alone takes {what}, more than a row of {room}; raise the "
                f"row's sizes or lower the resolution."
            )
        parts.append(part)
        start = stop
    return parts
