"""At which size a picture enters the model: functions of its height and width alone, no pixel needed."""

import math
from dataclasses import dataclass

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


def _check(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise InputError(f"a picture of {height}x{width} has no pixels; leave it out")


def _down(side: float, unit: int) -> int:
    return max(unit, math.floor(side / unit) * unit)
