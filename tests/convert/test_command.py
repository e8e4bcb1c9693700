"""`python -m mmjax.convert`: what it does, what it refuses in one sentence, and what a kill leaves."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from convert import fake
from convert.fake import CONFIG, raw, tensors, write
from safetensors.numpy import save_file

from mmjax import checkpoint
from mmjax.convert import huggingface
from mmjax.convert.__main__ import main
from mmjax.core import config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def family(monkeypatch):
    fake.register(monkeypatch)


@pytest.fixture
def run(monkeypatch, capsys):
    """The program: its exit status, and what it says on stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            config.main(main)
        return ended.value.code, *capsys.readouterr()

    return run


def contents(path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


def test_there_and_back(tmp_path, run, capsys):
    path = write(tmp_path / "in", shards=2)
    (path / "tokenizer.json").write_text("{}")
    assert run(path, tmp_path / "step") == (0, f"{tmp_path / 'step'}\tfake\t132 parameters\tfloat32\n", "")
    assert checkpoint.main(["verify", str(tmp_path / "step")]) == 0
    assert capsys.readouterr().out == "step 0: whole\n"
    assert run(tmp_path / "step", tmp_path / "out")[0] == 0
    assert contents(tmp_path / "out") == contents(path)


def test_options(tmp_path, run):
    path = write(tmp_path / "in", shards=2)
    given = tensors()
    assert run(path, tmp_path / "a", "--to", "hf", "--dtype", "bfloat16")[1].endswith("132 parameters\tbfloat16\n")
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == "bfloat16"
    assert run(path, tmp_path / "b", "--mesh.fsdp", 2, "--mesh.tensor", 2)[0] == 0
    assert run(tmp_path / "b", tmp_path / "c", "--shard-bytes", 100_000)[0] == 0
    assert sorted(contents(tmp_path / "c")) == ["config.json", "model.safetensors"]
    source = huggingface.Directory(tmp_path / "c")
    assert all((source.read(key) == x).all() for key, x in given.items())
    assert run(tmp_path / "b", tmp_path / "d", "--to", "orbax", "--dtype", "float16", "--step", 0)[0] == 0
    assert run(tmp_path / "d", tmp_path / "e", "--dtype", "float32")[0] == 0
    source = huggingface.Directory(tmp_path / "e")
    assert (source.read("table.weight") == given["table.weight"].astype(np.float16)).all()
    assert contents(tmp_path / "e").keys() == contents(path).keys()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--step", "0"], "which has no steps; leave --step out"),
        (["--to", "hf", "--mesh.fsdp", "2"], "is written for no mesh; leave --mesh out"),
        (["--shard-bytes", "5"], "--shard-bytes is for files of a Hugging Face directory"),
        (["--mesh.fsdp", "0"], "fsdp is less than 1"),
        (["--to", "hf", "--shard-bytes", "0"], "shard-bytes is less than 1"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--to", "gguf"], "invalid choice: 'gguf'"),
    ],
)
def test_options_that_would_change_nothing(tmp_path, run, options, says):
    status, out, err = run(write(tmp_path / "in"), tmp_path / "out", *options)
    assert (status, out) == (2, "")
    assert says in err
    assert os.listdir(tmp_path) == ["in"]


# Directories from strangers


def pickles(path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "run"),)

    os.remove(path / "model.safetensors")
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def renamed_pickle(path):
    pickles(path)
    os.rename(path / "pytorch_model.bin", path / "model.safetensors")


def code(path):
    (path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "evil"}))
    (path / "evil.py").write_text(f"import os\nos.mkdir({str(path.parent / 'run')!r})\n")


def wrong_sizes(path):
    save_file(tensors() | {"table.weight": np.zeros((4, 4), np.float32)}, path / "model.safetensors")


def more_bytes(path):
    with open(path / "model.safetensors", "ab") as file:
        file.write(b"more")


def shards(change):
    def of(path):
        os.remove(path / "model.safetensors")
        write(path, shards=2)
        change(path)

    return of


def elsewhere(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["table.weight"] = "../../secret.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def sparse(name, size=1 << 40):
    def of(path):
        with open(path / name, "wb") as file:
            file.truncate(size)

    return of


def deep(path):
    (path / "config.json").write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)


HOSTILE = {
    "pickles only": (pickles, r"has weights in formats that can run code \('pytorch_model.bin'\) and none in safeten"),
    "a pickle called safetensors": (renamed_pickle, "model.safetensors is a pickle, and not a safetensors file"),
    "code of its own": (code, "has the model_type 'evil': .*; the code that its auto_map names is never run"),
    "no config": (lambda p: os.remove(p / "config.json"), "is neither a Hugging Face directory .it has no config.json"),
    "a deep config": (deep, "config.json is nested more than 64 levels deep"),
    "more layers than there are": (
        lambda p: (p / "config.json").write_text(json.dumps(CONFIG | {"layers": 9_000})),
        "has 9,000 layers, and its files 10 tensors",
    ),
    "wrong sizes": (wrong_sizes, r"1 of another shape \(table.weight is \[4, 4\] and not \[3, 4\]\)"),
    "bytes of no tensor": (more_bytes, "end at byte [0-9,]+ and the file at byte"),
    "a missing shard": (
        shards(lambda p: os.remove(p / "model-00002-of-00002.safetensors")),
        "model-00002-of-00002.safetensors is missing; download the whole directory",
    ),
    "a missing tensor": (
        lambda p: save_file({k: x for k, x in tensors().items() if k != "table.weight"}, p / "model.safetensors"),
        r"1 missing \(table.weight\)",
    ),
    "a header longer than the file": (
        lambda p: (p / "model.safetensors").write_bytes(raw("{}", length=2**63)),
        "9,223,372,036,854,775,808 bytes by its own account",
    ),
    "a header longer than allowed": (
        lambda p: (p / "model.safetensors").write_bytes(raw(b"{" + b" " * (17 << 20) + b"}")),
        "has a header of 17,825,794 bytes, where 2 to 16,777,216 are allowed",
    ),
    "an index that leads elsewhere": (shards(elsewhere), r"'\.\./\.\./secret.safetensors', which is no plain name"),
    "a huge index": (shards(sparse("model.safetensors.index.json")), "1,099,511,627,776 bytes, where 16,777,216"),
    "a huge config": (sparse("config.json"), "config.json has 1,099,511,627,776 bytes, where 4,194,304 are allowed"),
    "a huge side file": (sparse("README.md"), "README.md has 1,099,511,627,776 bytes, where 67,108,864 are allowed"),
    "a pipe beside": (lambda p: os.mkfifo(p / "tokenizer.json"), "tokenizer.json is not a regular file"),
    "a link elsewhere": (lambda p: (p / "LICENSE").symlink_to("/etc/passwd"), "LICENSE is a link to a file elsewhere"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_hostile_directories(tmp_path, run, name, to):
    change, says = HOSTILE[name]
    path = write(tmp_path / "in")
    change(path)
    status, out, err = run(path, tmp_path / "new/out", "--to", to)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"mmjax: [^\n]+\n", err), err
    assert re.search(says, err)
    assert os.listdir(tmp_path) == ["in"], "something was written, or run"
    if name not in ("no config",):
        with pytest.raises(config.InputError, match=says):
            huggingface.load(path)


def test_code_of_a_family_that_we_know_is_not_run(tmp_path, run):
    """Many published directories name code, which transformers has itself by now: there is no need to refuse them."""
    path = write(tmp_path / "in")
    assert "auto_map" in json.loads((path / "config.json").read_text())
    (path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'run')!r})\n")
    assert run(path, tmp_path / "out", "--to", "hf")[0] == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"], "nor is it carried"
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_targets(tmp_path, run):
    path = write(tmp_path / "in")
    (tmp_path / "file").touch()
    for target, says in (
        (path, "in exists already; choose another directory"),
        (tmp_path / "file", "file exists already"),
        (tmp_path / "file/out", "file is a file; choose another directory"),
    ):
        status, out, err = run(path, target)
        assert (status, out) == (2, "")
        assert says in err
    status, out, err = run(tmp_path / "none", tmp_path / "out")
    assert "none is neither a Hugging Face directory" in err
    assert sorted(os.listdir(tmp_path)) == ["file", "in"]


def test_a_damaged_checkpoint(tmp_path, run):
    run(write(tmp_path / "in"), tmp_path / "step")
    os.truncate(max((tmp_path / "step/0").rglob("d/*"), key=lambda p: p.stat().st_size), 3)
    status, out, err = run(tmp_path / "step", tmp_path / "out")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"mmjax: .* has 3 bytes where \d+ were written; restore another step\n", err)
    assert sorted(os.listdir(tmp_path)) == ["in", "step"]


# Kills

STOPS = """
import runpy, sys, time
sys.path.insert(0, sys.argv[1])
from convert import fake
from mmjax.convert import writing
fake.register(type("M", (), {"setitem": lambda self, d, k, v: d.__setitem__(k, v)})())
from mmjax.core import manifest, parts
where, name = {"orbax": (parts, "sums_numpy"), "hf": (writing, "_write_at")}[sys.argv[2]]
real, count = getattr(where, name), []
def slow(*arguments):
    count.append(None)
    if len(count) == 4:
        print("half", flush=True)
        time.sleep(60)
    return real(*arguments)
setattr(where, name, slow)
sys.argv = ["convert", *sys.argv[3:], "--to", sys.argv[2]]
runpy.run_module("mmjax.convert", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_half_way(tmp_path, run, to, number):
    path = write(tmp_path / "in")
    command = [sys.executable, "-c", STOPS, str(ROOT / "tests"), to, str(path), str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n", process.stderr.read()
        process.send_signal(number)
        status = process.wait(60)
    left = set(os.listdir(tmp_path)) - {"in"}
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
        assert len(left) == 1
        assert re.fullmatch(r"\.out\.[0-9a-f]{8}\.tmp", *left), "nothing by the name that was asked for"
        half = tmp_path / left.pop()
        assert run(half, tmp_path / "other")[0] == 2, "and what is left does not pass for a model"
    else:
        assert status == 128 + number
        assert left == set()
    assert run(path, tmp_path / "out", "--to", to)[0] == 0


# Memory


@pytest.mark.slow
def test_memory_of_the_process(tmp_path):
    """300 MB whose largest tensor has 34: the resident memory of the command rises by less than three of those.

    One leaf alone has 101 MB. Not by how long it takes: only memory is bounded here.
    """
    from benchmarks import convert as benchmark

    size = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 16_384, "projection_dim": 1024}
    whole, largest, found = benchmark.measure(tmp_path, benchmark.LARGE | size, block=4 << 20)
    assert (whole > 300e6, largest) == (True, 2 * 16_384 * 1024)
    for name, one in found.items():
        assert one["rise"] < 3 * largest * (2 if name == "float32" else 1), (name, one["rise"] / largest)
