"""A tokenizer that writes conversations in a family's convention: what layouts are made with."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmjax.core.errors import InputError
from mmjax.tokenizers.convention import Convention
from mmjax.tokenizers.vocab import Vocab


class Chat:
    """A tokenizer bound to a convention: it has all that `sequence.layout` asks of a tokenizer.

    Every symbol of the convention becomes a control token, which no text can produce; those that the vocabulary lacks
    are added at its end, and the log says so: `models.decoder` must then have a larger token table.

    tokenizer: the one inside, with the control tokens added.
    controls: symbol → id.
    vocab: the ids that the sequence code asks for by name.
    """

    def __init__(self, tokenizer: Any, convention: Convention):
        self.convention = convention
        self.tokenizer = tokenizer.with_controls(convention.symbols)
        self.controls: dict[str, int] = self.tokenizer.controls
        self.vocab = _vocab(self.controls, self.tokenizer.size, convention)
        self.encode, self.decode = self.tokenizer.encode, self.tokenizer.decode
        self.offsets = self.tokenizer.offsets

    @property
    def size(self) -> int:
        """The number of ids."""
        return self.tokenizer.size

    @property
    def exact(self) -> bool:
        """Whether decode(encode(x)) == x for any text."""
        return self.tokenizer.exact

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal: equal fingerprints write every conversation with equal ids."""
        template = self.convention.template
        told = f"{self.tokenizer.fingerprint} {replace(self.convention, template=None)}"
        told += "" if template is None else f" {template.fingerprint}"
        return hashlib.sha256(told.encode()).hexdigest()


def _vocab(controls: dict[str, int], size: int, of: Convention) -> Vocab:
    def find(symbol: str) -> int | None:
        return controls[symbol] if symbol else None

    def first(writing: Sequence) -> int | None:
        found = [part.symbol for part in writing if not isinstance(part, str)]
        return controls[found[0]] if found else None

    pad = find(of.pad)
    if pad is None:
        raise InputError(f"The convention {of.name!r} names no padding token; give it one (pad=…).")
    return Vocab(
        pad=pad,
        begin=first(of.begin),
        end=pad if find(of.stop) is None else find(of.stop),
        image=find(of.placeholder),
        size=size,
        image_newline=find(of.newline),
        video=find(of.placeholder_video),
        audio=find(of.placeholder_audio),
        numbered=of.numbered,
    )
