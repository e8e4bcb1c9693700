import dataclasses

import numpy as np
import pytest

from mmjax.core.errors import InputError
from mmjax.data import augment, drawings
from mmjax.data.drawings import KIND, NAMING, SAME, STYLES, WHICH, Config, Training
from mmjax.sequence.document import Image, Text
from mmjax.tokenizers import image as images

DOCUMENTS = 300
STILL = augment.Config(*[0.0] * len(dataclasses.fields(augment.Config)))  # every amount


@pytest.fixture(scope="module")
def training():
    return Training(Config(), 1000, 5)


def words(document):
    return [s.text for s in document.spans if isinstance(s, Text)]


def concepts(document):
    """What the pictures of a training document show."""
    return [picture.source.args[0] for picture in document.images]


def test_named():
    picked = drawings.named(Config())
    assert picked == drawings.named(Config())
    assert len(picked) == len({c.name for c in picked}) == 62
    assert all(c.name.isalpha() for c in picked)
    assert picked != drawings.named(Config(seed=1))
    assert set(picked) <= set(drawings.archive()[0])


@pytest.mark.parametrize("wrong", [1, 513])
def test_named_refuses(wrong):
    with pytest.raises(InputError, match=f"data.concepts is {wrong}; give 2 to 512"):
        drawings.named(Config(concepts=wrong))


def test_archive_is_whole():
    all_concepts, files = drawings.archive()
    assert len(all_concepts) == len({c.code for c in all_concepts}) == len({c.name for c in all_concepts}) == 1594
    assert set(files) == {f"{style}/{c.code}" for style in STYLES for c in all_concepts}
    for c in all_concepts[::40]:
        for style in STYLES:
            assert (
                images.read_size(files[f"{style}/{c.code}"])
                == drawings.pixels(style, c.code).shape[:2]
                == c.size[style]
            )


@pytest.mark.parametrize("held_out", STYLES)
def test_training_reads_no_held_out_drawing(held_out, monkeypatch):
    """Every file that is read while pictures are drawn is one of the document's concepts, in a training style."""
    everything, read = drawings.archive(), []

    class Spied(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    spied = everything[0], Spied(everything[1])
    monkeypatch.setattr(drawings, "archive", lambda: spied)
    styles = set()
    documents = Training(Config(held_out=held_out), DOCUMENTS, 1)
    for document in documents:
        drawings.pixels.cache_clear()
        read.clear()
        for picture in document.images:
            picture.source()
        seen = [name.split("/") for name in read]
        assert {code for _, code in seen} == {c.code for c in concepts(document)}
        styles |= {style for style, _ in seen}
    assert styles == set(STYLES) - {held_out}


def test_training_refuses_a_style_that_is_none():
    with pytest.raises(InputError, match=r"'crayon'.*twemoji, fluent, noto"):
        Training(Config(held_out="crayon"), 1, 0)


def shown(document):
    return document.id, [
        (s.text, s.role, s.train) if isinstance(s, Text) else (s.height, s.width) for s in document.spans
    ]


def test_a_document_is_a_function_of_seed_and_number(training):
    for n in (0, 7, 999, 7):
        one, other = training[n], Training(Config(), n + 1, 5)[n]
        assert shown(one) == shown(other)
        for a, b in zip(one.images, other.images, strict=True):
            pixels = a.source()
            np.testing.assert_array_equal(pixels, a.source())
            np.testing.assert_array_equal(pixels, b.source())
    assert len({str(shown(training[n])[1]) for n in range(50)}) > 40
    different = [shown(training[n])[1] != shown(Training(Config(), 1000, 6)[n])[1] for n in range(20)]
    assert sum(different) > 15


def test_length(training):
    assert len(training) == 1000
    for n in (1000, -1):
        with pytest.raises(IndexError):
            training[n]


def test_pictures_have_the_size_that_was_declared(training):
    for n in range(100):
        for picture in training[n].images:
            pixels = picture.source()
            assert pixels.shape == (picture.height, picture.width, 3)
            assert pixels.dtype == np.uint8
            assert min(pixels.shape[:2]) >= 12
            assert 32 <= max(pixels.shape[:2]) <= 48


def test_all_questions_occur_and_their_answers_are_right(training):
    names = {c.name for c in drawings.named(Config())}
    counts, answers = {"naming": 0, "kind": 0, "same": 0, "which": 0}, {}
    for n in range(DOCUMENTS):
        document = training[n]
        text, of = words(document), concepts(document)
        spans = [type(s) for s in document.spans]
        if text[0] == NAMING:
            counts["naming"] += 1
            (concept,) = of
            assert concept.name in names
            assert text[1] == concept.name
            if text[2:]:
                counts["kind"] += 1
                assert text[2:] == [KIND, concept.group]
        elif text[0] == SAME:
            counts["same"] += 1
            assert text[1] == ("yes" if of[0].code == of[1].code else "no")
            styles = {picture.source.args[1] for picture in document.images}
            assert styles == {"twemoji", "fluent"}  # so that equal pixels do not give it away
        else:
            counts["which"] += 1
            right = of[("first", "second").index(text[1])]
            assert text[0] == WHICH.format(right.name)
            assert of[0].code != of[1].code
        assert spans == [Image] * len(of) + [Text] * len(text)
        assert [s.train for s in document.spans if isinstance(s, Text)] == [False, True] * (len(text) // 2)
        roles = [s.role for s in document.spans]
        assert roles == ["user"] * (len(of) + 1) + ["assistant", "user", "assistant"][: len(text) - 1]
        if len(of) == 2:
            answers[text[1]] = answers.get(text[1], 0) + 1
    assert all(count > DOCUMENTS / 40 for count in counts.values())
    assert counts["naming"] > DOCUMENTS / 2
    assert set(answers) == {"yes", "no", "first", "second"}
    assert min(answers.values()) > 3


def test_questions_with_a_share_of_zero_are_not_asked():
    documents = Training(Config(naming=1.0, same=0.0, which=0.0, kind=0.0), 40, 0)
    assert {words(d)[0] for d in documents} == {NAMING}
    assert {len(d.spans) for d in documents} == {3}


def test_pictures_show_their_concept():
    """Unaltered, a training picture is nearest to the drawing of its concept in its style, among all of the named."""
    cfg = Config(naming=1.0, same=0.0, which=0.0, blend=0.0, augment=STILL)
    drawn = {(s, c.code): drawings.pixels(s, c.code) for s in ("twemoji", "fluent") for c in drawings.named(cfg)}
    for document in Training(cfg, 20, 2):
        picture = document.images[0]
        pixels = picture.source().astype(float)
        distance = {
            key: np.square(pixels - images.resize(drawing, *pixels.shape[:2])).mean() for key, drawing in drawn.items()
        }
        concept, style = picture.source.args[:2]
        assert min(distance, key=distance.get) == (style, concept.code)


def test_blending_mixes_both_styles_of_one_concept():
    cfg = Config(naming=1.0, same=0.0, which=0.0, augment=STILL, shortest=40, longest=40)
    for n in range(8):
        blended, own = (Training(dataclasses.replace(cfg, blend=blend), 10, 0)[n].images[0] for blend in (1.0, 0.0))
        concept, style = blended.source.args[:2]
        other = drawings.pixels("fluent" if style == "twemoji" else "twemoji", concept.code)
        a = own.source().astype(float)
        b = images.resize(images.resize(other, *concept.size[style]), *a.shape[:2]).astype(float)
        # The mixture lies between both: the least-squares share of b in it is in (0, 1), and little else is left.
        step = blended.source().astype(float) - a
        share = (step * (b - a)).sum() / np.square(b - a).sum()
        assert 0 < share < 1
        assert np.abs(step - share * (b - a)).mean() < 4


def test_a_blend_may_go_past_either_style():
    a, b = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 140, np.uint8)
    draws = [int(drawings.mix(a, b, 0.5, np.random.default_rng(seed))[0, 0, 0]) for seed in range(200)]
    assert min(draws) in range(80, 84)  # 100 − 0.5 × 40
    assert max(draws) in range(157, 161)  # 140 + 0.5 × 40
    within = [int(drawings.mix(a, b, 0.0, np.random.default_rng(seed))[0, 0, 0]) for seed in range(200)]
    assert (min(within), max(within)) == (100, 140)
    high = [drawings.mix(np.full_like(a, 250), b, 0.5, np.random.default_rng(seed)).min() for seed in range(50)]
    assert min(high) > 80  # clipped at white, not wrapped around to black


def test_augmentation_grows():
    """The first documents are as drawn, those from `grow` on as the config says."""
    cfg = Config(
        grow=40,
        blend=0.0,
        naming=1.0,
        same=0.0,
        which=0.0,
        augment=dataclasses.replace(STILL, grey=1.0),
    )
    colour = lambda n: np.ptp(Training(cfg, 400, 0)[n].images[0].source().astype(int), axis=-1).mean()  # noqa: E731
    early, middle, late = ([colour(n) > 1 for n in range(*r)] for r in ((0, 4), (10, 30), (40, 60)))
    assert sum(early) >= 3
    assert 4 <= sum(middle) <= 16
    assert not any(late)


def test_held_out_questions():
    asked = drawings.held_out(Config())
    picked = drawings.named(Config())
    assert [q.concept for q in asked] == list(picked)
    assert len({q.document.id for q in asked}) == 62
    for q in asked:
        picture, question = q.document.spans
        assert question == Text(NAMING)
        assert (q.question, q.answer) == (NAMING, q.concept.name)
        assert (picture.height, picture.width) == q.concept.size["noto"]
        np.testing.assert_array_equal(images.decode(picture.source), drawings.pixels("noto", q.concept.code))
        assert not any(s.train for s in q.document.spans if isinstance(s, Text))


def test_nearest_neighbour_against_a_loop():
    cfg = Config()
    picked = drawings.named(cfg)
    table = {(s, c): images.resize(drawings.pixels(s, c.code), 32, 32).astype(int) for s in STYLES for c in picked}
    right = 0
    for concept in picked:
        query = table["noto", concept]
        distance = [(((query - table[s, c]) ** 2).sum(), c.name) for s in ("twemoji", "fluent") for c in picked]
        right += min(distance)[1] == concept.name
    got = drawings.nearest_neighbour(cfg)
    assert got == right / 62
    assert 0.3 < got < 0.7
