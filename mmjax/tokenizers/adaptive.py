"""Large patches where there is little to see, small ones where there is much: sizes chosen by entropy.

APT (Choudhury et al. 2025, "Accelerating Vision Transformers with Adaptive Patch Sizes", arXiv:2510.18091, section 3).
How many patches a picture takes is not known from its size, so this works on pixels, after a policy of one view has
resized them: on the host, when data are prepared.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from mmjax.core.errors import InputError
from mmjax.tokenizers.patches import patchify

BINS = 512
GREY = (0.2989, 0.5870, 0.1140)


def entropy(image: UInt8[np.ndarray, "height width 3"], side: int) -> Float[np.ndarray, "rows columns"]:
    """Of the grey levels of every square of `side` pixels, in bits: −Σ p log₂ p (eq. 1), over 512 bins of [0, 255].

    Squares that the picture's edges cut are infinitely rich: they are never merged.
    """
    height, width, _ = image.shape
    rows, columns = -(-height // side), -(-width // side)
    out = np.full((rows, columns), np.inf)
    tall, wide = height // side, width // side
    if not tall or not wide:
        return out
    inside = image[: tall * side, : wide * side].astype(np.float32)
    grey = sum(np.float32(weight) * inside[..., channel] for channel, weight in enumerate(GREY))
    bins = np.minimum((grey * np.float32(BINS / 255)).astype(np.int64), BINS - 1)
    first = np.arange(tall * wide).reshape(tall, 1, wide, 1) * BINS
    squares = bins.reshape(tall, side, wide, side)
    counts = np.bincount((first + squares).reshape(-1), minlength=tall * wide * BINS)
    share = np.arange(side * side + 1) / (side * side)
    bits = -share * np.log2(share + 1e-10)
    out[:tall, :wide] = np.maximum(bits[counts].reshape(tall, wide, BINS).sum(-1), 0.0)
    return out


@dataclass(frozen=True)
class Adaptive:
    """Squares of `patch`, twice that, four times that … pixels; a larger one wherever its entropy is low enough.

    thresholds: in bits, for twice the patch, four times …; from the largest on, a square of less entropy is one patch,
      whatever lies in it. The paper's: 5.75 and 4.0.
    """

    patch: int = 16
    thresholds: tuple[float, ...] = (5.75, 4.0)

    def __post_init__(self):
        if self.patch < 1:
            raise InputError(f"{self} cuts nothing; give a patch of at least 1 pixel")

    def cells(self, image: UInt8[np.ndarray, "height width 3"]) -> Int[np.ndarray, "cells 3"]:
        """(row, column, side) of every square, in patches; the smallest first, row by row within a size.

        InputError if a side is not whole patches.
        """
        height, width, _ = image.shape
        if height % self.patch or width % self.patch or not image.size:
            raise InputError(
                f"an image of {height}x{width} is not a grid of {self.patch}-pixel patches; resize it to one first"
            )
        free = np.ones((height // self.patch, width // self.patch), bool)
        found = []
        for level in range(len(self.thresholds), 0, -1):
            side = 2**level
            flat = entropy(image, self.patch * side) < self.thresholds[level - 1]
            rows, columns = np.nonzero(flat & free[::side, ::side])
            for row, column in zip(rows * side, columns * side, strict=True):
                free[row : row + side, column : column + side] = False
            found.append(np.stack([rows * side, columns * side, np.full_like(rows, side)], -1))
        rows, columns = np.nonzero(free)
        found.append(np.stack([rows, columns, np.ones_like(rows)], -1))
        return np.concatenate(found[::-1]).astype(np.int32)

    def patches(
        self, image: UInt8[np.ndarray, "height width 3"], cells: Int[np.ndarray, "cells 3"]
    ) -> UInt8[np.ndarray, "cells values"]:
        """Every square at the size of the smallest: [cells, patch * patch * 3], flattened as by `patches.patchify`.

        Larger squares are shrunk bilinearly without averaging more than 2 × 2 pixels, as published: at four times the
        patch these are the middle of 4 × 4.
        """
        out = np.empty((len(cells), self.patch * self.patch * 3), np.uint8)
        for side in np.unique(cells[:, 2]).tolist():
            here = cells[:, 2] == side
            small = shrink(image, side)
            rows, columns = small.shape[0] // self.patch, small.shape[1] // self.patch
            at = cells[here, 0] // side * columns + cells[here, 1] // side
            out[here] = patchify(small[: rows * self.patch, : columns * self.patch], self.patch)[at]
        return out


def shrink(image: UInt8[np.ndarray, "height width 3"], by: int) -> UInt8[np.ndarray, "_ _ 3"]:
    """The mean of the middle 2 × 2 pixels of every square of `by` × `by`; what does not fill a square is left out."""
    if by == 1:
        return image
    height, width = image.shape[0] // by, image.shape[1] // by
    squares = image[: height * by, : width * by].reshape(height, by, width, by, 3)
    middle = squares[:, by // 2 - 1 : by // 2 + 1, :, by // 2 - 1 : by // 2 + 1].astype(np.uint16)
    return ((middle.sum((1, 3)) + 2) // 4).astype(np.uint8)
