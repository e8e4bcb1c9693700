"""What attention costs where the program does not say: its loops and kernels go as far as intervals, which are data.

They are counted from the intervals of one row (models.flops.Row), which all rows are taken to be like.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.core.hlo import Hints
from mmjax.core.hlo_text import Op
from mmjax.models import vlm
from mmjax.models.flops import Row
from mmjax.nn import transformer
from mmjax.nn.kernels import xla


@dataclass(frozen=True)
class Seen:
    """Labels of keys, first and last label that each query sees: i32[n] each."""

    order: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


def sequence(row: Row, see: str, media: int) -> Seen:
    """The decoder's: causal within documents. Pictures that see both ways are taken to lie evenly through the row."""
    n = row.tokens
    at = np.arange(n)
    begin = np.repeat(np.cumsum((0, *row.documents[:-1])), row.documents)
    hi = at.copy()
    if see == "bidirectional_images" and row.pictures:
        each = media // len(row.pictures)
        for i in range(len(row.pictures)):
            start = i * n // len(row.pictures)
            hi[start : start + each] = min(start + each, n) - 1
    return Seen(at, begin, hi)


def patches(row: Row, prefix: int, windowed: bool = False) -> Seen:
    """The encoder's: every picture sees itself, with its class and register tokens, which lie behind all patches."""
    order, lo, hi, more = [], [], [], [[], [], []]
    at = 0
    for n in row.pictures:
        whole = np.arange(at, at + n)
        order.append(whole)
        inside = row.window if windowed and row.window else n
        first = at + np.arange(n) // inside * inside
        lo.append(first)
        hi.append(np.minimum(first + inside, at + n) - 1 if windowed else np.full(n, at + n + prefix - 1))
        more[0].append(np.arange(at + n, at + n + prefix))
        more[1].append(np.full(prefix, at))
        more[2].append(np.full(prefix, at + n + prefix - 1))
        at += n + prefix
    return Seen(*(np.concatenate([*a, *b]) for a, b in zip((order, lo, hi), more, strict=True)))


def turns(seen: Seen, queries: int, keys: int) -> float:
    """Blocks of keys that the loop of nn.kernels.xla goes through for a block of queries, on average."""
    nq, nk = -(-len(seen.lo) // queries), -(-len(seen.order) // keys)
    q, k = (np.array_split(np.arange(n), parts) for n, parts in ((len(seen.lo), nq), (len(seen.order), nk)))
    first, last = (np.array([f(a[i]) for i in q]) for f, a in ((np.min, seen.lo), (np.max, seen.hi)))
    low, high = (np.array([f(seen.order[i]) for i in k]) for f in (np.min, np.max))
    touch = (first[:, None] <= high[None]) & (low[None] <= last[:, None])
    start = np.where(touch, np.arange(nk), nk).min(1)
    stop = np.where(touch, np.arange(nk) + 1, 0).max(1)
    return float(np.maximum(stop - start, 0).mean())


def hints(cfg: vlm.Config, row: Row, see: str, media: int) -> Hints:
    """The turns of attention's loops in encoder and decoder, which named scopes tell apart."""
    own = {"decoder": [(1.0, sequence(row, see, media))]}
    if row.pictures:
        inside = _share_windowed(cfg.vision.blocks)
        own["vision"] = [(1 - inside, patches(row, cfg.vision.prefix))]
        own["vision"] += [(inside, patches(row, 0, True))] if inside else []

    def of(op: Op) -> Any:
        part = part_of(op.scope)
        if "attention" not in op.scope or part not in own:
            return None
        return sum(share * turns(seen, xla.QUERIES, xla.KEYS) for share, seen in own[part])

    return Hints(turns=of)


def part_of(scope: str) -> str:
    """Which part of the model an operation belongs to, by the named scopes of models.vlm and train.step."""
    return next((p for p in ("vision", "connector", "decoder", "loss", "update") if p in scope), "other")


def _share_windowed(cfg: transformer.Config) -> float:
    return len(cfg.windowed) / cfg.layers
