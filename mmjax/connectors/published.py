"""The published sizes of the connectors, by name: CONNECTORS["idefics2-8b"]() is their Config.

From the models' own configs and papers. Qwen-VL's mergers stand in models.published, with their towers.
"""

from collections.abc import Callable

from mmjax.connectors import (
    Connector,
    abstractor,
    linear,
    merger,
    mlp,
    perceiver,
    perceiver_io,
    perceiver_layer,
    pixel_shuffle,
    pool,
    qformer,
    restore,
    wico,
)
from mmjax.nn import mlp as mlps
from mmjax.nn import norm


def _perceiver_io_text() -> perceiver_io.Config:
    """Jaegle et al. 2021, table 9: the UTF-8 byte model of 201M parameters."""
    width, model = 1280, 768
    return perceiver_io.Config(
        latents=256,
        encoder=perceiver_layer.Config(width, model, 8, 256, 1280, 1280),
        layer=perceiver_layer.Config(width, None, 8, 256, 1280, 1280),
        layers=26,
        decoder=perceiver_layer.Config(model, width, 8, 256, model, model, residual=False),
        vocab=262,
        positions=2048,
        queries=2048,
        by_input=True,
        tied=True,
    )


def _perceiver_io_image() -> perceiver_io.Config:
    """Ibid., table 14: 2-D Fourier features, 6 layers run 8 times."""
    fourier = perceiver_io.Fourier(64, (224, 224))
    width, inputs = 1024, 3 + fourier.width
    return perceiver_io.Config(
        latents=512,
        encoder=perceiver_layer.Config(width, inputs, 1, inputs, inputs, width),
        layer=perceiver_layer.Config(width, None, 8, width, width, width),
        layers=6,
        blocks=8,
        decoder=perceiver_layer.Config(width, width, 1, width, width, width),
        fourier=fourier,
        queries=1,
        outputs=1000,
    )


def _idefics2() -> perceiver.Config:
    """Laurençon et al. 2024 (Idefics2), section 3: 64 latents, 3 layers, 16 heads of 96 on 4 of keys."""
    return perceiver.Config(
        inputs=1152,
        width=4096,
        latents=64,
        layers=3,
        heads=16,
        head=96,
        hidden=16384,
        epsilon=1e-5,
        kv_heads=4,
        norm_kind="rms",
        activation="silu",
        gated=True,
        projection=mlps.Config(1152, 14336, 4096, "silu", True, False),
    )


CONNECTORS: dict[str, Callable[[], Connector]] = {
    "llava-7b": lambda: linear.Config(1024, 4096),
    "paligemma-3b": lambda: linear.Config(1152, 2048),
    "llava-1.5-7b": lambda: mlp.Config(1024, 4096),
    "llava-onevision-7b": lambda: mlp.Config(1152, 3584),
    "openflamingo-9b": lambda: perceiver.Config(1024, 1024, 64, 6, 8, 64, 4096),
    "idefics-9b": lambda: perceiver.Config(1280, 1280, 64, 6, 16, 96, 5120, qk_norm=True, activation="relu"),
    "idefics2-8b": _idefics2,
    "perceiver-io-text": _perceiver_io_text,
    "perceiver-io-image": _perceiver_io_image,
    "blip2-stage1": lambda: qformer.Config(1408, 768, 32, 12, 12, 3072, text=True, vocab=30_523, prefix=True),
    "blip2-opt-2.7b": lambda: qformer.Config(1408, 768, 32, 12, 12, 3072, outputs=2560, prefix=True),
    "instructblip-vicuna-7b": lambda: qformer.Config(
        1408, 768, 32, 12, 12, 3072, 4096, text=True, vocab=30_523, prefix=True
    ),
    "blip2-flan-t5-xl": lambda: qformer.Config(1408, 768, 32, 12, 12, 3072, outputs=2048, prefix=True),
    "internvl2-8b": lambda: pixel_shuffle.Config(1024, 4096),
    "idefics3-8b": lambda: pixel_shuffle.Config(1152, 4096, norm=False, layers=1, bias=False),
    "smolvlm-2b": lambda: pixel_shuffle.Config(1152, 2048, side=3, norm=False, layers=1, bias=False),
    "mistral3-24b": lambda: merger.Config(
        1024, 5120, hidden=5120, norm="rms", channels="channel", reduce=True, bias=False, epsilon=1e-5
    ),
    "gemma3-4b": lambda: pool.Config(side=4, norm=norm.Config(1152, "rms", 1e-6, 1.0), outputs=2560, inputs=1152),
    "honeybee-c-7b": lambda: abstractor.Config(1024, 1024, 4096, side=12, positions=24),
    "wico-7b": lambda: wico.Config(1024, 4096),
    "hires-llava": lambda: restore.Config(1024, 24, 16, 64),
}
