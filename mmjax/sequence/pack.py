"""Packing by lengths alone: documents into rows that are full in every dimension at once."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

FULL = 0.004  # a row with less than this free, tokens and patches together, is not tried in another shape
Row = tuple[int, list[int]]  # a row's shape (its number), and its documents in the order in which they were placed


def pack(sizes: Int[np.ndarray, "n d"], capacity: tuple[int, ...]) -> list[list[int]]:
    """Documents into rows of one shape; see `pack_shapes`."""
    return [row for _, row in pack_shapes(sizes, [capacity])[0]]


def pack_shapes(
    sizes: Int[np.ndarray, "n d"], shapes: Sequence[tuple[int, ...]], keep: int = 0
) -> tuple[list[Row], list[int]]:
    """Documents into rows, each of the shape that it fills best.

    A row at a time, by the bin-centred heuristic of Panigrahy et al. 2011 ("Heuristics for vector bin packing", section
    3): the largest document left (by its largest share of a row) opens it, then always the one follows that leaves the
    least room, as the sum of squares over tokens and patches of the free shares. So a row that is short of pictures
    takes one next. It is tried in every shape that holds its first document; the one with the least room left stays.

    Args:
      sizes: what each document takes up; tokens and patches first, then what is only limited (images, …).
      shapes: what a row of each shape holds.
      keep: rows are opened while more documents than this are left: the last rows of a heap fill badly, and what is
        left goes well with the next heap.

    Returns:
      The rows, and the documents (rising) that are left. A document that fits no shape gets a row of the last shape to
      itself: refuse it before.
    """
    if not len(sizes):
        return [], []
    big = np.max(np.asarray(shapes, np.int64), axis=0)
    share = (sizes / np.maximum(big, 1)).max(1)
    falling = np.argsort(-share, kind="stable")
    # Largest first, columns apart: of equals the larger is taken, and every step below is a sweep of few numbers.
    columns = [np.ascontiguousarray(sizes[falling, d]) for d in range(sizes.shape[1])]
    alive = np.ones(len(sizes), bool)
    rows: list[Row] = []
    left, first = len(sizes), 0
    while left > keep:
        first += int(alive[first:].argmax())
        room, row, k = np.inf, [first], len(shapes) - 1
        for i, shape in enumerate(shapes):
            free, candidate = _fill(columns, alive, first, shape)
            if free < room:
                room, row, k = free, candidate, i
            if room < FULL:
                break
        alive[row] = False
        left -= len(row)
        rows.append((k, falling[row].tolist()))
    return rows, np.sort(falling[alive]).tolist()


def _fill(columns: list[np.ndarray], alive: np.ndarray, first: int, shape: tuple[int, ...]) -> tuple[float, list[int]]:
    """A row of this shape that begins with `first`, and the share of it that stays free (inf: it does not fit)."""
    free = [cap - int(c[first]) for cap, c in zip(shape, columns, strict=True)]
    row = [first]
    if min(free) < 0:
        return np.inf, row
    weight = [1 / max(cap, 1) for cap in shape[:2]]
    candidates = np.flatnonzero(alive[first + 1 :]) + first + 1  # everything before is placed
    while True:
        fits = columns[0][candidates] <= free[0]
        for c, room in zip(columns[1:], free[1:], strict=True):
            fits &= c[candidates] <= room
        candidates = candidates[fits]
        if not len(candidates):
            return sum(w * room for w, room in zip(weight, free[:2], strict=False)), row
        after = np.square(weight[0] * (free[0] - columns[0][candidates]))
        if len(columns) > 1:
            after += np.square(weight[1] * (free[1] - columns[1][candidates]))
        best = int(after.argmin())
        j = int(candidates[best])
        row.append(j)
        free = [room - int(c[j]) for room, c in zip(free, columns, strict=True)]
        candidates = np.delete(candidates, best)
