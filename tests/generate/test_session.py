"""Answers as they come: batches, conversations that go on from their cache, and what ends them."""

import numpy as np
import pytest
from talker import asked, made, picture

from mmjax.core.errors import InputError
from mmjax.generate import engine, prompts
from mmjax.generate.sample import Sampling
from mmjax.generate.session import Session
from mmjax.sequence.document import Text

WARM = Sampling(temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(*made())


def test_streamed_is_whole_and_alone_is_together(session):
    questions = [
        asked(picture(0), "the fox"),
        asked("x"),
        asked("the dog", picture(1, 8, 16), "and", picture(2), "the quick brown fox jumps over"),
    ]
    rows = [WARM, Sampling(temperature=1.0, seed=9), Sampling(temperature=0.8, top_p=0.9, seed=4)]
    together = session.answer(questions, rows, max_tokens=20)
    assert len({answer.ids for answer in together}) == 3
    for question, how, one in zip(questions, rows, together, strict=True):
        shown = ""
        for row, text in session.stream([question], how, max_tokens=20, chunk=3):
            assert row == 0
            shown += text
        assert session.answers[0].ids == one.ids
        assert shown == session.answers[0].text == one.text
        assert one.reason == "length" or len(one.ids) < 20


def test_a_stop_string_ends_one_row_and_not_the_others(session):
    questions = [asked("the fox"), asked(picture(), "the dog")]
    rows = [Sampling(temperature=3.0, seed=1), Sampling(temperature=3.0, seed=2)]
    free = session.answer(questions, rows, max_tokens=24)
    stop = next(c for c in free[0].text[2:] if c.isascii() and c.isalpha() and c not in free[1].text)
    found = session.answer(questions, rows, max_tokens=24, stop=[stop])
    assert found[0].text == free[0].text[: free[0].text.index(stop)]
    assert found[0].reason == "stop"
    assert found[1] == free[1]


def turns(session, spans, said, question, **how):
    """One more turn of a conversation; gives the answer, and the same answered anew."""
    document = asked(*spans, *said, *question)
    answer = session.answer([document], **how)[0]
    return answer, Session(*made()).answer([document], **how)[0]


def test_a_conversation_reads_only_what_is_new(session):
    first = (picture(7), "the fox")
    opening = session.answer([asked(*first)], WARM, max_tokens=5)[0]
    assert opening.reused == 0
    said = (Text(opening.text, "assistant"),)
    two, anew = turns(session, first, said, ("and", picture(8, 16, 4)), sampling=WARM, max_tokens=6)
    assert two.ids == anew.ids
    assert two.reused > 12  # the first turn, its picture's tokens among them
    assert anew.reused == 0
    assert two.prompt == anew.prompt
    # A third, that takes back the second's answer.
    said = (*said, Text("and", turn=True), picture(8, 16, 4), Text("the dog", "assistant"))
    three, anew = turns(session, first, said, ("x",), sampling=WARM, max_tokens=40)
    assert three.ids == anew.ids
    assert three.reused > two.reused // 2
    # Another picture of the same size is another conversation, and the same one read again is not the same.
    other, anew = turns(session, (picture(9), "the fox"), (), (), sampling=WARM, max_tokens=5)
    assert other.ids == anew.ids
    assert other.reused < 4
    again, _ = turns(session, (picture(9), "the fox"), (), (), sampling=WARM, max_tokens=5)
    assert again.ids == other.ids


def test_the_same_question_again_reads_its_last_token(session):
    question = asked(picture(3), "the fox")
    one = session.answer([question], WARM, max_tokens=5)[0]
    two = session.answer([question], WARM, max_tokens=5)[0]
    assert two.reused == two.prompt - 1
    assert two.ids == one.ids


def test_whoever_stops_listening_may_ask_again(session):
    question = asked("the quick brown")
    stream = session.stream([question], WARM, max_tokens=30, chunk=2)
    next(stream)
    stream.close()
    assert session.answer([question], WARM, max_tokens=30)[0].ids == (
        Session(*made()).answer([question], WARM, max_tokens=30)[0].ids
    )


def test_parts_of_a_prompt(session):
    """Read 20 columns at a time."""
    questions = [asked(picture(0), "the quick brown fox jumps over the lazy dog"), asked("the", picture(1), "fox")]
    apart = Session(*made(), part=20)
    assert apart.answer(questions, WARM, max_tokens=8) == session.answer(questions, WARM, max_tokens=8)


def test_a_prefix_is_read_as_one_and_never_kept():
    """Tokens of a question that see all of it."""
    question = asked(picture(3), "the quick brown fox")
    session = Session(*made("prefix"), part=4)
    one = session.answer([question], max_tokens=5)[0]
    assert session.answer([asked(picture(3), "the quick brown fox jumps")], max_tokens=5)[0].reused == 0
    other = Session(*made("prefix")).answer([question], max_tokens=5)[0]
    assert one.ids == other.ids


def test_nothing_is_compiled_twice(session):
    session.answer([asked("the fox")], WARM, max_tokens=9)
    programs = (engine.run_prefill, engine.run_decode, engine.run_empty)
    before = [program._cache_size() for program in programs]
    session.answer([asked("the dog jumps")], Sampling(temperature=0.3, seed=8), max_tokens=7)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
    ("hi", "n", "wanted"),
    [([0, 1, 2, 3], 3, 3), ([0, 3, 3, 3, 4], 3, 1), ([0, 3, 3, 3, 4], 4, 4), ([2, 2, 2], 2, 0), ([], 0, 0)],
)
def test_borders(hi, n, wanted):
    assert prompts.border(np.array(hi, np.int32), n) == wanted


def test_ladder():
    assert [prompts.ladder(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 100)] == [16, 16, 24, 24, 32, 48, 48, 64, 128]


def test_bad_requests_are_refused(session):
    with pytest.raises(InputError, match="2 samplings"):
        session.answer([asked("x")], [WARM, WARM])
    with pytest.raises(InputError, match="max_tokens"):
        session.answer([asked("x")], max_tokens=0)
