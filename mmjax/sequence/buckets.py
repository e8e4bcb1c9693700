"""Buckets: the few static shapes a run compiles, chosen so that a sample of documents wastes least of them."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from mmjax.core.errors import InputError
from mmjax.sequence.batch import Bucket
from mmjax.sequence.layout import described
from mmjax.sequence.pack import Row, pack_shapes

MULTIPLE = 8  # patches per row are rounded up to this
SAMPLE = 512  # documents that every candidate is tried on
LOWEST = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # patches of the smallest shape, as shares of what is even
HIGHEST = (1.0, 1.2, 1.5)  # of the largest, where no document needs more


def _numbered(n: int) -> str:
    return f"number {n}"


def choose(
    sizes: Int[np.ndarray, "n d"],
    k: int,
    tokens: int,
    rows: int,
    patches: int = 0,
    names: Callable[[int], str] = _numbered,
    answers: int = 0,
) -> tuple[Bucket, ...]:
    """At most k bucket shapes for documents of these sizes (see Layout.size).

    All rows are `tokens` long; shapes differ in their patches. The largest holds every document of the sample and one
    of so many `patches`, the others lie evenly below it, and of all such ladders the one is taken in which a sample
    packs best (harmonic mean of the shares of tokens and patches that are not padding). Images and frames are as many
    as the fullest row needed. All have room for so many tokens of `answers`.

    Raises:
      InputError: a document that is longer than a row, or whose answer is.
    """
    refuse_too_long(sizes, tokens, names, answers)
    sample = sizes[:: -(-len(sizes) // SAMPLE)]
    most = max(patches, int(sizes[:, 1].max()))
    if most == 0:
        return _shapes(sizes, [1], tokens, rows, answers)
    full = sizes[:, 0].sum() / tokens  # rows, if none had padding
    full = max(full, sizes[:, 4].sum() / answers) if answers else full
    even = sizes[:, 1].sum() / full
    best, best_fill = None, -1.0
    for n in range(1, k + 1):
        for ladder in sorted(_ladders(even, most, n)):
            room = [(tokens, p, *_unlimited(sample), answers) for p in ladder]
            packed, _ = pack_shapes(sample, room, keep=len(sample) // 8)
            fill = harmonic(*fills(sample, packed, room)[:2])
            if fill > best_fill + 1e-3:  # one more program to compile should be worth something
                best, best_fill = ladder, fill
    return _shapes(sizes, best, tokens, rows, answers)


def _ladders(even: float, most: int, n: int) -> set[tuple[int, ...]]:
    """Patches of n shapes, of which the largest holds `most`."""
    if n == 1:
        return {(_round(max(most, even * share)),) for share in (*LOWEST, *HIGHEST)}
    return {
        tuple(sorted({_round(p) for p in np.linspace(even * low, max(most, even * high), n)}))
        for low in LOWEST
        for high in HIGHEST
    }


def _round(patches: float | int) -> int:
    return max(1, -(-int(np.ceil(patches)) // MULTIPLE) * MULTIPLE)


def _unlimited(sizes: np.ndarray) -> list[int]:
    """Room for the images and frames of all documents at once."""
    return sizes[:, 2:4].sum(0).tolist()


def _shapes(sizes: np.ndarray, ladder: Sequence[int], tokens: int, rows: int, answers: int) -> tuple[Bucket, ...]:
    """The buckets of a ladder, with room for as many images and frames as the fullest row of the sample takes."""
    room = [(tokens, p, *_unlimited(sizes), answers) for p in ladder]
    packed, _ = pack_shapes(sizes, room)
    out = []
    for k, p in enumerate(ladder):
        used = [sizes[row, 2:4].sum(0) for shape, row in packed if shape == k]
        if used or p == ladder[-1]:
            images, frames = map(int, np.max([*used, sizes[:, 2:4].max(0)], axis=0))
            out.append(Bucket(rows, tokens, p, max(1, images), frames, answers))
    return tuple(out)


def fills(sizes: Int[np.ndarray, "n d"], packed: Sequence[Row], shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The shares of every dimension that are not padding, over packed rows."""
    room = np.sum([shapes[k] for k, _ in packed], axis=0) if packed else np.ones(sizes.shape[1])
    used = sizes[[i for _, row in packed for i in row]].sum(0)
    return used / np.maximum(room, 1)


def harmonic(*shares: float) -> float:
    """The harmonic mean of the shares above zero; 0 where there is none."""
    some = [s for s in shares if s > 0]
    return len(some) / sum(1 / s for s in some) if some else 0.0


def refuse_too_long(sizes: np.ndarray, tokens: int, names: Callable[[int], str] = _numbered, answers: int = 0) -> None:
    """Raises InputError where a document has more tokens than a row, or its answer more than a row's `answers`."""
    if len(sizes) == 0:
        raise InputError("There is no document to make buckets for; the dataset is empty.")
    if sizes[:, 0].max() > tokens:
        worst = int(sizes[:, 0].argmax())
        raise InputError(
            f"Document {names(worst)} takes {sizes[worst, 0]} tokens ({sizes[worst, 1]} of them patches), more than a "
            f"row of {tokens}; raise the row's tokens or lower the resolution."
        )
    if sizes[:, 4].max() > answers:
        worst = int(sizes[:, 4].argmax())
        raise InputError(
            f"Document {names(worst)} has an answer of {sizes[worst, 4]} tokens, and a row has room for {answers}; set "
            f"sequence.answer higher."
        )


def fits(sizes: Int[np.ndarray, "n d"], buckets: Sequence[Bucket]) -> np.ndarray:
    """Which documents fit at least one of the buckets: bool[n]."""
    rows = np.array([b.row for b in buckets])
    return (sizes[:, None, :] <= rows[None]).all(-1).any(1)


def refuse_too_large(
    sizes: Int[np.ndarray, "n d"], buckets: Sequence[Bucket], names: Callable[[int], str] = _numbered
) -> None:
    """Raises InputError where a document fits no bucket; `names` tells what the message calls it."""
    found = fits(sizes, buckets)
    if not found.all():
        worst = int((~found).argmax())
        raise InputError(
            f"Document {names(worst)} ({described(sizes[worst])}) fits none of the buckets "
            f"{[b.row for b in buckets]}; choose larger ones (packing.tokens, packing.patches, sequence.answer) or "
            f"lower the resolution."
        )


def ladder(n: int, least: int = 1) -> int:
    """The smallest power of two, or 1.5 times one, that is at least n and `least`: 1, 2, 3, 4, 6, 8, 12, 16, 24 …

    For shapes that are not known beforehand: a few programs then serve all sizes, with a third of padding at most.
    """
    power = 1 << (max(n, least, 1) - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= max(n, least) else power
