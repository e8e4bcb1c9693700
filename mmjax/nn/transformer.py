"""A pre-norm transformer: equal blocks, stacked and scanned. Encoders and decoders differ in their intervals alone."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, fan_in, stack
from mmjax.nn import mlp, norm
from mmjax.nn import rope as rotary
from mmjax.nn.attention import attend

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class Config:
    """Sizes and variants of every block.

    rope: the rotary embedding of queries and keys, if any.
    windowed: the blocks, counted from 0, that use the second intervals (Qwen2.5-VL's window attention).
    remat: what the backward pass recomputes: nothing, all but matrix products, everything.
    unroll: scanned layers per loop turn (CPU gains about a tenth from unrolling all, compile time grows with it).
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    activation: Literal["gelu", "gelu_tanh", "silu"] = "silu"
    gated: bool = True
    bias: bool = False
    norm_kind: Literal["layer", "rms"] = "rms"
    epsilon: float = 1e-6
    qk_norm: bool = False
    rope: rotary.Config | None = None
    windowed: tuple[int, ...] = ()
    remat: Literal["none", "dots", "full"] = "none"
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

    @property
    def head_norm(self) -> norm.Config:
        return norm.Config(self.head, "rms", self.epsilon)

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.width, self.hidden, None, self.activation, self.gated, self.bias)


def spec(cfg: Config) -> Spec:
    """The blocks' parameters, stacked along a leading `layers` axis."""

    def project(heads: int) -> Spec:
        out = {"kernel": ParamSpec((cfg.width, heads, cfg.head), ("embed", "heads", None), fan_in(cfg.width))}
        return out | ({"bias": ParamSpec((heads, cfg.head), ("heads", None))} if cfg.bias else {})

    # Residual branches start smaller the deeper the stack (GPT-2): the sum of 2 × layers of them keeps its size.
    back = Normal((cfg.heads * cfg.head) ** -0.5 * (2 * cfg.layers) ** -0.5)
    attention = {
        "q": project(cfg.heads),
        "k": project(cfg.kv_heads),
        "v": project(cfg.kv_heads),
        "out": {"kernel": ParamSpec((cfg.heads, cfg.head, cfg.width), ("heads", None, "embed"), back)}
        | ({"bias": ParamSpec((cfg.width,), (None,))} if cfg.bias else {}),
    }
    if cfg.qk_norm:
        attention |= {"q_norm": norm.spec(cfg.head_norm), "k_norm": norm.spec(cfg.head_norm)}
    block = {
        "attention_norm": norm.spec(cfg.norm_config),
        "attention": attention,
        "mlp_norm": norm.spec(cfg.norm_config),
        "mlp": mlp.spec(cfg.mlp),
    }
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
    if (window is None) != (not cfg.windowed):
        raise InputError("Windowed blocks and window intervals go together; give both or neither.")
    turn = None if cfg.rope is None else rotary.angles(position, cfg.rope, length)

    def block(x: jax.Array, of: tuple[dict, Any]) -> tuple[jax.Array, None]:
        layer, inside = of
        h = norm.apply(layer["attention_norm"], x, cfg.norm_config)
        sees = (lo, hi) if window is None else [jnp.where(inside, w, a) for w, a in zip(window, (lo, hi), strict=True)]
        x = x + _attention(layer["attention"], h, cfg, order, *sees, turn)
        h = norm.apply(layer["mlp_norm"], x, cfg.norm_config)
        return sharding.constrain(x + mlp.apply(layer["mlp"], h, cfg.mlp), ("batch", None, None)), None

    if cfg.remat != "none":
        block = jax.checkpoint(block, policy=REMAT[cfg.remat], prevent_cse=False)
    inside = jnp.array([i in cfg.windowed for i in range(cfg.layers)]) if cfg.windowed else None
    return jax.lax.scan(block, x, (params, inside), unroll=min(cfg.unroll, cfg.layers))[0]


def _attention(params: dict, x: jax.Array, cfg: Config, order, lo, hi, turn) -> jax.Array:
    split = ("batch", None, "heads", None)

    def project(name: str) -> jax.Array:
        y = sharding.dense(x, params[name]["kernel"], split)
        return y + params[name]["bias"][None, None] if cfg.bias else y

    q, k, v = project("q"), project("k"), project("v")
    if cfg.qk_norm:
        q = norm.apply(params["q_norm"], q, cfg.head_norm)
        k = norm.apply(params["k_norm"], k, cfg.head_norm)
    if turn is not None:
        q, k = (rotary.rotate(x, *turn, cfg.rope.pairs) for x in (q, k))
    out, _ = attend(q, k, v, order, lo, hi)
    y = sharding.dense(out, params["out"]["kernel"], ("batch", None, None))
    return y + params["out"]["bias"][None, None] if cfg.bias else y
