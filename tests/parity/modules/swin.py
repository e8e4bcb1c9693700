"""Swin: SwinForImageClassification, SwinModel with absolute positions, SwinBackbone."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf
from parity.harness import Compare, double, gradient_model, run, saved, system, twin, weights_for

from mmjax.convert import huggingface
from mmjax.encoders import swin

SIZES = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 2, 2),
    "num_heads": (2, 4, 4),
    "window_size": 4,
    "drop_path_rate": 0.0,
}


def pictures(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)


def planes(images: np.ndarray, kind: torch.dtype) -> torch.Tensor:
    return torch.tensor(images.transpose(0, 3, 1, 2), dtype=kind)


def sides(model: torch.nn.Module, watch: dict, images: np.ndarray, call: Callable) -> list[dict]:
    """What the reference's modules put out in float32 and float64."""
    out = []
    # Copies: transformers' Swin keeps the window of the smallest picture it has seen.
    for m, kind in ((copy.deepcopy(model), torch.float32), (double(model), torch.float64)):
        out.append(run(m, watch, lambda m, kind=kind: call(m, planes(images, kind))))
    return out


def intermediates(params: dict, images: jax.Array, cfg: swin.Config) -> dict[str, jax.Array]:
    """The encoder step by step."""
    x, grid = swin.embed(params, images, cfg)
    out = {"embedding": x}
    for i, depth in enumerate(cfg.depths):
        shifts = cfg.shifts(grid)
        for j in range(depth):
            layer = jax.tree.map(lambda p, j=j: p[j], params[f"stage_{i}"]["layers"])
            x = swin.block(layer, x, cfg, i, grid, shifts[j % len(shifts)])
            out[f"stage {i} block {j}"] = x
        if i + 1 < len(cfg.depths):
            x, grid = swin.merge(params[f"stage_{i}"], x, cfg, i, grid)
            out[f"stage {i} merge"] = x
    return out


def whole(params: dict, images: jax.Array, cfg: swin.Config) -> dict[str, jax.Array]:
    """The same in one, with what follows the blocks."""
    out = swin.apply(params, images, cfg)
    named = {"embedding": out.stem, "norm": out.tokens, "pooled": out.pooled}
    named |= {f"stage {i} block {depth - 1}": m for i, (depth, m) in enumerate(zip(cfg.depths, out.maps, strict=True))}
    return named | ({"out": out.logits} if cfg.classes else {})


def watched(cfg: swin.Config, prefix: str) -> dict[str, str]:
    out = {"embedding": f"{prefix}embeddings"}
    for i, depth in enumerate(cfg.depths):
        out |= {f"stage {i} block {j}": f"{prefix}encoder.layers.{i}.blocks.{j}" for j in range(depth)}
        if i + 1 < len(cfg.depths):
            out[f"stage {i} merge"] = f"{prefix}encoder.layers.{i}.downsample"
    return out | {"norm": f"{prefix}layernorm", "pooled": f"{prefix}pooler"}


def compare(
    c: Compare, ours: Callable, loaded: Any, images: np.ndarray, watch: dict[str, str], model: Any, call: Callable
) -> None:
    """What `ours` names of pictures of one size against the modules of the same names."""
    got = jax.jit(ours, static_argnums=2)(loaded.params, jnp.asarray(images), loaded.cfg)
    single, exact = sides(model, watch, images, call)
    batch, height, width, _ = images.shape
    for name, x in got.items():
        c.value(f"{batch} of {height}x{width} {name}", x, single[name].reshape(x.shape), exact[name].reshape(x.shape))


def gradients(c: Compare, loaded: Any, model: torch.nn.Module, size: tuple[int, int], call: Callable, ours: Callable):
    """d/d parameters of Σ output × weights; `call` and `ours` give equal lists of outputs."""
    images = pictures(2, *size, seed=5)

    def loss(m: torch.nn.Module) -> torch.Tensor:
        return sum((x * torch.tensor(weights_for(x.shape))).sum() for x in call(m, planes(images, torch.float64)))

    def total(params: dict) -> jax.Array:
        out = ours(loaded.of.apply(params, jnp.asarray(images), loaded.cfg))
        return sum((x * jnp.asarray(weights_for(x.shape), jnp.float32)).sum() for x in out)

    expected = huggingface.load(saved(gradient_model(copy.deepcopy(model), loss))).params
    c.gradients(jax.jit(jax.grad(total))(loaded.params), expected)


@system("Swin")
def classifier(c: Compare) -> None:
    model = twin(hf.SwinForImageClassification, hf.SwinConfig(**SIZES, num_labels=7))
    loaded = huggingface.load(saved(model))
    watch = watched(loaded.cfg, "swin.")
    for size in ((32, 32), (38, 30), (25, 51)):
        compare(c, intermediates, loaded, pictures(2, *size), watch, model, lambda m, x: m(x))
    # Alone, the first of the two pictures.
    compare(c, whole, loaded, pictures(2, 38, 30)[:1], watch, model, lambda m, x: m(x))

    def call(m: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        tokens = m.swin(x).last_hidden_state
        return [tokens, m.classifier(tokens.mean(1))]

    gradients(c, loaded, model, (38, 30), call, lambda out: [out.tokens, out.logits])


@system("Swin, absolute positions")
def absolute(c: Compare) -> None:
    """Uneven depths, no biases of queries, keys and values, and positions interpolated."""
    sizes = SIZES | {"depths": (3, 1), "num_heads": (2, 4), "use_absolute_embeddings": True, "qkv_bias": False}
    model = twin(hf.SwinModel, hf.SwinConfig(**sizes))
    loaded = huggingface.load(saved(model))

    def call(m: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        return [m(x, interpolate_pos_encoding=True).last_hidden_state]

    for size in ((32, 32), (44, 26), (20, 34)):
        compare(c, whole, loaded, pictures(2, *size), watched(loaded.cfg, ""), model, call)
    gradients(c, loaded, model, (44, 26), call, lambda out: [out.tokens])


@system("Swin backbone")
def backbone(c: Compare) -> None:
    """Maps of several scales with their norms; windows are shifted whatever a map's size."""
    model = twin(hf.SwinBackbone, hf.SwinConfig(**SIZES, out_features=["stem", "stage1", "stage3"]))
    loaded = huggingface.load(saved(model))
    assert loaded.cfg.map_norms == (0, 1, 3)
    names = ("stem", "stage 1", "stage 3")
    # The second stage's map has no norm here: it is its last block's output.
    watch = {"stage 2": "swin.encoder.layers.1.blocks.1"}
    watch |= {name: f"hidden_states_norms.{name.replace(' ', '')}" for name in names}

    def maps(params: dict, images: jax.Array, cfg: swin.Config) -> dict[str, jax.Array]:
        out = loaded.of.apply(params, images, cfg)
        return {"stem": out.stem} | {f"stage {i + 1}": m for i, m in enumerate(out.maps)}

    for size in ((32, 32), (38, 30), (9, 53)):
        compare(c, maps, loaded, pictures(2, *size), watch, model, lambda m, x: m(x).feature_maps[0])

    def call(m: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        return [y.permute(0, 2, 3, 1) for y in m(x).feature_maps]

    gradients(c, loaded, model, (18, 30), call, lambda out: [out.stem, out.maps[0], out.maps[2]])
