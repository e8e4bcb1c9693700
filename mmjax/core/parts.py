"""Arrays of a step written and read part by part: none of them is ever whole in memory.

Orbax saves and loads arrays whole. What keeps them on disk is TensorStore: each is a Zarr array, all are in one
key-value store (OCDBT). So Orbax first writes the tree with a single number in place of each array, and then every
array is made anew in its place and filled; and they are read from there, some layers at a time. To Orbax, and to
`mmjax.checkpoint`, such a step is like any other.

https://orbax.readthedocs.io (checkpoint format), https://google.github.io/tensorstore (zarr3, ocdbt)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mmjax.core import storage
from mmjax.core.checksum import describe, parse, sums_numpy, text
from mmjax.core.manifest import Damaged

# What is read, compressed and written at a time. TensorStore keeps what it writes until it has written all of it.
BLOCK = 32 << 20
_AT_A_TIME = {"data_copy_concurrency": {"limit": 2}, "file_io_concurrency": {"limit": 2}}


@runtime_checkable
class Lazy(Protocol):
    """An array that is read when asked for: `lazy[i]` gives a layer of it, `np.asarray(lazy)` all of it.

    stacked: whether a layer is read alone, in memory of its own size.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool

    def __getitem__(self, i: int) -> np.ndarray: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...


def write(path: Path, arrays: Mapping[str, Any], cuts: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Writes a step's data to a new directory, and gives the checksum of every array (`core.checksum`).

    Takes the memory of one layer of a stacked array, or of one that is not stacked, and of a few `BLOCK`s.

    Args:
      arrays: by name (`core.tree.flatten`): `Lazy`, or arrays.
      cuts: into how many parts the axes of some arrays are cut (by a mesh), so that a device reads its own part only.
    """
    storage.save(path, {name: np.zeros(1, x.dtype) for name, x in arrays.items() if math.prod(x.shape)}, "rename")()
    sums = {}
    for name, x in arrays.items():
        shape, dtype = tuple(x.shape), np.dtype(x.dtype)
        plain = mixed = 0
        if math.prod(shape):
            block = _block(shape, dtype.itemsize, cuts.get(name, (1,) * len(shape)), _stacked(x))
            store = _made(path, name, shape, block, cuts.get(name, (1,) * len(shape)))
            for place, start, part in _parts(x, block):
                more = sums_numpy(part, start)
                plain, mixed = (plain + more[0]) % 2**32, (mixed + more[1]) % 2**32
                store[place].write(part).result()
        sums[name] = text(describe(np.broadcast_to(np.zeros((), dtype), shape)), plain, mixed)
    return sums


def _stacked(x: Any) -> bool:
    return getattr(x, "stacked", False)


def _block(shape: tuple[int, ...], itemsize: int, cut: tuple[int, ...], stacked: bool) -> list[int]:
    """What is written at a time, as a shape: some layers, or some rows of one; at most BLOCK bytes where that can be.

    Along an axis that is cut it is whole parts, or lies in one.
    """
    out = list(shape)
    for axis in range(min(len(shape), 2 if stacked else 1)):
        most = max(1, out[axis] * BLOCK // (math.prod(out) * itemsize))
        if most < out[axis]:
            part = -(-shape[axis] // cut[axis])
            out[axis] = most // part * part or most
    return out


def _parts(x: Any, block: list[int]) -> Iterator[tuple[tuple[slice, ...], int, np.ndarray]]:
    """Every block: its place, the number of its first element, and its content."""
    if not block or not _stacked(x):
        whole = np.asarray(x)
        if not block:
            yield (), 0, whole
            return
        inner = math.prod(whole.shape[1:])
        for some in _runs(len(whole), block[0]):
            yield (some,), some.start * inner, np.ascontiguousarray(whole[some])
        return
    inner = math.prod(x.shape[1:])
    if block[0] > 1 or len(block) == 1:
        for some in _runs(x.shape[0], block[0]):
            out = np.empty((some.stop - some.start, *x.shape[1:]), x.dtype)
            for i in range(some.start, some.stop):
                out[i - some.start] = x[i]
            yield (some,), some.start * inner, out
        return
    row = math.prod(x.shape[2:])
    for i in range(x.shape[0]):
        layer = x[i]
        for some in _runs(len(layer), block[1]):
            yield (slice(i, i + 1), some), i * inner + some.start * row, np.ascontiguousarray(layer[some])[None]
        del layer  # before the next is read


def _runs(size: int, step: int) -> list[slice]:
    return [slice(a, min(a + step, size)) for a in range(0, size, step)]


def _made(path: Path, name: str, shape: tuple[int, ...], block: list[int], cut: tuple[int, ...]) -> Any:
    """The array, empty, in place of the number that stands for it; encoded as Orbax does it."""
    ts, spec = _spec(path, name)
    chunk = [min(n, -(-whole // parts)) for n, whole, parts in zip(block, shape, cut, strict=True)]
    found = ts.open(spec).result().spec().to_json()["metadata"]
    kept = {k: found[k] for k in ("data_type", "fill_value", "chunk_key_encoding") if k in found}
    metadata = kept | {
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": _shaped(found["codecs"], chunk),
    }
    return ts.open(
        spec | {"metadata": metadata, "create": True, "delete_existing": True, "store_data_equal_to_fill_value": True}
    ).result()


def _shaped(codecs: Any, chunk: list[int]) -> Any:
    """The same codecs for chunks of another shape."""
    if isinstance(codecs, list):
        return [_shaped(codec, chunk) for codec in codecs]
    if not isinstance(codecs, dict):
        return codecs
    return {k: chunk if k == "chunk_shape" else _shaped(v, chunk) for k, v in codecs.items()}


def _spec(path: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """TensorStore, and where it finds an array of a step."""
    import tensorstore as ts

    stores = sorted(found.parent for found in path.glob("*/manifest.ocdbt"))
    if len(stores) != 1:
        raise Damaged(f"{path} holds {len(stores)} stores of arrays, where Orbax writes one")
    base = {"driver": "file", "path": f"{stores[0]}/"}
    store = {"driver": "ocdbt", "base": base, "path": f"{name.replace('/', '.')}/"}
    # Nothing is cached: every part is read once.
    spec = {"driver": "zarr3", "kvstore": store, "context": {**_AT_A_TIME, "cache_pool": {"total_bytes_limit": 0}}}
    return ts, spec


@dataclass
class Stored:
    """An array of a step, read when asked for. What it reads for a layer it keeps as long as the next one needs it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    store: Any  # None where it has no elements
    at: int = -1
    rows: np.ndarray | None = field(default=None, repr=False)

    @property
    def stacked(self) -> bool:
        return len(self.shape) > 0

    def __getitem__(self, i: int) -> np.ndarray:
        if self.store is None:
            return np.zeros(self.shape, self.dtype)[i, ...]
        some = self.store.chunk_layout.read_chunk.shape[0]
        if self.rows is None or self.at != i // some:
            self.rows = None  # before the next
            self.at = i // some
            self.rows = self.store[self.at * some : min((self.at + 1) * some, self.shape[0])].read().result()
        out = self.rows[i % some, ...]
        if i % some == len(self.rows) - 1:
            self.rows = None
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.zeros(self.shape, self.dtype) if self.store is None else self.store.read().result()
        return out if dtype is None else out.astype(dtype, copy=False)


def stored(directory: Path, manifest: dict[str, Any]) -> dict[str, Stored]:
    """The arrays of a step by name, none of them read; nothing is compared with checksums.

    Raises:
      Damaged: an array is missing, or not what the manifest says.
    """
    out = {}
    for name, said in manifest["leaves"].items():
        dtype, shape = parse(said)
        store = None
        if math.prod(shape):
            ts, spec = _spec(directory / str(manifest["step"]), name)
            try:
                store = ts.open(spec | {"open": True}, read=True).result()
            except ValueError as error:
                raise Damaged(f"{name!r} of step {manifest['step']} in {directory} cannot be read: {error}") from error
            if (store.dtype.numpy_dtype, store.shape) != (dtype, shape):
                raise Damaged(f"{name!r} of step {manifest['step']} in {directory} is not {said.partition(':')[0]}")
        out[name] = Stored(shape, dtype, store)
    return out
