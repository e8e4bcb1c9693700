"""The whole run, for systems that fuse in other ways: a system is a config."""

import dataclasses
import json

import pytest
from tiny import tiny_model, tiny_run

from mmjax.connectors import perceiver, qformer
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig
from mmjax.models import encoder_decoder
from mmjax.nn import cross_attention
from mmjax.sequence.budget import Budget
from mmjax.sequence.interleave import Config
from mmjax.tokenizers.resolution import Native
from mmjax.train import loop

MESH = MeshConfig(2, 2, 2)


def flamingo():
    plain = tiny_model(1024, 8)
    cross = cross_attention.Config(16, 16, 2, 8, 24, every=2)
    return dataclasses.replace(
        plain,
        connector=perceiver.Config(16, 16, 4, 1, 2, 8, 24),
        decoder=dataclasses.replace(plain.decoder, cross=cross),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model": flamingo(), "sequence": Config(cross="last_image")},
        {"sequence": Config(see="prefix", position="sequential")},
    ],
    ids=["flamingo", "prefix-LM"],
)
def test_runs(tmp_path, changes, capsys):
    cfg = tiny_run(tmp_path, mesh=MESH, **changes)
    assert loop.run(cfg) == 0
    result = json.loads((tmp_path / loop.RESULT).read_text())
    assert result["compiles"] == len(result["buckets"])
    assert result["compiles_in_loop"] == 0
    assert result["holes"] == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert f"{len(result['buckets'])} programs to compile" in capsys.readouterr().out


@pytest.mark.slow
def test_a_budget_lowers_resolutions_and_says_so(tmp_path, capsys):
    cfg = tiny_run(tmp_path, mesh=MESH, steps=2, budget=Budget(tokens=40, over=("resolution", "images")), save_every=1)
    assert loop.run(cfg) == 0
    assert "documents were over the budget; the first, drawings/0/" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"'drawings/0/\d+' takes \d+ tokens .*over the budget of 20 tokens"):
        loop.run(tiny_run(tmp_path / "other", mesh=MESH, budget=Budget(tokens=20)))


def test_descriptors_must_be_those_the_model_reads(tmp_path):
    with pytest.raises(InputError, match=r"sequence\.cross is 'none'"):
        loop.run(tiny_run(tmp_path, mesh=MESH, model=flamingo()))
    wrong = dataclasses.replace(tiny_model(1024, 8), placeholder=7)
    with pytest.raises(InputError, match=r"model\.placeholder is 7 but the tokenizer's image token is 6"):
        loop.run(tiny_run(tmp_path, mesh=MESH, model=wrong))
    plain = tiny_model(1024, 8)
    reads = qformer.Config(16, 16, 3, 2, 2, 24, outputs=16, text=True, vocab=40)
    asking = {"model": dataclasses.replace(plain, connector=reads), "mesh": MESH}
    with pytest.raises(InputError, match=r"sequence\.instruction is 0"):
        loop.run(tiny_run(tmp_path, **asking))
    with pytest.raises(InputError, match=r"reads a text beside each picture, and data\.reader is None"):
        loop.run(tiny_run(tmp_path, **asking, sequence=Config(instruction=8)))
    blocks = dataclasses.replace(plain.decoder.blocks, rope=None)
    two = encoder_decoder.Config(1024, blocks, dataclasses.replace(blocks, look=16))
    parted = {"model": dataclasses.replace(plain, decoder=two), "mesh": MESH}
    with pytest.raises(InputError, match=r"sequence\.answer is 0"):
        loop.run(tiny_run(tmp_path, **parted))
    with pytest.raises(InputError, match="train it on files"):
        loop.run(tiny_run(tmp_path, **parted, sequence=Config(answer=64)))
    assert Native(8).lowered(0.5).max_pixels == Native(8).max_pixels // 2
    assert not any(tmp_path.iterdir())
