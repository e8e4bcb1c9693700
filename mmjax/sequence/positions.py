"""Rotary positions (time, height, width) of every token: M-RoPE (Wang et al. 2024, Qwen2-VL, section 2.1, figure 3)."""

import numpy as np
from jaxtyping import Int

from mmjax.sequence.layout import TEXT, Grid, Piece


def grid_positions(grid: Grid) -> Int[np.ndarray, "n 3"]:
    """(frame, row, column) of every patch of a grid, in raster order."""
    return np.indices(grid, dtype=np.int32).reshape(3, -1).T


def mrope(pieces: tuple[Piece, ...]) -> Int[np.ndarray, "n 3"]:
    """Positions of a document's tokens.

    Text counts on, the same number three times. A picture of r × c patches that starts at s has (s, s + row,
    s + column), and text goes on at s + max(r, c): as long as its longer side, not as its area.
    """
    out, at = [], 0
    for piece in pieces:
        if piece.modality == TEXT:
            out.append(np.repeat(np.arange(at, at + piece.length, dtype=np.int32)[:, None], 3, axis=1))
            at += piece.length
        else:
            out.append(grid_positions(piece.grid) + np.int32(at))
            at += max(piece.grid)
    return np.concatenate(out)
