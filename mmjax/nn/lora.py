"""Low-rank adaptation (Hu et al. 2021, LoRA, section 4.1): beside a kernel W that stays, a product of two thin ones.

    kernel: W    →    kernel: {"base": W, "a": A, "b": B, "scale": s}            y = x W + s · (x A) B

`core.sharding.dense` takes either, so that whatever multiplies with a kernel does, in training and in generation,
without W + s · A B being made. `merged` makes it. In a step of training, A may read less than W (`dropping`).
"""

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.spec import ZEROS, Constant, ParamSpec, Spec, Uniform

MATRICES = ("base", "a", "b")
PARTS = (*MATRICES, "scale")
# What peft's lists of modules name: attention's products and the MLP's in a decoder's blocks; and, where text looks at
# media, those of the layers of cross-attention between them, which bear the same names.
TARGETS = ("decoder/blocks/attention/*", "decoder/blocks/mlp/*")
CROSSED = (*TARGETS, "decoder/cross/*")


@dataclass(frozen=True)
class Config:
    """Which kernels are adapted, and how.

    rank: of A B. alpha: s is alpha / rank; with `rslora` alpha / sqrt(rank) (Kalajdzievski 2023, section 3).
    targets: of kernels, by path (core.tree.choose); what is no kernel among what they name is left as it is.
    dropout: the share of an adapter's inputs that is left out in each step of training (peft's lora_dropout).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise InputError(
                f"lora.rank is {self.rank} and lora.alpha {self.alpha}; give a rank of 1 or more, and more."
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout is {self.dropout}; give a share below 1, as 0.05, or 0 for none.")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def targets(spec: Spec, cfg: Config) -> list[str]:
    """The names of the kernels that are adapted.

    Raises:
      InputError: a pattern names nothing, or no kernel of a product; or they leave none.
    """

    def kernels(of: Spec) -> dict[str, None]:
        flat = tree.flatten(of).items()
        return dict.fromkeys(name for name, p in flat if name.split("/")[-1] == "kernel" and _product(p))

    out = kernels(spec) if cfg.targets and cfg.targets[0].startswith("!") else {}
    for pattern in cfg.targets:
        less = pattern.startswith("!")
        try:
            kept, taken = tree.choose(spec, [pattern])
        except InputError as error:
            raise InputError(f"lora.targets: {error}") from error
        named = kernels(taken if less else kept)
        if not named:
            raise InputError(
                f"lora.targets: the pattern {pattern!r} names no kernel that tokens are multiplied with; give one that "
                f"does, as {TARGETS[0]!r}."
            )
        out = {name: None for name in out if name not in named} if less else out | named
    if not out:
        raise InputError(f"lora.targets is {cfg.targets}, which leaves no kernel to adapt; give one that stays.")
    return list(out)


def spec(of: Spec, cfg: Config) -> Spec:
    """The spec of a model with adapted kernels."""
    flat = tree.flatten(of)
    for name in targets(of, cfg):
        flat[name] = _adapted(flat[name], cfg)
    return tree.unflatten(flat)


def _product(p: ParamSpec) -> bool:
    """Whether a kernel is one of `core.sharding.dense`: convolutions and patches have inputs of no logical axis."""
    axes = p.axes[p.axes[:1] == ("layers",) :]
    return len(axes) > 1 and axes[0] is not None and (len(axes) == 2 or "heads" in axes)


def _adapted(p: ParamSpec, cfg: Config) -> dict[str, ParamSpec]:
    """A and B as peft starts them: A uniform between ±1 / sqrt(inputs) (Kaiming's with a = sqrt(5)), B zero."""
    lead = int(p.axes[:1] == ("layers",))
    cut = lead + (2 if p.axes[lead] == "heads" else 1)  # inputs are heads and what each has, or one axis
    inputs = math.prod(p.shape[lead:cut])
    return {
        "base": p,
        "a": ParamSpec((*p.shape[:cut], cfg.rank), (*p.axes[:cut], None), Uniform(inputs**-0.5)),
        "b": ParamSpec((*p.shape[:lead], cfg.rank, *p.shape[cut:]), (*p.axes[:lead], None, *p.axes[cut:]), ZEROS),
        "scale": ParamSpec(p.shape[:lead], p.axes[:lead], Constant(cfg.scale)),
    }


def parted(params: dict) -> tuple[dict[str, Any], dict[str, dict]]:
    """The leaves of a model by name, as they are without adapters; and what is adapted, by the names of kernels."""
    flat, nodes = tree.flatten(params), {}
    for name in [name for name in flat if name.endswith("/kernel/a")]:
        kernel = name.removesuffix("/a")
        nodes[kernel] = {part: flat.pop(f"{kernel}/{part}") for part in PARTS}
        flat[kernel] = nodes[kernel]["base"]
    return flat, nodes


def dropping(params: dict, rate: float, key: jax.Array) -> dict:
    """Parameters whose adapters leave out some of their inputs, for one step of training.

        y = x W + s · (m x / (1 - rate) A) B         each number of m is 1, or 0 with the probability `rate`

    W reads all of x. Every kernel in every layer has an m of its own, which follows from `key` and the kernel's path
    alone (Srivastava et al. 2014, Dropout, section 4): the same when the backward pass computes it again, and on any
    mesh.

    Args:
      params: a model's; without adapters nothing changes.
      rate: from 0 up to, and without, 1.
      key: of the step.
    """

    def one(name: str, node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        if node.keys() != set(PARTS):
            return {part: one(f"{name}/{part}", inner) for part, inner in node.items()}
        layers, own = node["scale"].shape, jax.random.fold_in(key, zlib.crc32(name.encode()))
        keys = jax.random.split(own, layers) if layers else own
        return node | {"drop": {"key": keys, "kept": jnp.full(layers, 1.0 - rate, jnp.float32)}}

    return one("", params)


def merged(params: dict) -> dict:
    """Parameters without adapters: W + s · A B in float32, rounded once to W's format. Of arrays or NumPy's."""

    def one(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        return added(*(node[part] for part in PARTS)) if node.keys() == set(PARTS) else merged(node)

    return {name: one(node) for name, node in params.items()}


def added(base: Any, a: Any, b: Any, scale: Any) -> Any:
    """W + s · A B of one kernel, or of a stack of them."""
    xp = np if isinstance(base, np.ndarray) else jnp
    multiply = np.matmul if xp is np else functools.partial(jnp.matmul, precision="highest")
    a, b, s = (xp.asarray(x, np.float32) for x in (a, b, scale))
    rank, lead = a.shape[-1], s.shape
    product = multiply(a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1)) * s[..., None, None]
    return (xp.asarray(base, np.float32) + product.reshape(base.shape)).astype(base.dtype)
