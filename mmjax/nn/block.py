"""One pre-norm transformer block: attention and MLP, each added to what came in."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Constant, Normal, ParamSpec, Spec, fan_in
from mmjax.nn import cache as caches
from mmjax.nn import linear, mlp, norm
from mmjax.nn import relative as distances
from mmjax.nn import rope as rotary
from mmjax.nn.attention import attend, attend_cached

Remat = Literal["none", "dots", "attention", "dots_attention", "full"]

PLACE = ("batch", "length", None)  # the logical axes of what goes from block to block


class See(NamedTuple):
    """Who sees whom in a block, and by which angles queries and keys turn."""

    order: Any  # i32[B, S], of keys
    lo: Any  # i32[B, L], of queries
    hi: Any
    turn: Any  # cosine and sine f32[B, L, pairs]; None without a rotary embedding
    bias: Any = None  # of the scores (nn.attention.Bias)
    look: Any = None  # what there is to look at (Look)


class Look(NamedTuple):
    """What the cross-attention inside a block looks at (Config.look): tokens, or the keys and values made of them.

    tokens: [B, M, E]. k, v: [B, K, M, E] of this block, which stand in a cache. order: i32[B, M]. lo, hi: i32[B, L].
    """

    tokens: Any
    order: Any
    lo: Any
    hi: Any
    k: Any = None
    v: Any = None


@dataclass(frozen=True)
class Config:
    """Sizes and variants of every block.

    qkv_bias, out_bias: where attention's projections differ from `bias`, which is then the MLP's alone.
    qk_norm: RMSNorm of queries and keys, of each head (Qwen3) or of all heads as one vector (InternViT-6B).
    qk_epsilon: its epsilon, where it is not `epsilon`.
    layer_scale: both branches times a vector that starts at this value (Touvron et al. 2021, CaiT, eq. 4; DINOv2).
    gate: both branches times tanh of a learnt number, one for each, that starts here (Mllama's global encoder).
    norm_offset: what scales of norms are counted from (Gemma: 1).
    post_norm: whether a norm stands after each branch as well, before it is added (Gemma 2 and 3).
    inner_norm: whether a norm stands before the last map of each branch (Sub-LN: Wang et al. 2022, MAGNETO, section 2).
    query_scale: what scores are multiplied by; 1 / sqrt(head) where left out.
    softcap: scores become softcap · tanh(score / softcap) (Gemma 2).
    rope: the rotary embedding of queries and keys, if any.
    relative: relative positions, as a bias of the scores that all blocks share (T5); its table is handed over.
    look: width of the tokens that every block looks at by cross-attention, between its attention and its MLP, as the
      decoder of an encoder–decoder does (Vaswani et al. 2017, figure 1); None: it does not.
    windowed: the blocks, counted from 0, that use the second intervals (Qwen2.5-VL's window attention; the sliding
      windows of Mistral and Gemma).
    window_rope: the rotary embedding of these blocks, where it is another (Gemma 3).
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
    gate: float | None = None
    norm_offset: float = 0.0
    post_norm: bool = False
    inner_norm: bool = False
    query_scale: float | None = None
    softcap: float | None = None
    rope: rotary.Config | None = None
    relative: distances.Config | None = None
    look: int | None = None
    windowed: tuple[int, ...] = ()
    window_rope: rotary.Config | None = None
    remat: Remat = "none"
    unroll: int = 1

    def __post_init__(self):
        for rope in (self.rope, self.window_rope):
            if rope is not None and rope.head != self.head:
                raise InputError(
                    f"The rotary embedding is for heads of {rope.head} values, but these have {self.head}."
                )
        if self.window_rope is not None and (self.rope is None or not self.windowed):
            raise InputError("A rotary embedding of windowed blocks needs such blocks and one of the others.")
        if self.relative is not None and (self.relative.heads != self.heads or self.windowed):
            raise InputError("Relative positions are for as many heads as the blocks have, none of them windowed.")
        if not all(0 <= i < self.layers for i in self.windowed):
            raise InputError(f"Blocks {self.windowed} are to be windowed, but there are only {self.layers}.")
        plain = {"qk_norm": "none", "inner_norm": False, "post_norm": False}
        plain |= dict.fromkeys(("softcap", "layer_scale", "gate"))
        others = [name for name, none in plain.items() if getattr(self, name) != none]
        if self.look is not None and others:
            raise InputError(f"Cross-attention inside of blocks has no {' or '.join(others)}; leave it or `look` out.")

    @property
    def norm_config(self) -> norm.Config:
        return norm.Config(self.width, self.norm_kind, self.epsilon, self.norm_offset)

    def head_norm(self, heads: int) -> norm.Config:
        """The norm of queries or keys that have so many heads."""
        width = self.head * (heads if self.qk_norm == "width" else 1)
        epsilon = self.epsilon if self.qk_epsilon is None else self.qk_epsilon
        return norm.Config(width, "rms", epsilon, self.norm_offset)

    def has_bias(self, name: str) -> bool:
        """Whether the projection q, k, v or out has one."""
        own = self.out_bias if name == "out" else self.qkv_bias
        return self.bias if own is None else own

    @property
    def mlp(self) -> mlp.Config:
        inner = norm.Config(self.hidden, self.norm_kind, self.epsilon, self.norm_offset) if self.inner_norm else None
        return mlp.Config(self.width, self.hidden, None, self.activation, self.gated, self.bias, inner)

    @property
    def attended_norm(self) -> norm.Config:
        """The norm of what attention puts together, all heads as one vector, where there is one (inner_norm)."""
        return norm.Config(self.heads * self.head, self.norm_kind, self.epsilon, self.norm_offset)


def spec(cfg: Config) -> Spec:
    """The parameters of one block."""

    def project(heads: int, inputs: int) -> Spec:
        out = {"kernel": ParamSpec((inputs, heads, cfg.head), ("embed", "heads", None), fan_in(inputs))}
        return out | ({"bias": ParamSpec((heads, cfg.head), ("heads", None))} if cfg.has_bias("q") else {})

    # Residual branches start smaller the deeper the stack (GPT-2): the sum of 2 × layers of them keeps its size.
    back = Normal((cfg.heads * cfg.head) ** -0.5 * (2 * cfg.layers) ** -0.5)

    def projections(inputs: int) -> Spec:
        return {
            "q": project(cfg.heads, cfg.width),
            "k": project(cfg.kv_heads, inputs),
            "v": project(cfg.kv_heads, inputs),
            "out": {"kernel": ParamSpec((cfg.heads, cfg.head, cfg.width), ("heads", None, "embed"), back)}
            | ({"bias": ParamSpec((cfg.width,), (None,))} if cfg.has_bias("out") else {}),
        }

    attention = projections(cfg.width)
    if cfg.qk_norm != "none":
        attention |= {"q_norm": norm.spec(cfg.head_norm(cfg.heads)), "k_norm": norm.spec(cfg.head_norm(cfg.kv_heads))}
    if cfg.inner_norm:
        attention["inner_norm"] = norm.spec(cfg.attended_norm)
    block = {
        "attention_norm": norm.spec(cfg.norm_config),
        "attention": attention,
        "mlp_norm": norm.spec(cfg.norm_config),
        "mlp": mlp.spec(cfg.mlp),
    }
    if cfg.look is not None:
        block |= {"look_norm": norm.spec(cfg.norm_config), "look": projections(cfg.look)}
    if cfg.post_norm:
        block |= {"attention_post_norm": norm.spec(cfg.norm_config), "mlp_post_norm": norm.spec(cfg.norm_config)}
    if cfg.layer_scale is not None:
        scale = ParamSpec((cfg.width,), (None,), Constant(cfg.layer_scale))
        block |= {"attention_scale": scale, "mlp_scale": scale}
    if cfg.gate is not None:
        gate = ParamSpec((1,), (None,), Constant(cfg.gate))
        block |= {"attention_gate": gate, "mlp_gate": gate}
    return block


def apply(
    params: dict, x: Float[Array, "b l d"], cfg: Config, see: See, past: caches.Past | None = None
) -> tuple[Float[Array, "b l d"], caches.Past | None]:
    """[B, L, D] → the same, and the cache with the tokens' keys and values in it, where there is one.

    With a cache, `see.order` are the labels of its places, these tokens' included.
    """
    h, past = _attention(params["attention"], norm.apply(params["attention_norm"], x, cfg.norm_config), cfg, see, past)
    x = x + _branch(params, "attention", h, cfg)
    if cfg.look is not None:
        x = x + _looked(params["look"], norm.apply(params["look_norm"], x, cfg.norm_config), cfg, see.look)
    h = mlp.apply(params["mlp"], norm.apply(params["mlp_norm"], x, cfg.norm_config), cfg.mlp)
    return sharding.constrain(x + _branch(params, "mlp", h, cfg), PLACE), past


def _branch(params: dict, name: str, h: jax.Array, cfg: Config) -> jax.Array:
    """What a branch adds."""
    if cfg.post_norm:
        h = norm.apply(params[f"{name}_post_norm"], h, cfg.norm_config)
    if cfg.layer_scale is not None:
        h = linear.times(h, params[f"{name}_scale"])
    return h if cfg.gate is None else linear.times(h, jnp.tanh(params[f"{name}_gate"]))


def _attention(
    params: dict, x: jax.Array, cfg: Config, see: See, past: caches.Past | None
) -> tuple[jax.Array, caches.Past | None]:
    def normed(name: str, y: jax.Array) -> jax.Array:
        heads = y.shape[2]
        flat = y.reshape(*y.shape[:2], -1) if cfg.qk_norm == "width" else y
        return norm.apply(params[f"{name}_norm"], flat, cfg.head_norm(heads)).reshape(y.shape)

    q, k, v = (_project(params, name, x, cfg) for name in ("q", "k", "v"))
    if cfg.qk_norm != "none":
        q, k = normed("q", q), normed("k", k)
    if see.turn is not None:
        q, k = (rotary.rotate(x, *see.turn, cfg.rope.pairs) for x in (q, k))
    how = {"bias": see.bias, "softcap": cfg.softcap, "scale": cfg.query_scale}
    with jax.named_scope("attention"):
        if past is None:
            out, _ = attend(q, k, v, see.order, see.lo, see.hi, **how)
        else:
            past = caches.put(past, k, v)
            out = attend_cached(q, *caches.layer(past), see.order, see.lo, see.hi, **how)
    if cfg.inner_norm:
        flat = out.reshape(*out.shape[:2], -1)
        out = norm.apply(params["inner_norm"], flat, cfg.attended_norm).reshape(out.shape)
    return _back(params, out, cfg), past


def _project(params: dict, name: str, x: jax.Array, cfg: Config) -> jax.Array:
    """Queries, keys or values [B, L, H, E]."""
    y = sharding.dense(x, params[name]["kernel"], ("batch", "length", "heads", None))
    return linear.plus(y, params[name]["bias"]) if cfg.has_bias(name) else y


def _back(params: dict, out: jax.Array, cfg: Config) -> jax.Array:
    y = sharding.dense(out, params["out"]["kernel"], PLACE)
    return linear.plus(y, params["out"]["bias"]) if cfg.has_bias("out") else y


def _looked(params: dict, x: jax.Array, cfg: Config, look: Look) -> jax.Array:
    """Cross-attention to the tokens of a Look, or to the keys and values that were made of them before."""
    q, how = _project(params, "q", x, cfg), {"scale": cfg.query_scale}
    with jax.named_scope("look"):
        if look.k is not None:
            out = attend_cached(q, look.k, look.v, look.order, look.lo, look.hi, **how)
        else:
            k, v = (_project(params, name, look.tokens, cfg) for name in ("k", "v"))
            out, _ = attend(q, k, v, look.order, look.lo, look.hi, **how)
    return _back(params, out, cfg)


def keys(params: dict, tokens: Float[Array, "b m e"], cfg: Config) -> tuple[jax.Array, jax.Array]:
    """The keys and values [B, K, M, E] that this block makes of what it looks at, as a cache has them."""
    k, v = (_project(params["look"], name, tokens, cfg).transpose(0, 2, 1, 3) for name in ("k", "v"))
    return sharding.constrain(k, caches.AXES), sharding.constrain(v, caches.AXES)
