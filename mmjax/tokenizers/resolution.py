"""At which size a picture enters the model: functions of its height and width alone, no pixel needed.

A policy has `grid` (rows and columns of patches) and `views`, what is done to the pixels (tokenizers.view); one that
shows a picture several times, or marks its rows, has `picture` as well. Here are those that show it once, as a whole;
those that cut it into tiles are in tokenizers.tiles.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

from mmjax.core.errors import InputError
from mmjax.tokenizers.mix import Mix
from mmjax.tokenizers.view import Color, Filter, Resize, View, Window


@dataclass(frozen=True)
class Picture:
    """A picture as a model gets it.

    views: rows and columns of patches of each view the encoder sees, in the order it sees them.
    slots: which media token stands at each place of the sequence, counted through all views, -1 a newline; None: all
      of them in order.
    merge: merge × merge patches make one of the media tokens that `slots` counts.
    rows: of tiles, where there are several views.
    mixes: at each place what its token is mixed with, None where it stands alone; None: all of them do.
    """

    views: tuple[tuple[int, int], ...]
    slots: tuple[int, ...] | None = None
    merge: int = 1
    rows: int = 1
    mixes: tuple[Mix | None, ...] | None = None


class Policy(ABC):
    """The base of every resolution policy, so that a config may hold any of them."""

    patch: int  # pixels

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches (of the first view); InputError if the picture is empty."""

    @abstractmethod
    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels; InputError if the picture is empty."""


class Whole(Policy):
    """A policy that shows the whole picture once, at `size`."""

    filter: Filter

    @abstractmethod
    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to bring a picture to; InputError if it is empty."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches; InputError as for `size`."""
        height, width = self.size(height, width)
        return height // self.patch, width // self.patch

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels; InputError as for `size`."""
        return ((Resize(*self.size(height, width), self.filter),),)


@dataclass(frozen=True)
class Native(Whole):
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
    filter: Filter = "bicubic"

    def __post_init__(self):
        if self.patch < 1 or self.merge < 1 or not self.max_ratio >= 1:
            raise InputError(f"{self} is not a resolution; give patch, merge and max_ratio of at least 1")
        if not (1 <= self.min_pixels <= self.max_pixels and (self.patch * self.merge) ** 2 <= self.max_pixels):
            raise InputError(
                f"{self} leaves no size; give 1 <= min_pixels <= max_pixels, and room for one square of patch * merge"
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to resize a picture to; InputError if it is empty or too long a strip."""
        check(height, width)
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


@dataclass(frozen=True)
class Fixed(Whole):
    """One size for every picture: `height` by `width` pixels, multiples of `patch`.

    fit: "stretch", whatever its shape (ViT, SigLIP); "crop", its middle, at the scale where its shorter side is `short`
      (CLIP; 0: where it just covers the size); "pad", all of it, on a canvas of the right shape (LLaVA-1.5); "inset",
      the same, resized before and not with the canvas, no side below `short` (DeepSeek-VL).
    fill: of the canvas; LLaVA's is CLIP's mean colour.
    drop: the size need not be whole patches: what is left over at the right and the bottom is not looked at, as by a
      convolution without padding (SigLIP so400m sees 384 pixels as 27 patches of 14).
    To the pixel what transformers 5.23 does (models/{vit,siglip,clip,llava,deepseek_vl}/image_processing_pil_*.py).
    """

    patch: int = 14
    height: int = 224
    width: int = 224
    fit: Literal["stretch", "crop", "pad", "inset"] = "stretch"
    short: int = 0
    fill: Color = (122, 116, 104)
    filter: Filter = "bicubic"
    drop: bool = False

    def __post_init__(self):
        if min(self.patch, self.height, self.width) < 1 or not self._whole():
            raise InputError(f"{self} is not a grid of patches; give a height and a width that are multiples of patch")
        fits, short = ("stretch", "crop", "pad", "inset"), self.fit in ("crop", "inset")
        if self.fit not in fits or (self.short and not short) or self.short < 0:
            raise InputError(f"{self} fits nothing; give one of {fits}, and `short` with 'crop' and 'inset' alone")
        if self.fit == "inset" and self.short > min(self.height, self.width):
            raise InputError(f"{self} has pictures whose sides are longer than its canvas; lower `short`")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to bring a picture to; InputError if it is empty."""
        check(height, width)
        return self.height, self.width

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels; InputError if the picture is empty."""
        check(height, width)
        return (whole_patches(self._fitted(height, width), self.patch),)

    def _whole(self) -> bool:
        if self.drop:
            return min(self.height, self.width) >= self.patch
        return not (self.height % self.patch or self.width % self.patch)

    def _fitted(self, height: int, width: int) -> View:
        resize = Resize(self.height, self.width, self.filter)
        if self.fit == "stretch":
            return (resize,)
        if self.fit == "pad":
            tall = max(height, -(-width * self.height // self.width))
            wide = max(width, -(-height * self.width // self.height))
            window = Window(-((tall - height) // 2), -((wide - width) // 2), tall, wide, self.fill)
            return (window, resize) if (tall, wide) != (height, width) else (resize,)
        if self.fit == "inset":
            scale = min(self.height / height, self.width / width)
            tall, wide = (max(round(side * scale), self.short, 1) for side in (height, width))
            window = Window(
                -((self.height - tall) // 2), -((self.width - wide) // 2), self.height, self.width, self.fill
            )
            inner = Resize(tall, wide, self.filter)
            return (inner, window) if (tall, wide) != (self.height, self.width) else (inner,)
        # The operations in the order they are published in, for another order rounds otherwise.
        short = self.short or min(self.height, self.width)
        tall = short if height <= width else int(short * height / width)
        wide = short if width <= height else int(short * width / height)
        if not self.short and (tall < self.height or wide < self.width):
            grow = max(self.height / height, self.width / width)
            tall, wide = max(self.height, round(height * grow)), max(self.width, round(width * grow))
        window = Window((tall - self.height) // 2, (wide - self.width) // 2, self.height, self.width)
        whole = Resize(tall, wide, self.filter)
        return (whole,) if (tall, wide) == (self.height, self.width) else (whole, window)


@dataclass(frozen=True)
class NaFlex(Whole):
    """About the picture's own shape, with at most so many patches: SigLIP 2's NaFlex (Tschannen et al. 2025, 2.4.2).

    The largest scale, found by bisection, at which both sides rounded up to whole patches make no more than
    `max_patches` (transformers 5.23, models/siglip2/image_processing_siglip2.py, get_image_size_for_max_num_patches).
    Small pictures are enlarged.
    """

    patch: int = 16
    max_patches: int = 256
    filter: Filter = "bilinear"

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
        check(height, width)
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
class Pixtral(Whole):
    """About the picture's own size: no side over `longest`, both rounded up to multiples of `patch * merge`.

    Agrawal et al. 2024, "Pixtral 12B", section 2; to the pixel what transformers 5.23 does (models/pixtral; merge 2 as
    Mistral 3 calls it). With `breaks`, a newline token stands between the rows of the picture's (merged) patches.
    """

    patch: int = 16
    longest: int = 1024
    merge: int = 1
    breaks: bool = True
    filter: Filter = "bicubic"

    def __post_init__(self):
        if min(self.patch, self.longest, self.merge) < 1:
            raise InputError(f"{self} is not a resolution; give patch, longest and merge of at least 1")

    def lowered(self, share: float) -> "Pixtral":
        """The same with about this share of its largest picture's patches."""
        return replace(self, longest=max(self.patch * self.merge, int(self.longest * math.sqrt(share))))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to resize a picture to; InputError if it is empty."""
        check(height, width)
        ratio = max(height / self.longest, width / self.longest)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        unit = self.patch * self.merge
        return max(1, (height - 1) // unit + 1) * unit, max(1, (width - 1) // unit + 1) * unit

    def picture(self, height: int, width: int) -> Picture:
        """Its one view, and the breaks between the rows of its media tokens."""
        view = self.grid(height, width)
        rows, columns = view[0] // self.merge, view[1] // self.merge
        if not self.breaks:
            return Picture((view,))
        slots = [slot for row in range(rows) for slot in (*range(row * columns, (row + 1) * columns), -1)]
        return Picture((view,), tuple(slots[:-1]), self.merge)


@dataclass(frozen=True)
class Ended(Policy):
    """A picture that is shown once, as a whole, with a newline token after its last row (LLaVA-OneVision)."""

    whole: Whole

    @property
    def patch(self) -> int:
        return self.whole.patch

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches; InputError as for `whole`."""
        return self.whole.grid(height, width)

    def views(self, height: int, width: int) -> tuple[View, ...]:
        """What is done to the pixels; InputError as for `whole`."""
        return self.whole.views(height, width)

    def picture(self, height: int, width: int) -> Picture:
        """Its one view, and the newline."""
        rows, columns = self.grid(height, width)
        return Picture(((rows, columns),), (*range(rows * columns), -1))


def check(height: int, width: int) -> None:
    """Raises InputError for a picture without pixels."""
    if height < 1 or width < 1:
        raise InputError(f"a picture of {height}x{width} has no pixels; leave it out")


def whole_patches(view: View, patch: int) -> View:
    """The view without what does not fill a patch at its right and lower edge."""
    end = view[-1]
    tall, wide = end.height // patch * patch, end.width // patch * patch
    return view if (tall, wide) == (end.height, end.width) else (*view, Window(0, 0, tall, wide))


def _down(side: float, unit: int) -> int:
    return max(unit, math.floor(side / unit) * unit)
