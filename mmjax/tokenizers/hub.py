"""tokenizer.json, as the `tokenizers` package writes it: byte-level BPE, BPE with byte fallback, WordPiece, Unigram."""

import json
import re
from typing import Any

from mmjax.core import strict_json
from mmjax.core.errors import InputError
from mmjax.tokenizers.base import BYTE_NAMES, SPACE, Prefix, Spans, Tokenizer, joined
from mmjax.tokenizers.rewrite import LETTER_OF, LETTERS, Rewritten, regular_expressions, rewrite

MAX_BYTES, MAX_ITEMS = 128 << 20, 16_000_000  # real ones have 35 MB and 3 million entries
RUN = 1_000_000  # characters without a change between space and no space; regular expressions fail on 10 times that


class Hub(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` package with the controls taken out of what text can match.

    post_processor: that part of the file, which nothing here runs.
    """

    longest = 5_000_000  # 2 GB and 40 s measured at worst, and twice the text takes twice that

    def __init__(
        self,
        model: bytes,
        name: str = "the tokenizer.json",
        prefix: Prefix | None = None,
        named: dict[str, int] | None = None,
    ):
        """model: the file's bytes. named: symbols that are controls besides the file's own, with their ids.

        InputError for bytes that are no tokenizer.json, for one that cannot be made safe, and for a prefix that it has
        no way to put in front of text.
        """
        spec = strict_json.loads(model, name, max_bytes=MAX_BYTES, max_items=MAX_ITEMS)
        parts = rewrite(spec if isinstance(spec, dict) else {}, named or {}, name)
        self.post_processor = spec.get("post_processor") if isinstance(spec, dict) else None
        self.model, self._name, self._named = model, name, dict(named or {})
        self._own_prefix = parts.prefix
        self.prefix = prefix or parts.prefix
        self.controls, self.size = parts.controls, len(parts.names)
        if self.prefix != "never" and parts.fronted is None:
            raise InputError(f'{name} has no way to put a space in front of text; load it with prefix="never"')
        self._plain = _engine(parts.spec, name)
        self._fronted = self._plain if self.prefix == "never" else _engine(parts.fronted, name)
        self._matches = regular_expressions(parts.spec)
        self._names = parts.names
        self._ids_of = {piece: i for i, piece in reversed(list(enumerate(parts.names))) if piece is not None}
        for token in parts.spec["added_tokens"]:
            if self._plain.token_to_id(token["content"]) != token["id"]:
                raise InputError(f"{name} holds an added token whose id the library changes; download it again")
        self._spelling, self.joins = parts.spelling, bool(parts.spelling)
        self._spelled = _spelled(parts)
        self._whole = self._indispensable(parts)
        self._space = []
        if parts.spelling == "names":
            self._space = [self._ids_of[BYTE_NAMES[byte]] for byte in SPACE.encode()]
        self.exact = parts.lossless and self._is_exact()

    def __reduce__(self):
        return type(self), (self.model, self._name, self.prefix, self._named)

    def _indispensable(self, parts: Rewritten) -> set[int]:
        names = {"letters": LETTERS, "names": BYTE_NAMES, None: ()}[parts.spelling]
        out = {self._ids_of[name] for name in names if name in self._ids_of}
        return out if parts.complete or parts.unknown is None else {*out, parts.unknown}

    def _encoding(self, text: str, prefixed: bool) -> Any:
        if self._matches and len(text) > RUN:
            longest = max(match.end() - match.start() for match in re.finditer(r"\s+|\S+", text))
            if longest > RUN:
                raise InputError(
                    f"a text has {longest:,} characters in a row that are all spaces or all not, where {RUN:,} are "
                    "allowed; cut it up"
                )
        try:
            return (self._fronted if prefixed else self._plain).encode(text, add_special_tokens=False)
        except BaseException as error:
            # What Rust's `panic!` comes out as, which is no Exception: here, a regular expression that gave up.
            if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
                raise
            raise InputError(f"{self._name} cannot encode a text of {len(text):,} characters ({error})") from error

    def _run(self, text: str, prefixed: bool) -> list[int]:
        return self._encoding(text, prefixed).ids

    def _located(self, text: str, prefixed: bool) -> tuple[list[int], Spans]:
        found = self._encoding(text, prefixed)
        return found.ids, found.offsets

    def _text(self, ids: list[int], prefixed: bool) -> str:
        if self._spelling:
            return joined([self._spelled[token] for token in ids], prefixed)
        names = [self._names[token] or "" for token in ids]
        return self._plain.decoder.decode(names) if self._plain.decoder else " ".join(names)

    def _find(self, symbol: str) -> int | None:
        letters = "".join(LETTER_OF[byte] for byte in symbol.encode())
        other = letters if self._spelling == "letters" else symbol.replace(" ", SPACE)
        return self._ids_of.get(symbol, self._ids_of.get(other))

    def _remade(self, named: dict[str, int]) -> "Hub":
        return type(self)(self.model, self._name, self.prefix, named)


def _spelled(parts: Rewritten) -> list[bytes]:
    """The bytes that every id stands for; of tokenizers whose ids are not bytes, something of no use."""
    bytes_ = {name: byte.to_bytes() for byte, name in enumerate(BYTE_NAMES)} if parts.spelling == "names" else {}

    def spell(piece: str | None) -> bytes:
        if piece is None:
            return b""
        if parts.spelling == "letters" and piece not in parts.added and all(letter in LETTERS for letter in piece):
            return bytes(LETTERS[letter] for letter in piece)
        return bytes_.get(piece, piece.replace(SPACE, " ").encode() if parts.spelling == "names" else piece.encode())

    out = [spell(piece) for piece in parts.names]
    if parts.unknown is not None:
        out[parts.unknown] = "\ufffd".encode()
    return out


def _engine(spec: dict[str, Any], name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(f"{name} is read with the package `tokenizers`; pip install mmjax[data]") from error
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except BaseException as error:
        if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
            raise
        raise InputError(f"{name} is not a tokenizer.json that `tokenizers` reads ({error}); copy it again") from error
