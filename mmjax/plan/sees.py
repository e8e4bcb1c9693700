"""Who sees whom in a row, as arrays, and how kernels cut it: what plan.attention counts from."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from mmjax.models.flops import Row
from mmjax.nn.kernels import xla
from mmjax.nn.kernels.tpu_blocks import BIG, Blocks
from mmjax.nn.ring import Ring


@dataclass(frozen=True)
class Seen:
    """Labels of keys i32[m], first and last label that each query sees i32[n] each."""

    order: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


def sequence(row: Row, see: str, media: int, window: int = 0) -> Seen:
    """The decoder's: causal within documents, and where there is a window no further back than that.

    Pictures that see both ways are taken to lie evenly through the row.
    """
    n = row.tokens
    at = np.arange(n)
    begin = _begins(row.documents)
    hi = at.copy()
    if see == "bidirectional_images" and row.pictures:
        each = media // len(row.pictures)
        for i in range(len(row.pictures)):
            start = i * n // len(row.pictures)
            hi[start : start + each] = min(start + each, n) - 1
    return Seen(at, np.maximum(begin, at - window + 1) if window else begin, hi)


def _begins(documents: tuple[int, ...]) -> np.ndarray:
    """Of every token the first of its document."""
    return np.repeat(np.cumsum((0, *documents[:-1])), documents).astype(np.int64)


def whole(documents: tuple[int, ...]) -> Seen:
    """The encoder's of an encoder–decoder: all of the document."""
    begin = _begins(documents)
    return Seen(np.arange(len(begin)), begin, begin + np.repeat(documents, documents) - 1)


def answers(row: Row) -> tuple[int, ...]:
    """Tokens of each document in the second stream of an encoder–decoder; the first have what is left over."""
    each, more = divmod(row.answer, max(len(row.documents), 1))
    return tuple(each + (i < more) for i in range(len(row.documents)))


def questions(row: Row) -> Seen:
    """What tokens of the second stream look at: all of their document in the first."""
    first = whole(row.documents)
    at = np.repeat(np.cumsum((0, *row.documents[:-1])), answers(row)).astype(np.int64)
    return Seen(first.order, first.lo[at], first.hi[at])


def media(row: Row, cross: str, count: int) -> Seen:
    """What text looks at by cross-attention (sequence.interleave.Config.cross), of so many media tokens.

    As models.flops.full_row takes it: documents have equally many pictures, which lie evenly through them, or, where
    text looks at more than the last one so far, stand together before the text.
    """
    documents, pictures = len(row.documents), len(row.pictures)
    each, lo, hi = count // max(pictures, 1), [], []
    for d, length in enumerate(row.documents):
        first, after = (-(-i * pictures // documents) for i in (d, d + 1))
        of = first + np.arange(length) * (after - first) // length
        lo.append(of * each if cross == "last_image" else np.full(length, first * each))
        hi.append((of if cross == "last_image" else np.full(length, after - 1)) * each + each - 1)
        if first == after:
            lo[-1], hi[-1] = np.zeros(length, np.int64), np.full(length, -1)
    return Seen(np.arange(count), np.concatenate(lo), np.concatenate(hi))


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


def latents(pictures: tuple[int, ...], behind: int, queries: int) -> Seen:
    """A resampler's: so many queries of each picture look at its features, and at what lies behind all of them."""
    keys = patches(Row((), pictures), behind)
    first = np.cumsum((0, *(n + behind for n in pictures[:-1])))
    last = first + np.array(pictures, np.int64) + behind - 1
    return Seen(keys.order, np.repeat(first, queries), np.repeat(last, queries))


def _cut(of: np.ndarray, size: int, fill: int) -> np.ndarray:
    """[blocks, size], padded."""
    return np.pad(of, (0, -len(of) % size), constant_values=fill).reshape(-1, size)


def touched(seen: Seen, queries: int, keys: int) -> np.ndarray:
    """Which blocks of queries reach which blocks of keys: bool[query blocks, key blocks]."""
    lo, hi = _cut(seen.lo, queries, 0), _cut(seen.hi, queries, -1)
    order, some = _cut(seen.order, keys, -1), lo <= hi
    first, last = np.where(some, lo, BIG).min(1), np.where(some, hi, -1).max(1)
    low, high = np.where(order >= 0, order, BIG).min(1), order.max(1)
    return (first[:, None] <= high[None]) & (low[None] <= last[:, None])


def span(touch: np.ndarray) -> np.ndarray:
    """How many blocks lie from the first to the last that each block of queries reaches."""
    at = np.arange(touch.shape[1])
    return np.maximum(np.where(touch, at + 1, 0).max(1) - np.where(touch, at, touch.shape[1]).min(1), 0)


def turns(seen: Seen) -> float:
    """Blocks of keys that the loop of nn.kernels.xla goes through for a block of queries, on average."""
    n, m = len(seen.lo), len(seen.order)
    queries, keys = (-(-size // -(-size // most)) for size, most in ((n, xla.QUERIES), (m, xla.KEYS)))
    return float(span(touched(seen, queries, keys)).mean())


def shares(seen: Seen, blocks: Blocks) -> tuple[float, float]:
    """Of all pairs of queries and keys, the share that the TPU kernels compute; of all keys and values as often as
    there are blocks of queries, the share that they fetch.
    """
    n, m = len(seen.lo), len(seen.order)
    computed = touched(seen, blocks.query_part, blocks.key_part).sum() * blocks.query_part * blocks.key_part
    fetched = touched(seen, blocks.queries, blocks.keys)
    whole = (n + -n % blocks.queries) * (m + -m % blocks.keys)
    return float(computed / whole), float(span(fetched).sum() / fetched.size)


def split(seen: Seen, devices: int, ring: bool) -> list[list[Seen]]:
    """What each device computes where a row is split over several: of its queries, what they see of all keys, or on a
    ring, step by step, of each device's.
    """
    if devices == 1:
        return [[seen]]
    ways = Ring((), devices)

    def parts(of: np.ndarray, fill: int) -> list[np.ndarray]:
        whole = np.pad(of, (0, -len(of) % devices), constant_values=fill)  # as nn.transformer fills rows up
        dealt = np.asarray(ways.deal_whole(jnp.asarray(whole, jnp.int32)[None])[0]) if ring else whole
        return np.split(dealt, devices)

    order, lo, hi = parts(seen.order, -1), parts(seen.lo, 0), parts(seen.hi, -1)
    steps = order if ring else [np.concatenate(order)]
    return [[Seen(keys, *queries) for keys in steps] for queries in zip(lo, hi, strict=True)]
