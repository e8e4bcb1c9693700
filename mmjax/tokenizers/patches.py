"""Arrays of pixels to patches and back, on the host; nn.patch_embed has the same for whole pictures on device."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from mmjax.core.errors import InputError


def patchify(
    image: UInt8[np.ndarray, "height width 3"],
    patch: int,
    *,
    merge: int = 1,
    window: int = 0,
    out: UInt8[np.ndarray, "patches values"] | None = None,
) -> UInt8[np.ndarray, "patches values"]:
    """Cut an image into square patches of `patch` pixels: [rows * columns, patch * patch * 3].

    A patch is flattened as (row in it, column in it, channel). They lie row by row, or as sequence.windows draws it:
    `merge` × `merge` of them together, and windows of `window` such squares a side together. `out` is filled if it is
    given: part of a row's buffer, so that nothing is copied twice. InputError if a side is no multiple, or `out` of
    another shape.
    """
    height, width, _ = image.shape
    unit = patch * merge
    if patch < 1 or merge < 1 or height % unit or width % unit or not image.size:
        raise InputError(
            f"an image of {height}x{width} is not a grid of {patch}-pixel patches"
            + (f", {merge}x{merge} together" if merge > 1 else "")
            + "; resize it to one first"
        )
    shape = (height * width // patch**2, patch * patch * 3)
    out = np.empty(shape, np.uint8) if out is None else out
    if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise InputError(f"out of shape {out.shape} and type {out.dtype} does not hold the patches; give u8{shape}")
    side = window * unit or max(height, width)
    at = 0
    for top in range(0, height, side):
        for left in range(0, width, side):
            block = image[top : top + side, left : left + side]
            rows, columns = block.shape[0] // unit, block.shape[1] // unit
            cut = block.reshape(rows, merge, patch, columns, merge, patch * 3).transpose(0, 3, 1, 4, 2, 5)
            n = rows * columns * merge * merge
            out[at : at + n].reshape(cut.shape)[:] = cut
            at += n
    return out


def unpatchify(
    patches: UInt8[np.ndarray, "patches values"], rows: int, columns: int, patch: int
) -> UInt8[np.ndarray, "height width 3"]:
    """The inverse of `patchify`, row by row: the image of `rows` by `columns` patches. InputError for another shape."""
    if min(rows, columns, patch) < 1 or patches.shape != (rows * columns, patch * patch * 3):
        raise InputError(
            f"an array of shape {patches.shape} is not {rows}x{columns} patches of {patch}x{patch}x3 values; "
            "give the grid and the patch size that it was cut with"
        )
    return patches.reshape(rows, columns, patch, patch, 3).swapaxes(1, 2).reshape(rows * patch, columns * patch, 3)


class Deferred(ABC):
    """A picture or video that is cut into patches only where they belong.

    Seen from outside an array u8[patches, values] that is not there yet.
    """

    dtype = np.dtype(np.uint8)
    ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Patches, and values of each."""

    @abstractmethod
    def write(self, out: UInt8[np.ndarray, "patches values"], merge: int = 1, window: int = 0) -> None:
        """Fills `out` with the patches, in the order that sequence.windows draws."""


@dataclass(frozen=True)
class Pixels(Deferred):
    """Views of one picture, or frames, u8[height, width, 3], on their way into a row's buffer.

    frames: so many views that follow each other make one: their patches lie one after the other in a patch's values
      (Qwen2-VL's clips: 2, see `nn.patch_embed`).
    """

    views: Sequence[np.ndarray]
    patch: int
    frames: int = 1

    def __post_init__(self):
        if self.frames < 1 or len(self.views) % self.frames:
            raise InputError(f"{len(self.views)} views are no groups of {self.frames} frames; repeat the last one.")

    @property
    def shape(self) -> tuple[int, int]:
        pixels = sum(v.shape[0] * v.shape[1] for v in self.views) // self.frames
        return pixels // self.patch**2, self.patch**2 * 3 * self.frames

    def write(self, out: UInt8[np.ndarray, "patches values"], merge: int = 1, window: int = 0) -> None:
        """Cuts the views into patches, one view after the other, into `out`."""
        at, values = 0, self.patch**2 * 3
        for first in range(0, len(self.views), self.frames):
            view = self.views[first]
            n = view.shape[0] * view.shape[1] // self.patch**2
            if self.frames == 1:
                patchify(view, self.patch, merge=merge, window=window, out=out[at : at + n])
            for f in range(self.frames if self.frames > 1 else 0):
                cut = patchify(self.views[first + f], self.patch, merge=merge, window=window)
                out[at : at + n, f * values : (f + 1) * values] = cut
            at += n
