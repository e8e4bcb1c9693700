"""What is done to a picture's pixels before it is cut into patches: chains of two operations, resize and window.

A policy (tokenizers.resolution) writes them down from the picture's size alone; `render` carries them out, exactly as
Pillow does. Resizing, cropping, padding, tiles, slices and thumbnails are all such chains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmjax.core.errors import InputError

MOST = 2**27  # pixels of a step: what a policy makes of a long, thin picture may be large
Filter = Literal["bilinear", "bicubic", "lanczos"]
Color = tuple[int, int, int]
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Resize:
    """To so many pixels, by Pillow's filter of that name (which averages when it shrinks)."""

    height: int
    width: int
    filter: Filter = "bicubic"


@dataclass(frozen=True)
class Window:
    """The part that begins at row `top` and column `left`; what lies outside the picture is `fill`.

    So it crops, pads, or does both.
    """

    top: int
    left: int
    height: int
    width: int
    fill: Color = (0, 0, 0)


Step = Resize | Window
View = tuple[Step, ...]  # from the picture, upright and in RGB, to what is cut into patches


def check(view: View) -> None:
    """Raises InputError for a step that leaves no pixel, or makes more than `MOST`."""
    for step in view:
        if step.height < 1 or step.width < 1:
            raise InputError(f"{step} leaves no picture; both sides must be at least 1 pixel.")
        if step.height * step.width > MOST:
            raise InputError(f"{step} makes a picture of more than {MOST:,} pixels; lower the resolution.")


def size(view: View, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels at the end of the chain, for a picture of this size."""
    return (view[-1].height, view[-1].width) if view else (height, width)


def resized(view: View, height: int, width: int) -> tuple[float, float]:
    """By which factors a picture's height and width are scaled along the chain."""
    down = across = 1.0
    for step in view:
        if isinstance(step, Resize):
            down, across = down * step.height / height, across * step.width / width
        height, width = step.height, step.width
    return down, across


def needed(views: Sequence[View]) -> tuple[int, int] | None:
    """The height and width below which no first resize of these views goes; None where one does not begin with one.

    A file that can be decoded at a lower resolution need not have more than that.
    """
    first = [view[0] if view else None for view in views]
    if not first or not all(isinstance(step, Resize) for step in first):
        return None
    return max(step.height for step in first), max(step.width for step in first)


class _Canvas:
    """A picture on its way, as Pillow has it and as an array, each made when it is first asked for."""

    def __init__(self, picture: Image.Image | None = None, pixels: np.ndarray | None = None):
        self._picture, self._pixels = picture, pixels

    @property
    def picture(self) -> Image.Image:
        if self._picture is None:
            self._picture = Image.fromarray(self._pixels)
        return self._picture

    @property
    def pixels(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels = np.asarray(self._picture)
        return self._pixels

    def resize(self, step: Resize) -> "_Canvas":
        # A picture of that size already comes back as it is, as from Pillow.
        return _Canvas(self.picture.resize((step.width, step.height), FILTERS[step.filter]))

    def crop(self, step: Window) -> "_Canvas":
        """A window that is resized next: cut by Pillow, without an array of the whole picture."""
        right, bottom = step.left + step.width, step.top + step.height
        part = self.picture.crop((step.left, step.top, right, bottom))
        if step.fill == (0, 0, 0) or (min(step.top, step.left) >= 0 and _within(self.picture, right, bottom)):
            return _Canvas(part)
        out = Image.new("RGB", part.size, step.fill)
        out.paste(self.picture, (-step.left, -step.top))
        return _Canvas(out)

    def window(self, step: Window) -> "_Canvas":
        """A window that is looked at next; where it lies inside, it shares the picture's memory."""
        pixels = self.pixels
        top, left = max(step.top, 0), max(step.left, 0)
        inside = pixels[top : max(step.top + step.height, 0), left : max(step.left + step.width, 0)]
        if inside.shape[:2] == (step.height, step.width):
            return _Canvas(pixels=inside)
        out = np.empty((step.height, step.width, 3), np.uint8)
        out[:] = step.fill
        down, across = top - step.top, left - step.left
        out[down : down + inside.shape[0], across : across + inside.shape[1]] = inside
        return _Canvas(pixels=out)


def _within(picture: Image.Image, right: int, bottom: int) -> bool:
    return right <= picture.width and bottom <= picture.height


def render(
    picture: Image.Image | UInt8[np.ndarray, "h w 3"], views: Sequence[View]
) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """The pixels of each view of a picture in RGB; steps that views have in common are done once.

    The arrays may share memory and are not to be written to. InputError for a step that leaves no pixel.
    """
    done = {(): _Canvas(pixels=picture) if isinstance(picture, np.ndarray) else _Canvas(picture)}
    for view in views:
        check(view)
        for end in range(1, len(view) + 1):
            if view[:end] not in done:
                before, step = done[view[: end - 1]], view[end - 1]
                if isinstance(step, Resize):
                    done[view[:end]] = before.resize(step)
                else:
                    done[view[:end]] = before.window(step) if end == len(view) else before.crop(step)
    return [done[view].pixels for view in views]
