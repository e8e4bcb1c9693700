"""Rules of what every family has: transformer blocks, norms, linear maps, patch embedding, position tables."""

import math
from dataclasses import dataclass

from mmjax.convert.rules import Layout, Rule, Shape, linear, vector
from mmjax.nn import transformer


@dataclass(frozen=True)
class Names:
    """What a family calls the parts of a block.

    qkv: q, k and v are one tensor of this name. gate_up: so are the gate and the up matrix of a gated MLP.
    """

    attention_norm: str
    mlp_norm: str
    out: str
    up: str
    down: str
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = ""
    gate: str = ""
    gate_up: str = ""
    q_norm: str = ""
    k_norm: str = ""
    attention_scale: str = ""
    mlp_scale: str = ""
    attention_post_norm: str = ""
    mlp_post_norm: str = ""
    attention_inner_norm: str = ""
    mlp_inner_norm: str = ""


CLIP = Names(  # also SigLIP's
    attention_norm="layer_norm1",
    mlp_norm="layer_norm2",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    up="mlp.fc1",
    down="mlp.fc2",
)


def table(axes: int = 0) -> Layout:
    """Theirs is [1 × axes, rows × columns, D]; ours [rows, columns, D] or [rows, D]."""

    def layout(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
        theirs = (1,) * axes + (math.prod(shape[:-1]), shape[-1])
        return theirs, tuple(range(len(theirs)))

    return layout


def norm(ours: str, theirs: str, kind: str = "layer") -> list[Rule]:
    """LayerNorm or RMSNorm."""
    out = [Rule(f"{ours}/scale", f"{theirs}.weight")]
    return [*out, Rule(f"{ours}/bias", f"{theirs}.bias")] if kind == "layer" else out


def dense(ours: str, theirs: str, bias: bool = True, inputs: int = 1, join: int | None = None) -> list[Rule]:
    """torch.nn.Linear; a bias of several axes (heads) is flat there."""
    out = [Rule(f"{ours}/kernel", f"{theirs}.weight", linear(inputs), join)]
    return [*out, Rule(f"{ours}/bias", f"{theirs}.bias", vector, join)] if bias else out


def blocks(cfg: transformer.Config, ours: str, theirs: str, names: Names) -> list[Rule]:
    """All blocks of nn.transformer; `theirs` is the prefix of one, "encoder.layers.{}."."""
    out = norm(f"{ours}/attention_norm", theirs + names.attention_norm, cfg.norm_kind)
    out += norm(f"{ours}/mlp_norm", theirs + names.mlp_norm, cfg.norm_kind)
    for name in ("q", "k", "v"):
        fused = 0 if names.qkv else None
        out += dense(
            f"{ours}/attention/{name}", theirs + (names.qkv or getattr(names, name)), cfg.has_bias(name), 1, fused
        )
    out += dense(f"{ours}/attention/out", theirs + names.out, cfg.has_bias("out"), 2)
    if cfg.qk_norm != "none":
        for name in ("q_norm", "k_norm"):
            out += norm(f"{ours}/attention/{name}", theirs + getattr(names, name), "rms")
    if cfg.gated:
        fused = 0 if names.gate_up else None
        out += dense(f"{ours}/mlp/gate", theirs + (names.gate_up or names.gate), cfg.bias, 1, fused)
        out += dense(f"{ours}/mlp/up", theirs + (names.gate_up or names.up), cfg.bias, 1, fused)
    else:
        out += dense(f"{ours}/mlp/up", theirs + names.up, cfg.bias)
    out += dense(f"{ours}/mlp/down", theirs + names.down, cfg.bias)
    if cfg.layer_scale is not None:
        out += [Rule(f"{ours}/{name}", theirs + getattr(names, name)) for name in ("attention_scale", "mlp_scale")]
    if cfg.inner_norm:
        for name in ("attention", "mlp"):
            out += norm(f"{ours}/{name}/inner_norm", theirs + getattr(names, f"{name}_inner_norm"), cfg.norm_kind)
    if names.attention_post_norm:
        for name in ("attention_post_norm", "mlp_post_norm"):
            out += norm(f"{ours}/{name}", theirs + getattr(names, name), cfg.norm_kind)
    return out
