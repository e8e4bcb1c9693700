"""Policies that show a picture several times: as a whole, and cut into tiles or crops (slices: tokenizers.slices).

Each gives `views` (what is done to the pixels, tokenizers.view) and `picture` (the grids of patches, and which token
stands where), from the picture's height and width alone.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from mmjax.core.errors import InputError
from mmjax.tokenizers.mix import Mix, shrunk
from mmjax.tokenizers.resolution import Picture, Policy, check, whole_patches
from mmjax.tokenizers.view import Color, Filter, Resize, Step, View, Window

OPENAI_SIZES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA-NeXT's, in tiles


class Tiled(Policy):
    """A policy of several views, in the order in which the encoder and the sequence get them."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of the first view; InputError if the picture is empty."""
        return self.picture(height, width).views[0]

    def picture(self, height: int, width: int) -> Picture:
        """The grid of patches of every view; their tokens follow each other. InputError if the picture is empty."""
        ends = [view[-1] for view in self.views(height, width)]
        return Picture(tuple((end.height // self.patch, end.width // self.patch) for end in ends))

    def check_tile(self, *more: int, drop: bool = False) -> None:
        """Raises InputError unless `tile` is whole patches (or some are dropped) and the other numbers are positive."""
        tile = self.tile
        if min(self.patch, tile, *more) < 1 or tile < self.patch or (tile % self.patch and not drop):
            raise InputError(f"{self} is not a resolution; give a tile of whole patches, and at least one tile")


def cut(
    canvas: tuple[Step, ...], rows: int, columns: int, tile: int, top: int = 0, left: int = 0, fill: Color = (0, 0, 0)
) -> tuple[View, ...]:
    """Tiles of a canvas, row by row; the first begins at `top` and `left`."""
    return tuple(
        (*canvas, Window(top + row * tile, left + column * tile, tile, tile, fill))
        for row in range(rows)
        for column in range(columns)
    )


@dataclass(frozen=True)
class AnyRes(Tiled):
    """The whole picture at one tile's size, then tiles of it at the best of a few larger sizes (LLaVA-NeXT).

    Liu et al. 2024, "LLaVA-NeXT: improved reasoning, OCR, and world knowledge"; to the digit what transformers 5.23
    does (models/llava_next, models/llava_onevision): of `sizes` (height, width, in tiles) the one that keeps most of
    the picture's pixels, of equals the one that wastes least; the picture in its middle, black around it; the padding
    that keeps the picture's shape is taken off again in whole patches; with `newline`, a newline token ends every row
    of patches of the tiled picture. OneVision has a tile of 384 and all `sizes` up to (6, 6).

    once: a picture for which one tile is best is shown once. With `sizes` (1, 1) and (2, 2) that is LLaVA-1.5-HD's
      choice of one view or 2 × 2 (Liu et al. 2024, "Improved baselines with visual instruction tuning", appendix).
    drop: as of `resolution.Fixed`, of every tile.
    most: above 0, the tokens of a tiled picture that are more than 1.21 times those of so many tiles are made about as
      many as those, each a mix of four neighbours (LLaVA-OneVision: "anyres_max_9").
    """

    patch: int = 14
    tile: int = 336
    sizes: tuple[tuple[int, int], ...] = OPENAI_SIZES
    newline: bool = True
    once: bool = False
    filter: Filter = "bicubic"
    drop: bool = False
    most: int = 0

    def __post_init__(self):
        self.check_tile(*(side for size in self.sizes or [(0, 0)] for side in size), drop=self.drop)

    def lowered(self, share: float) -> "AnyRes":
        """The same without the sizes of more than about this share of its largest one's tiles."""
        most = max(rows * columns for rows, columns in self.sizes) * share
        least = min(rows * columns for rows, columns in self.sizes)
        return replace(self, sizes=tuple(s for s in self.sizes if s[0] * s[1] <= max(most, least)))

    def best(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles; InputError if the picture is empty."""
        check(height, width)

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

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels: the whole, then the tiles."""
        rows, columns = self.best(height, width)
        tall, wide = rows * self.tile, columns * self.tile
        if wide / width < tall / height:
            inner = min(math.ceil(height * (wide / width)), tall), wide
        else:
            inner = tall, min(math.ceil(width * (tall / height)), wide)
        whole = whole_patches((Resize(self.tile, self.tile, self.filter),), self.patch)
        if self.once and rows * columns == 1:
            return (whole,)
        top, left = -((tall - inner[0]) // 2), -((wide - inner[1]) // 2)
        tiles = cut((Resize(*inner, self.filter),), rows, columns, self.tile, top, left)
        side = self.tile // self.patch * self.patch
        return whole, *((resize, replace(window, height=side, width=side)) for resize, window in tiles)

    def picture(self, height: int, width: int) -> Picture:
        """All views, and the order of their tokens: the whole, then the tiles' rows from left to right across them."""
        side = self.tile // self.patch
        tiles = self.best(height, width)
        rows, columns = self.kept(height, width)
        slots = list(range(side * side))
        if self.once and tiles == (1, 1):
            return Picture(((side, side),), tuple(slots))
        where = tuple(tuple(self._token(row, column, tiles[1]) for column in columns) for row in rows)
        views = ((side, side),) * (1 + tiles[0] * tiles[1])
        ratio = math.sqrt(len(rows) * len(columns) / (self.most * side * side)) if self.most else 0.0
        if ratio <= 1.1:
            for row in where:
                slots += [*row, -1] if self.newline else row
            return Picture(views, tuple(slots))
        mixes: list[Mix | None] = [None] * len(slots)
        for row, mixed in zip(*shrunk(where, int(len(rows) // ratio), int(len(columns) // ratio)), strict=True):
            slots += [*row, -1] if self.newline else row
            mixes += [*mixed, None] if self.newline else mixed
        return Picture(views, tuple(slots), mixes=tuple(mixes))

    def _token(self, row: int, column: int, across: int) -> int:
        """Which media token a patch of the tiled picture is, of so many tiles across."""
        side = self.tile // self.patch
        tile = 1 + row // side * across + column // side
        return tile * side * side + row % side * side + column % side


@dataclass(frozen=True)
class Tiles(Tiled):
    """Square tiles of the picture stretched to the grid that is nearest to its shape, then the whole (InternVL).

    Chen et al. 2024, "How far are we to GPT-4V?" (InternVL 1.5), section 3.2; to the pixel what transformers 5.23 does
    (models/got_ocr2, get_optimal_tiled_canvas): between `least` and `most` tiles; of equally near grids the one of more
    tiles, as long as it is less than twice the picture's area. A picture of one tile has no thumbnail.
    """

    patch: int = 14
    tile: int = 448
    least: int = 1
    most: int = 12
    thumbnail: bool = True
    filter: Filter = "bicubic"

    def __post_init__(self):
        self.check_tile(self.least, self.most - self.least + 1)

    def lowered(self, share: float) -> "Tiles":
        """The same with about this share of the tiles."""
        return replace(self, most=max(self.least, int(self.most * share)))

    def best(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles; InputError if the picture is empty."""
        check(height, width)
        best, nearest = (1, 1), math.inf
        for columns, rows in _grids(self.least, self.most):
            away = abs(width / height - columns / rows)
            larger = height * width > 0.5 * self.tile * self.tile * columns * rows
            if away < nearest or (away == nearest and larger):
                best, nearest = (rows, columns), away
        return best

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels: the tiles, then the whole."""
        rows, columns = self.best(height, width)
        tiles = cut((Resize(rows * self.tile, columns * self.tile, self.filter),), rows, columns, self.tile)
        whole = (Resize(self.tile, self.tile, self.filter),)
        return (whole,) if len(tiles) == 1 else (*tiles, whole) if self.thumbnail else tiles


@lru_cache(maxsize=64)
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of so many tiles, smaller ones first."""
    found = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


@dataclass(frozen=True)
class Splits(Tiled):
    """Enlarged or shrunk to `longest`, stretched to whole tiles and split, then the whole (Idefics 3, SmolVLM).

    Laurençon et al. 2024, "Building and better understanding vision-language models", section 2.2; to the pixel what
    transformers 5.23 does (models/idefics3, models/smolvlm): three resizes, one after the other. SmolVLM2 has a tile of
    512 and `longest` 2,048. With `split` off the whole alone, through the same first resize.

    drop: as of `resolution.Fixed`, of every tile (the first SmolVLM's of 384 pixels).
    """

    patch: int = 14
    tile: int = 364
    longest: int = 1456
    split: bool = True
    filter: Filter = "lanczos"
    drop: bool = False
    LARGEST = 4096  # no side is ever longer, whatever `longest`

    def __post_init__(self):
        self.check_tile(self.longest, drop=self.drop)

    def lowered(self, share: float) -> "Splits":
        """The same with about this share of the tiles."""
        return replace(self, longest=max(self.tile, int(self.longest * math.sqrt(share))))

    def picture(self, height: int, width: int) -> Picture:
        """All views, and how many rows of tiles there are."""
        whole = super().picture(height, width)
        return replace(whole, rows=self._tiles(*self._longest(height, width))[0] if self.split else 1)

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels: the tiles, then the whole."""
        check(height, width)
        first = self._longest(height, width)
        whole = Resize(self.tile, self.tile, self.filter)
        if not self.split:
            return (whole_patches((Resize(*first, self.filter), whole), self.patch),)
        rows, columns = self._tiles(*first)
        canvas = (
            Resize(*first, self.filter),
            Resize(rows * self.tile, columns * self.tile, self.filter),
        )
        if rows * columns == 1:
            return (whole_patches(canvas, self.patch),)
        side = self.tile // self.patch * self.patch
        tiles = cut(canvas, rows, columns, self.tile)
        tiles = tuple((*view[:-1], replace(view[-1], height=side, width=side)) for view in tiles)
        return *tiles, whole_patches((*canvas, whole), self.patch)

    def _longest(self, height: int, width: int) -> tuple[int, int]:
        """With `longest` as the longer side; the shorter one becomes even."""
        ratio = width / height
        if width >= height:
            wide = self.longest
            tall = int(wide / ratio)
            tall = max(tall + tall % 2, 1)
        else:
            tall = self.longest
            wide = int(tall * ratio)
            wide = max(wide + wide % 2, 1)
        ratio = wide / tall
        if wide >= tall and wide > self.LARGEST:
            tall, wide = int(self.LARGEST / ratio), self.LARGEST
        elif tall > wide and tall > self.LARGEST:
            tall, wide = self.LARGEST, int(self.LARGEST * ratio)
        return max(tall, 1), max(wide, 1)

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles; the shorter side is counted after the longer one was rounded up."""
        ratio = width / height
        if width >= height:
            columns = math.ceil(width / self.tile)
            return math.ceil(int(columns * self.tile / ratio) / self.tile), columns
        rows = math.ceil(height / self.tile)
        return rows, math.ceil(int(rows * self.tile * ratio) / self.tile)


@dataclass(frozen=True)
class PanAndScan(Tiled):
    """The whole, and crops along the longer side of pictures that are long enough (Gemma 3).

    Gemma Team 2025, "Gemma 3 technical report", section 2.1; to the pixel what transformers 5.23 does (models/gemma3):
    every view is stretched to one square; crops touch each other, the last may be smaller.
    """

    patch: int = 14
    tile: int = 896
    smallest: int = 256  # sides of a crop, in pixels of the picture
    most: int = 4
    ratio: float = 1.2  # of the sides, from which on there are crops
    filter: Filter = "bilinear"

    def __post_init__(self):
        self.check_tile(self.smallest, self.most)

    def lowered(self, share: float) -> "PanAndScan":
        """The same with about this share of the crops, of which there are two at least, or none."""
        most = int(self.most * share)
        return replace(self, most=most) if most > 1 else replace(self, ratio=math.inf)

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels: the whole, then the crops."""
        check(height, width)
        whole = Resize(self.tile, self.tile, self.filter)
        longer, shorter = max(height, width), min(height, width)
        if longer / shorter < self.ratio:
            return ((whole,),)
        number = min(longer // self.smallest, math.floor(longer / shorter + 0.5))
        number = min(self.most, max(2, number))
        side = math.ceil(longer / number)
        if min(side, shorter) < self.smallest:
            return ((whole,),)
        starts = range(0, longer, side)
        if width >= height:
            crops = [Window(0, at, height, min(side, width - at)) for at in starts]
        else:
            crops = [Window(at, 0, min(side, height - at), width) for at in starts]
        return ((whole,), *((crop, whole) for crop in crops))
