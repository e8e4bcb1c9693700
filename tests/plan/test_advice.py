"""What the planner tries where a step does not fit."""

import dataclasses
from pathlib import Path

from tiny import tiny_run

from mmjax.core.meshes import MeshConfig
from mmjax.plan import advice
from mmjax.plan.advice import Advice
from mmjax.plan.program import Memory, Program, TooLarge, with_flag
from mmjax.sequence.batch import Bucket
from mmjax.train.config import Objective, Packing

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
    assert found[7:] == [{"packing.tokens": "512", "packing.shapes": "32 1"}]  # not less than a picture
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


def test_flags_reach_nested_fields():
    cfg = with_flag(run(), "model.vision.blocks.remat", "full")
    assert cfg.model.vision.blocks.remat == "full"
    assert dataclasses.replace(cfg, model=run().model) == run()
