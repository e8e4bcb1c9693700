"""The Perceiver resampler (Alayrac et al. 2022, Flamingo, listing 1): any number of features to so many tokens."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.connectors import Connector
from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, fan_in, gradients_laid, stack
from mmjax.nn import linear, mlp, norm, position_embed
from mmjax.nn.attention import attend
from mmjax.sequence import behind


@dataclass(frozen=True)
class Config(Connector):
    """Latents look at their picture's features and at each other, through one projection of both to keys and values.

    inputs: width of the features. width: of the latents, and of what comes out. latents: media tokens made of each
      picture or video. head: values in a head. hidden: of the MLPs; 0: none.
    kv_heads: of keys and values, `heads` if left out (Idefics2: fewer).
    norm_kind: "layer" (Flamingo, Idefics), "rms" (Idefics2); "none": no norm anywhere (Kosmos-2).
    residual: whether what attention makes is added to the latents, or takes their place (Kosmos-2).
    bias: of the attention's maps (Kosmos-2).
    unit: whether features are made vectors of length one first (Kosmos-2).
    prefix: whether class and register tokens are among the features (Idefics, Kosmos-2).
    qk_norm: LayerNorm of each head's queries and keys (Idefics).
    activation, gated: of the MLPs: gelu (Flamingo), relu (Idefics), gated silu (Idefics2).
    projection: an MLP that brings features to the latents' width first (Idefics2's modality projection).
    dense: whether one linear map does (Kosmos-2).
    frames: rows of the table added by frame; videos have at most so many (Flamingo, section 2.1; OpenFlamingo).
    media: rows of the table added by the picture's number in its document (flamingo-pytorch).
    """

    inputs: int
    width: int
    latents: int
    layers: int
    heads: int
    head: int
    hidden: int
    epsilon: float = 1e-5
    kv_heads: int | None = None
    norm_kind: Literal["layer", "rms", "none"] = "layer"
    qk_norm: bool = False
    residual: bool = True
    bias: bool = False
    unit: bool = False
    prefix: bool = False
    activation: mlp.Activation = "gelu"
    gated: bool = False
    projection: mlp.Config | None = None
    dense: bool = False
    frames: int = 0
    media: int = 0

    def __post_init__(self):
        into, out = self.inputs, self.inputs
        if self.projection is not None:
            into, out = self.projection.width, self.projection.outputs or self.projection.width
        if self.dense and self.projection is not None:
            raise InputError("Features go through one linear map (dense) or an MLP (projection); give one of them.")
        if (into, out) != (self.inputs, self.width) and not self.dense:
            raise InputError(
                f"Features of width {self.inputs} must come to the latents' width {self.width} (one projection makes "
                f"keys of both); give a map from the one to the other (dense or projection)."
            )
        if self.prefix and self.frames:
            raise InputError(
                "A class token is of no frame: this resampler reads such tokens or embeds frames; not both."
            )

    @property
    def head_norm(self) -> norm.Config:
        return norm.Config(self.head, "layer", self.epsilon)

    @property
    def first(self) -> linear.Config:
        """The map of features, where there is one (dense)."""
        return linear.Config(self.inputs, self.width)

    @property
    def normed(self) -> bool:
        return self.norm_kind != "none"

    @property
    def norm(self) -> norm.Config:
        return norm.Config(self.width, self.norm_kind, self.epsilon)

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.width, self.hidden, None, self.activation, self.gated, False)

    @property
    def per_picture(self) -> int:
        return self.latents

    def tokens(self, grid: tuple[int, int, int]) -> int:
        if self.frames and grid[0] > self.frames:
            raise InputError(
                f"A video of {grid[0]} frames is too long for this resampler; sample at most {self.frames}."
            )
        return self.latents


def spec(cfg: Config) -> Spec:
    def project(heads: int) -> Spec:
        kernel = ParamSpec((cfg.width, heads, cfg.head), ("embed", "heads", None), fan_in(cfg.width))
        return {"kernel": kernel} | ({"bias": ParamSpec((heads, cfg.head), ("heads", None))} if cfg.bias else {})

    inner = cfg.heads * cfg.head
    layer = {
        "q": project(cfg.heads),
        "k": project(cfg.kv_heads or cfg.heads),
        "v": project(cfg.kv_heads or cfg.heads),
        "out": {"kernel": ParamSpec((cfg.heads, cfg.head, cfg.width), ("heads", None, "embed"), fan_in(inner))}
        | ({"bias": ParamSpec((cfg.width,), (None,))} if cfg.bias else {}),
    }
    if cfg.normed:
        layer |= {"feature_norm": norm.spec(cfg.norm), "latent_norm": norm.spec(cfg.norm)}
    if cfg.hidden:
        layer |= {"mlp": mlp.spec(cfg.mlp)} | ({"mlp_norm": norm.spec(cfg.norm)} if cfg.normed else {})
    if cfg.qk_norm:
        layer |= {"q_norm": norm.spec(cfg.head_norm), "k_norm": norm.spec(cfg.head_norm)}
    out = {
        "latents": ParamSpec((cfg.latents, cfg.width), (None, "embed"), Normal(1.0)),
        "layers": stack(layer, cfg.layers),
    }
    if cfg.normed:
        out["norm"] = norm.spec(cfg.norm)
    if cfg.projection is not None:
        out["projection"] = mlp.spec(cfg.projection)
    if cfg.dense:
        out["projection"] = linear.spec(cfg.first)
    for name, rows in (("frames", cfg.frames), ("media", cfg.media)):
        if rows:
            out[name] = ParamSpec((rows, cfg.width), (None, "embed"), Normal(1.0))
    return out


def _normed(params: dict, name: str, x: Float[Array, "b m e"], cfg: Config) -> Float[Array, "b m e"]:
    return norm.apply(params[name], x, cfg.norm) if cfg.normed else x


def prepare(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    *,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
    number: Int[Array, "b n"] | None = None,
) -> Float[Array, "b p e"]:
    """The features as the layers look at them: projected, with embeddings of frame and number."""
    if cfg.unit:
        wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        square = jnp.square(wide).sum(-1, keepdims=True)
        features = (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(features.dtype)
    if cfg.projection is not None:
        features = mlp.apply(params["projection"], features, cfg.projection)
    if cfg.dense:
        features = linear.apply(params["projection"], features, cfg.first)
    if cfg.frames:
        of_frame = sharding.take_rows(grid[..., 1] * grid[..., 2], image)
        frame = behind.within(image, order, grid) // jnp.maximum(of_frame, 1)
        features = features + position_embed.learned(params["frames"], frame).astype(features.dtype)
    if cfg.media:
        if number is None:
            raise InputError("This resampler adds an embedding by the picture's number in its document; give `number`.")
        of_patch = jnp.where(order >= 0, sharding.take_rows(number, image), -1)
        features = features + position_embed.learned(params["media"], of_patch).astype(features.dtype)
    return features


def layer(
    params: dict,
    x: Float[Array, "b m e"],
    features: Float[Array, "b p e"],
    cfg: Config,
    *,
    order: Int[Array, "b s"],
    lo: Int[Array, "b m"],
    hi: Int[Array, "b m"],
) -> Float[Array, "b m e"]:
    """One layer's latents from the last one's; order, lo, hi as `behind.labels` gives them."""
    split = ("batch", None, "heads", None)

    def project(name: str, of: Float[Array, "b n e"]) -> Float[Array, "b n h c"]:
        y = sharding.dense(of, params[name]["kernel"], split)
        return linear.plus(y, params[name]["bias"]) if cfg.bias else y

    h = _normed(params, "latent_norm", x, cfg)
    seen = jnp.concatenate([_normed(params, "feature_norm", features, cfg), h], axis=1)
    q, k, v = project("q", h), project("k", seen), project("v", seen)
    if cfg.qk_norm:
        q, k = norm.apply(params["q_norm"], q, cfg.head_norm), norm.apply(params["k_norm"], k, cfg.head_norm)
    with jax.named_scope("look"):
        out, _ = attend(q, k, v, order, lo, hi)
    y = sharding.dense(out, params["out"]["kernel"], ("batch", None, None))
    y = linear.plus(y, params["out"]["bias"]) if cfg.bias else y
    x = x + y if cfg.residual else y
    if cfg.hidden:
        x = x + mlp.apply(params["mlp"], _normed(params, "mlp_norm", x, cfg), cfg.mlp)
    return sharding.constrain(x, ("batch", None, None))


@sharding.whole_rows("features", "image", "order", "grid", "number")
def apply(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    *,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
    number: Int[Array, "b n"] | None = None,
) -> Float[Array, "b m e"]:
    """[B, P, inputs] → [B, M = N × latents, width], picture after picture.

    Args:
      params: as `spec(cfg)`.
      features: of packed pictures.
      cfg: sizes.
      image, order: i32[B, P], the picture of each feature and its label, counted through the row. Where frames have
        embeddings, a video's labels count frame after frame.
      grid: i32[B, N, 3], zeros where there is no picture (its tokens are meaningless: nothing may look at them).
      number: i32[B, N], which picture of its document each is, where cfg.media is set. Numbers and frames past the end
        of their tables make the row NaN (`cfg.tokens` refuses such videos beforehand).

    Raises:
      InputError: `number` is needed and left out.
    """
    features = prepare(params, features, cfg, image=image, order=order, grid=grid, number=number)
    keys, lo, hi = behind.labels(image, order, grid, cfg.latents, cfg.prefix)
    x = behind.start(params["latents"], features, grid.shape[1])

    own = spec(cfg)["layers"]

    def step(x: jax.Array, p: dict) -> tuple[jax.Array, None]:
        p = gradients_laid(p, own)
        return layer(p, x, features, cfg, order=keys, lo=lo, hi=hi), None

    x, _ = jax.lax.scan(step, x, params["layers"])
    return _normed(params, "norm", x, cfg)
