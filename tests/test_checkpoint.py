import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.flax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from mmjax import checkpoint
from mmjax.checkpoint import Checkpoints, open_nested, verify
from mmjax.core.errors import InputError
from mmjax.core.manifest import surplus
from mmjax.core.tree import flatten

ROOT = Path(__file__).parents[1]

# After a save or load that failed, tensorstore reports to an event loop that Orbax has closed already.
CLOSED = r"ignore:Exception ignored in. None[\s\S]*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
pytestmark = pytest.mark.filterwarnings(CLOSED)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt: object
    rng: jax.Array


def example(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "layers": {"w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "b": jnp.ones(8, jnp.bfloat16)},
        "special": jnp.array([np.nan, -0.0, np.inf, 1e-45], jnp.float32),
        "none": jnp.zeros((0, 3)),
    }
    return State(step=jnp.int32(7), params=params, opt=optax.adam(1e-3).init(params), rng=jax.random.key(seed))


def tiny(value: float = 1.0) -> dict:
    return {"w": jnp.full((4, 4), value, jnp.float32), "b": jnp.arange(3)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def bits(leaf) -> bytes:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (name, a), b in zip(flatten(left).items(), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b)), name


def data_files(directory, step) -> list[Path]:
    """The files of a step that hold something, the largest first."""
    files = [path for path in (directory / str(step)).rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(files, key=lambda path: -path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# What is saved comes back.


def test_round_trip_is_bit_identical(tmp_path):
    state = example()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, metadata={"data": {"step": 7}, "name": "run"})
        restored, metadata = checkpoints.restore(abstract(state))
        into_arrays, _ = checkpoints.restore(example(1))
        assert checkpoints.steps() == [7]
        assert checkpoints.metadata(7) == metadata == {"data": {"step": 7}, "name": "run"}
    assert verify(tmp_path, 7) == []
    for tree in (restored, into_arrays):
        assert_same(tree, state)
        # Where none says otherwise, arrays are uncommitted: they go where a computation needs them.
        assert not any(leaf.committed for leaf in jax.tree.leaves(tree))


def test_host_values_keep_their_types(tmp_path):
    tree = {
        "wide": np.array([2**40, -1]),
        "half": np.ones(2, np.float16),
        "n": 2**40,
        "f": 0.1,
        "t": True,
        "g": np.int8(3),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, tree, wait=True)
        restored, _ = checkpoints.restore(tree)
        abstract_restored, _ = checkpoints.restore({**tree, "wide": jax.ShapeDtypeStruct((2,), np.int64)})
    assert {k: type(v) for k, v in restored.items()} == {k: type(v) for k, v in tree.items()}
    assert all(np.array_equal(restored[name], tree[name]) for name in tree)
    assert restored["wide"].dtype == abstract_restored["wide"].dtype == np.int64


def test_a_part_of_a_step(tmp_path):
    state = example()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, wait=True)
        wanted = {"params": abstract(state.params)}
        assert_same(checkpoints.restore(wanted, partial=True).tree, {"params": state.params})
        with pytest.raises(InputError, match="which the tree to restore has not"):
            checkpoints.restore(wanted)
        with pytest.raises(InputError, match="has no 'more'"):
            checkpoints.restore(wanted | {"more": 1}, partial=True)
        # What is compared is all of the files, and of the arrays those that were loaded.
        flip(data_files(tmp_path, 7)[0], 99)
        with pytest.raises(InputError, match="has changed since it was written"):
            checkpoints.restore(wanted, partial=True)


def test_only_empty_arrays(tmp_path):
    tree = {"e": jnp.zeros((0, 2), jnp.bfloat16)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        assert_same(checkpoints.restore(abstract(tree)).tree, tree)
    assert open_nested(tmp_path)["e"].shape == (0, 2)
    assert verify(tmp_path, 1) == []


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_saved_on_eight_devices_restored_on_any(tmp_path, mode):
    def shardings(count, names):
        mesh = jax.make_mesh((count,), ("d",), axis_types=(mode,), devices=jax.devices()[:count])
        return {name: NamedSharding(mesh, PartitionSpec("d") if name != "s" else PartitionSpec()) for name in names}

    tree = {
        "w": np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32),
        "b": np.arange(8, dtype=jnp.bfloat16),
        "s": np.float32(2.5),
        "k": jax.random.split(jax.random.key(1), 8),
        "e": np.zeros((8, 0), np.float32),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(tree, shardings(8, tree)))
        for count in (1, 4, 8):
            wanted = shardings(count, tree)
            like = {n: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=wanted[n]) for n, x in tree.items()}
            restored, _ = checkpoints.restore(like)
            for name, leaf in restored.items():
                assert bits(leaf) == bits(tree[name])
                assert leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim), name
        # Arrays say where they lie themselves.
        assert_same(checkpoints.restore(restored).tree, restored)
        device = SingleDeviceSharding(jax.devices()[3])
        like["w"] = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=device)
        assert checkpoints.restore(like).tree["w"].devices() == {jax.devices()[3]}


def test_an_abstract_mesh_is_no_place(tmp_path):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(8)})
        sharding = NamedSharding(mesh.abstract_mesh, PartitionSpec("d"))
        with pytest.raises(InputError, match="sharding of 'w' names an abstract mesh"):
            checkpoints.restore({"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)})


def test_donated_and_overwritten_arrays_are_safe(tmp_path):
    on_device, on_host = jnp.arange(2**20, dtype=jnp.float32), np.arange(2**20)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"d": on_device, "h": on_host})
        jax.jit(lambda x: -x - 7, donate_argnums=0)(on_device).block_until_ready()
        on_host[:] = -1
        restored, _ = checkpoints.restore({"d": np.zeros(2**20, np.float32), "h": np.zeros(2**20, np.int64)})
    assert np.array_equal(restored["d"], np.arange(2**20, dtype=np.float32))
    assert np.array_equal(restored["h"], np.arange(2**20))


def test_saving_is_asynchronous_and_in_order(tmp_path, monkeypatch):
    gate = threading.Event()
    original = checkpoint.list_files
    monkeypatch.setattr(checkpoint, "list_files", lambda path: gate.wait(10) and original(path))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tiny())
        assert checkpoints.steps() == []  # complete on disk, but not proven yet
        gate.set()
        checkpoints.save(2, tiny())
        assert 1 in checkpoints.steps()
    assert checkpoints.steps() == [1, 2]


OPEN = """
import sys
from mmjax.checkpoint import open_nested
tree = open_nested(sys.argv[1])
assert not [name for name in sys.modules if name.startswith(("mmjax.models", "mmjax.nn", "mmjax.train", "flax"))]
print(sorted(tree), tree["params"]["layers"]["b"].dtype, tree["opt"]["0"]["mu"]["layers"]["w"].shape, tree["rng"].dtype)
"""


def test_opens_without_model_code_on_one_device(tmp_path):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    state = example()
    layers = jax.device_put(state.params["layers"], NamedSharding(mesh, PartitionSpec("d")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state.replace(params=state.params | {"layers": layers}))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", OPEN, str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.stdout == "['opt', 'params', 'rng', 'step'] bfloat16 (8, 4) uint32\n", out.stderr


def test_import_is_lazy():
    code = "import sys, mmjax.checkpoint, jax; assert 'orbax' not in sys.modules, 'orbax';"
    code += "from jax._src import xla_bridge; assert not xla_bridge._backends, 'backend'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# What does not fit is refused, with its name.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"w": jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)}, r"'w' is float32\[4,4\] in step 5 .* bfloat16\[4,4\]"),
        ({"w": jax.ShapeDtypeStruct((4, 5), jnp.float32)}, r"'w' is float32\[4,4\] in step 5 .* float32\[4,5\]"),
        ({"w": jax.random.key(0)}, r"'w' is float32\[4,4\] in step 5 .* a PRNG key"),
        ({"k": jax.ShapeDtypeStruct((2,), jnp.uint32)}, r"'k' is a PRNG key in step 5 .* uint32\[2\]"),
        ({"k": jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))}, r"'k' is a threefry2x32 key .* key<rbg>"),
        ({"more": {"x": jnp.ones(1)}}, r"step 5 in .* has no 'more/x', which the tree to restore has"),
        ({"b": None}, r"step 5 in .* holds 'b', which the tree to restore has not"),
    ],
)
def test_another_dtype_shape_or_name(tmp_path, change, says):
    tree = tiny() | {"k": jax.random.key(0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, tree, wait=True)
        with pytest.raises(InputError, match=says):
            checkpoints.restore(tree | change)


def test_key_of_another_kind_with_the_same_shape(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"k": jax.random.key(0, impl="rbg")}, wait=True)
        with pytest.raises(InputError, match="'k' is a rbg key"):
            checkpoints.restore({"k": jax.random.key(0, impl="unsafe_rbg")})
        restored, _ = checkpoints.restore({"k": jax.random.key(1, impl="rbg")})
    assert jax.random.key_impl(restored["k"]) == "rbg"


def test_steps_increase(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, tiny())
        for step in (5, 4, -1):
            with pytest.raises(InputError, match=rf"cannot save step {step} in .*: steps increase from 0, and it has"):
                checkpoints.save(step, tiny(2.0))
        assert_same(checkpoints.restore(abstract(tiny())).tree, tiny())


def test_what_cannot_be_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(InputError, match=r"cannot save the leaf 'a\.b'"):  # Orbax would lose one of the two
            checkpoints.save(1, {"a.b": jnp.ones(3), "a": {"b": jnp.zeros(3)}})
        with pytest.raises(InputError, match="cannot save the leaf ''"):
            checkpoints.save(1, jnp.ones(3))
        with pytest.raises(InputError, match="'name' is of type str"):
            checkpoints.save(1, {"name": "text"})
        with pytest.raises(InputError, match="metadata of step 1 cannot be written as JSON"):
            checkpoints.save(1, tiny(), metadata={"x": object()})
    assert os.listdir(tmp_path) == []


def test_nothing_there(tmp_path):
    checkpoints = Checkpoints(tmp_path / "typo")
    assert checkpoints.steps() == []
    with pytest.raises(InputError, match=r"there is no finished checkpoint in .*/typo"):
        checkpoints.restore(tiny())
    with pytest.raises(InputError, match=r"there is no finished step 3 in .*/typo"):
        checkpoints.metadata(3)
    assert not (tmp_path / "typo").exists()
    with pytest.raises(InputError, match="keep = 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(InputError, match="every = -1"):
        Checkpoints(tmp_path, every=-1)
    with pytest.raises(InputError, match="commit = 'link' is neither"):
        Checkpoints(tmp_path, commit="link")
    with pytest.raises(InputError, match="not a local path"):
        Checkpoints("gs://bucket/run")


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path, monkeypatch):
    lock = checkpoint.lock_directory
    monkeypatch.setattr(checkpoint, "lock_directory", lambda path, wait: lock(path, wait=0.1))
    with Checkpoints(tmp_path) as first:
        first.save(1, tiny(), wait=True)
        with lock(tmp_path / "done"):
            (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
            second = Checkpoints(tmp_path)
            assert (tmp_path / "2.orbax-checkpoint-tmp").exists()  # another's save in progress
            assert_same(second.restore(abstract(tiny())).tree, tiny())
            with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
                second.save(2, tiny())


# Retention and orphans.


def test_surplus():
    steps = [0, 5, 10, 15, 17, 20, 21]
    assert surplus(steps, 2) == [0, 5, 10, 15, 17]
    assert surplus(steps, 2, 10) == [5, 15, 17]
    assert surplus(steps, 9, 10) == surplus([], 1) == []


def test_retention_keeps_multiples(tmp_path):
    with Checkpoints(tmp_path, keep=1, every=10) as checkpoints:
        for step in (4, 10, 14, 20, 24):
            checkpoints.save(step, tiny(step))
    assert checkpoints.steps() == [10, 20, 24]


def test_retention(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 10):
            checkpoints.save(step, tiny(step))
    assert checkpoints.steps() == [3, 10]
    assert sorted(os.listdir(tmp_path)) == ["10", "3", "done"]
    assert sorted(os.listdir(tmp_path / "done")) == [".lock", "10.json", "3.json"]


def test_the_manifest_goes_first(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, tiny(), wait=True)
        monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # killed here
        checkpoints.save(2, tiny(), wait=True)
    assert (tmp_path / "1").exists()
    assert checkpoints.steps() == [2]
    monkeypatch.undo()
    Checkpoints(tmp_path)
    assert not (tmp_path / "1").exists()


def test_orphans_are_swept_and_nothing_else(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tiny(1), wait=True)
        checkpoints.save(2, tiny(2), wait=True)
    (tmp_path / "done" / "2.json").unlink()
    for name in ("9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-17", "mine", "7b"):
        (tmp_path / name).mkdir()
    (tmp_path / "done" / ".3.json.abcd.tmp").write_text("half")
    assert checkpoints.steps() == [1]
    with pytest.raises(InputError, match=r"no finished step 2 in .*; the steps there are: 1"):
        checkpoints.restore(tiny(), 2)
    assert Checkpoints(tmp_path).steps() == [1]
    assert sorted(os.listdir(tmp_path)) == ["1", "7b", "done", "mine"]
    assert sorted(os.listdir(tmp_path / "done")) == [".lock", "1.json"]


def test_a_directory_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "123").mkdir()
    Checkpoints(tmp_path)
    assert (tmp_path / "123").exists()


# Faults.


def test_every_flipped_bit_is_found(tmp_path):
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, wait=True)
        assert verify(tmp_path, 1) == []
        for path in data_files(tmp_path, 1):
            for bit in np.linspace(0, 8 * path.stat().st_size - 1, 8).astype(int):
                flip(path, bit)
                assert verify(tmp_path, 1) == [f"{path} has changed since it was written: its CRC-32 is another one"]
                flip(path, bit)
        assert verify(tmp_path, 1) == []


def test_changed_numbers_that_files_do_not_show(tmp_path):
    # As if memory had failed while saving: the files are as they were written, the numbers not those that were saved.
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, tiny(), wait=True)
        manifest = checkpoint.read_manifest(tmp_path, 4)
        manifest["leaves"]["w"] = manifest["leaves"]["w"][:-1] + "x"
        checkpoint.write_manifest(tmp_path, manifest)
        says = rf"'w' of step 4 in {tmp_path} is damaged: its checksum is float32\[4,4\]:"
        with pytest.raises(InputError, match=says):
            checkpoints.restore(abstract(tiny()), fallback=False)
        with pytest.raises(InputError, match=says):
            open_nested(tmp_path)
        assert re.match(says, verify(tmp_path, 4)[0])
        checkpoints.restore(abstract(tiny()), verify=False)


def test_truncated_and_deleted_files(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tiny(1))
        checkpoints.save(2, tiny(2))
    for path in data_files(tmp_path, 2):
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        assert verify(tmp_path, 2) == [f"{path} has {len(data) - 1} bytes where {len(data)} were written"]
        path.unlink()
        assert verify(tmp_path, 2) == [f"{path} is missing"]
        path.write_bytes(data)
    assert verify(tmp_path, 2) == []
    shutil.rmtree(tmp_path / "2" / "state" / "d")
    for proven in (True, False):
        with pytest.raises(InputError, match=r"/2/state/\S+ is missing; restore another step"):
            checkpoints.restore(abstract(tiny()), 2, verify=proven)
    assert_same(checkpoints.restore(abstract(tiny()), 1).tree, tiny(1))


def test_a_damaged_manifest_hides_the_step_and_keeps_the_data(tmp_path, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tiny(1))
        checkpoints.save(2, tiny(2), metadata={"position": 1})
    path = tmp_path / "done" / "2.json"
    whole = path.read_text()
    for damaged in (whole.replace('"position": 1', '"position": 3'), whole[:-9], "", "[]", "\x00"):
        path.write_text(damaged)
        assert Checkpoints(tmp_path).steps() == [1]
        with pytest.raises(InputError, match=r"done/2\.json is damaged"):
            checkpoints.restore(tiny(), 2)
        assert "is damaged" in verify(tmp_path, 2)[0]
        assert checkpoint.main(["verify", str(tmp_path)]) == 1
    path.write_text(whole)
    assert_same(checkpoints.restore(abstract(tiny())).tree, tiny(2))
    path.write_text("")
    with checkpoints:
        checkpoints.save(2, tiny(3))  # a run that resumes from step 1 gets here again
    assert_same(checkpoints.restore(abstract(tiny())).tree, tiny(3))
    assert (tmp_path / "damaged" / "2" / "state").is_dir()
    assert (tmp_path / "damaged" / "2.json").read_text() == ""


KILLED = """
import os, sys, time, threading, signal
import jax.numpy as jnp, numpy as np
from mmjax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], commit=sys.argv[3])
big = {"w": np.random.default_rng(0).normal(size=(16, 2**17)).astype(np.float32)}
checkpoints.save(1, big, wait=True)
checkpoints.save(2, big)
deadline = time.time() + float(sys.argv[2])
while time.time() < deadline and (sys.argv[2] != "9" or not os.path.exists(sys.argv[1] + "/2")):
    time.sleep(0.0005)
os.kill(os.getpid(), signal.SIGKILL)
"""


# At once; and when the data is there but the manifest is not, or, written in place, when the first of it is there.
@pytest.mark.parametrize(("seconds", "commit"), [("0", "rename"), ("9", "rename"), ("9", "marker")])
def test_killed_while_saving(tmp_path, seconds, commit):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), seconds, commit], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    if seconds == "9":
        assert (tmp_path / "2" / "commit_success.txt").exists() == (commit == "rename")
    with Checkpoints(tmp_path) as checkpoints:
        expected = {"w": np.random.default_rng(0).normal(size=(16, 2**17)).astype(np.float32)}
        assert checkpoints.steps() == [1]
        assert sorted(os.listdir(tmp_path)) == ["1", "done"]
        assert_same(checkpoints.restore(expected).tree, expected)
        checkpoints.save(2, expected)
        assert verify(tmp_path, 1) == []
    assert checkpoints.steps() == [1, 2]


UNFINISHED = """
import sys
import jax.numpy as jnp, numpy as np
from mmjax import checkpoint
checkpoints = checkpoint.Checkpoints(sys.argv[1])
if sys.argv[2] == "fails":
    def full(path): raise OSError(28, "x")
    checkpoint.list_files = full
checkpoints.save(1, {"w": np.random.default_rng(0).normal(size=2**20)})
if sys.argv[2] == "fails":
    checkpoints._saving.join()
"""


def test_a_program_that_ends_without_close_says_what_it_lost(tmp_path):
    for mode, says in (("ends", "step 1 was not saved: the program ended first"), ("fails", "cannot save step 1 in")):
        directory = tmp_path / mode
        out = subprocess.run(
            [sys.executable, "-c", UNFINISHED, str(directory), mode], cwd=ROOT, capture_output=True, text=True
        )
        if not Checkpoints(directory).steps():  # a fast disk may have had the time
            assert re.fullmatch(rf"mmjax.checkpoint: {says}.*\n", out.stderr)


def test_a_failed_save_is_raised_once_and_the_next_one_works(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tiny(1), wait=True)
        for number, says in (
            (errno.ENOSPC, "no space is left on the disk"),
            (errno.EDQUOT, "the disk quota is used up"),
        ):

            def full(path, number=number):
                raise OSError(number, os.strerror(number))

            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "list_files", full)
                checkpoints.save(2, tiny(2))
                with pytest.raises(InputError, match=rf"^cannot save step 2 in {tmp_path}: {says}"):
                    checkpoints.wait()
            checkpoints.wait()
            assert sorted(os.listdir(tmp_path)) == ["1", "done"]
        monkeypatch.setattr(checkpoint, "write_manifest", lambda directory, manifest: 1 / 0)
        checkpoints.save(2, tiny(2))
        with pytest.raises(ZeroDivisionError):  # whatever it is, it is not swallowed: the next save raises it
            checkpoints.save(3, tiny(3))
        monkeypatch.undo()
        checkpoints.save(3, tiny(3))
    assert checkpoints.steps() == [1, 3]


@pytest.fixture
def small_disk(tmp_path):
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.parametrize("commit", ["rename", "marker"])
def test_full_disk(small_disk, capfd, commit):
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=2**21), jnp.float32)}
    with Checkpoints(small_disk, commit=commit) as checkpoints:
        checkpoints.save(1, tiny(1), wait=True)
        for _ in range(2):
            checkpoints.save(2, big)
            with pytest.raises(
                InputError, match=rf"^cannot save step 2 in {small_disk}: no space is left on the disk; "
            ):
                checkpoints.wait()
            assert sorted(os.listdir(small_disk)) == ["1", "done"]
        assert_same(checkpoints.restore(abstract(tiny())).tree, tiny(1))
        checkpoints.save(3, tiny(3), wait=True)
        # Not a byte is left: it fails at another place.
        with open(small_disk / "fill", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert shutil.disk_usage(small_disk).free == 0
        with pytest.raises(InputError, match=r"no space is left on the disk"):
            checkpoints.save(4, tiny(4), wait=True)
        assert [verify(small_disk, step) for step in checkpoints.steps()] == [[], []]
        (small_disk / "fill").unlink()
        checkpoints.save(4, tiny(4), wait=True)
    assert checkpoints.steps() == [1, 3, 4]
    assert capfd.readouterr().err == ""  # the sentence is the caller's to print, and nothing hides it


# The command.


def test_command_line(tmp_path, capsys):
    assert checkpoint.main(["verify", str(tmp_path)]) == 2
    assert "there is no finished checkpoint" in capsys.readouterr().err
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tiny(1), metadata={"loss": 2.5})
        checkpoints.save(2, tiny(2))
    assert checkpoint.main(["list", str(tmp_path)]) == 0
    assert re.fullmatch(r'1\t2 arrays\t0\.\d MB \{"loss": 2\.5\}\n2\t.*\n', capsys.readouterr().out)
    assert checkpoint.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "step 1: whole\nstep 2: whole\n"
    flip(data_files(tmp_path, 1)[0], 99)
    out = subprocess.run(
        [sys.executable, "-m", "mmjax.checkpoint", "verify", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 1
    assert re.fullmatch(r"step 1: .* has changed since it was written.*\nstep 2: whole\n", out.stdout)
    assert json.loads((tmp_path / "done" / "2.json").read_text())["content"]["step"] == 2


def test_export(tmp_path):
    tree = {"params": {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16), "n": jnp.zeros((0, 2))}}
    tree |= {"step": 7, "key": jax.random.key(1), "flags": np.array([True, False]), "odd": jnp.ones(2, jnp.int4)}
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.save(2, jax.tree.map(lambda leaf: leaf, tree) | {"step": 8})
    out = tmp_path / "out.safetensors"
    patterns = ["--only", "params/*", "--only", "step", "--only", "key", "--only", "flags"]
    assert checkpoint.main(["export", str(tmp_path / "run"), str(out), "--step", "1", *patterns]) == 0
    with safetensors.safe_open(out, "np") as file:
        assert file.metadata() == {"step": "1"}
    found = safetensors.flax.load_file(out)
    assert sorted(found) == ["flags", "key", "params/b", "params/n", "params/w", "step"]
    wanted = flatten(tree) | {"key": jax.random.key_data(tree["key"]), "step": np.array([7])[0]}
    for name in found.keys() - {"step"}:  # which JAX reads as 32 bits
        assert (found[name].dtype, found[name].shape) == (wanted[name].dtype, wanted[name].shape)
        assert bits(found[name]) == bits(wanted[name])
    assert found["step"] == 7


def test_what_cannot_be_exported(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    with Checkpoints(run) as checkpoints:
        checkpoints.save(1, tiny() | {"odd": jnp.ones(2, jnp.int4)})
    for arguments, says in (
        ([], "'odd' is int4, which safetensors does not have"),
        (["--only", "params/*"], r"no leaf of step 1 matches params/\*; there are b, odd, w"),
        (["--step", "3"], "there is no finished step 3"),
    ):
        assert checkpoint.main(["export", str(run), str(out), *arguments]) == 2
        assert re.search(says, capsys.readouterr().err)
    manifest = checkpoint.read_manifest(run, 1)
    manifest["leaves"]["w"] = manifest["leaves"]["w"][:-1] + "x"
    checkpoint.write_manifest(run, manifest)
    assert checkpoint.main(["export", str(run), str(out), "--only", "[bw]"]) == 2
    assert "'w' of step 1" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run"]  # neither the file nor a part of it
    out.write_text("mine")
    assert checkpoint.main(["export", str(run), str(out), "--only", "b"]) == 2
    assert out.read_text() == "mine"
    assert checkpoint.main(["export", str(run), str(tmp_path / "typo" / "a"), "--only", "b"]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_prune(tmp_path, capsys):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(0, 8):
            checkpoints.save(step, tiny(step))
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.main(["prune", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"deleted {tmp_path}/9.orbax-checkpoint-tmp\n"
    with checkpoint.lock_directory(tmp_path / "done"):
        assert checkpoint.main(["prune", str(tmp_path), "--keep", "1"]) == 2
        assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert checkpoint.main(["prune", str(tmp_path), "--keep", "2", "--every", "3"]) == 0
    assert capsys.readouterr().out == "".join(f"deleted {tmp_path}/{step}\n" for step in (1, 2, 4, 5))
    assert checkpoints.steps() == [0, 3, 6, 7]
    flip(data_files(tmp_path, 7)[0], 99)
    with pytest.warns(UserWarning, match=r"has changed .*step 6 is used instead, and step 7 was moved to .*/damaged/7"):
        assert_same(checkpoints.restore(abstract(tiny())).tree, tiny(6))
    assert checkpoint.main(["list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"7\tset aside as damaged, in {tmp_path}/damaged\n")
    assert checkpoint.main(["prune", str(tmp_path), "--every", "3"]) == 0  # which the newest is
    assert checkpoints.steps() == [0, 3, 6]
    assert checkpoint.main(["prune", str(tmp_path), "--damaged"]) == 0
    assert capsys.readouterr().out == f"deleted {tmp_path}/damaged/7\ndeleted {tmp_path}/damaged/7.json\n"
    assert sorted(os.listdir(tmp_path)) == ["0", "3", "6", "done"]
    assert checkpoint.main(["prune", str(tmp_path), "--keep", "0"]) == 2
    assert checkpoint.main(["prune", str(tmp_path / "typo"), "--keep", "1"]) == 2
    assert not (tmp_path / "typo").exists()
