"""The planner as one meets it: in a process of its own, with the real TPU compiler where it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TINY = """
from tiny import tiny_run
import dataclasses
from mmjax.train.config import Packing, Update
def config():
    cfg = tiny_run("unused", packing=Packing(rows=32, tokens=128, shapes=((64, 2), (32, 1))))
    return dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=-1))
"""


def plan(*arguments: str, block: str = "") -> subprocess.CompletedProcess:
    """`block`: a package that cannot be imported."""
    env = os.environ | {
        "XLA_FLAGS": "",
        "JAX_OPTIMIZATION_LEVEL": "O1",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests",
    }
    start = f"import sys; sys.modules[{block!r}] = None; " if block else "import sys; "
    start += (
        "sys.argv[0] = 'plan'; from mmjax.core import config; from mmjax.plan import __main__ as p; config.main(p.run)"
    )
    command = [sys.executable, "-c", start, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture
def tiny(tmp_path) -> str:
    (tmp_path / "tiny_plan.py").write_text(TINY)
    return str(tmp_path / "tiny_plan.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5x:4x4"], "There are no chips 'v5x' to plan for: did you mean"),
        (["--topology", "v5e:4x4x4"], "TPU v5e has 2 axes, as in v5e:4x4"),
        (["--topology", "v5e:4xfour"], "'v5e:4xfour' is no topology"),
        ([], "Which chips? Give --topology"),
        (["--topology", "v5e:2x2", "--documents", "many"], "--documents"),
        (["--topology", "v5e:2x2", "--packing.shapes", "0", "2"], "packing.shapes is ((0, 2),)"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tiny, arguments, message):
    done = plan(tiny, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_compiler_it_says_what_to_install(tiny):
    done = plan(tiny, "--topology", "v5e:2x2", block="libtpu")
    assert done.returncode == 2
    assert "pip install 'mmjax[tpu]'" in done.stderr


def test_without_the_gpu_compiler_it_says_what_to_install(tiny):
    done = plan(tiny, "--topology", "h100:8", block="jax_cuda13_plugin")
    assert done.returncode == 2
    assert "pip install --no-deps jax-cuda13-plugin==" in done.stderr


@pytest.mark.slow
def test_gpus_are_planned_for_without_one(tiny):
    pytest.importorskip("jax_cuda13_plugin", reason="XLA's GPU compiler: pip install --no-deps jax-cuda13-plugin …")
    done = plan(tiny, "--topology", "h100:8", "--json", "--update.compute", "bfloat16")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (bucket,) = found["buckets"]
    assert found["chips"] == 8
    assert bucket["flops"] > bucket["model_flops_per_chip"] > 0
    assert bucket["memory"]["temporaries"] > 0
    assert bucket["collectives"]["all-reduce"]["bytes"] > 0
    assert "counted here" in done.stdout


def test_a_config_whose_documents_are_elsewhere_needs_shapes():
    done = plan("llava_7b", "--topology", "v5e:2x2", "--packing.shapes")
    assert done.returncode == 2
    assert "give patches and images of a row instead, as --packing.shapes" in done.stderr


@pytest.mark.slow
def test_a_mesh_that_does_not_divide_the_chips(tiny):
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the tpu extra")
    done = plan(tiny, "--topology", "v5e:2x2", "--mesh.data", "3")
    assert done.returncode == 2
    assert "does not fit 4 device(s)" in done.stderr
    rows = plan(tiny, "--topology", "v5e:2x2", "--packing.rows", "6")
    assert rows.returncode == 2
    assert "packing.rows is 6, which 4 devices" in rows.stderr


CHECK = """
import sys, json, os
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
from mmjax.core import config
from mmjax.core.meshes import Rules, make_mesh
from mmjax.models import vlm
from mmjax.plan import chips, program
from mmjax.train import state
from mmjax.train.step import compile_step
cfg = config.load(sys.argv[1])
mesh = make_mesh(cfg.mesh, chips.devices(chips.topology("v5e:2x2")))
tx = state.optimizer(cfg.optimizer, cfg.steps)
shape = state.abstract(vlm.spec(cfg.model), tx, mesh, Rules())
bucket = program.buckets(cfg)[-1]
made = compile_step(shape, program.batch_of(cfg, bucket), cfg.model, tx, mesh, Rules(), cfg.objective, cfg.update)
said = made.memory_analysis()
print(json.dumps({n: getattr(said, f"{n}_size_in_bytes") for n in ("argument", "output", "alias", "temp")}))
"""


@pytest.mark.slow
def test_memory_is_the_compilers_and_advice_fits(tiny, tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the tpu extra")
    done = plan(tiny, "--topology", "v5e:2x2", "--all", "--json", "--documents", "64")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mesh"] == {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 1}
    large, small = found["buckets"]
    assert (large["bucket"]["patches"], small["bucket"]["patches"]) == (64, 32)
    assert large["documents"] == [64, 64]
    assert not large["unknown"]
    assert large["flops"] > large["model_flops_per_chip"] > small["model_flops_per_chip"]
    assert 0 < large["mfu"] < 1
    assert large["collectives"]["all-reduce"]["bytes"] > 0
    for part in ("bucket", "fits", "all-reduce", "MFU"):
        assert part in done.stdout

    env = os.environ | {
        "XLA_FLAGS": "",
        "JAX_OPTIMIZATION_LEVEL": "O1",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests",
    }
    check = subprocess.run([sys.executable, "-c", CHECK, tiny], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    theirs, ours = json.loads(check.stdout.splitlines()[-1]), large["memory"]
    assert theirs == {
        "argument": ours["arguments"],
        "output": ours["outputs"],
        "alias": ours["aliased"],
        "temp": ours["temporaries"],
    }

    # A limit under what it needs: the advice is flags, and with them it fits the same limit.
    limit = str(0.9 * ours["total"] / 2**30)
    small = plan(tiny, "--topology", "v5e:2x2", "--memory", limit, "--json")
    assert small.returncode == 1, small.stderr
    assert "DOES NOT FIT" in small.stdout
    advice = json.loads(small.stdout.splitlines()[-1])["buckets"][0]["advice"]
    assert advice
    again = plan(tiny, "--topology", "v5e:2x2", "--memory", limit, *advice.split())
    assert again.returncode == 0, again.stdout + again.stderr
