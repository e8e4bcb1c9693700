"""The published sizes of the encoders that encoders.vit and encoders.text make, by name: ENCODERS["clip-l14-336"]().

Numbers from the papers' tables and the models' own configs; parameter counts are tested. Pyramids (Swin, PVT) are in
encoders.published_pyramids.
"""

from collections.abc import Callable
from dataclasses import replace

from mmjax.encoders import head, text, vit
from mmjax.nn import attention_pool, mlp, norm, patch_embed, rope, transformer
from mmjax.nn.patch_embed import HALF, IMAGENET, OPENAI


def _blocks(
    width: int,
    layers: int,
    heads: int,
    hidden: int,
    activation: mlp.Activation = "gelu",
    epsilon: float = 1e-6,
    layer_scale: float | None = None,
) -> transformer.Config:
    """The plain pre-norm block: LayerNorm, biases everywhere, an MLP of two matrices."""
    return transformer.Config(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        hidden=hidden,
        activation=activation,
        gated=False,
        bias=True,
        norm_kind="layer",
        epsilon=epsilon,
        layer_scale=layer_scale,
    )


def _eva() -> vit.Config:
    """EVA-CLIP's ViT-g/14 (Fang et al. 2023) without its last layer, and a norm: Li et al. 2023, BLIP-2, section 3."""
    blocks = _blocks(1408, 39, 16, 6144)
    return vit.Config(patch_embed.Config(14, 1408, 3, *OPENAI), blocks, _square(224, 14), classes=1)


def _square(image: int, patch: int, **options) -> vit.Table:
    return vit.Table(image // patch, image // patch, **options)


def _vit(width: int, layers: int, heads: int, patch: int, image: int = 224, labels: int | None = 1000) -> vit.Config:
    """Dosovitskiy et al. 2021, table 1."""
    return vit.Config(
        patch_embed.Config(patch, width, 3, *HALF),
        _blocks(width, layers, heads, 4 * width, epsilon=1e-12),
        _square(image, patch),
        classes=1,
        head=head.Config(width, outputs=labels),
    )


def _deit(width: int, layers: int, heads: int, image: int = 224) -> vit.Config:
    """Touvron et al. 2021, table 1, distilled."""
    plain = _vit(width, layers, heads, 16, image)
    embed = patch_embed.Config(16, width, 3, *IMAGENET)
    return replace(plain, embed=embed, classes=2, head=head.Config(width, "distilled", outputs=1000))


def _dinov2(width: int, layers: int, heads: int, registers: int = 0) -> vit.Config:
    """Oquab et al. 2023, table 17; with registers Darcet et al. 2024."""
    blocks = _blocks(width, layers, heads, 4 * width, layer_scale=1.0)
    if layers == 40:
        blocks = replace(blocks, activation="silu", gated=True, hidden=(int(4 * width * 2 / 3) + 7) // 8 * 8)
    return vit.Config(
        patch_embed.Config(14, width, 3, *IMAGENET),
        blocks,
        _square(518, 14, antialias=registers > 0),
        classes=1,
        registers=registers,
        mask=True,
        head=head.Config(width),
    )


def _clip(width: int, layers: int, heads: int, patch: int, image: int, outputs: int) -> vit.Config:
    """Radford et al. 2021, table 20."""
    blocks = _blocks(width, layers, heads, 4 * width, "quick_gelu", 1e-5)
    return vit.Config(
        patch_embed.Config(patch, width, 3, *OPENAI, bias=False),
        blocks,
        _square(image, patch),
        classes=1,
        pre_norm=True,
        final_norm=False,
        head=head.Config(width, norm=norm.Config(width, "layer", 1e-5), outputs=outputs, bias=False),
    )


def _clip_text(width: int, heads: int) -> text.Config:
    return text.Config(49408, 77, _blocks(width, 12, heads, 4 * width, "quick_gelu", 1e-5), width)


def _siglip(width: int, layers: int, heads: int, hidden: int, patch: int, table: vit.Table) -> vit.Config:
    """Zhai et al. 2023; So400m is the shape of Alabdulmohsin et al. 2023. SigLIP 2: Tschannen et al. 2025."""
    pool = attention_pool.Config(width, heads, hidden)
    return vit.Config(
        patch_embed.Config(patch, width, 3, *HALF),
        _blocks(width, layers, heads, hidden, "gelu_tanh"),
        table,
        head=head.Config(width, "attention", attention=pool),
    )


def _siglip_text(width: int, layers: int, heads: int, hidden: int, vocab: int = 32_000) -> text.Config:
    return text.Config(vocab, 64, _blocks(width, layers, heads, hidden, "gelu_tanh"), width, bias=True)


def _naflex(width: int, layers: int, heads: int, hidden: int) -> vit.Config:
    return _siglip(width, layers, heads, hidden, 16, vit.Table(16, 16, "bilinear", antialias=True))


def _pixtral() -> vit.Config:
    """Agrawal et al. 2024, table 1."""
    blocks = transformer.Config(
        width=1024,
        layers=24,
        heads=16,
        kv_heads=16,
        head=64,
        hidden=4096,
        epsilon=1e-5,
        rope=rope.Config(64, (16, 16), 10_000.0, "alternating"),
    )
    return vit.Config(patch_embed.Config(16, 1024, 3, *OPENAI, bias=False), blocks, pre_norm=True, final_norm=False)


def _internvit(width: int, layers: int, heads: int, hidden: int, big: bool) -> vit.Config:
    """Chen et al. 2024 (InternVL, table 1; 1.5): 300M has LayerNorm, 6B RMSNorm, and that of queries and keys too."""
    blocks = replace(
        _blocks(width, layers, heads, hidden, layer_scale=0.1),
        norm_kind="rms" if big else "layer",
        qk_norm="width" if big else "none",
        qkv_bias=not big,
    )
    return vit.Config(
        patch_embed.Config(14, width, 3, *IMAGENET),
        blocks,
        _square(448, 14),
        classes=1,
        final_norm=False,
        head=head.Config(width, "mean"),
    )


ENCODERS: dict[str, Callable[[], vit.Config | text.Config]] = {
    "vit-b16": lambda: _vit(768, 12, 12, 16),
    "vit-b32": lambda: _vit(768, 12, 12, 32),
    "vit-l16": lambda: _vit(1024, 24, 16, 16),
    "vit-h14": lambda: _vit(1280, 32, 16, 14),
    "deit-s16-distilled": lambda: _deit(384, 12, 6),
    "deit-b16-distilled": lambda: _deit(768, 12, 12),
    "dinov2-s14": lambda: _dinov2(384, 12, 6),
    "dinov2-b14": lambda: _dinov2(768, 12, 12),
    "dinov2-l14": lambda: _dinov2(1024, 24, 16),
    "dinov2-g14": lambda: _dinov2(1536, 40, 24),
    "dinov2-l14-registers": lambda: _dinov2(1024, 24, 16, 4),
    "clip-b32": lambda: _clip(768, 12, 12, 32, 224, 512),
    "clip-b16": lambda: _clip(768, 12, 12, 16, 224, 512),
    "clip-l14": lambda: _clip(1024, 24, 16, 14, 224, 768),
    "clip-l14-336": lambda: _clip(1024, 24, 16, 14, 336, 768),
    "clip-b-text": lambda: _clip_text(512, 8),
    "clip-l-text": lambda: _clip_text(768, 12),
    "siglip-b16-224": lambda: _siglip(768, 12, 12, 3072, 16, _square(224, 16)),
    "siglip-l16-384": lambda: _siglip(1024, 24, 16, 4096, 16, _square(384, 16)),
    "siglip-so400m14-384": lambda: _siglip(1152, 27, 16, 4304, 14, _square(384, 14)),
    "siglip-b-text": lambda: _siglip_text(768, 12, 12, 3072),
    "siglip-so400m-text": lambda: _siglip_text(1152, 27, 16, 4304),
    "siglip2-b16-naflex": lambda: _naflex(768, 12, 12, 3072),
    "siglip2-so400m16-naflex": lambda: _naflex(1152, 27, 16, 4304),
    "eva-g14": _eva,
    "pixtral-400m": _pixtral,
    "internvit-300m": lambda: _internvit(1024, 24, 16, 4096, False),
    "internvit-6b": lambda: _internvit(3200, 45, 25, 12800, True),
}
