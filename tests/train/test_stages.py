"""Stages: what a command line may say of them, what each trains, and where each begins."""

import dataclasses

import pytest
from tiny import tiny_run

from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.nn import lora
from mmjax.train import parameters, presets, stages
from mmjax.train.config import Features, Optimizer, Stage, Update


def run(path, *texts, **changes):
    made = presets.stages(texts)
    cfg = tiny_run(path, stages=made, steps=sum(stage.steps for stage in made), lora=lora.Config(2))
    return dataclasses.replace(cfg, **changes)


def trained(part):
    return set(tree.flatten(tree.choose(part.spec, part.cfg.update.frozen)[1]))


def test_presets_patterns_and_rates():
    one, two, three = presets.stages(["connector:200", "lora+decoder/norm:500:3e-4", "vision/*:7"])
    assert one == Stage("connector", 200, ("connector",), 1e-3)
    assert two == Stage("lora+decoder/norm", 500, ("*/kernel/a", "*/kernel/b", "decoder/norm"), 3e-4)
    assert three == Stage("vision/*", 7, ("vision/*",), 0.0)
    less, all_but = presets.stages(["!decoder/norm+decoder+!lora:5", "everything+!vision:6"])
    assert less == Stage(less.name, 5, ("!decoder/norm", "decoder", "!*/kernel/a", "!*/kernel/b"), 2e-5)
    assert all_but.trains == ("*", "!vision")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("connector", "not NAME:STEPS"),
        ("connector:many", "not NAME:STEPS"),
        ("conector:5", "did you mean 'connector'"),
        ("everything+!visin:5", "did you mean 'vision'"),
        ("lora:5:fast", "learning rate 'fast'"),
        ("lora:0", "at least 1 step"),
        ("lora:5:-1", "a rate above 0"),
        ("lora:5:nan", "a rate above 0"),
    ],
)
def test_stages_that_cannot_be_read(text, message):
    with pytest.raises(InputError, match=message):
        presets.stages([text])


def test_what_each_stage_trains(tmp_path):
    parts = stages.parts(run(tmp_path, "connector:3", "lora+connector:2:0.5", "everything:4"))
    assert [(part.first, part.last, part.cfg.steps) for part in parts] == [(0, 3, 3), (3, 5, 2), (5, 9, 4)]
    assert [part.cfg.optimizer.learning_rate for part in parts] == [1e-3, 0.5, 2e-5]
    every = set(tree.flatten(parts[0].spec))
    connector = {name for name in every if name.startswith("connector/")}
    thin = {name for name in every if name.endswith(("/kernel/a", "/kernel/b"))}
    assert trained(parts[0]) == connector
    assert trained(parts[1]) == connector | thin
    assert len(thin) == 14
    assert trained(parts[2]) == {name for name in every if not name.endswith("/kernel/scale")}
    assert [stages.at(parts, step) for step in (0, 3, 4, 5, 6, 9)] == [0, 0, 1, 1, 2, 2]


def test_all_but_what_is_named(tmp_path):
    (part,) = stages.parts(run(tmp_path, "everything+!vision+!connector/down:3"))
    every = set(tree.flatten(part.spec))
    still = {n for n in every if n.startswith(("vision/", "connector/down/")) or n.endswith("/kernel/scale")}
    assert trained(part) == every - still
    (part,) = stages.parts(run(tmp_path, "!connector:3", update=Update(frozen=("!decoder", "!connector"))))
    assert trained(part) == {n for n in every - still if n.startswith("decoder/")}


def test_what_is_planned_and_timed_is_a_stage(tmp_path):
    both = run(tmp_path, "connector:3", "everything:4", lora=None)
    cfg = stages.numbered(both).cfg
    assert (cfg.stages, cfg.steps, sorted(cfg.update.frozen)) == ((), 3, ["decoder", "vision"])
    assert stages.numbered(both, 2) == stages.parts(both)[1]
    plain = tiny_run(tmp_path)
    assert stages.numbered(plain).cfg == plain
    for number in (0, 3):
        with pytest.raises(InputError, match=f"--stage is {number}, and the run has 2; give one of 1 to 2"):
            stages.numbered(both, number)


def test_what_no_stage_trains_lies_as_it_is_computed(tmp_path):
    cfg = run(tmp_path, "connector:3", "lora:2", base=tmp_path, update=Update(compute="bfloat16"))
    spec = tree.flatten(parameters.spec(cfg))
    assert spec["decoder/blocks/mlp/up/kernel/base"].dtype == spec["vision/blocks/mlp/up/kernel"].dtype == "bfloat16"
    for name in ("connector/up/kernel", "decoder/blocks/mlp/up/kernel/a", "decoder/norm/scale"):
        assert spec[name].dtype == "float32"
    every = parameters.spec(run(tmp_path, "lora:3", "everything:2", base=tmp_path, update=Update(compute="bfloat16")))
    assert {p.dtype for p in tree.flatten(every).values()} == {"float32"}


def test_features_are_kept_where_the_tower_is_frozen(tmp_path):
    first, second = stages.parts(run(tmp_path, "connector:3", "everything:2", features=Features(memory=5)))
    assert first.cfg.features.on
    assert not second.cfg.features.on
    with pytest.raises(InputError, match="every stage trains it"):
        stages.parts(run(tmp_path, "everything:2", features=Features(memory=5)))


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        (
            ["connector:3", "decodr/norm:2"],
            {},
            "'decodr/norm' cannot train decodr/norm: .* did you mean 'decoder/norm'",
        ),
        (["connector:3"], {"steps": 4}, "The stages have 3 steps, but steps is 4"),
        (["connector:3"], {"update": Update(frozen=("connector",))}, "'connector' names no parameter"),
        (["decoder/blocks/mlp/up/kernel/scale:3"], {}, "trains nothing"),
        (["connector+!connector:3"], {}, "trains nothing"),
        (
            ["everything+!decoder/nrm:3"],
            {},
            "the pattern '!decoder/nrm' names no parameter; did you mean '!decoder/norm'",
        ),
        (["connector:3"], {"stages": ()}, "has adapters .* and no stages"),
    ],
)
def test_runs_that_cannot_be(tmp_path, texts, changes, message):
    with pytest.raises(InputError, match=message):
        stages.parts(run(tmp_path, *texts, **changes))


def test_a_run_without_stages_is_one(tmp_path):
    cfg = tiny_run(tmp_path, optimizer=Optimizer(learning_rate=0.25))
    (part,) = stages.parts(cfg)
    assert part.cfg == cfg
    assert (part.first, part.last) == (0, cfg.steps)
