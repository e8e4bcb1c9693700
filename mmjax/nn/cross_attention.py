"""Gated cross-attention (Alayrac et al. 2022, Flamingo): text looks at media through layers that start as nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import ZEROS, ParamSpec, Spec, fan_in
from mmjax.nn import cache as caches
from mmjax.nn import linear, mlp, norm
from mmjax.nn.attention import attend, attend_cached


@dataclass(frozen=True)
class Config:
    """One layer (Flamingo, figure 4 and listing 2), and where such layers stand.

    width: of the text. media: of the media tokens. hidden: of the MLP.
    every: one such layer stands before each so many decoder blocks.
    at: before which blocks they stand, in rising order, where it is not each `every`th (Mllama); the number of blocks
      itself means after the last one, and a number given twice two of them in turn.
    kv_heads: heads of keys and values, as many as of queries where left out (Mllama: fewer).
    activation, gated: of the MLP, which has no biases.
    norm_kind, epsilon: of the norms before attention and MLP.
    qk_norm: RMSNorm of each head's queries and keys (Idefics, Mllama); qk_epsilon: its epsilon, if another.
    gate: what tanh(gate) is, one number for each branch or a vector (Idefics).
    blind: what a token does that sees no media (lo > hi): it goes through the MLP alone (Flamingo, Idefics), or skips
      the MLP and looks at all that lies between, from hi + 1 to lo - 1 ("all": Mllama, where these are all media of
      its document).
    """

    width: int
    media: int
    heads: int
    head: int
    hidden: int
    every: int = 1
    epsilon: float = 1e-5
    at: tuple[int, ...] = ()
    kv_heads: int | None = None
    activation: mlp.Activation = "gelu"
    gated: bool = False
    norm_kind: Literal["layer", "rms"] = "layer"
    qk_norm: bool = False
    qk_epsilon: float | None = None
    gate: Literal["scalar", "vector"] = "scalar"
    blind: Literal["mlp", "all"] = "mlp"

    def __post_init__(self):
        if self.every < 1 or (self.at and self.every != 1):
            raise InputError(
                f"Cross-attention layers stand before each {self.every} blocks or at {self.at}; give one of the two."
            )
        if list(self.at) != sorted(self.at) or min(self.at, default=0) < 0:
            raise InputError(f"Cross-attention layers at {self.at} must stand before blocks of rising numbers.")
        if self.heads % self.keys:
            raise InputError(
                f"{self.heads} query heads cannot share {self.keys} key heads evenly; choose a number that divides."
            )

    @property
    def keys(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def places(self, blocks: int) -> tuple[int, ...]:
        """Before which of so many decoder blocks a layer stands."""
        return self.at or tuple(range(0, blocks, self.every))

    @property
    def head_norm(self) -> norm.Config:
        return norm.Config(self.head, "rms", self.epsilon if self.qk_epsilon is None else self.qk_epsilon)

    @property
    def norm(self) -> norm.Config:
        return norm.Config(self.width, self.norm_kind, self.epsilon)

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.width, self.hidden, None, self.activation, self.gated, False)


def spec(cfg: Config) -> Spec:
    """The parameters of one layer."""
    inner = cfg.heads * cfg.head

    def project(width: int, heads: int) -> Spec:
        return {"kernel": ParamSpec((width, heads, cfg.head), ("embed", "heads", None), fan_in(width))}

    gate = ParamSpec((cfg.width if cfg.gate == "vector" else 1,), (None,), ZEROS)
    out = {
        "attention_norm": norm.spec(cfg.norm),
        "q": project(cfg.width, cfg.heads),
        "k": project(cfg.media, cfg.keys),
        "v": project(cfg.media, cfg.keys),
        "out": {"kernel": ParamSpec((cfg.heads, cfg.head, cfg.width), ("heads", None, "embed"), fan_in(inner))},
        "attention_gate": gate,
        "mlp_norm": norm.spec(cfg.norm),
        "mlp": mlp.spec(cfg.mlp),
        "mlp_gate": gate,
    }
    return out | ({name: norm.spec(cfg.head_norm) for name in ("q_norm", "k_norm")} if cfg.qk_norm else {})


def project(
    params: dict, media: Float[Array, "b m e"], cfg: Config
) -> tuple[Float[Array, "b m k h"], Float[Array, "b m k h"]]:
    """Keys and values of media tokens [B, M, media], by head."""
    split = ("batch", "length", "heads", None)
    k, v = (sharding.dense(media, params[name]["kernel"], split) for name in ("k", "v"))
    return (norm.apply(params["k_norm"], k, cfg.head_norm) if cfg.qk_norm else k), v


def apply(
    params: dict,
    x: Float[Array, "b l d"],
    media: Float[Array, "b m e"] | None,
    cfg: Config,
    *,
    order: Int[Array, "b m"] | None,
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
) -> Float[Array, "b l d"]:
    """x + tanh(gate) · attention, then + tanh(gate) · MLP; what tokens that see no media do is `cfg.blind`.

    Args:
      params: as `spec(cfg)`.
      x: text [B, L, width].
      media: media tokens [B, M, media], or None where no row has any.
      cfg: the layer.
      order: i32[B, M], the media tokens' labels, -1 where there is none.
      lo, hi: i32[B, L], which of them each text token sees.
    """
    if media is None:
        return _layer(params, x, cfg, None, lo, hi)
    k, v = project(params, media, cfg)
    return _layer(params, x, cfg, lambda q, lo, hi: attend(q, k, v, order, lo, hi)[0], lo, hi)


def cached(
    params: dict,
    x: Float[Array, "b l d"],
    media: Float[Array, "b m e"] | None,
    cfg: Config,
    past: caches.Past,
    *,
    order: Int[Array, "b s"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
) -> tuple[Float[Array, "b l d"], caches.Past]:
    """The same over the media tokens in a cache, these among them afterwards. For inference: no gradients.

    Args:
      media: what is new, whose keys and values are written from place past.at on; None where nothing is.
      past: this layer's keys and values.
      order: i32[B, S], the labels of all places of the cache, the new ones' included.
      The rest is as of `apply`.
    """
    past = past if media is None else caches.put(past, *project(params, media, cfg))
    k, v = caches.layer(past)
    return _layer(params, x, cfg, lambda q, lo, hi: attend_cached(q, k, v, order, lo, hi), lo, hi), past


def _layer(params: dict, x: jax.Array, cfg: Config, look: Callable | None, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Both branches; `look` is attention of queries, None where there is nothing to look at."""
    blind: Bool[Array, "b l"] = lo > hi
    if look is not None:
        h = norm.apply(params["attention_norm"], x, cfg.norm)
        q = sharding.dense(h, params["q"]["kernel"], ("batch", "length", "heads", None))
        q = norm.apply(params["q_norm"], q, cfg.head_norm) if cfg.qk_norm else q
        if cfg.blind == "all":
            lo, hi = jnp.where(blind, hi + 1, lo), jnp.where(blind, lo - 1, hi)
        with jax.named_scope("look"):
            out = look(q, lo, hi)
        y = sharding.dense(out, params["out"]["kernel"], ("batch", "length", None))
        x = x + linear.times(y, jnp.tanh(params["attention_gate"]))
    y = mlp.apply(params["mlp"], norm.apply(params["mlp_norm"], x, cfg.norm), cfg.mlp)
    if cfg.blind == "all":
        y = jnp.where(blind[:, :, None], jnp.zeros_like(y), y)
    return x + linear.times(y, jnp.tanh(params["mlp_gate"]))
