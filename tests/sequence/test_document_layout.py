import time
from itertools import groupby

import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.data import drawings
from mmjax.sequence.document import Document, Image, Text, Video
from mmjax.sequence.interleave import Config, interleave
from mmjax.sequence.layout import IMAGE, TEXT, layout
from mmjax.tokenizers import conventions, text
from mmjax.tokenizers.chat import Chat
from mmjax.tokenizers.resolution import Fixed
from mmjax.tokenizers.video import Stills
from mmjax.tokenizers.vocab import Vocab

PAD, BEGIN, END, SYSTEM, USER, ASSISTANT, PICTURE, START, STOP, A = range(10)
VOCAB = Vocab(PAD, BEGIN, END, SYSTEM, USER, ASSISTANT, PICTURE, START, STOP, size=35)


class Letters:
    """One id per letter, from A on."""

    vocab = VOCAB

    def encode(self, text: str) -> list[int]:
        if text and not (text.isascii() and text.islower()):
            raise InputError(f"{text!r} is not small letters; write it so.")
        return [A + ord(letter) - ord("a") for letter in text]


class Fours:
    """Patches of 4 pixels."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height < 4 or width < 4:
            raise InputError(f"{height}x{width} pixels is less than a patch; give a larger picture.")
        return height // 4, width // 4


def lay(*spans, **options):
    return layout(Document("d7", spans), Letters(), Fours(), **options)


def picture(rows, columns, role="user"):
    return Image(4 * rows, 4 * columns, b"", role)


def ids(laid):
    return [i for p in laid.pieces for i in (p.ids if p.modality == TEXT else [PICTURE] * p.length)]


def trained(laid):
    """Places of the trained tokens."""
    return np.flatnonzero(np.repeat([p.train for p in laid.pieces], [p.length for p in laid.pieces])).tolist()


def test_conversation_about_a_picture():
    laid = lay(picture(1, 2), Text("ab"), Text("ca", "assistant", True))
    user = [USER, START, PICTURE, PICTURE, STOP, A, A + 1, END]
    assert ids(laid) == [BEGIN, *user, ASSISTANT, A + 2, A, END]
    assert trained(laid) == [10, 11, 12]  # the answer and the end of its turn, not the marker before it
    assert laid.size == (13, 2, 1, 0, 0)
    assert [(p.grid, p.length) for p in laid.pieces if p.modality == IMAGE] == [((1, 1, 2), 2)]
    assert laid.id == "d7"


def test_spans_of_one_role_are_one_turn():
    laid = lay(Text("a"), Text("b"), picture(1, 1), Text("c"))
    assert ids(laid) == [BEGIN, USER, A, A + 1, START, PICTURE, STOP, A + 2, END]
    assert trained(laid) == []


def test_frames_that_are_views_are_counted_one_by_one():
    """By a connector that makes as many media tokens of every view, say."""
    clips = Stills(Fixed(4, 8, 8))
    laid = lay(Video(3, 8, 8, 1.0, lambda: None), Text("a"), clips=clips, media_tokens=lambda grid: 5)
    [piece] = [p for p in laid.pieces if p.views]
    assert (piece.length, piece.views) == (15, ((1, 2, 2),) * 3)


def test_many_turns():
    laid = lay(
        Text("s", "system"),
        Text("a"),
        picture(2, 2),
        Text("b", "assistant", True),
        Text("c"),
        Text("d", "assistant"),
        Text("e"),
        Text("f", "assistant", True),
        Text("g", "assistant", True),
    )
    letter = {c: A + i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
    expected = [BEGIN, SYSTEM, letter["s"], END, USER, letter["a"], START, *[PICTURE] * 4, STOP, END]
    expected += [ASSISTANT, letter["b"], END, USER, letter["c"], END, ASSISTANT, letter["d"], END]
    expected += [USER, letter["e"], END, ASSISTANT, letter["f"], letter["g"], END]
    assert ids(laid) == expected
    # "b" and its end; not "d", which is shown but not learnt; "f", "g" and their one end.
    assert trained(laid) == [14, 15, 26, 27, 28]
    assert laid.size == (len(expected), 4, 1, 0, 0)


def test_an_untrained_span_leaves_the_end_of_its_turn_untrained():
    laid = lay(Text("q"), Text("a", "assistant", True), Text("b", "assistant"))
    assert ids(laid)[-4:] == [ASSISTANT, A, A + 1, END]
    assert trained(laid) == [len(ids(laid)) - 3]


def test_answer_leaves_places_after_the_marker():
    question = lay(picture(1, 1), Text("a"), answer=3)
    assert ids(question) == [BEGIN, USER, START, PICTURE, STOP, A, END, ASSISTANT, PAD, PAD, PAD]
    assert trained(question) == []
    assert question.tokens == 11
    # Up to the places it is what the model was trained on.
    whole = lay(picture(1, 1), Text("a"), Text("b", "assistant", True))
    assert ids(question)[:8] == ids(whole)[:8]


def test_what_is_said_can_be_counted_apart():
    """By an encoder–decoder: its encoder reads all before the first learnt token, its decoder the rest."""
    spans = picture(1, 2), Text("ab"), Text("ca", "assistant", True), Text("d"), Text("e", "assistant", True)
    one, two = lay(*spans), lay(*spans, parted=True)
    assert ids(two) == ids(one)
    assert two.size == (10, 2, 1, 0, one.tokens - 10)
    assert lay(*spans[:2], parted=True).size == (9, 2, 1, 0, 1)  # what begins the answer
    assert lay(*spans[:2], answer=4, parted=True).size == (10, 2, 1, 0, 4)
    with pytest.raises(InputError, match=r"'d7' has a layout of one stream, but sequence.answer is 3"):
        interleave(one, VOCAB, Config(answer=3))
    with pytest.raises(InputError, match=r"'d7' has a layout of two streams, but sequence.answer is 0"):
        interleave(two, VOCAB)


def test_no_piece_is_empty():
    laid = lay(Text(""), Text("a"))
    assert ids(laid) == [BEGIN, USER, A, END]
    assert all(p.length for p in laid.pieces)


def test_the_connector_counts_the_media_tokens():
    laid = lay(picture(4, 6), Text("a"), media_tokens=lambda grid: grid[1] * grid[2] // 4)
    assert ids(laid).count(PICTURE) == 6
    assert laid.size == (12, 24, 1, 0, 0)


def test_random_conversations_against_turns_written_straight_down(rng):
    marker = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    for _ in range(50):
        spans = []
        for _ in range(rng.integers(1, 9)):
            role = ("system", "user", "assistant")[rng.integers(3)]
            if rng.random() < 0.4:
                spans.append(picture(*rng.integers(1, 4, 2).tolist(), role))
            else:
                spans.append(Text("".join(rng.choice(list("abcxyz"), rng.integers(1, 4))), role))
        expected = [BEGIN]
        for role, turn in groupby(spans, lambda span: span.role):
            expected.append(marker[role])
            for span in turn:
                if isinstance(span, Text):
                    expected += Letters().encode(span.text)
                else:
                    expected += [START, *[PICTURE] * (span.height * span.width // 16), STOP]
            expected.append(END)
        laid = lay(*spans)
        assert ids(laid) == expected
        pictures = [s for s in spans if isinstance(s, Image)]
        assert laid.size == (len(expected), expected.count(PICTURE), len(pictures), 0, 0)


@pytest.mark.parametrize(("wrong", "says"), [(Text("A"), "small letters"), (Image(3, 8, b""), "less than a patch")])
def test_errors_name_document_and_span(wrong, says):
    with pytest.raises(InputError, match=f"^Document 'd7', span 2: .*{says}"):
        lay(Text("a"), picture(1, 1), wrong)


def test_document_without_spans():
    with pytest.raises(InputError, match="'d8'"):
        Document("d8", ())


def test_images_of_a_document():
    first, second = picture(1, 2), picture(3, 4)
    assert Document("d", (Text("a"), first, Text("b"), second)).images == (first, second)


def test_twenty_thousand_turns_take_time_in_proportion():
    spans = [Text("a", ("user", "assistant")[n % 2], bool(n % 2)) for n in range(20_000)]
    spans[::10] = [picture(1, 1)] * 2000
    began = time.monotonic()
    laid = lay(*spans)
    # A second without the tests' checks of types, 4 for a hundred thousand; searching all turns for each takes minutes.
    assert time.monotonic() - began < 60
    assert laid.size == (1 + 2 * 20_000 + 18_000 + 3 * 2000, 2000, 2000, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-v1", "idefics3"])  # turns tokenized as one string, and apart
def test_a_hundred_thousand_turns_are_written_exactly(name):
    chat = Chat(text.load(drawings.tokenizer_model()), conventions.find(name))

    def made(pairs):
        pair = (Text("what is it?"), Text(" a cat ", "assistant", True))
        laid = layout(Document("d", pair * pairs), chat, Fours())
        example = interleave(laid, chat.vocab)
        assert example.tokens.tolist() == ids(laid)
        return example.tokens, example.weight

    began = time.monotonic()
    long, two, three = made(50_000), made(2), made(3)
    assert time.monotonic() - began < 300
    for many, start, more in zip(long, two, three, strict=True):
        # All pairs after the first are the same. (The last token has no next one, and so no weight.)
        start, more, many = start[:-1], more[:-1], many[:-1]
        np.testing.assert_array_equal(more[: len(start)], start)
        period = more[len(start) :]
        assert len(many) == len(start) + 49_998 * len(period)
        np.testing.assert_array_equal(many[: len(start)], start)
        np.testing.assert_array_equal(many[len(start) :].reshape(-1, len(period)), np.tile(period, (49_998, 1)))
    assert long[1].sum() >= 50_000


def test_a_hundred_thousand_turns_of_a_family_that_has_two_are_refused():
    chat = Chat(text.load(drawings.tokenizer_model()), conventions.find("paligemma"))
    spans = [Text("a", ("user", "assistant")[n % 2]) for n in range(100_000)]
    began = time.monotonic()
    with pytest.raises(InputError, match=r"^Document 'd' has several turns of one role, but paligemma has one"):
        layout(Document("d", tuple(spans)), chat, Fours())
    assert time.monotonic() - began < 60
