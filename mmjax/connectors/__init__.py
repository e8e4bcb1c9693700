"""Connectors: how many media tokens survive, and in which space."""

import inspect
import sys
from types import ModuleType
from typing import Any

from jaxtyping import Array, Float, Int


class Connector:
    """The base of every connector's Config, so that a model's config may hold any of them.

    per_picture: media tokens of every picture, where that number is fixed; 0: it depends on the picture.
    square: patches a side that become one media token and lie together (sequence.windows); 1: a token for each patch.
    prefix: whether it reads the encoder's class and register tokens besides patches (BLIP-2).
    reads_text: whether it reads a text beside each picture (InstructBLIP).
    alone: the module cannot stand between encoder and decoder by itself: its tokens are counted by neither, or it makes
      none. Use it as a function.
    """

    per_picture: int = 0
    square: int = 1
    prefix: bool = False
    reads_text: bool = False
    alone: bool = False

    @property
    def reads(self) -> int | None:
        """Values of the features that it reads; None: of any number."""
        return getattr(self, "inputs", None)

    def of_features(self, path: tuple[str, ...]) -> bool:
        """Whether features go through the matrix at this path, and not media tokens; for counting FLOPs.

        Of a resampler they are keys and values and what it projects first; its latents are its media tokens.
        """
        return self.per_picture > 0 and (path[0] == "projection" or any(p in ("k", "v", "kv") for p in path))

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """How many media tokens a picture of (frames, rows, columns) patches becomes; for `sequence.layout`."""
        raise TypeError(f"{type(self).__name__} does not say how many media tokens it makes.")


def module(cfg: Any) -> ModuleType:
    """The Python module that a connector's (or a language model's) Config stands in, with its `spec` and `apply`."""
    return sys.modules[type(cfg).__module__]


def connect(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Connector,
    *,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
    text: Any = None,
) -> Float[Array, "b m e"]:
    """Media tokens of packed pictures, whichever connector it is: its `apply` gets those descriptors that it reads.

    text: what it reads beside the pictures (a qformer_labels.Text), where cfg.reads_text.
    """
    of, at = module(cfg), {"image": image, "order": order, "grid": grid, "text": text}
    return of.apply(params, features, cfg, **{k: v for k, v in at.items() if k in _reads(of)})


def _reads(of: ModuleType) -> frozenset[str]:
    return frozenset(inspect.signature(of.apply).parameters)
