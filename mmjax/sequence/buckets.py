"""Buckets: the few static shapes a run compiles, chosen so that a sample of documents wastes least of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mmjax.core.errors import InputError
from mmjax.sequence.batch import Bucket
from mmjax.sequence.pack import pack

MULTIPLE = 8  # patches per row are rounded up to this, unless one document's patches decide


def choose(sizes: Int[np.ndarray, "n 3"], k: int, tokens: int, rows: int) -> tuple[Bucket, ...]:
    """At most k bucket shapes for documents of these sizes (tokens, patches, images).

    All rows are `tokens` long. Documents are split into groups by how many patches come with a token, and each group
    gets the number of patches per row that fills tokens and patches best (harmonic mean of both fills, by packing the
    sample). Of the splits into 1 … k groups the one that fills best is taken.

    Raises:
      InputError: a document that is longer than a row.
    """
    refuse_too_long(sizes, tokens)
    candidates = []
    for n in range(1, k + 1):
        group = _groups(sizes, n)
        found = {_best(sizes[group == g], tokens, rows) for g in np.unique(group)}
        candidates.append(tuple(sorted(found, key=lambda b: b.row)))
    return max(candidates, key=lambda shapes: _fill(sizes, shapes))


def _groups(sizes: np.ndarray, n: int) -> np.ndarray:
    """Which of n groups each document is in: k-means of its patches per token, weighted by its tokens."""
    ratio = sizes[:, 1] / sizes[:, 0]
    centres = np.quantile(np.unique(ratio), (np.arange(n) + 0.5) / n)
    for _ in range(20):
        group = np.abs(ratio[:, None] - centres).argmin(1)
        total = np.bincount(group, sizes[:, 0], n)
        centres = np.where(total > 0, np.bincount(group, sizes[:, 1], n) / np.maximum(total, 1), centres)
    return group


def _fill(sizes: np.ndarray, shapes: Sequence[Bucket]) -> float:
    """The harmonic mean of the shares of tokens and patches that are not padding, when each shape is packed."""
    bucket = assign(sizes, shapes)
    room = np.sum([np.multiply(s.row[:2], len(pack(sizes[bucket == b], s.row))) for b, s in enumerate(shapes)], axis=0)
    fills = [f for f in sizes[:, :2].sum(0) / np.maximum(room, 1) if f > 0]
    return len(fills) / sum(1 / f for f in fills)


def _best(sizes: np.ndarray, tokens: int, rows: int) -> Bucket:
    even = tokens * sizes[:, 1].sum() / sizes[:, 0].sum()
    best, best_fill = None, -1.0
    for slack in (0.9, 0.95, 1.0, 1.05, 1.1, 1.2):
        patches = max(int(np.ceil(even * slack / MULTIPLE)) * MULTIPLE, int(sizes[:, 1].max()), 1)
        packed = pack(sizes, (tokens, patches, len(sizes)))
        images = max(1, max(int(sizes[row, 2].sum()) for row in packed))
        total = sizes.sum(0) / len(packed)
        fills = [f for f in (total[0] / tokens, total[1] / patches) if f > 0]
        fill = len(fills) / sum(1 / f for f in fills)
        if fill > best_fill:
            best, best_fill = Bucket(rows, tokens, patches, images), fill
    return best


def refuse_too_long(sizes: np.ndarray, tokens: int) -> None:
    """Raises InputError where a document has more tokens than a row."""
    if len(sizes) == 0:
        raise InputError("There is no document to make buckets for; the dataset is empty.")
    if sizes[:, 0].max() > tokens:
        worst = int(sizes[:, 0].argmax())
        raise InputError(
            f"Document number {worst} takes {sizes[worst, 0]} tokens ({sizes[worst, 1]} of them patches), more than a "
            f"row of {tokens}; raise the row's tokens or lower the resolution."
        )


def assign(sizes: Int[np.ndarray, "n 3"], buckets: Sequence[Bucket], first: int = 0) -> Int[np.ndarray, "n"]:
    """The bucket for each document: the one whose patches per token are nearest to its own, among those it fits.

    Raises:
      InputError: a document that fits no bucket.
    """
    rows = np.array([b.row for b in buckets], np.float64)
    fits = (sizes[:, None, :] <= rows[None]).all(-1)
    if not fits.any(1).all():
        worst = int((~fits.any(1)).argmax())
        raise InputError(
            f"Document number {first + worst} ({sizes[worst, 0]} tokens, {sizes[worst, 1]} patches, {sizes[worst, 2]} "
            f"images) fits none of the buckets {[b.row for b in buckets]}; choose larger ones or lower the resolution."
        )
    distance = np.abs(sizes[:, None, 1] / sizes[:, None, 0] - (rows[:, 1] / rows[:, 0])[None])
    return np.where(fits, distance, np.inf).argmin(1)
