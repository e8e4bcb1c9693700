"""Places of a sequence that show mixtures of media tokens: maps of them, resized (LLaVA-OneVision)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, eq=False)
class Blend:
    """What stands at each place of a picture or video, as a mixture of up to four of its media tokens.

    index: i32[n, 4], which of them, -1 for none. share: f32[n, 4], of each. (The ends of rows have none.)
    """

    index: np.ndarray  # i32[n, 4]
    share: np.ndarray  # f32[n, 4]

    @property
    def slots(self) -> tuple[int, ...]:
        """The first token of each place, -1 where a row ends."""
        return tuple(self.index[:, 0].tolist())


def resized(token: Int[np.ndarray, "r c"], rows: int, columns: int, newline: bool = False) -> Blend:
    """A map of media tokens i32[R, C] brought to rows × columns places by the bilinear filter; a newline ends each row.

    As torch's interpolate(mode="bilinear") without align_corners and antialiasing: place i of n lies at
    (i + ½) · R / n - ½, and no less than 0.
    """
    (top, bottom, down), (left, right, across) = (
        _between(n, before) for n, before in zip((rows, columns), token.shape, strict=True)
    )
    index = [token[y][:, x] for y in (top, bottom) for x in (left, right)]
    share = [y[:, None] * x[None] for y in (1 - down, down) for x in (1 - across, across)]
    index, share = np.stack(index, axis=-1), np.stack(share, axis=-1)
    index = np.where(share > 0, index, -1)
    if newline:
        index = np.concatenate([index, np.full((rows, 1, 4), -1)], axis=1)
        share = np.concatenate([share, np.zeros((rows, 1, 4))], axis=1)
    return Blend(index.reshape(-1, 4).astype(np.int32), share.reshape(-1, 4).astype(np.float32))


def _between(after: int, before: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which two of `before` samples each of `after` lies between, and the second's share."""
    at = np.maximum((np.arange(after) + 0.5) * (before / after) - 0.5, 0)
    low = np.minimum(at.astype(np.int64), before - 1)
    return low, np.minimum(low + 1, before - 1), at - low


def joined(*parts: Blend | tuple[int, ...]) -> Blend:
    """Mixtures one after the other; whole numbers are single media tokens, -1 the end of a row."""
    index, share = [], []
    for part in parts:
        if not isinstance(part, Blend):
            one = np.array(part, np.int32).reshape(-1, 1)
            more = np.full((len(one), 3), -1, np.int32)
            shares = np.concatenate([(one >= 0).astype(np.float32), np.zeros((len(one), 3), np.float32)], axis=1)
            part = Blend(np.concatenate([one, more], axis=1), shares)
        index.append(part.index)
        share.append(part.share)
    return Blend(np.concatenate(index), np.concatenate(share))


def pooled(grid: tuple[int, int, int], side: int = 2) -> Blend:
    """A clip of (frames, rows, columns) media tokens with each frame resized to ceil(sides / side), and one newline at
    the end: LLaVA-OneVision's videos (Li et al. 2024, section 3.2; transformers 5.23, apply_pooling).
    """
    frames, rows, columns = grid
    token = np.arange(frames * rows * columns).reshape(grid)
    return joined(*(resized(frame, -(-rows // side), -(-columns // side)) for frame in token), (-1,))
