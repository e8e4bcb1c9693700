"""How the towers of encoders.vit are compared: every picture alone through the reference, all packed through ours."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity import pictures
from parity.harness import Compare, double, gradient_model, run, saved, weights_for

from mmjax.convert import huggingface
from mmjax.encoders import vit


@dataclasses.dataclass(frozen=True)
class Tower:
    """A reference tower.

    call: (model, picture [1, 3, H, W], grid) → (features of patches [1, P, D], more: dict name → tensor).
    blocks: the path of block i. embedding: the path of what embeds, and how many tokens stand before the patches.
    """

    model: torch.nn.Module
    call: Callable[[torch.nn.Module, torch.Tensor], dict[str, torch.Tensor]]
    blocks: str
    patch: int
    prefix: int = 0
    embedding: str | None = None
    part: Callable[[Any], Any] = lambda tree: tree  # the vision tower among the parameters


def compare(compare: Compare, tower: Tower, grids=tuple(pictures.GRIDS), gradients: bool = True) -> None:
    """Each intermediate of each picture, packed with the others and alone, and gradients through all pictures."""
    loaded = huggingface.load(saved(tower.model))
    cfg, params = tower.part(loaded.cfg), tower.part(loaded.params)
    layers = cfg.blocks.layers
    given = pictures.images(list(grids), tower.patch)
    wide = double(tower.model)
    watch = {f"block {i}": tower.blocks.format(i) for i in range(layers)}
    if tower.embedding:
        watch["embedding"] = tower.embedding

    for rows, name in (([list(grids)], "packed"), ([[g] for g in grids[:2]], "alone")):
        at = 0
        for some in rows:
            packed = pictures.row(some)
            cuts = [pictures.cut(p, tower.patch) for p in given[at : at + len(some)]]
            ours = encode(params, packed.patches(cuts), cfg, packed.see)
            first = vit.embed(
                params, packed.patches(cuts), cfg, **{k: packed.see[k] for k in ("position", "image", "grid")}
            )
            for n in range(len(some)):
                picture = given[at + n]
                got = {f"block {i}": (packed.raster(ours.taps[i], n), _tap(ours, i, n)) for i in range(layers)}
                got["features"] = (packed.raster(ours.patches, n), None if ours.prefix is None else ours.prefix[0, n])
                got["embedding"] = (packed.raster(first, n), None)
                sides = [outputs(m, tower, watch, picture) for m in (tower.model, wide)]
                label = f"{name} {some[n][1]}x{some[n][2]}"
                for key in sides[0]:
                    if key == "pooled":
                        compare.value(f"{label} pooled", ours.pooled[0, n], sides[0][key][0], sides[1][key][0])
                        continue
                    single, exact = (s[key].reshape(-1, s[key].shape[-1]) for s in sides)
                    patches, prefix = got[key]
                    compare.value(f"{label} {key}", patches, single[tower.prefix :], exact[tower.prefix :])
                    if tower.prefix and prefix is not None:
                        compare.value(f"{label} {key} tokens", prefix, single[: tower.prefix], exact[: tower.prefix])
            at += len(some)
    if gradients:
        of_parameters(compare, tower, loaded, given[:2], list(grids[:2]))


def _tap(ours: vit.Features, block: int, n: int):
    return None if ours.prefix_taps is None else ours.prefix_taps[block, 0, n]


def encode(params: dict, patches: jax.Array, cfg: vit.Config, see: dict) -> vit.Features:
    """Everything, with every block tapped, compiled."""
    taps = tuple(range(cfg.blocks.layers))
    return jax.jit(lambda p, x, s: vit.encode(p, x, cfg, taps=taps, **s))(params, patches, see)


def outputs(model: torch.nn.Module, tower: Tower, watch: dict[str, str], picture: np.ndarray) -> dict[str, np.ndarray]:
    kind = next(model.parameters()).dtype
    caught: dict[str, torch.Tensor] = {}
    out = run(model, watch, lambda m: caught.update(tower.call(m, torch.tensor(picture, dtype=kind))))
    # What a convolution puts out has its channels in front.
    out = {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in out.items()}
    return out | {k: v.detach().numpy() for k, v in caught.items()}


def of_parameters(compare: Compare, tower: Tower, loaded: Any, given: list[np.ndarray], grids: list) -> None:
    """d/d parameters of Σ output × weights, over two packed pictures: of features and of pooled vectors."""
    packed = pictures.row(grids)
    patches = packed.patches([pictures.cut(p, tower.patch) for p in given])
    cfg = tower.part(loaded.cfg)
    keys = tower.call(tower.model, torch.tensor(given[0])).keys()

    def loss(model: torch.nn.Module) -> torch.Tensor:
        total = 0.0
        for picture in given:
            for key, value in tower.call(model, torch.tensor(picture, dtype=torch.float64)).items():
                flat = value.reshape(-1, value.shape[-1])
                if key == "features":
                    flat = flat[tower.prefix :]
                total = total + (flat * torch.tensor(weights_for(flat.shape))).sum()
        return total

    def ours(params: dict) -> jax.Array:
        out = vit.encode(tower.part(params), patches, cfg, **packed.see)
        total = 0.0
        for n, s in enumerate(packed.slices):
            weight = weights_for((s.stop - s.start, out.patches.shape[-1]))[packed.orders[n]]
            if "features" in keys:
                total = total + (out.patches[0, s] * jnp.asarray(weight, jnp.float32)).sum()
            if "pooled" in keys:
                pooled = out.pooled[:, n]
                total = total + (pooled * jnp.asarray(weights_for(pooled.shape), jnp.float32)).sum()
        return total

    expected = huggingface.load(saved(gradient_model(tower.model, loss))).params
    compare.gradients(jax.jit(jax.grad(ours))(loaded.params), expected)
