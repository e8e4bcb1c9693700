"""What every text tokenizer can do, whatever file it came from: the interface, and the parts all have in common."""

import functools
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Integer

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.tokenizers.vocab import CONTROLS, Vocab

Prefix = Literal["always", "first", "never"]
Spans = list[tuple[int, int]]

SPACE = "\u2581"  # SentencePiece stores a space as this character
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]  # the tokens that spell what no other token does
MOST = 2**24  # ids; a table of spellings as long as the largest id must fit in memory
PROBE = " \t\uff21\ufb01e\u0301 \r\n x  "  # any normalisation changes this
PROBES = (PROBE, "x" + PROBE, SPACE + PROBE, f"A\u212b{SPACE} \x00\U0010ffff b", "\u0958 \x85\u200b\ufeff")
log = logging.getLogger("mmjax")


class Tokenizer(ABC):
    """Text to ids and back; control tokens are ids that no text can produce.

    Made by `text.load`, `text.load_ranks`. Can be pickled.

    model: the bytes of the file it was made from, to be saved beside whatever was trained with it.
    controls: symbol to id of every control token.
    size: number of ids, those of added controls among them.
    prefix: whether text gets a space in front that it does not have: "always", "first" (where it begins a sequence) or
      "never".
    exact: `decode(encode(x)) == x` for every text.
    joins: what `decode` gives is what each id stands for, one after the other: more ids at the end change nothing but
      the U+FFFD of a last character that is not whole yet.
    longest: characters of the longest text that is encoded; more may take more memory than there is.
    """

    model: bytes
    controls: dict[str, int]
    size: int
    prefix: Prefix
    exact: bool
    joins: bool
    longest: int

    _own_prefix: Prefix  # as the file has it
    _named: dict[str, int]  # what `with_controls` made controls
    _name: str  # for errors
    _space: list[int]  # ids of the bytes of a literal U+2581, which would come back as a space; [] where it does not
    _spelled: list[bytes]  # of every id, what it stands for; read where the tokenizer is exact
    _whole: set[int]  # ids that stand for whole characters or nothing, and must not become controls

    @functools.cached_property  # layouts ask for it at every document
    def vocab(self) -> Vocab:
        """The ids of `vocab.CONTROLS` by name; InputError where the tokenizer has other control tokens."""
        missing = [control.symbol for control in CONTROLS if control.symbol not in self.controls]
        if missing:
            raise InputError(
                f"{self._name} has no control token {missing[0]}; bind a convention to it, or use a model that "
                "mmjax.tokenizers.text.train made"
            )
        return Vocab(**{control.name: self.controls[control.symbol] for control in CONTROLS}, size=self.size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of all that ids depend on: equal fingerprints, equal ids."""
        digest = hashlib.sha256(self.model)
        if self._named or self.prefix != self._own_prefix:  # else it is that of the file, as `sha256sum` gives it
            digest.update(json.dumps([sorted(self._named.items()), self.prefix]).encode())
        return digest.hexdigest()

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of ordinary text, never a control token, whatever the text says.

        start: the text stands at the beginning of the sequence, which matters where `prefix` is "first".

        InputError for a lone surrogate, which no file can hold, with its index; and for a text that is too long.
        """
        self._check(text)
        return self._safe(self._ids(text, self._prefixed(start)))

    def offsets(self, text: str, *, start: bool = True) -> tuple[list[int], Spans]:
        """What `encode` gives, and for each id the first and past-the-last index of the characters that it covers.

        An id that is one of several bytes of a character covers that character; a space that is not in the text is
        covered by nothing. Neither the firsts nor the lasts ever decrease. Of a tokenizer that changes text, this is
        what its library says; characters that it leaves out are covered by nothing.
        """
        self._check(text)
        if self.exact:
            ids = self.encode(text, start=start)
            return ids, _cover(text, [len(self._spelled[token]) for token in ids])
        ids, spans = [], []
        for place, part, prefixed in self._parts(text, self._prefixed(start)):
            spelled = part == SPACE and bool(self._space)
            found, where = (self._space, [(0, 1)] * 3) if spelled else self._located(part, prefixed)
            ids += found
            spans += [(place + begin, place + end) for begin, end in where]
        return self._safe(ids), _rising(spans)

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " tokens"], *, start: bool = True) -> str:
        """The text of `ids`; control tokens are skipped, bytes that are not UTF-8 come out as U+FFFD.

        start: as for `encode`: where a space was put in front, it is taken off again.

        InputError for an id that the tokenizer does not have, with its index.
        """
        if len(ids) and (min(ids) < 0 or max(ids) >= self.size):
            place = next(i for i, token in enumerate(ids) if not 0 <= token < self.size)
            raise InputError(
                f"token id {ids[place]} at index {place} is outside 0 to {self.size - 1}; "
                "decode with the tokenizer that the ids came from"
            )
        return self._text([int(token) for token in ids if token not in self._control_ids], self._prefixed(start))

    def with_controls(self, symbols: Sequence[str]) -> "Tokenizer":
        """This tokenizer with each of `symbols` a control token.

        One that the vocabulary has keeps its id, and text can no longer produce it; others get new ids from `size` on,
        and the log says so: the model's embedding must grow (`models.vocabulary.extend`).

        InputError for an empty symbol, and for one that text cannot do without: a byte, or what stands for the unknown.
        """
        named, size = dict(self._named), self.size
        for symbol in dict.fromkeys(symbols):
            if not symbol:
                raise InputError("a control token needs a symbol, and the empty string is none; give it a name")
            check_text(symbol, f"the control token {shown(symbol)}")
            if symbol in self.controls:
                continue
            token = self._find(symbol)
            if token in self._whole:
                raise InputError(f"{self._name} spells text with {shown(symbol)}; choose another symbol for a control")
            named[symbol], size = (token, size) if token is not None else (size, size + 1)
        if size > self.size:
            new = [symbol for symbol, token in named.items() if token >= self.size]
            log.warning(
                "%s: added the control tokens %s; extend the model's embedding from %d to %d rows",
                *(self._name, ", ".join(map(shown, new)), self.size, size),
            )
        return self._remade(named) if named != self._named else self

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.controls.values())

    def _prefixed(self, start: bool) -> bool:
        return self.prefix == "always" or (self.prefix == "first" and start)

    def _check(self, text: str) -> None:
        check_text(text, "text")
        if len(text) > self.longest:
            raise InputError(f"a text has {len(text):,} characters, where {self.longest:,} are allowed; cut it up")

    def _safe(self, ids: list[int]) -> list[int]:
        """The promise of `encode`, held to whatever the libraries underneath do."""
        if not self._control_ids.isdisjoint(ids):
            raise InputError(f"{self._name} makes a control token of ordinary text; use another tokenizer file")
        return ids

    def _ids(self, text: str, prefixed: bool) -> list[int]:
        ids = []
        for _, part, some in self._parts(text, prefixed):
            ids += self._space if part == SPACE and self._space else self._run(part, some)
        return ids

    def _parts(self, text: str, prefixed: bool) -> Iterator[tuple[int, str, bool]]:
        """Where each part of a text begins, the part, and whether a space is put in front of it.

        Every U+2581 is a part, where it is spelled in bytes.
        """
        if not self._space or SPACE not in text:
            yield 0, text, prefixed
            return
        place = 0
        for part in text.split(SPACE):
            if place:
                yield place - 1, SPACE, False
            elif prefixed and not part:
                yield -1, " ", False  # before the text, so it covers nothing
            if part:
                yield place, part, prefixed and not place
            place += len(part) + 1

    def _is_exact(self) -> bool:
        """By trial: a tokenizer that changes any text changes one of the probes."""
        return all(
            self.decode(self.encode(probe, start=start), start=start) == probe
            for probe in PROBES
            for start in (True, False)
        )

    @abstractmethod
    def _run(self, text: str, prefixed: bool) -> list[int]:
        """Ids as the library gives them."""

    @abstractmethod
    def _located(self, text: str, prefixed: bool) -> tuple[list[int], Spans]:
        """Ids and the characters they cover, as the library gives them; for tokenizers that are not exact."""

    @abstractmethod
    def _text(self, ids: list[int], prefixed: bool) -> str:
        """The text of ids that are no controls."""

    @abstractmethod
    def _find(self, symbol: str) -> int | None:
        """The id that the vocabulary has for a symbol."""

    @abstractmethod
    def _remade(self, named: dict[str, int]) -> "Tokenizer":
        """The same with these controls in addition to the file's."""


def check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), which is not text; "
            "remove it or decode the source again"
        ) from error


def joined(pieces: list[bytes], prefixed: bool) -> str:
    """Text of what ids stand for, without the space that was put in front."""
    out = b"".join(pieces)
    return (out[1:] if prefixed and out[:1] == b" " else out).decode("utf-8", errors="replace")


def _cover(text: str, lengths: list[int]) -> Spans:
    """The characters that tokens of these many bytes cover, one after the other."""
    data = np.frombuffer(text.encode(), np.uint8)
    # Which character each byte is of; one more at the end.
    character = np.append(np.cumsum((data & 0xC0) != 0x80) - 1, len(text))
    sizes = np.array(lengths, np.int64)
    ends = np.cumsum(sizes)
    extra = int(ends[-1]) - len(data) if lengths else 0  # 1 where a space was put in front
    firsts = np.maximum(ends - extra - sizes, 0)
    lasts = np.maximum(ends - extra, 0)
    past = np.where(lasts > firsts, character[np.maximum(lasts - 1, 0)] + 1, character[firsts])
    return list(zip(character[firsts].tolist(), past.tolist(), strict=True))


def _rising(spans: Spans) -> Spans:
    out, first, last = [], 0, 0
    for begin, end in spans:
        first, last = max(first, begin), max(last, begin, end)
        out.append((first, last))
    return out
