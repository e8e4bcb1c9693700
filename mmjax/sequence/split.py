"""Documents longer than a row: cut at the borders of their spans, never inside one."""

from collections.abc import Callable

from mmjax.core.errors import InputError
from mmjax.sequence.document import Document
from mmjax.sequence.layout import Layout, Size, described


def split(document: Document, layout: Callable[[Document], Layout], room: Size) -> list[Document]:
    """The document itself where it fits a row, else documents of consecutive spans that each do.

    Each part takes as many spans as fit and is laid out as a document of its own: its first turn begins with its role's
    marker, and nothing in it sees the parts before. Parts are named id#0, id#1, …

    Where one span more can make a document shorter (a budget that lowers all pictures of a document, words that become
    one token across a border), a part fits and would not with the next span, but may not be the longest that fits.

    Args:
      document: to split.
      layout: counts it. It is called a few times for each part, with about as many spans as the part will have.
      room: what a row holds (Bucket.row).

    Raises:
      InputError: a single span that is larger than a row.
    """
    spans = document.spans

    def fits(part: tuple) -> bool:
        return all(n <= most for n, most in zip(layout(Document(document.id, part)).size, room, strict=True))

    if fits(spans):
        return [document]
    parts: list[Document] = []
    start, length = 0, 1
    while start < len(spans):
        length = _most(lambda n, start=start: fits(spans[start : start + n]), len(spans) - start, length)
        if not length:
            what = described(layout(Document(document.id, spans[start : start + 1])).size)
            raise InputError(
                f"Document {document.id!r}, span {start} alone takes {what}, more than a row of {room}; raise the "
                f"row's sizes or lower the resolution."
            )
        parts.append(Document(f"{document.id}#{len(parts)}", spans[start : start + length]))
        start += length
    return parts


def _most(fits: Callable[[int], bool], most: int, guess: int) -> int:
    """The largest number up to `most` that fits, 0 if 1 does not: in steps that double from a guess, then by halves."""
    low, high = 0, most + 1  # what fits, and what does not
    probe, step = min(guess, most), 1
    while high - low > 1:
        low, high = (probe, high) if fits(probe) else (low, probe)
        if low and high <= most:
            probe = (low + high) // 2
        else:
            probe, step = min(low + step, most) if low else max(high - step, 1), 2 * step
    return low
