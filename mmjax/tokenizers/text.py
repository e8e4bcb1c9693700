"""Text to ids and back, exactly: a SentencePiece unigram model whose control tokens no text can produce."""

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Integer

from mmjax.core.errors import InputError
from mmjax.tokenizers.vocab import CONTROLS, Control, Vocab

SPACE = "\u2581"  # SentencePiece stores a space as this character
WORD = 64  # characters; training time grows with the square of a word's length, and no piece is longer than 16
PROBE = " \t\uff21\ufb01e\u0301 \r\n x  "  # any normalisation changes this


class Text:
    """A loaded text tokenizer: `encode`, `decode`, and the ids of its control tokens; made by `load`.

    `model` is the model's own bytes, to be saved beside whatever was trained with it; `controls` maps the symbol of
    every control token to its id; `vocab` holds the ids by name.
    """

    model: bytes
    controls: dict[str, int]
    vocab: Vocab

    def __init__(self, model: bytes, name: str = "the tokenizer model"):
        self.model = model
        self._processor = _open(model, name)
        ids = range(self._processor.vocab_size())
        pieces = [self._processor.id_to_piece(i) for i in ids]
        self.controls = {pieces[i]: i for i in ids if self._processor.is_control(i)}
        missing = [control.symbol for control in CONTROLS if control.symbol not in self.controls]
        if missing:
            raise InputError(
                f"{name} has no control token {missing[0]}; use a model that mmjax.tokenizers.text.train made"
            )
        self.vocab = Vocab(**{control.name: self.controls[control.symbol] for control in CONTROLS}, size=len(ids))
        self._bytes = [self._spell(i, piece) for i, piece in enumerate(pieces)]
        byte_ids = {self._bytes[i]: i for i in ids if self._processor.is_byte(i)}
        # SentencePiece would give a literal U+2581 back as a space, so it is spelled in bytes.
        self._space = [byte_ids[byte.to_bytes()] for byte in SPACE.encode()] if len(byte_ids) == 256 else []
        if not self._space or self.decode(self.encode(PROBE)) != PROBE:
            raise InputError(
                f"{name} does not give text back unchanged (it normalises, or has no byte fallback); "
                "use a model made by mmjax.tokenizers.text.train"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model's bytes in hexadecimal: equal fingerprints, equal ids."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, never a control token; `decode` gives the same text back, byte for byte.

        Linear in the length: one word of a million letters takes a fraction of a second. InputError for a lone
        surrogate, which no file can hold, with its index.
        """
        _check_text(text, "text")
        ids = []
        for number, part in enumerate(text.split(SPACE)):
            if number:
                ids += self._space
            if part:
                ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " tokens"]) -> str:
        """The text of `ids`; control tokens are skipped, bytes that are not UTF-8 come out as U+FFFD.

        InputError for an id that the tokenizer does not have, with its index.
        """
        for place, token in enumerate(ids):
            if not 0 <= token < self.vocab.size:
                raise InputError(
                    f"token id {token} at index {place} is outside 0 to {self.vocab.size - 1}; "
                    "decode with the tokenizer that the ids came from"
                )
        return b"".join([self._bytes[token] for token in ids]).decode("utf-8", errors="replace")

    def _spell(self, token: int, piece: str) -> bytes:
        """The bytes that a token stands for."""
        if self._processor.is_byte(token):
            return bytes.fromhex(piece[3:5])  # "<0x41>"
        if self._processor.is_control(token) or self._processor.is_unknown(token) or self._processor.is_unused(token):
            return b""
        return piece.replace(SPACE, " ").encode()


def load(source: str | os.PathLike | bytes) -> Text:
    """The tokenizer in a model file, or in the bytes that `train` returned.

    InputError if the file is absent, empty, broken, lacks a control token of `CONTROLS`, or changes text.
    """
    if isinstance(source, bytes):
        return Text(source)
    try:
        model = Path(source).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the tokenizer model {str(source)!r} ({error}); give the path of a SentencePiece model file"
        ) from error
    return Text(model, f"the tokenizer model {str(source)!r}")


def train(texts: Iterable[str], vocab_size: int, *, controls: tuple[Control, ...] = CONTROLS) -> bytes:
    """Learn a SentencePiece unigram model (Kudo 2018, arXiv:1804.10959) of exactly `vocab_size` tokens from `texts`.

    Ids: first `controls` in their order (`CONTROLS`, and any of your own after or between), then unknown, the 256
    bytes, then pieces. Digits stay single. The same texts in the same order give the same bytes under one version of
    SentencePiece. InputError for a corpus without text, a lone surrogate (which text, which character), controls that
    clash or lack one of `CONTROLS`, and a `vocab_size` that the corpus cannot fill or that cannot hold its characters.
    """
    symbols = _symbols(controls)
    fixed = len(controls) + 1 + 256
    if not fixed < vocab_size < 2**31:
        raise InputError(f"vocab_size {vocab_size} is out of range; give more than the {fixed} controls and bytes")
    place = {control.name: controls.index(control) for control in CONTROLS}
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_counts(texts)),
            input_format="tsv",
            model_writer=written,
            model_type="unigram",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            required_chars=SPACE,  # its bytes would be those of U+2581
            split_digits=True,
            pad_id=place["pad"],
            pad_piece=symbols[place["pad"]],
            bos_id=place["begin"],
            bos_piece=symbols[place["begin"]],
            eos_id=place["end"],
            eos_piece=symbols[place["end"]],
            unk_id=len(controls),
            # Not user-defined symbols: those would be found in, and so injected by, ordinary text.
            control_symbols=[control.symbol for control in controls if control.name not in ("pad", "begin", "end")],
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(_explain(str(error), vocab_size)) from error
    model = written.getvalue()
    Text(model)  # so that what is handed out can always be loaded
    return model


def _open(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    # SentencePiece takes no bytes at all for a model of no tokens.
    if not model:
        raise InputError(f"{name} is empty; copy it again, or train it again")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise InputError(
            f"{name} is not a whole SentencePiece model ({len(model):,} bytes); copy it again, or train it again"
        ) from error


def _symbols(controls: tuple[Control, ...]) -> list[str]:
    names, symbols = ([control[i] for control in controls] for i in (0, 1))
    missing = [control for control in CONTROLS if control not in controls]
    if missing:
        raise InputError(f"controls: {missing[0]} is missing; pass CONTROLS with your own added")
    if min(len(set(names)), len(set(symbols))) < len(controls) or not all(re.fullmatch(r"[^\s,]+", x) for x in symbols):
        raise InputError(f"controls: {controls} has a blank or repeated name or symbol; give each its own")
    return symbols


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}: character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), which is not text; "
            "remove it or decode the source again"
        ) from error


def _counts(texts: Iterable[str]) -> list[str]:
    """Each distinct word of the texts, with the space before it, and its count: "word<tab>count".

    Pieces cross neither a space nor a tab, so words and counts say all that the texts do; and SentencePiece 0.2.2 takes
    time in the square of a repeated passage's length (5 s for 16,000 characters twice). It considers only what occurs
    twice with different sequels, so a word that occurs again is listed again, before a space; in the opposite order,
    or the two lists would be one long repeated passage.
    """
    counts = Counter()
    # Not an iterator for SentencePiece to draw from: it would turn this InputError into its own.
    for number, text in enumerate(texts):
        _check_text(text, f"text {number} of the corpus")
        counts.update(re.findall(rf" ?[^ \t]{{1,{WORD}}}| ", text))
    again = [f"{word} \t1" for word, count in counts.items() if count > 1]
    return [f"{word}\t{max(1, count - 1)}" for word, count in counts.items()] + again[::-1]


def _explain(error: str, vocab_size: int) -> str:
    """One sentence for what SentencePiece's trainer says."""
    if most := re.search(r"too high.*<= (\d+)", error):
        return f"vocab_size {vocab_size} is more than this corpus fills; give at most {most[1]}, or more text"
    if least := re.search(r"smaller than required_chars.* vs (\d+)", error):
        return f"vocab_size {vocab_size} is less than the controls, bytes and letters need; give at least {least[1]}"
    if re.search(r"sentences_\.empty|required_chars_\.empty|all_chars_count|seed_sentencepieces\.empty", error):
        return "the corpus holds no text to learn from; give at least a few sentences"
    return f"SentencePiece cannot train vocab_size {vocab_size} on this corpus ({error.strip()}); change one of them"
