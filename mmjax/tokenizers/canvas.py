"""A picture on a canvas of whole tiles: shown once, its patches tile by tile (Llama 3.2 Vision)."""

from dataclasses import dataclass, replace

from mmjax.core.errors import InputError
from mmjax.tokenizers.resolution import Policy, check
from mmjax.tokenizers.view import Filter, Resize, View, Window


@dataclass(frozen=True)
class Canvas(Policy):
    """The canvas of up to `most` square tiles that enlarges a picture least, or else shrinks it least; black beside it.

    Grattafiori et al. 2024, "The Llama 3 herd of models", section 7.1; to the pixel what transformers 5.23 does
    (models/mllama). Of canvases with the same scale the one of fewest tiles. A picture keeps its shape; it is enlarged
    until a side is one tile's, not until it fills the canvas. There is one view, of all tiles; `sequence.window` of a
    tile's patches a side lets these lie tile by tile.
    """

    patch: int = 14
    tile: int = 560
    most: int = 4
    filter: Filter = "bilinear"

    def __post_init__(self):
        if min(self.patch, self.tile, self.most) < 1 or self.tile % self.patch:
            raise InputError(f"{self} is not a resolution; give a tile of whole patches, and at least one tile")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """All (rows, columns) of tiles that a canvas may have, in the order in which published tables have them."""
        sides = range(1, self.most + 1)
        return tuple((rows, columns) for rows in sides for columns in sides if rows * columns <= self.most)

    def lowered(self, share: float) -> "Canvas":
        """The same with about this share of the tiles."""
        return replace(self, most=max(1, int(self.most * share)))

    def best(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles; InputError if the picture is empty."""
        check(height, width)

        def scale(shape: tuple[int, int]) -> float:
            # In floats, as it is published: equal scales of several canvases are equal there or not by rounding.
            return min(shape[0] * self.tile / height, shape[1] * self.tile / width)

        scales = {shape: scale(shape) for shape in self.shapes}
        enlarging = [s for s in scales.values() if s >= 1]
        chosen = min(enlarging) if enlarging else max(scales.values())
        fitting = [shape for shape in self.shapes if scales[shape] == chosen]
        return min(fitting, key=lambda shape: shape[0] * shape[1])

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of the canvas; InputError if the picture is empty."""
        rows, columns = self.best(height, width)
        return rows * self.tile // self.patch, columns * self.tile // self.patch

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels; InputError if the picture is empty."""
        rows, columns = self.best(height, width)
        tall, wide = rows * self.tile, columns * self.tile
        inner = self._fitted(height, width, tall, wide)
        resize = Resize(*inner, self.filter)
        return ((resize,) if inner == (tall, wide) else (resize, Window(0, 0, tall, wide, (0, 0, 0))),)

    def _fitted(self, height: int, width: int, tall: int, wide: int) -> tuple[int, int]:
        """Height and width on the canvas: the picture's own, but no less than a tile and no more than the canvas."""
        want_tall, want_wide = (min(max(n, self.tile), most) for n, most in ((height, tall), (width, wide)))
        down, across = want_tall / height, want_wide / width
        if across < down:
            return min(int(height * across) or 1, want_tall), want_wide
        return want_tall, min(int(width * down) or 1, want_wide)
