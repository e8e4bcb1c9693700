"""Who sees whom: one interval of labels per token, for one document whose labels are 0 … n−1.

Each function draws its mask: a row is a query, a column a key, `x` is seen; t is text, i a picture's token.
"""

import numpy as np
from jaxtyping import Int

Intervals = tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]


def causal(length: int) -> Intervals:
    """Every token sees itself and what came before.

    t  x
    i  x x
    i  x x x
    t  x x x x
    """
    return np.zeros(length, np.int32), np.arange(length, dtype=np.int32)


def bidirectional_images(length: int, images: list[tuple[int, int]]) -> Intervals:
    """Causal, but the tokens of one picture see each other (Gemma 3).

        t  x
        i  x x x
        i  x x x
        t  x x x x

    Args:
      length: tokens in the document.
      images: (first, one past the last) token of every picture.
    """
    lo, hi = causal(length)
    for start, stop in images:
        hi[start:stop] = stop - 1
    return lo, hi


def blocks(lengths: list[int]) -> Intervals:
    """Everything in a block sees all of its block and nothing else: the patches of packed pictures.

    i  x x
    i  x x
    i      x x x
    i      x x x
    i      x x x
    """
    stops = np.cumsum(lengths)
    return (
        np.repeat(stops - lengths, lengths).astype(np.int32),
        np.repeat(stops - 1, lengths).astype(np.int32),
    )
