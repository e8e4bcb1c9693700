"""SentencePiece models, unigram and BPE, with or without a normaliser."""

import secrets

import sentencepiece

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.tokenizers import proto
from mmjax.tokenizers.base import BYTE_NAMES, MOST, SPACE, Prefix, Spans, Tokenizer, joined


class Text(Tokenizer):
    """A SentencePiece model."""

    longest = 100_000_000

    def __init__(
        self,
        model: bytes,
        name: str = "the tokenizer model",
        prefix: Prefix | None = None,
        named: dict[str, int] | None = None,
    ):
        """model: the file's bytes. named: symbols that are controls besides the file's own, with their ids.

        InputError for bytes that are no model, and for a prefix where spaces stand at the end of pieces.
        """
        if not model:  # SentencePiece takes no bytes at all for a model of no tokens
            raise InputError(f"{name} is empty; copy it again, or train it again")
        parts = proto.read(model, name)
        self.model, self._name, self._named = model, name, dict(named or {})
        self._own_prefix = "first" if parts.prefix else "never"
        self.prefix = prefix or self._own_prefix
        if parts.suffix and self.prefix != "never":
            raise InputError(f'{name} puts spaces at the end of words, not in front; load it with prefix="never"')
        types, texts = [piece.type for piece in parts.pieces], [piece.text for piece in parts.pieces]
        size = len(texts)
        self.controls = {text: i for i, text in enumerate(texts) if types[i] == proto.CONTROL} | self._named
        self.size = max([size, *(token + 1 for token in self._named.values())])
        bytes_ = {texts[i]: i for i in range(size) if types[i] == proto.BYTE}
        if not bytes_.keys() <= set(BYTE_NAMES):
            raise proto.broken(model, name)
        complete = len(bytes_) == 256
        for symbol, token in self._named.items():
            known = texts[token] if 0 <= token < size else symbol
            if not 0 <= token < MOST or known not in (symbol, symbol.replace(" ", SPACE)):
                raise InputError(f"{name} cannot give {shown(symbol)} the id {token}; give one that no token has")
        self._whole = {i for i in range(size) if types[i] == proto.BYTE or (types[i] == proto.UNKNOWN and not complete)}
        # The type alone keeps them out of text; without their names, no lookup by name can find them either.
        renamed = {token: (secrets.token_hex(16), proto.CONTROL) for token in self.controls.values() if token < size}
        for token in list(renamed):
            if types[token] == proto.UNKNOWN:  # SentencePiece wants one; with all bytes it never comes out
                del renamed[token]
        self._plain = _open(parts.written(renamed, False), model, name)
        self._fronted = self._plain
        if self.prefix != "never":
            self._fronted = _open(parts.written(renamed, True), model, name)
        self._spelled = [_spell(*piece[:2]) for piece in parts.pieces] + [b""] * (self.size - size)
        same = parts.identity and complete and not parts.suffix
        # SentencePiece would give a literal U+2581 back as a space, so it is spelled in bytes.
        self._space = [bytes_[BYTE_NAMES[byte]] for byte in SPACE.encode()] if same else []
        self._bytewise = self.joins = same
        self._ids_of = {text: i for i, text in reversed(list(enumerate(texts)))}
        self.exact = same and self._is_exact()

    def __reduce__(self):
        return type(self), (self.model, self._name, self.prefix, self._named)

    def _run(self, text: str, prefixed: bool) -> list[int]:
        return (self._fronted if prefixed else self._plain).encode(text, return_type=int)

    def _located(self, text: str, prefixed: bool) -> tuple[list[int], Spans]:
        found = (self._fronted if prefixed else self._plain).encode(text, return_type="offset_mapping")
        spans, past = [], None
        # Of the bytes of one character, SentencePiece lets the last alone cover it.
        for token, (begin, end) in zip(reversed(found["ids"]), reversed(found["offsets"]), strict=True):
            byte = self._plain.is_byte(token)
            if byte and begin == end and past is not None:
                end = past
            past = end if byte else None
            spans.append((begin, end))
        return found["ids"], spans[::-1]

    def _text(self, ids: list[int], prefixed: bool) -> str:
        if self._bytewise:
            return joined([self._spelled[token] for token in ids], prefixed)
        return (self._fronted if prefixed else self._plain).decode(ids)

    def _find(self, symbol: str) -> int | None:
        return self._ids_of.get(symbol, self._ids_of.get(symbol.replace(" ", SPACE)))

    def _remade(self, named: dict[str, int]) -> "Text":
        return type(self)(self.model, self._name, self.prefix, named)


def _spell(text: str, kind: int) -> bytes:
    """The bytes that a piece stands for."""
    if kind == proto.BYTE:
        return bytes.fromhex(text[3:5])  # "<0x41>"
    return text.replace(SPACE, " ").encode() if kind in (proto.NORMAL, proto.USER_DEFINED) else b""


def _open(model: bytes, original: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise proto.broken(original, name) from error
