"""From features to one vector per picture: class token, mean, attention pooling; then norm, tanh layer, projection."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Spec
from mmjax.nn import attention_pool, linear
from mmjax.nn import norm as norms


@dataclass(frozen=True)
class Config:
    """What follows what is pooled; every part may be left out.

    pool: "class": the first class token (ViT, CLIP). "mean": of the patches (InternViT). "class_mean": both, one after
      the other (DINOv2's classifier). "attention": by `attention` (SigLIP). "distilled": each of two class tokens has a
      projection, and the results are averaged (DeiT: Touvron et al. 2021, section 4).
    norm: of what was pooled (CLIP normalises nothing else).
    tanh: values of a layer with a tanh after it (BERT's and ViT's pooler).
    outputs: values of the projection (CLIP's common space, a classifier's labels). bias: whether that has one.
    """

    width: int
    pool: Literal["class", "mean", "class_mean", "attention", "distilled"] = "class"
    attention: attention_pool.Config | None = None
    norm: norms.Config | None = None
    tanh: int | None = None
    outputs: int | None = None
    bias: bool = True

    def __post_init__(self):
        if (self.pool == "attention") != (self.attention is not None):
            raise InputError("Attention pooling and its config go together; give both or neither.")
        if self.pool == "distilled" and not self.outputs:
            raise InputError("A distilled head averages two projections; give the number of outputs.")

    @property
    def pooled(self) -> int:
        return self.width * (2 if self.pool == "class_mean" else 1)

    @property
    def dense(self) -> linear.Config:
        return linear.Config(self.pooled, self.tanh or self.pooled, True, ("embed", None))

    @property
    def project(self) -> linear.Config:
        return linear.Config(self.tanh or self.pooled, self.outputs or 0, self.bias, ("embed", None))


def spec(cfg: Config) -> Spec:
    out: Spec = {}
    if cfg.attention is not None:
        out["attention"] = attention_pool.spec(cfg.attention)
    if cfg.norm is not None:
        out["norm"] = norms.spec(cfg.norm)
    if cfg.tanh is not None:
        out["tanh"] = linear.spec(cfg.dense)
    if cfg.outputs is not None:
        out["project"] = linear.spec(cfg.project)
        if cfg.pool == "distilled":
            out["project_distilled"] = linear.spec(cfg.project)
    return out


def apply(
    params: dict,
    patches: Float[Array, "b p d"],
    prefix: Float[Array, "b n k d"] | None,
    cfg: Config,
    *,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
) -> Float[Array, "b n e"]:
    """One vector for each of N pictures; those of pictures that are not there are meaningless.

    Args:
      params: as `spec(cfg)`.
      patches: features of packed pictures [B, P, D].
      prefix: class and register tokens of each picture [B, N, K, D], where there are any.
      cfg: what to do.
      image, order: i32[B, P], the picture of each patch (-1 in empty places) and its label, counted through the row.
      grid: i32[B, N, 3], zeros where there is no picture.

    Raises:
      InputError: the head looks at a class token and there is none.
    """
    if cfg.pool in ("class", "class_mean", "distilled") and prefix is None:
        raise InputError(f"A head that pools by {cfg.pool!r} looks at class tokens, but the encoder has none.")
    if cfg.pool == "attention":
        count = grid.prod(-1)
        stop = jnp.cumsum(count, axis=1)
        x = attention_pool.apply(params["attention"], patches, cfg.attention, order=order, lo=stop - count, hi=stop - 1)
    elif cfg.pool == "mean":
        x = mean(patches, image, grid.shape[1])
    elif cfg.pool == "class_mean":
        x = jnp.concatenate([prefix[:, :, 0], mean(patches, image, grid.shape[1])], axis=-1)
    else:
        x = prefix[:, :, 0]
    if cfg.norm is not None:
        x = norms.apply(params["norm"], x, cfg.norm)
    if cfg.tanh is not None:
        x = jnp.tanh(linear.apply(params["tanh"], x, cfg.dense))
    if cfg.outputs is None:
        return x
    out = linear.apply(params["project"], x, cfg.project)
    if cfg.pool == "distilled":
        out = (out + linear.apply(params["project_distilled"], prefix[:, :, 1], cfg.project)) / 2
    return out


def mean(features: Float[Array, "b p d"], image: Int[Array, "b p"], pictures: int) -> Float[Array, "b n d"]:
    """The mean of every picture's features [B, N, D], computed in float32; zeros for pictures that have none."""
    features, image = sharding.unsplit((features, image))
    own = (image[:, None, :] == jnp.arange(pictures, dtype=image.dtype)[None, :, None]).astype(features.dtype)
    # As a batched product of each row with itself: it never leaves the row.
    precise = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    total = jnp.einsum("bnp,bpd->bnd", own, features, **precise)
    out = total / jnp.maximum(own.sum(-1, dtype=jnp.float32), 1.0)[..., None]
    return sharding.constrain(out.astype(features.dtype), ("batch", None, None))
