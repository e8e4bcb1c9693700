"""A checksum for every leaf of a tree that is the same number however the leaf is sharded, and on the host.

A leaf is read as unsigned words w[0], w[1], ... (row-major; one word for up to 4 bytes, two for 8; what has less than
a byte is widened to one) and gives two sums modulo 2³²: Σ w[i], and Σ mix(w[i] + i·φ), where φ = 0x9E3779B9 and mix is
MurmurHash3's 32-bit finaliser. Sums of integers do not depend on their order, so any mesh and any device give the same
two numbers. A flipped bit always changes the first sum. Swapped elements change the second but for a chance of 2⁻³²; a
plain index-weighted sum Σ i·w[i] would miss +x and -x changing places at any even distance, because their words differ
by 2³¹.

As text, with dtype and shape: "float32[3,5]:deadbeef:0123abcd". A typed PRNG key is summed as its key data.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core.errors import InputError
from mmjax.core.tree import flatten

_PHI, _MIX1, _MIX2 = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35
_CHUNK = 1 << 20  # words at a time on the host, so that temporaries stay in the cache
_SUB_BYTE = ("int2", "int4", "uint2", "uint4")


def checksums(tree: Any) -> dict[str, str]:
    """The checksum of every leaf by name (`mmjax.core.tree.flatten`).

    Arrays on devices are summed there, in one compiled function for all that lie on the same devices; NumPy arrays and
    Python numbers are summed on the host. Where several processes hold an array together, each must call this.

    Raises:
      InputError: a leaf is no array of numbers.
    """
    return start_checksums(tree)()


def start_checksums(tree: Any) -> Callable[[], dict[str, str]]:
    """Starts `checksums` and returns a function that waits for them; the arrays may be donated meanwhile.

    What lies on the host is summed at once.

    Raises:
      InputError: a leaf is no array of numbers.
    """
    flat = flatten(tree)
    groups: dict[Any, dict[str, jax.Array]] = {}
    host = {}
    for name, leaf in flat.items():
        if isinstance(leaf, jax.Array):
            leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
            mesh = getattr(leaf.sharding, "mesh", None)
            devices = tuple(sorted(device.id for device in leaf.sharding.device_set))
            groups.setdefault((mesh, devices), {})[name] = leaf
        else:
            host[name] = leaf
    found = checksums_numpy(host)
    started = {}
    for (mesh, _), arrays in groups.items():
        # The caller's mesh may be another one than the arrays'.
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            started |= _sums(arrays)
    # Not the arrays themselves, which would stay in memory until the end.
    names, described = list(flat), {name: describe(flat[name]) for name in started}

    def finish() -> dict[str, str]:
        sums = jax.device_get(started)
        return {name: text(described[name], *sums[name]) if name in sums else found[name] for name in names}

    return finish


def checksums_numpy(flat: Mapping[str, Any]) -> dict[str, str]:
    """The same checksums from NumPy arrays (and Python numbers) by name, without any device.

    Raises:
      InputError: a leaf is no array of numbers.
    """
    found = {}
    for name, leaf in flat.items():
        array = np.asarray(leaf)
        if not is_numeric(array.dtype):
            raise InputError(f"{name!r} is of type {type(leaf).__name__}, not an array of numbers; leave it out")
        plain, mixed = sums_numpy(array)
        found[name] = text(describe(array), plain, mixed)
    return found


def sums_numpy(part: np.ndarray, start: int = 0) -> tuple[int, int]:
    """Both sums of a part of an array, which begins at its element number `start` (row-major).

    The sums of an array are those of its parts, added modulo 2³².
    """
    words = _words_numpy(part)
    start *= words.size // max(part.size, 1)
    plain = mixed = 0
    for at in range(0, words.size, _CHUNK):
        chunk = words[at : at + _CHUNK].astype(np.uint32)
        index = np.arange(start + at, start + at + chunk.size, dtype=np.uint64).astype(np.uint32)
        plain += int(chunk.sum(dtype=np.uint32))
        mixed += int(_mix(chunk + index * np.uint32(_PHI), np.uint32).sum(dtype=np.uint32))
    return plain % 2**32, mixed % 2**32


def describe(leaf: Any) -> str:
    """Dtype and shape as text, "float32[3,5]"; of a typed PRNG key those of its key data. Abstract arrays work too."""
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def parse(text: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Dtype and shape back from a checksum or from `describe`'s text."""
    dtype, _, rest = text.partition("[")
    shape = rest.partition("]")[0]
    return jnp.dtype(dtype), tuple(int(size) for size in shape.split(",") if size)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key (`jax.random.key`), or stands for one."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_numeric(dtype: Any) -> bool:
    """Whether a dtype is one of bool, integer, float or complex, NumPy's or JAX's."""
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)


def text(description: str, plain: Any, mixed: Any) -> str:
    """A checksum as text, from `describe`'s text and both sums."""
    return f"{description}:{int(plain):08x}:{int(mixed):08x}"


def _mix(x: Any, u32: Any) -> Any:
    """MurmurHash3's finaliser, a bijection of 32-bit words; the same lines for NumPy and JAX (`u32` makes a word)."""
    x = (x ^ (x >> u32(16))) * u32(_MIX1)
    x = (x ^ (x >> u32(13))) * u32(_MIX2)
    return x ^ (x >> u32(16))


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: _sum(array) for name, array in arrays.items()}


def _sum(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    words = _words(array).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index = index + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    mixed = _mix(words + index * jnp.uint32(_PHI), jnp.uint32)
    # Both in one reduction: XLA's CPU code for it is vectorised, 30 times as fast as two calls of jnp.sum.
    zero = jnp.uint32(0)
    return jax.lax.reduce(
        (words, mixed), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), tuple(range(words.ndim))
    )


def _words(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return _words(jnp.stack([array.real, array.imag], axis=-1))
    if array.dtype == jnp.bool_ or array.dtype.name in _SUB_BYTE:
        array = array.astype(jnp.int8)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}"))


def _words_numpy(array: np.ndarray) -> np.ndarray:
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.bool_ or array.dtype.name in _SUB_BYTE:
        array = array.astype(np.int8)
    words = np.ascontiguousarray(array).reshape(-1)
    return words.view(np.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}"))
