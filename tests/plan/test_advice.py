"""What the planner tries where a step does not fit."""

import dataclasses
import math
from pathlib import Path

import pytest
from tiny import tiny_run

from mmjax.core import config
from mmjax.core.meshes import MESH_AXES, MeshConfig
from mmjax.models import flops, vlm
from mmjax.nn import lora, transformer
from mmjax.plan import advice, program
from mmjax.plan.advice import Advice, Largest
from mmjax.plan.program import Memory, Program, TooLarge, with_flag
from mmjax.sequence.batch import Bucket
from mmjax.train import presets, stages
from mmjax.train.config import Objective, Packing, Update
from mmjax.train.prepare import fixed_buckets, refuse_model, refuse_rows

SIZES = {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 1}


def run(tokens: int = 1024, **changes):
    packing = Packing(rows=16, tokens=tokens, shapes=((64, 2),))
    return tiny_run(Path("unused"), packing=packing, mesh=MeshConfig(data=-1), **changes)


def steps(cfg, state: float = 1.0, memory: float = 16.0) -> list[dict[str, str]]:
    return [dict(change.flags) for change, _, _ in advice.ladder(cfg, SIZES, state, memory)]


def test_each_change_stands_on_those_before():
    found = steps(run(objective=Objective(chunk=1024)))
    assert found[:2] == [
        {"model.decoder.blocks.remat": r, "model.vision.blocks.remat": r} for r in ("attention", "full")
    ]
    assert found[2:4] == [{"update.accumulate": "2"}, {"update.accumulate": "4"}]  # four rows on each chip
    assert found[4] == {"objective.chunk": "256"}
    assert found[5:7] == [{"mesh.data": "2", "mesh.fsdp": "2"}, {"mesh.data": "1", "mesh.fsdp": "4"}]
    assert found[7:] == [{"packing.tokens": "512", "packing.shapes": "40 1"}]  # not less than a picture of 6 × 6
    assert not [s for s in steps(run(objective=Objective(chunk=4096), tokens=128)) if "objective.chunk" in s]
    *_, (_, last, _) = advice.ladder(run(), SIZES, 1.0, 16.0)
    assert (last.model.decoder.blocks.remat, last.update.accumulate, last.mesh.fsdp) == ("full", 4, 4)


def test_shorter_rows_hold_whole_pictures():
    packing = Packing(rows=16, tokens=4096, shapes=((576, 1), (2880, 5)))
    found = [s for s in steps(dataclasses.replace(run(), packing=packing)) if "packing.tokens" in s]
    assert found == [
        {"packing.tokens": "2048", "packing.shapes": "576 1 1152 2"},
        {"packing.tokens": "1024", "packing.shapes": "576 1"},
    ]


def test_a_state_that_fills_the_chip_is_sharded_first():
    assert steps(run(), state=15.0)[:1] == [{"mesh.data": "2", "mesh.fsdp": "2"}]


def test_the_first_that_fits_is_the_advice():
    made = Program(Bucket(16, 1024, 64, 2), Memory(1, 1, 1, 1, 1), "", 1.0)
    told = []

    def attempt(cfg):
        return made if cfg.update.accumulate == 2 else TooLarge(2.0, 1.0)

    found = advice.find(run(), SIZES, 1.0, 16.0, attempt, told.append)
    assert isinstance(found, Advice)
    assert found.flags == "--model.decoder.blocks.remat full --model.vision.blocks.remat full --update.accumulate 2"
    assert found.program is made
    assert found.standing == found.changes[1:]
    assert len(told) == 3
    assert advice.find(run(), SIZES, 1.0, 16.0, lambda cfg: TooLarge(2.0, 1.0)) is None


def test_what_cannot_hold_the_state_is_not_compiled():
    tried = []
    advice.find(run(), SIZES, 40.0, 16.0, lambda cfg: tried.append(cfg.mesh.fsdp) or TooLarge(2.0, 1.0))
    assert min(tried) == 4


def test_the_largest_picture_stays_in_its_row():
    """One of 17 views is not cut in two; nor are rows shorter than it, where it stands in them."""
    cfg = config.load("smolvlm")
    assert advice.largest(cfg) == Largest(17 * 64, 17 * 1024, 17)
    assert not [s for s in steps(cfg) if "packing.tokens" in s]
    two = dataclasses.replace(cfg, packing=dataclasses.replace(cfg.packing, tokens=8192, shapes=((2 * 17 * 1024, 34),)))
    assert [s for s in steps(two) if "packing.tokens" in s] == [
        {"packing.tokens": "4096", "packing.shapes": "17408 17"}  # and no shorter: there is one picture left
    ]
    assert advice.largest(config.load("pixtral")) == Largest(64 * 64 + 63, 64 * 64, 1)  # and ends of rows
    # Beside the sequence it takes no tokens of it.
    assert advice.largest(config.load("idefics")) == Largest(0, 256, 1)


def test_an_answer_is_shortened_with_its_row():
    cfg = dataclasses.replace(config.load("blip2_flan_t5"), objective=Objective(chunk=4096))
    found = steps(cfg)
    assert [s for s in found if "packing.tokens" in s] == [
        {"packing.tokens": "512", "packing.shapes": "2048 8", "sequence.answer": "256"},
        {"packing.tokens": "256", "packing.shapes": "1024 4", "sequence.answer": "128"},
    ]
    # No more logits exist at a time than tokens are learnt.
    assert {"objective.chunk": "256"} in found
    few = dataclasses.replace(cfg, sequence=dataclasses.replace(cfg.sequence, answer=256))
    assert not [s for s in steps(few) if "objective.chunk" in s]


def test_what_stays_as_it_is_before_anything_trained_needs_no_remat():
    cfg = run(update=Update(frozen=("vision", "decoder")))
    through = advice.reached(stages.numbered(cfg))
    assert through == ("connector", "decoder")  # gradients go through the frozen decoder
    assert advice.remats(cfg, through) == ("model.decoder.blocks.remat",)
    found = [dict(change.flags) for change, *_ in advice.ladder(cfg, SIZES, 1.0, 16.0, through)]
    assert found[0] == {"model.decoder.blocks.remat": "attention"}
    adapted = run(lora=lora.Config(2), stages=presets.stages(["lora:6"]))
    assert advice.reached(stages.numbered(adapted)) == ("decoder",)


def stacks(cfg: object, name: str) -> list[str]:
    """Every transformer anywhere in a config."""
    if isinstance(cfg, transformer.Config):
        return [name]
    if not dataclasses.is_dataclass(cfg):
        return []
    return [at for f in dataclasses.fields(cfg) for at in stacks(getattr(cfg, f.name), f"{name}.{f.name}")]


@pytest.mark.parametrize("name", config.names())
def test_all_that_can_be_advised_is_a_setting_of_every_config(name):
    """Step by step a run that can be; and as flags, all together, what the command line makes of them."""
    cfg = config.load(name)
    assert sorted(advice.remats(cfg)) == sorted(f"{at}.remat" for at in stacks(cfg.model, "model"))
    rows = cfg.packing.rows
    sizes = {axis: getattr(cfg.mesh, axis) for axis in MESH_AXES}
    sizes |= {axis: math.gcd(8, rows) for axis, size in sizes.items() if size == -1}
    for of in remats_none(cfg), cfg:
        last, flags = of, {}
        for change, new, _ in advice.ladder(of, sizes, 1.0, 16.0):
            assert new != last
            refuse_model(new)
            refuse_rows(new, new.mesh.data * new.mesh.fsdp)
            for bucket in fixed_buckets(new):
                program.batch_of(new, bucket)
                media = flops.media_tokens(new.model, flops.full_row(bucket, new.sequence))
                assert new.model.decoder.cross or media <= bucket.tokens
            last, flags = new, flags | dict(change.flags)
        assert flags
    words = [w for flag, value in flags.items() for w in (f"--{flag.replace('_', '-')}", *value.split())]
    assert config.from_command_line("mmjax.plan", [name, *words], "") == last


def remats_none(cfg):
    """Where everything is kept, so that all of it can be advised."""
    for flag in advice.remats(cfg):
        cfg = with_flag(cfg, flag, "none")
    return cfg


def test_rows_of_text_alone_become_shorter_too():
    text = vlm.Config(None, None, run().model.decoder)
    cfg = dataclasses.replace(run(model=text, resolution=None), packing=Packing(rows=16, tokens=1024))
    assert advice.remats(cfg) == ("model.decoder.blocks.remat",)
    assert advice.reached(stages.numbered(cfg)) == ("decoder",)
    found = steps(cfg)
    assert found[0] == {"model.decoder.blocks.remat": "attention"}
    assert found[-2:] == [{"packing.tokens": "512"}, {"packing.tokens": "256"}]


def test_flags_reach_nested_fields():
    cfg = with_flag(run(), "model.vision.blocks.remat", "full")
    assert cfg.model.vision.blocks.remat == "full"
    assert dataclasses.replace(cfg, model=run().model) == run()
