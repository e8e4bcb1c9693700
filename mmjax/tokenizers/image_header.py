"""What an image file says of itself: kind, size, orientation, and which of its bytes hold the picture.

Read here and not by Pillow, so that sizes can be refused before a decoder has seen them (Pillow's WebP decoder makes
room for the canvas first), and so that Pillow never meets the parts on which it warns or spends memory: EXIF,
colour profiles, text, animation control. Every complaint is an Unfit, whose text follows the name of the image.
"""

import io
import re
import struct
import zlib
from dataclasses import dataclass
from itertools import count

MAX_PARTS = 100_000  # segments, chunks or blocks; each costs about a microsecond here
MAX_SCANS = 100  # of a JPEG; a few bytes can order a walk over all pixels, and real files have about ten
MAX_TEXT = 8 * 2**20  # bytes that the compressed text and profiles of a PNG may take unpacked
MAX_EXIF = 2**16  # bytes looked at for the orientation; a JPEG segment holds no more

FRAME_SIZE = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG markers that carry the size
BARE = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a length
DROPPED = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # JPEG: all applications but JFIF and Adobe's colour transform; comments


class Unfit(ValueError):
    """Why an image cannot be used, and what to do: a sentence that lacks only its subject."""


@dataclass(frozen=True)
class Header:
    """Kind (JPEG, PNG, WEBP, GIF), sides in pixels as stored, EXIF orientation 1 to 8 (CIPA DC-008, tag 0x0112)."""

    kind: str
    height: int
    width: int
    orientation: int = 1
    depth: int = 8  # bits of a sample
    clear: tuple[int, ...] = ()  # the grey sample, or red, green and blue, that a PNG declares transparent
    keep: tuple[tuple[int, int | None], ...] = ((0, None),)  # from which byte to which the picture is kept
    weight: float = 8.0  # bytes per pixel that decoding takes at most, the picture in RGB included, the file not

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as seen: orientations 5 to 8 lie on their side."""
        return (self.width, self.height) if self.orientation > 4 else (self.height, self.width)


def scan(file: io.BufferedIOBase) -> Header:
    """The header of an image file, told by its content; pixel data is stepped over. Unfit if it is not whole."""
    start = file.read(12)
    if not start:
        raise Unfit("is empty; fetch the file again")
    for is_kind, reader in (
        (start.startswith(b"\xff\xd8\xff"), _jpeg),
        (start.startswith(b"\x89PNG\r\n\x1a\n"), _png),
        (start.startswith(b"RIFF") and start[8:] == b"WEBP", _webp),
        (start.startswith((b"GIF87a", b"GIF89a")), _gif),
    ):
        if is_kind:
            return reader(file)
    raise Unfit(f"is not a JPEG, PNG, WebP or GIF file (it begins with {start!r}); convert it to one of these")


def pixels_only(data: bytes, header: Header) -> bytes:
    """The file without what is not picture, for a decoder; Unfit for damage that Pillow would not see."""
    if header.kind == "GIF":  # a first frame that leaves the screen widens it
        return data[:6] + struct.pack("<HH", header.width, header.height) + data[10:]
    parts = [data[start:end] for start, end in header.keep]
    if header.kind == "PNG":
        for part in parts[1:]:
            if zlib.crc32(part[4:-4]) != int.from_bytes(part[-4:]):
                raise Unfit(f"is damaged (wrong checksum of a {part[4:8].decode()} chunk); fetch the file again")
    if header.kind == "JPEG" and parts[-1].count(b"\xff\xda") > MAX_SCANS:
        _count_scans(parts[-1])
    return b"".join(parts)


def _take(file: io.BufferedIOBase, length: int) -> bytes:
    taken = file.read(length)
    if len(taken) < length:
        raise Unfit("is cut short; fetch the file again")
    return taken


def _skip(file: io.BufferedIOBase, length: int) -> None:
    """Step over bytes that must be there."""
    if length > 0:
        file.seek(length - 1, io.SEEK_CUR)
        _take(file, 1)


def _too_many(number: int) -> None:
    if number > MAX_PARTS:
        raise Unfit(f"has more than {MAX_PARTS:,} parts; save it anew")


def _orientation(exif: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block; 1, upright, where it is absent or makes no sense."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if not order:
        return 1
    try:
        (at,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except (struct.error, KeyError):
        pass
    return 1


def _jpeg(file: io.BufferedIOBase) -> Header:
    """Markers up to the first scan (ITU-T T.81, annex B)."""
    height = width = None
    orientation, keep = None, [(0, 2)]
    progressive, frame = False, b""
    file.seek(2)
    for number in count():
        _too_many(number)
        at = file.tell()
        marker = _take(file, 2)
        if marker[0] != 0xFF or marker[1] in (0x00, 0xFF):  # filling, or junk that decoders step over
            junk = marker[1:] + file.read(2**16)
            found = re.search(rb"\xff[^\x00\xff]", junk)
            if not found:
                raise Unfit("is cut short or damaged; fetch the file again")
            file.seek(at + 1 + found.start())
            continue
        code = marker[1]
        if code == 0xDA:
            keep.append((at, None))
            many_scans = progressive or file.read(3)[2:] < bytes([len(frame)])
            break
        if code == 0xD9:
            raise Unfit("holds no picture; fetch the file again")
        if code in BARE:
            continue
        length = int.from_bytes(_take(file, 2)) - 2
        if length < 0:
            raise Unfit("is damaged; fetch the file again")
        end = file.tell() + length
        if code in FRAME_SIZE and height is None:
            _, height, width = struct.unpack(">BHH", _take(file, 5))
            progressive, frame = code & 3 == 2, file.read(length - 5)[1:][1::3]
        elif code == 0xE1 and orientation is None and (exif := file.read(length)).startswith(b"Exif\0\0"):
            orientation = _orientation(exif)
        if code not in DROPPED:
            keep.append((at, end))
        file.seek(end)
    if height is None or width is None:
        raise Unfit("does not tell its size; fetch the file again")
    return Header("JPEG", height, width, orientation or 1, keep=tuple(keep), weight=_coefficients(frame, many_scans))


def _coefficients(frame: bytes, many_scans: bool) -> float:
    """Bytes per pixel that a JPEG takes: 16 bits for every coefficient are kept where there is more than one scan.

    `frame` has, for every component, its horizontal and vertical samples in the two halves of a byte.
    """
    samples = [(byte >> 4) * (byte & 15) for byte in frame]
    kept = 2 * sum(samples) / max(1, *samples, 1) if many_scans else 0
    # As decoded, and as RGB; once more where it is turned.
    return max(8.0, 4 + kept)


def _count_scans(data: bytes) -> None:
    """Refuse a JPEG with more than MAX_SCANS scans; `data` begins with the first."""
    at = scans = 0
    marker = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither a stuffed byte nor a restart
    while (found := marker.search(data, at)) and data[found.end() - 1] != 0xD9:
        scans += data[found.end() - 1] == 0xDA
        if scans > MAX_SCANS:
            raise Unfit(f"is a JPEG of more than {MAX_SCANS} scans, which decode very slowly; save it anew")
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])


def _png(file: io.BufferedIOBase) -> Header:
    """All chunks up to the end, for the orientation may stand after the pixels (PNG, sections 5 and 11)."""
    file.seek(8)
    fields, orientation, clear, keep, text = None, 1, (), [(0, 8)], MAX_TEXT
    for number in count():
        _too_many(number)
        at = file.tell()
        length, kind = struct.unpack(">I4s", _take(file, 8))
        if fields is None:
            if kind != b"IHDR" or length != 13:
                raise Unfit("does not tell its size; fetch the file again")
            fields = struct.unpack(">IIBB", _take(file, 10))
        elif kind == b"eXIf":
            orientation = _orientation(file.read(min(length, MAX_EXIF)))
        elif kind in (b"zTXt", b"iTXt", b"iCCP"):
            text -= _unpacked(kind, _take(file, length), text)
        elif kind == b"tRNS" and fields[3] in (0, 2):  # grey or colour; otherwise alphas of a palette
            clear = struct.unpack(">H" if fields[3] == 0 else ">HHH", _take(file, 2 + 2 * fields[3]))
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            keep.append((at, at + 12 + length))
        file.seek(at + 8)
        _skip(file, length + 4)
        if kind == b"IEND":
            break
    width, height, depth, _ = fields
    return Header("PNG", height, width, orientation, depth, clear, tuple(keep))


def _unpacked(kind: bytes, body: bytes, most: int) -> int:
    """How many bytes the compressed text or profile in a chunk takes; Unfit if more than `most`."""
    _, _, packed = body.partition(b"\0")  # the keyword
    if kind != b"iTXt":
        packed = packed[1:]  # the method
    elif packed.startswith(b"\1"):
        packed = packed[2:].split(b"\0", 2)[-1]  # the method, the language, the translated keyword
    else:
        return 0  # plain text, already in memory
    try:
        size = len(zlib.decompressobj().decompress(packed, most + 1))
    except zlib.error:
        return 0  # not text, and dropped in any case
    if size > most:
        raise Unfit(f"holds text of more than {MAX_TEXT:,} bytes in compressed form; save it without its metadata")
    return size


def _webp(file: io.BufferedIOBase) -> Header:
    """The first chunk, and the others where that one announces EXIF (WebP container specification; RFC 6386, 9649)."""
    file.seek(4)
    length = int.from_bytes(_take(file, 4), "little")
    _skip(file, length)
    file.seek(12)
    kind, start = _take(file, 4), file.read(14)[4:].ljust(10, b"\0")
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(start[i : i + 3], "little") for i in (4, 7))
    elif kind == b"VP8 " and start[3:6] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", start[6:10]))
    elif kind == b"VP8L" and start[0] == 0x2F:
        bits = int.from_bytes(start[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        raise Unfit("does not tell its size; fetch the file again")
    orientation = 1
    if kind == b"VP8X" and start[0] & 0x08:
        at = 12
        for number in count():
            _too_many(number)
            if at >= 8 + length - 7:
                break
            file.seek(at)
            kind, size = struct.unpack("<4sI", _take(file, 8))
            if kind == b"EXIF":
                orientation = _orientation(file.read(min(size, MAX_EXIF)))
                break
            at += 8 + size + size % 2
    return Header("WEBP", height, width, orientation, weight=17.5)  # libwebp's animation decoder has three canvases


def _gif(file: io.BufferedIOBase) -> Header:
    """The screen and the first frame, which may be larger (GIF89a specification, sections 18 and 20)."""
    file.seek(6)
    width, height, flags = struct.unpack("<HHBxx", _take(file, 7))
    if flags & 0x80:
        _skip(file, 3 << (flags & 7) + 1)
    number = 0
    while (kind := _take(file, 1)) != b",":
        if kind == b";":
            raise Unfit("holds no picture; fetch the file again")
        if kind == b"!":
            _skip(file, 1)
            while block := _take(file, 1)[0]:
                _skip(file, block)
                _too_many(number := number + 1)
        _too_many(number := number + 1)
    left, top, across, down = struct.unpack("<HHHH", _take(file, 8))
    return Header("GIF", max(height, top + down), max(width, left + across))
