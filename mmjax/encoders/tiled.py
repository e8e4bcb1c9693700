"""A vision transformer that sees all tiles of a picture together, then once more from above (Llama 3.2 Vision).

Grattafiori et al. 2024, "The Llama 3 herd of models", section 7.1; to the digit what transformers 5.23 does
(models/mllama). A picture is one view of whole tiles whose patches lie tile by tile (sequence.interleave.Config.window,
tokenizers.canvas.Canvas). In here it has `tiles` tiles whatever its size, each of a class token and its patches, so
that everything it becomes has one static shape:

    padding      tile 0       tile 1       tile 2    tile 3        a picture of two tiles, on a canvas of up to four
    0 0 0 0 …    c p p p p    c p p p p    c 0 0 0 0 c 0 0 0 0     tiles 2 and 3 are of zeros, with positions

Learned positions tell the tiles apart, by the shape of the canvas: one vector a tile before and after the first
transformer, and one vector for each patch of each tile. Features are the last transformer's, and beside them what some
blocks of the first one put out.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import ZEROS, Normal, ParamSpec, Spec
from mmjax.encoders import Encoder
from mmjax.encoders.vit import Features
from mmjax.nn import linear, norm, patch_embed, transformer


@dataclass(frozen=True)
class Config(Encoder):
    """Patch embedding, positions, two transformers.

    embed: patch embedding. blocks: the first transformer. whole: the second one.
    side: patches a side of a tile. tiles: of every picture, those of padding included.
    shapes: (rows, columns) of tiles that a canvas may have, in the order of the tables' rows from 1 on (row 0 is of
      no picture). One of another shape makes its row NaN: nothing was learned for it.
    taps: blocks of the first transformer, counted from 0 and rising, whose output stands beside the features, value by
      value: the last one's first value in each tap, its second …
    multiple: places of a tile are padded with zeros to a multiple of this.
    padding: whether tokens see padding, the tiles and places that are no picture's. "seen" is a quirk of the published
      models, in which only padding does not see padding.
    epsilon: of the norms before and between the transformers.
    """

    embed: patch_embed.Config
    blocks: transformer.Config
    whole: transformer.Config
    side: int
    tiles: int
    shapes: tuple[tuple[int, int], ...]
    taps: tuple[int, ...] = ()
    multiple: int = 8
    padding: Literal["seen", "hidden"] = "seen"
    epsilon: float = 1e-5

    def __post_init__(self):
        if not self.shapes or any(min(shape) < 1 or shape[0] * shape[1] > self.tiles for shape in self.shapes):
            raise InputError(f"Pictures of {self.shapes} tiles do not fit {self.tiles}; give shapes of no more.")
        if self.blocks.width != self.whole.width or self.blocks.windowed or self.whole.windowed:
            raise InputError("Both transformers of a tiled encoder are of one width and have no windowed blocks.")
        if self.blocks.rope is not None or self.whole.rope is not None:
            raise InputError("A tiled encoder has learned positions; leave rotary ones out of its blocks.")

    @property
    def area(self) -> int:
        """Patches of a tile."""
        return self.side**2

    @property
    def places(self) -> int:
        """Tokens of a tile: its class token and its patches."""
        return 1 + self.area

    @property
    def pads(self) -> int:
        """Tokens of padding that all tiles of a picture have together, besides their own."""
        return self.tiles * (-self.places % self.multiple)

    @property
    def per_picture(self) -> int:
        return self.tiles * self.places

    @property
    def window(self) -> int:
        return self.side

    @property
    def canvas(self) -> int:
        return self.tiles

    @property
    def outputs(self) -> int:
        """Values of a feature."""
        return self.blocks.width * (1 + len(self.taps))

    @property
    def norm(self) -> norm.Config:
        return norm.Config(self.blocks.width, "layer", self.epsilon)

    @property
    def stacks(self) -> dict[str, transformer.Config]:
        return {"blocks": self.blocks, "whole": self.whole}

    def tokens(self, patches: int) -> int:
        return self.pads + self.per_picture


def spec(cfg: Config) -> Spec:
    width, rows = cfg.blocks.width, len(cfg.shapes) + 1

    def gated(*shape: int) -> Spec:
        table = ParamSpec((rows, cfg.tiles, *shape, width), (None,) * (2 + len(shape)) + ("embed",), Normal(0.02))
        return {"table": table, "gate": ParamSpec((1,), (None,), ZEROS)}

    return {
        "embed": patch_embed.spec(cfg.embed),
        "class": ParamSpec((width,), (None,), Normal(width**-0.5)),
        "position": ParamSpec((cfg.places, width), (None, "embed"), Normal(width**-0.5)),
        "tile_position": gated(cfg.places),
        "before": gated(),
        "after": gated(),
        "pre_norm": norm.spec(cfg.norm),
        "norm": norm.spec(cfg.norm),
        "blocks": transformer.spec(cfg.blocks),
        "whole": transformer.spec(cfg.whole),
    }


def encode(
    params: dict, patches: Num[Array, "b p c"], cfg: Config, *, grid: Int[Array, "b n 3"], taps: tuple[int, ...] = ()
) -> Features:
    """Features of every place of every tile, those of padding included: [B, N × per_picture, outputs].

    Args:
      params: as `spec(cfg)`.
      patches: u8 or f32[B, P, C], all pictures of a row one after the other, each tile by tile.
      cfg: the encoder.
      grid: i32[B, N, 3], (1, rows, columns) of each picture's canvas in patches, zeros where there is none.
      taps: must be left out: blocks that are wanted are `cfg.taps`.
    """
    if taps:
        raise InputError("A tiled encoder puts the blocks of its own `taps` beside its features, and shows no others.")
    x, tables = _embedded(params, patch_embed.apply(params["embed"], patches, cfg.embed), cfg, grid)
    see = _see(cfg, grid)
    x, kept = transformer.apply_with_taps(params["blocks"], x, cfg.blocks, cfg.taps, **see)
    x = norm.apply(params["norm"], x, cfg.norm)
    x = transformer.apply(params["whole"], _marked(params, x, cfg, tables), cfg.whole, **see)
    return Features(_features(x, kept, cfg), None, None, None, None)


def labels(grid: Int[Array, "b n 3"], first: Int[Array, "b n"], cfg: Config) -> Int[Array, "b m"]:
    """Labels of all features of a row, for cross-attention: those of padding come behind all others of a document.

        picture      a a a a  b b b b  c c c c      a and b in one document, of two and of one tile; c in another
        label        0 1 3 4  2 5 6 7  8 9 10 11    (of a tile)

    Args:
      grid: i32[B, N, 3], as of `encode`.
      first: i32[B, N], the first picture of each picture's document.
      cfg: the encoder.

    Returns:
      i32[B, N × per_picture], -1 where there is no picture.
    """
    b, n, _ = grid.shape
    there = grid.prod(-1) > 0
    own = grid.prod(-1) // cfg.area
    number = jnp.arange(n, dtype=jnp.int32)
    same = (first[:, :, None] == first[:, None, :]) & there[:, None, :]
    earlier = same & (number[None, None, :] < number[None, :, None])

    def added(which: jax.Array, many: jax.Array) -> jax.Array:
        return jnp.where(which, many[:, None, :], 0).sum(-1)[:, :, None]

    tile = jnp.arange(cfg.tiles, dtype=jnp.int32)[None, None]
    shown = added(earlier, own) + tile
    padding = added(same, own) + added(earlier, cfg.tiles - own) + tile - own[:, :, None]
    at = first[:, :, None] * cfg.tiles + jnp.where(tile < own[:, :, None], shown, padding)
    at = at[..., None] * cfg.places + jnp.arange(cfg.places, dtype=jnp.int32)[None, None, None]
    return jnp.where(there[:, :, None, None], at, -1).astype(jnp.int32).reshape(b, -1)


def _rows(cfg: Config, grid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The row of the tables [shapes × tiles] for every tile i32[B, N × tiles], and whether its picture has one."""
    shapes = jnp.asarray(np.array(cfg.shapes) * cfg.side, jnp.int32)
    fits = (grid[:, :, None, 1:] == shapes[None, None]).all(-1)
    number = jnp.where(fits.any(-1), fits.argmax(-1) + 1, 0).astype(jnp.int32)
    known = fits.any(-1) | (grid.prod(-1) == 0)
    rows = number[:, :, None] * cfg.tiles + jnp.arange(cfg.tiles, dtype=jnp.int32)[None, None]
    return rows.reshape(grid.shape[0], -1), jnp.repeat(known, cfg.tiles, axis=1)


def _of(table: dict, rows: jax.Array) -> jax.Array:
    """tanh(gate) times the table's vectors of every tile, [B, R, values]."""
    whole = sharding.constrain(table["table"], (None,) * table["table"].ndim)
    flat = whole.reshape(whole.shape[0] * whole.shape[1], -1)
    return linear.times(sharding.take(flat, rows, ("batch", None, None)), jnp.tanh(table["gate"]))


@sharding.whole_rows("x", "grid")
def _embedded(params: dict, x: jax.Array, cfg: Config, grid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Patches as vectors [B, P, D] → the tokens of all pictures [B, N × tokens, D], and the rows of their tables."""
    b, n, width = *grid.shape[:2], x.shape[-1]
    by_rows = ("batch", None, None, None)
    count = grid.prod(-1)
    place = jnp.arange(cfg.tiles * cfg.area, dtype=jnp.int32)[None, None]
    index = jnp.where(place < count[:, :, None], (jnp.cumsum(count, axis=1) - count)[:, :, None] + place, -1)
    x = sharding.take_rows(x, index.reshape(b, -1)).reshape(b, n * cfg.tiles, cfg.area, width)
    rows, known = _rows(cfg, grid)
    x = x + _of(params["before"], rows)[:, :, None].astype(x.dtype)
    first = jnp.broadcast_to(params["class"].astype(x.dtype)[None, None, None], (b, n * cfg.tiles, 1, width))
    x = jnp.concatenate([sharding.constrain(first, by_rows), x], axis=2)
    position = sharding.constrain(params["position"], (None, None))
    position = linear.times(position, 1.0 - jnp.tanh(params["tile_position"]["gate"]))
    own = _of(params["tile_position"], rows).reshape(b, n * cfg.tiles, cfg.places, width)
    x = x + (position[None, None] + own).astype(x.dtype)
    x = norm.apply(params["pre_norm"], jnp.where(known[:, :, None, None], x, jnp.nan), cfg.norm)
    # Zeros of padding, which the norm does not see, in front: what padding sees is one interval then.
    x = x.reshape(b, -1, width).reshape(b, n, cfg.per_picture, width)
    padding = sharding.constrain(jnp.zeros((b, n, cfg.pads, width), x.dtype), by_rows)
    x = jnp.concatenate([padding, x], axis=2)
    return x.reshape(b, -1, width), rows


def _see(cfg: Config, grid: jax.Array) -> dict[str, jax.Array]:
    """Who sees whom: v what belongs to the picture, - padding.

    -      x x
    v  x x x x x        hidden: without the columns of padding
    v  x x x x x
    -      x x
    """
    b, n, _ = grid.shape
    whole = cfg.pads + cfg.per_picture
    count = grid.prod(-1)[:, :, None] // cfg.area * cfg.places
    base = jnp.arange(n, dtype=jnp.int32)[None, :, None] * whole
    place = jnp.arange(whole, dtype=jnp.int32)[None, None]
    first, last = base + cfg.pads, base + cfg.pads + count - 1
    real = (place >= cfg.pads) & (place < cfg.pads + count) & (cfg.padding == "seen")
    there = jnp.broadcast_to(count > 0, real.shape)
    found = {
        "order": jnp.where(there, base + place, -1),
        "lo": jnp.where(there, jnp.where(real, base, first), 0),
        "hi": jnp.where(there, jnp.where(real, base + whole - 1, last), -1),
    }
    return {name: x.astype(jnp.int32).reshape(b, -1) for name, x in found.items()}


@sharding.whole_rows("x")
def _marked(params: dict, x: jax.Array, cfg: Config, rows: jax.Array) -> jax.Array:
    """With the vector of its tile added to every token, those of its padding too."""
    b, width = x.shape[0], x.shape[-1]
    tile = _of(params["after"], rows).astype(x.dtype).reshape(b, -1, cfg.tiles, width)
    each = [jnp.repeat(tile, many, axis=2) for many in (cfg.pads // cfg.tiles, cfg.places)]
    return x + jnp.concatenate(each, axis=2).reshape(x.shape)


@sharding.whole_rows("x")
def _features(x: jax.Array, kept: jax.Array, cfg: Config) -> jax.Array:
    """The last transformer's output and the taps [T, B, L, D], without what stands in front of every picture."""
    b, _, width = x.shape
    kept = sharding.constrain(kept, (None, "batch", None, None))

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(b, -1, cfg.pads + cfg.per_picture, width)[:, :, cfg.pads :].reshape(b, -1, width)

    taps = [cut(kept[i]) for i in range(len(cfg.taps))]
    beside = [jnp.stack(taps, axis=-1).reshape(b, -1, width * len(taps))] if taps else []
    return jnp.concatenate([cut(x), *beside], axis=-1)
