import pytest

from mmjax.core.errors import InputError
from mmjax.sequence.words import Writer, controls
from mmjax.tokenizers.convention import Convention
from mmjax.tokenizers.parts import BORDER, Symbol, Words
from mmjax.tokenizers.vocab import CONTROLS, Vocab

BEGIN, FAKE, TURN = Symbol("<b>"), Symbol("<f>"), Symbol("<t>")
PLAIN = Convention("plain", begin=(BEGIN,))


TABLE = {"<b>": 0, "<f>": 1, "<t>": 2}


class Pairs:
    """A token for every two letters, whatever they belong to; "^" first where a text begins a sequence."""

    controls = TABLE

    def __init__(self):
        self.spelled = list(TABLE)

    def encode(self, text, *, start=True):
        return self.offsets(text, start=start)[0]

    def offsets(self, text, *, start=True):
        if "!" in text:
            raise InputError("there is no '!' here.")
        found = [("^", (0, 0))] * start + [
            (text[i : i + 2], (i, min(i + 2, len(text)))) for i in range(0, len(text), 2)
        ]
        for token, _ in found:
            if token not in self.spelled:
                self.spelled.append(token)
        return [self.spelled.index(token) for token, _ in found], [where for _, where in found]


class Alone:
    """Without `offsets`."""

    controls = TABLE

    def encode(self, text):
        return [10 + ord(letter) - ord("a") for letter in text]


def written(*parts, convention=PLAIN):
    """The runs of some parts, with the tokens spelled out: (tokens, learnt, span), and slots of a medium."""
    tokenizer = Pairs()
    writer = Writer(tokenizer, convention, "d7")
    for part in parts:
        writer.view(*part) if isinstance(part, tuple) and isinstance(part[-1], range) else writer.add(part)
    out = []
    for run in writer.runs():
        spelled = " ".join(tokenizer.spelled[i] for i in run.ids)
        out.append((spelled, run.train, run.span, *([] if run.slots is None else [run.slots])))
    return out


def test_neighbours_are_one_string():
    """ "a" + "bc" is "ab" "c"; what belongs to whom is told by a token's first letter."""
    assert written(TURN, Words("a", span=0), Words("bcde", span=1)) == [
        ("<t>", False, -1),
        ("ab", False, 0),
        ("cd e", False, 1),
    ]
    assert written(TURN, Words("abcd", span=0), Words("ef"), Words("gh", span=2)) == [
        ("<t>", False, -1),
        ("ab cd", False, 0),
        ("ef", False, -1),
        ("gh", False, 2),
    ]


def test_a_control_token_or_a_border_parts_strings():
    assert written(TURN, Words("a", span=0), TURN, Words("b", span=0))[1::2] == [("a", False, 0), ("b", False, 0)]
    assert written(TURN, Words("a", span=0), BORDER, Words("b", span=1))[1:] == [("a", False, 0), ("b", False, 1)]
    assert written(TURN, Words("a", span=0), Words("", span=1), Words("b", span=2))[1:] == [("ab", False, 0)]


def test_a_token_is_learnt_where_any_of_its_letters_is():
    asked, said = Words("abc", span=0), Words("def", True, 1)
    assert written(TURN, asked, said)[1:] == [("ab", False, 0), ("cd", True, 0), ("ef", True, 1)]
    assert written(TURN, Words("a", True, 0), Words("bcd", span=1))[1:] == [("ab", True, 0), ("cd", False, 1)]
    assert written(TURN, Words("a", span=0), Words("b", True), Words("cd", span=2))[1:] == [
        ("ab", True, 0),
        ("cd", False, 2),
    ]
    assert written(TURN, Words("ab", span=0), Words("cd", True, 1))[1:] == [("ab", False, 0), ("cd", True, 1)]


def test_a_token_over_three_texts_is_learnt_for_the_last():
    class Threes(Pairs):
        def offsets(self, text, *, start=True):
            return [7], [(0, len(text))]

    writer = Writer(Threes(), PLAIN, "d7")
    for n, train in enumerate((False, False, True)):
        writer.add(Words("a", train, n))
    assert [(r.ids, r.train, r.span) for r in writer.runs()] == [([7], True, 0)]


def test_control_tokens_are_learnt_where_they_say_so():
    assert written(Symbol("<t>", True), TURN) == [("<t>", True, -1), ("<t>", False, -1)]


@pytest.mark.parametrize(("opens", "first"), [(True, "^ ab"), (False, "ab")])
def test_text_begins_a_sequence_at_the_very_beginning_alone(opens, first):
    convention = Convention("c", begin=(BEGIN,), opens=opens)
    assert written(BEGIN, Words("ab"), TURN, Words("cd"), convention=convention) == [
        ("<b>", False, -1),
        (first, False, -1),
        ("<t>", False, -1),
        ("cd", False, -1),
    ]


def test_what_ends_the_beginning():
    assert written(Words("a", span=0), Words("b", span=1)) == [("^ ab", False, 0)]
    assert written(TURN, Words("ab"))[1][0] == "ab"
    assert written(BEGIN, TURN, Words("ab"))[2][0] == "ab"
    assert written(BEGIN, (0, range(2)), Words("ab"))[2][0] == "ab"
    assert written(Words("ab"), BORDER, Words("cd")) == [("^ ab", False, -1), ("cd", False, -1)]
    assert written(BEGIN, BORDER, Words("", span=0), Words("ab"))[1][0] == "^ ab"


def test_symbols_that_become_one():
    once = Convention("once", once=("<f>",))
    assert [t for t, *_ in written(FAKE, FAKE, TURN, TURN, FAKE, convention=once)] == ["<f>", "<t>", "<t>", "<f>"]
    around = [FAKE, (0, range(1)), FAKE, FAKE, (1, range(1)), FAKE]
    assert [t for t, *_ in written(*around, convention=once)] == ["<f>", "", "<f>", "", "<f>"]
    assert [t for t, *_ in written(FAKE, Words("a"), FAKE, convention=once)] == ["<f>", "a", "<f>"]
    assert [t for t, *_ in written(FAKE, Words(""), FAKE, convention=once)] == ["<f>"]
    assert [t for t, *_ in written(FAKE, FAKE)] == ["<f>", "<f>"]


@pytest.mark.parametrize(("text", "tokens"), [("a", " a"), (" a", " a"), ("\na", "\na"), ("<a", "<a")])
def test_a_space_after_some_symbols(text, tokens):
    gap = Convention("gap", gap=("<f>",))
    assert "".join(t for t, *_ in written(FAKE, Words(text), convention=gap)) == f"<f>{tokens}"
    assert "".join(t for t, *_ in written(TURN, Words(text), convention=gap)) == f"<t>{text}"
    # Only in front of what follows at once; the space belongs to nobody, its token to whom it shares it with.
    assert written(FAKE, Words("ab", True, 3), convention=gap)[1:] == [(" a", True, -1), ("b", True, 3)]
    assert written(FAKE, (0, range(1)), Words("ab"), convention=gap)[2][0] == "ab"


def test_views_with_something_between():
    """What is between belongs to the medium, what is before and after to nobody."""
    parts = [TURN, Words("ab"), (4, range(2)), Words("c"), FAKE, (4, range(2, 3)), (4, range(3, 5)), TURN, Words("d")]
    assert written(*parts) == [
        ("<t>", False, -1),
        ("ab", False, -1),
        ("c <f>", False, 4, [0, 1, -2, -2, 2, 3, 4]),
        ("<t>", False, -1),
        ("d", False, -1),
    ]


def test_media_of_different_spans_stay_apart():
    assert written((0, range(2)), Words("ab", span=1), (2, range(1))) == [
        ("", False, 0, [0, 1]),
        ("ab", False, 1),
        ("", False, 2, [0]),
    ]


def test_errors_name_document_and_span():
    with pytest.raises(InputError, match=r"^Document 'd7', span 5: there is no '!' here\.$"):
        written(TURN, Words("ab", span=4), Words("c!", span=5), Words("d", span=6))
    with pytest.raises(InputError, match=r"^Document 'd7': the tokenizer has no control token '<z>'; bind it"):
        written(Symbol("<z>"))


def test_a_pair_that_no_text_has_alone():
    class Picky(Pairs):
        def offsets(self, text, *, start=True):
            if "ab" in text:
                raise InputError("no 'ab'.")
            return super().offsets(text, start=start)

    writer = Writer(Picky(), PLAIN, "d7")
    writer.add(Words("a", span=0))
    writer.add(Words("b", span=1))
    with pytest.raises(InputError, match=r"^Document 'd7': no 'ab'\.$"):
        writer.runs()


def test_without_offsets_texts_are_tokenized_one_by_one():
    writer = Writer(Alone(), PLAIN, "d7")
    for part in (TURN, Words("ab", span=0), Words("c", True, 1)):
        writer.add(part)
    assert [(r.ids, r.train, r.span) for r in writer.runs()] == [
        ([2], False, -1),
        ([10, 11], False, 0),
        ([12], True, 1),
    ]


def test_control_tokens_of_a_tokenizer_without_a_table():
    class Old:
        vocab = Vocab(*range(9), size=20)

    assert controls(Old()) == {control.symbol: n for n, control in enumerate(CONTROLS)}
    assert controls(Alone()) == TABLE
