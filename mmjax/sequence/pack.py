"""Packing by lengths alone: documents into rows that are full in every dimension at once."""

import numpy as np
from jaxtyping import Int


def pack(sizes: Int[np.ndarray, "n k"], capacity: tuple[int, ...]) -> list[list[int]]:
    """Best-fit decreasing in several dimensions (tokens, patches, images).

    The largest document (by its largest share of a row) goes first, each into the row where it leaves least room in
    the dimension that is emptiest; a new row is opened where none has room.

    Args:
      sizes: what each document takes up; every one must fit an empty row.
      capacity: what a row holds.

    Returns:
      The documents (indices into sizes) of every row, in the order in which they were placed.
    """
    cap = np.asarray(capacity, np.float64)
    share = sizes / np.maximum(cap, 1)
    room = np.empty((len(sizes), len(capacity)))
    rows: list[list[int]] = []
    for i in np.argsort(-share.max(1), kind="stable"):
        left = room[: len(rows)] - share[i]
        # A hair below zero is a rounding error of the shares, not an overflow: sizes are far coarser than 1e-9.
        fits = left.min(1) >= -1e-9 if len(rows) else np.zeros(0, bool)
        if fits.any():
            best = int(np.argmin(np.where(fits, left.max(1), np.inf)))
            rows[best].append(int(i))
            room[best] = left[best]
        else:
            room[len(rows)] = 1.0 - share[i]
            rows.append([int(i)])
    return rows
