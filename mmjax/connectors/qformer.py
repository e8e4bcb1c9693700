"""The Q-Former: learned queries that look at a picture, and talk to its text, in a BERT (Li et al. 2023, BLIP-2).

Every layer is post-norm (Devlin et al. 2019): queries and text attend to each other by one of three patterns, queries
alone look at the picture's features in every `cross_every`-th layer, and queries and text have an MLP each (BLIP-2,
section 3.1 and figure 2). Rows are packed: several pictures, each with its own queries and, if any, its own text; see
`qformer_labels`.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.connectors import Connector
from mmjax.connectors.qformer_labels import Pattern, Text, ends, labels, looks
from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import ZEROS, Normal, ParamSpec, Spec, fan_in, gradients_laid, stack
from mmjax.nn import linear, mlp, norm, position_embed
from mmjax.nn.attention import attend


@dataclass(frozen=True)
class Config(Connector):
    """Sizes and variants.

    inputs: width of the features. width: of queries and text.
    queries: learned queries, so many media tokens become of each picture; None: they are handed to `encode`, as the
      stand-alone models of transformers do.
    outputs: width of the media tokens (`language_projection`); None: not projected (BLIP-2's first stage).
    text: text has MLPs (BLIP-2's first stage, InstructBLIP); BLIP-2's second stage has none.
    vocab: size of the word table, which text needs; None: text is handed over as embeddings.
    positions: tokens in the longest text; what comes after is NaN.
    prefix: whether queries look at class and register tokens too, as all published ones do.
    cross_every: the first of so many layers looks at the picture.
    """

    inputs: int
    width: int
    queries: int | None
    layers: int
    heads: int
    hidden: int
    outputs: int | None = None
    text: bool = False
    vocab: int | None = None
    positions: int = 512
    prefix: bool = False
    cross_every: int = 2
    activation: mlp.Activation = "gelu"
    epsilon: float = 1e-12

    def __post_init__(self):
        if self.width % self.heads:
            raise InputError(f"A Q-Former of width {self.width} does not divide into {self.heads} heads evenly.")
        if self.vocab is not None and not self.text:
            raise InputError("A Q-Former with a word table needs MLPs for text; set text=True, or vocab=None.")
        if self.cross_every < 1:
            raise InputError(f"cross_every is {self.cross_every}; give how many layers share one look at the picture.")

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def crosses(self) -> int:
        """How many layers look at the picture: 0, cross_every, 2 · cross_every …"""
        return -(-self.layers // self.cross_every)

    @property
    def norm(self) -> norm.Config:
        return norm.Config(self.width, "layer", self.epsilon)

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.width, self.hidden, None, self.activation, False, True)

    @property
    def projection(self) -> linear.Config:
        return linear.Config(self.width, self.outputs)

    @property
    def per_picture(self) -> int:
        return self.queries or 0

    @property
    def reads_text(self) -> bool:
        return self.vocab is not None

    @property
    def alone(self) -> bool:
        return self.queries is None

    def of_features(self, path: tuple[str, ...]) -> bool:
        return path[0] == "cross" and path[1] in ("k", "v")

    def tokens(self, grid: tuple[int, int, int]) -> int:
        if self.queries is None:
            raise InputError("This Q-Former has no queries of its own; set queries to how many it shall have.")
        return self.queries


@flax.struct.dataclass
class Encoded:
    """queries: [B, M = N × queries, width]. text: [B, T, width]. hidden: all of it, after the embedding and each layer.

    hidden is [layers + 1, B, M + T, width], where it was asked for.
    """

    queries: Any
    text: Any
    hidden: Any


def spec(cfg: Config) -> Spec:
    def project(inputs: int) -> Spec:
        return {
            "kernel": ParamSpec((inputs, cfg.heads, cfg.head), ("embed", "heads", None), fan_in(inputs)),
            "bias": ParamSpec((cfg.heads, cfg.head), ("heads", None), ZEROS),
        }

    def attention(inputs: int) -> Spec:
        back = ParamSpec((cfg.heads, cfg.head, cfg.width), ("heads", None, "embed"), fan_in(cfg.width))
        return {
            "q": project(cfg.width),
            "k": project(inputs),
            "v": project(inputs),
            "out": {"kernel": back, "bias": ParamSpec((cfg.width,), (None,), ZEROS)},
            "norm": norm.spec(cfg.norm),
        }

    layer = {"attention": attention(cfg.width)}
    for name in ("query", "text") if cfg.text else ("query",):
        layer |= {f"{name}_mlp": mlp.spec(cfg.mlp), f"{name}_norm": norm.spec(cfg.norm)}
    out = {
        "norm": norm.spec(cfg.norm),
        "layers": stack(layer, cfg.layers),
        "cross": stack(attention(cfg.inputs), cfg.crosses),
    }
    if cfg.queries is not None:
        out["queries"] = ParamSpec((cfg.queries, cfg.width), (None, "embed"), Normal(0.02))
    if cfg.vocab is not None:
        out["words"] = ParamSpec((cfg.vocab, cfg.width), ("vocab", "embed"), Normal(0.02))
        out["positions"] = ParamSpec((cfg.positions, cfg.width), (None, "embed"), Normal(0.02))
    if cfg.outputs is not None:
        out["projection"] = linear.spec(cfg.projection)
    return out


def apply(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    *,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
    text: Text | None = None,
) -> Float[Array, "b m outputs"]:
    """[B, P, inputs] → media tokens [B, M = N × queries, outputs], picture after picture.

    Arguments as of `encode`; with a text, queries and text see each other (InstructBLIP).
    """
    return project(params, encode(params, features, cfg, image=image, order=order, grid=grid, text=text).queries, cfg)


def project(params: dict, queries: Float[Array, "b m d"], cfg: Config) -> Float[Array, "b m outputs"]:
    """The queries' hidden states as media tokens in the language model's space, where cfg.outputs is set."""
    return queries if cfg.outputs is None else linear.apply(params["projection"], queries, cfg.projection)


@sharding.whole_rows("features", "image", "order", "grid", "text")
def encode(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    *,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
    text: Text | None = None,
    pattern: Pattern = "matching",
    queries: Float[Array, "q e"] | None = None,
    intermediates: bool = False,
) -> Encoded:
    """Hidden states of queries and text, before the projection.

    Args:
      params: as `spec(cfg)`.
      features: of packed pictures.
      cfg: sizes.
      image, order: i32[B, P], the picture of each feature and its label, counted through the row, -1 in empty places.
      grid: i32[B, N, 3], zeros where there is no picture (its queries are meaningless: nothing may look at them).
      text: the pictures' texts, if any.
      pattern: who sees whom.
      queries: [Q, width], where the config has none of its own.
      intermediates: hidden states after each layer as well.

    Raises:
      InputError: queries are missing or there are two kinds of them, or the text is not what the config describes.
    """
    if (queries is None) == (cfg.queries is None):
        raise InputError("A Q-Former needs queries of its own or handed over, and not both; see Config.queries.")
    queries = params["queries"] if queries is None else queries
    (b, n, _), q = grid.shape, queries.shape[0]
    # In float32, as the queries' gradient is a sum over rows and pictures.
    start = jnp.repeat(jnp.tile(queries.astype(jnp.float32), (n, 1))[None], b, axis=0).astype(features.dtype)
    x = sharding.constrain(start, ("batch", None, None))
    if text is not None:
        x = jnp.concatenate([x, _embed(params, text, cfg, n).astype(x.dtype)], axis=1)
    see = labels(grid, q, text, pattern)
    media = (features, order, *looks(image, order, n, q))
    out, hidden = _run(params, x, cfg, see, n * q, media, intermediates)
    return Encoded(out[:, : n * q], None if text is None else out[:, n * q :], hidden)


@sharding.whole_rows("text")
def encode_text(params: dict, text: Text, cfg: Config, *, pictures: int, intermediates: bool = False) -> Encoded:
    """Hidden states of texts without their pictures: what `encode` makes of them in the contrastive pattern."""
    x = _embed(params, text, cfg, pictures)
    grid = jnp.zeros_like(text.image, shape=(x.shape[0], pictures, 3))
    out, hidden = _run(params, x, cfg, labels(grid, 0, text, "contrastive"), 0, None, intermediates)
    return Encoded(None, out, hidden)


def _embed(params: dict, text: Text, cfg: Config, pictures: int) -> jax.Array:
    """Words and positions, which every text counts for itself."""
    if not cfg.text:
        raise InputError("This Q-Former has no MLPs for text; leave the text out, or set text=True.")
    if text.tokens.ndim != (3 if cfg.vocab is None else 2):
        raise InputError(
            f"Text of shape {text.tokens.shape} was given; a Q-Former with a word table takes ids [B, T], one without "
            f"takes embeddings [B, T, {cfg.width}]."
        )
    if cfg.vocab is None:
        return sharding.constrain(text.tokens, ("batch", None, None))
    start, _ = ends(text.image, text.order, pictures)
    at = jnp.where(text.order >= 0, text.order - sharding.take_rows(start, text.image), -1)
    words = sharding.take(params["words"], text.tokens, ("batch", None, None))
    return words + position_embed.learned(params["positions"], at)


def _run(
    params: dict, x: jax.Array, cfg: Config, see: tuple, count: int, media: tuple | None, intermediates: bool
) -> tuple[jax.Array, jax.Array | None]:
    """All layers over [queries; text], the first `count` of which are queries."""
    x = sharding.vary(norm.apply(params["norm"], x, cfg.norm), (media, see))
    start, every = x, cfg.cross_every

    own = spec(cfg)

    def layer(x: jax.Array, p: dict, cross: dict | None = None) -> tuple[jax.Array, jax.Array | None]:
        p, cross = gradients_laid(p, own["layers"]), cross and gradients_laid(cross, own["cross"])
        x = _attention(p["attention"], x, x, cfg, *see)
        parts = []
        if count:
            q = x[:, :count]
            q = q if cross is None else _attention(cross, q, media[0], cfg, *media[1:])
            parts.append(norm.apply(p["query_norm"], q + mlp.apply(p["query_mlp"], q, cfg.mlp), cfg.norm))
        if x.shape[1] > count:
            t = x[:, count:]
            parts.append(norm.apply(p["text_norm"], t + mlp.apply(p["text_mlp"], t, cfg.mlp), cfg.norm))
        x = sharding.constrain(jnp.concatenate(parts, axis=1), ("batch", None, None))
        return x, x if intermediates else None

    def group(x: jax.Array, of: tuple[dict, dict], size: int = every) -> tuple[jax.Array, Any]:
        """`size` layers, the first of which looks at the picture."""
        layers, cross = of
        x, first = layer(x, _cut(layers, 0), cross)
        first = first[None] if intermediates else None
        if size == 1:
            return x, first
        x, others = jax.lax.scan(layer, x, _cut(layers, slice(1, None)))
        return x, jnp.concatenate([first, others]) if intermediates else None

    whole = cfg.layers // every
    hidden = [start[None]]
    if whole:
        # A leading axis of groups; layers themselves are stacked one by one, as their weights are named.
        layers = jax.tree.map(lambda p: p[: whole * every].reshape(whole, every, *p.shape[1:]), params["layers"])
        x, found = jax.lax.scan(group, x, (layers, _cut(params["cross"], slice(whole))))
        hidden.append(found.reshape(-1, *x.shape) if intermediates else None)
    if rest := cfg.layers % every:
        left = _cut(params["layers"], slice(whole * every, None)), _cut(params["cross"], whole)
        x, found = group(x, left, rest)
        hidden.append(found)
    return x, jnp.concatenate(hidden) if intermediates else None


def _cut(tree: dict, at: Any) -> dict:
    return jax.tree.map(lambda p: p[at], tree)


def _attention(params: dict, x: jax.Array, of: jax.Array, cfg: Config, order, lo, hi) -> jax.Array:
    """norm(x + attention of x over `of`)."""

    def project(x: jax.Array, name: str) -> jax.Array:
        y = sharding.dense(x, params[name]["kernel"], ("batch", None, "heads", None))
        return linear.plus(y, params[name]["bias"])

    q, k, v = project(x, "q"), project(of, "k"), project(of, "v")
    with jax.named_scope("attention" if of is x else "look"):
        out, _ = attend(q, k, v, order, lo, hi)
    y = linear.plus(sharding.dense(out, params["out"]["kernel"], ("batch", None, None)), params["out"]["bias"])
    return norm.apply(params["norm"], x + y, cfg.norm)
