"""A vision tower and what makes media tokens of it: Qwen-VL's, which has its merger inside, and DeepStack's taps."""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from mmjax.connectors import merger
from mmjax.core.errors import InputError
from mmjax.core.spec import Spec, stack
from mmjax.encoders import vit


@dataclass(frozen=True)
class Config:
    """deepstack: blocks whose output goes to the first layers of the language model, each through a merger of its own,
    all like `deep` (Meng et al. 2024; Qwen3-VL).
    """

    vision: vit.Config
    merger: merger.Config
    deepstack: tuple[int, ...] = ()
    deep: merger.Config | None = None

    def __post_init__(self):
        if bool(self.deepstack) != (self.deep is not None):
            raise InputError("DeepStack's blocks and the config of its mergers go together; give both or neither.")


@flax.struct.dataclass
class Media:
    """What the language model gets."""

    tokens: Any  # [B, M, E]
    deep: Any = None  # [T, B, M, E], added to the media tokens after its first T layers
    features: Any = None  # vit.Features, what the tower saw; its taps are those of DeepStack


def spec(cfg: Config) -> Spec:
    out = {"vision": vit.spec(cfg.vision), "merger": merger.spec(cfg.merger)}
    return out | ({"deep": stack(merger.spec(cfg.deep), len(cfg.deepstack))} if cfg.deep else {})


def apply(
    params: dict,
    patches: Num[Array, "b p c"],
    cfg: Config,
    *,
    order: Int[Array, "b p"],
    lo: Int[Array, "b p"],
    hi: Int[Array, "b p"],
    position: Num[Array, "b p axes"],
    window: tuple[Int[Array, "b p"], Int[Array, "b p"]] | None = None,
    image: Int[Array, "b p"] | None = None,
    grid: Int[Array, "b n 3"] | None = None,
) -> Media:
    """Media tokens [B, M, E] of packed pictures; arguments as of vit.encode, patches in squares' order."""
    see = {"order": order, "lo": lo, "hi": hi, "position": position, "window": window, "image": image, "grid": grid}
    seen = vit.encode(params["vision"], patches, cfg.vision, taps=cfg.deepstack, **see)
    tokens = merger.apply(params["merger"], seen.patches, cfg.merger)
    deep = jnp.zeros((0, *tokens.shape), tokens.dtype)
    if cfg.deep is not None:
        # As many as there are taps, and few: unrolled, each product keeps its own place on a mesh.
        each = [jax.tree.map(lambda p, i=i: p[i], params["deep"]) for i in range(len(cfg.deepstack))]
        deep = jnp.stack([merger.apply(p, x, cfg.deep) for p, x in zip(each, seen.taps, strict=True)])
    return Media(tokens, deep, seen)
