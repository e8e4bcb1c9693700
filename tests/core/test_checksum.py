import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmjax.core import checksum
from mmjax.core.checksum import checksums, checksums_numpy, describe, parse, start_checksums
from mmjax.core.errors import InputError


def example() -> dict:
    rng = np.random.default_rng(0)
    return {
        "f32": rng.normal(size=(8, 6)).astype(np.float32),
        "bf16": rng.normal(size=(16, 3)).astype(ml_dtypes.bfloat16),
        "f16": rng.normal(size=8).astype(np.float16),
        "f8": rng.normal(size=8).astype(ml_dtypes.float8_e4m3fn),
        "i32": rng.integers(-9, 9, (8, 2, 3)).astype(np.int32),
        "i8": rng.integers(-9, 9, (8, 2)).astype(np.int8),
        "i4": rng.integers(-8, 8, 8).astype(ml_dtypes.int4),
        "bool": rng.random((8, 3)) > 0.5,
        "complex": (rng.normal(size=8) + 1j).astype(np.complex64),
        "special": np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -np.nan, 1], np.float32),
        "empty": np.zeros((8, 0), np.float32),
        "scalar": np.float32(3.5),
    }


def by_definition(array: np.ndarray) -> str:
    """The module's formula, word by word in Python integers."""
    data = array.astype(np.int8) if array.dtype == ml_dtypes.int4 else array
    words = np.frombuffer(data.tobytes(), f"<u{min(data.dtype.itemsize, 4)}").tolist()
    mixed = 0
    for i, word in enumerate(words):
        x = (word + i * 0x9E3779B9) % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        mixed += x ^ x >> 16
    shape = ",".join(map(str, array.shape))
    return f"{array.dtype.name}[{shape}]:{sum(words) % 2**32:08x}:{mixed % 2**32:08x}"


def test_known_values():
    tree = example() | {"i64": np.arange(-3, 3), "f64": np.linspace(0, 1, 5), "big_endian": np.arange(3, dtype=">i4")}
    expected = {name: by_definition(np.asarray(x, np.asarray(x).dtype.newbyteorder("="))) for name, x in tree.items()}
    assert checksums_numpy(tree) == expected
    assert expected["scalar"].startswith("float32[]:40600000:")
    assert expected["empty"] == "float32[8,0]:00000000:00000000"


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_equal_on_any_mesh(mode, count):
    tree = example()
    expected = checksums_numpy(tree)
    mesh = jax.make_mesh((count,), ("d",), axis_types=(mode,), devices=jax.devices()[:count])
    specs = {name: PartitionSpec("d") if np.ndim(x) else PartitionSpec() for name, x in tree.items()}
    placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in tree.items()}
    assert checksums(placed) == expected
    # Another mesh is the current one, and one leaf lies on a single device.
    placed["f16"] = jnp.asarray(tree["f16"])
    with jax.set_mesh(jax.make_mesh((8,), ("other",), axis_types=(mode,))):
        assert checksums(placed) == expected


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_equal_when_split_along_two_axes(mode):
    x = np.random.default_rng(1).normal(size=(4, 6, 8)).astype(np.float32)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(mode,) * 2)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", None, "b")))
    assert checksums({"x": split}) == checksums_numpy({"x": x})


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_only_sums_cross_devices(mode):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(mode,) * 2)
    split = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, PartitionSpec("a", "b")))
    with jax.set_mesh(mesh):
        program = checksum._sums.lower({"x": split}).compile().as_text()
    collectives = re.findall(r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute)", program)
    assert collectives
    for result in collectives:
        for shape in re.findall(r"\[([\d,]*)\]", result):
            assert np.prod([int(size) for size in shape.split(",") if size], dtype=int) <= 8, result


def test_donated_while_the_sums_run():
    x = jnp.asarray(np.random.default_rng(4).normal(size=2**20), jnp.float32)
    expected = checksums_numpy({"x": np.array(x)})
    finish = start_checksums({"x": x})
    jax.jit(lambda x: x * 2, donate_argnums=0)(x).block_until_ready()
    assert finish() == expected


def test_longer_than_one_chunk_on_the_host():
    x = np.random.default_rng(2).integers(0, 2**32, (3, 2**19 + 7), np.uint32)
    assert checksums({"x": jnp.asarray(x)}) == checksums_numpy({"x": x})
    assert checksums_numpy({"x": x})["x"] != checksums_numpy({"x": x[::-1].copy()})["x"]


def test_every_flipped_bit_changes_the_first_sum():
    for name, array in example().items():
        array = np.asarray(array)
        if array.dtype == np.bool_ or name in ("i4", "empty"):
            continue
        was = checksums_numpy({"x": array})["x"].split(":")[1]
        data = bytearray(array.tobytes())
        for bit in range(8 * len(data)):
            data[bit // 8] ^= 1 << bit % 8
            changed = np.frombuffer(bytes(data), array.dtype).reshape(array.shape)
            assert checksums_numpy({"x": changed})["x"].split(":")[1] != was, (name, bit)
            data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("distance", [1, 2, 1024, 2**17, 2**20])
@pytest.mark.parametrize("values", [(1.5, -1.5), (0.0, -0.0), (1.0, 2.0), (3.0, np.nextafter(np.float32(3), 4))])
def test_swapped_elements_are_seen(distance, values):
    # The first pairs differ by 2^31 as words: a sum weighted by the index alone misses them at even distances.
    x = np.zeros(distance + 4, np.float32)
    x[1], x[1 + distance] = values
    y = x.copy()
    y[1], y[1 + distance] = values[::-1]
    before, after = checksums_numpy({"x": x})["x"], checksums_numpy({"x": y})["x"]
    assert before.split(":")[1] == after.split(":")[1]
    assert before != after


def test_shape_and_dtype_count():
    x = np.arange(6, dtype=np.int32)
    found = {checksums_numpy({"x": y})["x"] for y in (x, x.reshape(2, 3), x.view(np.uint32), x.view(np.float32))}
    assert len(found) == 4


def test_keys_are_summed_as_their_data_and_64_bits_keep_theirs():
    key = jax.random.split(jax.random.key(3), 4)
    tree = {"key": key, "wide": np.array([2**40 + 1]), "number": 3, "flag": True}
    found = checksums(tree)
    assert found["key"] == checksums_numpy({"key": np.asarray(jax.random.key_data(key))})["key"]
    assert found["wide"] != checksums({"wide": np.array([1])})["wide"]
    assert found["number"].startswith("int64[]:00000003:")
    assert found["flag"].startswith("bool[]:00000001:")


def test_one_compiled_function_for_a_tree(monkeypatch):
    calls = []
    sums = checksum._sums
    monkeypatch.setattr(checksum, "_sums", lambda arrays: calls.append(len(arrays)) or sums(arrays))
    checksums({f"w{i}": jnp.ones(i) for i in range(5)})
    assert calls == [5]


def test_what_is_no_number_is_named():
    with pytest.raises(InputError, match="'a/name' is of type str, not an array of numbers"):
        checksums({"a": {"name": "text"}})
    with pytest.raises(InputError, match="'w' is of type ShapeDtypeStruct"):
        checksums({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_describe_and_parse():
    key = jax.random.split(jax.random.key(0), 3)
    assert describe(key) == describe(jax.ShapeDtypeStruct(key.shape, key.dtype)) == "uint32[3,2]"
    assert describe(jnp.zeros((2, 0), jnp.bfloat16)) == "bfloat16[2,0]"
    assert parse("bfloat16[2,0]:00000000:00000000") == (jnp.dtype(jnp.bfloat16), (2, 0))
    assert parse(describe(np.float32(1))) == (np.dtype(np.float32), ())
