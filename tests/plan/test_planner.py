"""What the planner says and refuses, without a compiler."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from tiny import tiny_run

from mmjax import bench
from mmjax.core import config
from mmjax.core import spec as specs
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, make_mesh
from mmjax.models import encoder_decoder, vlm
from mmjax.nn import cross_attention, lora, transformer
from mmjax.plan import __main__ as command
from mmjax.plan import chips, planner, program, report
from mmjax.plan.chips import GIB
from mmjax.plan.program import State, TooLarge
from mmjax.sequence.batch import Bucket
from mmjax.tokenizers.resolution import Native
from mmjax.train import presets, stages
from mmjax.train.config import Optimizer, Packing

SHAPES = Packing(rows=8, tokens=128, shapes=((64, 2),))


def run(packing: Packing = SHAPES, **changes):
    return tiny_run(Path("unused"), packing=packing, mesh=MeshConfig(data=-1), **changes)


@pytest.fixture
def no_chips(monkeypatch):
    """The CPU's devices in the place of TPUs."""
    monkeypatch.setattr(chips, "devices", lambda of: jax.devices()[:4])


def test_help_says_what_is_not_planned(capsys, monkeypatch):
    monkeypatch.setattr(command, "set_environment", lambda: None)
    with pytest.raises(SystemExit):
        command.run([])
    assert "evaluate are not planned" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["nan", "inf", "-1"])
def test_memory_is_a_number(given):
    with pytest.raises(InputError, match=r"--memory is .*; give GiB"):
        command.options(["--memory", given])
    assert command.options(["--memory", "0.5"])[0].memory == 0.5


def test_memory_is_no_more_than_there_is():
    with pytest.raises(InputError, match=r"--memory is 16, but TPU v5e has 15.75 GiB"):
        planner.plan(run(), "v5e:2x2", memory=16.0)
    with pytest.raises(InputError, match="--memory is 80, but H100 80 GB has 79"):
        planner.plan(run(), "h100:8", memory=80.0)
    assert chips.topology("h100:8").most > chips.CHIPS["h100"].memory  # what JAX takes unless told


def test_json_has_numbers_alone(monkeypatch):
    monkeypatch.setattr(command, "set_environment", lambda: None)
    monkeypatch.setattr(config, "load", lambda _: run())
    monkeypatch.setattr(planner, "plan", lambda *a: ({"buckets": [], "mfu": float("nan")}, ""))
    with pytest.raises(ValueError, match="JSON"):
        command.run(["any", "--topology", "v5e:2x2", "--json"])
    monkeypatch.setattr(bench, "measure", lambda *a: {"mfu": float("nan")})
    monkeypatch.setattr(bench, "said", lambda found: "")
    with pytest.raises(ValueError, match="JSON"):
        bench.run(["any", "--json"])


def test_what_else_a_compiler_refuses_is_said_in_a_sentence(monkeypatch):
    cfg = run()
    mesh, bucket = make_mesh(cfg.mesh), program.buckets(cfg)[-1]

    def compiled(error: Exception):
        def refuses(*_):
            raise error

        monkeypatch.setattr(program, "compile_step", refuses)
        return program.compiled(stages.numbered(cfg), bucket, mesh)

    with pytest.raises(InputError, match=r"The compiler refuses the step of 8 rows × 128 tokens: INTERNAL: bad$"):
        compiled(jax.errors.JaxRuntimeError("INTERNAL: bad\nstack"))
    with pytest.raises(InputError, match=r"NotImplementedError$"):
        compiled(NotImplementedError())
    with pytest.raises(TypeError):  # a bug stays one
        compiled(TypeError("bug"))
    assert compiled(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 3G of 2G hbm")) == TooLarge(
        3.0 * GIB, 2.0 * GIB
    )


def test_a_v4_has_the_half_of_its_memory():
    def head(kind: str, limit: float) -> str:
        return report.head(chips.topology(kind), make_mesh(MeshConfig()), State(1.0, 1.0, 1, 1), limit)

    whole = chips.CHIPS["v4"].memory
    assert "one core's half of a v4's 32 GiB" in head("v4:2x2x2", whole)
    assert "half" not in head("v4:2x2x2", whole / 2) + head("v5e:4x2", whole)


def test_documents_that_are_not_there_are_told_from_what_else_is_wrong(monkeypatch):
    cfg = run(Packing(rows=8, tokens=128))

    def buckets(error: Exception, cause: Exception | None = None):
        def fails(_):
            raise error from cause

        monkeypatch.setattr(program, "prepare_data", fails)
        program.buckets(cfg)

    with pytest.raises(InputError, match=r"cannot be read here .* give patches and images"):
        buckets(InputError("cannot read 'chats.json'"), FileNotFoundError())
    with pytest.raises(InputError, match=r"^model.decoder.vocab is 5$"):
        buckets(InputError("model.decoder.vocab is 5"))
    with pytest.raises(InputError, match=r"resolution.patch is 4 but model.vision.embed.patch is 8"):
        program.buckets(run(resolution=Native(patch=4, min_pixels=64, max_pixels=48 * 48)))


def test_documents_are_read_once(no_chips, monkeypatch):
    """Not again for everything that is tried."""
    read, tried = [], []

    def prepared(cfg):
        read.append(cfg)
        plan = type("Plan", (), {"buckets": (Bucket(8, 128, 64, 2),)})
        return type("Data", (), {"training": type("Source", (), {"plan": plan})})

    monkeypatch.setattr(program, "prepare_data", prepared)
    monkeypatch.setattr(program, "compiled", lambda part, bucket, mesh: tried.append(bucket) or TooLarge(2.0, 1.0))
    found, text = planner.plan(run(Packing(rows=8, tokens=128)), "v5e:2x2")
    assert found["buckets"][0]["fits"] is False
    assert "DOES NOT FIT" in text
    assert len(read) == 1
    assert len(tried) > 2

    tried.clear()
    planner.plan(dataclasses.replace(run(), packing=dataclasses.replace(SHAPES, tokens=512)), "v5e:2x2")
    assert {b.tokens for b in tried} == {512, 256}


def test_tokens_that_look_elsewhere_are_not_planned(no_chips):
    plain, blocks = run(), transformer.Config(16, 1, 2, 2, 8, 24)
    two = encoder_decoder.Config(40, blocks, dataclasses.replace(blocks, look=16))
    beside = dataclasses.replace(plain.model.decoder, cross=cross_attention.Config(16, 16, 2, 8, 24, every=1))
    for language in (two, beside):
        cfg = dataclasses.replace(plain, model=dataclasses.replace(plain.model, decoder=language))
        with pytest.raises(InputError, match="leave --decode out"):
            planner.decoding(cfg, "v5e:2x2", 4, 96)


def test_adapters_are_planned_stage_by_stage(no_chips, monkeypatch):
    """The base has no optimizer's state, and no products for its own gradient."""
    monkeypatch.setattr(chips, "coordinates", lambda topology, devices: [(i, 0) for i in range(len(devices))])
    made = presets.stages(["connector:3", "lora+connector:2"])
    cfg = run(lora=lora.Config(4), stages=made, steps=5, optimizer=Optimizer())
    found, text = planner.plan(cfg, "v5e:2x2", stage=2)
    connector, every = (specs.count(spec) for spec in (vlm.spec(cfg.model)["connector"], vlm.spec(cfg.model)))
    # A and B of two layers: q, k, v, out; gate and up, down.
    thin = 2 * 4 * ((16 + 32) + 2 * (16 + 16) + (32 + 16) + 2 * (16 + 24) + (24 + 16))
    assert found["trained"] == connector + thin
    assert found["parameters"] == every + thin + 7 * 2  # and scales
    assert found["optimizer_bytes"] == pytest.approx(4 * 2 * found["trained"], abs=64)  # and counters
    (bucket,) = found["buckets"]
    assert bucket["flops"] > bucket["model_flops_per_chip"] > 0
    assert f"{found['trained']:,} that are trained" in text
    told = program.state_bytes(stages.numbered(cfg), make_mesh(cfg.mesh, jax.devices()[:4]))
    assert told.trained == connector
    with pytest.raises(InputError, match="--stage is 3"):
        planner.plan(cfg, "v5e:2x2", stage=3)


def test_the_next_token_reads_parameters_and_cache_once(no_chips, capsys, monkeypatch):
    """Compiled for the CPU's devices; and said in words, as JSON, and where it does not fit."""
    monkeypatch.setattr(command, "set_environment", lambda: None)
    monkeypatch.setattr(config, "load", lambda _: dataclasses.replace(run(), mesh=MeshConfig(data=2, fsdp=1, tensor=2)))
    monkeypatch.setattr(chips, "coordinates", lambda topology, devices: [(i, 0) for i in range(len(devices))])
    assert command.run(["any", "--topology", "v5e:2x2", "--decode", "4", "96", "--json"]) == 0
    *said, numbers = capsys.readouterr().out.strip().splitlines()
    found, blocks = json.loads(numbers), run().model.decoder.blocks
    keys = blocks.layers * (4 // 2) * (blocks.kv_heads // 2) * 96 * blocks.head  # of two rows and one head
    assert found["cache_bytes"] == 4 * (2 * keys + 2 * 96 + 1)  # and values, labels, the next place
    decoded = found["decode"]
    # XLA for CPUs copies; but no loop is unknown, and nothing is read as often as there are tokens.
    assert decoded["fits"]
    assert not decoded["unknown"]
    assert decoded["bytes"] > found["parameter_bytes"] + found["cache_bytes"]
    assert decoded["flops"] == pytest.approx(decoded["model_flops"], rel=0.3)
    assert any("tokens per second of all rows" in line for line in said)
    assert command.run(["any", "--topology", "v5e:2x2", "--decode", "4", "96", "--memory", "0.00001"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    with pytest.raises(InputError, match="--decode is 3 rows, which 2 devices"):
        command.run(["any", "--topology", "v5e:2x2", "--decode", "3", "96"])
    with pytest.raises(InputError, match="--all, --documents and --stage are a training step's"):
        command.run(["any", "--topology", "v5e:2x2", "--decode", "4", "96", "--all"])
    with pytest.raises(InputError, match="--all, --documents and --stage are"):
        command.run(["any", "--topology", "v5e:2x2", "--decode", "4", "96", "--stage", "1"])
    with pytest.raises(InputError, match="--decode is 0 96; give rows"):
        command.run(["any", "--topology", "v5e:2x2", "--decode", "0", "96"])
