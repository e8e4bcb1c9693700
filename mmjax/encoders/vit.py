"""A vision transformer over packed patches: many pictures of any size in one row, kept apart by their intervals."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int, Num

from mmjax.core.spec import Spec
from mmjax.nn import norm, patch_embed, transformer


@dataclass(frozen=True)
class Config:
    """Patch embedding, blocks with 2-D rotary positions (row, column), final norm (Dosovitskiy et al. 2021)."""

    embed: patch_embed.Config
    blocks: transformer.Config

    @property
    def norm(self) -> norm.Config:
        return self.blocks.norm_config


def spec(cfg: Config) -> Spec:
    return {
        "embed": patch_embed.spec(cfg.embed),
        "blocks": transformer.spec(cfg.blocks),
        "norm": norm.spec(cfg.norm),
    }


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
) -> Float[Array, "b p d"]:
    """Features of every patch.

    Args:
      params: as `spec(cfg)`.
      patches: u8 or f32[B, P, C], all pictures of a row one after the other.
      order, lo, hi: i32[B, P]; every patch sees the patches of its picture.
      position: [B, P, 2], row and column of the patch in its picture.
      window: lo and hi of the blocks that cfg.blocks.windowed names.
    """
    x = patch_embed.apply(params["embed"], patches, cfg.embed)
    x = transformer.apply(params["blocks"], x, cfg.blocks, order=order, lo=lo, hi=hi, position=position, window=window)
    return norm.apply(params["norm"], x, cfg.norm)
