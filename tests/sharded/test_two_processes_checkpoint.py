"""Two processes of four devices save on a 2 × 2 × 2 mesh; 1, 2 and 4 devices and a script without mmjax open it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax import checkpoint
from mmjax.checkpoint import Checkpoints
from mmjax.convert import huggingface, orbax
from mmjax.core.checksum import checksums, checksums_numpy
from mmjax.core.meshes import Rules
from mmjax.core.spec import init
from mmjax.core.tree import flatten

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# Placement while saving, and two others.
SAVED = {"w": ("data", ("fsdp", "tensor")), "half": (("data", "fsdp"),), "key": ("tensor",), "all": ()}
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 24, "image_size": 16, "patch_size": 8}
OTHERS = ({"w": ("a",), "half": (), "key": (), "all": ()}, {"w": (None, "a"), "half": ("a",), "key": ("a",), "all": ()})


def state(step: int) -> dict:
    """What is saved, on the host: the first four become arrays that the processes hold together."""
    rng = np.random.default_rng(step)
    return {
        "w": rng.normal(size=(8, 12)).astype(np.float32),
        "half": rng.normal(size=8).astype(jnp.bfloat16),
        "key": np.asarray(jax.random.key_data(jax.random.split(jax.random.key(step), 4))),
        "all": np.float32(step),
        "empty": np.zeros((0, 3), np.float32),
        "numpy": np.arange(3) + 2**40,
        "number": step,
    }


def together(tree: dict, mesh, specs: dict, make) -> dict:
    """The tree with the leaves that `specs` names on the mesh: `make(array, sharding)`."""
    placed = {name: make(tree[name], NamedSharding(mesh, P(*spec))) for name, spec in specs.items()}
    key = NamedSharding(mesh, P())
    typed = jax.random.key(tree["number"])
    if make is as_abstract:
        return tree | placed | {"typed": jax.ShapeDtypeStruct((), typed.dtype, sharding=key)}
    return tree | placed | {"typed": jax.random.wrap_key_data(make(np.asarray(jax.random.key_data(typed)), key))}


def host(step: int) -> dict:
    """All leaves that two processes save, as they are on the host."""
    key = np.asarray(jax.random.key_data(jax.random.key(step)))
    return state(step) | {"local": np.int32(step), "typed": key}


def as_global(array, sharding):
    return jax.make_array_from_callback(np.shape(array), sharding, lambda index: np.asarray(array)[index])


def as_abstract(array, sharding):
    return jax.ShapeDtypeStruct(np.shape(array), np.asarray(array).dtype, sharding=sharding)


def error_of(do) -> str:
    try:
        do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def worker(port: str, index: int, directory: str) -> dict:
    """What each process does, and what it found."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def on_mesh(step: int) -> dict:
        return together(state(step), mesh, SAVED, as_global) | {"local": jnp.int32(step)}

    found = {}
    with Checkpoints(directory, keep=2) as checkpoints:
        assert not jax.device_get(checkpoints.steps())
        for step in (1, 2, 3):
            checkpoints.save(step, on_mesh(step), metadata={"at": step})
        checkpoints.wait()
        found["steps"] = checkpoints.steps()
        found["late"] = error_of(lambda: checkpoints.save(2, on_mesh(2)))
        found["differs"] = error_of(lambda: checkpoints.save(4, on_mesh(4) | {"number": index}))
        list_files, checkpoint.list_files = checkpoint.list_files, lambda path: 1 / 0
        checkpoints.save(4, on_mesh(4))
        found["background"] = error_of(checkpoints.wait)

        def full(path):
            raise OSError(28, "No space left on device")

        checkpoint.list_files = full
        checkpoints.save(4, on_mesh(4))
        found["full"] = error_of(checkpoints.wait)
        checkpoint.list_files = list_files

    with Checkpoints(directory, keep=2, commit="marker") as checkpoints:
        checkpoints.save(4, on_mesh(4), metadata={"at": 4})
        like = together(state(0), mesh, SAVED | {"w": (None, "fsdp")}, as_abstract) | {"local": jnp.int32(0)}
        restored = checkpoints.restore(like)
        found["restored"] = [restored.step, restored.metadata["at"], checksums(restored.tree)]
        found["local"] = [type(restored.tree["local"]).__name__, restored.tree["local"].is_fully_addressable]
        # Damage that only process 0 sees, or only process 1, or both.
        for path in (Path(directory) / "4").rglob("*"):
            if index == 0 and path.is_file() and path.stat().st_size > 99:
                path.write_bytes(path.read_bytes()[:-1] + b"\0")
        checkpoint.processes.together()
        found["fallback off"] = error_of(lambda: checkpoints.restore(like, fallback=False))
        found["fallback"] = checkpoints.restore(like).step
        checkpoints.save(4, on_mesh(4))
        found["other"] = error_of(lambda: checkpoints.restore(like | {"number": 2.5}))
    given, converted = (Path(directory).parent / name for name in ("model", "converted"))
    orbax.write(converted, huggingface.load(given, mesh=mesh))
    again = orbax.read(converted, mesh=mesh, rules=Rules(embed=(), mlp=("fsdp", "tensor")))
    found["converted"] = checksums(again.params)
    found["split"] = [x.sharding.num_devices for x in jax.tree.leaves(again.params) if not x.is_fully_replicated]
    found["parts"] = error_of(lambda: orbax.write(Path(directory).parent / "other", huggingface.opened(given)))
    if index == 0:  # alone
        found["nested"] = checksums_numpy(flatten(checkpoint.open_nested(directory)))
    return found


ONLY_ORBAX = """
import json, sys
import numpy as np
from orbax.checkpoint import v1 as ocp

def as_numpy(tree):
    return {name: as_numpy(leaf) for name, leaf in tree.items()} if isinstance(tree, dict) else np.ndarray

def mix(x):
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))

def checksum(array):
    words = np.ascontiguousarray(array).reshape(-1)
    words = words.view(f"u{min(array.dtype.itemsize, 4)}").astype(np.uint32)
    index = np.arange(words.size, dtype=np.uint32)
    sums = words.sum(dtype=np.uint32), mix(words + index * np.uint32(0x9E3779B9)).sum(dtype=np.uint32)
    return "%s[%s]:%08x:%08x" % (array.dtype.name, ",".join(map(str, array.shape)), *sums)

tree = ocp.load(sys.argv[1], as_numpy(ocp.metadata(sys.argv[1]).metadata))
assert not [name for name in sys.modules if name.startswith("mmjax")]
print(json.dumps({name: checksum(array) for name, array in tree.items()}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The directory after two processes have done their work, and what each found."""
    directory = tmp_path_factory.mktemp("two") / "run"
    origin = huggingface.Origin.of(VIT)
    params = init(origin.found.of.spec(origin.found.cfg), jax.random.key(0))
    huggingface.save(directory.parent / "model", huggingface.Model(origin.found.of, origin.found.cfg, params, origin))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    # As many threads as devices and more: their collectives wait for each other.
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"XLA_FLAGS": quick.flags(4), "NPROC": "32", "PYTHONPATH": path}
    command = [sys.executable, __file__, port]
    started = [
        subprocess.Popen(
            [*command, str(i), str(directory)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        told = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(err[-3000:] for _, err in told)
    return directory, [json.loads(out.splitlines()[-1]) for out, _ in told]


def test_both_know_the_same(run):
    directory, (first, second) = run
    assert first["steps"] == second["steps"] == [2, 3]
    assert first["late"] == second["late"]
    assert first["late"].startswith("InputError: cannot save step 2 in ")
    assert first["differs"] == second["differs"]
    assert first["differs"].startswith("InputError: cannot save 'number' in process 1 is not what it is in process 0")
    assert first["background"] == "ZeroDivisionError: division by zero"
    assert second["background"] == "RuntimeError: process 0 failed with ZeroDivisionError: division by zero"
    assert first["full"] == second["full"]
    assert first["full"].startswith("InputError: cannot save step 4 in ")
    assert "no space is left" in first["full"]
    assert first["fallback off"] == second["fallback off"]
    assert first["fallback off"].startswith(f"Damaged: {directory}/4/")
    assert first["fallback"] == second["fallback"] == 3
    assert first["other"] == second["other"]
    assert first["other"].startswith("InputError: 'number' is int64[] in step 4")


def test_both_restore_what_was_saved(run):
    _, (first, second) = run
    assert first["restored"] == second["restored"]
    step, at, found = first["restored"]
    assert (step, at) == (4, 4)
    assert found == checksums_numpy(host(4))
    assert first["local"] == second["local"] == ["ArrayImpl", True]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_opened_on_any_number_of_devices(run, count):
    directory, (first, _) = run
    wanted = checksums_numpy(host(4))
    mesh = jax.make_mesh((count,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    for specs in OTHERS:
        like = together(state(0), mesh, specs, as_abstract) | {"local": jnp.int32(0)}
        restored = Checkpoints(directory).restore(like)
        assert restored.step == 4
        assert checksums(restored.tree) == wanted == first["nested"]
        for name, spec in specs.items():
            assert restored.tree[name].sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), np.ndim(state(0)[name]))


def test_opened_by_orbax_alone(run):
    directory, _ = run
    for step in (3, 4):  # renamed, and with a marker
        data, env = str(directory / str(step)), os.environ | {"XLA_FLAGS": ""}
        out = subprocess.run([sys.executable, "-c", ONLY_ORBAX, data], env=env, capture_output=True, text=True)
        wanted = checksums_numpy(host(step))
        del wanted["empty"]  # the manifest alone has those
        assert json.loads(out.stdout) == wanted, out.stderr


def test_models_that_both_hold_are_written_and_read(run):
    directory, (first, second) = run
    given, converted = directory.parent / "model", directory.parent / "converted"
    assert first["converted"] == second["converted"] == checksums(huggingface.load(given).params)
    assert set(first["split"]) == {8}
    huggingface.save(directory.parent / "back", orbax.opened(converted))
    for name in os.listdir(given):
        assert (directory.parent / "back" / name).read_bytes() == (given / name).read_bytes()
    assert first["parts"] == second["parts"]
    assert first["parts"].startswith("InputError: What is read when asked for is written by one process alone")


def test_nothing_is_left_behind(run):
    directory, _ = run
    assert sorted(os.listdir(directory)) == ["3", "4", "damaged", "done"]
    assert sorted(os.listdir(directory / "damaged")) == ["4", "4.json"]
    assert checkpoint.verify(directory, 3) == checkpoint.verify(directory, 4) == []


if __name__ == "__main__":
    print("\n" + json.dumps(worker(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
