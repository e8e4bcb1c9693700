"""Learning a SentencePiece unigram model from text: settings under which nothing is lost and no control is injected."""

import io
import re
from collections import Counter
from collections.abc import Iterable

import sentencepiece

from mmjax.core.errors import InputError
from mmjax.tokenizers.base import SPACE, check_text
from mmjax.tokenizers.pieces import Text
from mmjax.tokenizers.vocab import CONTROLS, Control

WORD = 64  # characters; training time grows with the square of a word's length, and no piece is longer than 16


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
    made = Text(model)  # what is handed out can always be loaded
    if not made.exact or made.vocab.size != vocab_size:
        raise InputError("SentencePiece made a model that changes text; use a version of it that mmjax is tested with")
    return model


def _symbols(controls: tuple[Control, ...]) -> list[str]:
    names, symbols = ([control[i] for control in controls] for i in (0, 1))
    missing = [control for control in CONTROLS if control not in controls]
    if missing:
        raise InputError(f"controls: {missing[0]} is missing; pass CONTROLS with your own added")
    if min(len(set(names)), len(set(symbols))) < len(controls) or not all(re.fullmatch(r"[^\s,]+", x) for x in symbols):
        raise InputError(f"controls: {controls} has a blank or repeated name or symbol; give each its own")
    return symbols


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
        check_text(text, f"text {number} of the corpus")
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
