"""Models as checkpoints: there and back to the byte, in little memory, over meshes, and what is refused."""

import dataclasses
import json
import os
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert import fake
from convert.fake import CONFIG, MODULE, tensors, write

from mmjax.checkpoint import Checkpoints, verify
from mmjax.convert import huggingface, orbax, rules
from mmjax.convert.huggingface import Model, Origin
from mmjax.core import manifest as manifests
from mmjax.core import parts, tree
from mmjax.core import spec as specs
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, Rules, make_mesh


@pytest.fixture(autouse=True)
def family(monkeypatch):
    fake.register(monkeypatch)
    monkeypatch.setattr(huggingface, "MAX_KEPT", 1 << 10)


def contents(path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


def directory(path, shards: int = 1, given: dict | None = None):
    """With a tensor that is no parameter, larger than what `load` keeps, and side files, one of them empty."""
    given = tensors() if given is None else given
    write(path, given | {"position_ids": np.arange(1 << 9)[None]}, shards=shards)
    (path / "tokenizer.json").write_text('{"model": {}}')
    (path / "LICENSE").touch()
    (path / "modeling_evil.py").write_text("raise SystemExit")
    return path


def kept(path) -> dict[str, bytes]:
    """What of a directory is carried: not what could run."""
    return {name: data for name, data in contents(path).items() if not name.endswith(".py")}


FORMATS = {
    "float32": lambda x, key: x,
    "bfloat16": lambda x, key: x.astype(jnp.bfloat16),
    "float8": lambda x, key: x.astype(jnp.float8_e4m3fn),
    "mixed": lambda x, key: x.astype(np.float16 if "bias" in key else x.dtype),
}


def in_format(name: str) -> dict[str, np.ndarray]:
    return {k: FORMATS[name](x, k) for k, x in tensors().items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_are_the_same_bytes(tmp_path, monkeypatch, name, shards):
    monkeypatch.setattr(parts, "BLOCK", 64)
    path = directory(tmp_path / "in", shards, in_format(name))
    orbax.write(tmp_path / "step", huggingface.opened(path))
    assert verify(tmp_path / "step", 0) == []
    huggingface.save(tmp_path / "out", orbax.opened(tmp_path / "step"))
    assert contents(tmp_path / "out") == kept(path)
    # The same by way of devices, and from directory to directory.
    model = orbax.read(tmp_path / "step")
    loaded = huggingface.load(path)
    assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == b).all(), model.params, loaded.params))
    huggingface.save(tmp_path / "again", model)
    huggingface.save(tmp_path / "copy", huggingface.opened(path))
    assert contents(tmp_path / "again") == contents(tmp_path / "copy") == kept(path)


LLAMA = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 12}
LLAMA |= {"intermediate_size": 8, "num_hidden_layers": 2, "tie_word_embeddings": True}


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_in_the_file(tmp_path, rng, equal):
    """As the table it is no parameter and follows it; another one is a parameter, whatever config.json says."""
    found = Origin.of(LLAMA).found
    made = rules.plan(found.of.spec(found.cfg), found.rules).tensors
    given = {key: rng.normal(size=shape).astype(np.float32) for key, shape in made.items()}
    given["lm_head.weight"] = given["model.embed_tokens.weight"] + (not equal)
    path = write(tmp_path / "in", given, config=LLAMA)
    orbax.write(tmp_path / "step", huggingface.opened(path))
    huggingface.save(tmp_path / "out", orbax.opened(tmp_path / "step"))
    assert contents(tmp_path / "out") == contents(path)
    model = orbax.read(tmp_path / "step")
    trained = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 1, model.params))
    orbax.write(tmp_path / "trained", trained)
    huggingface.save(tmp_path / "new", orbax.opened(tmp_path / "trained", dtype="bfloat16"))
    source = huggingface.Directory(tmp_path / "new")
    for key, x in given.items():
        assert source.read(key).tobytes() == (x + 1).astype(jnp.bfloat16).tobytes(), key


def test_a_trained_model_is_written_in_the_same_layout(tmp_path):
    path = directory(tmp_path / "in", 3)
    orbax.write(tmp_path / "base", huggingface.opened(path))
    model = orbax.read(tmp_path / "base")
    trained = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 1, model.params))
    orbax.write(tmp_path / "trained", trained)
    huggingface.save(tmp_path / "out", orbax.opened(tmp_path / "trained"))
    huggingface.save(tmp_path / "direct", trained)
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")
    assert contents(tmp_path / "out").keys() == kept(path).keys()
    for key, x in tensors().items():
        source = huggingface.Directory(tmp_path / "out")
        wanted = np.arange(1 << 9)[None] if key == "position_ids" else x + 1
        np.testing.assert_array_equal(source.read(key), wanted)


def test_a_training_loop_saves_steps_that_are_understood(tmp_path):
    """With more in tree and metadata, PRNG keys among it."""
    model = huggingface.load(write(tmp_path / "in"))
    content, metadata = orbax.packed(model)
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (1, 2):
            content["params"] = jax.tree.map(lambda x: x + 1, content["params"])
            state = content | {"optimizer": {"count": 3, "key": jax.random.key(0)}}
            checkpoints.save(step, state, metadata=metadata | {"loss": 0.5})
        # And starts from them, with no more than the parameters asked for.
        like = {"params": specs.abstract(MODULE.spec((2, 4)))}
        start, _ = checkpoints.restore(like, partial=True)
    table = tensors()["table.weight"]
    for step, wanted in ((1, table + 1), (2, table + 1 + 1), (None, table + 1 + 1)):
        for found in (orbax.read(tmp_path / "run", step=step), orbax.opened(tmp_path / "run", step=step)):
            np.testing.assert_array_equal(np.asarray(found.params["table"]), wanted)
    np.testing.assert_array_equal(start["params"]["table"], wanted)


def test_a_model_that_came_from_no_directory(tmp_path):
    params = huggingface.load(write(tmp_path / "in")).params
    with pytest.raises(InputError, match="came from no directory; give it origin="):
        orbax.write(tmp_path / "step", Model(MODULE, (2, 4), params))
    model = Model(MODULE, (2, 4), params, Origin.of(CONFIG))
    orbax.write(tmp_path / "step", model, step=7)
    huggingface.save(tmp_path / "out", orbax.opened(tmp_path / "step", step=7))
    huggingface.save(tmp_path / "direct", model)
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")


# Meshes


@pytest.mark.parametrize("explicit", [False, True])
def test_from_one_mesh_to_another(tmp_path, explicit):
    path = directory(tmp_path / "in", 3)
    a, b = make_mesh(MeshConfig(1, 4, 2)), make_mesh(MeshConfig(2, 2, 2, explicit=explicit))
    orbax.write(tmp_path / "streamed", huggingface.opened(path), sizes={"fsdp": 4, "tensor": 2})
    orbax.write(tmp_path / "sharded", huggingface.load(path, mesh=a))
    for name in ("streamed", "sharded"):
        model = orbax.read(tmp_path / name, mesh=b)
        assert jax.tree.map(lambda x: x.sharding, model.params) == specs.shardings(MODULE.spec((2, 4)), b, Rules())
        assert {s.data.shape for s in model.params["table"].addressable_shards} == {(3, 2)}
        huggingface.save(tmp_path / f"{name}.b", model)
        huggingface.save(tmp_path / f"{name}.out", orbax.opened(tmp_path / name))
        # `load` does not keep the large tensor that is no parameter; nothing else differs.
        source = huggingface.Directory(tmp_path / f"{name}.b")
        assert all((source.read(k) == x).all() for k, x in tensors().items() if k != "position_ids")
        assert contents(tmp_path / f"{name}.b") == contents(tmp_path / f"{name}.out")
    assert contents(tmp_path / "streamed.b") == kept(path)


def test_a_device_finds_its_part_alone(tmp_path):
    orbax.write(tmp_path / "step", huggingface.opened(write(tmp_path / "in")), sizes={"fsdp": 2})
    found = parts.stored(tmp_path / "step", manifests.read_manifest(tmp_path / "step", 0))
    assert found["params/table"].store.chunk_layout.read_chunk.shape == (3, 2)
    model = orbax.read(tmp_path / "step")
    with pytest.raises(InputError, match="Arrays on devices are written as they lie"):
        orbax.write(tmp_path / "other", model, sizes={"fsdp": 2})


# Number formats


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("way", ["there", "back", "across", "read"])
def test_another_number_format(tmp_path, way, shards):
    path = directory(tmp_path / "in", shards)
    match way:
        case "there":
            orbax.write(tmp_path / "step", huggingface.opened(path, dtype="bfloat16"))
            model = orbax.opened(tmp_path / "step")
        case "back":
            orbax.write(tmp_path / "step", huggingface.opened(path))
            model = orbax.opened(tmp_path / "step", dtype="bfloat16")
        case "across":
            model = huggingface.opened(path, dtype="bfloat16")
        case "read":
            orbax.write(tmp_path / "step", huggingface.opened(path))
            model = orbax.read(tmp_path / "step", dtype="bfloat16")
    huggingface.save(tmp_path / "out", model)
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG | {"dtype": "bfloat16"}
    source = huggingface.Directory(tmp_path / "out")
    for key, x in tensors().items():
        if key == "position_ids":
            assert (source.read(key) == np.arange(1 << 9)).all()
            assert source.dtypes()[key] == np.int64
        else:
            assert source.read(key).tobytes() == x.astype(jnp.bfloat16).tobytes()
    assert contents(tmp_path / "out").keys() == kept(path).keys()
    assert len(source.headers) == shards


def test_numbers_that_do_not_fit(tmp_path):
    path = directory(tmp_path / "in", given=tensors() | {"table.weight": np.full((3, 4), 1e6, np.float32)})
    orbax.write(tmp_path / "step", huggingface.opened(path))
    for model in (huggingface.opened(path, dtype="float16"), orbax.opened(tmp_path / "step", dtype="float16")):
        for out in (huggingface.save, orbax.write):
            with pytest.raises(InputError, match=r"table.* holds numbers larger than any of float16; choose another"):
                out(tmp_path / "out", model)
    assert sorted(os.listdir(tmp_path)) == ["in", "step"]


# Memory


def test_the_host_holds_a_tensor_at_a_time(tmp_path, monkeypatch):
    """Leaves of 8 MiB in tensors of 1 MiB: there and back take the memory of a few tensors, and not of a leaf."""
    import convert.test_huggingface as large

    monkeypatch.setitem(huggingface.FAMILIES, "large", "large")
    monkeypatch.setitem(sys.modules, "mmjax.convert.families.large", large.LARGE)
    monkeypatch.setattr(parts, "BLOCK", 1 << 17)
    tensor = 4 * large.WIDTH**2
    given = {f"w{i}.{j}": np.full((large.WIDTH,) * 2, i + j, np.float32) for i in range(4) for j in range(large.LAYERS)}
    path = write(tmp_path / "in", given, config={"model_type": "large", "leaves": 4})
    del given
    orbax.write(tmp_path / "first", huggingface.opened(path))  # what libraries set up once
    for do in (
        lambda: orbax.write(tmp_path / "step", huggingface.opened(path)),
        lambda: huggingface.save(tmp_path / "out", orbax.opened(tmp_path / "step")),
        lambda: huggingface.save(tmp_path / "half", huggingface.opened(path, dtype="float16")),
    ):
        tracemalloc.start()
        do()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3.5 * tensor, peak / tensor
    assert contents(tmp_path / "out") == contents(path)
    # What was saved whole is read a leaf at a time.
    orbax.write(tmp_path / "whole", huggingface.load(path))
    tracemalloc.start()
    huggingface.save(tmp_path / "back", orbax.opened(tmp_path / "whole"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (large.LAYERS + 3.5) * tensor, peak / tensor
    assert contents(tmp_path / "back") == contents(path)


# Interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])
def test_nothing_is_left_of_what_was_interrupted(tmp_path, monkeypatch, error):
    model = huggingface.opened(write(tmp_path / "in"))
    read, count = huggingface.Directory.read, []

    def interrupted(self, key):
        count.append(key)
        if len(count) == 5:
            raise error
        return read(self, key)

    monkeypatch.setattr(huggingface.Directory, "read", interrupted)
    for out in (orbax.write, huggingface.save):
        count.clear()
        with pytest.raises(InputError if isinstance(error, OSError) else error):
            out(tmp_path / "new/out", model)
        assert os.listdir(tmp_path) == ["in"]


def test_what_is_there_is_not_replaced(tmp_path):
    model = huggingface.opened(write(tmp_path / "in"))
    orbax.write(tmp_path / "step", model)
    before = (tmp_path / "step/done/0.json").read_bytes()
    for one, says in ((model, "step exists already"), (orbax.read(tmp_path / "step"), "step exists already")):
        with pytest.raises(InputError, match=says):
            orbax.write(tmp_path / "step", one)
    assert (tmp_path / "step/done/0.json").read_bytes() == before
    assert verify(tmp_path / "step", 0) == []


# Checkpoints from strangers, and damaged ones


def forged(path, change) -> None:
    """A manifest that is whole and says something else."""
    made = manifests.read_manifest(path, 0)
    change(made, made["metadata"]["huggingface"])
    manifests.write_manifest(path, made)


def replaced(path, **arrays) -> None:
    """The same step with other bytes in its origin."""
    made = manifests.read_manifest(path, 0)
    with Checkpoints(path) as checkpoints:
        flat = {n: np.asarray(x) for n, x in parts.stored(path, made).items()}
        flat |= {f"origin/{name}": np.frombuffer(x, np.uint8) for name, x in arrays.items()}
        manifests.remove_step(path, 0)
        checkpoints.save(0, tree.unflatten(flat), metadata=made["metadata"])


FORGED = {
    "no model": (lambda m, names: m["metadata"].clear(), "holds no model of mmjax.convert"),
    "no object": (lambda m, names: m["metadata"].update(huggingface=[1]), "is not what mmjax.convert writes"),
    "no names": (lambda m, names: names.pop("files"), "is not what mmjax.convert writes"),
    "numbers": (lambda m, names: names.update(kept={"position_ids": 1}), "is not what mmjax.convert writes"),
    "newer": (lambda m, names: names.update(format=2), "written by a newer mmjax, in format 2"),
    "a weight file elsewhere": (
        lambda m, names: names.update(headers={"../evil.safetensors": names["headers"]["model.safetensors"]}),
        r"'\.\./evil.safetensors', which is no plain name",
    ),
    "a side file elsewhere": (
        lambda m, names: names.update(files=["../../.bashrc"]),
        "carries the file '../../.bashrc'",
    ),
    "code": (lambda m, names: names.update(files=["modeling_evil.py"]), "carries the file 'modeling_evil.py'"),
    "more files than there are": (lambda m, names: names["files"].append("LICENSE"), "has no origin/files/00001"),
    "another size": (lambda m, names: names["headers"].update({"model.safetensors": 100}), "end at byte"),
    "a tensor of no header": (
        lambda m, names: names.update(kept={"x": "int64"}),
        "keeps the tensor 'x', which is not that",
    ),
    "a parameter kept": (
        lambda m, names: names.update(kept={"table.weight": "float32"}),
        "keeps the tensor 'table.weight'",
    ),
    "kept in no format": (lambda m, names: names.update(kept={"position_ids": "object"}), "the tensor 'position_ids'"),
    "nothing kept": (lambda m, names: names.update(kept={}), "'position_ids' differ"),
    "fewer arrays": (lambda m, names: m["leaves"].pop("params/table"), "'table' differ"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_names(tmp_path, name):
    (path := write(tmp_path / "in")).joinpath("README.md").write_text("#")
    orbax.write(tmp_path / "step", huggingface.opened(path))
    change, says = FORGED[name]
    forged(tmp_path / "step", change)
    for read in (orbax.opened, orbax.read):
        with pytest.raises(InputError, match=says) as caught:
            read(tmp_path / "step")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("config", b"{", "config.json of step 0 in .* is not JSON"),
        ("config", b"[]", "config.json of step 0 in .* is not a JSON object"),
        ("config", b'{"model_type": "evil"}', "config.json of step 0 in .* has the model_type 'evil'"),
        ("config", json.dumps(CONFIG | {"width": 8}).encode(), "are not those of its config.json .'blocks/k/bias'"),
        ("config", bytes((4 << 20) + 1), "has no origin/config of at most 4,194,304 bytes"),
        ("headers/00000", b"\x02\0\0\0\0\0\0\0{}", "end at byte 10"),
        ("headers/00000", b"\x80\x04.", "is not a safetensors file"),
    ],
)
def test_forged_bytes(tmp_path, name, data, says):
    orbax.write(tmp_path / "step", huggingface.opened(write(tmp_path / "in")))
    replaced(tmp_path / "step", **{name: data})
    with pytest.raises(InputError, match=says):
        orbax.opened(tmp_path / "step")


def test_damage_is_found_before_anything_is_written(tmp_path):
    orbax.write(tmp_path / "step", huggingface.opened(write(tmp_path / "in")))
    largest = max((tmp_path / "step/0").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    for read in (orbax.opened, orbax.read):
        with pytest.raises(InputError, match="has changed since it was written"):
            read(tmp_path / "step")
    with pytest.raises(InputError, match="there is no finished step 3"):
        orbax.opened(tmp_path / "step", step=3)
    with pytest.raises(InputError, match="there is no finished checkpoint in"):
        orbax.opened(tmp_path / "none")


# What is not a model


def test_formats_and_parameters_that_do_not_fit(tmp_path):
    path = write(tmp_path / "in")
    orbax.write(tmp_path / "step", huggingface.opened(path))
    for read in (orbax.read, orbax.opened):
        with pytest.raises(InputError, match="no floating-point format"):
            read(tmp_path / "step", dtype="int8")
    model = huggingface.load(path)
    name, x = next(iter(tree.flatten(model.params).items()))
    fewer = tree.unflatten(tree.flatten(model.params) | {name: x[:-1]})
    with pytest.raises(InputError, match="are not those of the model's config"):
        orbax.write(tmp_path / "fewer", dataclasses.replace(model, params=fewer))
    huge = tree.unflatten({k: x * 0 + 1e6 for k, x in tree.flatten(model.params).items()})
    orbax.write(tmp_path / "huge", dataclasses.replace(model, params=huge))
    with pytest.raises(InputError, match="larger than any of float16"):
        orbax.read(tmp_path / "huge", dtype="float16")
