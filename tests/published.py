"""Every published encoder and connector as a call on shapes: for eval_shape, and for compilers without their device."""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.connectors import perceiver_io, qformer
from mmjax.connectors.published import CONNECTORS
from mmjax.core import spec
from mmjax.encoders import published_pyramids as pyramids
from mmjax.encoders import pyramid, swin, text, vit
from mmjax.encoders.published import ENCODERS
from mmjax.models import tower
from mmjax.models.published import TOWERS

PYRAMIDS = {
    "swin-t": pyramids.swin_tiny,
    "swin-s": pyramids.swin_small,
    "swin-b": pyramids.swin_base,
    "swin-l": pyramids.swin_large,
    **{f"pvt-{size}": functools.partial(pyramids.pvt, size) for size in ("tiny", "small", "medium", "large")},
    **{f"pvt-v2-{size}": functools.partial(pyramids.pvt_v2, size) for size in ("b0", "b1", "b2", "b3", "b4", "b5")},
}
ALL: dict[str, Callable[[], Any]] = {
    **{f"encoder {k}": f for k, f in (ENCODERS | TOWERS | PYRAMIDS).items()},
    **{f"connector {k}": f for k, f in CONNECTORS.items()},
}


def recomputed(cfg: Any) -> Any:
    """With every block's inside computed again in the backward pass."""
    if isinstance(cfg, tower.Config):
        return dataclasses.replace(cfg, vision=recomputed(cfg.vision))
    if isinstance(cfg, vit.Config | text.Config):
        return dataclasses.replace(cfg, blocks=dataclasses.replace(cfg.blocks, remat="full"))
    return cfg


def case(
    name: str, rows: int = 4, places: int = 4096, pictures: int = 16, remat: bool = False
) -> tuple[Any, Any, Callable, tuple, dict]:
    """The module, its config, call(params, *arguments, **keywords), and the shapes of these.

    Rows of `places` patches, features or tokens of so many pictures; whole pictures of 224 × 224 for pyramids.
    """
    cfg = recomputed(ALL[name]()) if remat else ALL[name]()

    def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    see = {k: array(places) for k in ("order", "lo", "hi")}
    where = {"image": array(places), "order": array(places), "grid": array(pictures, 3)}
    if isinstance(cfg, swin.Config | pyramid.Config):
        of = sys.modules[type(cfg).__module__]
        return of, cfg, functools.partial(of.apply, cfg=cfg), (array(224, 224, 3, dtype=jnp.float32),), {}
    if isinstance(cfg, text.Config):
        return text, cfg, functools.partial(text.apply, cfg=cfg), (array(places),), see | {"position": array(places)}
    if isinstance(cfg, vit.Config | tower.Config):
        vision = cfg.vision if isinstance(cfg, tower.Config) else cfg
        see |= where | {"position": array(places, 2)}
        if vision.blocks.windowed:
            see["window"] = (array(places), array(places))
        of, call = (tower, tower.apply) if isinstance(cfg, tower.Config) else (vit, vit.encode)
        return of, cfg, functools.partial(call, cfg=cfg), (array(places, vision.embed.values, dtype=jnp.uint8),), see
    of = sys.modules[type(cfg).__module__]
    keys = {k: v for k, v in where.items() if k in inspect.signature(of.apply).parameters}
    if isinstance(cfg, perceiver_io.Config) and cfg.vocab:
        places = 2048
        keys = {"image": array(places), "order": array(places), "grid": array(pictures, 3)}
        return of, cfg, functools.partial(of.apply, cfg=cfg), (array(places),), keys
    if isinstance(cfg, perceiver_io.Config):  # every pixel of one picture is an input, as published
        places = 224 * 224
        keys = {"image": array(places), "order": array(places), "grid": array(1, 3)}
    features = array(places, width(cfg), dtype=jnp.float32)
    if isinstance(cfg, qformer.Config) and cfg.text:
        keys["text"] = qformer.Text(array(512), array(512), array(512))
    return of, cfg, functools.partial(of.apply, cfg=cfg), (features,), keys


def width(cfg: Any) -> int:
    """Of the features that a connector gets."""
    if isinstance(cfg, perceiver_io.Config):
        return cfg.encoder.inputs - (cfg.fourier.width if cfg.fourier else 0)
    return getattr(cfg, "inputs", None) or cfg.width


def shapes(name: str, **sizes: int) -> Any:
    """What it puts out, by shapes alone."""
    of, cfg, call, arguments, keywords = case(name, **sizes)
    return jax.eval_shape(lambda p, a, k: call(p, *a, **k), spec.abstract(of.spec(cfg)), arguments, keywords)
