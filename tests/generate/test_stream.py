"""Text as it comes: what is shown is final, and stop strings are found wherever tokens end."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import EXACT, OTHERS

from mmjax.core.errors import InputError
from mmjax.generate.stream import UNKNOWN, Stream

made = functools.cache(lambda name: (EXACT | OTHERS)[name]())
TEXTS = st.text(alphabet=[*"the ab\n€😀é日", "\u0301", "\u2581"], max_size=12)
NAMES = ["llama", "letters", "names"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), TEXTS, st.data())
def test_what_is_shown_is_final_and_together_the_whole(name, text, data):
    tokenizer = made(name)
    ids = tokenizer.encode(text, start=False)
    # Ids that are no text at all as well: a model may write them.
    ids += data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=6))
    whole = tokenizer.decode(ids, start=False)
    stream, shown = Stream(tokenizer), ""
    for at in range(len(ids)):
        shown += stream.add(ids[at : at + 1])
        assert whole.startswith(shown)
        assert tokenizer.decode(ids[: at + 1], start=False).rstrip(UNKNOWN) == shown  # and nothing is kept back
    shown += stream.finish()
    assert shown == whole == stream.text
    assert stream.reason == "length"
    assert stream.ids == ids


def oracle(tokenizer, ids: list[int], stop: list[str]) -> tuple[str, int]:
    """The text, and how many ids were read, by looking at the whole text after every id."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], start=False)
        text = text if n == len(ids) else text.rstrip(UNKNOWN)
        found = [text.find(s) for s in stop if s in text]
        if found:
            return text[: min(found)], n
    return tokenizer.decode(ids, start=False), len(ids)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.text(alphabet="ab€", max_size=10),
    st.lists(st.text(alphabet="ab€", min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=12, max_size=12),
)
def test_stop_strings_across_tokens(name, text, stop, sizes):
    tokenizer = made(name)
    ids = tokenizer.encode(text, start=False)
    wanted, read = oracle(tokenizer, ids, stop)
    stream, shown, at = Stream(tokenizer, stop=stop), "", 0
    for size in sizes:
        shown += stream.add(ids[at : at + size])
        assert wanted.startswith(shown)
        at += size
    shown += stream.add(ids[at:])
    shown += stream.finish()
    assert shown == stream.text == wanted
    assert stream.reason == ("stop" if any(s in text for s in stop) else "length")
    assert len(stream.ids) == read


def test_of_stop_strings_that_end_together_the_one_that_began_first_counts():
    tokenizer = made("letters")
    stream = Stream(tokenizer, stop=["b", "ab"])
    assert stream.add(tokenizer.encode("xab", start=False)) == "x"
    assert stream.reason == "stop"


def test_an_end_shows_what_was_held_back():
    tokenizer = made("letters")
    euro = tokenizer.encode("a€", start=False)
    end = tokenizer.controls["<|im_start|>"]
    stream = Stream(tokenizer, ends=[end], stop=["ab"])
    assert stream.add(euro[:1]) == ""  # "ab" may follow
    assert stream.add([*euro[1:3], end, *euro]) == "a" + UNKNOWN  # the third byte never came
    assert stream.reason == "end"
    assert stream.ids == euro[:3]
    assert stream.add(euro) == stream.finish() == ""


def test_controls_are_no_text():
    tokenizer = made("letters")
    stream = Stream(tokenizer)
    assert stream.add([tokenizer.controls["<s>"], *tokenizer.encode("the")]) == "the"


@pytest.mark.parametrize("name", ["wordpiece", "nfkc", "no bytes"])
def test_a_tokenizer_that_changes_text_is_shown_word_by_word(name):
    tokenizer = made(name)
    ids = tokenizer.encode("the abc the ab")
    whole, stream, shown = tokenizer.decode(ids, start=False), Stream(tokenizer), ""
    some = []
    for token in ids:
        shown += stream.add([token])
        some.append(shown)
        assert whole.startswith(shown)
    assert shown + stream.finish() == whole
    assert len(set(some)) > 2


def test_a_space_in_front_is_taken_off_once():
    """Llama's older tokenizers put a space in front of any text, and take one off."""
    from tokenizer_files import pieces

    from mmjax.tokenizers import text

    tokenizer = text.load(pieces(), prefix="always")
    ids = tokenizer.encode("the quick brown")
    stream = Stream(tokenizer)
    assert "".join(stream.add([token]) for token in ids) == tokenizer.decode(ids, start=False) == "the quick brown"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="empty"):
        Stream(made("letters"), stop=["a", ""])


def test_ids_that_the_tokenizer_does_not_have_are_no_text():
    """Tables of published models are padded; a model may choose such a row."""
    tokenizer = made("letters")
    ids = [*tokenizer.encode("a", start=False), tokenizer.size + 3, *tokenizer.encode("b", start=False)]
    stream = Stream(tokenizer)
    assert stream.add(ids) + stream.finish() == "ab"
    assert stream.ids == ids
