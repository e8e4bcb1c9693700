"""Fine-tuning InstructBLIP, whose Q-Former reads the question beside each picture."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_llava
import tokenizer_files
from PIL import Image as Pictures
from tiny_llava import CONTROLS

from mmjax.convert import huggingface
from mmjax.core.errors import InputError
from mmjax.sequence import batch as batches
from mmjax.sequence.batch import Bucket
from mmjax.sequence.buckets import ladder
from mmjax.sequence.document import Document, Text
from mmjax.train import finetune, loop, prepare, start
from mmjax.train.step import loss_fn

SMALL = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LONG = "What is this, and what is it that is all around it?"
ANSWERS = {"What?": "red", "Is it red?": "yes", LONG: "no"}


def write(path):
    """Like Salesforce/instructblip-vicuna-7b: pictures of four patches, two queries, BERT's words for the Q-Former."""
    spec = tokenizer_files.letters()
    image = max(t["id"] for t in spec["added_tokens"]) + 1
    spec["added_tokens"].append({"id": image, "content": "<image>", **tokenizer_files.FLAGS, "special": True})
    config = {
        "model_type": "instructblip",
        "image_token_index": image,
        "num_query_tokens": 2,
        "vision_config": {"hidden_size": 16, "patch_size": 4, "image_size": 8, **SMALL},
        "qformer_config": {"hidden_size": 12, "vocab_size": image + 7, "max_position_embeddings": 64, **SMALL},
        "text_config": {"model_type": "llama", "vocab_size": image + 7, "hidden_size": 16, **SMALL},
    }
    files = {
        "tokenizer.json": spec,
        "tokenizer_config.json": CONTROLS,
        "preprocessor_config.json": {"image_processor_type": "BlipImageProcessor", "size": {"height": 8, "width": 8}},
    }
    tiny_llava.saved(path, config, files)
    (path / "qformer_tokenizer").mkdir()
    (path / "qformer_tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer_files.letters()))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("instruct")
    write(path / "model")
    Pictures.new("RGB", (8, 8), (220, 30, 30)).save(path / "red.png")
    for file, n in (("train.json", 60), ("test.json", 3)):
        (path / file).write_text(json.dumps([conversation(i, *list(ANSWERS.items())[i % 3]) for i in range(n)]))
    return path


def conversation(i, question, answer):
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": str(i), "image": "red.png", "conversations": said}


def arguments(place, out, *more):
    given = ["--model", place / "model", "--data", place / "train.json", "--eval", place / "test.json"]
    shape = ["--packing.rows", 2, "--packing.buckets", 1, "--answer", 3, "--save-every", 9]
    return [str(a) for a in (*given, "--stages", "connector:3:3e-2", "--out", out, *shape, *more)]


def test_each_picture_has_its_own_question_beside_it(place, tmp_path):
    """Several in a row: each of the row's pictures is read with its document's words, and the loss hangs on them."""
    cfg, _ = finetune.config_of(arguments(place, tmp_path / "out"))
    its = start.both(place / "model")[1]
    assert cfg.sequence.instruction == ladder(len(its.reader.ids(LONG)), 16) > 16
    source = prepare.prepare_data(cfg).training
    batch = source[0]
    room, checked = cfg.sequence.instruction, 0
    for row, numbers in enumerate(source.plan.steps[0].rows):
        for n, number in enumerate(numbers):
            question = source.documents[number].spans[1].text
            at = slice(n * room, n * room + len(its.reader.ids(question)))
            assert batch.instruction.tokens[row, at].tolist() == its.reader.ids(question)
            assert set(batch.instruction.document[row, at].tolist()) == {n}
            checked += 1
    assert checked > 2
    params, asked = huggingface.load(place / "model").params, batch.instruction.tokens

    @jax.jit
    def loss(batch, tokens):
        return loss_fn(params, batch.replace(instruction=batch.instruction.replace(tokens=tokens)), cfg.model)[0]

    assert abs(float(loss(batch, asked)) - float(loss(batch, np.where(asked > 5, asked - 1, asked)))) > 1e-4


def test_questions_longer_than_there_is_room_for(place, tmp_path):
    cfg, _ = finetune.config_of(arguments(place, tmp_path / "out", "--sequence.instruction", "16"))
    with pytest.raises(
        InputError, match=r"Document '.*' has \d\d tokens for the connector to read .* is 16; set it to"
    ):
        prepare.prepare_data(cfg)
    cfg, _ = finetune.config_of(arguments(place, tmp_path / "out", "--data.reader", str(place)))
    with pytest.raises(InputError, match=r"leave data.tokenizer, data.reader and data.convention out"):
        prepare.prepare_data(cfg)


def test_a_text_without_pictures_may_be_longer(place):
    """Nothing is read beside them."""
    _, its = start.both(place / "model")
    its = dataclasses.replace(its, sequence=dataclasses.replace(its.sequence, instruction=16))
    said = Document("t", (Text(LONG), Text("no", "assistant", train=True)))
    assert start.beside(its, said) > 16
    size = start.layout_of(its)(said).tokens
    batch = batches.build([[its.example(said)]], Bucket(1, size, 4, 1), its.values, its.vocab, its.sequence)
    assert (batch.instruction.order < 0).all()


@pytest.mark.slow
def test_a_run_from_end_to_end(place, tmp_path, monkeypatch):
    devices, make = jax.devices()[:1], loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make(cfg, devices))
    out = tmp_path / "out"
    assert finetune.run(arguments(place, out, "--export", "merged")) == 0
    result = json.loads((out / loop.RESULT).read_text())
    assert result["held_out"]["test"]["loss"] < result["before"]["held_out"]["test"]["loss"]
    assert len(result["answers"]["test"]) == 3
    assert start.both(out / "merged")[1].reader.fingerprint == start.both(place / "model")[1].reader.fingerprint
