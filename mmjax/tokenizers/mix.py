"""Fewer media tokens than a connector makes: each a mix of four that are neighbours, known from the grid alone."""

import functools
import math
from typing import NamedTuple


class Mix(NamedTuple):
    """What stands at a place besides its own media token: three more of them, and the shares of all four."""

    others: tuple[int, int, int]
    shares: tuple[float, float, float, float]


def shrunk(tokens: tuple[tuple[int, ...], ...], rows: int, columns: int) -> tuple[list[list[int]], list[list[Mix]]]:
    """A grid of media tokens at another size, as torch.nn.functional.interpolate(mode="bilinear") would make it.

    Args:
      tokens: which media token stands in each row and column.
      rows, columns: of the smaller grid.

    Returns:
      The token at each place of the smaller grid (the upper left of four), and what it is mixed with.
    """
    down, across = _axis(len(tokens), rows), _axis(len(tokens[0]), columns)
    own, mixes = [], []
    for y, below, v in down:
        own.append([tokens[y][x] for x, _, _ in across])
        mixes.append([])
        for x, right, u in across:
            others = tokens[y][right], tokens[below][x], tokens[below][right]
            mixes[-1].append(Mix(others, ((1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u)))
    return own, mixes


@functools.lru_cache(maxsize=256)
def _axis(before: int, after: int) -> tuple[tuple[int, int, float], ...]:
    """Along one axis: the place below, the place above, and the share of the latter."""
    out = []
    for place in range(after):
        at = max((place + 0.5) * before / after - 0.5, 0.0)
        low = min(math.floor(at), before - 1)
        out.append((low, min(low + 1, before - 1), at - low))
    return tuple(out)
