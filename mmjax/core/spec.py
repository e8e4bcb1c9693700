"""ParamSpec: shape, logical axes and initialiser of every parameter, the single source of truth about a module.

A module's `spec(cfg)` returns a nested dict of ParamSpec. Everything else that must know the parameters without having
them comes from there: initial values, abstract shapes, shardings on any mesh, counts, checkpoint targets.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core import meshes, sharding

Spec = dict  # a nested dict whose leaves are ParamSpec


@dataclass(frozen=True)
class Constant:
    """Every entry is `value`."""

    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


@dataclass(frozen=True)
class Normal:
    """Normal with standard deviation `stddev`, cut at two deviations (and not widened again, as in ViT and Llama)."""

    stddev: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        return self.stddev * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)


@dataclass(frozen=True)
class Uniform:
    """Uniform between -bound and bound."""

    bound: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)


ZEROS, ONES = Constant(0.0), Constant(1.0)


def fan_in(inputs: int) -> Normal:
    """The usual initialiser of a linear map from `inputs` values: deviation 1/sqrt(inputs)."""
    return Normal(inputs**-0.5)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, one logical axis name (or None) per dimension, and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable[[jax.Array, tuple[int, ...], object], jax.Array] = ZEROS
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"A parameter of shape {self.shape} needs {len(self.shape)} axis names, not {self.axes}.")


def _is_leaf(x) -> bool:
    return isinstance(x, ParamSpec)


def map_specs(f: Callable[[ParamSpec], object], spec: Spec) -> dict:
    """The tree of f(leaf) for every ParamSpec of a spec."""
    return jax.tree.map(f, spec, is_leaf=_is_leaf)


def stack(spec: Spec, layers: int) -> Spec:
    """The spec of `layers` equal modules held in one tree with a leading axis, as `lax.scan` wants them."""
    return map_specs(lambda p: replace(p, shape=(layers, *p.shape), axes=("layers", *p.axes)), spec)


def gradients_laid(params: dict, spec: Spec) -> dict:
    """The same parameters, whose gradients lie on the mesh in force as the spec says. For the body of a scan.

    There, a compiler that propagates shardings sees no reason to split a gradient before the loop has collected those
    of all layers: each device would hold all of them whole.

    Args:
      params: of `spec`, or of one layer where it is that of a stack.
      spec: theirs.
    """

    def one(p: ParamSpec, x: jax.Array | dict) -> jax.Array | dict:
        if isinstance(x, dict):  # of an adapted kernel (nn.lora) what is as large as it was
            return x | {"base": one(p, x["base"])}
        return sharding.gradient_laid(x, p.axes[len(p.axes) - x.ndim :])

    return jax.tree.map(one, spec, params, is_leaf=_is_leaf)


def count(spec: Spec) -> int:
    """How many numbers the parameters hold."""
    return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(spec, is_leaf=_is_leaf))


def init(spec: Spec, key: jax.Array) -> dict:
    """Initial parameters.

    A leaf's key depends on its path alone, so adding a parameter elsewhere does not change it, and its values do not
    depend on the mesh.
    """

    def one(path, p: ParamSpec) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return p.init(jax.random.fold_in(key, zlib.crc32(name.encode())), p.shape, jnp.dtype(p.dtype))

    return jax.tree_util.tree_map_with_path(one, spec, is_leaf=_is_leaf)


def shardings(spec: Spec, mesh: jax.sharding.Mesh, rules: meshes.Rules) -> dict:
    """The NamedSharding of every parameter on a mesh."""
    return map_specs(lambda p: meshes.named(mesh, p.axes, rules, p.shape), spec)


def abstract(spec: Spec, mesh: jax.sharding.Mesh | None = None, rules: meshes.Rules | None = None) -> dict:
    """Shapes and dtypes without values, with shardings where a mesh is given: for `lower` and for restoring."""

    def one(p: ParamSpec) -> jax.ShapeDtypeStruct:
        placed = None if mesh is None else meshes.named(mesh, p.axes, rules or meshes.Rules(), p.shape)
        return jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype), sharding=placed)

    return map_specs(one, spec)
