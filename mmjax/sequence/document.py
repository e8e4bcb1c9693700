"""A document: an ordered list of typed spans. Every dataset is read into it, every model is fed from it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mmjax.core.errors import InputError

Role = Literal["system", "user", "assistant", "document"]  # "document": outside of any conversation


@dataclass(frozen=True)
class Text:
    """Words. `train`: whether the model learns to write them.

    turn: of any span, whether it begins a turn of its own even where the span before has the same role.
    """

    text: str
    role: Role = "user"
    train: bool = False
    turn: bool = False


@dataclass(frozen=True)
class Encoded:
    """A picture file's bytes, read when they are wanted: from inside an archive, say."""

    read: Callable[[], bytes]


@dataclass(frozen=True)
class Image:
    """A picture, by its place in the list; its size is known before its pixels are.

    source: encoded bytes, now (`bytes`) or when asked for (`Encoded`), a path, an array u8[height, width, 3], or a
      function of no arguments that gives such an array (for a dataset that draws or augments).
    """

    height: int
    width: int
    source: bytes | Path | Encoded | np.ndarray | Callable[[], np.ndarray]
    role: Role = "user"
    turn: bool = False


@dataclass(frozen=True)
class Video:
    """A clip, by its place in the list: how many pictures it has and how fast they follow each other.

    source: an array u8[frames, height, width, 3], or a function of no arguments that gives such an array.
    """

    frames: int
    height: int
    width: int
    fps: float
    source: np.ndarray | Callable[[], np.ndarray]
    role: Role = "user"
    turn: bool = False


@dataclass(frozen=True)
class Audio:
    """Sound, by its place in the list: so many samples, `rate` of them a second, one channel.

    source: an array f32[samples] in [-1, 1], or a function of no arguments that gives such an array.
    """

    samples: int
    rate: int
    source: np.ndarray | Callable[[], np.ndarray]
    role: Role = "user"
    turn: bool = False


Span = Text | Image | Video | Audio


@dataclass(frozen=True)
class Document:
    """Spans in reading order. `id` names the document in every error message."""

    id: str
    spans: tuple[Span, ...]

    def __post_init__(self):
        if not self.spans:
            raise InputError(f"Document {self.id!r} has no spans; give it at least one Text, Image, Video or Audio.")

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(span for span in self.spans if isinstance(span, Image))
