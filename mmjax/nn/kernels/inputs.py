"""What every kernel of interval attention is given: `forward(static, inputs) -> out, lse`, and `backward` of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct


@dataclass(frozen=True)
class Static:
    """What a compiled attention depends on besides shapes."""

    scale: float
    softcap: float | None
    bias: Callable | None
    # Results and cotangents are put out in float32, whatever the inputs are: there is more to add to them (nn.ring).
    wide: bool = False


@flax.struct.dataclass
class Inputs:
    """Everything attention reads; heads before positions, because then every product is a plain batched one."""

    q: Any  # [B, K, G, L, E]
    k: Any  # [B, K, S, E]
    v: Any  # [B, K, S, Ev]
    order: Any  # i32[B, S]
    lo: Any  # i32[B, L]
    hi: Any  # i32[B, L]
    key_bias: Any  # f32[B, S] or None
    sinks: Any  # [K, G] or None
    bias_params: Any  # leaves [K × G, ...] or None
    bias_query: Any  # leaves [B, L, ...]
    bias_key: Any  # leaves [B, S, ...]
