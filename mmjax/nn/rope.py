"""Rotary position embedding, every variant (Su et al. 2021; M-RoPE: Wang et al. 2024, section 2.1).

A variant is three small tables over the rotated pairs of a head: `frequency[i]`, radians per unit of position;
`axis[i]`, which component of the position turns pair i; and which two values of the head make a pair. One position axis
gives plain RoPE, two a vision encoder's, three (time, height, width) M-RoPE. Frequencies come from the host in float64:
devices round powers differently, and an ulp of a frequency is 0.008 of a cosine at position 131,072.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from mmjax.core.errors import InputError
from mmjax.nn.rope_scaling import ONE, Dynamic, LongRope, Scaling, powers


@dataclass(frozen=True)
class Config:
    """`sections[a]` pairs turn with position axis a; where they rotate less than the head, its tail stays as it is.

    head: values per head.
    sections: pairs per axis of the position.
    theta: base of the falling series theta^(-i / n) of frequencies.
    layout: which axis and which frequency a pair has, for sections (2, 1, 1) say:
      "sections": one series, cut into bands.                    t t h w    0 1 2 3     Qwen2-VL, Qwen2.5-VL (text)
      "interleaved": one series, the axes take turns.            t h w t    0 1 2 3     Qwen3-VL (text)
      "repeated": every axis has a series of its own length.     t t h w    0 1 0 0     Qwen-VL's vision towers
      "alternating": one series, dealt out to the axes in turn.  h h w w    0 2 1 3     Pixtral; equal sections only
    pairs: (i, i + n) are a pair for n pairs ("half": Llama, Qwen), or (2i, 2i + 1) ("adjacent": GPT-J, Mistral's own).
    scaling: how frequencies change for contexts longer than trained (see nn.rope_scaling).
    """

    head: int
    sections: tuple[int, ...]
    theta: float = 10_000.0
    layout: Literal["sections", "interleaved", "repeated", "alternating"] = "sections"
    pairs: Literal["half", "adjacent"] = "half"
    scaling: Scaling | None = None

    def __post_init__(self):
        if not 0 < 2 * sum(self.sections) <= self.head:
            raise InputError(
                f"Rotary sections {self.sections} rotate {2 * sum(self.sections)} values of a head that has "
                f"{self.head}; make them add up to at most {self.head // 2}."
            )
        if self.layout == "alternating" and len(set(self.sections)) > 1:
            raise InputError(f"Rotary layout 'alternating' needs equal sections, not {self.sections}.")
        if self.layout == "repeated" and self.scaling is not None:
            raise InputError("Rotary layout 'repeated' has a series per axis and takes no scaling; leave scaling None.")

    @property
    def rotated(self) -> int:
        """Values of a head that turn."""
        return 2 * sum(self.sections)

    @property
    def needs_length(self) -> bool:
        """Whether the frequencies depend on how long the document is."""
        return isinstance(self.scaling, Dynamic | LongRope)


def axes(cfg: Config) -> Int[np.ndarray, "pairs"]:
    """Which component of the position turns each pair."""
    axis = np.repeat(np.arange(len(cfg.sections), dtype=np.int32), cfg.sections)
    if cfg.layout != "interleaved":
        return axis
    # The later axes take every n-th pair while their sections last; what remains is the first axis's.
    out = np.zeros(sum(cfg.sections), np.int32)
    for a, count in list(enumerate(cfg.sections))[1:]:
        out[a : count * len(cfg.sections) : len(cfg.sections)] = a
    return out


def frequencies(
    cfg: Config, length: Num[Array | np.ndarray, "..."] | None = None
) -> Float[np.ndarray | Array, "... pairs"]:
    """Radians per unit of position, f32[pairs], or f32[..., pairs] where the scaling depends on the `length` [...]."""
    pairs = cfg.rotated // 2
    if cfg.layout == "repeated":
        return np.concatenate([ONE / powers(cfg.theta, 2 * n) for n in cfg.sections])
    if cfg.scaling is None:
        out = ONE / powers(cfg.theta, cfg.rotated)
    else:
        out = cfg.scaling.frequencies(cfg.theta, cfg.rotated, length)
    if cfg.layout == "alternating":
        n = len(cfg.sections)
        out = out[..., np.arange(pairs).reshape(-1, n).T.reshape(-1)]
    return out


def angles(
    position: Num[Array, "b l axes"], cfg: Config, length: Num[Array, "b l"] | None = None
) -> tuple[Float[Array, "b l pairs"], Float[Array, "b l pairs"]]:
    """(cosine, sine), each f32[B, L, pairs], times the scaling's attention factor.

    Args:
      position: [B, L, axes], integers or reals.
      cfg: the variant.
      length: [B, L], how long each token's document is (see sequence.positions.lengths); for scalings that depend on
        it (dynamic, longrope).

    Raises:
      InputError: the scaling needs lengths and got none, or the position has too few components.
    """
    if position.shape[-1] < len(cfg.sections):
        raise InputError(
            f"Positions have {position.shape[-1]} component(s), but the rotary sections {cfg.sections} turn with "
            f"{len(cfg.sections)}; give positions of shape [B, L, {len(cfg.sections)}]."
        )
    frequency = jnp.asarray(frequencies(cfg, length))
    if frequency.ndim == 1:
        frequency = frequency[None, None, :]
    # A sum over the axes, of which all but one are zero, and no gather: XLA of jax 0.7 folds a gather of constants into
    # an array of another layout and then multiplies the wrong numbers.
    own, at = axes(cfg), position.astype(jnp.float32)
    angle = sum(at[..., a, None] * jnp.where(own[None, None] == a, frequency, 0.0) for a in range(len(cfg.sections)))
    factor = np.float32(1.0 if cfg.scaling is None else cfg.scaling.attention)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "b l h e"],
    cosine: Float[Array, "b l pairs"],
    sine: Float[Array, "b l pairs"],
    pairs: Literal["half", "adjacent"] = "half",
) -> Float[Array, "b l h e"]:
    """x with every pair of every head turned by its angle, and the rest of the head as it was.

    Computed in float32, returned in x's dtype.
    """
    rotated = 2 * cosine.shape[-1]
    turned = x[..., :rotated].astype(jnp.float32)
    c, s = cosine[:, :, None, :], sine[:, :, None, :]
    if pairs == "half":
        a, b = jnp.split(turned, 2, axis=-1)
        out = jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = jnp.stack([a * c - b * s, b * c + a * s], axis=-1).reshape(turned.shape)
    out = out.astype(x.dtype)
    return out if rotated == x.shape[-1] else jnp.concatenate([out, x[..., rotated:]], axis=-1)
