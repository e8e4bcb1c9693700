"""Media encoders: patches and frames to features."""

import inspect
import sys
from types import ModuleType
from typing import Any


class Encoder:
    """The base of the Config of every encoder that a vision-language model may have.

    embed: the patch embedding. stacks: the transformers that its tokens go through, by name, in turn.
    per_picture: features of every picture, where that number is fixed; 0: one for each of its patches.
    prefix: class and register tokens that each picture has besides its patches.
    window: patches a side of what lies together in a row (sequence.interleave.Config.window); 0: nothing does. None:
      whatever that config says, as long as it says something.
    canvas: windows of every picture, where it has as many features as those whatever its size (sequence.interleave).
    outputs: values of a feature.
    """

    per_picture: int = 0
    prefix: int = 0
    window: int | None = 0
    canvas: int = 0

    def tokens(self, patches: int) -> int:
        """How many tokens its blocks see of a picture of so many patches."""
        raise TypeError(f"{type(self).__name__} does not say how many tokens a picture has.")


def module(cfg: Encoder) -> ModuleType:
    """The Python module that an encoder's Config stands in, with its `spec` and `encode`."""
    return sys.modules[type(cfg).__module__]


def see(params: dict, patches: Any, cfg: Encoder, *, taps: tuple[int, ...] = (), **at: Any) -> Any:
    """What an encoder makes of packed pictures (vit.Features), whichever it is.

    Its `encode` gets those descriptors of `at` that it reads (see encoders.vit.encode).
    """
    of = module(cfg)
    reads = inspect.signature(of.encode).parameters
    return of.encode(params, patches, cfg, taps=taps, **{k: v for k, v in at.items() if k in reads})
