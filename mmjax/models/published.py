"""The published towers of Qwen-VL with their mergers, by name: TOWERS["qwen2.5-vl-7b"]()."""

from collections.abc import Callable

from mmjax.connectors import merger
from mmjax.encoders import vit
from mmjax.models import tower
from mmjax.nn import patch_embed, rope, transformer
from mmjax.nn.patch_embed import HALF, OPENAI


def _blocks(width: int, layers: int, hidden: int, **variant) -> transformer.Config:
    head = width // 16
    return transformer.Config(
        width=width,
        layers=layers,
        heads=16,
        kv_heads=16,
        head=head,
        hidden=hidden,
        bias=True,
        rope=rope.Config(head, (head // 4, head // 4), 10_000.0, "repeated"),
        **variant,
    )


def _qwen2(outputs: int) -> tower.Config:
    """Wang et al. 2024, table 1; `outputs` is the language model's width."""
    blocks = _blocks(1280, 32, 5120, activation="quick_gelu", gated=False, norm_kind="layer")
    embed = patch_embed.Config(14, 1280, 3, *OPENAI, bias=False, frames=2)
    return tower.Config(vit.Config(embed, blocks, final_norm=False), merger.Config(1280, outputs))


def _qwen2_5(outputs: int) -> tower.Config:
    """Bai et al. 2025 (Qwen2.5-VL), table 1: windows of 112 × 112 pixels but in blocks 7, 15, 23 and 31."""
    windowed = tuple(i for i in range(32) if i not in (7, 15, 23, 31))
    blocks = _blocks(1280, 32, 3420, windowed=windowed)
    embed = patch_embed.Config(14, 1280, 3, *OPENAI, bias=False, frames=2)
    return tower.Config(vit.Config(embed, blocks, final_norm=False), merger.Config(1280, outputs, norm="rms"))


def _qwen3(width: int, layers: int, hidden: int, outputs: int, taps: tuple[int, ...]) -> tower.Config:
    """Qwen3-VL's technical report (2025), section 2: SigLIP 2's shapes, a table of 48 × 48, DeepStack."""
    blocks = _blocks(width, layers, hidden, activation="gelu_tanh", gated=False, norm_kind="layer")
    embed = patch_embed.Config(16, width, 3, *HALF, frames=2)
    vision = vit.Config(embed, blocks, vit.Table(48, 48, "bilinear", align_corners=True), final_norm=False)
    return tower.Config(vision, merger.Config(width, outputs), taps, merger.Config(width, outputs, norm_after=True))


TOWERS: dict[str, Callable[[], tower.Config]] = {
    "qwen2-vl-2b": lambda: _qwen2(1536),
    "qwen2-vl-7b": lambda: _qwen2(3584),
    "qwen2.5-vl-3b": lambda: _qwen2_5(2048),
    "qwen2.5-vl-7b": lambda: _qwen2_5(3584),
    "qwen3-vl-2b": lambda: _qwen3(1024, 24, 4096, 2048, (5, 11, 17)),
    "qwen3-vl-8b": lambda: _qwen3(1152, 27, 4304, 4096, (8, 16, 24)),
}
