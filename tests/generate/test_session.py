"""Answers as they come: batches, conversations that go on from their cache, and what ends them."""

import dataclasses

import numpy as np
import pytest
from talker import asked, made, picture
from tiny import randomised

from mmjax.convert.huggingface import Model
from mmjax.core.errors import InputError
from mmjax.core.store import Store
from mmjax.generate import engine, prompts
from mmjax.generate.sample import Sampling
from mmjax.generate.session import Session
from mmjax.models import encoder_decoder
from mmjax.models.decoder import Positions
from mmjax.nn import transformer
from mmjax.sequence.buckets import ladder
from mmjax.sequence.document import Document, Image, Text

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


@pytest.mark.parametrize("cross", ["last_image", "all_images"])
def test_pictures_beside_the_sequence_are_projected_once(cross, monkeypatch):
    """Turns with a picture, another one, none, and two at once; what was kept; rows of two, one and no pictures."""
    store, how = Store(memory=2**20), {"sampling": WARM, "max_tokens": 5}
    session, fresh = Session(*made(cross=cross), part=16, store=store), Session(*made(cross=cross))
    given = []
    real = engine.run_prefill
    monkeypatch.setattr(engine, "run_prefill", lambda *a, **k: (given.append(k["media"] is not None), real(*a, **k))[1])
    spans, found = (picture(7), "the fox"), []
    new = True  # whether the last turn has pictures
    for more in (("and", picture(8, 16, 4)), ("x",), (picture(1), "or", picture(2, 8, 16)), ()):
        given.clear()
        document = asked(*spans)
        answer = session.answer([document], **how)[0]
        assert given == [new, *[False] * (len(given) - 1)]  # the first part alone brings media
        fresh._state = None
        anew = fresh.answer([document], **how)[0]
        assert answer.ids == anew.ids
        np.testing.assert_allclose(session._state.logits, fresh._state.logits, rtol=2e-5, atol=2e-5)
        assert answer.reused > answer.prompt // 3 or not found
        found.append(document)
        said = Text(answer.text, "assistant")
        new = any(isinstance(span, Image) for span in more)
        spans = (*spans, said, *(Text(s, turn=True) if isinstance(s, str) else s for s in more))
    assert store.counts.missed == 4
    # Another picture at the beginning: all of it is read again, its mark too, which looks at it.
    other = asked(picture(9), "the fox")
    session.answer([asked(picture(7), "the fox")], **how)
    assert session.answer([other], **how)[0].reused < 3
    fresh._state = None
    assert session.answers[0].ids == fresh.answer([other], **how)[0].ids
    together = session.answer([found[1], found[0], asked("the dog")], **how)
    for document, one in zip((found[1], found[0], asked("the dog")), together, strict=True):
        assert fresh.answer([document], **how)[0].ids == one.ids


def test_padding_of_a_picture_before_is_not_kept_under_a_new_one():
    """Pictures on canvases, other words between the same two: both are read again, for their padding stands last."""
    session, fresh = Session(*made(cross="last_images")), Session(*made(cross="last_images"))
    one, two, how = picture(7, 8, 8), picture(8, 8, 8), {"sampling": WARM, "max_tokens": 4}
    session.answer([asked(one, "the fox", two, "or")], **how)
    same = session.answer([asked(one, "the fox", two, "and")], **how)[0]
    assert same.reused > same.prompt // 2
    other = asked(one, "the dog", two, "and")
    assert session.answer([other], **how)[0].reused == 0
    assert session.answers[0].ids == fresh.answer([other], **how)[0].ids
    np.testing.assert_allclose(session._state.logits, fresh._state.logits, rtol=2e-5, atol=2e-5)


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


def test_whoever_interrupts_may_ask_again(session, monkeypatch):
    question = asked("the lazy dog", picture(4))
    wanted = session.answer([question], WARM, max_tokens=12)[0].ids
    real = engine.run_decode

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)  # the cache is gone
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "run_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.answer([question], WARM, max_tokens=12)
    monkeypatch.undo()
    assert session.answer([question], WARM, max_tokens=12)[0].ids == wanted


def test_the_rest_of_a_document_has_every_field(session):
    """Cut behind its first picture, and made a batch: the tokens and patches of the whole from there on."""
    document, its = asked("the", picture(1), "fox", picture(2, 16, 8), "jumps"), session.processor
    layout, (example, media) = its.layout(document), its.example(document)
    n = int(np.flatnonzero(example.slot >= 0)[0]) + 6 + 2
    example = dataclasses.replace(
        example,
        mix_slot=np.where(example.slot[:, None] >= 6, example.slot[:, None] + np.arange(3), -1).astype(np.int32),
        mix_share=np.ones((len(example.tokens), 4), np.float32),
    )
    left, pixels = prompts.rest(example, media, layout, n)
    assert len(pixels) == 1
    sizes = {len(example.tokens): len(example.tokens) - n, len(example.patch_lo): 8, len(example.grid): 1}
    for field in dataclasses.fields(example):
        whole, cut = getattr(example, field.name), getattr(left, field.name)
        if isinstance(whole, np.ndarray) and len(whole):
            assert len(cut) == sizes[len(whole)], field.name
    for name, moved in (("lo", n), ("hi", n), ("slot", 6), ("mix_slot", 6), ("position", 0)):
        whole, cut = getattr(example, name)[n:], getattr(left, name)
        assert (np.where(whole < 0, -1, whole - moved) == cut).all(), name
    assert left.media == example.media - 6


def test_what_was_said_is_known_by_label_and_position():
    """After a picture, positions lag behind labels; an answer goes on with both, and sees what the last token saw."""
    rows = np.array([[5, 0, 0, 0, 0, 0, 0, 4], [7, 0, 1, 2, 4, 3, 1, 6]])
    said = prompts.Read(rows, ()).said(np.array([8, 9])).rows
    assert said.tolist() == [*rows.tolist(), [8, 0, 2, 5, 5, 5, 1, 6], [9, 0, 3, 6, 6, 6, 1, 6]]


def test_a_picture_that_is_made_otherwise_is_read_again(session):
    """The same object under another policy, as where a second one beside it changes what the first becomes."""
    document, its = asked("the", picture(1), "fox"), session.processor
    layout, (example, _) = its.layout(document), its.example(document)
    read = prompts.Read.of(example, document, layout)
    assert prompts.common(read, read, layout) == len(example.tokens) - 1
    ((span, (policy, *rest)),) = read.media
    other = dataclasses.replace(read, media=((span, (dataclasses.replace(policy, max_pixels=99), *rest)),))
    assert prompts.common(other, read, layout) == np.flatnonzero(example.slot >= 0)[0]


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
    again = session.answer([question], max_tokens=5)[0]
    assert (again.reused, again.ids) == (0, one.ids)  # all but its last token is there, and sees that one
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
    found = [ladder(n, prompts.FEWEST) for n in (1, 16, 17, 24, 25, 33, 48, 49, 100)]
    assert found == [16, 16, 24, 24, 32, 48, 48, 64, 128]


def test_bad_requests_are_refused(session):
    with pytest.raises(InputError, match="2 samplings"):
        session.answer([asked("x")], [WARM, WARM])
    with pytest.raises(InputError, match="max_tokens"):
        session.answer([asked("x")], max_tokens=0)
    with pytest.raises(InputError, match="give a list of texts"):
        session.answer([asked("x")], stop="ab")
    with pytest.raises(InputError, match="'q' has no tokens"):
        session.answer([Document("q", (Text("", "document"),))])


def test_answers_end_where_learned_positions_do():
    model, processor = made()
    cfg = dataclasses.replace(model.cfg, decoder=dataclasses.replace(model.cfg.decoder, positions=Positions(22, 2)))
    table = np.random.default_rng(0).normal(size=(22, cfg.decoder.blocks.width)).astype(np.float32)
    params = model.params | {"decoder": model.params["decoder"] | {"positions": table}}
    short = Session(dataclasses.replace(model, cfg=cfg, params=params), processor)
    answer = short.answer([asked("x")], max_tokens=200)[0]
    assert (answer.reason, answer.prompt + len(answer.ids)) == ("length", 20)
    # Beside a longer question, which has less room.
    both = short.answer([asked("the fox"), asked("x")], max_tokens=200)
    assert both[1] == answer
    assert (both[0].reason, both[0].prompt + len(both[0].ids)) == ("length", 20)
    assert both[0].prompt > both[1].prompt
    with pytest.raises(InputError, match="20 positions"):
        short.answer([asked("x" * 30)])


def test_an_encoder_decoder_begins_its_answers():
    model, processor = made()
    blocks = transformer.Config(16, 1, 2, 2, 8, 24)
    two = encoder_decoder.Config(model.cfg.decoder.vocab, blocks, dataclasses.replace(blocks, look=16))
    sequence = dataclasses.replace(processor.sequence, answer=1, position="sequential")
    its = dataclasses.replace(processor, sequence=sequence)
    session = Session(Model(encoder_decoder, two, randomised(encoder_decoder.spec(two))), its, unstack=False)
    for role, last in (("user", Text("the", "assistant")), ("document", Text("the", "document", True))):
        with pytest.raises(InputError, match="'q' begins the answer or has text to be learnt"):
            session.answer([asked(Text("x", role), last)])


def test_one_answer_at_a_time(session):
    """A stream that another question has overtaken says so, instead of going on with the other's words."""
    first = session.stream([asked("what")], max_tokens=20, chunk=1)
    while not next(first)[1]:
        pass
    session.answer([asked("the fox")], max_tokens=2)
    with pytest.raises(InputError, match="Another question was asked meanwhile"):
        list(first)


def test_logits_that_are_no_numbers_are_told():
    model, processor = made()
    spoilt = model.params | {"decoder": model.params["decoder"] | {"embed": model.params["decoder"]["embed"] * np.nan}}
    broken = Session(dataclasses.replace(model, params=spoilt), processor)
    with pytest.raises(InputError, match="logits are no numbers"):
        broken.answer([asked("x")], max_tokens=3)


def test_what_is_kept_goes_by_what_was_read(tmp_path):
    """A picture that its source draws otherwise the second time is kept under the pixels that the tower saw."""
    one, two = picture(1), picture(2)
    drawn = iter([one.source, two.source, two.source])
    store = Store(memory=2**20)
    Session(*made(), store=store).answer([asked(Image(12, 8, lambda: next(drawn)), "x")], max_tokens=1)
    kept, fresh = Session(*made(), store=store), Session(*made())
    for session in (kept, fresh):
        session.answer([asked(two, "x")], max_tokens=1)
    np.testing.assert_allclose(kept._state.logits, fresh._state.logits, atol=1e-5)
    assert store.counts.missed == 2
