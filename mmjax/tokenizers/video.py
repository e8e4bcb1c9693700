"""How many pictures of a clip enter the model, and at which size: functions of its header alone."""

from dataclasses import dataclass, replace

from mmjax.core.errors import InputError
from mmjax.tokenizers.resolution import Policy


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

    def clip(self, frames: int, height: int, width: int, fps: float) -> tuple[tuple[int, int, int], float]:
        """(frames, rows, columns) of patches, and the numbers of the time position from one frame to the next."""
        if frames < 1 or not fps > 0:
            raise InputError(f"a video of {frames} frames at {fps:g} a second cannot be shown; leave it out.")
        n = min(frames, self.most, max(1, round(frames / fps * self.fps)))
        seconds = frames / fps / n
        return (n, *self.resolution.grid(height, width)), self.tokens_per_second * seconds or 1.0
