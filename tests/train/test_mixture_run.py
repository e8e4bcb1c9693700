"""A run over datasets on disk: what it is judged by, how it resumes, what it refuses."""

import dataclasses
import json
import signal

import jax
import pytest
from tiny import tiny_model, tiny_run

from mmjax.core import config as configs
from mmjax.core.errors import InputError
from mmjax.data import drawings, index
from mmjax.data.sets import Drawings, Files, Mixed
from mmjax.tokenizers import text
from mmjax.train import loop, report, resume
from mmjax.train.config import Packing, Update
from mmjax.train.prepare import prepare_data

VOCAB = 400


def conversations(word, n):
    return [
        {
            "messages": [
                {"role": "user", "content": f"Which {word} is number {i}?"},
                {"role": "assistant", "content": f"The {word} {i}."},
            ]
        }
        for i in range(n)
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    corpus = [m["content"] for w in ("cat", "dog") for r in conversations(w, 60) for m in r["messages"]]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(text.train([*corpus, *drawings.corpus()], VOCAB))
    return path


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The programs under test see the one device that the tiny mesh uses."""
    devices = jax.devices()[:1]
    make = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make(cfg, devices))
    monkeypatch.setattr(index, "WINDOW", 256)  # no more documents are measured than the few steps need


@pytest.fixture
def cfg(tmp_path, tokenizer):
    for word in ("cat", "dog"):
        write(tmp_path / f"{word}s.jsonl", conversations(word, 40))
    sources = (
        Files(tmp_path / "cats.jsonl", schema="messages"),
        Files(tmp_path / "dogs.jsonl", name="hounds", weight=2.0),
        Drawings(drawings.Config(concepts=5)),
    )
    data = Mixed(sources, tokenizer, held_out=6)
    packing = Packing(rows=8, tokens=128, buckets=2, patches=100)
    return tiny_run(tmp_path / "run", model=tiny_model(VOCAB, 8), data=data, packing=packing)


def changed(cfg, **data):
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **data))


def other_weight(cfg):
    first, *rest = cfg.data.sources
    return changed(cfg, sources=(dataclasses.replace(first, weight=3.0), *rest))


@pytest.mark.slow
def test_a_run_over_datasets(cfg, tmp_path, monkeypatch, capsys):
    """Stopped after a step and resumed; then refused, by name, with other data."""
    real = report.Progress.update

    def update(self, step, *rest):
        real(self, step, *rest)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(report.Progress, "update", update)
    assert loop.run(cfg) == 143
    monkeypatch.setattr(report.Progress, "update", real)
    assert [step for step, _ in report.losses(cfg.out)] == [1, 2, 3, 4]  # the last ran while step 3 was read

    write(tmp_path / "dogs.jsonl", conversations("cow", 40))
    with pytest.raises(InputError, match=r"a run with other settings: the documents of 'hounds'; set them back"):
        loop.run(cfg)
    write(tmp_path / "dogs.jsonl", conversations("dog", 40))
    with pytest.raises(InputError, match=r"other settings: data\.sources\.0\.weight \(1\.0 → 3\.0\); set them back"):
        loop.run(other_weight(cfg))
    longer = changed(cfg, convention="markers")
    size = prepared_size(longer)
    longer = dataclasses.replace(longer, model=tiny_model(size, 8))
    with pytest.raises(InputError, match=r"data\.convention \(generic → markers\), .*the tokenizer; set them back"):
        loop.run(longer)

    assert loop.run(cfg) == 0
    assert [step for step, _ in report.losses(cfg.out)] == [1, 2, 3, 4, 5, 6]
    result = json.loads((cfg.out / loop.RESULT).read_text())
    assert list(result["held_out"]) == ["cats", "hounds", "drawings"]
    for judged in result["held_out"].values():
        assert 0 < judged["loss"] < 20
        assert 0 <= judged["accuracy"] <= 1
        assert judged["tokens"] > 6
    assert 0 <= result["waiting"] < 1
    assert result["compiles_in_loop"] == 0
    assert "loss per token on documents never trained on: cats " in capsys.readouterr().out

    whole = dataclasses.replace(cfg, out=tmp_path / "whole")
    assert loop.run(whole) == 0
    assert report.losses(whole.out) == report.losses(cfg.out)
    again = json.loads((whole.out / loop.RESULT).read_text())
    assert again["held_out"] == result["held_out"]


def prepared_size(cfg):
    """The vocabulary that a config's tokenizer has, as the refusal says it."""
    with pytest.raises(InputError, match=r"model\.decoder\.vocab is \d+ but the tokenizer has \d+ ids") as error:
        prepare_data(cfg)
    return int(str(error.value).split("set it to ")[1].split(",")[0])


def test_what_does_not_fit_is_refused_by_name(cfg):
    with pytest.raises(InputError, match=r"^There is no convention .chatlm.: did you mean .chatml."):
        prepare_data(changed(cfg, convention="chatlm"))
    # <|text_start|>, <|text_end|>, and a pair and a placeholder of video and of audio are added at the end.
    assert prepared_size(changed(cfg, convention="markers")) == VOCAB + 8
    with pytest.raises(InputError, match=r"model\.decoder\.vocab is 399 but the tokenizer has 400 ids; set it to 400"):
        prepare_data(dataclasses.replace(cfg, model=tiny_model(VOCAB - 1, 8)))
    # A table that is padded to a round number has rows that no id names.
    padded = prepare_data(dataclasses.replace(cfg, model=tiny_model(VOCAB + 16, 8)))
    assert padded.tokenizer.vocab.size == VOCAB
    with pytest.raises(InputError, match=r"nowhere\.model"):
        prepare_data(changed(cfg, tokenizer=cfg.data.tokenizer.parent / "nowhere.model"))
    with pytest.raises(InputError, match=r"^Source 'cats' has 40 documents, and data\.held_out is 40"):
        prepare_data(changed(cfg, held_out=40))
    assert not cfg.out.exists()


def test_what_a_run_is_fed_with(cfg):
    data = prepare_data(cfg)
    assert list(data.fingerprints) == list(data.evaluation.sources) == ["cats", "hounds", "drawings"]
    assert prepare_data(cfg).fingerprints == data.fingerprints
    held = {d.id for source in data.evaluation.sources.values() for d in source.documents}
    assert len(held) == 18
    # One shape for all, so one program; every document once.
    shapes = {source.plan.buckets for source in data.evaluation.sources.values()}
    assert len(shapes) == 1
    for source in data.evaluation.sources.values():
        assert sorted(n for step in source.plan.steps for row in step.rows for n in row) == list(range(6))
    documents = [data.training.ids(step, row) for step in range(6) for row in range(8)]
    trained = [id for ids in documents for id in ids]
    assert len(trained) > 48
    assert not held & {id.split(":", 1)[1] for id in trained}
    shares = [sum(id.startswith((f"{name}:", f"{name}~")) for id in trained) for name in data.fingerprints]
    assert sum(shares) == len(trained)
    assert shares[1] > shares[0] > 0 < shares[2]


def differences(before, now):
    """What hinders resuming with another config."""
    data = prepare_data(before)
    saved = {"config": configs.flatten(before), "tokenizer": data.tokenizer.fingerprint, "datasets": data.fingerprints}
    return resume.differences(json.loads(json.dumps(saved)), now, prepare_data(now))


def test_the_order_of_sources_is_the_streams(cfg):
    cats, dogs, drawn = cfg.data.sources
    plain = changed(cfg, sources=(cats, dataclasses.replace(dogs, weight=1.0, name="", schema="messages"), drawn))
    assert differences(plain, plain) == []
    cats, dogs, drawn = plain.data.sources
    swapped = changed(plain, sources=(dogs, cats, drawn))
    assert differences(plain, swapped) == ["the order of data.sources (cats, dogs, drawings → dogs, cats, drawings)"]


def test_memory_may_change_where_it_changes_nothing(cfg):
    def with_packing(**more):
        return dataclasses.replace(cfg, packing=dataclasses.replace(cfg.packing, **more))

    assert differences(cfg, with_packing(memory=512)) == []
    assert differences(with_packing(holes=3), with_packing(holes=3, memory=512)) == ["packing.memory (1024 → 512)"]


def test_patience_may_be_raised_to_go_on(cfg):
    """As the run that ends for want of it says."""
    assert differences(cfg, dataclasses.replace(cfg, update=Update(patience=99))) == []
    assert differences(cfg, dataclasses.replace(cfg, update=Update(spike=9.0))) == ["update.spike (0.0 → 9.0)"]


def test_whole_epochs_take_as_many_steps_as_they_take(cfg):
    cats, dogs, _ = cfg.data.sources
    epochs = changed(cfg, sources=(cats, dataclasses.replace(dogs, weight=1.0)), epochs=2)
    with pytest.raises(
        InputError, match=r"data\.epochs is 2, which takes \d+ steps .* steps is 6; set steps to"
    ) as told:
        prepare_data(epochs)
    steps = int(str(told.value).split("set steps to ")[1].split(",")[0])
    plan = prepare_data(dataclasses.replace(epochs, steps=steps)).training.plan
    assert sum(len(row) for step in plan.steps for row in step.rows) == 2 * (34 + 34)


def test_nothing_held_out(cfg):
    evaluation = prepare_data(changed(cfg, held_out=0)).evaluation
    assert evaluation.sources == {}
    assert evaluation.judge({}, cfg.out) == {"held_out": {}}
    assert evaluation.said({"held_out": {}}).endswith("none were held out")


def test_answers_are_judged_whole(cfg):
    """What a document weighs in the judgement are its trained tokens: all of an answer and the end of its turn."""
    source = prepare_data(cfg).evaluation.sources["cats"]
    expected = 0
    for document in source.documents:
        answer = document.spans[-1].text
        expected += len(source.layout.keywords["tokenizer"].encode(answer)) + 1
    assert sum(batch.weight.sum() for batch in (source[n] for n in range(len(source)))) == expected
