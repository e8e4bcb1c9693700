"""In which order a picture's patches lie in their row: merged squares together, attention windows together."""

import numpy as np
from jaxtyping import Int

from mmjax.core.errors import InputError
from mmjax.sequence.layout import Grid


def order(grid: Grid, merge: int = 1, window: int = 0) -> tuple[Int[np.ndarray, "p"], Int[np.ndarray, "m"], list[int]]:
    """Where the patches of a grid go.

        merge 2, one window        merge 1, windows of 2
        0 1  4  5                  0 1  4
        2 3  6  7                  2 3  5
                                   6 7  8

    Args:
      grid: frames, rows, columns of patches.
      merge: merge × merge patches become one media token and lie next to each other (Wang et al. 2024, section 2.1).
      window: above 0, media tokens lie window by window, so many a side; those at the right and lower edge are
        smaller (Bai et al. 2025, Qwen2.5-VL, section 2.1.1).

    Returns:
      The patch (row by row) at each place, the media token (row by row) at each place, and how many patches each window
      has (each frame, where there are no windows).

    Raises:
      InputError: rows or columns that are no multiple of `merge`.
    """
    frames, rows, columns = grid
    if rows % merge or columns % merge:
        raise InputError(
            f"A grid of {rows}×{columns} patches cannot be merged {merge}×{merge}; use multiples of {merge}."
        )
    token = np.arange(frames * (rows // merge) * (columns // merge)).reshape(frames, rows // merge, columns // merge)
    side = window or max(token.shape)
    cut = [
        token[f, y : y + side, x : x + side].reshape(-1)
        for f in range(frames)
        for y in range(0, token.shape[1], side)
        for x in range(0, token.shape[2], side)
    ]
    tokens = np.concatenate(cut).astype(np.int32)
    squares = np.arange(frames * rows * columns).reshape(frames, rows // merge, merge, columns // merge, merge)
    patches = squares.transpose(0, 1, 3, 2, 4).reshape(-1, merge * merge)[tokens].reshape(-1).astype(np.int32)
    return patches, tokens, [len(c) * merge * merge for c in cut]
