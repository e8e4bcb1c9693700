"""Whole directories: there and back to the byte, changed and unchanged, sharded, refused, and mutated at random."""

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import struct
import sys
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert import fake
from convert.fake import CONFIG, MODULE, tensors, write
from safetensors import safe_open
from safetensors.numpy import save_file

from mmjax.convert import huggingface, rules, writing
from mmjax.convert.found import Found
from mmjax.convert.huggingface import FAMILIES, Model, Origin, load, save
from mmjax.convert.rules import Rule
from mmjax.core import spec as specs
from mmjax.core.errors import InputError
from mmjax.core.meshes import MeshConfig, Rules, make_mesh
from mmjax.core.spec import ParamSpec


@pytest.fixture(autouse=True)
def family(monkeypatch):
    fake.register(monkeypatch)


def contents(path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


def refused(says: str, f, *args, **options) -> str:
    with pytest.raises(InputError, match=says) as caught:
        f(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def mixed() -> dict[str, np.ndarray]:
    """Kernels in bfloat16, biases in float16, the table in float32."""
    return {
        k: x.astype(jnp.bfloat16 if "qk.weight" in k or "out.weight" in k else np.float16 if "bias" in k else x.dtype)
        for k, x in tensors().items()
    }


DTYPES = {
    name: lambda name=name: tensors() | {k: x.astype(name) for k, x in tensors().items() if k != "position_ids"}
    for name in ("float32", "float16", "bfloat16", "float8_e4m3fn")
} | {"mixed": mixed}


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unchanged_is_written_as_the_same_bytes(tmp_path, dtype, shards):
    given = DTYPES[dtype]()
    path = write(tmp_path / "in", given, shards=shards)
    model = load(path)
    assert (model.of, model.cfg) == (MODULE, (2, 4))
    blocks = model.params["blocks"]
    for i in range(2):
        qk = given[f"layers.{i}.qk.weight"]
        assert np.asarray(blocks["q"]["kernel"][i]).tobytes() == np.ascontiguousarray(qk[:4].T).tobytes()
        assert np.asarray(blocks["k"]["kernel"][i]).tobytes() == np.ascontiguousarray(qk[4:].T).tobytes()
    assert model.params["table"].dtype == given["table.weight"].dtype
    save(tmp_path / "out", model)
    assert contents(tmp_path / "out") == contents(path)
    again = load(tmp_path / "out")
    assert again.origin.index == model.origin.index
    assert os.listdir(tmp_path) == ["in", "out"] or os.listdir(tmp_path) == ["out", "in"]


def test_headers_that_no_library_writes_are_kept(tmp_path):
    """Another order, other spaces, several metadata: the bytes are kept, not written anew."""
    path = write(tmp_path / "in")
    header, data = {"__metadata__": {"z": "1", "format": "pt", "a": "é"}}, b""
    for key, x in reversed(tensors().items()):
        header[key] = {"data_offsets": [len(data), len(data) + x.nbytes], "shape": list(x.shape), "dtype": "F32"}
        header[key]["dtype"] = "I64" if key == "position_ids" else "F32"
        data += x.tobytes()
    text = json.dumps(header, indent=1).encode() + b"  "
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (path / "config.json").write_text(json.dumps(CONFIG, indent=7))
    save(tmp_path / "out", load(path))
    assert contents(tmp_path / "out") == contents(path)


def test_other_files_are_not_ours(tmp_path):
    path = write(tmp_path / "in")
    (path / "modeling_evil.py").write_text("raise SystemExit")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    save(tmp_path / "out", load(path))
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("shards", [1, 3])
def test_changed_parameters_keep_the_layout(tmp_path, shards):
    path = write(tmp_path / "in", shards=shards)
    model = load(path)
    changed = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 1, model.params))
    save(tmp_path / "out", changed)
    again = load(tmp_path / "out")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b + 1).all()), again.params, model.params))
    before, after = contents(path), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith(".safetensors"):
            n = 8 + int.from_bytes(before[name][:8], "little")
            assert before[name][:n] == after[name][:n]
        else:
            assert before[name] == after[name]
        with safe_open(tmp_path / "out" / name, "numpy") if name.endswith(".safetensors") else open(os.devnull) as f:
            if "position_ids" in (f.keys() if name.endswith(".safetensors") else ()):
                np.testing.assert_array_equal(f.get_tensor("position_ids"), tensors()["position_ids"])


@pytest.mark.parametrize("shards", [1, 3])
def test_another_format_gets_new_headers_and_says_so(tmp_path, shards):
    raw = CONFIG | {"vision_config": {"torch_dtype": "float32", "dtype": ["x"]}}
    path = write(tmp_path / "in", shards=shards, config=raw)
    model = load(path, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    save(tmp_path / "out", model)
    after = contents(tmp_path / "out")
    assert after.keys() == contents(path).keys()
    wanted = json.loads(json.dumps(raw).replace('"float32"', '"bfloat16"'))
    assert json.loads(after["config.json"]) == wanted
    found = {}
    for name in after:
        if name.endswith(".safetensors"):
            with safe_open(tmp_path / "out" / name, "numpy") as f:
                assert f.metadata() == {"format": "pt"}
                found |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (no dict)
    given = tensors()
    assert found.keys() == given.keys()
    for key, x in found.items():
        dtype = np.int64 if key == "position_ids" else jnp.bfloat16
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, given[key].astype(dtype))
    if shards > 1:
        index = json.loads(after["model.safetensors.index.json"])
        assert index["weight_map"] == json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    # And back: what was lost in bfloat16 is lost, nothing else.
    again = load(tmp_path / "out", dtype="float32")
    save(tmp_path / "back", again)
    assert json.loads((tmp_path / "back/config.json").read_text()) == raw
    assert contents(tmp_path / "back").keys() == after.keys()


def test_some_files_in_another_format(tmp_path):
    path = write(tmp_path / "in", shards=8)
    model = load(path)
    table = model.params["table"].astype(jnp.float16)
    save(tmp_path / "out", dataclasses.replace(model, params=model.params | {"table": table}))
    differ = {k for k, x in contents(path).items() if x != (tmp_path / "out" / k).read_bytes()}
    home = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]["table.weight"]
    assert differ == {home, "model.safetensors.index.json"}, "config.json names no format when there are two"
    assert load(tmp_path / "out").params["table"].dtype == np.float16


def test_large_dropped_tensors_are_listed_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "MAX_KEPT", 8)
    for shards, name in ((1, "one"), (9, "nine")):
        path = write(tmp_path / name, shards=shards)
        model = load(path)
        assert (model.origin.lost, dict(model.origin.kept)) == (("position_ids",), {})
        save(tmp_path / f"{name}.out", model)
        again = load(tmp_path / f"{name}.out")
        assert again.origin.lost == ()
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, model.params))
        assert (tmp_path / f"{name}.out/config.json").read_bytes() == (path / "config.json").read_bytes()
    monkeypatch.setattr(huggingface, "MAX_KEPT", 1 << 20)
    monkeypatch.setattr(huggingface, "MAX_KEPT_ALL", 23)
    assert load(tmp_path / "one").origin.lost == ("position_ids",)


# Without an origin


def test_a_model_from_nowhere_needs_a_config(tmp_path):
    params = load(write(tmp_path / "in")).params
    refused("came from no directory; give it origin=Origin.of", save, tmp_path / "out", Model(MODULE, (2, 4), params))
    origin = Origin.of(CONFIG)
    refused("is not that of its origin", save, tmp_path / "out", Model(MODULE, (3, 4), params, origin))
    save(tmp_path / "out", Model(MODULE, (2, 4), params, origin))
    assert contents(tmp_path / "out")["config.json"] == contents(tmp_path / "in")["config.json"]
    # The library's own layout: the same bytes as a file of the same tensors, positions aside.
    given = {k: x for k, x in tensors().items() if k != "position_ids"}
    save_file(given, tmp_path / "wanted", metadata={"format": "pt"})
    assert contents(tmp_path / "out")["model.safetensors"] == (tmp_path / "wanted").read_bytes()


def test_shards_are_no_larger_than_wanted(tmp_path):
    params = load(write(tmp_path / "in")).params
    model = Model(MODULE, (2, 4), params, Origin.of(CONFIG))
    save(tmp_path / "out", model, shard_bytes=200)
    names = [n for n in contents(tmp_path / "out") if n.endswith(".safetensors")]
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 2
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    given = {k: x for k, x in tensors().items() if k != "position_ids"}
    assert index["metadata"] == {
        "total_parameters": sum(x.size for x in given.values()),
        "total_size": sum(x.nbytes for x in given.values()),
    }
    again = load(tmp_path / "out")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, params))
    save(tmp_path / "again", again, shard_bytes=1)
    assert contents(tmp_path / "again") == contents(tmp_path / "out"), "the layout of its origin"
    assert huggingface.split({"a": 5, "b": 5, "c": 11, "d": 1}, 10) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }


# Meshes


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_straight_into_shards(tmp_path, explicit, shards):
    path = write(tmp_path / "in", shards=shards)
    mesh = make_mesh(MeshConfig(2, 2, 2, explicit=explicit))
    model, whole = load(path, mesh=mesh), load(path)
    assert jax.tree.map(lambda x: x.sharding, model.params) == specs.shardings(MODULE.spec((2, 4)), mesh, Rules())
    assert {s.data.shape for s in model.params["table"].addressable_shards} == {(3, 2)}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), model.params, whole.params))
    replicated = load(path, mesh=mesh, rules=Rules(embed=()))
    assert {s.data.shape for s in replicated.params["table"].addressable_shards} == {(3, 4)}
    save(tmp_path / "out", model)
    assert contents(tmp_path / "out") == contents(path)


# Memory

LAYERS, WIDTH = 8, 512
LARGE = types.ModuleType("mmjax.convert.families.large")
LARGE.spec = lambda cfg: {f"w{i}": ParamSpec((LAYERS, WIDTH, WIDTH), (None, "embed", None)) for i in range(cfg)}
LARGE.read = lambda raw, keys: Found(
    LARGE, raw["leaves"], tuple(Rule(f"w{i}", f"w{i}.{{}}", rules.linear()) for i in range(raw["leaves"]))
)


def test_the_host_holds_a_leaf_at_a_time(tmp_path, monkeypatch):
    """Eight leaves of 8 MiB, over eight devices: loading and saving take memory for one of them and two tensors."""
    monkeypatch.setitem(FAMILIES, "large", "large")
    monkeypatch.setitem(sys.modules, "mmjax.convert.families.large", LARGE)
    leaf, tensor = 4 * LAYERS * WIDTH * WIDTH, 4 * WIDTH * WIDTH
    given = {f"w{i}.{j}": np.full((WIDTH, WIDTH), i + j, np.float32) for i in range(8) for j in range(LAYERS)}
    path = write(tmp_path / "in", given, config={"model_type": "large", "leaves": 8})
    del given
    mesh = make_mesh(MeshConfig(1, 8, 1))
    load(path, mesh=mesh)  # what JAX sets up once
    make, read, count = jax.make_array_from_callback, huggingface.Directory.read, []
    # Simulated devices use the host's own memory: as on others, what they hold is not counted.
    zeros = [
        make((LAYERS, WIDTH, WIDTH), s, lambda i: np.zeros((LAYERS, WIDTH // 8, WIDTH), np.float32))
        for s in (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp")),)
    ]

    def elsewhere(shape, sharding, callback):
        for index in sharding.addressable_devices_indices_map(shape).values():
            callback(index)
        return zeros[0]

    def counted(self, key):
        count.append(key)
        return read(self, key)

    with monkeypatch.context() as m:
        m.setattr(huggingface.Directory, "read", counted)
        m.setattr(jax, "make_array_from_callback", elsewhere)
        tracemalloc.start()
        load(path, mesh=mesh)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sorted(count) == sorted(set(count)), "every tensor is read once, however many the devices"
    assert peak < leaf + 2.5 * tensor, peak / leaf

    model = load(path, mesh=mesh)
    tracemalloc.start()
    save(tmp_path / "out", model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < leaf + 2.5 * tensor, peak / leaf
    assert contents(tmp_path / "out") == contents(path)


# Refusals


def test_unknown_families(tmp_path):
    for name, says in (
        ("sigl1p", "the model_type 'sigl1p': did you mean siglip. Mmjax|the model_type 'sigl1p': did you mean siglip"),
        ("qwen2_vl_vison", "did you mean qwen2_vl_vision"),
        ("llama-of-mine", "the model_type 'llama-of-mine': mmjax.convert knows vit, deit"),
        ("x" * 10_000, "the model_type 'xxx"),
        (None, "has no model_type"),
        (5, "has no model_type"),
        (["clip"], "has no model_type"),
        ("../evil", "the model_type '../evil'"),
    ):
        said = refused(says, load, write(tmp_path, config={"model_type": name}))
        assert "config.json" in said
        assert len(said) < 2000


def test_every_family_is_one_of_ours():
    assert all(name.isidentifier() for name in FAMILIES.values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": 10**18}, "has 'layers' 1000000000000000000, where 10,000 are allowed"),
        ({"layers": 1e300}, "has 'layers' 1e.300, where"),
        ({"depths": [2, 10**9]}, "has 'depths' .2, 1000000000., where"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "has 'num_hidden_layers' 1000000000, where"),
        ({"layers": 9_999}, "has 9,999 layers, and its files 10 tensors"),
        ({"layers": "two"}, "config.json cannot be understood as that of a fake .(Type|ValueError)"),
        ({"layers": None}, "cannot be understood as that of a fake"),
        ({"layers": 3}, "3 missing|4 missing"),
        ({"layers": 1}, "4 surplus .layers.1.out.bias, layers.1.out.weight"),
        ({"layers": -1}, "cannot be understood as that of a fake .ValueError: a parameter has a size that is none"),
        ({"width": 8}, r"of another shape \(layers.0.out.bias is \[4\] and not \[8\]"),
        ({"width": 2**62}, "of another shape"),
        ({"width": -4}, "cannot be understood"),
        ({"width": 4.0}, "cannot be understood"),
    ],
)
def test_configs_of_other_weights(tmp_path, change, says):
    refused(says, load, write(tmp_path, config=CONFIG | change))


def test_weights_of_other_configs(tmp_path):
    given = tensors()
    weight = given.pop("layers.1.out.weight")
    said = refused("are not those of its config", load, write(tmp_path / "a", given | {"head.weight": weight}))
    assert "1 missing (layers.1.out.weight); 1 surplus (head.weight)" in said
    given["layers.1.out.weight"] = weight[:, :3]
    refused(r"layers.1.out.weight is \[4, 3\] and not \[4, 4\]", load, write(tmp_path / "b", given))
    given["layers.1.out.weight"] = weight.astype(np.int8)
    refused("layers.1.out.weight in .*c holds int8 where", load, write(tmp_path / "c", given))
    given["layers.1.out.weight"] = weight.astype(np.float16)
    refused("several number formats", load, write(tmp_path / "d", given))
    assert load(tmp_path / "d", dtype="float32").params["blocks"]["out"]["kernel"].dtype == np.float32
    refused("float64, which JAX would cut", load, write(tmp_path / "e", {k: x * 1.0 for k, x in tensors("f8").items()}))


def test_parameters_of_another_tree(tmp_path):
    model = load(write(tmp_path / "in"))
    for params, says in (
        (model.params | {"more": jnp.zeros(1)}, "more"),
        ({"blocks": model.params["blocks"]}, "table"),
        (model.params | {"table": jnp.zeros((4, 4))}, "table"),
        (model.params | {"table": jnp.zeros((3, 4), "int4")}, "table is int4, which safetensors does not have"),
    ):
        refused(says, save, tmp_path / "out", dataclasses.replace(model, params=params))
        assert os.listdir(tmp_path) == ["in"], "nothing is left"


def test_targets_that_are_there_and_full_disks(tmp_path, monkeypatch):
    model = load(write(tmp_path / "in"))
    refused("in exists already", save, tmp_path / "in", model)
    assert contents(tmp_path / "in") == contents(write(tmp_path / "same"))
    shutil.rmtree(tmp_path / "same")

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    refused("cannot save a model in .*: it takes 0.0 MB and the disk has", save, tmp_path / "out", model)
    monkeypatch.undo()
    fake.register(monkeypatch)

    real, count = os.fsync, []

    def full(fd):
        count.append(fd)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused("cannot save .*out: no space is left on the disk", save, tmp_path / "out", model)
    assert count
    monkeypatch.setattr(os, "fsync", real)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
    model = load(write(tmp_path / "in"))
    write_at = writing._write_at

    def to_a_full_device(path, start, data):
        if not path.exists():
            path.symlink_to("/dev/full")
        write_at(path, start, data)

    monkeypatch.setattr(writing, "_write_at", to_a_full_device)
    refused("cannot save .*out: no space is left", save, tmp_path / "out", model)
    assert os.listdir(tmp_path) == ["in"]


# Mutations


def mutate(dice: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut, doubled or exchanged; mostly at the start, where the structure is."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5))):
        end = len(out) if dice.random() < 0.3 else min(len(out), 1200)
        if end < 2:
            break
        at, n = dice.randrange(end), dice.choice((1, 1, 2, 8, 40))
        match dice.randrange(7):
            case 0:
                out[at] ^= 1 << dice.randrange(8)
            case 1:
                out[at : at + n] = dice.randbytes(len(out[at : at + n]))
            case 2:
                del out[at : at + n]
            case 3:
                out[at:at] = out[at : at + n]
            case 4:
                other = dice.randrange(end)
                out[at : at + n], out[other : other + n] = out[other : other + n], out[at : at + n]
            case 5:
                out[at:at] = dice.choice((b"9", b"-", b"[", b"]", b"{", b"}", b'"', b",", b":", b"0", b"e9", b"null"))
            case 6:
                digit = [i for i in range(end) if chr(out[i]).isdecimal() and out[i] < 128]
                if digit:
                    out[dice.choice(digit)] = dice.choice(b"0123456789")
    return bytes(out)


def restructure(dice: random.Random, data: bytes, safetensors: bool) -> bytes:
    """JSON that is valid and says something else; the header's length is right again."""
    n = int.from_bytes(data[:8], "little") if safetensors else 0
    content = json.loads(data[8 : 8 + n] if safetensors else data)
    places = [content]
    for place in places:
        for value in place.values() if isinstance(place, dict) else place:
            if isinstance(value, dict | list):
                places.append(value)
    for _ in range(dice.choice((1, 1, 2, 4))):
        place = dice.choice(places)
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            continue
        key, other = dice.choice(keys), dice.choice(keys)
        values = (0, 1, -1, 2**31, 2**63, 2.5, True, None, "", "F16", "I64", "a", [], {}, [0, 0], [4, 4], 16, 64, 1e300)
        match dice.randrange(5):
            case 0:
                place[key] = dice.choice(values)
            case 1 if isinstance(place, dict):
                place[dice.choice(("x", "table.weight", "layers.7.out.bias"))] = place[key]
            case 2:
                del place[key]
            case 3:
                place[key], place[other] = place[other], place[key]
            case 4 if isinstance(place[key], int):
                place[key] += dice.choice((-1, 1, -4, 4, 16, -16))
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + n :] if safetensors else text


@pytest.mark.parametrize("seed", range(4))
def test_mutated_directories_load_or_are_refused(tmp_path, seed):
    """2,000 mutations: parameters of the shapes of the spec, or an InputError in one short sentence, nothing else."""
    dice = random.Random(seed)
    path = write(tmp_path / "a", shards=1 + seed % 2 * 2)
    whole, loaded, sentences = contents(path), 0, []
    wanted = jax.tree.map(lambda x: str(x.shape), load(path).params)
    for _ in range(500):
        name = dice.choice(sorted(whole))
        safetensors = name.endswith(".safetensors")
        change = mutate if dice.random() < 0.6 else lambda d, data, s=safetensors: restructure(d, data, s)
        (path / name).write_bytes(change(dice, whole[name]))
        try:
            model = load(path)
        except InputError as error:
            sentences.append(str(error))
        else:
            loaded += 1
            if model.cfg == (2, 4):
                assert jax.tree.map(lambda x: str(x.shape), model.params) == wanted
                save(tmp_path / "out", model)
                assert contents(tmp_path / "out") == {k: (path / k).read_bytes() for k in contents(tmp_path / "out")}
                shutil.rmtree(tmp_path / "out")
        (path / name).write_bytes(whole[name])
    assert min(loaded, len(sentences)) > 20, (loaded, sentences)
    assert not any("\n" in s or len(s) > 6000 for s in sentences)


def test_names_in_sentences_are_short(tmp_path):
    given = tensors() | {"x" * 500 + str(i): np.zeros(1, np.float32) for i in range(500)}
    assert len(refused("500 surplus", load, write(tmp_path, given))) < 15_000


def test_did_you_mean_is_a_sentence(tmp_path):
    said = refused("did you mean", load, write(tmp_path, config={"model_type": "siglipp"}))
    assert re.search(r"'siglipp': did you mean siglip\? ", said), said
