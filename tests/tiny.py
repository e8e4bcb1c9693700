"""The smallest model that has every part, for tests."""

from mmjax.connectors import mlp as connector
from mmjax.encoders import vit
from mmjax.models import decoder, vlm
from mmjax.nn import patch_embed, transformer


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
        rope_sections=(2, 2),
        rope_theta=100.0,
        rope_frequencies="repeated",
    )
    language = transformer.Config(
        width=width, layers=2, heads=4, kv_heads=2, head=8, hidden=24, rope_sections=(2, 1, 1)
    )
    return vlm.Config(
        vision=vit.Config(patch_embed.Config(patch, width), vision),
        connector=connector.Config(width, width),
        decoder=decoder.Config(vocab, language),
    )
