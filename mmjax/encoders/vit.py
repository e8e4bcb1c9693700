"""The vision transformer over packed patches: many pictures of any size in one row, kept apart by their intervals.

One transformer and a config for ViT, DeiT, DINOv2, CLIP, SigLIP, SigLIP 2, Pixtral, InternViT and the towers of
Idefics2 and 3 and of Qwen-VL (see encoders.published): they differ in what is added to the patches, in norms and
activations, and in the head.
"""

from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import ZEROS, Normal, ParamSpec, Spec
from mmjax.encoders import Encoder
from mmjax.encoders import head as heads
from mmjax.nn import linear, norm, patch_embed, position_embed, transformer
from mmjax.sequence import behind


@dataclass(frozen=True)
class Table:
    """Learned positions of a grid, for every other grid interpolated (see nn.position_embed.interpolate).

    method: "bucket" interpolates nothing: a patch reads what stands at its share of the picture
      (nn.position_embed.bucketised; Idefics2).
    """

    rows: int
    columns: int
    method: Literal["bilinear", "bicubic", "bucket"] = "bicubic"
    antialias: bool = False
    align_corners: bool = False

    def __post_init__(self):
        if self.method == "bucket" and (self.antialias or self.align_corners):
            raise InputError("A table that is read by buckets is not interpolated; leave antialias and corners out.")


@dataclass(frozen=True)
class Config(Encoder):
    """Patch embedding, positions, blocks, final norm, head (Dosovitskiy et al. 2021).

    table: learned positions that are added to the patches. Rotary ones are the blocks' matter (blocks.rope).
    classes: class tokens of each picture, with positions of their own where there is a table (DeiT: 2).
    registers: more such tokens, without positions (Darcet et al. 2024; DINOv2).
    mask: a learned vector stands in for patches that are masked out (SimMIM, DINOv2).
    pre_norm: a norm before the first block (CLIP, Pixtral).
    final_norm: of every token after the last block. Without it, features are as the last block puts them out (CLIP,
      whose head normalises what it pooled; Pixtral; Qwen-VL, whose merger does).
    head: one vector per picture.
    """

    embed: patch_embed.Config
    blocks: transformer.Config
    table: Table | None = None
    classes: int = 0
    registers: int = 0
    mask: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    head: heads.Config | None = None

    @property
    def norm(self) -> norm.Config:
        return self.blocks.norm_config

    @property
    def prefix(self) -> int:
        """Tokens that each picture has besides its patches."""
        return self.classes + self.registers

    @property
    def window(self) -> int | None:
        return None if self.blocks.windowed else 0

    @property
    def outputs(self) -> int:
        """Values of a feature."""
        return self.blocks.width

    @property
    def stacks(self) -> dict[str, transformer.Config]:
        return {"blocks": self.blocks}

    def tokens(self, patches: int) -> int:
        return patches + self.prefix


@flax.struct.dataclass
class Features:
    """What an encoder sees in a row; None where its config makes no such thing."""

    patches: Any  # [B, P, D]
    prefix: Any  # [B, N, K, D], class and register tokens of each picture
    pooled: Any  # [B, N, E], one vector per picture
    taps: Any  # [T, B, P, D], what chosen blocks put out
    prefix_taps: Any  # [T, B, N, K, D]


def spec(cfg: Config) -> Spec:
    width = cfg.blocks.width

    def tokens(count: int) -> ParamSpec:
        return ParamSpec((count, width), (None, "embed"), Normal(0.02))

    out = {"embed": patch_embed.spec(cfg.embed), "blocks": transformer.spec(cfg.blocks)}
    if cfg.table is not None:
        shape = (cfg.table.rows, cfg.table.columns, width)
        out["table"] = ParamSpec(shape, (None, None, "embed"), Normal(0.02))
    if cfg.classes:
        out["class"] = tokens(cfg.classes)
        if cfg.table is not None:
            out["class_position"] = tokens(cfg.classes)
    if cfg.registers:
        out["registers"] = tokens(cfg.registers)
    if cfg.mask:
        out["mask"] = ParamSpec((width,), (None,), ZEROS)
    if cfg.pre_norm:
        out["pre_norm"] = norm.spec(cfg.norm)
    if cfg.final_norm:
        out["norm"] = norm.spec(cfg.norm)
    if cfg.head is not None and (of := heads.spec(cfg.head)):
        out["head"] = of
    return out


def apply(
    params: dict,
    patches: Num[Array, "b p c"],
    cfg: Config,
    *,
    order: Int[Array, "b p"],
    lo: Int[Array, "b p"],
    hi: Int[Array, "b p"],
    position: Num[Array, "b p axes"],
    window: tuple[Int[Array, "b p"], Int[Array, "b p"]] | None = None,
    image: Int[Array, "b p"] | None = None,
    grid: Int[Array, "b n 3"] | None = None,
) -> Float[Array, "b p d"]:
    """Features of every patch; the arguments are those of `encode`."""
    see = {"order": order, "lo": lo, "hi": hi, "position": position, "window": window, "image": image, "grid": grid}
    return encode(params, patches, cfg, **see).patches


def encode(
    params: dict,
    patches: Num[Array, "b p c"],
    cfg: Config,
    *,
    order: Int[Array, "b p"],
    lo: Int[Array, "b p"],
    hi: Int[Array, "b p"],
    position: Num[Array, "b p axes"],
    window: tuple[Int[Array, "b p"], Int[Array, "b p"]] | None = None,
    image: Int[Array, "b p"] | None = None,
    grid: Int[Array, "b n 3"] | None = None,
    masked: Bool[Array, "b p"] | None = None,
    taps: tuple[int, ...] = (),
) -> Features:
    """Features of every patch, of class and register tokens, of every picture, and of the blocks named in `taps`.

    Args:
      params: as `spec(cfg)`.
      patches: u8 or f32[B, P, C], all pictures of a row one after the other.
      cfg: the encoder.
      order, lo, hi: i32[B, P]; every patch sees the patches of its picture. With class tokens the intervals must be
        those of whole pictures: then every frame of a video is a picture of its own, in `image` and `grid` too.
      position: [B, P, 2], row and column of the patch in its picture.
      window: lo and hi of the blocks that cfg.blocks.windowed names.
      image: i32[B, P], which of the row's pictures a patch belongs to, -1 in empty places. Needed with `grid` where
        cfg has a table, class or register tokens, or a head.
      grid: i32[B, N, 3], (frames, rows, columns) of each picture, zeros where there is none.
      masked: bool[B, P], patches that the learned vector stands in for.
      taps: blocks, counted from 0, whose output is wanted too, rising. No norm is applied to it.

    Raises:
      InputError: `image` and `grid` are needed and missing; `masked` is given and cfg.mask is False.
    """
    reads = cfg.table is not None or cfg.prefix or cfg.head is not None
    if reads and (image is None or grid is None):
        raise InputError("This encoder has a position table, class tokens or a head; give `image` and `grid`.")
    x = embed(params, patches, cfg, position=position, image=image, grid=grid, masked=masked)
    count = x.shape[1]
    places, see = position, {"order": order, "lo": lo, "hi": hi}
    if cfg.prefix:
        # Patches and tokens change places here: rows are whole until the blocks split them again.
        x, position, order, lo, hi, image = sharding.unsplit((x, position, order, lo, hi, image))
        x = jnp.concatenate([x, _prefix(params, x, cfg, grid.shape[1])], axis=1)
        see = _see(order, lo, hi, image, grid, cfg.prefix)
        places = jnp.pad(position, ((0, 0), (0, x.shape[1] - count), (0, 0)))
        if window is not None:
            raise InputError("Window attention knows no class tokens; leave windows or class tokens out.")
    if cfg.pre_norm:
        x = norm.apply(params["pre_norm"], x, cfg.norm)
    x, kept = transformer.apply_with_taps(params["blocks"], x, cfg.blocks, taps, position=places, window=window, **see)
    if cfg.final_norm:
        x = norm.apply(params["norm"], x, cfg.norm)
    features, prefix, prefix_taps = x, None, None
    if cfg.prefix:
        features, prefix = _split(sharding.unsplit(x), count, cfg.prefix)
        kept = sharding.constrain(kept, (None, "batch", None, None)) if taps else kept
        kept, prefix_taps = _split(kept, count, cfg.prefix)
    pooled = None
    if cfg.head is not None:
        pooled = heads.apply(params.get("head", {}), features, prefix, cfg.head, image=image, order=order, grid=grid)
    return Features(features, prefix, pooled, kept, prefix_taps)


def embed(
    params: dict,
    patches: Num[Array, "b p c"],
    cfg: Config,
    *,
    position: Num[Array, "b p axes"],
    image: Int[Array, "b p"] | None = None,
    grid: Int[Array, "b n 3"] | None = None,
    masked: Bool[Array, "b p"] | None = None,
) -> Float[Array, "b p d"]:
    """Patches as vectors with their learned positions, before any block; arguments as of `encode`."""
    x = patch_embed.apply(params["embed"], patches, cfg.embed)
    if masked is not None:
        if not cfg.mask:
            raise InputError("This encoder has no vector for masked patches; set `mask`, or leave `masked` out.")
        x = jnp.where(masked[..., None], linear.plus(jnp.zeros_like(x), params["mask"]), x)
    if cfg.table is None:
        return x
    own = sharding.take_rows(grid[..., 1:], image)
    place = position[..., -2:].astype(jnp.int32)
    table = cfg.table
    if table.method == "bucket":
        return x + position_embed.bucketised(params["table"], place, own).astype(x.dtype)
    added = position_embed.interpolate(
        params["table"],
        place,
        own,
        method=table.method,
        antialias=table.antialias,
        align_corners=table.align_corners,
    )
    return x + added.astype(x.dtype)


def _prefix(params: dict, x: jax.Array, cfg: Config, pictures: int) -> jax.Array:
    """Class and register tokens of all pictures [B, N × K, D]."""
    whole = (None, None)
    parts = []
    if cfg.classes:
        tokens = sharding.constrain(params["class"], whole)
        if cfg.table is not None:
            tokens = tokens + sharding.constrain(params["class_position"], whole)
        parts.append(tokens)
    if cfg.registers:
        parts.append(sharding.constrain(params["registers"], whole))
    return behind.start(jnp.concatenate(parts), x, pictures)


def _see(order: jax.Array, lo: jax.Array, hi: jax.Array, image: jax.Array, grid: jax.Array, prefix: int) -> dict:
    """Who sees whom with `prefix` more tokens behind every picture (see sequence.behind)."""
    labels, first, last = behind.labels(image, order, grid, prefix)
    there, shift = order >= 0, image * prefix
    lo = jnp.concatenate([jnp.where(there, lo + shift, 0), first], axis=1)
    hi = jnp.concatenate([jnp.where(there, hi + shift + prefix, -1), last], axis=1)
    return {"order": labels, "lo": lo, "hi": hi}


def _split(x: jax.Array, patches: int, prefix: int) -> tuple[jax.Array, jax.Array]:
    """[..., P + N × K, D] → [..., P, D] and [..., N, K, D]."""
    more = x[..., patches:, :]
    return x[..., :patches, :], more.reshape(*more.shape[:-2], more.shape[-2] // prefix, prefix, more.shape[-1])
