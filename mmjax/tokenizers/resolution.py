"""At which size a picture enters the model: functions of its height and width alone, no pixel needed."""

import math
from dataclasses import dataclass, replace

from mmjax.core.errors import InputError


@dataclass(frozen=True)
class Native:
    """About the picture's own size and shape: sides in multiples of `patch * merge`, area in [min_pixels, max_pixels].

    Qwen2-VL's smart_resize (arXiv:2409.12191; transformers 4.50 to 5, models/qwen2_vl/image_processing_qwen2_vl.py),
    to the digit: round each side to the nearest multiple, halves to the even one; if that is too much area, scale both
    down and round down, to no less than one multiple; if too little, scale both up and round up. So the area may still
    leave the bounds where rounding takes it there: above, for long strips; take it from `size`, not from `max_pixels`.
    """

    patch: int = 14
    merge: int = 1
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    max_ratio: float = 200.0

    def __post_init__(self):
        if self.patch < 1 or self.merge < 1 or not self.max_ratio >= 1:
            raise InputError(f"{self} is not a resolution; give patch, merge and max_ratio of at least 1")
        if not (1 <= self.min_pixels <= self.max_pixels and (self.patch * self.merge) ** 2 <= self.max_pixels):
            raise InputError(
                f"{self} leaves no size; give 1 <= min_pixels <= max_pixels, and room for one square of patch * merge"
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to resize a picture to; InputError if it is empty or too long a strip."""
        _check(height, width)
        if max(height, width) / min(height, width) > self.max_ratio:
            raise InputError(
                f"a picture of {height}x{width} has one side over {self.max_ratio:g} times the other; "
                "crop it, leave it out, or raise max_ratio"
            )
        unit = self.patch * self.merge
        rounded = round(height / unit) * unit, round(width / unit) * unit
        # The order of these operations is smart_resize's, for another rounds otherwise at the edges.
        if rounded[0] * rounded[1] > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            return _down(height / shrink, unit), _down(width / shrink, unit)
        if rounded[0] * rounded[1] < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
        return rounded

    def lowered(self, share: float) -> "Native":
        """The same with about this share of max_pixels, but no less than one square and min_pixels."""
        least = max(self.min_pixels, (self.patch * self.merge) ** 2)
        return replace(self, max_pixels=max(least, int(self.max_pixels * share)))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches, both multiples of `merge`; InputError as for `size`."""
        height, width = self.size(height, width)
        return height // self.patch, width // self.patch


@dataclass(frozen=True)
class Fixed:
    """One size for every picture, whatever its shape: `height` by `width` pixels, multiples of `patch`."""

    patch: int = 14
    height: int = 224
    width: int = 224

    def __post_init__(self):
        if min(self.patch, self.height, self.width) < 1 or self.height % self.patch or self.width % self.patch:
            raise InputError(f"{self} is not a grid of patches; give a height and a width that are multiples of patch")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to resize a picture to; InputError if it is empty."""
        _check(height, width)
        return self.height, self.width

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches; InputError if the picture is empty."""
        height, width = self.size(height, width)
        return height // self.patch, width // self.patch


@dataclass(frozen=True)
class NaFlex:
    """About the picture's own shape, with at most so many patches: SigLIP 2's NaFlex (Tschannen et al. 2025, 2.4.2).

    The largest scale, found by bisection, at which both sides rounded up to whole patches make no more than
    `max_patches` (transformers 5.23, models/siglip2/image_processing_siglip2.py, get_image_size_for_max_num_patches).
    Small pictures are enlarged.
    """

    patch: int = 16
    max_patches: int = 256

    def __post_init__(self):
        if self.patch < 1 or self.max_patches < 1:
            raise InputError(f"{self} is not a resolution; give patch and max_patches of at least 1")

    def lowered(self, share: float) -> "NaFlex":
        """The same with about this share of max_patches."""
        return replace(self, max_patches=max(1, int(self.max_patches * share)))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to resize a picture to; InputError if it is empty."""
        rows, columns = self.grid(height, width)
        return rows * self.patch, columns * self.patch

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches; InputError if the picture is empty."""
        _check(height, width)
        epsilon = 1e-5
        low, high = epsilon / 10, 100.0
        rows, columns = 1, 1
        while high - low >= epsilon:
            scale = (low + high) / 2
            at = tuple(max(1, math.ceil(side * scale / self.patch)) for side in (height, width))
            if at[0] * at[1] <= self.max_patches:
                low, (rows, columns) = scale, at
            else:
                high = scale
        return rows, columns


@dataclass(frozen=True)
class Picture:
    """A picture as a model gets it.

    views: rows and columns of patches of each view the encoder sees (the whole, then the tiles).
    slots: which media token stands at each place of the sequence, counted through all views, -1 a newline; None: all
      of them in order.
    """

    views: tuple[tuple[int, int], ...]
    slots: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AnyRes:
    """The whole picture at one tile's size, then tiles of it at the best of a few larger sizes (LLaVA-NeXT).

    Liu et al. 2024, "LLaVA-NeXT: improved reasoning, OCR, and world knowledge"; to the digit what transformers 5.23
    does (models/llava_next): of `sizes` (height, width, in tiles) the one that keeps most of the picture's pixels, of
    equals the one that wastes least; the padding that keeps the picture's shape is taken off again in whole patches;
    with `newline`, a newline token ends every row of patches of the tiled picture.
    """

    patch: int = 14
    tile: int = 336
    sizes: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    newline: bool = True

    def __post_init__(self):
        if min(self.patch, self.tile) < 1 or self.tile % self.patch or not self.sizes or min(map(min, self.sizes)) < 1:
            raise InputError(f"{self} is not a resolution; give a tile of whole patches and at least one size in tiles")

    def best(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles; InputError if the picture is empty."""
        _check(height, width)

        def rank(size: tuple[int, int]) -> tuple[int, int]:
            tall, wide = size[0] * self.tile, size[1] * self.tile
            scale = min(wide / width, tall / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - tall * wide

        return max(self.sizes, key=rank)  # of equals the first, as there

    def kept(self, height: int, width: int) -> tuple[range, range]:
        """Rows and columns of the tiled picture's patches that are not padding."""
        side = self.tile // self.patch
        tiles = self.best(height, width)
        rows, columns = tiles[0] * side, tiles[1] * side
        if width / height > columns / rows:
            pad = (rows - int(round(height * (columns / width), 7))) // 2
            return range(pad, rows - pad), range(columns)
        pad = (columns - int(round(width * (rows / height), 7))) // 2
        return range(rows), range(pad, columns - pad)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of one view."""
        _check(height, width)
        return self.tile // self.patch, self.tile // self.patch

    def picture(self, height: int, width: int) -> Picture:
        """All views, and the order of their tokens: the whole, then the tiles' rows from left to right across them."""
        side = self.tile // self.patch
        tiles = self.best(height, width)
        rows, columns = self.kept(height, width)
        slots = list(range(side * side))
        for row in rows:
            for column in columns:
                tile = 1 + row // side * tiles[1] + column // side
                slots.append(tile * side * side + row % side * side + column % side)
            slots += [-1] if self.newline else []
        return Picture(((side, side),) * (1 + tiles[0] * tiles[1]), tuple(slots))


def _check(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise InputError(f"a picture of {height}x{width} has no pixels; leave it out")


def _down(side: float, unit: int) -> int:
    return max(unit, math.floor(side / unit) * unit)
