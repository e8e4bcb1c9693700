"""A vision-language model of the LLaVA shape: encoder → connector → media tokens in the decoder's sequence."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.connectors import mlp as connector
from mmjax.core import sharding
from mmjax.core.spec import Spec
from mmjax.encoders import vit
from mmjax.models import decoder
from mmjax.sequence.batch import Batch


@dataclass(frozen=True)
class Config:
    vision: vit.Config
    connector: connector.Config
    decoder: decoder.Config


def spec(cfg: Config) -> Spec:
    return {
        "vision": vit.spec(cfg.vision),
        "connector": connector.spec(cfg.connector),
        "decoder": decoder.spec(cfg.decoder),
    }


def media_tokens(params: dict, batch: Batch, cfg: Config) -> Float[Array, "b m d"]:
    """The row's media tokens [B, M, D], one per patch, in patch order."""
    features = vit.apply(
        params["vision"],
        batch.patches,
        cfg.vision,
        order=batch.patch_order,
        lo=batch.patch_lo,
        hi=batch.patch_hi,
        position=batch.patch_position,
    )
    return connector.apply(params["connector"], features, cfg.connector)


def hidden(
    params: dict, batch: Batch, cfg: Config, *, media: Float[Array, "b m d"] | None = None
) -> Float[Array, "b l d"]:
    """Hidden states of every token [B, L, D]: media tokens take the place of their placeholders.

    `media` are the row's media tokens where they are known already (as between the steps of an answer).
    """
    text = decoder.embed(params["decoder"], batch.tokens)
    media = sharding.take_rows(media_tokens(params, batch, cfg) if media is None else media, batch.slot)
    x = jnp.where((batch.slot >= 0)[:, :, None], media.astype(text.dtype), text)
    return decoder.apply(
        params["decoder"], x, cfg.decoder, order=batch.order, lo=batch.lo, hi=batch.hi, position=batch.position
    )


def logits(params: dict, batch: Batch, cfg: Config) -> jax.Array:
    """f32[B, L, V]: what comes after each token."""
    return decoder.logits(params["decoder"], hidden(params, batch, cfg), cfg.decoder)
