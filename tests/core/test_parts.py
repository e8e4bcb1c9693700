"""Arrays written and read part by part: as Orbax would have written them, and in little memory."""

import tracemalloc
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.checkpoint import Checkpoints, open_nested, verify
from mmjax.core import manifest as manifests
from mmjax.core import parts
from mmjax.core.checksum import checksums_numpy, sums_numpy
from mmjax.core.manifest import Damaged
from mmjax.core.tree import flatten, unflatten


class Layers:
    """An array whose layers are read when asked for."""

    stacked = True

    def __init__(self, x):
        self.x, self.shape, self.dtype = x, x.shape, x.dtype

    def __getitem__(self, i):
        return self.x[i]

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("all of it was read")


def arrays(rng) -> dict[str, np.ndarray]:
    return {
        "params/few": rng.normal(size=(5, 3, 4)).astype(np.float32),  # several layers in a block
        "params/large": rng.normal(size=(3, 30, 7)).astype(jnp.bfloat16),  # several blocks in a layer
        "params/wide": rng.normal(size=(2, 2, 300)),  # a row larger than a block
        "params/vectors": rng.normal(size=(7,)).astype(np.float16),
        "params/none": np.zeros((0, 3), np.float32),
        "params/zeros": np.zeros((4, 4), jnp.float8_e4m3fn),
        "plain/table": rng.normal(size=(40, 9)).astype(np.float32),
        "plain/scalar": np.asarray(3.5, np.float32),
        "plain/bytes": np.arange(1000).astype(np.uint8),
        "plain/flags": np.array([True, False]),
    }


def written(folder, content: dict, cuts: dict | None = None) -> dict:
    (folder / "done").mkdir(parents=True)
    lazily = {n: Layers(x) if n.startswith("params") else x for n, x in content.items()}
    made = {"format": manifests.FORMAT, "step": 0, "metadata": {}, "keys": {}}
    made["leaves"] = parts.write(folder / "0", lazily, cuts or {})
    made["files"] = manifests.list_files(folder / "0")
    manifests.write_manifest(folder, made)
    return made


def same(a, b) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize("block", [64, 200, 1 << 20])
def test_written_in_parts_opens_like_any_step(tmp_path, rng, monkeypatch, block):
    monkeypatch.setattr(parts, "BLOCK", block)
    content = arrays(rng)
    made = written(tmp_path, content, {"params/large": (1, 3, 2), "plain/table": (3, 1)})
    assert made["leaves"] == checksums_numpy(content)
    assert verify(tmp_path, 0) == []
    found = flatten(open_nested(tmp_path))
    assert all(same(found[name], x) for name, x in content.items())
    with Checkpoints(tmp_path) as checkpoints:
        restored = flatten(checkpoints.restore(unflatten(content)).tree)
        assert all(same(restored[name], x) for name, x in content.items())
        checkpoints.save(1, unflatten(restored), wait=True)
    assert verify(tmp_path, 1) == []


def test_read_in_parts(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK", 200)
    content = arrays(rng)
    made = written(tmp_path / "parts", content)
    with Checkpoints(tmp_path / "whole") as checkpoints:
        checkpoints.save(0, unflatten(content), wait=True)
    for folder, manifest in (
        (tmp_path / "parts", made),
        (tmp_path / "whole", manifests.read_manifest(tmp_path / "whole", 0)),
    ):
        found = parts.stored(folder, manifest)
        for name, x in content.items():
            assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
            assert isinstance(found[name], parts.Lazy)
            assert same(np.asarray(found[name]), x)
            for order in (range(x.shape[0]), reversed(range(x.shape[0]))) if x.ndim else ():
                assert all(same(np.asarray(found[name][i]), x[i]) for i in order), name


def test_a_mesh_finds_its_parts_alone(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK", 1 << 17)
    content = {"params/w": rng.integers(0, 2**31, (4, 240, 160)).astype(np.int32)}
    made = written(tmp_path, content, {"params/w": (1, 4, 2)})
    chunk = parts.stored(tmp_path, made)["params/w"].store.chunk_layout.read_chunk.shape
    assert chunk == (1, 60, 80), "204 rows are a block, of which three times 60 are whole parts"
    size = sum(file["size"] for file in made["files"])
    assert size < 1.15 * content["params/w"].nbytes, "no chunk was written twice"


def test_one_layer_is_in_memory(tmp_path, monkeypatch):
    """Eight layers of 1 MiB, each made when it is asked for."""
    monkeypatch.setattr(parts, "BLOCK", 1 << 17)

    class Made(Layers):
        def __init__(self):
            super().__init__(SimpleNamespace(shape=(8, 512, 512), dtype=np.dtype(np.float32)))

        def __getitem__(self, i):
            return np.full((512, 512), i, np.float32)

    written(tmp_path / "before", {"plain": np.ones(3)})  # what libraries set up once
    tracemalloc.start()
    parts.write(tmp_path / "0", {"w": Made()}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 2**20, peak / 2**20


def test_what_is_not_as_the_manifest_says(tmp_path, rng):
    made = written(tmp_path, {"plain/w": rng.normal(size=(3, 4))})
    for name, said in (("plain/w", "float64[4,3]"), ("plain/w", "float32[3,4]"), ("plain/v", "float32[1]")):
        with pytest.raises(Damaged, match=f"'{name}' of step 0 in .* (is not|cannot be read)"):
            parts.stored(tmp_path, made | {"leaves": {name: f"{said}:0:0"}})
    (tmp_path / "0/state/manifest.ocdbt").rename(tmp_path / "away")
    with pytest.raises(Damaged, match="holds 0 stores of arrays"):
        parts.stored(tmp_path, made)


def test_sums_of_parts(rng):
    for x in (rng.normal(size=600).astype(jnp.bfloat16), rng.normal(size=600), np.arange(600) % 2 == 0):
        sums = [sums_numpy(x[a:b], a) for a, b in ((0, 7), (7, 500), (500, 600))]
        assert sums_numpy(x) == tuple(sum(some) % 2**32 for some in zip(*sums, strict=True))
