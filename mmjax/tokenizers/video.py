"""How many pictures of a clip enter the model, and at which size: functions of its header alone."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from mmjax.core.errors import InputError
from mmjax.tokenizers.mix import Mix, shrunk
from mmjax.tokenizers.resolution import Fixed, Native, Policy
from mmjax.tokenizers.view import Filter

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Sampled:
    """Frames at an even distance: about `fps` a second, at most `most`, at least one; each as `resolution` says.

    tokens_per_second: numbers of the time position per second (Qwen2.5-VL: 2, absolute time); 0 counts frames.
    """

    resolution: Policy
    fps: float = 2.0
    most: int = 64
    tokens_per_second: float = 0.0

    def __post_init__(self):
        if not self.fps > 0 or self.most < 1 or self.tokens_per_second < 0:
            raise InputError(f"{self} samples nothing; give fps above 0 and most of at least 1.")

    def lowered(self, share: float) -> "Sampled":
        """The same with about this share of its frames: of those a second and of the most."""
        return replace(self, fps=self.fps * share, most=max(1, int(self.most * share)))

    def clip(self, frames: int, height: int, width: int, fps: float) -> tuple[Grid, float]:
        """(frames, rows, columns) of patches, and the numbers of the time position from one frame to the next."""
        n = len(self.chosen(frames, fps))
        seconds = frames / fps / n
        return (n, *self.resolution.grid(height, width)), self.tokens_per_second * seconds or 1.0

    def chosen(self, frames: int, fps: float) -> tuple[int, ...]:
        """Which pictures of the clip are shown."""
        _check(frames, fps)
        n = min(frames, self.most, max(1, round(frames / fps * self.fps)))
        return tuple(np.round(np.linspace(0, frames - 1, n)).astype(int).tolist())

    def times(self, frames: int, fps: float) -> tuple[float, ...]:
        """When they are, in seconds."""
        return tuple(n / fps for n in self.chosen(frames, fps))

    def still(self, frames: int, height: int, width: int, fps: float) -> Policy:
        """By which policy a frame becomes patches."""
        return self.resolution

    def places(self, grid: Grid) -> None:
        """All media tokens stand in order."""


@dataclass(frozen=True)
class Pooled:
    """Pictures of a clip whose tokens are pooled to half as many a side, and a newline token at the end.

    LLaVA-OneVision (Li et al. 2024, section 3.2; transformers 5.23, models/llava_onevision). All pictures are shown, or
    `number` of them, or `fps` a second.

    share: of these, where fewer are wanted.
    """

    resolution: Policy
    number: int | None = None
    fps: float | None = None
    share: float = 1.0

    def __post_init__(self):
        if (self.number is not None and self.number < 1) or (self.fps is not None and not self.fps > 0):
            raise InputError(f"{self} shows nothing; give a number or fps above 0, or neither.")
        _check_share(self)

    def lowered(self, share: float) -> "Pooled":
        """The same with about this share of its pictures."""
        return replace(self, share=self.share * share)

    def clip(self, frames: int, height: int, width: int, fps: float) -> tuple[Grid, float]:
        """(frames, rows, columns) of patches, and the numbers of the time position from one frame to the next."""
        return (len(self.chosen(frames, fps)), *self.resolution.grid(height, width)), 1.0

    def chosen(self, frames: int, fps: float) -> tuple[int, ...]:
        """Which pictures of the clip are shown."""
        _check(frames, fps)
        n = frames if self.fps is None else max(1, int(frames / fps * self.fps))
        n = n if self.number is None else self.number
        if n > frames:
            raise InputError(f"a video of {frames} frames does not give the {n} that are to be shown; leave it out.")
        return _some(tuple(place * frames // n for place in range(n)), self.share)

    def times(self, frames: int, fps: float) -> tuple[float, ...]:
        """When they are, in seconds."""
        return tuple(n / fps for n in self.chosen(frames, fps))

    def still(self, frames: int, height: int, width: int, fps: float) -> Policy:
        """By which policy a frame becomes patches."""
        return self.resolution

    def places(self, grid: Grid) -> tuple[tuple[int, ...], tuple[Mix | None, ...]]:
        """The media token at each place, what it is mixed with, and the newline (-1)."""
        frames, rows, columns = grid
        slots: list[int] = []
        mixes: list[Mix | None] = []
        for first in range(0, frames * rows * columns, rows * columns):
            tokens = tuple(tuple(range(first + y * columns, first + (y + 1) * columns)) for y in range(rows))
            own, mixed = shrunk(tokens, -(-rows // 2), -(-columns // 2))
            slots += [token for row in own for token in row]
            mixes += [mix for row in mixed for mix in row]
        return (*slots, -1), (*mixes, None)


@dataclass(frozen=True)
class Stills:
    """Pictures of a clip, each of them a picture of its own (InternVL; transformers 5.23, models/internvl).

    All are shown, or `number` of them, or `fps` a second, at an even distance: the first from the middle of its share
    of the clip, or `shift` pictures from the start. Encoders with class tokens see frames so.

    share: of these, where fewer are wanted.
    """

    resolution: Policy
    number: int | None = None
    fps: float | None = None
    shift: float | None = None
    share: float = 1.0
    apart: ClassVar[bool] = True  # every frame is a view

    def __post_init__(self):
        if (self.number is not None and self.number < 1) or (self.fps is not None and not self.fps > 0):
            raise InputError(f"{self} shows nothing; give a number or fps above 0, or neither.")
        if self.shift is not None and not self.shift >= 0:
            raise InputError(f"{self} begins before its clip; give a shift of at least 0.")
        _check_share(self)

    def lowered(self, share: float) -> "Stills":
        """The same with about this share of its pictures."""
        return replace(self, share=self.share * share)

    def clip(self, frames: int, height: int, width: int, fps: float) -> tuple[Grid, float]:
        """(frames, rows, columns) of patches, and the numbers of the time position from one frame to the next."""
        return (len(self.chosen(frames, fps)), *self.resolution.grid(height, width)), 1.0

    def chosen(self, frames: int, fps: float) -> tuple[int, ...]:
        """Which pictures of the clip are shown."""
        _check(frames, fps)
        n = frames
        if self.number is not None or self.fps is not None:
            n = int(frames / fps * self.fps) if self.number is None else self.number
        if not 0 < n <= frames:
            raise InputError(f"a video of {frames} frames does not give the {n} that are to be shown; leave it out.")
        if n == frames and self.number is None and self.fps is None:
            return _some(tuple(range(frames)), self.share)
        step = frames / n
        first = step / 2 if self.shift is None else self.shift
        if first >= frames:
            raise InputError(f"a video of {frames} frames ends before the first that is to be shown; leave it out.")
        places = range(math.ceil((frames - first) / step))
        return _some(tuple(int(np.float32(first + place * step)) for place in places), self.share)

    def times(self, frames: int, fps: float) -> tuple[float, ...]:
        """When they are, in seconds."""
        return tuple(n / fps for n in self.chosen(frames, fps))

    def still(self, frames: int, height: int, width: int, fps: float) -> Policy:
        """By which policy a frame becomes patches."""
        return self.resolution

    def places(self, grid: Grid) -> None:
        """All media tokens stand in order."""


@dataclass(frozen=True)
class Trimmed:
    """About `fps` pictures a second, at most `most`, at an even distance; of long clips not the first and last second.

    To the digit what transformers 5.23 does for SmolVLM2 (models/smolvlm, video_processing_smolvlm.py). Without `fps`
    and `most` all pictures are shown.

    trim: seconds left out at both ends where more than `most` × `fps` seconds are left between them.
    share: of these pictures, where fewer are wanted.
    """

    resolution: Policy
    fps: float | None = None
    most: int | None = None
    trim: float = 1.0
    share: float = 1.0

    def __post_init__(self):
        if (self.fps is None) != (self.most is None):
            raise InputError(f"{self} does not say which frames are shown; give both fps and most, or neither.")
        if self.fps is not None and (not self.fps > 0 or self.most < 1 or self.trim < 0):
            raise InputError(f"{self} shows nothing; give fps above 0, most of at least 1 and trim of at least 0.")
        _check_share(self)

    def lowered(self, share: float) -> "Trimmed":
        """The same with about this share of its pictures."""
        return replace(self, share=self.share * share)

    def clip(self, frames: int, height: int, width: int, fps: float) -> tuple[Grid, float]:
        """(frames, rows, columns) of patches, and the numbers of the time position from one frame to the next."""
        return (len(self.chosen(frames, fps)), *self.resolution.grid(height, width)), 1.0

    def chosen(self, frames: int, fps: float) -> tuple[int, ...]:
        """Which pictures of the clip are shown."""
        _check(frames, fps)
        if self.fps is None:
            return _some(tuple(range(frames)), self.share)
        seconds, last = frames / fps, frames - 1
        n = max(1, min(round(self.fps * seconds), self.most))
        first, end = 0, last
        if seconds - 2 * self.trim > self.most * self.fps and self.trim > 0:
            first, end = int(self.trim * fps), min(int(frames - self.trim * fps), last)
        first, end = (first, end) if first < end else (0, last)
        return _some(tuple(np.unique(np.linspace(first, end, n, dtype=int)).tolist()), self.share)

    def times(self, frames: int, fps: float) -> tuple[float, ...]:
        """When they are, in seconds."""
        return tuple(n / fps for n in self.chosen(frames, fps))

    def still(self, frames: int, height: int, width: int, fps: float) -> Policy:
        """By which policy a frame becomes patches."""
        return self.resolution

    def places(self, grid: Grid) -> None:
        """All media tokens stand in order."""


@dataclass(frozen=True)
class Grouped:
    """Pictures of a clip in groups, each of which is one frame of the grid (Qwen-VL: 2); the last one is repeated.

    To the digit what transformers 5.23 does (models/qwen2_vl and models/qwen3_vl, video_processing_*.py).

    patch, merge, filter: as of `resolution.Native`.
    group: pictures in a frame.
    min_pixels, max_pixels: of a picture, or (`bounds` "clip", Qwen3-VL) of all pictures together.
    choose: which pictures are shown: all; every nth from the first on ("floor", Qwen2-VL); or from the first to the
      last at an even distance ("even", Qwen3-VL). Of these two, `number`, or else `fps` a second, but no less than
      `least` (where there are as many) and no more than `most`.
    tokens_per_second: as of `Sampled`.
    """

    patch: int = 14
    merge: int = 2
    group: int = 2
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    bounds: Literal["picture", "clip"] = "picture"
    choose: Literal["all", "floor", "even"] = "all"
    fps: float | None = None
    number: int | None = None
    least: int = 4
    most: int = 768
    tokens_per_second: float = 0.0
    filter: Filter = "bicubic"

    def __post_init__(self):
        if min(self.patch, self.merge, self.group, self.least, self.most) < 1 or self.tokens_per_second < 0:
            raise InputError(f"{self} shows nothing; give numbers of at least 1.")
        if self.choose != "all" and (self.fps is None) == (self.number is None):
            raise InputError(f"{self} does not say how many frames are chosen; give either fps or number.")
        if (self.fps is not None and not self.fps > 0) or (self.number is not None and self.number < 1):
            raise InputError(f"{self} chooses no frames; give fps or number above 0.")
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise InputError(f"{self} leaves no size; give 1 <= min_pixels <= max_pixels.")

    def lowered(self, share: float) -> "Grouped":
        """The same with about this share of its pixels, or of its frames where they are chosen by their number."""
        if self.number is not None:
            return replace(self, number=max(self.group, int(self.number * share)))
        return replace(self, max_pixels=max(self.min_pixels, int(self.max_pixels * share)))

    def clip(self, frames: int, height: int, width: int, fps: float) -> tuple[Grid, float]:
        """(frames, rows, columns) of patches, and the numbers of the time position from one frame to the next."""
        n = len(self._chosen(frames, fps))
        rows, columns = self.still(frames, height, width, fps).grid(height, width)
        # Single precision, in the order that it is computed there.
        per_second = fps if self.choose == "all" else n / frames * fps
        interval = float(np.float32(self.tokens_per_second) * np.float32(self.group / per_second))
        return (-(-n // self.group), rows, columns), interval or 1.0

    def chosen(self, frames: int, fps: float) -> tuple[int, ...]:
        """Which pictures of the clip are shown, a whole number of groups."""
        found = self._chosen(frames, fps)
        return (*found, *found[-1:] * (-len(found) % self.group))

    def times(self, frames: int, fps: float) -> tuple[float, ...]:
        """Of each group the time in the middle between its first picture and its last, in seconds."""
        seconds = [n / fps for n in self.chosen(frames, fps)]
        return tuple((seconds[n] + seconds[n + self.group - 1]) / 2 for n in range(0, len(seconds), self.group))

    def still(self, frames: int, height: int, width: int, fps: float) -> Policy:
        """By which policy a frame becomes patches."""
        if self.bounds == "picture":
            tall, wide = Native(self.patch, self.merge, self.min_pixels, self.max_pixels).size(height, width)
        else:
            tall, wide = self._shared(len(self._chosen(frames, fps)), height, width)
        return Fixed(self.patch, tall, wide, filter=self.filter)

    def places(self, grid: Grid) -> None:
        """All media tokens stand in order."""

    def _chosen(self, frames: int, fps: float) -> list[int]:
        _check(frames, fps)
        if self.choose == "all":
            return list(range(frames))
        if self.choose == "even":
            n = int(frames / fps * self.fps) if self.number is None else self.number
            n = min(max(n, self.least), self.most, frames) if self.number is None else n
            return np.linspace(0, frames - 1, n).round().astype(int).tolist()
        n = self._floored(frames, fps)
        if not 0 < n <= frames:
            raise InputError(f"a video of {frames} frames does not give the {n} that are to be shown; leave it out.")
        step = frames / n
        return [int(np.float32(place * step)) for place in range(math.ceil(frames / step))]

    def _floored(self, frames: int, fps: float) -> int:
        """How many every nth are, in whole groups."""
        if self.number is not None:
            return round(self.number / self.group) * self.group
        most = min(self.most, frames) // self.group * self.group
        n = min(max(frames / fps * self.fps, self.least), most, frames)
        return math.floor(n / self.group) * self.group

    def _shared(self, n: int, height: int, width: int) -> tuple[int, int]:
        """Height and width where the bounds are those of n pictures together; the order of operations is theirs."""
        unit = self.patch * self.merge
        if n < self.group:
            raise InputError(f"a video of {n} frame is shorter than a group of {self.group}; show it as a picture.")
        if min(height, width) < 1:
            raise InputError(f"a video of {height}x{width} has no pixels; leave it out")
        if height < unit or width < unit:
            scale = max(unit / height, unit / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) / min(height, width) > 200:
            raise InputError(f"a video of {height}x{width} has one side over 200 times the other; crop it.")
        tall, wide = round(height / unit) * unit, round(width / unit) * unit
        pixels = round(n / self.group) * self.group * tall * wide
        if pixels > self.max_pixels:
            shrink = math.sqrt(n * height * width / self.max_pixels)
            return tuple(max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
        if pixels < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (n * height * width))
            return tuple(math.ceil(side * grow / unit) * unit for side in (height, width))
        return tall, wide


def _check(frames: int, fps: float) -> None:
    if frames < 1 or not fps > 0:
        raise InputError(f"a video of {frames} frames at {fps:g} a second cannot be shown; leave it out.")


def _check_share(policy: Pooled | Stills | Trimmed) -> None:
    if not 0 < policy.share <= 1:
        raise InputError(f"{policy} shows nothing, or more than there is; give a share above 0, of at most 1.")


def _some(pictures: tuple[int, ...], share: float) -> tuple[int, ...]:
    """About this share of the pictures, at an even distance, at least one."""
    n = max(1, int(len(pictures) * share))
    return tuple(pictures[place * len(pictures) // n] for place in range(n))
