"""What attention costs where the program does not say: its loops and kernels go as far as intervals, which are data.

They are counted from the intervals of one row (models.flops.Row), which all rows are taken to be like. Where devices
split a row, they are those of the device that has most to do: the others wait for it.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core.hlo import Hints, Kernel
from mmjax.core.hlo_text import Op
from mmjax.models import vlm
from mmjax.models.flops import Row
from mmjax.nn import transformer
from mmjax.nn.attention import GATHERED
from mmjax.nn.kernels import gpu_blocks, xla
from mmjax.nn.kernels.inputs import Inputs
from mmjax.nn.kernels.tpu_blocks import BIG, Blocks
from mmjax.nn.ring import Ring


@dataclass(frozen=True)
class Seen:
    """Labels of keys, first and last label that each query sees: i32[n] each."""

    order: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


def sequence(row: Row, see: str, media: int, window: int = 0) -> Seen:
    """The decoder's: causal within documents, and where there is a window no further back than that.

    Pictures that see both ways are taken to lie evenly through the row.
    """
    n = row.tokens
    at = np.arange(n)
    begin = np.repeat(np.cumsum((0, *row.documents[:-1])), row.documents)
    hi = at.copy()
    if see == "bidirectional_images" and row.pictures:
        each = media // len(row.pictures)
        for i in range(len(row.pictures)):
            start = i * n // len(row.pictures)
            hi[start : start + each] = min(start + each, n) - 1
    return Seen(at, np.maximum(begin, at - window + 1) if window else begin, hi)


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
    room, ways = -len(seen.lo) % devices, Ring((), devices)

    def parts(of: np.ndarray, fill: int) -> list[np.ndarray]:
        whole = np.pad(of, (0, room), constant_values=fill)  # as nn.transformer fills rows up
        dealt = np.asarray(ways.deal_whole(jnp.asarray(whole, jnp.int32)[None])[0]) if ring else whole
        return np.split(dealt, devices)

    order, lo, hi = parts(seen.order, -1), parts(seen.lo, 0), parts(seen.hi, -1)
    steps = order if ring else [np.concatenate(order)]
    return [[Seen(keys, *queries) for keys in steps] for queries in zip(lo, hi, strict=True)]


@dataclass(frozen=True)
class Part:
    """A stack of blocks: of each device and kind of layer, what it sees in every step of a ring (elsewhere there is
    one), with the share of the layers that see so.
    """

    sees: tuple[list[tuple[float, list[Seen]]], ...]
    inputs: Inputs
    products: int  # numbers of a head, times heads and rows of a device: 2 FLOPs each for a product of two positions

    def share(self, of: Callable[[Seen], float]) -> float:
        """The mean over its layers and steps, of the device with the most."""
        return max(
            sum(share * sum(of(seen) for seen in steps) / len(steps) for share, steps in device) for device in self.sees
        )

    def pairs(self, tile: tuple[int, int]) -> float:
        """Pairs of queries and keys in the tiles that are reached."""
        return self.share(lambda seen: touched(seen, *tile).sum() * tile[0] * tile[1])


# Products of every tile: scores and output; scores again, their cotangent, that of q; and those of k and v.
GPU_KERNELS = {"forward_kernel": 2, "by_query": 3, "by_key": 4}


def hints(
    cfg: vlm.Config,
    row: Row,
    see: str,
    media: int,
    rows: int = 1,
    heads: int = 1,
    compute: str = "bfloat16",
    length: int = 1,
) -> Hints:
    """What attention takes in encoder and decoder, which named scopes tell apart.

    Args:
      cfg: the model.
      row: what is in every row.
      see: who sees whom in the sequence (sequence.interleave).
      media: media tokens of a row.
      rows: of a device, that go through the model at once.
      heads: parts that heads are split into over the devices.
      compute: the type of queries and keys.
      length: parts that rows are split into over the devices.
    """

    def part(blocks: transformer.Config, *sees: tuple[float, Seen]) -> Part:
        whole = -(-len(sees[0][1].lo) // length) * length
        ring = goes_round(blocks, whole, rows, heads, compute, length)
        of_kind = [(share, split(seen, length, ring)) for share, seen in sees if share]
        devices = tuple([(share, of[i]) for share, of in of_kind] for i in range(length))
        inputs = _inputs(blocks, whole // length, whole // length if ring else whole, heads, compute)
        return Part(devices, inputs, rows * _held(blocks, heads)[0] * blocks.head)

    language = cfg.decoder.blocks
    near = len(language.windowed) / language.layers
    everything, window = (sequence(row, see, media, n) for n in (0, cfg.decoder.window))
    parts = {"decoder": part(language, (1 - near, everything), (near, window))}
    if row.pictures:
        inside, prefix = len(cfg.vision.blocks.windowed) / cfg.vision.blocks.layers, cfg.vision.prefix
        seen = dataclasses.replace(row, pictures=tuple(cfg.vision.tokens(n) - prefix for n in row.pictures))
        whole, windows = patches(seen, prefix), patches(row, 0, True)
        parts["vision"] = part(cfg.vision.blocks, (1 - inside, whole), (inside, windows))

    def of(op: Op) -> Part | None:
        return parts.get(part_of(op.scope)) if "attention" in op.scope else None

    def loop(op: Op) -> float | None:
        part = of(op)
        return None if part is None else part.share(turns)

    def kernel(op: Op, stated: Kernel | None, moved: float) -> Kernel | None:
        part = of(op)
        if part is None:
            return stated
        if stated is None:
            name = next((name for name in GPU_KERNELS if name in op.rest), None)
            if name is None:
                return None
            tile = getattr(gpu_blocks.Plan.of(part.inputs), name.removesuffix("_kernel"))
            pairs = part.pairs((tile.queries, tile.keys))
            return Kernel(2.0 * GPU_KERNELS[name] * part.products * pairs, moved)
        # The TPU's state half of all pairs, and that half of all keys are read for every block of queries.
        blocks = Blocks.of(part.inputs)
        computed, fetched = (part.share(lambda seen, i=i: shares(seen, blocks)[i]) for i in (0, 1))
        again = max(stated.bytes - moved, 0.0)
        return Kernel(stated.flops * computed / 0.5, moved + again * fetched / 0.5)

    return Hints(loop, kernel)


def goes_round(cfg: transformer.Config, keys: int, rows: int, split: int, compute: str, length: int) -> bool:
    """Whether keys and values of a split row go round the devices: what nn.transformer asks nn.attention.goes_round
    on the mesh.
    """
    kv = cfg.kv_heads if cfg.kv_heads % split else cfg.kv_heads // split
    return length > 1 and rows * kv * 2 * cfg.head * jnp.dtype(compute).itemsize * keys > GATHERED


def _held(cfg: transformer.Config, split: int) -> tuple[int, int]:
    """Heads of queries and of keys on a device: all where they do not divide, of keys as many as they need."""
    if cfg.heads % split:
        return cfg.heads, cfg.kv_heads
    return cfg.heads // split, math.lcm(cfg.kv_heads, split) // split


def _inputs(cfg: transformer.Config, queries: int, keys: int, split: int, compute: str) -> Inputs:
    """What a device's kernels are given of a row, by shapes: they cut it as these are."""
    heads, kv = _held(cfg, split)
    shapes = ((kv, heads // kv, queries), (kv, keys))
    q, k = (jax.ShapeDtypeStruct((1, *shape, cfg.head), jnp.dtype(compute)) for shape in shapes)
    return Inputs(q, k, k, None, None, None, None, None, None, None, None)


def part_of(scope: str) -> str:
    """Which part of the model an operation belongs to, by the named scopes of models.vlm and train.step."""
    found = set(re.findall(r"\w+", scope))  # of jit(step)/transpose(jvp(decoder))/while/…
    return next((p for p in ("vision", "connector", "decoder", "loss", "update") if p in found), "other")
