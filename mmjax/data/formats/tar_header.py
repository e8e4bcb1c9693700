"""The headers of a tar archive (POSIX ustar and pax, GNU long names), read without extracting or seeking anything."""

import re
from dataclasses import dataclass

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown

BLOCK = 512
MOST_NAME = 2**16  # bytes of a long name or of pax records
KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


@dataclass(frozen=True)
class Member:
    """One entry. kind: its type flag. data, size: where its bytes are. next: where the next header is.

    wrong: why it must not be used, if so.
    """

    name: str
    kind: bytes
    start: int
    data: int
    size: int
    next: int
    wrong: str = ""


class Broken(InputError):
    """No header is here: what follows can be found only by searching."""


def is_header(block: bytes) -> bool:
    """Whether a block's own checksum says that it is a header."""
    if len(block) != BLOCK or not block.strip(b"\0"):
        return False
    told = block[148:156].strip(b" \0")
    return bool(re.fullmatch(rb"[0-7]+", told)) and int(told, 8) == sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")


def member(read, start: int, end: int) -> Member | None:
    """The entry whose first header is at `start`, with the long name that may stand before it; None: an empty block.

    Args:
      read: (offset, length) → bytes.
      end: of the archive.

    Raises:
      Broken: there is no header, or it speaks of more bytes than there are.
    """
    at, long, extra = start, None, {}
    while True:
        block = read(at, BLOCK) if at + BLOCK <= end else b""
        if at == start and block == bytes(BLOCK):
            return None
        if not is_header(block):
            raise Broken("there is no sound tar header here; the archive is cut off or damaged, fetch it again")
        kind, size = block[156:157], extra.get("size", _number(block[124:136]))
        data = at + BLOCK
        after = data + -(-size // BLOCK) * BLOCK
        if size < 0 or after > end:
            raise Broken(
                f"a file of {size:,} bytes is announced, but the archive has {end - data:,} more; fetch it again"
            )
        if kind not in (b"L", b"x", b"g", b"K"):
            name = extra.get("path", long if long is not None else _name(block))
            wrong = _wrong(name, kind) or extra.get("wrong", "")
            return Member(name, kind, start, data, size, after, wrong)
        if size > MOST_NAME:
            raise Broken(
                f"a name of {size:,} bytes is announced, over the limit of {MOST_NAME:,}; make the archive anew"
            )
        body = read(data, size)
        if kind == b"L":
            long = body.rstrip(b"\0").decode(errors="replace")
        elif kind == b"x":
            extra = _pax(body)
        at = after


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: base 256
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    text = field.strip(b" \0")
    return int(text, 8) if re.fullmatch(rb"[0-7]+", text) else -1 if text else 0


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _pax(body: bytes) -> dict:
    out: dict = {}
    while body:
        length, space, _ = body.partition(b" ")
        if not space or not re.fullmatch(rb"[0-9]{1,5}", length) or not len(length) + 3 <= int(length) <= len(body):
            raise Broken("the archive's extended header is damaged; fetch it again")
        key, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        body = body[int(length) :]
        if key == b"path":
            out["path"] = value.decode(errors="replace")
        elif key == b"size":
            out["size"] = int(value) if re.fullmatch(rb"[0-9]{1,18}", value) else -1
        elif key.startswith(b"GNU.sparse"):
            out["wrong"] = "is a sparse file; write it as a plain one"
    return out


def _wrong(name: str, kind: bytes) -> str:
    if kind in KINDS or kind not in b"0\0007" + b"5":
        return f"is {KINDS.get(kind, f'of type {kind!r}')} and not a plain file; take it out of the archive"
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name or re.match(r"[A-Za-z]:", name):
        return f"has a name that leads elsewhere, {shown(name)}; take it out of the archive"
    return ""
