import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from mmjax.core.errors import InputError
from mmjax.data import drawings, index
from mmjax.data.sets import Drawings, Files, Mixed, open_sources
from mmjax.sequence.document import Image
from mmjax.sequence.layout import Layout

DRAWN = Drawings(drawings.Config(concepts=5))


def write(path, n, word="cat", first=0):
    """A dataset of n conversations."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Which {word} is number {i}?"},
                {"role": "assistant", "content": f"The {word} {i}."},
            ]
        }
        for i in range(first, first + n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def cats(tmp_path):
    return Files(write(tmp_path / "cats.jsonl", 20), schema="messages")


@pytest.fixture
def dogs(tmp_path):
    return Files(write(tmp_path / "dogs.jsonl", 9, "dog"), name="hounds")


def mixed(*sources, **options):
    return Mixed(sources, tokenizer=Path("none"), **{"held_out": 4} | options)


def opened(*sources, seed=0, length=200, **options):
    return open_sources(mixed(*sources, **options), seed, length)


def spans(documents):
    return {d.spans for d in documents}


def said(document):
    """Of a drawing's document what can be compared: pictures are functions."""
    return tuple(s.text if not isinstance(s, Image) else (s.height, s.width) for s in document.spans)


def test_held_out_and_training_are_disjoint_and_complete(cats, dogs):
    found = opened(cats, dogs)
    assert list(found.held_out) == ["cats", "hounds"]
    for name, size in (("cats", 20), ("hounds", 9)):
        held = spans(found.held_out[name])
        trained = spans(d for d in found.training if d.id.startswith((f"{name}:", f"{name}~")))
        assert (len(held), len(trained)) == (4, size - 4)
        assert not held & trained
    assert len(found.held_out["cats"]) == 4
    with pytest.raises(IndexError):
        found.held_out["cats"][4]
    # Not simply the first of the file.
    assert [d.id for d in found.held_out["cats"]] != [f"cats/{i}" for i in range(4)]


def test_what_is_held_out_does_not_depend_on_the_run(cats, dogs):
    one = opened(cats, dogs, DRAWN)
    other = opened(dogs, dataclasses.replace(cats, weight=7.0), DRAWN, length=5000)
    for name in ("cats", "hounds", "drawings"):
        assert [d.id for d in one.held_out[name]] == [d.id for d in other.held_out[name]]
        assert [said(d) for d in one.held_out[name]] == [said(d) for d in other.held_out[name]]
    assert spans(one.held_out["cats"]) == spans(opened(cats, seed=5).held_out["cats"])


def test_a_longer_run_begins_as_a_shorter_one(cats, dogs):
    short, long = (opened(cats, dogs, length=n).training for n in (50, 500))
    assert (len(short), len(long)) == (50, 500)
    assert [d.id for d in short] == [long[n].id for n in range(50)]


def test_drawings_that_are_held_out_are_never_trained_on():
    found = opened(DRAWN, length=100)
    numbers = [d.id for d in found.held_out["drawings"]]
    assert numbers == [f"drawings/0/{n}" for n in range(4)]
    trained = {d.id.split(":", 1)[1] for d in found.training}
    assert not trained & set(numbers)
    assert trained <= {f"drawings/0/{n}" for n in range(4, 100)}


def test_drawings_that_are_held_out_are_shown_as_late_in_a_run():
    """Augmentation that grows from nothing would make them the easiest of all."""
    grown, growing = (
        opened(Drawings(drawings.Config(concepts=5, grow=grow))).held_out["drawings"] for grow in (0, 10**6)
    )
    for a, b in zip(grown, growing, strict=True):
        assert said(a) == said(b)
        pictures = [[s.source() for s in d.spans if isinstance(s, Image)] for d in (a, b)]
        assert pictures[0]
        assert all((x == y).all() for x, y in zip(*pictures, strict=True))


def test_weights_are_shares(cats, dogs):
    found = opened(cats, dataclasses.replace(dogs, weight=3.0)).training
    names = [d.id.replace("~", ":").split(":")[0] for d in found]
    assert (names.count("cats"), names.count("hounds")) == (50, 150)


def test_epochs(cats, dogs):
    found = opened(cats, dogs, epochs=2).training
    assert len(found) == 2 * (16 + 5)
    counts = {}
    for d in found:
        counts[d.spans] = counts.get(d.spans, 0) + 1
    assert set(counts.values()) == {2}
    with pytest.raises(InputError, match=r"data\.epochs is 2, but there is no end to drawings"):
        opened(cats, DRAWN, epochs=2)
    with pytest.raises(InputError, match=r"data\.epochs is 2, .*weights say nothing"):
        opened(cats, dataclasses.replace(dogs, weight=2.0), epochs=2)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_plan_of_whole_epochs_uses_every_document_so_often(cats, dogs, epochs):
    """Which no number of steps that is set beforehand does."""
    documents = opened(cats, dogs, epochs=epochs).training

    def lay(document):
        return Layout(document.id, (), sum(len(s.text) for s in document.spans), 0, 0)

    plan = index.training(documents, lay, steps=None, k=2, tokens=128, rows=3, seed=0)
    numbers = [n for step in plan.steps for row in step.rows for n in row]
    assert sorted(numbers) == list(range(epochs * (16 + 5)))
    counts = Counter(documents[n].spans for n in numbers)
    assert (len(counts), set(counts.values())) == (16 + 5, {epochs})
    with pytest.raises(InputError, match=f"fill .* steps of 3 rows .* not {len(plan.steps) + 1}"):
        index.training(documents, lay, steps=len(plan.steps) + 1, k=2, tokens=128, rows=3, seed=0)


def test_nothing_held_out(cats):
    found = opened(cats, held_out=0)
    assert found.held_out == {}
    assert len(spans(found.training)) == 20


def test_names(cats, dogs, tmp_path):
    again = Files(write(tmp_path / "more.jsonl", 9), name="cats")
    with pytest.raises(InputError, match=r"Two of data\.sources are called 'cats'; give each a name of its own"):
        opened(cats, again)
    with pytest.raises(InputError, match="'drawings'"):
        opened(DRAWN, DRAWN)
    both = opened(DRAWN, dataclasses.replace(DRAWN, name="sketches"))
    assert list(both.held_out) == ["drawings", "sketches"]
    with pytest.raises(InputError, match="a:b"):
        opened(dataclasses.replace(cats, name="a:b"))


def test_no_source():
    with pytest.raises(InputError, match=r"data\.sources is empty"):
        opened()


@pytest.mark.parametrize("wrong", [{"held_out": -1}, {"epochs": -1}])
def test_negative_numbers(cats, wrong):
    with pytest.raises(InputError, match=r"data\.held_out is .* and data\.epochs .*; give 0 or more"):
        opened(cats, **wrong)


@pytest.mark.parametrize("held_out", [9, 10])
def test_too_few_documents(cats, dogs, held_out):
    with pytest.raises(
        InputError, match=f"^Source 'hounds' has 9 documents, and data.held_out is {held_out}; hold out"
    ):
        opened(cats, dogs, held_out=held_out)
    assert len(spans(opened(cats, dogs, held_out=8).training)) == 12 + 1


def test_fingerprints_are_of_the_data(cats, dogs, tmp_path):
    before = opened(cats, dogs, DRAWN).fingerprints
    assert list(before) == ["cats", "hounds", "drawings"]
    assert len(set(before.values())) == 3
    assert opened(dogs, dataclasses.replace(cats, weight=2.0), DRAWN, length=300, held_out=2).fingerprints == before
    write(cats.path, 20, "cow")  # of the same length
    changed = opened(cats, dogs, DRAWN).fingerprints
    assert changed["cats"] != before["cats"]
    assert changed["hounds"] == before["hounds"]
    write(cats.path, 20)
    assert opened(cats, dogs).fingerprints["cats"] == before["cats"]
    write(cats.path, 21)
    assert opened(cats).fingerprints["cats"] not in (before["cats"], changed["cats"])
    other = Drawings(drawings.Config(concepts=6))
    assert opened(other).fingerprints["drawings"] != before["drawings"]
    assert opened(DRAWN, seed=1).fingerprints["drawings"] != before["drawings"]


def test_a_dataset_that_cannot_be_read(cats, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        opened(cats, Files(tmp_path / "nowhere.jsonl"))
    with cats.path.open("a") as file:
        file.write('{"messages": 5}\n')
    with pytest.raises(InputError, match=r"cats\.jsonl"):
        opened(cats)
    assert len(spans(opened(dataclasses.replace(cats, errors=1), held_out=0).training)) == 20
