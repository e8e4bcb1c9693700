"""Directories from strangers: everything that is wrong is one sentence, in bounded time and memory."""

import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from convert.fake import CONFIG, raw, tensors, write
from safetensors.numpy import save_file

from mmjax.convert import files, header
from mmjax.convert.files import Directory
from mmjax.core.errors import InputError

DEEP = 100_000


@pytest.fixture(autouse=True)
def in_time():
    """Nothing may hang: a pipe that is opened would."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def refused(path, says: str, megabytes: float = 4.0) -> str:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=says) as caught:
            Directory(path)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert "\n" not in said, "not one sentence"
    assert len(said) < 1000
    assert str(path) in said, "does not say where"
    assert peak < megabytes, f"{peak:.1f} MiB for a refusal"
    return said


# Reading


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


FORMATS = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int16"]
FORMATS += ["uint16", "int32", "uint32", "int64", "uint64", "bool"]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_format_as_the_library_writes_it(tmp_path, rng, shards):
    given = {}
    for name in FORMATS:
        dtype = jnp.dtype(name)
        for shape in ((2, 3), (5,), (), (0, 4), (1, 1, 1, 3)):
            noise = rng.integers(0, 2 if name == "bool" else 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
            given[f"{name}.{shape}"] = noise.view(dtype).reshape(shape)
    source = Directory(write(tmp_path / "a", given, shards=shards))
    assert source.config == CONFIG
    assert source.shapes() == {k: x.shape for k, x in given.items()}
    assert source.dtypes() == {k: x.dtype for k, x in given.items()}
    assert all(same(source.read(key), x) for key, x in given.items())
    assert all(source.read(key).flags.writeable for key in given), "memory of its own"


def test_one_file_of_another_name(tmp_path):
    write(tmp_path / "a")
    os.rename(tmp_path / "a/model.safetensors", tmp_path / "a/open_clip.safetensors")
    assert same(Directory(tmp_path / "a").read("table.weight"), tensors()["table.weight"])


def test_links_to_files_as_in_the_cache_of_the_hub(tmp_path):
    write(tmp_path / "blobs", shards=2)
    (tmp_path / "snapshot").mkdir()
    for name in os.listdir(tmp_path / "blobs"):
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    assert same(Directory(tmp_path / "snapshot").read("table.weight"), tensors()["table.weight"])
    os.remove(tmp_path / "blobs/model-00002-of-00002.safetensors")
    refused(tmp_path / "snapshot", "00002.safetensors is a link to a file that is not there")


def test_spaces_after_the_header_are_part_of_the_format(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a/model.safetensors").write_bytes(
        raw('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}   ', b"\7")
    )
    assert Directory(tmp_path / "a").read("x") == [7]


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x5089])
def test_a_length_that_looks_like_a_pickle_is_none(tmp_path, length):
    text = '{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    (write(tmp_path / "a") / "model.safetensors").write_bytes(raw(text, b"\7"))
    assert Directory(tmp_path / "a").read("x") == [7]


def test_a_tensor_is_read_into_its_own_size(tmp_path):
    given = {f"x{i}": np.zeros(2**18, np.float32) for i in range(16)}
    source = Directory(write(tmp_path / "a", given))
    tracemalloc.start()
    for key in given:
        source.read(key)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * 2**20 * 2, "two tensors at most: the last one and the next"


# Directories


def test_no_directory(tmp_path):
    refused(tmp_path / "none", "is not a directory")
    write(tmp_path / "a")
    refused(tmp_path / "a/config.json", "is a file; give the local directory")
    with pytest.raises(InputError, match="is not a directory"):
        Directory("a\0b")
    with pytest.raises(InputError, match="openai/clip-vit-base-patch32 is not a directory"):
        Directory("openai/clip-vit-base-patch32")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.ckpt", "tf_model.h5", "flax_model.msgpack", "x.pth"])
def test_only_pickles(tmp_path, name):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    refused(tmp_path, rf"can run code .'{name}'. and none in safetensors; convert them")
    os.rename(tmp_path / name, tmp_path / "model.safetensors")
    refused(tmp_path, "model.safetensors is a pickle, and not a safetensors file; convert")
    with zipfile.ZipFile(tmp_path / "model.safetensors", "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps(Evil()))
    refused(tmp_path, "model.safetensors is a zip archive, as torch.save writes it")
    assert not (tmp_path / "run").exists()


def test_no_weights_or_several(tmp_path):
    write(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "a.safetensors")
    save_file({"x": np.zeros(1)}, tmp_path / "b.safetensors")
    refused(tmp_path, "has 2 safetensors files .'a.safetensors', 'b.safetensors'. and neither")
    os.remove(tmp_path / "a.safetensors"), os.remove(tmp_path / "b.safetensors")
    refused(tmp_path, "has no safetensors file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_is_no_file_is_not_opened(tmp_path, name):
    path = write(tmp_path / "a") / name
    os.remove(path)
    os.mkfifo(path)
    refused(tmp_path / "a", f"{name} is not a regular file")
    os.remove(path)
    path.symlink_to("/dev/zero")
    refused(tmp_path / "a", f"{name} is not a regular file")
    os.remove(path)
    path.mkdir()
    refused(tmp_path / "a", f"{name} is not a regular file")
    path.rmdir()
    path.symlink_to(name)
    refused(tmp_path / "a", f"{name} cannot be read: Too many levels of symbolic links")
    os.remove(path)
    here = os.getcwd()
    os.chdir(tmp_path / "a")  # the name of a socket may not be long
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(name)
            refused(tmp_path / "a", f"{name} is not a regular file")
    finally:
        os.chdir(here)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = write(tmp_path / "a") / "model.safetensors"
    source = Directory(tmp_path / "a")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors has changed while it was read"):
        source.read("table.weight")
    os.remove(path)
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        source.read("table.weight")


# config.json


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b"{} x", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
        (b'{"a": NaN}', "the number NaN, which is not finite"),
        (b'{"a": -Infinity}', "the number -Infinity"),
        (b'{"a": 1e999}', "the number 1e999, which is not finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5000 digits, where 40 are allowed"),
        (b'{"a": 0.' + b"9" * 5000 + b"}", "a number of 5002 characters"),
        (b'{"a": "\\ud800"}', "half a surrogate pair in .*ud800"),
        (b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested more than 64 levels deep"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested more than 64 levels deep"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested more than 64 levels deep"),
        (b'{"a":"' + b"x" * (4 << 20) + b'"}', "4,194,312 bytes, where 4,194,304 are allowed"),
        (b"[" + b"[]," * 500_001 + b"[]]", "more than 1,000,000 entries"),
        (b'{"a": "\n"}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
    ],
)
def test_config(tmp_path, text, says):
    (write(tmp_path) / "config.json").write_bytes(text)
    assert "config.json" in refused(tmp_path, says, 40)


def test_huge_sparse_config_and_index_are_not_read(tmp_path):
    for name in ("config.json", "model.safetensors.index.json"):
        path = write(tmp_path / name, shards=2) / name
        with open(path, "wb") as f:
            f.truncate(1 << 40)
        refused(path.parent, "has 1,099,511,627,776 bytes, where", 0.5)


# The header


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def many(*offsets):
    return {f"t{i}": one("U8", [stop - start], [start, stop]) for i, (start, stop) in enumerate(offsets)}


HEADERS = {
    "empty file": (b"", "has 0 bytes, too few"),
    "short": (b"\x02\0\0\0\0\0\0\0{", "has 9 bytes, too few"),
    "length 2^63": (raw("{}", length=2**63), "has 9,223,372,036,854,775,808 bytes by its own account"),
    "length 2^64-1": (raw("{}", length=2**64 - 1), "18,446,744,073,709,551,615 bytes by its own account"),
    "length 0": (raw("{}", length=0), "a header of 0 bytes, where 2 to 16,777,216"),
    "longer than the file": (raw("{}", length=3), "has 3 bytes by its own account, and the file 10"),
    "no object": (raw("[]"), "header is no JSON object"),
    "space first": (raw(" {}"), "header is no JSON object"),
    "not JSON": (raw('{"a"}'), "The header of .* is not JSON"),
    "nul after": (raw(b"{}\0\0"), "is not JSON"),
    "text after": (raw("{} {}"), "is not JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "not UTF-8"),
    "same key twice": (raw('{"a":%s,"a":%s}' % ((json.dumps(one()),) * 2), bytes(8)), "the key 'a' twice"),
    "same field twice": (
        raw('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        "'dtype' twice",
    ),
    "two metadata": (raw('{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' twice"),
    "deep": (raw(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"), "nested more than 4 levels"),
    "deeper than an entry": (raw({"a": one(shape=[[[2]]])}, bytes(8)), "nested more than 4 levels"),
    "5,000 digits": (raw('{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % ("9" * 5000)), "5000 digits"),
    "20 digits": (raw({"a": one(shape=[10**19])}, bytes(8)), r"the shape \[10000000000000000000\], which is no list"),
    "negative": (raw({"a": one(shape=[-2])}, bytes(8)), r"the shape \[-2\]"),
    "negative twice": (raw({"a": one(shape=[-1, -2])}, bytes(8)), r"the shape \[-1, -2\]"),
    "true": (raw({"a": one("U8", [True], [0, 1])}, b"1"), r"the shape \[True\]"),
    "fraction": (raw({"a": one(shape=[2.0])}, bytes(8)), r"the shape \[2.0\]"),
    "text as size": (raw({"a": one(shape=["2"])}, bytes(8)), r"the shape \['2'\]"),
    "no list": (raw({"a": one() | {"shape": 2}}, bytes(8)), "the shape 2,"),
    "product overflows": (raw({"a": one("U8", [2**32, 2**32], [0, 0])}), "does not fit its 0 bytes"),
    "product is 2^64+8": (raw({"a": one("U8", [8, 2**61 + 1], [0, 8])}, bytes(8)), "does not fit its 8 bytes"),
    "zero hides an overflow": (raw({"a": one("U8", [2**62, 2**62, 0], [0, 0])}), "does not fit its 0 bytes"),
    "huge": (raw({"a": one("F32", [10**12], [0, 4 * 10**12])}, bytes(8)), "end at byte 4,000,000,000,0.. and the file"),
    "33 axes": (raw({"a": one("U8", [1] * 33, [0, 1])}, b"1"), "has 33 axes, where 32 are allowed"),
    "wrong size of format": (
        raw({"a": one("F16")}, bytes(8)),
        r"of shape \[2\] and format F16 does not fit its 8 bytes",
    ),
    "unknown format": (raw({"a": one("F31")}, bytes(8)), "the number format 'F31', which is none of BOOL"),
    "half bytes": (raw({"a": one("F4", [16])}, bytes(8)), "the number format 'F4', which"),
    "format is a list": (raw({"a": one(["F32"])}, bytes(8)), "the number format .'F32'., which"),
    "three offsets": (raw({"a": one(offsets=[0, 4, 8])}, bytes(8)), "which are no start and stop"),
    "backwards": (raw({"a": one(offsets=[8, 0])}, bytes(8)), "which are no start and stop"),
    "negative offset": (raw({"a": one(offsets=[-8, 0])}, bytes(8)), r"the data_offsets \[-8, 0\]"),
    "overlap": (raw(many((0, 8), (4, 12)), bytes(12)), "'t1' in .* overlaps the one before it"),
    "same place": (raw(many((0, 8), (0, 8)), bytes(8)), "overlaps the one before it"),
    "hole": (raw(many((0, 8), (9, 12)), bytes(12)), "'t1' in .* leaves 1 bytes unnamed"),
    "hole at the start": (raw(many((1, 8)), bytes(8)), "'t0' in .* leaves 1 bytes unnamed"),
    "rest": (raw(many((0, 8)), bytes(9)), "end at byte 77 and the file at byte 78"),
    "truncated": (raw(many((0, 8)), bytes(7)), "end at byte 77 and the file at byte 76"),
    "empty tensor inside another": (raw(many((0, 8), (4, 4)), bytes(8)), "overlaps the one before it"),
    "no tensors, some bytes": (raw({}, bytes(8)), "end at byte 10 and the file at byte 18"),
    "missing field": (
        raw({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
        "not described by dtype, shape and data_offsets",
    ),
    "more fields": (raw({"a": one(x=1)}, bytes(8)), "not described by"),
    "entry is a number": (raw({"a": 1}), "'a' in .* is not described by"),
    "metadata is a number": (raw({"__metadata__": 1}), "__metadata__ in .* is not an object of texts"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__ in .* is not an object of texts"),
    "empty name": (raw({"": one()}, bytes(8)), "has a name that is empty"),
    "long name": (raw({"x" * 10**6: one()}, bytes(8)), "longer than 512 characters"),
    "name of lines": (raw({"a\n\x1b[2J": one()}, bytes(8)), r"'a\\n\\x1b\[2J' in .* cannot be printed"),
    "half a surrogate": (raw('{"\\ud800":1}'), "half a surrogate"),
    "many entries": (raw(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"), "more than 1,000,000 entries"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
    "web page": (b"<!DOCTYPE html><html>" + bytes(99), "is a web page"),
    "pickle": (pickle.dumps({"a": np.zeros(9)}), "is a pickle"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header(tmp_path, name):
    data, says = HEADERS[name]
    (write(tmp_path) / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refused(tmp_path, says, 4 + 8e-6 * len(data))


def test_sparse_files_that_claim_large_headers(tmp_path):
    write(tmp_path)
    for length, says in (
        (100_000_000, "a header of 100,000,000 bytes, where 2 to 16,777,216 are"),
        (2**20, "is no JSON"),
    ):
        with open(tmp_path / "model.safetensors", "wb") as f:
            f.write(struct.pack("<Q", length))
            f.truncate(1 << 40)
        refused(tmp_path, says, 4)


LARGEST = """
import pathlib, re, sys, time
from mmjax.convert.files import Directory
from mmjax.core.errors import InputError

def memory(which):
    status = pathlib.Path('/proc/self/status').read_text()
    return int(re.search(which + r':\\s+(\\d+)', status)[1]) / 1024

for item in ('1,', '{},', '[],', '"a",', '"\\\\u00e9",', '0.5,'):
    count = min(999_980 // (1 + (item[0] in '[{')), (16 << 20) // len(item) - 10)
    text = ('{"a":[' + item * count + '1]}').encode()
    path = pathlib.Path(sys.argv[1]) / 'model.safetensors'
    path.write_bytes(len(text).to_bytes(8, 'little') + text)
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # VmHWM starts anew
    before, start = memory('VmRSS'), time.process_time()
    try:
        Directory(path.parent)
    except InputError as error:
        assert 'not described by' in str(error), error
        print(item, memory('VmHWM') - before, time.process_time() - start)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux")
def test_the_largest_header_takes_bounded_memory_and_time(tmp_path, pytestconfig):
    """As many of the smallest things as are allowed; in a process whose functions do not check their arguments."""
    env = os.environ | {"PYTHONPATH": str(pytestconfig.rootpath), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LARGEST, str(write(tmp_path))]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    found = [line.split() for line in out.stdout.splitlines()]
    assert len(found) == 6, out.stdout
    assert max(float(megabytes) for _, megabytes, _ in found) < 100, out.stdout
    assert max(float(seconds) for _, _, seconds in found) < 10, out.stdout


def test_headers_together_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_HEADERS", 600)
    refused(write(tmp_path / "a", shards=4), "The headers in .* have more than 600 bytes together")


def test_a_bool_is_one_or_nought(tmp_path):
    (write(tmp_path) / "model.safetensors").write_bytes(raw({"a": one("BOOL", [2], [0, 2])}, b"\1\2"))
    with pytest.raises(InputError, match=r"'a' in .* is neither true nor false"):
        Directory(tmp_path).read("a")


def test_formats_are_those_of_the_library(tmp_path):
    """Every name in our table is the one that the library gives the format."""
    for name, dtype in header.FORMATS.items():
        if name in ("C64", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
            continue  # newer than the oldest library that will do
        save_file({"a": np.zeros(2, dtype)}, tmp_path / "a.safetensors")
        assert f'"dtype":"{name}"'.encode() in (tmp_path / "a.safetensors").read_bytes()


def test_headers_are_written_as_the_library_does(tmp_path, rng):
    for metadata in ({"format": "pt"}, {}):
        for seed in range(3):
            dice = np.random.default_rng(seed)
            given = {
                f"{'é' * (i % 2)}{dice.integers(99)}.{name}": np.zeros(dice.integers(0, 3, dice.integers(0, 4)), name)
                for i, name in enumerate(dice.permutation(FORMATS))
            }
            save_file(given, tmp_path / "a.safetensors", metadata=metadata or None)
            made = header.build({k: (x.dtype, x.shape) for k, x in given.items()}, metadata, "a")
            assert (tmp_path / "a.safetensors").read_bytes() == made.raw + bytes(made.size - len(made.raw))
    with pytest.raises(InputError, match="a cannot be written: x is complex128, which safetensors does not have"):
        header.build({"x": (np.dtype(complex), (1,))}, {}, "a")


# The index


def index_of(path, change):
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(change(index["weight_map"]) or index))


NAMES = ["../model.safetensors", "a/b.safetensors", "/etc/x.safetensors", "a\0.safetensors", "..", ".", "", "evil.bin"]
NAMES += [".hidden.safetensors", "a\\b.safetensors", "x" * 300 + ".safetensors", "a\n.safetensors", 5, None, ["a"], {}]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_plain_files(tmp_path, name):
    write(tmp_path, shards=2)
    index_of(tmp_path, lambda placed: placed.__setitem__("table.weight", name))
    refused(tmp_path, "which is no plain name of a safetensors file")


@pytest.mark.parametrize("content", [{}, [], {"weight_map": {}}, {"weight_map": []}, {"weight_map": "a"}])
def test_an_index_has_a_map(tmp_path, content):
    (write(tmp_path, shards=2) / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(tmp_path, "has no weight_map|is not a JSON object")


def test_an_index_is_strict_json(tmp_path):
    path = write(tmp_path, shards=2) / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}')
    refused(tmp_path, "index.json has the key 'a' twice")


def test_every_shard_is_there(tmp_path):
    path = write(tmp_path, shards=2) / "model-00002-of-00002.safetensors"
    os.remove(path)
    refused(tmp_path, "00002-of-00002.safetensors is missing; download the whole directory")
    os.mkfifo(path)
    refused(tmp_path, "00002-of-00002.safetensors is not a regular file")


def test_every_tensor_is_where_the_index_says_and_nowhere_else(tmp_path):
    write(tmp_path, shards=2)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    before = (tmp_path / "model.safetensors.index.json").read_bytes()

    def restore():
        (tmp_path / "model.safetensors.index.json").write_bytes(before)

    placed = json.loads(before)["weight_map"]
    other = second if placed["table.weight"] == first else first
    index_of(tmp_path, lambda placed: placed.__setitem__("table.weight", other))
    refused(tmp_path, f"'table.weight' is in {placed['table.weight']}, and in {other} by")
    restore()
    index_of(tmp_path, lambda placed: placed.pop("table.weight") and None)
    refused(tmp_path, "The tensors 'table.weight' are in files of .*, and not in it")
    restore()
    index_of(tmp_path, lambda placed: placed.__setitem__("more", first))
    refused(tmp_path, f"'more' is in no file, and in {first} by")
    restore()
    both = {k: x for k, x in tensors().items() if placed[k] == other} | {"table.weight": tensors()["table.weight"]}
    save_file(both, tmp_path / other)
    refused(tmp_path, "hold 1 tensors twice")


def test_a_single_file_goes_before_an_index(tmp_path):
    """As in transformers."""
    write(tmp_path, shards=2)
    save_file({"x": np.ones(3)}, tmp_path / "model.safetensors")
    assert list(Directory(tmp_path).shapes()) == ["x"]


def test_files_that_no_index_names_are_none_of_ours(tmp_path):
    write(tmp_path, shards=2)
    (tmp_path / "consolidated.safetensors").write_bytes(b"garbage")
    assert len(Directory(tmp_path).shapes()) == len(tensors())


# Writing


def test_a_new_directory_is_whole_or_absent(tmp_path):
    with files.new_directory(tmp_path / "a/b") as folder:
        (folder / "x").write_bytes(b"1")
        assert not (tmp_path / "a/b").exists()
    assert (tmp_path / "a/b/x").read_bytes() == b"1"
    assert os.listdir(tmp_path / "a") == ["b"]

    def fail():
        with files.new_directory(tmp_path / "c/d/e") as folder:
            (folder / "x").write_bytes(b"1")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == ["a"]


def test_new_files_honour_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with files.new_directory(tmp_path / "a") as folder:
            save_file({"x": np.zeros(1)}, folder / "x.safetensors")  # which makes it 0600
    finally:
        os.umask(old)
    assert (tmp_path / "a/x.safetensors").stat().st_mode & 0o777 == 0o640


def test_what_is_there_is_not_replaced(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "nowhere").symlink_to("none")
    os.mkfifo(tmp_path / "pipe")
    for name in ("full", "file", "link", "nowhere", "pipe"):
        with pytest.raises(InputError, match=f"{name} exists already"), files.new_directory(tmp_path / name):
            pass
    with pytest.raises(InputError, match="file is a file; choose"), files.new_directory(tmp_path / "file/a"):
        pass
    with files.new_directory(tmp_path / "empty"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full", "link", "nowhere", "pipe"]


def test_what_comes_meanwhile_is_not_replaced(tmp_path):
    def late():
        with files.new_directory(tmp_path / "a"):
            (tmp_path / "a").mkdir()
            (tmp_path / "a/x").touch()

    with pytest.raises(InputError, match="a exists already"):
        late()
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(tmp_path / "a") == ["x"]
