"""Policies that slice a picture at about its own resolution, with a view of the whole."""

import itertools
import math
from dataclasses import dataclass, replace

from mmjax.core.errors import InputError
from mmjax.tokenizers.resolution import Picture, check, whole_patches
from mmjax.tokenizers.tiles import Tiled, cut
from mmjax.tokenizers.view import Color, Filter, Resize, View, Window


@dataclass(frozen=True)
class Slices(Tiled):
    """Shrunk until no side is over `longest`, then cut into tiles from the upper left corner; `fill` beyond the edges.

    whole: the whole picture, stretched to one tile, comes first.
    restored: the slices' tokens stand as in the picture, row by row across them, without those of padding alone
      (HiRes-LLaVA, Huang et al. 2025, arXiv:2407.08706: a whole view, and slices stitched together again; how it
      chooses the grid is not published). Otherwise slice after slice, all tokens.
    """

    patch: int = 14
    tile: int = 336
    longest: int = 1344
    whole: bool = False
    restored: bool = False
    fill: Color = (0, 0, 0)
    filter: Filter = "bicubic"

    def __post_init__(self):
        self.check_tile(self.longest)

    def lowered(self, share: float) -> "Slices":
        """The same with about this share of the tiles."""
        return replace(self, longest=max(self.tile, int(self.longest * math.sqrt(share))))

    def shrunk(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels before slicing; InputError if the picture is empty."""
        check(height, width)
        scale = min(1.0, self.longest / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels: the whole if it is wanted, then the slices."""
        tall, wide = self.shrunk(height, width)
        rows, columns = -(-tall // self.tile), -(-wide // self.tile)
        canvas = () if (tall, wide) == (height, width) else (Resize(tall, wide, self.filter),)
        slices = cut(canvas, rows, columns, self.tile, fill=self.fill)
        return (((Resize(self.tile, self.tile, self.filter),),) if self.whole else ()) + slices

    def picture(self, height: int, width: int) -> Picture:
        """All views, and the order of their tokens."""
        found = super().picture(height, width)
        if not self.restored:
            return found
        side = self.tile // self.patch
        tall, wide = self.shrunk(height, width)
        columns = -(-wide // self.tile)
        slots = list(range(side * side * self.whole))
        for row in range(-(-tall // self.patch)):
            for column in range(-(-wide // self.patch)):
                view = self.whole + row // side * columns + column // side
                slots.append(view * side * side + row % side * side + column % side)
        return Picture(found.views, tuple(slots))


@dataclass(frozen=True)
class Bounded(Tiled):
    """About the picture's own size, no side over `longest` or below `shortest`, whatever that makes of its shape.

    Laurençon et al. 2024, "What matters when building vision-language models?" (Idefics2), section 3; to the pixel what
    transformers 5.23 does (models/idefics2). What is left beside whole patches is not looked at.

    split: its four quarters, each brought to such a size, come before the whole.
    """

    patch: int = 14
    shortest: int = 378
    longest: int = 980
    split: bool = False
    filter: Filter = "bilinear"

    def __post_init__(self):
        if not 1 <= self.patch <= self.shortest <= self.longest:
            raise InputError(f"{self} is not a resolution; give 1 <= patch <= shortest <= longest")

    def lowered(self, share: float) -> "Bounded":
        """The same with about this share of its largest picture's patches, but no side below `shortest`."""
        return replace(self, longest=max(self.shortest, int(self.longest * math.sqrt(share))))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to resize a picture to; InputError if it is empty."""
        check(height, width)
        shape, most = width / height, self.longest
        if max(height, width) > most:
            height, width = (int(most / shape), most) if width >= height else (most, int(most * shape))
        return max(height, self.shortest), max(width, self.shortest)

    def picture(self, height: int, width: int) -> Picture:
        """All views, in two rows of quarters where there are such."""
        return replace(super().picture(height, width), rows=2 if self.split else 1)

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels: the quarters, then the whole; InputError for a picture that has no quarters."""
        whole = whole_patches((Resize(*self.size(height, width), self.filter),), self.patch)
        if not self.split:
            return (whole,)
        if min(height, width) < 2:
            raise InputError(f"a picture of {height}x{width} has no four quarters; leave it out")
        halves = [(0, side // 2, side) for side in (height, width)]
        cuts = [[(a, b - a) for a, b in itertools.pairwise(half)] for half in halves]
        quarters = [(top, left, tall, wide) for top, tall in cuts[0] for left, wide in cuts[1]]
        return *(self._quarter(*quarter) for quarter in quarters), whole

    def _quarter(self, top: int, left: int, height: int, width: int) -> View:
        resize = Resize(*self.size(height, width), self.filter)
        return whole_patches((Window(top, left, height, width), resize), self.patch)


@dataclass(frozen=True)
class UHD(Tiled):
    """The whole at its own shape, then slices of it at theirs, each about as large as what the encoder was trained on.

    Xu et al. 2024, "LLaVA-UHD" (arXiv:2403.11703), eq. 1 and 2: of the grids of one slice fewer than needed, as many,
    and one more, the one whose slices are nearest to square. To the pixel what transformers 5.23 does for MiniCPM-V 4.6
    (models/minicpmv4_6; there tile 448, most 9 and unit 56 or 28); LLaVA-UHD has 336, 6 and 14. All sides are multiples
    of `unit`; small pictures are enlarged.
    """

    patch: int = 14
    tile: int = 336
    most: int = 6
    unit: int = 14
    filter: Filter = "bicubic"

    def __post_init__(self):
        self.check_tile(self.most, self.unit)
        if self.unit % self.patch:
            raise InputError(f"{self} is not a resolution; give a unit of whole patches")

    def lowered(self, share: float) -> "UHD":
        """The same with about this share of the slices."""
        return replace(self, most=max(1, int(self.most * share)))

    def best(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of slices, (1, 1) for none; InputError if the picture is empty."""
        check(height, width)
        needed = min(math.ceil(width * height / (self.tile * self.tile)), self.most)
        if needed <= 1:
            return 1, 1
        best, nearest = (1, 1), math.inf
        for number in (needed - 1, needed, needed + 1):
            if number == 1 or number > self.most:
                continue
            for rows in (r for r in range(1, number + 1) if number % r == 0):
                columns = number // rows
                # Two logarithms, subtracted, as published: ties are settled by their last digit.
                away = abs(math.log(width / height) - math.log(columns / rows))
                if away < nearest or (away == nearest and rows > best[0]):
                    best, nearest = (rows, columns), away
        return best

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels: the whole, then the slices."""
        rows, columns = self.best(height, width)
        whole = (Resize(*self._near(height, width), self.filter),)
        if rows * columns == 1:
            return (whole,)
        tall, wide = self._near(max(round(height / rows), 1), max(round(width / columns), 1))
        canvas = Resize(tall * rows, wide * columns, self.filter)
        return whole, *(
            (canvas, Window(row * tall, column * wide, tall, wide)) for row in range(rows) for column in range(columns)
        )

    def _near(self, height: int, width: int) -> tuple[int, int]:
        """The size of about one tile's area and this shape."""
        shape = width / height
        tall = int(self.tile / math.sqrt(shape))
        wide = int(tall * shape)
        return tuple(max(round(side / self.unit) * self.unit, self.unit) for side in (tall, wide))
