"""The benchmark of the train step: what it says is what was run."""

import dataclasses
import json

import jax
import pytest
from tiny import tiny_run

from mmjax import bench
from mmjax.core import config, spec, tree
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, Rules, make_mesh
from mmjax.models import flops
from mmjax.nn import lora
from mmjax.train import cluster, presets, stages
from mmjax.train.prepare import prepare_data

STEPS = 4


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(what is said, as JSON at the end, the run, where it would be kept), of a stage that trains adapters."""
    folder = tmp_path_factory.mktemp("bench")
    made = presets.stages(["connector:3", "lora+connector:5"])
    cfg = tiny_run(folder / "out", mesh=MeshConfig(data=-1), lora=lora.Config(2), stages=made, steps=8)
    patch = pytest.MonkeyPatch()
    printed = []
    with patch.context() as m:
        m.setattr(config, "load", lambda _: cfg)
        m.setattr("builtins.print", lambda *x, **_: printed.append(" ".join(map(str, x))))
        arguments = ["anything", "--steps", str(STEPS), "--stage", "2", "--json", "--packing.buckets", "1"]
        assert bench.run(arguments) == 0
    return printed, cfg, folder


def test_the_last_line_is_one_json_object(result):
    printed, cfg, folder = result
    found = json.loads(printed[-1])
    assert (found["device"], found["devices"]) == (jax.devices()[0].device_kind, jax.device_count())
    assert found["steps"] == STEPS
    assert found["compiles"] == 1
    spread = found["step_seconds"]
    assert 0 < spread["least"] <= spread["quarter"] <= spread["median"] <= spread["three_quarters"] <= spread["most"]
    part = stages.numbered(cfg, 2)
    assert found["parameters"] == spec.count(part.spec)
    assert found["trained"] == spec.count(tree.choose(part.spec, part.cfg.update.frozen)[1]) < found["parameters"]
    assert found["memory_bytes"] > 4 * found["parameters"] + 8 * found["trained"]  # float32, the optimizer's moments
    assert "compiler" in found["memory_is"]  # CPUs do not count
    assert "measured" in found["peak_is"]
    for name in ("MFU", "useful tokens", "memory", "compiling"):
        assert name in printed[0]
    assert not list(folder.iterdir())  # nothing is written


def test_tokens_and_flops_are_those_of_the_documents(result):
    printed, cfg, _ = result
    found = json.loads(printed[-1])
    short = bench._short(cfg, bench.WARM + STEPS)
    short = dataclasses.replace(short, packing=dataclasses.replace(short.packing, buckets=1))
    source = prepare_data(short, *cluster.parts(make_mesh(cfg.mesh), Rules())).training
    tokens, work = 0, 0.0
    how = {"frozen": stages.numbered(cfg, 2).cfg.update.frozen, "adapters": cfg.lora}
    for step in range(bench.WARM, bench.WARM + STEPS):
        for row in source.plan.steps[step].rows:
            laid = [source.layout(source.plan.document(source.documents, n)) for n in row]
            grids = [p.views for x in laid for p in x.pieces if p.grid is not None]
            pictures = tuple(a * b * c for views in grids for a, b, c in views)
            lengths = tuple(x.tokens for x in laid)
            tokens += sum(lengths)
            work += flops.of_row(cfg.model, flops.Row(lengths, pictures), **how).total
    assert found["tokens_per_step"] == tokens / STEPS
    assert found["flops_per_step"] == pytest.approx(work / STEPS)
    assert found["mfu"] * found["peak_flops"] * tokens == pytest.approx(work * found["tokens_per_second"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--steps", "1"], "time at least 2"),
        (["--steps", "many"], "invalid int value"),
        (["quickstrat"], "did you mean 'quickstart'"),
    ],
)
def test_what_cannot_be_is_said(arguments, message):
    with pytest.raises(InputError, match=message):
        bench.run(arguments)


def test_a_stage_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="--stage is 2, and the run has 1"):
        bench.measure(tiny_run(tmp_path), 2, 2)


def test_the_config_may_be_left_out():
    assert bench.options([])[1] == ["quickstart"]
    assert bench.options(["--json", "--mesh.fsdp", "2"])[1] == ["quickstart", "--mesh.fsdp", "2"]
    assert bench.options(["--help"])[1] == ["--help"]


def test_the_peak_of_a_chip_is_its_makers(monkeypatch):
    class Chip:
        device_kind, platform = "TPU v5 lite", "tpu"

    monkeypatch.setattr(jax, "devices", lambda: [Chip] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert bench._peak("bfloat16")[0] == 4 * 197e12
