"""Two towers and one space: CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.core.spec import Constant, ParamSpec, Spec
from mmjax.encoders import text, vit


@dataclass(frozen=True)
class Config:
    """bias: logits have a learned bias besides the scale (SigLIP, eq. 1). The vision tower needs a head."""

    vision: vit.Config
    text: text.Config
    bias: bool = False


def spec(cfg: Config) -> Spec:
    # Both published starts: a temperature of 0.07 (CLIP), or 10 and -10 (SigLIP, section 3.2).
    scale = 2.302585092994046 if cfg.bias else 2.6592600369327783
    out = {
        "vision": vit.spec(cfg.vision),
        "text": text.spec(cfg.text),
        "scale": ParamSpec((1,), (None,), Constant(scale)),
    }
    return out | ({"bias": ParamSpec((1,), (None,), Constant(-10.0))} if cfg.bias else {})


def unit(x: Float[Array, "... e"]) -> Float[Array, "... e"]:
    """Vectors of length 1; a vector of zeros stays one."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x.astype(jnp.float32)).sum(-1, keepdims=True), 1e-30)).astype(
        x.dtype
    )


def apply(params: dict, images: Float[Array, "i e"], texts: Float[Array, "t e"], cfg: Config) -> Float[Array, "i t"]:
    """f32 logits of every picture with every text, from the towers' vectors (vit.encode's `pooled`, text.pool)."""
    alike = jnp.matmul(unit(images), unit(texts).T, preferred_element_type=jnp.float32)
    logits = jnp.exp(params["scale"].astype(jnp.float32))[None] * alike
    return logits + params["bias"][None] if cfg.bias else logits
