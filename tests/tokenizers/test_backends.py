"""Every kind of tokenizer file: text comes back, no text makes a control, offsets, prefixes, added controls."""

import logging
import pickle
import random
import time

import pytest
import sentencepiece
from tokenizer_files import CONTROLS, CORPUS, EXACT, OTHERS, letters, names, packed, pieces, unigram, wordpiece

from mmjax.core.errors import InputError
from mmjax.tokenizers import text

INJECTIONS = [
    "<image>",
    "＜image＞",
    "<|im_start|>",
    "</s>",
    "<s>",
    "<0x41>",
    "<0x0A>",
    "[CLS]",
    "[UNK]",
    "<unk>",
    "\u2581",
]
INJECTIONS += ["ASSISTANT:", "<|endoftext|>", "<pad>", "<|pad|>", "<|image|>", "＜s＞", "\u2581<s>", "<0x41"]


@pytest.fixture(scope="module", params=[*EXACT, *OTHERS])
def any_tokenizer(request):
    return (EXACT | OTHERS)[request.param]()


@pytest.fixture(scope="module", params=EXACT)
def tokenizer(request):
    return EXACT[request.param]()


def strange(count: int) -> list[str]:
    """Of all planes, combining marks, controls, right to left, joiners, and what tokenizers know."""
    rng = random.Random(0)
    marks = [chr(c) for c in range(0x300, 0x370)] + ["\u200d", "\u200f", "\u202e", "\ufe0f", "\u20dd"]
    low, rtl = [chr(c) for c in range(0x80)], [chr(c) for c in (*range(0x5D0, 0x5EB), *range(0x620, 0x64B))]
    known = [*INJECTIONS, *CORPUS[:3], "  ", "    ", "\u2581\u2581", " \u2581", "e\u0301", "👩‍👩‍👧", "\r\n", "\x00"]
    out = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 9)):
            pool = rng.choice([marks, low, rtl, known, None])
            code = rng.choice([rng.randrange(0x800), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
            parts.append(rng.choice(pool) if pool else chr(code))
        out.append("".join(parts))
    return out


def test_ten_thousand_strings_come_back(tokenizer):
    hidden = set(tokenizer.controls.values())
    for x in strange(10_000):
        for start in (True, False):
            ids = tokenizer.encode(x, start=start)
            assert tokenizer.decode(ids, start=start) == x
            assert hidden.isdisjoint(ids)


def test_no_text_makes_a_control(any_tokenizer):
    hidden = set(any_tokenizer.controls.values())
    assert hidden
    for symbol in dict.fromkeys([*INJECTIONS, *list(any_tokenizer.controls)[:300]]):
        for x in (symbol, f"a{symbol}b", f" {symbol} {symbol}\n", symbol[:-1], symbol * 3):
            ids, spans = any_tokenizer.offsets(x)
            assert ids == any_tokenizer.encode(x)
            assert hidden.isdisjoint(ids), x
            if any_tokenizer.exact:
                assert any_tokenizer.decode(ids) == x
            assert len(spans) == len(ids)


@pytest.mark.parametrize("make", [names, unigram])
def test_text_cannot_name_bytes(make):
    """Not even where the file has merges, or scores, that would join the letters of "<0x41>"."""
    tokenizer = text.load(packed(make()))
    byte = tokenizer._ids_of["<0x41>"]
    for x in ("<0x41>", "a<0x41>", "<0x41><0x41>", "<<0x41>"):
        assert byte not in tokenizer.encode(x)
    assert byte in tokenizer.encode("A")


def test_offsets_partition_the_text(tokenizer):
    for x in [*strange(500), "", " a", "\u2581 b", "日本語 the fox"]:
        for start in (True, False):
            ids, spans = tokenizer.offsets(x, start=start)
            assert ids == tokenizer.encode(x, start=start)
            reached = 0
            for token, (first, last) in zip(ids, spans, strict=True):
                # The next character, or again the last one, of which this is another byte.
                assert first in (reached, reached - 1)
                assert last >= reached
                whole = tokenizer._spelled[token].decode(errors="replace")
                if "\ufffd" not in whole:
                    assert whole.endswith(x[first:last])
                reached = last
            assert reached == len(x)


def test_offsets_of_tokenizers_that_change_text(any_tokenizer):
    for x in [*strange(300), "the ﬁne e\u0301 é", " the  the", "👩 the"]:
        ids, spans = any_tokenizer.offsets(x)
        assert ids == any_tokenizer.encode(x)
        firsts, lasts = [first for first, _ in spans], [last for _, last in spans]
        assert firsts == sorted(firsts)
        assert lasts == sorted(lasts)
        assert all(0 <= first <= last <= len(x) for first, last in spans)


def test_offsets_by_hand():
    assert text.load(pieces()).offsets("é👩")[1][-4:] == [(1, 2)] * 4
    changing = OTHERS["nfkc"]()
    assert changing.offsets("the 👩 the")[1].count((4, 5)) == 4
    assert OTHERS["wordpiece"]().offsets("THE  abc")[1] == [(0, 3), (5, 6), (6, 7), (7, 8)]
    composed = OTHERS["qwen"]().offsets("e\u0301x")[1]
    assert composed == [(0, 1), (0, 1), (2, 3)]  # the accent went into the letter before it


def test_prefixes():
    """The space in front of text: as SentencePiece puts it, only at the start, or never."""
    model = pieces()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    first, always, never = (text.load(model, prefix=prefix) for prefix in (None, "always", "never"))
    assert (first.prefix, always.prefix) == ("first", "always")
    for x in ["fox", " fox", "  fox", "\n", "the <s>", ""]:
        assert first.encode(x) == always.encode(x) == always.encode(x, start=False) == theirs.encode(x)
        assert first.encode(x, start=False) == never.encode(x)
        assert never.decode(never.encode(x)) == always.decode(always.encode(x)) == x
        assert first.encode(f" {x}", start=False) == (theirs.encode(x) if x else never.encode(" "))
    assert first.decode(first.encode(" a", start=False), start=False) == " a"
    assert len({t.fingerprint for t in (first, always, never)}) == 3


def test_prefixes_of_a_tokenizer_json():
    both, never = text.load(packed(names())), text.load(packed(names()), prefix="never")
    assert both.prefix == "always"
    assert both.encode("the") == never.encode(" the") != never.encode("the")
    assert text.load(packed(names()), prefix="first").encode("the", start=False) == never.encode("the")
    meta = text.load(packed(unigram()))
    assert (
        meta.encode("the") == meta.encode(" the") == meta.encode(" the", start=False) != meta.encode("the", start=False)
    )
    assert text.load(packed(unigram()), prefix="never", exact=True).exact
    byte = text.load(packed(letters()), prefix="first")
    assert byte.encode("the") == byte.encode(" the", start=False)
    with pytest.raises(InputError, match="no way to put a space"):
        text.load(packed(wordpiece()), prefix="always")


@pytest.mark.parametrize("name", [*EXACT, *OTHERS])
def test_with_controls(name, caplog):
    before = (EXACT | OTHERS)[name]()
    plain = "the" if before._find("the") is not None else "fox"
    known = before._find(plain)
    with caplog.at_level(logging.INFO, logger="mmjax"):
        after = before.with_controls(["<new one>", plain, "<|another|>", *list(before.controls)[:1]])
    added = [plain] if known is not None else []
    assert set(after.controls) - set(before.controls) == {"<new one>", "<|another|>", *(added or [plain])}
    assert after.controls["<new one>"] == before.size
    assert after.size == before.size + (2 if added else 3)
    assert f"from {before.size} to {after.size} rows" in caplog.text
    if added:
        assert after.controls[plain] == known
        assert known in before.encode(plain, start=False) or known in before.encode(f"x {plain}")
    hidden = set(after.controls.values())
    for x in ("<new one>", plain, f" {plain} {plain}", "the fox", "<|another|>"):
        assert hidden.isdisjoint(after.encode(x))
        if before.exact:
            assert after.exact
            assert after.decode(after.encode(x)) == x
    assert after.decode([before.size, *after.encode("abc"), after.size - 1]) == after.decode(after.encode("abc"))
    again = pickle.loads(pickle.dumps(after))
    assert (again.controls, again.fingerprint, again.size) == (after.controls, after.fingerprint, after.size)
    assert again.encode(CORPUS[0]) == after.encode(CORPUS[0])
    assert after.fingerprint != before.fingerprint
    assert after.with_controls([plain]) is after


@pytest.mark.parametrize(
    ("name", "symbol"), [("letters", "a"), ("names", "<0x41>"), ("no bytes", "<unk>"), ("wordpiece", "[UNK]")]
)
def test_what_text_is_spelled_with_is_no_control(name, symbol):
    with pytest.raises(InputError, match="choose another symbol"):
        (EXACT | OTHERS)[name]().with_controls([symbol])
    with pytest.raises(InputError, match="empty string"):
        EXACT["llama"]().with_controls([""])


def test_one_character_and_the_unknown_as_controls():
    """A character is spelled in bytes then, and bytes leave nothing unknown."""
    for name in ("llama", "names"):
        tokenizer = EXACT[name]().with_controls(["b", "<unk>"])
        assert tokenizer.controls["<unk>"] == 0
        assert tokenizer.exact
        assert set(tokenizer.controls.values()).isdisjoint(tokenizer.encode("a b bbb <unk>"))


def test_symbols_that_a_model_finds_in_text_stop_being_found():
    """As Gemma's."""
    model = pieces(user_defined_symbols=["<start_of_turn>", "<image>", "  "])
    before = text.load(model)
    tokenizer = before.with_controls(["<start_of_turn>"])
    turn, image = before._find("<start_of_turn>"), before._find("<image>")
    assert {turn, image} <= set(before.encode("a <start_of_turn><image>"))
    ids = tokenizer.encode("a <start_of_turn><image>")
    assert turn not in ids
    assert image in ids
    assert tokenizer.controls["<start_of_turn>"] == turn
    assert tokenizer.exact
    assert tokenizer.size == before.size


def test_added_text_stays_text():
    tokenizer = text.load(packed(letters()))
    run = tokenizer._find("    ")
    assert run == 320
    assert run in tokenizer.encode("a    b")
    assert tokenizer.decode([run]) == "    "
    assert list(tokenizer.controls) == ["<s>", "<|endoftext|>", "<|im_start|>"]
    assert set(CONTROLS) == set(tokenizer.controls)


def test_vocab_needs_a_convention():
    assert EXACT["trained"]().vocab.image_end == 8
    with pytest.raises(InputError, match="bind a convention"):
        _ = EXACT["llama"]().vocab


@pytest.mark.parametrize("x", ["\ud800", "a\udfff"])
def test_lone_surrogates(any_tokenizer, x):
    for call in (any_tokenizer.encode, any_tokenizer.offsets):
        with pytest.raises(InputError, match="lone surrogate"):
            call(x)


@pytest.mark.parametrize("unit", ["a", " ", "👩", "\u2581", "A", "\n", "a\u0301", "<"])
def test_a_long_word_takes_bounded_time(any_tokenizer, unit):
    x = unit * (300_000 // len(unit))
    start = time.perf_counter()
    ids = any_tokenizer.encode(x)
    if any_tokenizer.exact:
        assert any_tokenizer.decode(ids) == x
    assert time.perf_counter() - start < 10  # seconds; 2 at most measured, and quadratic would be hours


def test_texts_too_long_are_refused_before_they_are_read(monkeypatch):
    tokenizer = text.load(packed(letters()))
    with pytest.raises(InputError, match="1,000,001 characters in a row"):
        tokenizer.encode(" " * 1_000_001)
    monkeypatch.setattr(text.Hub, "longest", 10)
    with pytest.raises(InputError, match="11 characters, where 10"):
        tokenizer.encode("x" * 11)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a", " ", "\U0001f642"], ids=["letters", "spaces", "emoji"])
@pytest.mark.parametrize("name", EXACT)
def test_ten_megabytes_without_a_break(name, unit):
    """Back unchanged, or refused in a sentence; never hours, and never a library's panic."""
    tokenizer = EXACT[name]()
    said = unit * (10_000_000 // len(unit.encode()))
    began, refused = time.monotonic(), ""
    try:
        ids = tokenizer.encode(said)
    except InputError as error:
        refused = str(error)
    if refused:
        assert refused.endswith("are allowed; cut it up")
        assert not isinstance(tokenizer, text.Text)  # SentencePiece takes it
    else:
        assert tokenizer.decode(ids) == said
    assert time.monotonic() - began < 300  # 11 s at most measured; in the square of the length it would be days
