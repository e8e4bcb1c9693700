"""Published sizes: as many parameters as the published models have (counted in transformers), and their shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core import spec
from mmjax.encoders import text, vit
from mmjax.encoders.published import ENCODERS
from mmjax.models import tower
from mmjax.models.published import TOWERS

PARAMETERS = {
    "vit-b16": 86_567_656,
    "vit-b32": 88_224_232,
    "vit-l16": 304_326_632,
    "vit-h14": 632_045_800,
    "deit-s16-distilled": 22_436_432,
    "deit-b16-distilled": 87_338_192,
    "dinov2-s14": 22_056_576,
    "dinov2-b14": 86_580_480,
    "dinov2-l14": 304_368_640,
    "dinov2-g14": 1_136_480_768,
    "dinov2-l14-registers": 304_372_736,
    "clip-b32": 87_849_216,
    "clip-b16": 86_192_640,
    "clip-l14": 303_966_208,
    "clip-l14-336": 304_293_888,
    "clip-b-text": 63_428_096,
    "clip-l-text": 123_650_304,
    "siglip-b16-224": 92_884_224,
    "siglip-l16-384": 316_283_904,
    "siglip-so400m14-384": 428_225_600,
    "siglip-b-text": 110_271_744,
    "siglip-so400m-text": 449_734_896,
    "siglip2-b16-naflex": 92_930_304,
    "siglip2-so400m16-naflex": 427_888_064,
    "eva-g14": 985_952_256,
    "pixtral-400m": 403_489_792,
    "internvit-300m": 304_012_288,
    "internvit-6b": 5_536_496_000,
    "qwen2-vl-2b": 665_271_296,
    "qwen2-vl-7b": 675_759_104,
    "qwen2.5-vl-3b": 668_684_288,
    "qwen2.5-vl-7b": 676_550_144,
    "qwen3-vl-2b": 406_957_056,
    "qwen3-vl-8b": 576_388_336,
}


def shapes(cfg, rows: int = 2, places: int = 1024, pictures: int = 8):
    """What the encoder of any config puts out for rows of so many patches (or tokens), by shapes alone."""

    def i32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.int32)

    see = {name: i32(places) for name in ("order", "lo", "hi")}
    if isinstance(cfg, text.Config):
        call = functools.partial(text.apply, cfg=cfg)
        return jax.eval_shape(call, spec.abstract(text.spec(cfg)), i32(places), **see, position=i32(places))
    vision = cfg.vision if isinstance(cfg, tower.Config) else cfg
    patches = jax.ShapeDtypeStruct((rows, places, vision.embed.values), jnp.uint8)
    see |= {"position": i32(places, 2), "image": i32(places), "grid": i32(pictures, 3)}
    if vision.blocks.windowed:
        see["window"] = (i32(places), i32(places))
    of, call = (tower, tower.apply) if isinstance(cfg, tower.Config) else (vit, vit.encode)
    return jax.eval_shape(functools.partial(call, cfg=cfg), spec.abstract(of.spec(cfg)), patches, **see)


@pytest.mark.parametrize("name", [*ENCODERS, *TOWERS])
def test_parameters_and_shapes(name):
    cfg = (ENCODERS | TOWERS)[name]()
    of = text if isinstance(cfg, text.Config) else tower if isinstance(cfg, tower.Config) else vit
    assert spec.count(of.spec(cfg)) == PARAMETERS[name]
    out = shapes(cfg)
    if of is text:
        assert out[0].shape == (2, 1024, cfg.blocks.width)
    elif of is tower:
        assert out.tokens.shape == (2, 256, cfg.merger.outputs)
        assert out.deep.shape[0] == len(cfg.deepstack)
    else:
        assert out.patches.shape == (2, 1024, cfg.blocks.width)
        assert (out.pooled is None) == (cfg.head is None)
        assert np.shape(out.prefix)[1:3] == ((8, cfg.prefix) if cfg.prefix else ())
