"""A pre-norm transformer: equal blocks, stacked and scanned. Encoders and decoders differ in their intervals alone."""

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Constant, Normal, ParamSpec, Spec, fan_in, gradients_laid, stack
from mmjax.nn import linear, mlp, norm, ring
from mmjax.nn import rope as rotary
from mmjax.nn.attention import RESULTS, attend, context, goes_round

Remat = Literal["none", "dots", "attention", "dots_attention", "full"]

_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_ATTENTION = jax.checkpoint_policies.save_only_these_names(*RESULTS)
# What the backward pass finds ready of a block, besides its input. The rest it computes again.
REMAT: dict[str, Any] = {
    "none": None,  # everything: the most memory, nothing is computed twice
    "dots": _DOTS,  # products with parameters; attention runs again, norms and activations too
    "attention": _ATTENTION,  # attention's results; products with parameters run again
    "dots_attention": jax.checkpoint_policies.save_from_both_policies(_DOTS, _ATTENTION),  # both; the cheap rest again
    "full": jax.checkpoint_policies.nothing_saveable,  # nothing: the least memory, a third more products
}

PLACE = ("batch", "length", None)  # the logical axes of what goes from block to block


@dataclass(frozen=True)
class Config:
    """Sizes and variants of every block.

    qkv_bias, out_bias: where attention's projections differ from `bias`, which is then the MLP's alone.
    qk_norm: RMSNorm of queries and keys, of each head (Qwen3) or of all heads as one vector (InternViT-6B).
    qk_epsilon: its epsilon, where it is not `epsilon`.
    layer_scale: both branches times a vector that starts at this value (Touvron et al. 2021, CaiT, eq. 4; DINOv2).
    rope: the rotary embedding of queries and keys, if any.
    windowed: the blocks, counted from 0, that use the second intervals (Qwen2.5-VL's window attention).
    remat: what the backward pass keeps of each block, see REMAT: everything ("none"), products with parameters
      ("dots"), attention's results ("attention"), both, or nothing ("full").
    unroll: scanned layers per loop turn. On CPU small models gain about a tenth from unrolling all; wide ones lose more
      (ViT-B/16: XLA's concatenation of the gradients alone is a fifth of the step). Compile time grows with it.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    activation: mlp.Activation = "silu"
    gated: bool = True
    bias: bool = False
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    norm_kind: Literal["layer", "rms"] = "rms"
    epsilon: float = 1e-6
    qk_norm: Literal["none", "head", "width"] = "none"
    qk_epsilon: float | None = None
    layer_scale: float | None = None
    rope: rotary.Config | None = None
    windowed: tuple[int, ...] = ()
    remat: Remat = "none"
    unroll: int = 1

    def __post_init__(self):
        if self.rope is not None and self.rope.head != self.head:
            raise InputError(
                f"The rotary embedding is for heads of {self.rope.head} values, but these have {self.head}."
            )
        if not all(0 <= i < self.layers for i in self.windowed):
            raise InputError(f"Blocks {self.windowed} are to be windowed, but there are only {self.layers}.")

    @property
    def norm_config(self) -> norm.Config:
        return norm.Config(self.width, self.norm_kind, self.epsilon)

    def head_norm(self, heads: int) -> norm.Config:
        """The norm of queries or keys that have so many heads."""
        width = self.head * (heads if self.qk_norm == "width" else 1)
        return norm.Config(width, "rms", self.epsilon if self.qk_epsilon is None else self.qk_epsilon)

    def has_bias(self, name: str) -> bool:
        """Whether the projection q, k, v or out has one."""
        own = self.out_bias if name == "out" else self.qkv_bias
        return self.bias if own is None else own

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.width, self.hidden, None, self.activation, self.gated, self.bias)


def spec(cfg: Config) -> Spec:
    """The blocks' parameters, stacked along a leading `layers` axis."""

    def project(heads: int) -> Spec:
        out = {"kernel": ParamSpec((cfg.width, heads, cfg.head), ("embed", "heads", None), fan_in(cfg.width))}
        return out | ({"bias": ParamSpec((heads, cfg.head), ("heads", None))} if cfg.has_bias("q") else {})

    # Residual branches start smaller the deeper the stack (GPT-2): the sum of 2 × layers of them keeps its size.
    back = Normal((cfg.heads * cfg.head) ** -0.5 * (2 * cfg.layers) ** -0.5)
    attention = {
        "q": project(cfg.heads),
        "k": project(cfg.kv_heads),
        "v": project(cfg.kv_heads),
        "out": {"kernel": ParamSpec((cfg.heads, cfg.head, cfg.width), ("heads", None, "embed"), back)}
        | ({"bias": ParamSpec((cfg.width,), (None,))} if cfg.has_bias("out") else {}),
    }
    if cfg.qk_norm != "none":
        attention |= {"q_norm": norm.spec(cfg.head_norm(cfg.heads)), "k_norm": norm.spec(cfg.head_norm(cfg.kv_heads))}
    block = {
        "attention_norm": norm.spec(cfg.norm_config),
        "attention": attention,
        "mlp_norm": norm.spec(cfg.norm_config),
        "mlp": mlp.spec(cfg.mlp),
    }
    if cfg.layer_scale is not None:
        scale = ParamSpec((cfg.width,), (None,), Constant(cfg.layer_scale))
        block |= {"attention_scale": scale, "mlp_scale": scale}
    return stack(block, cfg.layers)


def apply(
    params: dict,
    x: Float[Array, "b l d"],
    cfg: Config,
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    position: Num[Array, "b l axes"] | None = None,
    length: Num[Array, "b l"] | None = None,
    window: tuple[Int[Array, "b l"], Int[Array, "b l"]] | None = None,
) -> Float[Array, "b l d"]:
    """All blocks in turn (no final norm).

    Args:
      params: as `spec(cfg)`.
      x: [B, L, D].
      order, lo, hi: who sees whom (see nn.attention).
      position: [B, L, axes], needed where cfg has a rotary embedding.
      length: [B, L], needed where its scaling depends on the document's length (see nn.rope).
      window: lo and hi of the blocks that cfg.windowed names.
    """
    see = {"order": order, "lo": lo, "hi": hi, "position": position, "length": length, "window": window}
    return apply_with_taps(params, x, cfg, (), **see)[0]


def apply_with_taps(
    params: dict,
    x: Float[Array, "b l d"],
    cfg: Config,
    taps: tuple[int, ...],
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    position: Num[Array, "b l axes"] | None = None,
    length: Num[Array, "b l"] | None = None,
    window: tuple[Int[Array, "b l"], Int[Array, "b l"]] | None = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "taps b l d"]]:
    """The same, and what the blocks named in `taps` put out, in rising order: block 0 is the first.

    Memory for the named ones alone: they are written down as the scan passes.

    Raises:
      InputError: taps that do not rise, or that name no block.
    """
    if (window is None) != (not cfg.windowed):
        raise InputError("Windowed blocks and window intervals go together; give both or neither.")
    if list(taps) != sorted(set(taps)) or not all(0 <= i < cfg.layers for i in taps):
        raise InputError(f"Taps {taps} must rise and name blocks from 0 to {cfg.layers - 1}.")
    count = x.shape[1]
    room = -count % sharding.parts("length")
    if room:
        # Rows that devices cannot share evenly get empty places at the end, which nothing sees.
        x, lo, position, length = _with_room((x, lo, position, length), room, 0)
        order, hi = _with_room((order, hi), room, -1)
        window = None if window is None else (_with_room(window[0], room, 0), _with_room(window[1], room, -1))
    x, kept = _dealt_blocks(params, x, cfg, taps, (order, lo, hi, position, length, window))
    if room:
        x = sharding.unsplit(x)[:, :count]
        kept = sharding.constrain(kept, (None, "batch", None, None))[:, :, :count]
    return x, kept


def _dealt_blocks(params: dict, x: jax.Array, cfg: Config, taps: tuple[int, ...], places: tuple) -> tuple:
    """The same as _blocks, of rows that are dealt meanwhile where keys and values go round the devices."""
    dealt = goes_round(*x.shape[:2], x.shape[1], cfg.kv_heads, 2 * cfg.head * x.dtype.itemsize)
    if dealt:
        x, places = ring.deal((x, places))
    order, lo, hi, position, length, window = places
    turn = None if cfg.rope is None else rotary.angles(position, cfg.rope, length)
    with context("dealt") if dealt else contextlib.nullcontext():
        # Labels are gathered once, not in every block.
        whole = sharding.unsplit(order)
        x, kept = _blocks(params, sharding.constrain(x, PLACE), cfg, taps, whole, (lo, hi), window, turn)
    return (ring.undeal(x), ring.undeal(kept, axis=2)) if dealt else (x, kept)


def _with_room(tree: Any, room: int, fill: int) -> Any:
    """Arrays [B, L, …] with so many places more at the end of every row."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, room)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)

    return jax.tree.map(one, sharding.unsplit(tree))


def _blocks(
    params: dict,
    x: jax.Array,
    cfg: Config,
    taps: tuple[int, ...],
    order: jax.Array,
    sees: tuple,
    window: Any,
    turn: Any,
) -> tuple[jax.Array, jax.Array]:
    """What all blocks put out, and those named in `taps`."""

    def block(x: jax.Array, layer: dict, inside: Any) -> jax.Array:
        h = norm.apply(layer["attention_norm"], x, cfg.norm_config)
        lo, hi = sees if window is None else (jnp.where(inside, w, a) for w, a in zip(window, sees, strict=True))
        h = _attention(layer["attention"], h, cfg, order, lo, hi, turn)
        x = x + _scaled(h, layer.get("attention_scale"))
        h = mlp.apply(layer["mlp"], norm.apply(layer["mlp_norm"], x, cfg.norm_config), cfg.mlp)
        return sharding.constrain(x + _scaled(h, layer.get("mlp_scale")), PLACE)

    if cfg.remat != "none":
        block = jax.checkpoint(block, policy=REMAT[cfg.remat], prevent_cse=False)

    def step(carry: tuple[jax.Array, Any], of: tuple[dict, Any, Any]) -> tuple[tuple[jax.Array, Any], None]:
        (x, kept), (layer, inside, place) = carry, of
        layer = gradients_laid(layer, own)
        x = block(x, layer, inside)
        # Blocks that nobody asked for write to one more place, past the end.
        kept = None if kept is None else jax.lax.dynamic_update_index_in_dim(kept, x, place, 0)
        return (x, kept), None

    own = spec(cfg)
    inside = jnp.array([i in cfg.windowed for i in range(cfg.layers)]) if cfg.windowed else None
    kept = place = None
    if taps:
        place = jnp.array([taps.index(i) if i in taps else len(taps) for i in range(cfg.layers)], jnp.int32)
        kept = jnp.repeat(jnp.zeros_like(x)[None], len(taps) + 1, axis=0)
        kept = sharding.constrain(sharding.vary(kept, x), (None, *PLACE))
    (x, kept), _ = jax.lax.scan(step, (x, kept), (params, inside, place), unroll=min(cfg.unroll, cfg.layers))
    return x, jnp.zeros((0, *x.shape), x.dtype) if kept is None else kept[:-1]


def _scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    return x if scale is None else linear.times(x, scale)


def _attention(params: dict, x: jax.Array, cfg: Config, order, lo, hi, turn) -> jax.Array:
    split = ("batch", "length", "heads", None)

    def project(name: str) -> jax.Array:
        y = sharding.dense(x, params[name]["kernel"], split)
        return linear.plus(y, params[name]["bias"]) if cfg.has_bias(name) else y

    def normed(name: str, y: jax.Array) -> jax.Array:
        heads = y.shape[2]
        flat = y.reshape(*y.shape[:2], -1) if cfg.qk_norm == "width" else y
        return norm.apply(params[f"{name}_norm"], flat, cfg.head_norm(heads)).reshape(y.shape)

    q, k, v = project("q"), project("k"), project("v")
    if cfg.qk_norm != "none":
        q, k = normed("q", q), normed("k", k)
    if turn is not None:
        q, k = (rotary.rotate(x, *turn, cfg.rope.pairs) for x in (q, k))
    with jax.named_scope("attention"):
        out, _ = attend(q, k, v, order, lo, hi)
    y = sharding.dense(out, params["out"]["kernel"], PLACE)
    return linear.plus(y, params["out"]["bias"]) if cfg.has_bias("out") else y
