"""SentencePiece's model file, read and rewritten: the few fields that matter here, of sentencepiece_model.proto.

ModelProto      1: pieces, repeated   2: TrainerSpec   3: NormalizerSpec   4: self test   5: denormaliser
SentencePiece   1: piece, text   2: score, float32   3: type
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mmjax.core.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
PIECES, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5
TOP = {PIECES, TRAINER, NORMALIZER, 4, DENORMALIZER}


class Field(NamedTuple):
    number: int
    value: int | bytes  # bytes of a fixed-width number too
    raw: bytes  # with the number in front


class Piece(NamedTuple):
    text: str
    type: int
    raw: bytes  # the whole field of the ModelProto


class _Broken(Exception):
    pass


@dataclass(frozen=True)
class Model:
    """pieces: in the order of their ids; rest: the other fields as they are.

    prefix: a space is put in front of text. identity: text is otherwise left as it is. suffix: spaces stand at the end
    of pieces.
    """

    pieces: tuple[Piece, ...]
    rest: bytes
    prefix: bool
    identity: bool
    suffix: bool

    def written(self, renamed: Mapping[int, tuple[str, int]], prefix: bool) -> bytes:
        """The file with some pieces (id: text and type) changed, and with or without a space in front of text."""
        out = [_changed(piece, *renamed[i]) if i in renamed else piece.raw for i, piece in enumerate(self.pieces)]
        # A message that comes twice is one message: what is said last holds.
        return b"".join(out) + self.rest + bytes([NORMALIZER << 3 | BYTES, 2, 3 << 3 | VARINT, int(prefix)])


def read(data: bytes, name: str) -> Model:
    """The parts of a model file; InputError if it is no whole one."""
    try:
        top = list(_fields(data))
        messages = {field.number for field in top}
        if not {PIECES, TRAINER, NORMALIZER} <= messages <= TOP or any(isinstance(field.value, int) for field in top):
            raise _Broken
        pieces = tuple(_piece(field) for field in top if field.number == PIECES)
        trainer, normalizer, denormalizer = (_message(top, n) for n in (TRAINER, NORMALIZER, DENORMALIZER))
        # Both remove_extra_whitespaces (4) and escape_whitespaces (5) are on where they are not written.
        kept = normalizer.get(4, 1) == 0 and normalizer.get(5, 1) == 1
        return Model(
            pieces,
            b"".join(field.raw for field in top if field.number != PIECES),
            prefix=bool(normalizer.get(3, 1)),
            identity=kept and not normalizer.get(2) and not denormalizer.get(2),
            suffix=bool(trainer.get(24, 0)),
        )
    except (_Broken, UnicodeDecodeError) as error:
        raise broken(data, name) from error


def broken(data: bytes, name: str) -> InputError:
    return InputError(
        f"{name} is not a whole SentencePiece model ({len(data):,} bytes); copy it again, or train it again"
    )


def _message(top: list[Field], number: int) -> dict[int, int | bytes]:
    out = {}
    for field in top:
        if field.number == number:
            out.update((inner.number, inner.value) for inner in _fields(field.value))
    return out


def _piece(field: Field) -> Piece:
    text, kind = "", NORMAL
    for inner in _fields(field.value):
        if inner.number == 1 and isinstance(inner.value, bytes):
            text = inner.value.decode()
        elif inner.number == 3 and isinstance(inner.value, int):
            kind = inner.value
        elif inner.number in (1, 3):
            raise _Broken
    return Piece(text, kind, field.raw)


def _changed(piece: Piece, text: str, kind: int) -> bytes:
    (whole,) = _fields(piece.raw)
    kept = b"".join(inner.raw for inner in _fields(whole.value) if inner.number not in (1, 3))
    data = text.encode()
    inner = b"\x0a" + _varint(len(data)) + data + kept + bytes([3 << 3 | VARINT, kind])
    return b"\x0a" + _varint(len(inner)) + inner


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(data: bytes) -> Iterator[Field]:
    """Every field of a message; _Broken where the bytes are not one."""
    place, end = 0, len(data)
    while place < end:
        begin = place
        tag, place = _number(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, place = _number(data, place)
        else:
            if wire == BYTES:
                size, place = _number(data, place)
            else:
                size = {FIXED64: 8, FIXED32: 4}.get(wire, end + 1)
            if size > end - place or not number:
                raise _Broken
            value = data[place : place + size]
            place += size
        yield Field(number, value, data[begin:place])


def _number(data: bytes, place: int) -> tuple[int, int]:
    out = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise _Broken
        byte = data[place]
        place += 1
        out |= (byte & 127) << shift
        if byte < 128:
            return out, place
    raise _Broken
