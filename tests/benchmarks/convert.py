"""What `python -m mmjax.convert` takes: memory beside the largest tensor, and megabytes a second, there and back.

    python -m tests.benchmarks.convert

The directory is that of a text tower of CLIP's with a large vocabulary: 1.5 GB of bfloat16 in two files, whose largest
tensor is the vocabulary's, 268 MB. It is converted to a checkpoint, back, and to float32, each in a process of its own
that has converted a small directory before. Memory is how far the process's peak resident set (ru_maxrss) then rises,
mapped pages and all; on a CPU the devices' memory is the host's and is counted too. What comes back must be the same
bytes.

The last line is one JSON object.
"""

import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mmjax.convert import header, huggingface, rules
from mmjax.core import parts
from mmjax.core.files import require_space

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 12}
LARGE |= {
    "vocab_size": 65_536,
    "max_position_embeddings": 1024,
    "projection_dim": 2048,
    "model_type": "clip_text_model",
}
SMALL = LARGE | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}

CONVERT = """
import json, resource, sys, time
from mmjax.convert.__main__ import main
from mmjax.core import parts
parts.BLOCK = int(sys.argv.pop(1))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert main([sys.argv[1], sys.argv[2] + ".small", *sys.argv[5:]]) == 0
before, start = peak(), time.perf_counter()
assert main([sys.argv[3], sys.argv[4], *sys.argv[5:]]) == 0
print(json.dumps({"seconds": time.perf_counter() - start, "rise": peak() - before, "idle": before}))
"""


def directory(path: Path, config: dict, files: int = 2) -> tuple[int, int]:
    """Writes a directory of random numbers; gives the bytes of all its tensors, and of the largest."""
    config = config | {"dtype": "bfloat16"}
    found = huggingface.Origin.of(config).found
    tensors = rules.plan(found.of.spec(found.cfg), found.rules).tensors
    dtype, rng = np.dtype(jnp.bfloat16), np.random.default_rng(0)
    noise = rng.normal(0, 0.02, 1 << 23).astype(dtype)  # longer than what a compressor looks back
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    placed = {key: names[i * files // len(tensors)] for i, key in enumerate(tensors)}
    for name in names:
        formats = {key: (dtype, tensors[key]) for key in tensors if placed[key] == name}
        made = header.build(formats, {"format": "pt"}, name)
        with open(path / name, "wb") as file:
            file.write(made.raw)
            for entry in made.tensors.values():
                left = (entry.stop - entry.start) // dtype.itemsize
                while left:
                    some = noise[int(rng.integers(len(noise) // 2)) :][:left]
                    file.write(some.view(np.uint8))
                    left -= len(some)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape in tensors.values()]
    return sum(sizes), max(sizes)


def convert(block: int, small: Path, source: Path, target: Path, *options: str) -> dict[str, float]:
    """Converts one directory after a small one, in a process of its own: seconds, and bytes of memory."""
    command = [sys.executable, "-c", CONVERT, str(block), str(small), str(target), str(source), str(target), *options]
    out = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    if out.returncode:
        raise RuntimeError(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def measure(folder: Path, config: dict, block: int = parts.BLOCK) -> tuple[int, int, dict[str, dict[str, float]]]:
    """A directory there and back, and in another number format: its bytes, the largest tensor's, and `convert`s."""
    small = folder / "small"
    directory(small, SMALL)
    whole, largest = directory(folder / "in", config)
    found = {"there": convert(block, small, folder / "in", folder / "step")}
    found["back"] = convert(block, folder / "step.small", folder / "step", folder / "out")
    same = filecmp.cmpfiles(folder / "in", folder / "out", os.listdir(folder / "in"), shallow=False)[0]
    assert sorted(same) == sorted(os.listdir(folder / "out")) == sorted(os.listdir(folder / "in")), "other bytes"
    found["float32"] = convert(block, small, folder / "in", folder / "wide", "--to", "hf", "--dtype", "float32")
    return whole, largest, found


def copying(folder: Path) -> float:
    """Seconds to copy the directory's files, read and written to the disk: what no conversion can be faster than."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder / "in"), str(folder / "copy")], check=True)
    subprocess.run(["sync", "-f", str(folder / "copy")], check=True)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="mmjax-benchmark-") as temporary:
        require_space(temporary, 10 << 30, "convert 1.5 GB there and back")
        whole, largest, found = measure(Path(temporary), LARGE)
        copied = copying(Path(temporary))
    figures = {
        "bytes": whole,
        "largest_tensor_bytes": largest,
        "idle_bytes": found["there"]["idle"],
        **{f"{name}_rise_bytes": one["rise"] for name, one in found.items()},
        **{f"{name}_megabytes_per_second": round(whole / one["seconds"] / 1e6, 1) for name, one in found.items()},
        "copy_megabytes_per_second": round(whole / copied / 1e6, 1),
        "cores": os.cpu_count(),
    }
    # In float32 the largest tensor has twice the bytes.
    aims = [
        {
            "name": f"memory over the largest tensor, {name}",
            "measured": round(one["rise"] / largest / (2 if name == "float32" else 1), 2),
            "at_most": 3.0,
        }
        for name, one in found.items()
    ]
    print(json.dumps({**figures, "aims": aims}))


if __name__ == "__main__":
    main()
