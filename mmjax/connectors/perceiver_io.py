"""Perceiver IO (Jaegle et al. 2021, section 3): a few latents look at any inputs, think, and answer any queries."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mmjax.connectors import Connector, perceiver_layer
from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, gradients_laid, stack
from mmjax.nn import linear, position_embed
from mmjax.sequence import behind


@dataclass(frozen=True)
class Fourier:
    """Position features that inputs get (see position_embed.fourier): (64, (224, 224)) of ImageNet's Perceiver."""

    bands: int
    resolution: tuple[int, ...]
    concat_pos: bool = True
    sine_only: bool = False

    @property
    def width(self) -> int:
        axes = len(self.resolution)
        return axes * self.concat_pos + axes * self.bands * (1 if self.sine_only else 2)


@dataclass(frozen=True)
class Config(Connector):
    """The encoder's cross-attention, `layers` of self-attention run `blocks` times over, the decoder's cross-attention.

    Inputs are features of width encoder.inputs, or

    fourier: of that width less the position features, which are appended. Resolutions of one axis count inputs, of
      two rows and columns, of three frames as well.
    vocab: token ids. positions: rows of the table that is added by an input's number in its example.

    Queries are given by the caller (queries = 0), or learned:

    queries: rows of the table. by_input: each input asks with the row of its number (masked language model); else each
      example asks with all of them (classification: 1).

    Answers have the decoder's width, or

    outputs: the width of a final linear map. tied: scores over the vocabulary by the token table, and a bias.

    decoder: None: the latents are the answer.
    """

    latents: int
    encoder: perceiver_layer.Config
    layer: perceiver_layer.Config
    layers: int
    blocks: int = 1
    decoder: perceiver_layer.Config | None = None
    fourier: Fourier | None = None
    vocab: int = 0
    positions: int = 0
    queries: int = 0
    by_input: bool = False
    outputs: int = 0
    tied: bool = False

    def __post_init__(self):
        width, decoder = self.encoder.width, self.decoder
        if self.encoder.inputs is None or self.layer.inputs is not None or self.layer.width != width:
            raise InputError("The encoder must look at inputs, and its layers at latents of the encoder's width.")
        if decoder is None and (self.queries or self.outputs or self.tied):
            raise InputError("Learned queries, outputs and a tied head belong to a decoder; give one.")
        if decoder is not None and decoder.inputs != width:
            raise InputError(f"The decoder looks at inputs of width {decoder.inputs}, but latents have {width}.")
        if self.tied and not (self.vocab and decoder.width == self.encoder.inputs and not self.outputs):
            raise InputError("A tied head needs token ids as inputs, a decoder as wide as they are, and no outputs.")
        if self.by_input and not self.queries:
            raise InputError("Inputs can only ask with learned queries; say how many there are.")

    @property
    def per_picture(self) -> int:
        return self.latents if self.decoder is None else self.queries

    @property
    def alone(self) -> bool:
        return self.vocab > 0 or self.by_input or (self.decoder is not None and not self.queries)

    def tokens(self, grid: tuple[int, int, int]) -> int:
        if self.decoder is None:
            return self.latents
        if not self.queries:
            raise InputError("How many answers this Perceiver gives depends on the queries that its caller gives it.")
        return grid[0] * grid[1] * grid[2] if self.by_input else self.queries

    @property
    def out(self) -> linear.Config:
        return linear.Config(self.decoder.width, self.outputs)


def spec(cfg: Config) -> Spec:
    # Deviation 0.02 of learned vectors, as transformers'.
    out = {
        "latents": ParamSpec((cfg.latents, cfg.encoder.width), (None, "embed"), Normal(0.02)),
        "encoder": perceiver_layer.spec(cfg.encoder),
        "layers": stack(perceiver_layer.spec(cfg.layer), cfg.layers),
    }
    if cfg.vocab:
        out["embed"] = ParamSpec((cfg.vocab, cfg.encoder.inputs), ("vocab", "embed"), Normal(0.02))
    if cfg.positions:
        out["positions"] = ParamSpec((cfg.positions, cfg.encoder.inputs), (None, "embed"), Normal(0.02))
    if cfg.decoder is not None:
        out["decoder"] = perceiver_layer.spec(cfg.decoder)
    if cfg.queries:
        out["queries"] = ParamSpec((cfg.queries, cfg.decoder.width), (None, "embed"), Normal(0.02))
    if cfg.outputs:
        out["out"] = linear.spec(cfg.out)
    if cfg.tied:
        out["head_bias"] = ParamSpec((cfg.vocab,), ("vocab",))
    return out


def prepare(
    params: dict,
    x: Num[Array, "b l ..."],
    cfg: Config,
    *,
    image: Int[Array, "b l"],
    order: Int[Array, "b l"],
    grid: Int[Array, "b n 3"],
) -> Float[Array, "b l e"]:
    """The inputs as the encoder looks at them: token vectors, positions added, position features appended."""
    place = behind.within(image, order, grid)
    if cfg.vocab:
        x = sharding.take(params["embed"], x, ("batch", None, None))
    if cfg.positions:
        x = x + position_embed.learned(params["positions"], place)
    if cfg.fourier is None:
        return x
    sizes = sharding.take_rows(jnp.maximum(grid, 1), image)
    rows, columns = jnp.maximum(sizes[..., 1], 1), jnp.maximum(sizes[..., 2], 1)
    axes = len(cfg.fourier.resolution)
    if axes == 1:
        at, sizes = place[..., None], sizes.prod(-1, keepdims=True)
    else:
        at = jnp.stack([place // (rows * columns), place // columns % rows, place % columns][-axes:], -1)
    at = position_embed.centred(at, sizes[..., -axes:])
    some = (cfg.fourier.bands, cfg.fourier.resolution)
    options = {"concat_pos": cfg.fourier.concat_pos, "sine_only": cfg.fourier.sine_only}
    return jnp.concatenate([x, position_embed.fourier(at, *some, **options).astype(x.dtype)], -1)


def encode(
    params: dict,
    x: Num[Array, "b l ..."],
    cfg: Config,
    *,
    image: Int[Array, "b l"],
    order: Int[Array, "b l"],
    grid: Int[Array, "b n 3"],
) -> Float[Array, "b m d"]:
    """Inputs as `apply` takes them → latents [B, M = N × latents, width], example after example."""
    x = prepare(params, x, cfg, image=image, order=order, grid=grid)
    keys, lo, hi = behind.labels(image, order, grid, cfg.latents)
    of_inputs, own = keys[:, : x.shape[1]], keys[:, x.shape[1] :]
    z = behind.start(params["latents"], x, grid.shape[1])
    z = perceiver_layer.apply(params["encoder"], z, cfg.encoder, order=of_inputs, lo=lo, hi=hi, inputs=x)

    of_layer = perceiver_layer.spec(cfg.layer)

    def step(z: jax.Array, p: dict) -> tuple[jax.Array, None]:
        p = gradients_laid(p, of_layer)
        return perceiver_layer.apply(p, z, cfg.layer, order=own, lo=lo, hi=hi), None

    def block(z: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(step, z, params["layers"])

    return jax.lax.scan(block, z, None, length=cfg.blocks)[0]


def decode(
    params: dict,
    z: Float[Array, "b m d"],
    queries: Float[Array, "b q e"],
    cfg: Config,
    *,
    image: Int[Array, "b q"],
    grid: Int[Array, "b n 3"],
) -> Float[Array, "b q outputs"]:
    """What the latents answer.

    Args:
      params: as `spec(cfg)`.
      z: as `encode` returns them.
      queries: [B, Q, decoder.width], in any order; they do not see each other.
      cfg: sizes.
      image: i32[B, Q], the example that each query asks, -1 for none (its answer means nothing).
      grid: i32[B, N, 3].
    """
    own = jnp.where(behind.present(grid, cfg.latents), jnp.arange(z.shape[1], dtype=jnp.int32)[None], -1)
    lo = jnp.maximum(image, 0) * cfg.latents
    hi = jnp.where(image >= 0, lo + cfg.latents - 1, -1)
    y = perceiver_layer.apply(params["decoder"], queries, cfg.decoder, order=own, lo=lo, hi=hi, inputs=z)
    if cfg.outputs:
        return linear.apply(params["out"], y, cfg.out)
    if cfg.tied:
        bias = sharding.constrain(params["head_bias"], ("vocab",))
        return sharding.dense(y, params["embed"].T, ("batch", None, "vocab"), wide=True) + bias[None, None]
    return y


@sharding.whole_rows("x", "image", "order", "grid", "queries")
def apply(
    params: dict,
    x: Num[Array, "b l ..."],
    cfg: Config,
    *,
    image: Int[Array, "b l"],
    order: Int[Array, "b l"],
    grid: Int[Array, "b n 3"],
    queries: tuple[Float[Array, "b q e"], Int[Array, "b q"]] | None = None,
) -> Float[Array, "b a outputs"]:
    """What each example's latents answer: to each of its queries, or themselves where cfg has no decoder.

    Args:
      params: as `spec(cfg)`.
      x: features [B, L, inputs] or token ids i32[B, L] of packed examples: pictures, clips, texts.
      cfg: sizes.
      image, order: i32[B, L], the example of each input, -1 for none, and its label, counted through the row (rows of a
        picture one after the other).
      grid: i32[B, N, 3], (frames, rows, columns) of each example, (1, 1, tokens) of a text, zeros where there is none.
      queries: [B, Q, decoder.width] and i32[B, Q], the example each asks (-1: none), where cfg.queries is 0.

    Returns:
      [B, Q, outputs]; by_input: [B, L, outputs]; other learned queries: [B, N × queries, outputs], example after
      example; no decoder: [B, N × latents, width].

    Raises:
      InputError: queries are needed and left out, or the other way round.
    """
    if (queries is None) != (cfg.decoder is None or cfg.queries > 0):
        raise InputError("Queries must be given where there is a decoder and none are learned, and only there.")
    z = encode(params, x, cfg, image=image, order=order, grid=grid)
    if cfg.decoder is None:
        return z
    if cfg.by_input:
        asks = position_embed.learned(params["queries"], behind.within(image, order, grid))
        queries = asks.astype(z.dtype), image
    elif queries is None:
        asked = jnp.where(grid.prod(-1) > 0, jnp.arange(grid.shape[1], dtype=jnp.int32)[None], -1)
        queries = behind.start(params["queries"], z, grid.shape[1]), jnp.repeat(asked, cfg.queries, axis=1)
    return decode(params, z, queries[0], cfg, image=queries[1], grid=grid)
