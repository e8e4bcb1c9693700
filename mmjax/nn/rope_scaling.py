"""How rotary frequencies are changed for contexts longer than trained, as Hugging Face's `rope_type`s define it.

Each scaling is a frozen dataclass with `frequencies(theta, rotated, length)` and `attention`, a factor on cosine and
sine. The published models were trained with tables computed in float32, and rounding shows (26 ulp in a YaRN ramp that
is not truncated): only the powers are float64 here, everything after them is float32 in the published order.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.core.errors import InputError

ONE = np.float32(1)


def exponents(rotated: int) -> np.ndarray:
    """2i / rotated for every pair i, f32."""
    return np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)


def powers(theta: float, rotated: int) -> np.ndarray:
    """theta^(2i / rotated) for every pair i, f32: what a pair's frequency is one over."""
    return (np.float64(theta) ** exponents(rotated).astype(np.float64)).astype(np.float32)


def _need(length: Any, kind: str) -> None:
    if length is None:
        raise InputError(
            f"The rotary scaling {kind} depends on the document's length; give rope.angles `length` [B, L] "
            f"(sequence.positions.lengths)."
        )


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    factor: float
    attention: float = 1.0

    def frequencies(self, theta: float, rotated: int, length: Any = None) -> np.ndarray:
        return ONE / powers(theta, rotated) / np.float32(self.factor)


@dataclass(frozen=True)
class Dynamic:
    """ "NTK-aware" base that grows with the document beyond the `trained` length (bloc97, emozilla 2023)."""

    factor: float
    trained: int
    attention: float = 1.0

    def frequencies(self, theta: float, rotated: int, length: Any = None) -> Any:
        _need(length, "Dynamic")
        # theta × r^(n / (n - 2)) to the power -2i / n: the part that is known goes through float64 on the host.
        growth = (exponents(rotated).astype(np.float64) * rotated / (rotated - 2)).astype(np.float32)
        longer = jnp.maximum(jnp.asarray(length, jnp.float32), float(self.trained))
        ratio = (self.factor * longer / self.trained) - (self.factor - 1.0)
        known = ONE / powers(theta, rotated)
        shape = (1,) * ratio.ndim + (-1,)
        return known.reshape(shape) * jnp.power(ratio[..., None], -growth.reshape(shape))


@dataclass(frozen=True)
class Yarn:
    """Fast pairs as trained, slow ones interpolated, a ramp between (Peng et al. 2023, equations 17 to 22).

    original: length the model was trained on.
    factor: how many times longer.
    beta_fast, beta_slow: turns within `original` at the ends of the ramp.
    attention_factor: on cosine and sine; None for 0.1 ln(factor) + 1, or the ratio that mscale and mscale_all_dim give.
    truncate: whether the ramp's ends are rounded to whole pairs.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def attention(self) -> float:
        def grown(by: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * by * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1.0)

    def frequencies(self, theta: float, rotated: int, length: Any = None) -> np.ndarray:
        def pair(turns: float) -> float:
            """The pair that makes so many turns within the original length."""
            return rotated * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        if low == high:
            high += 0.001
        pairs = np.arange(rotated // 2, dtype=np.float32)
        keep = ONE - np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
        base = powers(theta, rotated)
        return ONE / (np.float32(self.factor) * base) * (ONE - keep) + ONE / base * keep


@dataclass(frozen=True)
class LongRope:
    """A searched factor for every pair, one list for short and one for long documents (Ding et al. 2024).

    factor: for the attention factor sqrt(1 + ln factor / ln original), unless that is given.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float
    attention_factor: float | None = None

    @property
    def attention(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original))

    def frequencies(self, theta: float, rotated: int, length: Any = None) -> Any:
        _need(length, "LongRope")
        for name, factors in (("short", self.short), ("long", self.long)):
            if len(factors) != rotated // 2:
                raise InputError(f"LongRope's `{name}` has {len(factors)} factors for {rotated // 2} rotated pairs.")
        base = powers(theta, rotated)
        short, long = (ONE / (np.asarray(f, np.float32) * base) for f in (self.short, self.long))
        length = jnp.asarray(length)
        shape = (1,) * length.ndim + (-1,)
        return jnp.where((length > self.original)[..., None], long.reshape(shape), short.reshape(shape))


@dataclass(frozen=True)
class Llama3:
    """Slow pairs divided by `factor`, fast ones kept, smooth between (Llama 3.1, Grattafiori et al. 2024)."""

    factor: float
    low: float  # wavelengths longer than original / low are divided
    high: float  # wavelengths shorter than original / high are kept
    original: int
    attention: float = 1.0

    def frequencies(self, theta: float, rotated: int, length: Any = None) -> np.ndarray:
        plain, factor = ONE / powers(theta, rotated), np.float32(self.factor)
        wavelength = ONE / plain * np.float32(2 * math.pi)  # torch divides a number by a tensor this way
        turns = ONE / wavelength * np.float32(self.original)
        smooth = (turns - np.float32(self.low)) / np.float32(self.high - self.low)
        mixed = (ONE - smooth) * plain / factor + smooth * plain
        out = np.where(wavelength > np.float32(self.original / self.low), plain / factor, mixed)
        return np.where(wavelength < np.float32(self.original / self.high), plain, out)


@dataclass(frozen=True)
class Proportional:
    """Only the first `share` of the pairs turns, at the frequencies of the whole head (Gemma 4's full attention)."""

    share: float
    factor: float = 1.0
    attention: float = 1.0

    def frequencies(self, theta: float, rotated: int, length: Any = None) -> np.ndarray:
        out = ONE / powers(theta, rotated) / np.float32(self.factor)
        out[int(self.share * rotated // 2) :] = 0
        return out


Scaling = Linear | Dynamic | Yarn | LongRope | Llama3 | Proportional
