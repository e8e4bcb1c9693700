"""MiniGPT-4, a config and nothing else: its sizes, what is trained of it, its prompt, and a run of a tiny one."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import sentencepiece
from PIL import Image as Pictures
from tokenizer_files import pieces

from mmjax.core import config, spec, tree
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.models import vlm
from mmjax.nn import rope
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.layout import layout
from mmjax.tokenizers import conventions, text
from mmjax.tokenizers.chat import Chat
from mmjax.tokenizers.resolution import Fixed
from mmjax.train import loop
from mmjax.train.config import Config, Packing

QUESTION, ANSWER = "The quick brown fox?", "The lazy dog."


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(pieces())
    return path


def test_only_the_linear_map_is_trained():
    cfg = config.load("minigpt4")
    of = vlm.spec(cfg.model)
    parts = {name: spec.count(part) for name, part in of.items()}
    assert parts == {"vision": 985_952_256, "connector": 105_162_240 + 769 * 4096, "decoder": 6_738_415_616}
    _, moved = tree.choose(of, cfg.update.frozen)
    shapes = {name: p.shape for name, p in tree.flatten(moved).items()}
    assert shapes == {"connector/projection/kernel": (768, 4096), "connector/projection/bias": (4096,)}


def test_the_prompt_is_tokenized_as_in_the_paper_s_code(tokenizer):
    """Three strings apart, by SentencePiece itself; only the answer and its ### are learnt."""
    cfg = config.load("minigpt4")
    assert cfg.data.convention.name not in conventions.CONVENTIONS  # the config's own, and nobody else's
    chat = Chat(text.load(tokenizer), conventions.find(cfg.data.convention))
    assert chat.size == text.load(tokenizer).size  # nothing is added to Vicuna's vocabulary
    document = Document("d", (Image(30, 40, b""), Text(QUESTION), Text(ANSWER, "assistant", True)))
    laid = layout(document, chat, cfg.resolution, lambda grid: cfg.model.connector.per_picture)
    own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.read_bytes())
    before, after, answer = map(own.encode, ("###Human: <Img>", f"</Img> {QUESTION} ###Assistant: ", f"{ANSWER}###"))
    found, learnt, media = [], [], 0
    for piece in laid.pieces:
        if piece.grid is not None:
            media, place = piece.length, len(found)
        found += piece.ids
        learnt += piece.ids if piece.train else ()
    assert (media, place) == (32, 1 + len(before))
    assert found == [own.bos_id(), *before, *after, *answer]
    assert learnt == answer


def tiny(folder, tokenizer) -> Config:
    """The published config with a width of 16 or so everywhere, on two pictures."""
    lines = []
    for n, name in enumerate(("fox", "dog")):
        Pictures.fromarray(np.full((20 + n, 30, 3), 90 * n, np.uint8)).save(folder / f"{name}.png")
        shown = [{"type": "image", "image": f"{name}.png"}, {"type": "text", "text": QUESTION}]
        turns = [{"role": "user", "content": shown}, {"role": "assistant", "content": f"The {name}."}]
        lines.append(json.dumps({"id": name, "messages": turns}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    cfg = config.load("minigpt4")
    small = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head": 8, "hidden": 24}
    vision, connector, language = cfg.model.vision, cfg.model.connector, cfg.model.decoder
    model = dataclasses.replace(
        cfg.model,
        vision=dataclasses.replace(
            vision,
            embed=dataclasses.replace(vision.embed, width=16),
            blocks=dataclasses.replace(vision.blocks, **small),
            table=dataclasses.replace(vision.table, rows=2, columns=2),
        ),
        connector=dataclasses.replace(connector, inputs=16, width=12, layers=2, heads=2, hidden=24, outputs=16),
        decoder=dataclasses.replace(
            language,
            vocab=text.load(tokenizer).size,
            blocks=dataclasses.replace(language.blocks, **small, rope=rope.Config(8, (4,))),
        ),
    )
    return dataclasses.replace(
        cfg,
        model=model,
        data=dataclasses.replace(
            cfg.data, sources=(sets.Files(folder / "chats.jsonl"),), tokenizer=tokenizer, held_out=0
        ),
        out=folder / "run",
        steps=5,
        resolution=Fixed(14, 28, 28),
        packing=Packing(rows=2, tokens=256, shapes=((8, 2),)),
        optimizer=dataclasses.replace(cfg.optimizer, learning_rate=0.1),
        update=dataclasses.replace(cfg.update, compute="float32"),
        mesh=MeshConfig(data=1, fsdp=1),
    )


@pytest.mark.slow
def test_a_tiny_one_trains(tmp_path, tokenizer, monkeypatch):
    make = loop.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make(cfg, jax.devices()[:1]))
    assert loop.run(tiny(tmp_path, tokenizer)) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
