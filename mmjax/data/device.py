"""Resizing on device while batches are read: the host only decodes, for where its cores are the bottleneck.

    source = Source(documents, layout, plan, vocab, patch, canvases=Canvases())

A picture goes to the device as it was decoded, on a canvas of one of a few sizes, is resized and cut there
(nn.resize), and its patches are put into their places of the row's buffer. Equal to the host's bytes within 1 grey
level. Chains that do not begin with a resize, or have more than one (padding before, Idefics 3), and pictures larger
than the largest canvas stay on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import PIL
from jaxtyping import Array, Int, UInt8

from mmjax.core.errors import InputError
from mmjax.nn.resize import resize, rows_first
from mmjax.sequence import windows
from mmjax.tokenizers.image import Found
from mmjax.tokenizers.patches import Deferred
from mmjax.tokenizers.view import Resize, View, Window

ROWS_MAY_BE_FIRST = int(PIL.__version__.split(".")[0]) >= 13  # so that the host's bytes are met, with any Pillow


@dataclass(frozen=True)
class Canvases:
    """The static shapes: every pair of them that occurs is compiled once, when it is first met.

    sides: pixels that the sides of a canvas may have; a picture's are rounded up.
    step: patches to whose multiple the rows and columns of a resized view are rounded up.
    """

    sides: tuple[int, ...] = (512, 1024, 2048, 4096)
    step: int = 8

    def __post_init__(self):
        if not self.sides or min(self.sides) < 1 or self.step < 1:
            raise InputError(f"{self} holds no picture; give sides and a step of at least 1.")

    def of(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width of the canvas for a picture; None where it is larger than the largest."""
        if max(size) > max(self.sides):
            return None
        return tuple(min(s for s in self.sides if s >= side) for side in size)


@dataclass(frozen=True)
class OnDevice(Deferred):
    """Patches on device: for each view u8[cells, values], a grid of cells of which the view fills a corner."""

    cells: Sequence[Array]
    grids: Sequence[tuple[int, int]]
    sizes: Sequence[tuple[int, int]]  # rows and columns of cells, of which a view fills the upper left corner

    @property
    def shape(self) -> tuple[int, int]:
        return sum(rows * columns for rows, columns in self.grids), self.cells[0].shape[1]

    def write(self, out: np.ndarray, merge: int = 1, window: int = 0) -> None:
        """Leaves its share of the buffer as it is: `put` fills it."""

    def put(self, patches: Array, row: int, at: int, merge: int = 1, window: int = 0) -> Array:
        """The batch's patches u8[B, P, C] with its own from place `at` of a row on."""
        for cells, grid, (tall, wide) in zip(self.cells, self.grids, self.sizes, strict=True):
            order, _, _ = windows.order((1, *grid), merge, window)
            place = np.full((tall, wide), patches.shape[1], np.int32)  # past the end: dropped
            place.reshape(-1)[order // grid[1] * wide + order % grid[1]] = at + np.arange(len(order))
            patches = _put(patches, cells, row, place.reshape(-1))
            at += len(order)
        return patches


def possible(views: Sequence[View]) -> bool:
    """Whether these views can be made on device: one resize each, and perhaps a window of it on black."""
    for view in views:
        one = len(view) == 1 and isinstance(view[0], Resize)
        two = len(view) == 2 and isinstance(view[0], Resize) and isinstance(view[1], Window)
        if not one and not (two and (view[1].fill == (0, 0, 0) or _inside(*view))):
            return False
    return True


def _inside(resize: Resize, window: Window) -> bool:
    down, across = window.top + window.height, window.left + window.width
    return min(window.top, window.left) >= 0 and down <= resize.height and across <= resize.width


def cut(found: Found, views: Sequence[View], patch: int, canvases: Canvases) -> OnDevice:
    """Decodes a picture, sends it, and resizes and cuts it on device; InputError for what cannot be decoded."""
    canvas = found.decode(np.zeros((*canvases.of(found.size), 3), np.uint8))
    canvas = jax.device_put(canvas)
    before = np.asarray(found.size, np.int32)
    cells, grids, sizes = [], [], []
    for view in views:
        whole, window = view[0], view[-1]
        start = (window.top, window.left) if isinstance(window, Window) else (0, 0)
        grid = window.height // patch, window.width // patch
        size = tuple(-(-n // canvases.step) * canvases.step for n in grid)
        after = whole.height, whole.width
        first = ROWS_MAY_BE_FIRST and rows_first(found.size, after)
        static = {"size": size, "patch": patch, "filter": whole.filter, "rows_first": first}
        after, start = np.asarray(after, np.int32), np.asarray(start, np.int32)
        cells.append(_cells(canvas, before, after, start, **static))
        grids.append(grid)
        sizes.append(size)
    jax.block_until_ready(cells)  # so that no more than one whole picture of each thread is ever on its way
    return OnDevice(cells, grids, sizes)


@partial(jax.jit, static_argnames=("size", "patch", "filter", "rows_first"))
def _cells(
    canvas: UInt8[Array, "h w 3"],
    before: Int[Array, "2"],
    after: Int[Array, "2"],
    start: Int[Array, "2"],
    *,
    size: tuple[int, int],
    patch: int,
    filter: str,
    rows_first: bool,
) -> UInt8[Array, "cells values"]:
    shape = size[0] * patch, size[1] * patch
    options = {"start": start[None], "filter": filter, "rows_first": rows_first}
    pixels = resize(canvas[None], before[None], after[None], shape, **options)[0]
    pixels = pixels.reshape(size[0], patch, size[1], patch * 3).swapaxes(1, 2)
    return pixels.reshape(size[0] * size[1], patch * patch * 3)


@partial(jax.jit, donate_argnums=0)
def _put(patches: Array, cells: Array, row: Int[Array, ""] | int, place: Array) -> Array:
    return patches.at[row, place].set(cells, mode="drop")


def finish(
    patches: UInt8[np.ndarray, "b p c"],
    parts: Sequence[tuple[int, int, OnDevice]],
    merge: int = 1,
    window: int = 0,
) -> UInt8[Array, "b p c"]:
    """A batch's patches on device, with the parts (row, place, picture) that were made there."""
    out = jnp.asarray(patches)
    for row, at, part in parts:
        out = part.put(out, row, at, merge, window)
    return out
