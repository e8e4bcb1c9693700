import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import InputError
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.layout import layout
from mmjax.sequence.split import _most, split
from mmjax.tokenizers.vocab import Vocab

VOCAB = Vocab(0, 1, 2, 3, 4, 5, 6, 7, 8, size=35)


class Letters:
    vocab = VOCAB

    def encode(self, text):
        return [9] * len(text)


class Fours:
    def grid(self, height, width):
        return height // 4, width // 4


LAY = functools.partial(layout, tokenizer=Letters(), resolution=Fours())
SPANS = st.one_of(
    st.builds(
        lambda n, role: Text("a" * n, role, role == "assistant"),
        st.integers(0, 9),
        st.sampled_from(["user", "assistant"]),
    ),
    st.builds(lambda r, c: Image(4 * r, 4 * c, b""), st.integers(1, 3), st.integers(1, 3)),
)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.lists(SPANS, min_size=1, max_size=12), st.integers(16, 40), st.integers(9, 20), st.integers(1, 3))
def test_all_spans_in_order_and_every_part_fits(spans, tokens, patches, images):
    document, room = Document("d", tuple(spans)), (tokens, patches, images, 0, 0)
    parts = split(document, LAY, room)
    assert [span for part in parts for span in part.spans] == spans
    fits = [all(n <= most for n, most in zip(LAY(part).size, room, strict=True)) for part in parts]
    assert all(fits)
    if len(parts) == 1:
        assert parts == [document]
    else:
        assert [part.id for part in parts] == [f"d#{i}" for i in range(len(parts))]
        for a, b in itertools.pairwise(parts):  # as many spans as fit
            more = LAY(Document("d", (*a.spans, b.spans[0]))).size
            assert any(n > most for n, most in zip(more, room, strict=True))


def slowly(document, room):
    """What split was before it was fast: a span at a time."""
    parts, start, spans = [], 0, document.spans
    while start < len(spans):
        stop = start + 1
        while stop < len(spans) and fits(spans[start : stop + 1], room):
            stop += 1
        parts.append(spans[start:stop])
        start = stop
    return parts


def fits(spans, room):
    return all(n <= most for n, most in zip(LAY(Document("d", tuple(spans))).size, room, strict=True))


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.lists(SPANS, min_size=1, max_size=60), st.integers(16, 200), st.integers(9, 40), st.integers(1, 9))
def test_parts_are_those_of_a_span_at_a_time(spans, tokens, patches, images):
    document, room = Document("d", tuple(spans)), (tokens, patches, images, 0, 0)
    assert [part.spans for part in split(document, LAY, room)] == slowly(document, room)


@given(st.integers(1, 300), st.integers(0, 400), st.integers(1, 400))
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
def test_the_most_that_fits_is_found_from_any_guess(most, fit, guess):
    asked = []
    found = _most(lambda n: asked.append(n) or n <= fit, most, guess)
    assert found == min(most, fit)
    assert all(1 <= n <= most for n in asked)
    # Two for each doubling of how wrong the guess was.
    assert len(asked) <= 3 + 2 * abs(min(guess, most) - found).bit_length()


def test_a_document_of_many_turns_is_laid_out_a_few_times():
    spans, counted = [Text("ab", ("user", "assistant")[n % 2]) for n in range(2000)], []

    def lay(document):
        counted.append(len(document.spans))
        return LAY(document)

    parts = split(Document("d", tuple(spans)), lay, (200, 0, 0, 0, 0))
    assert sum(len(part.spans) for part in parts) == 2000
    assert len(parts) > 30
    assert sum(counted) < 7 * len(spans)  # not some for each span


def test_a_span_larger_than_a_row_is_refused_by_number():
    document = Document("d", (Text("ab"), Image(20, 20, b""), Text("c")))
    with pytest.raises(InputError, match=r"'d', span 1 alone takes 30 tokens, 25 patches, 1 images, more than"):
        split(document, LAY, (28, 100, 4, 0, 0))
