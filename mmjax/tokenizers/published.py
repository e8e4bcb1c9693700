"""The resolution policies of published systems, by name, with the settings they were trained with.

Each equals the named image processor of `transformers` 5.23 to the pixel (tests/parity/test_images.py), where there is
one. Mean and deviation are `nn.patch_embed`'s to subtract and divide by, on device. Where a processor's defaults and a
published repository differ (Qwen2-VL's allows 12,845,056 pixels), these are the defaults: `dataclasses.replace` them.
LLaVA-OneVision's is that of its pixels; its model resizes maps of media tokens too (`most` 9, with sequence.mixes).
"""

from dataclasses import dataclass

from mmjax.tokenizers.canvas import Canvas
from mmjax.tokenizers.resolution import Fixed, NaFlex, Native, Pixtral, Policy
from mmjax.tokenizers.slices import UHD, Bounded, Slices
from mmjax.tokenizers.tiles import AnyRes, PanAndScan, Splits, Tiles

CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Published:
    """A system's settings.

    policy: the resolution policy.
    mean, deviation: per channel, of values in [0, 1].
    merge: its connector makes one token of merge × merge patches …
    latents: … or so many of each view.
    """

    policy: Policy
    mean: tuple[float, float, float] = CLIP_MEAN
    deviation: tuple[float, float, float] = CLIP_DEVIATION
    merge: int = 1
    latents: int = 0


PUBLISHED = {
    "vit-base-16": Published(Fixed(16, 224, 224, filter="bilinear"), HALF, HALF),
    "clip-large-14-336": Published(Fixed(14, 336, 336, "crop", 336)),
    "siglip-so400m-14-384": Published(Fixed(14, 384, 384, drop=True), HALF, HALF),
    "siglip2-naflex-16": Published(NaFlex(16, 256), HALF, HALF),
    "llava-1.5": Published(Fixed(14, 336, 336, "pad")),
    "llava-1.5-hd": Published(AnyRes(14, 336, ((1, 1), (2, 2)), once=True)),
    "llava-next": Published(AnyRes(14, 336)),
    "llava-onevision": Published(
        AnyRes(14, 384, tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7)), drop=True),
        HALF,
        HALF,
    ),
    "llava-uhd": Published(UHD(14, 336, 6, 14), latents=64),
    "minicpm-v-4.6": Published(UHD(14, 448, 9, 56), HALF, HALF, 4),
    "hires-llava": Published(Slices(14, 336, 1344, whole=True, restored=True)),
    "downsample-then-slice": Published(Slices(14, 336, 672)),
    "qwen2-vl": Published(Native(14, 2), merge=2),
    "qwen2.5-vl": Published(Native(14, 2), merge=2),
    "qwen3-vl": Published(Native(16, 2, 65_536, 16_777_216), HALF, HALF, 2),
    "pixtral-12b": Published(Pixtral(16, 1024)),
    "mistral-small-3.1": Published(Pixtral(14, 1540, 2), merge=2),
    "kosmos-2": Published(Fixed(14, 224, 224), latents=64),
    "internvl-3": Published(Tiles(14, 448), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 2),
    "idefics2": Published(Bounded(14, 378, 980), HALF, HALF, latents=64),
    "idefics3": Published(Splits(14, 364, 1456), HALF, HALF, 2),
    "smolvlm2": Published(Splits(16, 512, 2048), HALF, HALF, 4),
    "paligemma": Published(Fixed(14, 224, 224), HALF, HALF),
    "deepseek-vl": Published(Fixed(16, 384, 384, "inset", 14)),
    "llama-3.2-vision": Published(Canvas(14, 560), latents=4 * 1601),
    "gemma-3": Published(PanAndScan(14, 896), HALF, HALF, 4),
}
