"""What attention costs where the program does not say: its loops and kernels go as far as intervals, which are data.

They are counted from the intervals of one row (models.flops.Row), which all rows are taken to be like. Where devices
split a row, they are those of the device that has most to do: the others wait for it.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmjax.connectors import perceiver, qformer
from mmjax.core.hlo import Hints, Kernel
from mmjax.core.hlo_text import Op
from mmjax.models import vlm
from mmjax.models.flops import Row
from mmjax.models.language import Language
from mmjax.nn import transformer
from mmjax.nn.attention import GATHERED
from mmjax.nn.kernels import gpu_blocks
from mmjax.nn.kernels.inputs import Inputs
from mmjax.nn.kernels.tpu_blocks import Blocks
from mmjax.plan import sees
from mmjax.plan.sees import Seen, shares, split, touched, turns
from mmjax.sequence import interleave


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
    see: interleave.Config,
    media: int,
    rows: int = 1,
    heads: int = 1,
    compute: str = "bfloat16",
    length: int = 1,
) -> Hints:
    """What attention takes in encoder, connector and decoder, which named scopes tell apart.

    Args:
      cfg: the model.
      row: what is in every row.
      see: who sees whom in the sequence, and what text looks at.
      media: media tokens of a row.
      rows: of a device, that go through the model at once.
      heads: parts that heads are split into over the devices.
      compute: the type of queries and keys.
      length: parts that rows are split into over the devices.
    """

    def part(of: transformer.Config | Heads, *seen: tuple[float, Seen], length: int = length) -> Part:
        queries, keys = len(seen[0][1].lo), len(seen[0][1].order)
        # A row's own are filled up; others that do not divide are gathered.
        divides = queries == keys or keys % length == 0
        queries, keys = (-(-n // length) * length for n in (queries, keys))
        ring = divides and goes_round(of, keys, rows, heads, compute, length)
        of_kind = [(share, split(each, length, ring)) for share, each in seen if share]
        devices = tuple([(share, each[i]) for share, each in of_kind] for i in range(length))
        inputs = _inputs(of, queries // length, keys // length if ring else keys, heads, compute)
        return Part(devices, inputs, rows * _held(of, heads)[0] * of.head)

    parts = {}
    for place, (of, *seen) in (_decoder(cfg.decoder, row, see, media) | _seen(cfg, row, see)).items():
        parts[place] = part(of, *seen, length=1 if place.part == "connector" else length)

    def of(op: Op) -> Part | None:
        return parts.get(Place.of(op.scope))

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


@dataclass(frozen=True)
class Heads:
    """What attention takes of a config."""

    heads: int
    kv_heads: int
    head: int


class Place(NamedTuple):
    """Where attention stands: part of the model, stream of tokens, and whether tokens look elsewhere (`look`)."""

    part: str
    stream: str = ""
    kind: str = "attention"

    @classmethod
    def of(cls, scope: str) -> "Place | None":
        """By the named scopes of the models and of nn; None where nothing attends."""
        found = _words(scope)
        kind = next((kind for kind in ("look", "attention") if kind in found), None)
        return None if kind is None else cls(part_of(scope), "answer" if "answer" in found else "", kind)


Sees = dict[Place, tuple]  # heads, and of every kind of layer the share of the layers and what they see


def _decoder(cfg: Language, row: Row, see: interleave.Config, media: int) -> Sees:
    """The language model's, whichever it is."""
    if cfg.answers:
        second = Row(sees.answers(row), ())
        return {
            Place("decoder"): (cfg.blocks, (1.0, sees.whole(row.documents))),
            Place("decoder", "answer"): (cfg.answer, (1.0, sees.sequence(second, "causal", 0))),
            Place("decoder", "answer", "look"): (cfg.answer, (1.0, sees.questions(row))),
        }
    near = len(cfg.blocks.windowed) / cfg.blocks.layers
    everything, window = (sees.sequence(row, see.see, media, n) for n in (0, cfg.window))
    out = {Place("decoder"): (cfg.blocks, (1 - near, everything), (near, window))}
    if cfg.cross is not None and row.pictures:
        of = Heads(cfg.cross.heads, cfg.cross.keys, cfg.cross.head)
        out[Place("decoder", "", "look")] = (of, (1.0, sees.media(row, see.cross, media)))
    return out


def _seen(cfg: vlm.Config, row: Row, see: interleave.Config) -> Sees:
    """The encoder's and the connector's. Transformers that follow each other have the same heads."""
    if not row.pictures:
        return {}
    vision, connector, out = cfg.vision, cfg.connector, {}
    inside, prefix = len(vision.blocks.windowed) / vision.blocks.layers, vision.prefix
    tokens = dataclasses.replace(row, pictures=tuple(vision.tokens(n) - prefix for n in row.pictures))
    whole, windows = sees.patches(tokens, prefix), sees.patches(row, 0, True)
    out[Place("vision")] = (vision.blocks, (1 - inside, whole), (inside, windows))
    behind = prefix if connector.prefix else 0
    if isinstance(connector, perceiver.Config):
        of = Heads(connector.heads, connector.kv_heads or connector.heads, connector.head)
        looks = sees.latents(row.pictures, behind + connector.latents, connector.latents)
        out[Place("connector", "", "look")] = (of, (1.0, looks))
    if isinstance(connector, qformer.Config):
        of, many = Heads(connector.heads, connector.heads, connector.head), len(row.pictures)
        out[Place("connector", "", "look")] = (of, (1.0, sees.latents(row.pictures, behind, connector.queries)))
        own = sees.patches(Row((), (connector.queries,) * many), see.instruction)
        out[Place("connector")] = (of, (1.0, own))
    return out


def goes_round(cfg: transformer.Config | Heads, keys: int, rows: int, split: int, compute: str, length: int) -> bool:
    """Whether keys and values of a split row go round the devices: what nn.transformer asks nn.attention.goes_round
    on the mesh.
    """
    kv = cfg.kv_heads if cfg.kv_heads % split else cfg.kv_heads // split
    return length > 1 and rows * kv * 2 * cfg.head * jnp.dtype(compute).itemsize * keys > GATHERED


def _held(cfg: transformer.Config | Heads, split: int) -> tuple[int, int]:
    """Heads of queries and of keys on a device: all where they do not divide, of keys as many as they need."""
    if cfg.heads % split:
        return cfg.heads, cfg.kv_heads
    return cfg.heads // split, math.lcm(cfg.kv_heads, split) // split


def _inputs(cfg: transformer.Config | Heads, queries: int, keys: int, split: int, compute: str) -> Inputs:
    """What a device's kernels are given of a row, by shapes: they cut it as these are."""
    heads, kv = _held(cfg, split)
    shapes = ((kv, heads // kv, queries), (kv, keys))
    q, k = (jax.ShapeDtypeStruct((1, *shape, cfg.head), jnp.dtype(compute)) for shape in shapes)
    return Inputs(q, k, k, None, None, None, None, None, None, None, None)


def part_of(scope: str) -> str:
    """Which part of the model an operation belongs to, by the named scopes of models.vlm and train.step."""
    found = _words(scope)
    return next((p for p in ("vision", "connector", "decoder", "loss", "update") if p in found), "other")


def _words(scope: str) -> set[str]:
    return set(re.findall(r"\w+", scope))  # of jit(step)/transpose(jvp(decoder))/while/…
