"""The command line as a newcomer meets it, in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import quick

REPOSITORY = Path(__file__).parents[2]


def mmjax(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.flags()}
    command = [sys.executable, *python, "-m", "mmjax.train", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)


SLOW = ("orbax", "grain", "matplotlib", "tensorboardX", "sentencepiece", "tokenizers", "optax", "flax.nnx")


def test_help_lists_fields_and_imports_nothing_slow():
    """What --help waits for is imports (1.2 s on one idle core), so they are what is looked at: seconds depend on who
    else is at work."""
    done = mmjax("configs/quickstart.py", "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    for field in (
        "--steps",
        "--optimizer.learning-rate",
        "--model.vision.blocks.width",
        "--data.concepts",
        "--mesh.fsdp",
    ):
        assert field in done.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "mmjax.train.config" in imported
    assert not [name for name in imported for slow in SLOW if name == slow or name.startswith(f"{slow}.")]


def test_help_without_a_config_says_how_to_go_on():
    done = mmjax("--help")
    assert done.returncode == 0
    assert "quickstart" in done.stdout
    assert mmjax().returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/quickstrat.py"], "There is no config 'configs/quickstrat.py': did you mean 'quickstart'?"),
        (["configs/zzz.py"], "mmjax comes with"),
        (["--steps", "3"], "The first argument must be a config, not '--steps'"),
        (["quickstart", "--stpes", "3"], "--steps"),
        (["quickstart", "--optimizer.learning-rte", "3"], "--optimizer.learning-rate"),
        (["quickstart", "--steps", "many"], "steps"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(tmp_path, arguments, message):
    done = mmjax(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " ") or message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_config_file_without_config_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    done = mmjax(str(tmp_path / "empty.py"))
    assert done.returncode == 2
    assert "has no function config()" in done.stderr


@pytest.mark.slow
def test_the_quick_start_at_tiny_size(tmp_path):
    done = mmjax("configs/quickstart.py", "--steps", "3", "--packing.rows", "4", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["compiles"] == len(result["buckets"])
    assert result["compiles_in_loop"] == 0
    assert "useful tokens/s" in done.stderr
