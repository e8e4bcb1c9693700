"""Runs whose rows bound more than tokens and pictures: answers of a second stream, what connectors read beside."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image as Pillow
from tiny import tiny_model, tiny_run
from tokenizer_files import wordpiece

from mmjax.connectors import qformer
from mmjax.core.errors import InputError
from mmjax.data import drawings, index
from mmjax.data.sets import Files, Mixed
from mmjax.models import encoder_decoder
from mmjax.sequence.interleave import Config
from mmjax.train import prepare
from mmjax.train.config import Packing

VOCAB = 1024


def model():
    plain = tiny_model(VOCAB, 8)
    blocks = dataclasses.replace(plain.decoder.blocks, rope=None)
    return dataclasses.replace(
        plain, decoder=encoder_decoder.Config(VOCAB, blocks, dataclasses.replace(blocks, look=blocks.width))
    )


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """Short questions and answers of one to twelve words, of about three tokens each."""
    monkeypatch.setattr(index, "WINDOW", 64)
    records = [
        {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red cat " * (1 + n % 6)}]}
        for n in range(150)
    ]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "words.model").write_bytes(drawings.tokenizer_model())
    data = Mixed((Files(tmp_path / "said.jsonl", schema="messages"),), tmp_path / "words.model", held_out=40)
    packing = Packing(rows=2, tokens=64, buckets=2)
    sequence = Config(position="sequential", answer=40, start=2)
    return tiny_run(tmp_path / "run", model=model(), data=data, packing=packing, sequence=sequence, steps=8)


def replaced(cfg, **changes):
    return dataclasses.replace(cfg, **changes)


@pytest.mark.parametrize("shapes", [(), ((8, 1),)], ids=["chosen", "given"])
def test_answers_of_every_row_fit(cfg, shapes):
    """Questions of a row could be many times as many as its answers: without a count of these the batch overflows."""
    made = prepare.prepare_data(replaced(cfg, packing=dataclasses.replace(cfg.packing, shapes=shapes)))
    sources = [made.training, *made.evaluation.sources.values()]
    full = []
    for source in sources:
        assert {bucket.answers for bucket in source.plan.buckets} == {40}
        for batch in source:
            there = batch.answer.order >= 0
            assert batch.answer.tokens.shape == (2, 40)
            assert (batch.order >= 0).any(1).tolist() == there.any(1).tolist()
            full += there.sum(1).tolist()
        laid = [source.layout(source.documents[n]) for step in source.plan.steps for row in step.rows for n in row]
        assert np.sum(source.plan.used, axis=0).tolist() == np.sum([x.size for x in laid], axis=0).tolist()
    assert np.median(full) > 30
    head, *lines = made.training.plan.table().splitlines()[:-1]
    assert "answer tokens" in head
    assert {len(line) for line in lines} == {len(head)}


def test_an_answer_that_never_fits_is_refused_at_once(cfg):
    short = replaced(cfg, sequence=dataclasses.replace(cfg.sequence, answer=12))
    with pytest.raises(
        InputError, match=r"number \d+ \('said:said/\d+'\) has an answer of \d+ tokens, .* room for 12;"
    ):
        prepare.prepare_data(short)
    with pytest.raises(InputError, match=r"\('said:said/\d+'\) \(.* answer tokens\) fits none of the buckets"):
        prepare.prepare_data(replaced(short, packing=dataclasses.replace(cfg.packing, shapes=((8, 1),))))


def test_documents_that_no_batch_can_hold_are_refused_at_once(cfg, tmp_path):
    """Not steps later, when they come: a picture behind what is learnt; a question longer than the connector reads."""
    Pillow.new("RGB", (16, 16)).save(tmp_path / "one.png")
    talk = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat."}]
    late = {"id": "late", "image": "one.png", "conversations": [*talk, {"from": "human", "value": "<image>and this?"}]}
    long = {"id": "long", "image": "one.png", "conversations": [{"from": "human", "value": "<image>" + "a cat " * 9}]}
    for record in (late, long):
        (tmp_path / f"{record['id']}.json").write_text(json.dumps([record]))
    sources = [(Files(tmp_path / f"{name}.json"),) for name in ("late", "long")]
    with pytest.raises(InputError, match=r"'late:late/late' shows a picture behind the first token that is learnt"):
        prepare.prepare_data(replaced(cfg, data=dataclasses.replace(cfg.data, sources=sources[0], held_out=0)))
    (tmp_path / "tokenizer.json").write_text(json.dumps(wordpiece()))
    reads = qformer.Config(16, 16, 3, 2, 2, 24, outputs=16, text=True, vocab=400)
    plain = dataclasses.replace(tiny_model(VOCAB, 8), connector=reads)
    data = dataclasses.replace(cfg.data, sources=sources[1], held_out=0, reader=tmp_path)
    asking = replaced(cfg, model=plain, data=data, sequence=Config(instruction=8))
    with pytest.raises(InputError, match=r"'long:long/long' has \d+ tokens for the connector .* is 8; set it to"):
        prepare.prepare_data(asking)
