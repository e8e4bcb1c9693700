"""Rotary position embedding along one or several axes (Su et al. 2021; M-RoPE: Wang et al. 2024, section 2.1).

Every variant is one pair of tables over the E/2 rotated pairs of a head: `frequency[i]`, radians per unit of position,
and `axis[i]`, which component of the position turns pair i. One position axis gives plain RoPE, two give a vision
encoder's, three (time, height, width) in sections give M-RoPE. Pairs are (i, i + E/2), as in Llama and Qwen.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from mmjax.core.errors import InputError


@dataclass(frozen=True)
class Config:
    """`sections[a]` pairs turn with position axis a; they add up to half the head.

    frequencies:
      "shared": one falling series over all pairs, cut into sections, so every axis has its own band (Qwen2-VL's text).
      "repeated": each section starts the series anew with its own length (Qwen2-VL's vision tower).
    """

    head: int
    sections: tuple[int, ...]
    theta: float = 10_000.0
    frequencies: Literal["shared", "repeated"] = "shared"

    def __post_init__(self):
        if 2 * sum(self.sections) != self.head:
            raise InputError(
                f"Rotary sections {self.sections} rotate {2 * sum(self.sections)} values of a head that has "
                f"{self.head}; make them add up to {self.head // 2}."
            )


def tables(cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """(frequency f32[E/2], axis i32[E/2]); from float64 on the host, because devices round the powers differently."""
    axis = np.repeat(np.arange(len(cfg.sections)), cfg.sections)
    if cfg.frequencies == "shared":
        exponent = np.arange(cfg.head // 2) / (cfg.head // 2)
    else:
        exponent = np.concatenate([np.arange(n) / n for n in cfg.sections])
    return (cfg.theta**-exponent).astype(np.float32), axis.astype(np.int32)


def angles(position: Num[Array, "b l axes"], cfg: Config) -> tuple[Float[Array, "b l e"], Float[Array, "b l e"]]:
    """(cosine, sine), each f32[B, L, E/2], of positions [B, L, axes] (integers or reals)."""
    frequency, axis = tables(cfg)
    angle = position.astype(jnp.float32)[..., axis] * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b l h e"], cosine: Float[Array, "b l half"], sine: Float[Array, "b l half"]
) -> Float[Array, "b l h e"]:
    """x with every pair (i, i + E/2) of every head turned by its angle; computed in float32, returned in x's dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    c, s = cosine[:, :, None, :], sine[:, :, None, :]
    return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1).astype(x.dtype)
