"""The heads of BLIP-2's first stage: contrast, matching and generation (Li et al. 2023, section 3.1)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.connectors.qformer_labels import Text, ends
from mmjax.core import sharding
from mmjax.core.spec import ZEROS, ParamSpec, Spec
from mmjax.nn import linear, mlp, norm


@dataclass(frozen=True)
class Config:
    """width: of the Q-Former. contrast: of the space where pictures and texts are compared.

    vocab: size of the word table for generation; None: no such head, as in transformers' Blip2ForImageTextRetrieval.
    """

    width: int
    contrast: int = 256
    vocab: int | None = None
    activation: mlp.Activation = "gelu"
    epsilon: float = 1e-12

    @property
    def projection(self) -> linear.Config:
        return linear.Config(self.width, self.contrast)

    @property
    def match(self) -> linear.Config:
        return linear.Config(self.width, 2)

    @property
    def transform(self) -> linear.Config:
        return linear.Config(self.width, self.width)

    @property
    def norm(self) -> norm.Config:
        return norm.Config(self.width, "layer", self.epsilon)


def spec(cfg: Config) -> Spec:
    out = {"vision": linear.spec(cfg.projection), "text": linear.spec(cfg.projection), "match": linear.spec(cfg.match)}
    if cfg.vocab is not None:
        out["language"] = {
            "transform": linear.spec(cfg.transform),
            "norm": norm.spec(cfg.norm),
            "bias": ParamSpec((cfg.vocab,), ("vocab",), ZEROS),
        }
    return out


def first(text: Text, pictures: int) -> Int[Array, "b n"]:
    """The slot of each picture's first token of text ([CLS]), -1 where it has none."""
    start, stop = ends(text.image, text.order, pictures)
    here = text.order[:, :, None] == start[:, None, :]
    slot = jnp.argmax(here, axis=1).astype(jnp.int32)
    return jnp.where(stop > start, slot, -1)


def contrast_vision(params: dict, queries: Float[Array, "b m d"], cfg: Config) -> Float[Array, "b m e"]:
    """Every query in the common space, of length 1; the picture is the query that fits a text best."""
    return _unit(linear.apply(params["vision"], queries, cfg.projection))


def contrast_text(
    params: dict, hidden: Float[Array, "b t d"], cfg: Config, *, at: Int[Array, "b n"]
) -> Float[Array, "b n e"]:
    """Every text in the common space, of length 1, by its first token, whose slot is `at`; meaningless where at < 0."""
    return _unit(linear.apply(params["text"], sharding.take_rows(hidden, at), cfg.projection))


def match(params: dict, queries: Float[Array, "b m d"], cfg: Config, *, pictures: int) -> Float[Array, "b n 2"]:
    """Logits of (apart, together) for every picture and its text: the mean over its queries, after both were mixed."""
    logits = linear.apply(params["match"], queries, cfg.match)
    return logits.reshape(logits.shape[0], pictures, -1, 2).mean(2)


def language(
    params: dict, hidden: Float[Array, "b t d"], words: Float[Array, "vocab d"], cfg: Config
) -> Float[Array, "b t vocab"]:
    """f32[B, T, V]: what comes after each token of text; `words` is the Q-Former's word table, which is tied."""
    p = params["language"]
    h = mlp.ACTIVATIONS[cfg.activation](linear.apply(p["transform"], hidden, cfg.transform))
    h = norm.apply(p["norm"], h, cfg.norm)
    logits = sharding.dense(h, words.T, ("batch", "length", "vocab"), wide=True)
    return (logits + sharding.constrain(p["bias"], ("vocab",))[None, None]).astype(jnp.float32)


def _unit(x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24))).astype(x.dtype)
