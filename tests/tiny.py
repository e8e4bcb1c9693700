"""The smallest model that has every part, and the smallest run, for tests."""

import dataclasses
import functools
from pathlib import Path

import jax

from mmjax.connectors import mlp as connector
from mmjax.core.meshes import MeshConfig
from mmjax.core.spec import ParamSpec
from mmjax.data import drawings
from mmjax.encoders import vit
from mmjax.models import decoder, vlm
from mmjax.nn import patch_embed, rope, transformer
from mmjax.tokenizers.resolution import Native
from mmjax.train.config import Config, Optimizer, Packing


def tiny_model(vocab: int, patch: int = 4, width: int = 16) -> vlm.Config:
    vision = transformer.Config(
        width=width,
        layers=2,
        heads=2,
        kv_heads=2,
        head=8,
        hidden=24,
        activation="gelu_tanh",
        gated=False,
        bias=True,
        norm_kind="layer",
        rope=rope.Config(8, (2, 2), 100.0, "repeated"),
    )
    language = transformer.Config(
        width=width, layers=2, heads=4, kv_heads=2, head=8, hidden=24, rope=rope.Config(8, (2, 1, 1))
    )
    return vlm.Config(
        vision=vit.Config(patch_embed.Config(patch, width, patch_norm=True, stem=((2, 10),)), vision),
        connector=connector.Config(width, width),
        decoder=decoder.Config(vocab, language),
        placeholder=6,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _randomised(leaves, tree, key):
    values = [p.init(k, p.shape, p.dtype) for p, k in zip(leaves, jax.random.split(key, len(leaves)), strict=True)]
    noise = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(values, noise, strict=True)]
    )


def randomised(spec, seed: int = 0) -> dict:
    """Initial values with noise on every one: zeros and ones would hide a forgotten term."""
    leaves, tree = jax.tree.flatten(spec, is_leaf=lambda x: isinstance(x, ParamSpec))
    return _randomised(tuple(leaves), tree, jax.random.key(seed))


def tiny_run(out: Path, **changes) -> Config:
    """A run of seconds on the built-in drawings; `changes` replace its fields."""
    cfg = Config(
        model=tiny_model(vocab=1024, patch=8),
        data=drawings.Config(concepts=5),
        out=out,
        steps=6,
        resolution=Native(patch=8, min_pixels=64, max_pixels=48 * 48),
        packing=Packing(rows=8, tokens=128, buckets=2),
        optimizer=Optimizer(learning_rate=3e-3, average=0.9),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        save_every=2,
        answer=4,
    )
    return dataclasses.replace(cfg, **changes)
