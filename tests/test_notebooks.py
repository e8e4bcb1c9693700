"""The notebooks run from top to bottom, at a tiny size; and what their first cell does on runtimes that are not here.

MMJAX_BARE=1 tries them as a newcomer has them, where mmjax is not installed yet (CI, with Colab's versions).
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import quick
import tiny_llava

NOTEBOOKS = {p.stem: p for p in sorted((Path(__file__).parents[1] / "colab").glob("*.ipynb"))}
# What the cell tagged "parameters" says instead.
SMALL = {
    "finetune_vlm": 'model, stages, arguments = "model", ["connector+lora:2"], ["--packing.rows", "2"]\n'
    'concepts, out = 8, "run"',
    "quickstart": 'arguments = ["--steps", "3", "--packing.rows", "4"]\nout = "run"',
    "functional_api": "width, steps = 32, 2",
    "tokens_and_masks": 'concept, side = "dog", 168',
}
BARE = os.environ.get("MMJAX_BARE") == "1"


def cells(name: str) -> list[dict]:
    return [c for c in json.loads(NOTEBOOKS[name].read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs(name, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    path = NOTEBOOKS[name]
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    parameters.source = SMALL[name]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", quick.flags())
    here = tmp_path
    if BARE:  # beside the notebook, from where its first cell finds the clone
        here = path.parent / "runs" / name
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir(parents=True)
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parents[1]), os.environ.get("PYTHONPATH", "")]))
    if name == "finetune_vlm":
        tiny_llava.write(here / "model")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(here)}}).execute()
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert "on cpu" in code[0].outputs[0].text
    assert not any(o.get("name") == "stderr" and "Error" in o.text for c in code for o in c.outputs)
    left = {"quickstart": "run/result.json", "finetune_vlm": "run/run/merged/config.json"}
    assert name not in left or (here / left[name]).exists()


def test_all_begin_with_the_same_cell_and_have_parameters():
    first = {name: "".join(cells(name)[0]["source"]) for name in NOTEBOOKS}
    assert len(set(first.values())) == 1
    assert set(NOTEBOOKS) == set(SMALL)
    for name in NOTEBOOKS:
        assert all(not c["outputs"] and c["execution_count"] is None for c in cells(name)), name
        assert sum("parameters" in c["metadata"].get("tags", ()) for c in cells(name)) == 1


class Runtime:
    """A runtime for the first cell: what is installed, what hardware there is, and what jax finds before and after."""

    def __init__(self, monkeypatch, tpu=False, gpu=False, finds=("cpu",), installed=True, breaks=False):
        self.pips, self.kept, self.finds, self.breaks = [], [], list(finds), breaks
        import glob
        import importlib.util
        import shutil

        monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/accel0"] if tpu and "accel" in pattern else [])
        monkeypatch.setattr(shutil, "which", lambda name: "/bin/nvidia-smi" if gpu else None)
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n: find(n) if n != "mmjax" else ("here" if installed else None)
        )
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command, **_):
        done = types.SimpleNamespace(returncode=0, stdout="", stderr="")
        if "pip" in command:
            assert command[:4] == [sys.executable, "-m", "pip", "install"]
            self.kept += Path(command[command.index("--constraint") + 1]).read_text().splitlines()
            self.pips.append(command[7:])
            if self.breaks:
                done.returncode, done.stderr = 1, "ERROR: no matching distribution"
        elif "-c" in command:
            backend = self.finds.pop(0)
            done.stdout = json.dumps(["0.7.2", backend, f"a {backend}"]) + "\n"
            done.returncode, done.stderr = (1, "no plug-in") if backend == "broken" else (0, "")
        return done


def first_cell(capsys, monkeypatch) -> str:
    """What it says in a kernel that has not imported jax."""
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    exec(compile("".join(cells("quickstart")[0]["source"]), "cell", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("runtime", "pips", "said"),
    [
        ({}, [], "jax 0.7.2 on cpu: a cpu\n"),
        ({"tpu": True, "finds": ["tpu"]}, [], "on tpu: a tpu\n"),
        ({"tpu": True, "finds": ["cpu", "tpu"]}, [["jax[tpu]==0.7.2"]], "on tpu: a tpu\n"),
        ({"gpu": True, "finds": ["gpu"]}, [], "on gpu: a gpu\n"),
        ({"gpu": True, "finds": ["cpu", "gpu"]}, [["jax[cuda12]==0.7.2"]], "on gpu: a gpu\n"),
        ({"gpu": True, "finds": ["broken", "gpu"]}, [["jax[cuda12]==0.0"]], "on gpu: a gpu\n"),
        (
            {"gpu": True, "finds": ["cpu", "cpu"]},
            [["jax[cuda12]==0.7.2"]],
            "this runtime has a GPU, which jax does not find",
        ),
    ],
)
def test_the_first_cell_leaves_a_backend_that_works(runtime, pips, said, monkeypatch, capsys):
    here = Runtime(monkeypatch, **runtime)
    assert said in first_cell(capsys, monkeypatch)
    assert here.pips == pips
    assert not here.finds


def test_the_first_cell_keeps_the_versions_that_are_there(monkeypatch, capsys, tmp_path):
    """From the clone around the notebook, or from the index; a failure is shown, not passed over."""
    here = Runtime(monkeypatch, installed=False)
    monkeypatch.chdir(NOTEBOOKS["quickstart"].parent)
    first_cell(capsys, monkeypatch)
    assert here.pips == [[f"{NOTEBOOKS['quickstart'].parents[1]}[interop,data]"]]
    kept = {line.partition("==")[0].lower() for line in here.kept}
    assert {"jax", "numpy", "pillow"} <= kept
    assert "mmjax" not in kept
    elsewhere = Runtime(monkeypatch, installed=False, breaks=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="no matching distribution"):
        first_cell(capsys, monkeypatch)
    assert elsewhere.pips == [["mmjax[interop,data]"]]


def test_the_first_cell_keeps_what_is_imported_of_several_copies(monkeypatch, capsys):
    """A folder before another on the path hides its packages; and what some distributions call a version is none."""
    here = Runtime(monkeypatch, installed=False)
    found = [("six", "1.17.0"), ("Six", "1.16.0"), ("a.b_c", "2!1"), ("broken", None), ("debian", "1.1build1")]
    found += [("torch", "2.8.0+cu126"), (None, "1"), ("pre", "1.0rc1.post2.dev3")]
    made = [types.SimpleNamespace(name=name, version=version) for name, version in found]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: made)
    first_cell(capsys, monkeypatch)
    assert here.kept == ["pre==1.0rc1.post2.dev3", "six==1.17.0", "torch==2.8.0+cu126"]


def test_the_first_cell_again_asks_the_jax_that_is_there(monkeypatch, capsys):
    """A TPU belongs to the process that has it: no other one is asked, and nothing installed."""
    here = Runtime(monkeypatch, tpu=True, finds=())
    chip = types.SimpleNamespace(device_kind="TPU v5 lite")
    fake = types.SimpleNamespace(__version__="0.7.2", default_backend=lambda: "tpu", devices=lambda: [chip])
    monkeypatch.setitem(sys.modules, "jax", fake)
    exec(compile("".join(cells("quickstart")[0]["source"]), "cell", "exec"), {})
    assert "jax 0.7.2 on tpu: TPU v5 lite\n" in capsys.readouterr().out
    assert here.pips == []
